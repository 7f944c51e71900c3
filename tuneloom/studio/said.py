"""What loading, training and exporting say, in the visitor's language.

They speak English, in terminals and logs. Each of their lines has its text in the table, under `said.`, and what is wrong
with rows of data under `row.`: the English one is the pattern by which a line is known, and what stood in its gaps is put
into the other.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Literal

from tuneloom.studio.texts import TEXTS, Texts

About = Literal["said", "row"]
_GAP = re.compile(r"\{(\w+)\}")
_COUNTED = re.compile(r"(.+?) (\d+/\d+)")
_NESTED = ("message", "what", "why", "faster", "measured")
"""Gaps that hold a line of their own."""


def heard(texts: Texts, line: str, about: About = "said") -> str:
    """Return a line in the visitor's language; one that is not known stays as it is.

    Args:
        texts: of the visitor.
        line: as it was said.
        about: `said`: on the way of a job; `row`: of a row of data, its fault or its mend.
    """
    if texts.language == "en":
        return line
    text = line.strip()
    for name, pattern in _patterns(about):
        if found := pattern.fullmatch(text):
            gaps = {gap: heard(texts, value, about) if gap in _NESTED else value for gap, value in found.groupdict().items()}
            return texts(f"said.{name}" if about == "said" else f"row.{name}", **gaps)
    if about == "said" and (counted := _COUNTED.fullmatch(text)):
        return f"{heard(texts, counted[1])} {counted[2]}"
    return line


def heard_step(texts: Texts, step: str) -> str:
    """Return a step of a job, which was said with three dots behind it, without them."""
    said = f"{step} ..."
    return step if (told := heard(texts, said)) == said else told.rstrip("…")


def heard_log(texts: Texts, log: str) -> str:
    """Return a log, line by line."""
    return log if texts.language == "en" else "\n".join(heard(texts, line) for line in log.split("\n"))


@cache
def _patterns(about: About) -> list[tuple[str, re.Pattern[str]]]:
    """Return the patterns by name: those that begin with words of their own first, and of these those with the most."""
    prefix = f"{about}."
    known = {key.removeprefix(prefix): pair[0] for key, pair in TEXTS.items() if key.startswith(prefix)}
    ordered = sorted(known.items(), key=lambda item: (item[1].startswith("{"), -len(_GAP.sub("", item[1]))))
    return [(name, _pattern(text)) for name, text in ordered]


def _pattern(text: str) -> re.Pattern[str]:
    words = _GAP.split(text)  # text, gap, text, gap, ..., text
    return re.compile("".join(re.escape(word) if i % 2 == 0 else f"(?P<{word}>.+?)" for i, word in enumerate(words)))
