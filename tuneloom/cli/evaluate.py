"""`tuneloom evaluate`: held-out loss, and answers beside their references with their scores."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tuneloom.api import EvaluationResult, Side

REPORT, PREDICTIONS = "report.json", "predictions.jsonl"
_SAY_EVERY_SECONDS = 1.0
_SCORES = {"rouge-1": "ROUGE-1", "rouge-2": "ROUGE-2", "rouge-l": "ROUGE-L", "bleu-4": "BLEU-4"}


def evaluate(
    target: Annotated[str, typer.Argument(help="A run, a checkpoint, an adapter, a merged folder, or a model's name.")],
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="SOURCE", help="A file, a folder, a built-in set or a hub id. None: the run's held-out rows."
        ),
    ] = None,
    max_rows: Annotated[int | None, typer.Option("--max-rows", min=1, help="The first rows, at most so many.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens. None: as the run says.")
    ] = None,
    loss_only: Annotated[bool, typer.Option("--loss-only", help="Write no answers: loss and perplexity alone.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="The base, with the adapter off, on the same rows too.")] = False,
    variable: Annotated[
        list[str] | None,
        typer.Option("--variable", metavar="KEY=VALUE", help="Fill {{KEY}} in the rows. Repeatable. None: as the run does."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help=f"New folder for {REPORT} and {PREDICTIONS}.")
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", metavar="PATH", help="The base to put the adapter on. None: the one that it names."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Measure a model on conversations: loss, perplexity, and ROUGE and BLEU of the answers that it writes."""
    from tuneloom import api
    from tuneloom.adapters.target import resolve_target
    from tuneloom.cli.tables import print_json, say_progress
    from tuneloom.errors import UserError

    if out is not None and out.exists():
        raise UserError("the output exists already", where=str(out), mend="choose another --out; nothing is overwritten")
    overrides = _overrides(max_new_tokens, variable or [])
    if compare and resolve_target(target, base_model=base_model, say=say_progress).adapter is None:
        raise UserError(
            "nothing to compare: the target has no adapter", where=target, mend="name a run, a checkpoint or an adapter"
        )
    begun = time.monotonic()

    sides: tuple[Side, ...] = ("base", "model") if compare else ("model",)
    say_progress(f"loading {target} ...")
    results = api.evaluate_sides(
        target,
        data,
        sides=sides,
        answers=not loss_only,
        max_rows=max_rows,
        overrides=overrides,
        base_model=base_model,
        on_progress=_teller(),
    )
    report = _report(target, data, results, time.monotonic() - begun)
    if out is not None:
        _write(out, report, _rows(results))
    if json_:
        print_json(report)
    else:
        _print(report, out)


def _overrides(max_new_tokens: int | None, variables: list[str]) -> dict[str, object]:
    """Return settings on top of the run's.

    Raises:
        UserError: a variable without a name or a value.
    """
    from tuneloom.errors import UserError

    pairs = [assignment.partition("=") for assignment in variables]
    for name, equals, value in pairs:
        if not name or not equals:
            raise UserError("not a variable", where="--variable", got=name + equals + value, expected="KEY=VALUE")
    found: dict[str, object] = {"data.variables": {name: value for name, _, value in pairs}} if pairs else {}
    return found | ({"generation.max_new_tokens": max_new_tokens} if max_new_tokens is not None else {})


def _teller() -> Callable[[Side, str, int, int], None]:
    """Return what says how far it is, once a second at most, each last one always."""
    told = 0.0

    def tell(side: Side, what: str, done: int, total: int) -> None:
        nonlocal told
        if done == total or time.monotonic() - told > _SAY_EVERY_SECONDS:
            told = time.monotonic()
            typer.echo(f"{side}: {what} {done}/{total}", err=True)
            sys.stderr.flush()

    return tell


def _report(target: str, data: str | None, results: dict[Side, EvaluationResult], seconds: float) -> dict[str, Any]:
    """Return everything but the answers."""
    tuned = results["model"]
    return {
        "target": target,
        "data": data,
        "num_samples": tuned.num_samples,
        "num_supervised_tokens": tuned.num_supervised_tokens,
        "num_answers": len(tuned.predictions),
        **{name: {"loss": r.loss, "perplexity": r.perplexity, "scores": r.scores} for name, r in results.items()},
        "problems": list(tuned.problems),
        "seconds": round(seconds, 1),
    }


def _rows(results: dict[Side, EvaluationResult]) -> list[dict[str, str]]:
    """Return a row for every answer; the base's is `base_answer`."""
    rows = [row.as_dict() for row in results["model"].predictions]
    for row, other in zip(rows, results["base"].predictions if "base" in results else (), strict=False):
        row["base_answer"] = other.answer
    return rows


def _write(out: Path, report: dict[str, Any], rows: list[dict[str, str]]) -> None:
    """Write the folder, whole or not at all."""
    import json

    from tuneloom.exporting.folder import partial_folder

    partial = partial_folder(out)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (partial / PREDICTIONS).write_text(lines, encoding="utf-8")
    (partial / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.rename(out)


def _print(report: dict[str, Any], out: Path | None) -> None:
    from tuneloom.cli.tables import loss, print_table

    names = [name for name in ("base", "model") if name in report]
    rows = [["loss, nats a token", *(loss(report[name]["loss"]) for name in names)]]
    rows.append(["perplexity", *(f"{report[name]['perplexity']:,.2f}" for name in names)])
    for key, shown in _SCORES.items() if report["model"]["scores"] else ():
        rows.append([shown, *(f"{report[name]['scores'][key]:.4g}" for name in names)])
    print_table(["", *names], rows)
    answers = f", {report['num_answers']:,} answers" if report["model"]["scores"] else ""
    typer.echo(f"{report['num_samples']:,} rows, {report['num_supervised_tokens']:,} supervised tokens{answers}")
    for problem in report["problems"][:5]:
        typer.echo(f"left out or repaired: {problem}")
    if len(report["problems"]) > 5:
        typer.echo(f"and {len(report['problems']) - 5:,} more rows left out or repaired; --json has all")
    if out is not None:
        typer.echo(f"written   {out}")
