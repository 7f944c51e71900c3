"""The pages of docs/: their Python runs as it stands, on the tiny model, and their links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, ROOT
from helpers import logits_of, plain_base, plain_peft
from typer.testing import CliRunner

import tuneloom
from tuneloom.cli.main import app
from tuneloom.config.schema import EMBEDDED_MODEL, DataConfig, SourceConfig
from tuneloom.data.dataset_info import COLUMN_KEYS, KEYS, TAG_KEYS
from tuneloom.data.formats import FORMATS, ROLE_NAMES
from tuneloom.data.read import SUFFIXES
from tuneloom.errors import TuneloomError
from tuneloom.models.source import resolve_model
from tuneloom.types import Overflow, TrainOn

PAGE = ROOT / "docs" / "python.md"
DATA_PAGE = ROOT / "docs" / "data.md"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def test_the_python_page_runs_from_top_to_bottom(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checked_here: None
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, Any] = {}
    said = []
    for block in blocks:
        exec(compile(block.replace("smollm2-135m-instruct", str(tiny_model)), str(PAGE), "exec"), names)
        said.append(capsys.readouterr().out)

    for lines, block in zip(said, blocks, strict=True):
        for promised in re.findall(r"^\s*print\(.*\)  # (.+)$", block, re.MULTILINE):
            shown = promised.partition(",")[0]
            assert shown in lines, f"the page promises {promised!r}, printed was\n{lines}"
    run = names["run"]
    assert isinstance(run, tuneloom.Run)
    assert (names["held_out"].num_samples, names["after"].num_samples) == (1, 4)
    assert names["after"].loss < names["before"].loss
    assert set(names["after"].scores) == {"rouge-1", "rouge-2", "rouge-l", "bleu-4", "bleu", "chrf"}
    assert json.loads((tmp_path / "ada-merged" / "export.json").read_text(encoding="utf-8"))["check"]["passed"] is True
    difference = logits_of(plain_base(tmp_path / "ada-merged"), [1, 40, 77]) - logits_of(
        plain_peft(tiny_model, run.adapter), [1, 40, 77]
    )
    assert difference.abs().max() < 1e-4


def test_the_python_page_names_everything_public() -> None:
    text = PAGE.read_text(encoding="utf-8")
    missing = [name for name in tuneloom.__all__ if not re.search(rf"\b{name}\b", text)]
    assert missing == ["__version__"]


def blocks_of(page: Path) -> Iterator[tuple[str, list[str], str]]:
    """Yield (language, words behind it, text) of each fenced block."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w+)([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield found[1], found[2].split(), found[3]


def printed(commands: str, *more: str, exit_code: int = 0) -> str:
    """Run the commands of a block through the command line, and return what they print."""
    output = ""
    for command in commands.splitlines():
        name, *words = shlex.split(command)
        assert name == "tuneloom"
        result = CliRunner().invoke(app, [*words, *more], env={"COLUMNS": "100"})
        code = result.exit_code
        output += result.output
        if isinstance(result.exception, TuneloomError):  # what `main` makes of it
            code = result.exception.exit_code
            output += f"tuneloom: {result.exception}\n"
        assert code == exit_code, f"{command}\n{output}\n{result.exception!r}"
    return output


def without_tokens(text: str) -> str:
    """Return a text without what depends on the tokenizer: numbers beside tokens, histograms."""
    lines = [line for line in text.splitlines() if not re.fullmatch(r" +[\d,]+( to [\d,]+)? +█* [\d,]+", line)]
    return "\n".join(re.sub(r"[\d,.]+", "N", line) if "token" in line else line for line in lines)


def assert_shown(shown: str, output: str) -> None:
    """Require that an output is the one shown, in which a line of `...` stands for any lines."""
    output = "\n".join(line.rstrip() for line in output.splitlines()) + "\n"
    lines = [r"(?:.*\n)*?" if line == "..." else re.escape(line.rstrip()) + r"\n" for line in shown.splitlines()]
    assert re.fullmatch("".join(lines), output), f"shown is\n{shown}\nprinted was\n{output}"


@pytest.fixture
def system_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model, with the embedded model's habit of writing a system message where there is none."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    default = f"{{% if messages[0]['role'] != 'system' %}}{{{{ '<|im_start|>system\n{SYSTEM}<|im_end|>\n' }}}}{{% endif %}}"
    (folder / "chat_template.jinja").write_text(default + CHATML, encoding="utf-8")
    return folder


def run_data_page(folder: Path, more: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Write the page's files, load its configs, run its commands; yield (commands, shown, printed)."""
    commands, output = "", ""
    for language, words, text in blocks_of(DATA_PAGE):
        options = dict(word.split("=") for word in words if "=" in word)
        if language == "sh":
            commands, output = text, printed(text, *more, exit_code=int(options.get("exit", 0)))
        elif words == ["output"]:
            assert commands, f"an output without its command:\n{text}"
            yield commands, text, output
            commands = ""
        elif "file" in options:
            file = folder / options["file"]
            file.parent.mkdir(exist_ok=True)
            file.write_text(text.removesuffix("\n"), encoding="utf-8")  # a torn file has no last line end
        if language == "yaml":
            (folder / "read.yaml").write_text(text, encoding="utf-8")
            assert tuneloom.load_config(folder / "read.yaml").data.train
        assert language in ("sh", "text", "yaml", "json", "jsonl", "csv")


def test_the_data_pages_commands_print_what_it_shows(
    system_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen = 0
    for _, shown, output in run_data_page(tmp_path, ["--model", str(system_model)]):
        assert_shown(without_tokens(shown), without_tokens(output))
        seen += 1
    assert seen >= 12
    for config in ("ada.yaml", "mix.yaml"):
        said = printed(f"tuneloom finetune {config} --dry-run --set base_model={system_model}")
        assert "nothing was trained" in said


@pytest.mark.real
def test_the_data_pages_figures_are_the_embedded_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    resolve_model(EMBEDDED_MODEL)  # once: fetching and converting say so
    for _, shown, output in run_data_page(tmp_path, []):
        assert_shown(shown, output)


def test_the_data_page_names_every_suffix_format_role_and_key() -> None:
    text = DATA_PAGE.read_text(encoding="utf-8")
    names = [*SUFFIXES, *ROLE_NAMES, *SourceConfig.model_fields, *DataConfig.model_fields, *TrainOn, *Overflow]
    names += [*KEYS, *COLUMN_KEYS, *TAG_KEYS]
    assert [name for name in names if f"`{name}`" not in text] == []
    assert [name for name, *_ in FORMATS if f"**{name}" not in text] == []


def test_the_data_pages_contents_lead_to_its_headings() -> None:
    text = DATA_PAGE.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    linked = re.findall(r"\]\(#([^)]+)\)", text)
    assert len(linked) >= 12
    assert set(linked) <= anchors


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_links_between_the_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
