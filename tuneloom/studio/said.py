"""What loading, training and exporting say, in the visitor's language.

They speak English, in terminals and logs. Each of their lines has its text in the table, under `said.`; what is wrong with
rows of data has its under `row.`, with anything else that was given under `wrong.`. The English one is the pattern by which
a line is known, and what stood in its gaps is put into the other.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Literal

from tuneloom.errors import UserError
from tuneloom.studio.texts import TEXTS, Texts

About = Literal["said", "row", "wrong"]
_GAP = re.compile(r"\{(\w+)\}")
_COUNTED = re.compile(r"(.+?) (\d+/\d+)")
_NESTED = ("message", "what", "why", "faster", "measured", "value", "reason", "mend", "kind")
"""Gaps that hold a line of their own."""
_LOOKED_UP: dict[About, tuple[About, ...]] = {"said": ("said", "wrong"), "row": ("row",), "wrong": ("wrong", "row")}
_OF_A_MISTAKE = ("fault", "got", "expected", "mend")
"""Lines that a log tells a user's mistake in."""


def heard(texts: Texts, line: str, about: About = "said") -> str:
    """Return a line in the visitor's language; one that is not known stays as it is.

    Args:
        texts: of the visitor.
        line: as it was said.
        about: `said`: on the way of a job; `row`: of a row of data, its fault or its mend; `wrong`: of a user's mistake.
    """
    if texts.language == "en":
        return line
    for known in _LOOKED_UP[about]:
        if (told := _known(texts, line.strip(), known)) is not None:
            return told
    return line


def _known(texts: Texts, line: str, about: About) -> str | None:
    for name, pattern in _patterns(about):
        if found := pattern.fullmatch(line):
            inner: About = "wrong" if about == "said" and name in _OF_A_MISTAKE else about
            gaps = {gap: heard(texts, value, inner) if gap in _NESTED else value for gap, value in found.groupdict().items()}
            return texts({"said": f"said.{name}", "row": f"row.{name}", "wrong": f"wrong.{name}"}[about], **gaps)
    if about == "said" and (counted := _COUNTED.fullmatch(line)):
        return f"{heard(texts, counted[1])} {counted[2]}"
    return None


def heard_mistake(texts: Texts, error: UserError) -> UserError:
    """Return a user's mistake in the visitor's language."""
    facts = {fact: getattr(error, fact) for fact in ("got", "expected", "mend")}
    told = {fact: heard(texts, value, "wrong") for fact, value in facts.items() if value is not None}
    return UserError(heard(texts, error.what, "wrong"), where=error.where, **told)


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
