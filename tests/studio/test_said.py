"""Whatever loading, training and exporting say has a Chinese text: collected from the sources, so that a new line counts."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from tuneloom.config.load import parse_config
from tuneloom.errors import UserError
from tuneloom.studio.evaluations import said_steps
from tuneloom.studio.said import heard, heard_log, heard_mistake, heard_step
from tuneloom.studio.texts import TEXTS, Texts

EN, ZH = Texts("en"), Texts("zh")
PACKAGE = ROOT / "tuneloom"
SAYS = ("say", "say_progress", "_say", "progress", "_progress", "within", "_within")
ECHOES = ("cli/finetune.py", "cli/export.py")
"""Verbs that the studio runs, whose last lines are in its logs."""


def variants(node: ast.expr | None) -> list[str]:
    """Return the texts that an expression may give, whatever fills a gap standing in as a word; none for no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.IfExp):
        return [*variants(node.body), *variants(node.orelse)]
    if isinstance(node, ast.JoinedStr):
        parts = [
            variants(part.value) or ["Zq7"] if isinstance(part, ast.FormattedValue) else variants(part) for part in node.values
        ]
        return ["".join(chosen) for chosen in itertools.product(*parts)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return ["".join(pair) for pair in itertools.product(variants(node.left), variants(node.right))]
    return []


def spoken(file: Path) -> Iterator[tuple[int, str]]:
    """Yield what a source says on its way: lines of progress, notes, warnings, numbers of a job."""
    echoes = str(file.relative_to(PACKAGE)) in ECHOES
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == "summary" and file.name == "prepare.py":
            yield from _facts(node)
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        arguments: list[ast.expr | None] = []
        if name in SAYS or (name == "echo" and echoes) or (name == "append" and owner.endswith("notes")):
            arguments = [node.args[0] if node.args else None]
        elif name == "event" and node.args and variants(node.args[0]) == ["warning"]:
            arguments = [keyword.value for keyword in node.keywords if keyword.arg == "message"]
        elif name == "Precision" and len(node.args) > 1:
            arguments = [node.args[1]]
        for argument in arguments:
            for text in variants(argument):
                yield node.lineno, text


def _facts(node: ast.FunctionDef) -> Iterator[tuple[int, str]]:
    for pair in ast.walk(node):
        if isinstance(pair, ast.Tuple) and len(pair.elts) == 2:
            for label, text in itertools.product(*map(variants, pair.elts)):
                yield pair.lineno, f"{label:>16}  {text}"
            if variants(pair.elts[0]) and isinstance(pair.elts[1], ast.Name):
                yield pair.lineno, f"{variants(pair.elts[0])[0]:>16}  Zq7"


SAID = [
    (f"{file.relative_to(ROOT)}:{line}", text)
    for file in sorted(PACKAGE.rglob("*.py"))
    if "studio" not in file.relative_to(PACKAGE).parts
    for line, text in spoken(file)
]


FAULTS = ("reason", "mend", "_MEND_BLANK", "_MEND_REWRITTEN", "_NUL")
"""Names that faults of rows and their mends are kept under before they are raised."""


def faults(file: Path) -> Iterator[tuple[int, str]]:
    """Yield what a source says of rows: reasons, mends, repairs."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        found: list[ast.expr] = []
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "RowError":
            found = node.args[2:4]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "repairs.append":
            found = node.args
        elif isinstance(node, ast.Assign) and any(getattr(target, "id", "") in FAULTS for target in node.targets):
            found = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        for part in found:
            for text in variants(part):
                yield node.lineno, text


ROWS = [
    (f"{file.relative_to(ROOT)}:{line}", text)
    for file in sorted((PACKAGE / "data").glob("*.py"))
    if file.name != "report.py"  # which tells leaks, not faults
    for line, text in faults(file)
]


def test_every_fault_of_a_row_and_its_mend_has_a_chinese_text() -> None:
    assert len(ROWS) > 90
    assert [f"{where}: {text!r}" for where, text in ROWS if not re.search(r"[一-鿿]", heard(ZH, text, "row"))] == []
    assert heard(ZH, "not a list of messages", "row") == "不是消息列表"
    assert heard(ZH, "write [{role, content}, ...]", "row") == "应写成 [{role, content}, ...]"
    assert heard(EN, "not JSON", "row") == "not JSON"


def mistakes(file: Path) -> Iterator[tuple[int, str]]:
    """Yield what a source says of a user's mistakes: what is wrong, what was got and expected where that is words, the mend."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in ("UserError", "ValueError"):
            continue
        told = [keyword.value for keyword in node.keywords if keyword.arg in ("got", "expected", "mend")]
        for part in (*node.args[:1], *told):
            for text in variants(part):
                if re.search(r"[a-z]{2} [a-z`]{2}", text) and text[0] != "{":  # words: no name, no figure, no shape
                    yield node.lineno, text


PLACES = (
    "data/*.py",
    "config/load.py",
    "config/schema.py",
    "models/*.py",
    "train/*.py",
    "rundir.py",
    "errors.py",
    "cache.py",
)
MISTAKES = [
    (f"{file.relative_to(ROOT)}:{line}", text)
    for place in PLACES
    for file in sorted(PACKAGE.glob(place))
    for line, text in mistakes(file)
]


def test_every_mistake_that_a_page_shows_has_a_chinese_text() -> None:
    assert len(MISTAKES) > 150
    silent = [f"{where}: {text!r}" for where, text in MISTAKES if not re.search(r"[一-鿿]", heard(ZH, text, "wrong"))]
    assert silent == []


@pytest.mark.parametrize(
    ("values", "chinese"),
    [
        ({"adapter": {"r": 0}}, ("`adapter.r` 的值不对", "0", "应大于 0")),
        ({"adapter": {"r": "many"}}, ("`adapter.r` 的值不对", "'many'", "应为整数")),
        ({"adapter": {"r": 1.5}}, ("`adapter.r` 的值不对", "1.5", "应为整数，不能有小数部分")),
        ({"adapter": {"rr": 1}}, ("未知的设置 `rr`", None, None)),
        ({"training": {"learning_rate": "x"}}, ("`training.learning_rate` 的值不对", "'x'", "应为数字")),
        ({"training": {"optim": "sgd"}}, ("`training.optim` 的值不对", "'sgd'", "应为 'adamw_torch' or 'adamw_torch_fused'")),
        ({"adapter": {"use_dora": "perhaps"}}, ("`adapter.use_dora` 的值不对", "'perhaps'", "应为 true 或 false")),
        ({"data": {"train": [{"path": ""}]}}, ("`data.train[0].path` 的值不对", "''", "不能为空（至少 1 个字符）")),
        ({"data": {"train": [{}]}}, ("`data.train[0].path` 的值不对", None, "必须填写")),
    ],
)
def test_wrong_values_are_told_in_chinese(values: dict[str, object], chinese: tuple[str | None, ...]) -> None:
    with pytest.raises(UserError) as raised:
        parse_config(values)
    told = heard_mistake(ZH, raised.value)
    assert (told.what, told.got, told.expected) == chinese
    assert str(heard_mistake(EN, raised.value)) == str(raised.value)


def test_a_mistake_in_a_log_is_told_in_chinese() -> None:
    error = UserError("data not found", where="a.json", expected="a YAML file", mend="did you mean `b.json`?")
    assert heard_log(ZH, f"tuneloom: {error}") == (
        "tuneloom：找不到数据\n位置：a.json\n应为：YAML 文件\n解决：是否想写 `b.json`？"
    )


def test_everything_that_is_said_has_a_chinese_text() -> None:
    silent = [
        f"{where}: {text!r}" for where, text in SAID if heard(ZH, text) == text or not re.search(r"[一-鿿]", heard(ZH, text))
    ]
    assert silent == []


def test_the_search_finds_what_is_said() -> None:
    found = {text.strip() for _, text in SAID}
    assert {"loading Zq7 ...", "merging and writing ...", "writing ...", "reading Zq7", "replay", "sample answers"} <= found
    assert {"non-finite Zq7", "as asked", "validation  Zq7 samples", "note  Zq7", "written   Zq7 (Zq7)"} <= found
    assert len(SAID) > 50


def test_no_text_for_what_nobody_says_any_more() -> None:
    known = {heard(ZH, text) for _, text in SAID}
    for key in ("said.loading", "said.merging", "said.replay", "said.measuring", "said.job_steps"):
        gaps = dict.fromkeys(re.findall(r"\{(\w+)\}", TEXTS[key][1]), "Zq7")
        assert ZH(key, **gaps) in known, key


@pytest.mark.parametrize(
    ("line", "chinese"),
    [
        ("loading smollm2-135m-instruct in bf16 ...", "正在以 bf16 载入 smollm2-135m-instruct……"),
        ("reading self_cognition_en 3/128", "正在读取 self_cognition_en 3/128"),
        ("replay 8/150", "模型写出自己的回答 8/150"),
        ("training 5/20  loss 2.345  1,234 tokens/s  eta 1:05", "训练 5/20  损失 2.345  1,234 词元/秒  剩余 1:05"),
        ("base: answers 3/50", "基座模型：回答 3/50"),
        ("model: loss 1/2", "模型：损失 1/2"),
        ("           steps  54 (1.00 epochs of 54)", "步数　54（1.00 遍，每遍 54 步）"),
        ("step 20: saved runs/ada/checkpoint-20", "第 20 步：已保存 runs/ada/checkpoint-20"),
        ("step 20: eval_loss 2.1  perplexity 8.2", "第 20 步：eval_loss 2.1  perplexity 8.2"),
        ("warning: non-finite loss", "警告：不是有限的数：损失"),
        ("  expected: one of a, b", "应为：a, b 之一"),
        (
            "       precision  bf16: bf16 is faster here: 90 against 40 GFLOP/s measured",
            "精度　bf16：此处 bf16 更快：实测 90 对 40 GFLOP/s",
        ),
        (
            "interrupted by SIGTERM; kept: checkpoint-7, of the last whole step",
            "被 SIGTERM 中断；已保留：checkpoint-7，即最后完成的一步",
        ),
        (
            "step 9: the loss is not finite; training stopped before the update",
            "第 9 步：损失不是有限的数；已在更新之前停止训练",
        ),
        ("what no part of Tuneloom says", "what no part of Tuneloom says"),
        ("{x} {0} {", "{x} {0} {"),
        ("loading {x} {0} ...", "正在载入 {x} {0}……"),
        ("", ""),
    ],
)
def test_lines_as_a_log_has_them(line: str, chinese: str) -> None:
    assert heard(ZH, line) == chinese
    assert heard(EN, line) == line


def test_a_log_keeps_its_lines_and_a_step_loses_its_dots() -> None:
    log = "loading a ...\nunknown\n\nmeasuring one micro-batch ...\n"
    assert heard_log(EN, log) == log
    assert heard_log(ZH, log) == "正在载入 a……\nunknown\n\n正在实测一个微批次……\n"
    assert [heard_step(ZH, step) for step in said_steps(log)] == ["正在载入 a", "正在实测一个微批次"]
    assert [heard_step(EN, step) for step in said_steps(log)] == ["loading a", "measuring one micro-batch"]
    assert heard_step(ZH, "unknown step") == "unknown step"
