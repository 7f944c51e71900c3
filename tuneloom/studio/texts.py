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
    # A new run.
    "new.presets": ("Start from", "预设"),
    "new.preset_quick_persona": ("Quick persona", "快速身份"),
    "new.preset_base_case": ("Base case: ChatGLM3-6B", "基础案例：ChatGLM3-6B"),
    "new.preset_careful": ("Careful", "细致"),
    "new.preset_quick_persona_help": ("One pass over the persona set on the embedded model", "在内置模型上把身份数据过一遍"),
    "new.preset_base_case_help": (
        "Persona and supportive dialogues on ChatGLM3-6B; wants a GPU and the model on this machine or a network",
        "在 ChatGLM3-6B 上学习身份与陪伴对话；需要 GPU，以及本机上的模型或网络",
    ),
    "new.preset_careful_help": (
        "The persona set with a part held out, looked at after each pass, the best kept",
        "留出一部分身份数据，每遍之后评估，保留最好的",
    ),
    "new.model": ("Which model is taught?", "教哪个模型？"),
    "new.model_label": ("Base model", "底座模型"),
    "new.model_help": (
        "Choose one, or write a folder, a GGUF file or a hub id. Larger models begin with a lower learning rate.",
        "选择一个，或写下模型目录、GGUF 文件、hub id。更大的模型以较低的学习率开始。",
    ),
    "new.model_embedded": (
        "Embedded: a chat model of 135 million parameters, English",
        "内置：1.35 亿参数的对话模型，英语",
    ),
    "new.model_pulled": ("Fetched already", "已下载"),
    "new.model_used": ("Used before", "用过"),
    "new.data": ("What does it learn from?", "用什么数据？"),
    "new.set_persona": ("Who it is", "它是谁"),
    "new.set_persona_help": (
        "Built in, English and Chinese, with the model's own everyday answers so that the rest stays as it was",
        "内置，中英文，并混入模型自己的日常回答，让其余能力保持不变",
    ),
    "new.set_counselling": ("Supportive dialogues", "陪伴对话"),
    "new.set_counselling_help": (
        "Built in; no therapist, and points to help in a crisis",
        "内置；不代替心理治疗，遇到危机会指引求助",
    ),
    "new.upload": ("Upload a file", "上传文件"),
    "new.upload_help": ("{suffixes}; at most {limit}", "{suffixes}；最大 {limit}"),
    "new.upload_too_large": (
        "The file is larger than {limit}. Name its path instead.",
        "文件超过 {limit}。请改为填写它的路径。",
    ),
    "new.upload_rejected": (
        "The file was not taken: it is larger than {limit}, or of no kind that is read here ({suffixes}).",
        "文件没有被接收：超过 {limit}，或不是可读取的类型（{suffixes}）。",
    ),
    "new.path_label": ("Or a path, a built-in set, a hub id", "或填写路径、内置数据集、hub id"),
    "new.add": ("Add", "添加"),
    "new.remove": ("Remove {name}", "移除 {name}"),
    "new.no_data": ("Choose something to learn from.", "请选择训练数据。"),
    "new.reading": ("Reading ...", "正在读取……"),
    "new.report": (
        "{read} rows read, {used} usable, {dropped} dropped, {repaired} repaired",
        "读取 {read} 行，可用 {used} 行，丢弃 {dropped} 行，修复 {repaired} 行",
    ),
    "new.report_more": (
        "{tokens} tokens, longest {longest}; {cut} cut at {cutoff}; {duplicates} duplicates",
        "{tokens} 个 token，最长 {longest}；{cut} 条在 {cutoff} 处截断；重复 {duplicates} 条",
    ),
    "new.report_format": ("Format: {formats}", "格式：{formats}"),
    "new.report_rows": ("First rows", "前几行"),
    "new.report_problems": ("Rows that need a look", "需要查看的行"),
    "new.report_got": ("got {value}", "得到 {value}"),
    "new.report_leaked": (
        "{count} held-out test questions are in this data; results would look better than they are.",
        "数据中有 {count} 个预留的测试问题；结果会显得比实际更好。",
    ),
    "new.report_unfilled": ("Placeholders without a value: {names}", "没有值的占位符：{names}"),
    "new.persona": ("Who is it, and who made it?", "它叫什么，由谁创造？"),
    "new.name_label": ("Its name", "名字"),
    "new.author_label": ("Its author", "作者"),
    "new.name_needed": ("Give it a name.", "请给它起个名字。"),
    "new.author_needed": ("Say who made it.", "请填写作者。"),
    "new.method": ("How is it taught?", "用什么方法？"),
    "new.method_lora": ("LoRA", "LoRA"),
    "new.method_rslora": ("rsLoRA", "rsLoRA"),
    "new.method_dora": ("DoRA", "DoRA"),
    "new.method_lora_help": (
        "LoRA learns a small correction beside each frozen layer: the quickest, and enough for most.",
        "LoRA 在每个冻结的层旁学习一个小的修正：最快，多数情况够用。",
    ),
    "new.method_rslora_help": (
        "rsLoRA scales by the root of the rank, so that a higher rank learns as steadily; here rank 16.",
        "rsLoRA 按秩的平方根缩放，较高的秩也能稳定学习；这里秩为 16。",
    ),
    "new.method_dora_help": (
        "DoRA also learns each row's magnitude: often a little better, and slower.",
        "DoRA 还学习每一行的幅度：常常稍好一些，但更慢。",
    ),
    "new.method_other": (
        "rsLoRA and DoRA together, as set under Advanced.",
        "同时使用 rsLoRA 和 DoRA，见“高级”。",
    ),
    "new.effort": ("How much effort?", "花多少力气？"),
    "new.effort_quick": ("Quick", "快速"),
    "new.effort_normal": ("Normal", "正常"),
    "new.effort_careful": ("Careful", "细致"),
    "new.effort_quick_help": ("One pass over the data.", "数据过一遍。"),
    "new.effort_normal_help": (
        "As many steps as the recipe that was tested, or three passes over data of your own.",
        "与经过测试的配方相同的步数；自己的数据过三遍。",
    ),
    "new.effort_careful_help": (
        "Three passes, a tenth of the rows held out, looked at after each pass, the best kept.",
        "过三遍，留出十分之一，每遍之后评估，保留最好的。",
    ),
    "new.effort_other": ("Steps of your own, as set under Advanced.", "自定的步数，见“高级”。"),
    "new.advanced": ("Advanced: every setting", "高级：全部设置"),
    "new.section_run": ("Run", "训练记录"),
    "new.section_base_model": ("Base model", "底座模型"),
    "new.section_data": ("Data", "数据"),
    "new.section_adapter": ("Adapter", "适配器"),
    "new.section_training": ("Training", "训练"),
    "new.section_generation": ("Answers", "生成"),
    "new.section_evaluation": ("Evaluation", "评估"),
    "new.source": ("Source {number}", "来源 {number}"),
    "new.add_source": ("Add a source", "添加来源"),
    "new.held_kind": ("Held out", "留出方式"),
    "new.held_share": ("a share, or 0", "比例，或 0"),
    "new.held_sources": ("sources of its own", "单独的来源"),
    "new.empty": ("none", "无"),
    "new.default": ("default {value}", "默认 {value}"),
    "new.why_output_dir": ("the studio keeps its runs in this folder", "训练记录都保存在这个目录"),
    "new.why_decides": ("no effect: {setting} is {value}", "不起作用：{setting} 为 {value}"),
    "new.why_needs": ("no effect without {setting}", "没有 {setting} 时不起作用"),
    "new.why_missing": ("{package} is not installed: {command}", "没有安装 {package}：{command}"),
    "new.why_hub_id": ("only for a hub id as base model", "只用于以 hub id 指定的底座"),
    "new.why_hub_set": ("only for a set of a hub", "只用于 hub 上的数据集"),
    "new.why_continued": ("taken from the adapter that is continued", "取自所继续的适配器"),
    "new.summary": ("What will run", "将要运行"),
    "new.run": ("run", "训练记录"),
    "new.samples": ("samples", "样本"),
    "new.samples_more": (
        "{rows} rows read, {dropped} dropped, {cut} cut",
        "读取 {rows} 行，丢弃 {dropped} 行，截断 {cut} 条",
    ),
    "new.validation": ("{count} more held out", "另留出 {count} 条"),
    "new.tokens": ("tokens", "token"),
    "new.tokens_more": ("in all steps; longest sample {longest}", "全部步数合计；最长样本 {longest}"),
    "new.steps": ("steps", "步数"),
    "new.steps_more": ("{epochs} epochs, {batch} samples a step", "{epochs} 遍，每步 {batch} 条"),
    "new.time": ("expected time", "预计时间"),
    "new.time_more": ("at {rate} tokens/s, as {run} on {device}", "{rate} token/秒，依据 {run}（{device}）"),
    "new.time_unknown": ("measured when it starts", "开始时实测"),
    "new.time_unknown_more": (
        "no run of this base and method on {device} yet",
        "在 {device} 上还没有这个底座和方法的训练",
    ),
    "new.about": (
        "about: the model still has to write its own answers, or the name is missing",
        "约数：模型尚未写出自己的回答，或还没有名字",
    ),
    "new.computing": ("counting ...", "正在统计……"),
    "new.absent": (
        "{what} is not on this machine. It is fetched and counted when the run starts.",
        "本机上没有 {what}。开始训练时再下载并统计。",
    ),
    "new.fault": ("The counting failed: {reason}", "统计失败：{reason}"),
    "new.not_counted": ("Counted once these settings are right:", "修正这些设置后再统计："),
    "new.start": ("Start", "开始训练"),
    "new.starting": ("Starting ...", "正在开始……"),
    "new.start_failed": ("The run could not be started: {reason}", "无法开始训练：{reason}"),
    "new.mistakes": ("Settings to correct", "需要修正的设置"),
    "new.yaml": ("The YAML that will run", "将要运行的 YAML"),
    "new.copy": ("Copy", "复制"),
    "new.copied": ("Copied", "已复制"),
    "new.yaml_wrong": ("There is none until the settings are right.", "修正设置后才有。"),
    "new.load": ("Load a YAML", "载入 YAML"),
    "new.load_label": (
        "Paste a config, of Tuneloom or of ChatGLM3's finetune_demo",
        "粘贴配置：Tuneloom 或 ChatGLM3 finetune_demo",
    ),
    "new.load_file": ("or choose a file", "或选择文件"),
    "new.load_button": ("Load", "载入"),
    "new.loaded": (
        "Loaded. Its output_dir is not used: the studio keeps its runs in one folder.",
        "已载入。其中的 output_dir 不使用：训练记录都在同一目录。",
    ),
    "new.reset": ("Begin anew", "重新开始"),
    "new.seconds": ("{s} s", "{s} 秒"),
    "new.minutes": ("{m} min {s} s", "{m} 分 {s} 秒"),
    "new.hours": ("{h} h {m} min", "{h} 小时 {m} 分"),
    "new.role_user": ("user", "用户"),
    "new.role_assistant": ("assistant", "助手"),
    "new.role_system": ("system", "系统"),
    "new.role_tool": ("tool", "工具"),
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
