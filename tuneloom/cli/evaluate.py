"""`tuneloom evaluate`: identity, leak and forgetting of a persona; loss, and answers beside their references with scores."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tuneloom.adapters.target import Target
    from tuneloom.api import EvaluationResult, Side
    from tuneloom.evaluation.persona import PersonaResult
    from tuneloom.evaluation.probes import Language

REPORT, PREDICTIONS = "report.json", "predictions.jsonl"
_SAY_EVERY_SECONDS = 1.0
_PROBE_TOKENS = 64
_KEPT = "the answers to the probes so far are kept; the same command goes on from there"
_SCORES = {
    **{"rouge-1": "ROUGE-1", "rouge-2": "ROUGE-2", "rouge-l": "ROUGE-L", "bleu-4": "BLEU-4"},
    **{"bleu": "BLEU (sacrebleu)", "chrf": "chrF"},
}


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
    persona: Annotated[
        bool | None,
        typer.Option(
            "--persona/--no-persona",
            help="Ask who it is: identity, leak, forgetting. None: where a run has a name, no --data, no --compare or "
            "--loss-only.",
        ),
    ] = None,
    identity_probes: Annotated[
        str | None, typer.Option("--identity-probes", metavar="FILE", help="Questions of identity. None: the built-in ones.")
    ] = None,
    general_probes: Annotated[
        str | None, typer.Option("--general-probes", metavar="FILE", help="General questions and replies. None: built in.")
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option("--language", metavar="en|zh", help="Ask only in this one. Repeatable. None: in both.")
    ] = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            "--gate",
            metavar="FIGURE=LIMIT",
            help="identity_rate.en=0.95, identity_rate.zh, leak_rate=0.02, general_loss_delta=0.10; or off. Repeatable.",
        ),
    ] = None,
    require_gates: Annotated[bool, typer.Option("--require-gates", help="End with 3 where a gate is not passed.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Measure a model: who it says it is and what it forgot; on conversations loss, ROUGE, BLEU and chrF of its answers.

    A persona's figures, before and after, go into its run too: evaluation.json, report.md and the model card.
    """
    from tuneloom import api
    from tuneloom.adapters.target import resolve_target
    from tuneloom.cli.tables import print_json, say_progress
    from tuneloom.errors import GuardError, UserError

    if out is not None and out.exists():
        raise UserError("the output exists already", where=str(out), mend="choose another --out; nothing is overwritten")
    overrides = _overrides(max_new_tokens, variable or [])
    found = resolve_target(target, base_model=base_model, say=say_progress)
    if compare and found.adapter is None:
        raise UserError(
            "nothing to compare: the target has no adapter", where=target, mend="name a run, a checkpoint or an adapter"
        )
    asks = _wants_persona(found, overrides, rows_alone=data is not None or compare or loss_only) if persona is None else persona
    limits, spoken = _gates(gate or []), _languages(language or [])
    options: dict[str, object] = {"--identity-probes": identity_probes, "--general-probes": general_probes}
    options |= {"--language": language, "--gate": gate, "--require-gates": require_gates or None}
    unused = next((name for name, value in options.items() if value), None)
    if unused and not asks:
        raise UserError(
            "the option is of a persona, and none is evaluated", where=unused, mend="add --persona, or leave it out"
        )
    begun = time.monotonic()

    say_progress(f"loading {target} ...")
    report: dict[str, Any] = {"target": target, "data": data}
    rows: list[dict[str, Any]] = []
    result: PersonaResult | None = None
    with _Teller() as tell:
        if asks:
            result = api.evaluate_persona(
                target,
                identity_probes=identity_probes,
                general_probes=general_probes,
                languages=spoken,
                gates=limits,
                max_new_tokens=max_new_tokens or _PROBE_TOKENS,
                max_rows=max_rows,
                overrides=overrides,
                base_model=base_model,
                on_progress=tell,
            )
            report |= result.as_dict()
            rows += [answer.as_dict() for answer in result.answers]
        if data is not None or result is None or result.heldout_loss is not None:
            sides: tuple[Side, ...] = ("base", "model") if compare or (result and data is None) else ("model",)
            measured = api.evaluate_sides(
                target,
                data,
                sides=sides,
                answers=not loss_only,
                max_rows=max_rows,
                overrides=overrides,
                base_model=base_model,
                on_progress=lambda side, what, done, total: tell(f"{side}: {what}", done, total),
            )
            report |= _rows_report(measured)
            rows += _rows(measured)
    report["seconds"] = round(time.monotonic() - begun, 1)
    if out is not None:
        _write(out, report, rows)
    if json_:
        print_json(report)
    else:
        _print(report, out)
    if require_gates and result is not None and not result.passed:
        failed = ", ".join(g.name for g in result.gates if not g.passed)
        raise GuardError(f"not every gate is passed: {failed}")


def _wants_persona(target: Target, overrides: dict[str, Any], rows_alone: bool) -> bool:
    """Whether a target is a persona of a run, asked for without data."""
    variables = target.config.data.variables if target.config else {}
    name = overrides.get("data.variables", {}).get("name") or variables.get("name")
    return bool(name) and target.adapter is not None and target.config is not None and not rows_alone


def _gates(given: list[str]) -> dict[str, float | None]:
    """Return the limits by figure.

    Raises:
        UserError: one without a figure, or whose limit is no number.
    """
    from tuneloom.errors import UserError

    found: dict[str, float | None] = {}
    for assignment in given:
        name, _, limit = assignment.partition("=")
        try:
            found[name] = None if limit == "off" else float(limit)
        except ValueError:
            raise UserError("not a gate", where="--gate", got=assignment, expected="FIGURE=LIMIT, or FIGURE=off") from None
    return found


def _languages(given: list[str]) -> tuple[Language, ...]:
    """Return the languages to ask in.

    Raises:
        UserError: one that is none of ours.
    """
    from tuneloom.errors import UserError
    from tuneloom.evaluation.probes import LANGUAGES

    for language in given:
        if language not in LANGUAGES:
            raise UserError("unknown value", where="--language", got=language, expected=" or ".join(LANGUAGES))
    return tuple(language for language in LANGUAGES if not given or language in given)


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


class _Teller:
    """Says how far it is: a bar on a terminal, else a line a second at most, each last one always.

    Within its block a first Ctrl-C or SIGTERM ends the work at the next sign of progress.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        self._live = console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True)
        self._tasks: dict[str, Any] = {}
        self._told = 0.0
        self._stack = ExitStack()

    def __enter__(self) -> _Teller:
        from tuneloom.train.interrupt import catch_signals

        self._flag = self._stack.enter_context(catch_signals())
        if self._live:
            self._stack.enter_context(self._bar)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._live:
            if what not in self._tasks:
                self._tasks[what] = self._bar.add_task(what, total=total)
            self._bar.update(self._tasks[what], completed=done, total=total)
        elif done == total or time.monotonic() - self._told > _SAY_EVERY_SECONDS:
            self._told = time.monotonic()
            typer.echo(f"{what} {done}/{total}", err=True)
            sys.stderr.flush()
        self._flag.check(_KEPT)


def _rows_report(results: dict[Side, EvaluationResult]) -> dict[str, Any]:
    """Return everything about the rows but the answers."""
    tuned = results["model"]
    return {
        "num_samples": tuned.num_samples,
        "num_supervised_tokens": tuned.num_supervised_tokens,
        "num_answers": len(tuned.predictions),
        **{name: {"loss": r.loss, "perplexity": r.perplexity, "scores": r.scores} for name, r in results.items()},
        "problems": list(tuned.problems),
    }


def _rows(results: dict[Side, EvaluationResult]) -> list[dict[str, str]]:
    """Return a row for every answer; the base's is `base_answer`."""
    rows = [row.as_dict() for row in results["model"].predictions]
    for row, other in zip(rows, results["base"].predictions if "base" in results else (), strict=False):
        row["base_answer"] = other.answer
    return rows


def _write(out: Path, report: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the folder, whole or not at all."""
    import json

    from tuneloom.exporting.folder import partial_folder

    partial = partial_folder(out)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (partial / PREDICTIONS).write_text(lines, encoding="utf-8")
    (partial / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.rename(out)


def _print(report: dict[str, Any], out: Path | None) -> None:
    if "gates" in report:
        _print_persona(report)
    if "model" in report:
        _print_rows(report)
    if out is not None:
        typer.echo(f"written   {out}")


def _print_persona(report: dict[str, Any]) -> None:
    from tuneloom.cli.tables import print_table
    from tuneloom.evaluation.written import evaluation_rows, gate_lines

    print_table([report["name"], "before", "after"], evaluation_rows(report))
    for line in gate_lines(report):
        typer.echo(line)
    for line in report["left_out"]:
        typer.echo(f"left out: {line}")


def _print_rows(report: dict[str, Any]) -> None:
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
