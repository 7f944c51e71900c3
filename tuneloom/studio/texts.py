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
    # A run.
    "run.stop": ("Stop", "停止"),
    "run.stop_help": ("Saves a checkpoint, then ends", "保存检查点后结束"),
    "run.stopping": ("stopping", "正在停止"),
    "run.stopping_note": ("Stopping: it saves a checkpoint, then ends.", "正在停止：保存检查点后结束。"),
    "run.resume": ("Resume", "继续训练"),
    "run.resume_help": ("Goes on from the newest whole checkpoint", "从最新的完整检查点继续"),
    "run.begin_again": ("Begin again", "重新开始"),
    "run.begin_again_help": ("There is no checkpoint yet: it begins at the first step", "还没有检查点：将从第一步开始"),
    "run.resuming_note": ("Resuming: the model and the data are being prepared.", "正在恢复：准备模型和数据。"),
    "run.no_resume": ("It cannot be resumed.", "无法继续训练。"),
    "run.resume_done": ("The run is done: there is nothing left to train.", "训练已完成，没有剩余的步骤。"),
    "run.resume_live": ("It is being trained right now.", "正在训练中。"),
    "run.resume_config": ("config.yaml cannot be read: {fault}", "无法读取 config.yaml：{fault}"),
    "run.not_live": ("It is not running any more.", "训练已经不在运行。"),
    "run.interrupted_note": ("Stopped before its end. Resume goes on where it stopped.", "在结束前停止，可以从停止处继续。"),
    "run.failed_note": ("The run failed.", "训练失败。"),
    "run.dead_note": (
        "The training process is gone without a word: it was killed, by someone, by a lack of memory, or with the machine.",
        "训练进程已消失，没有留下说明：可能被人终止、内存不足，或机器重启。",
    ),
    "run.unknown_note": (
        "The run's state cannot be read: state.json is missing or torn.",
        "无法读取训练状态：state.json 缺失或损坏。",
    ),
    "run.job_failed": ("The last attempt to resume it failed.", "上一次继续训练的尝试失败。"),
    "run.warning": ("Warning", "警告"),
    "run.progress": ("Progress", "进度"),
    "run.step": ("Step", "步数"),
    "run.eta": ("Time left", "剩余时间"),
    "run.took": ("Time taken", "已用时间"),
    "run.train_loss": ("Training loss", "训练损失"),
    "run.eval_loss": ("Validation loss", "验证损失"),
    "run.speed": ("Tokens per second", "每秒词元数"),
    "run.memory": ("Peak memory", "内存峰值"),
    "run.loss_chart": ("Loss", "损失"),
    "run.smooth": ("Smooth", "平滑"),
    "run.smoothed": ("smoothed", "平滑"),
    "run.learning_rate": ("Learning rate", "学习率"),
    "run.grad_norm": ("Gradient norm", "梯度范数"),
    "run.tokens_per_second": ("Tokens per second", "每秒词元数"),
    "run.peak_memory_gib": ("Peak memory (GiB)", "内存峰值（GiB）"),
    "run.png": ("Save the chart as PNG", "将图表保存为 PNG"),
    "run.csv": ("Save all numbers as CSV", "将全部数值保存为 CSV"),
    "run.answers": ("Sample answers", "示例回答"),
    "run.settings": ("Settings that are not the default", "与默认值不同的设置"),
    "run.data": ("Data", "数据"),
    "run.no_data": ("There is no report of the data.", "没有数据报告。"),
    "run.data_read": ("Rows read", "读取的行"),
    "run.data_used": ("Rows used", "使用的行"),
    "run.data_repaired": ("Repaired", "已修复"),
    "run.data_cut": ("Cut", "已截断"),
    "run.data_dropped": ("Dropped", "已丢弃"),
    "run.data_duplicates": ("Duplicates", "重复"),
    "run.data_train": ("Training", "训练"),
    "run.data_validation": ("Validation", "验证"),
    "run.data_samples": ("samples", "样本"),
    "run.data_tokens": ("tokens", "词元"),
    "run.data_supervised_tokens": ("supervised tokens", "监督词元"),
    "run.checkpoints": ("Checkpoints", "检查点"),
    "run.no_checkpoints": ("None yet", "暂无"),
    "run.adapter": ("adapter (the result)", "adapter（结果）"),
    "run.log": ("Log", "日志"),
    "run.no_log": (
        "This run was not started in the studio: its log is in the terminal.",
        "此训练不是在本页面启动的，日志在终端中。",
    ),
    "run.reading": ("Reading a long run …", "正在读取较长的训练记录……"),
    "run.starting": ("Starting …", "正在启动……"),
    # The list of runs.
    "runs.name": ("Run", "训练"),
    "runs.state": ("State", "状态"),
    "runs.train_loss": ("Loss", "损失"),
    "runs.eval_loss": ("Validation", "验证"),
    "runs.started": ("Started, took", "开始，用时"),
    "runs.size": ("Size", "大小"),
    "runs.filter": ("Filter by name, model, method or state", "按名称、模型、方法或状态筛选"),
    "runs.none": ("No runs yet. Start one under “New run”.", "还没有训练记录，请在“新建训练”中开始。"),
    "runs.no_match": ("No run matches.", "没有匹配的训练。"),
    "runs.rename": ("Rename", "重命名"),
    "runs.new_name": ("New name", "新名称"),
    "runs.delete": ("Delete", "删除"),
    "runs.keep": ("Keep", "取消"),
    "runs.delete_sure": ("Delete {name} ({size}) for good?", "永久删除 {name}（{size}）？"),
    "runs.delete_followed": (
        "These continue from it and could not be resumed: {names}",
        "以下训练以它为起点，删除后将无法继续：{names}",
    ),
    "runs.continued": ("These continue from it and name its folder: {names}", "以下训练以它为起点并引用其文件夹：{names}"),
    "runs.name_bad": (
        "A name begins with a letter or digit; then letters, digits, dots, dashes and underscores, 100 at most",
        "名称以字母或数字开头，只含字母、数字、点、横线和下划线，最长 100 个字符",
    ),
    "runs.name_taken": ("{name} is there already", "{name} 已存在"),
    "runs.live": ("It is being trained: stop it first", "正在训练：请先停止"),
    "runs.outside": ("It is a link, or not directly in the folder of runs", "它是链接，或不在训练文件夹中"),
    "runs.gone": ("It is not there any more", "它已不存在"),
    "runs.not_deleted": ("It could not be deleted: {reason}", "无法删除：{reason}"),
    "runs.broken": ("No run any more: {missing} is missing", "已不是完整的训练：缺少 {missing}"),
    "runs.no_access": ("The folder may not be read", "没有读取该文件夹的权限"),
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
