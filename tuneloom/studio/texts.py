"""Every text that the studio shows, in English and Chinese: the one table."""

from __future__ import annotations

from typing import Literal, get_args

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = get_args(Language)

TEXTS: dict[str, tuple[str, str]] = {
    # The frame.
    "frame.tagline": ("Teach a chat model who it is", "让对话模型认识自己"),
    "frame.new_run": ("New run", "新建训练"),
    "frame.runs": ("Runs", "训练记录"),
    "frame.chat": ("Chat", "对话"),
    "frame.predict": ("Predict", "预测评估"),
    "frame.export": ("Export", "导出"),
    "frame.language": ("中文", "English"),
    "frame.language_help": ("切换到中文", "Switch to English"),
    "frame.theme_help": ("Light or dark", "浅色或深色"),
    "frame.no_runs": ("No runs yet", "还没有训练记录"),
    "frame.skip": ("Skip to the content", "跳到正文"),
    "frame.not_found": ("There is nothing here.", "这里没有内容。"),
    # Choosing what to talk to, measure or export.
    "target.label": ("Run or model", "训练记录或模型"),
    "target.other": ("Another folder or model …", "其他文件夹或模型……"),
    "target.state": ("Which of its states", "使用哪个状态"),
    "target.adapter": ("the result (adapter)", "最终结果（适配器）"),
    "target.typed": ("Path of a folder, or a model's name", "文件夹路径或模型名称"),
    "target.use": ("Use", "使用"),
    "target.none": ("Type a path or a model's name.", "请输入路径或模型名称。"),
    # Chat.
    "chat.unknown": ("This run is not there any more. Choose another one.", "该训练记录已不存在，请另选一个。"),
    "chat.asleep": ("Not loaded; loads with the first message.", "尚未载入；发送第一条消息时载入。"),
    "chat.loading": ("Loading, {seconds} s  {message}", "载入中，{seconds} 秒  {message}"),
    "chat.ready": ("Ready. Base model: {message}", "就绪。基座模型：{message}"),
    "chat.failed": ("The model could not be loaded, or has ended.", "模型无法载入，或进程已结束。"),
    "chat.load_again": ("Load again", "重新载入"),
    "chat.settings": ("System prompt and sampling", "系统提示词与采样设置"),
    "chat.system": ("System prompt", "系统提示词"),
    "chat.temperature": ("Temperature", "温度"),
    "chat.top_p": ("Top-p", "Top-p"),
    "chat.top_k": ("Top-k", "Top-k"),
    "chat.max_new_tokens": ("Longest answer, tokens", "最长回答（词元）"),
    "chat.repetition_penalty": ("Repetition penalty", "重复惩罚"),
    "chat.greedy": (
        "Temperature 0 always takes the likeliest token: the same question has the same answer. Top-k 0: all tokens.",
        "温度为 0 时总是选取概率最高的词元，同样的问题得到同样的回答。Top-k 为 0 表示不限制。",
    ),
    "chat.both": ("Base beside it", "并排显示基座模型"),
    "chat.no_adapter": ("A model without an adapter has nothing to be compared with.", "没有适配器的模型无可比较。"),
    "chat.log": ("Conversation", "对话内容"),
    "chat.message": ("Message", "消息"),
    "chat.enter": ("Enter sends, Shift+Enter begins a new line", "回车发送，Shift+回车换行"),
    "chat.send": ("Send", "发送"),
    "chat.stop": ("Stop", "停止"),
    "chat.again": ("Regenerate", "重新生成"),
    "chat.clear": ("Clear", "清空"),
    "chat.empty": ("Nothing said yet. Ask it who it is.", "还没有对话。问问它是谁吧。"),
    "chat.you": ("You", "你"),
    "chat.base": ("Base", "基座模型"),
    "chat.tuned": ("Tuned", "微调后"),
    "chat.model": ("Model", "模型"),
    "chat.busy": ("An answer is being written.", "正在生成回答。"),
    "chat.nothing_yet": ("There is no answer yet to write again or to clear.", "还没有可以重新生成或清空的内容。"),
    "chat.reply_waiting": ("waiting …", "等待中……"),
    "chat.reply_writing": ("writing …", "生成中……"),
    "chat.reply_length": ("reached the longest answer", "达到最长回答长度"),
    "chat.reply_stopped": ("stopped", "已停止"),
    "chat.took": ("{tokens} tokens, {seconds} s", "{tokens} 个词元，{seconds} 秒"),
    "chat.nothing": ("(nothing)", "（空）"),
    "chat.replaced": ("Another model was loaded meanwhile.", "其间载入了另一个模型。"),
    "chat.try_again": ("Regenerate asks once more.", "点击“重新生成”可再次提问。"),
    # Jobs: what predictions and exports have in common.
    "job.none": ("None yet.", "还没有记录。"),
    "job.running": ("running", "进行中"),
    "job.done": ("done", "已完成"),
    "job.failed": ("failed", "失败"),
    "job.killed": ("stopped", "已停止"),
    "job.killed_why": ("It was stopped, or its process was ended from outside.", "任务已被停止，或其进程被外部终止。"),
    "job.stop": ("Stop", "停止"),
    "job.log": ("Log", "日志"),
    # Predict.
    "predict.past": ("Predictions", "预测记录"),
    "predict.new": ("New prediction", "新建预测"),
    "predict.data": ("Data", "数据"),
    "predict.own": ("the run's held-out rows", "该训练保留的验证数据"),
    "predict.builtin": ("built in: {name}", "内置：{name}"),
    "predict.a_path": ("a file or folder on this machine …", "本机的文件或文件夹……"),
    "predict.path": ("Path of the data", "数据路径"),
    "predict.upload": ("upload a file …", "上传文件……"),
    "predict.upload_label": ("A data file, 512 MB at most", "数据文件，最大 512 MB"),
    "predict.uploaded": ("{name} is here.", "{name} 已上传。"),
    "predict.rejected": (
        "Not taken: one json, jsonl, csv, tsv, txt, parquet or arrow file of 512 MB at most.",
        "未接受：请选择一个不超过 512 MB 的 json、jsonl、csv、tsv、txt、parquet 或 arrow 文件。",
    ),
    "predict.max_rows": ("Rows at most", "最多行数"),
    "predict.max_new_tokens": ("Longest answer, tokens", "最长回答（词元）"),
    "predict.compare": ("Measure the base too", "同时评估基座模型"),
    "predict.start": ("Start", "开始"),
    "predict.no_data": ("Name the data first.", "请先选择数据。"),
    "predict.no_number": ("Both numbers must be 1 or more.", "两个数字都必须不小于 1。"),
    "predict.rows_at_most": ("{rows} rows at most", "最多 {rows} 行"),
    "predict.loading": ("loading the model …", "正在载入模型……"),
    "predict.doing_loss": ("loss, micro-batches", "计算损失，微批次"),
    "predict.doing_answers": ("answers", "生成回答"),
    "predict.loss": ("Loss, nats a token", "损失（每词元 nat）"),
    "predict.perplexity": ("Perplexity", "困惑度"),
    "predict.rouge_1": ("ROUGE-1, 0 to 100", "ROUGE-1（0 到 100）"),
    "predict.rouge_2": ("ROUGE-2, 0 to 100", "ROUGE-2（0 到 100）"),
    "predict.rouge_l": ("ROUGE-L, 0 to 100", "ROUGE-L（0 到 100）"),
    "predict.bleu_4": ("BLEU-4, 0 to 1", "BLEU-4（0 到 1）"),
    "predict.counts": (
        "{num_samples} conversations, {num_supervised_tokens} supervised tokens, {num_answers} answers",
        "{num_samples} 段对话，{num_supervised_tokens} 个参与计算的词元，{num_answers} 条回答",
    ),
    "predict.problems": ("{number} rows left out or repaired", "{number} 行被略过或修复"),
    "predict.prompt": ("Prompt", "提问"),
    "predict.answer": ("Answer", "回答"),
    "predict.base_answer": ("Base's answer", "基座模型的回答"),
    "predict.reference": ("Reference", "参考答案"),
    "predict.empty": ("(nothing)", "（空）"),
    "predict.search": ("Search", "搜索"),
    "predict.shown": ("{begin} to {end} of {total}", "第 {begin} 到 {end} 条，共 {total} 条"),
    "predict.back": ("Previous page", "上一页"),
    "predict.next": ("Next page", "下一页"),
    "predict.download": ("Download", "下载"),
    # Export.
    "export.past": ("Exports", "导出记录"),
    "export.new": ("New export", "新建导出"),
    "export.to": ("Format", "格式"),
    "export.merged": ("merged: one model", "合并：一个完整模型"),
    "export.adapter": ("adapter alone", "仅适配器"),
    "export.chatglm": ("ChatGLM's original layout", "ChatGLM 原始格式"),
    "export.merged_help": (
        "The adapter is folded into the base. The folder is loaded again in a fresh process and must answer the same.",
        "将适配器合并进基座模型。导出后会在新进程中重新载入，并核对回答一致。",
    ),
    "export.adapter_help": (
        "The adapter in PEFT's layout, read back and compared. It has no precision to choose.",
        "PEFT 格式的适配器，写入后读回比对。此格式没有可选精度。",
    ),
    "export.chatglm_help": (
        "For tools that read ChatGLM's original checkpoint; needs a base in that layout.",
        "供读取 ChatGLM 原始权重的工具使用；基座模型须为该格式。",
    ),
    "export.precision": ("Precision", "精度"),
    "export.auto": ("auto: as the base is stored", "自动：与基座存储一致"),
    "export.name": ("Name of the folder", "文件夹名称"),
    "export.start": ("Export", "导出"),
    "export.no_run": ("There is no run with an adapter yet.", "还没有带适配器的训练记录。"),
    "export.no_chatglm": (
        "The base of this run is not in ChatGLM's original layout.",
        "该训练的基座模型不是 ChatGLM 原始格式。",
    ),
    "export.no_adapter": ("There is no adapter in this folder.", "该文件夹中没有适配器。"),
    "export.bad_name": (
        "A name has letters, digits, dots, dashes and underscores, and begins with a letter or digit.",
        "名称只能包含字母、数字、点、短横线和下划线，并以字母或数字开头。",
    ),
    "export.taken": ("There is a folder of this name; nothing is overwritten.", "同名文件夹已存在；不会覆盖任何内容。"),
    "export.passed": ("Checked: the export answers as the tuned model.", "检查通过：导出结果与微调模型一致。"),
    "export.not_passed": ("The check did not pass.", "检查未通过。"),
    "export.gone": ("The folder is not there any more: {place}", "文件夹已不存在：{place}"),
    "export.max_logit_difference": ("Largest logit difference", "最大 logit 差"),
    "export.mean_kl": ("KL to the tuned model, nats", "与微调模型的 KL（nat）"),
    "export.top1_agreement": ("Same greedy token", "贪心词元一致率"),
    "export.positions": ("Positions compared", "比对的位置数"),
    "export.layers": ("Layers read back", "读回的层数"),
    "export.max_difference": ("Largest relative difference", "最大相对差"),
    "export.size": ("Size", "大小"),
    "export.copy": ("Copy the path", "复制路径"),
    "export.talk": ("Talk to it", "与它对话"),
    "export.copied": ("Copied.", "已复制。"),
    # Phases of a run.
    "phase.preparing": ("preparing", "准备中"),
    "phase.training": ("training", "训练中"),
    "phase.evaluating": ("evaluating", "评估中"),
    "phase.saving": ("saving", "保存中"),
    "phase.done": ("done", "已完成"),
    "phase.failed": ("failed", "失败"),
    "phase.interrupted": ("stopped", "已停止"),
    "phase.dead": ("killed", "被终止"),
    "phase.unknown": ("unreadable", "无法读取"),
}


class Texts:
    """The texts of one language: `texts("frame.runs")`; `{name}` in a text is filled from keywords."""

    def __init__(self, language: Language) -> None:
        self.language = language
        self._column = LANGUAGES.index(language)

    def __call__(self, key: str, **values: object) -> str:
        """Return a text.

        Raises:
            KeyError: a key that is not in the table.
        """
        text = TEXTS[key][self._column]
        return text.format(**values) if values else text
