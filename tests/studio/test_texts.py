"""One table of texts: both languages, the same placeholders, and no key that is missing or of no use."""

from __future__ import annotations

import ast
import re
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from tuneloom.rundir import END_PHASES
from tuneloom.runs import DEAD, UNKNOWN
from tuneloom.studio.texts import LANGUAGES, TEXTS, Texts

SOURCES = sorted(
    file for file in (ROOT / "tuneloom" / "studio").rglob("*.py") if file.name not in ("texts.py", "heard_texts.py")
)
SECTIONS = {key.partition(".")[0] for key in TEXTS}


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def patterns(source: str) -> Iterator[tuple[int, re.Pattern[str]]]:
    """Yield what looks like a key of the table in a source: whole strings, and f-strings with anything in their gaps."""
    tree = ast.parse(source)
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        pieces: list[str | None] = []
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            pieces = [node.value]
        elif isinstance(node, ast.JoinedStr):
            pieces = [str(part.value) if isinstance(part, ast.Constant) else None for part in node.values]
        first = pieces[0] if pieces else None
        if first is None or first.partition(".")[0] not in SECTIONS or "." not in first:
            continue
        if re.fullmatch(r"[a-z_]+\.[a-z0-9_.-]*", "".join(piece or "" for piece in pieces)):
            yield node.lineno, re.compile("".join("[a-z0-9_.-]+" if piece is None else re.escape(piece) for piece in pieces))


def test_every_text_is_there_in_both_languages_with_the_same_placeholders() -> None:
    for key, pair in TEXTS.items():
        assert re.fullmatch(r"[a-z_]+(\.[a-z0-9_-]+)+", key), key
        assert len(pair) == len(LANGUAGES), key
        assert all(text.strip() == text != "" for text in pair), key
        assert placeholders(pair[0]) == placeholders(pair[1]), key
        if len(pair[0]) > 24 and key != "frame.language_help":
            assert re.search(r"[一-鿿]", pair[1]), f"{key} looks untranslated"


def test_every_key_that_is_used_is_in_the_table() -> None:
    keys = list(TEXTS)
    missing = [
        f"{file.relative_to(ROOT)}:{line}: {pattern.pattern}"
        for file in SOURCES
        for line, pattern in patterns(file.read_text(encoding="utf-8"))
        if not any(pattern.fullmatch(key) for key in keys) and not _is_module(pattern.pattern)
    ]
    assert missing == []


def test_every_key_of_the_table_is_used() -> None:
    used = [pattern for file in SOURCES for _, pattern in patterns(file.read_text(encoding="utf-8"))]
    assert [key for key in TEXTS if not any(pattern.fullmatch(key) for pattern in used)] == []


def test_every_phase_has_a_name() -> None:
    for phase in ("preparing", "training", "evaluating", "saving", *END_PHASES, DEAD, UNKNOWN):
        assert f"phase.{phase}" in TEXTS


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('texts("frame.runs")', [r"frame\.runs"]),
        ('texts(f"phase.{run.phase}")', [r"phase\.[a-z0-9_.-]+"]),
        ('key = "frame.absent"', [r"frame\.absent"]),
        ('"frame is no key. None", "other.key", f"{a}.runs"', []),
    ],
)
def test_the_search_finds_keys(source: str, found: list[str]) -> None:
    assert [pattern.pattern for _, pattern in patterns(source)] == found


def test_a_text_is_filled_in_and_an_unknown_key_is_an_error() -> None:
    for language in LANGUAGES:
        texts = Texts(language)
        assert texts("frame.runs") == TEXTS["frame.runs"][LANGUAGES.index(language)]
        with pytest.raises(KeyError):
            texts("frame.absent")


def test_the_studio_imports_no_engine() -> None:
    code = (
        "import sys, pkgutil, importlib, tuneloom.studio.server, tuneloom.studio.views as views\n"
        "for view in pkgutil.iter_modules(views.__path__): importlib.import_module(f'tuneloom.studio.views.{view.name}')\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    found = {name.partition(".")[0] for name in done.stdout.split()}
    assert {"tuneloom", "nicegui"} <= found
    assert not found & {"torch", "transformers", "peft", "accelerate", "matplotlib", "pandas"}
    assert not found & {"aiohttp", "requests"}, "clients, which a server never uses, are a quarter of its start"


FORBIDDEN = {
    "markup of a text": r"ui\.(html|markdown|mermaid|interactive_image|restructured_text|code)\(|sanitize\s*=\s*False",
    "a script in the page": r"v-html|innerHTML|add_body_html",
    "an address off the machine": r"https?://(?!127\.0\.0\.1|localhost|\{)\w",
    "a file that is served as it is": r"add_static_files?\(|add_media_files?\(",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_source_of_the_studio_holds(what: str) -> None:
    files = [*SOURCES, ROOT / "tuneloom" / "studio" / "studio.css"]
    assert len(files) > 10
    found = [
        f"{file.relative_to(ROOT)}: {match.group()}"
        for file in files
        for match in re.finditer(FORBIDDEN[what], file.read_text(encoding="utf-8"))
    ]
    assert found == []


def _is_module(pattern: str) -> bool:
    """Whether a string names a module or a file rather than a text."""
    return Path(pattern.replace("\\", "")).suffix in (".py", ".json", ".jsonl", ".css", ".txt", ".yaml", ".md", ".csv", ".png")
