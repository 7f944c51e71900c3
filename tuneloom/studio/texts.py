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
