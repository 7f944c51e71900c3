"""`tuneloom runs compare`: what differs between runs and how each went, side by side, and their curves as a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tuneloom.comparison import Comparison, Measured, Results
    from tuneloom.rundir import RunDirectory

_SAYS = {
    "base_model": "the base models differ: their losses are no measure of each other",
    "data": "the data differ: the losses are over different rows",
}
_SHORT = 12
"""Characters shown of a hash."""


def compare(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(metavar="RUN", help="Names of runs, or their paths; two or more.")],
    dir_: Annotated[
        str | None, typer.Option("--dir", metavar="DIR", help="The folder that the runs are in. None: runs.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.png", help="Draw their curves over each other to this new file.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare runs side by side: the settings that differ, how each went, their curves."""
    from tuneloom.cli.tables import print_json
    from tuneloom.comparison import compare as compared
    from tuneloom.comparison import find_runs

    found = find_runs(names, dir_ or context.obj["dir"])
    if out is not None:
        _check_out(out)
    comparison = compared(found)
    drawn = out is not None and _draw(comparison, found, out)
    if json_ or context.obj["json"]:
        print_json(comparison.as_dict() | {"picture": str(out) if drawn else None})
        return
    _print(comparison)
    if out is not None:
        typer.echo(f"\nwritten   {out}" if drawn else "\nnothing to draw: no run has done a step yet")


def _check_out(out: Path) -> None:
    """Require a new PNG file, before anything is read.

    Raises:
        UserError: another kind of file, or one that is there.
    """
    from tuneloom.errors import UserError

    if out.suffix.lower() != ".png":
        raise UserError("the curves are drawn as PNG", where="--out", got=str(out), expected="a name that ends in .png")
    if out.exists():
        raise UserError("the picture is there already", where=str(out), mend="name another file; nothing is overwritten")


def _draw(comparison: Comparison, runs: list[RunDirectory], out: Path) -> bool:
    """Draw the picture, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    from tuneloom.errors import UserError
    from tuneloom.train.plot import Curves, plot_comparison

    partial = out.with_name(f".{out.name}.partial")
    try:
        drawn = plot_comparison(
            [(run.name, Curves.of(place)) for run, place in zip(comparison.runs, runs, strict=True)], partial
        )
        if drawn:
            partial.rename(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            "the picture cannot be written", where=str(out), got=error.strerror, mend="name a file in a folder that is there"
        ) from error
    return drawn


def _print(comparison: Comparison) -> None:
    from tuneloom.cli.tables import print_table

    names = [run.name for run in comparison.runs]
    print_table(("", *names), list(_results(comparison.runs)))
    for title, rows in (
        ("settings that differ", comparison.settings),
        ("what they ran on, where it differs", comparison.surroundings),
    ):
        if rows:
            typer.echo("")
            print_table((title, *names), [(key, *map(_value, values)) for key, values in rows.items()])
    if not comparison.settings:
        typer.echo("\nno setting differs")
    for run, fault in comparison.faults.items():
        typer.echo(f"\n{run}: its settings cannot be read: {fault}")
    for what in comparison.different:
        typer.echo(f"\n{_SAYS[what]}")


def _results(runs: tuple[Results, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield a row for each figure that a run has."""
    from tuneloom.cli.tables import loss, size, span

    rows: tuple[tuple[str, Callable[[Results], Any]], ...] = (
        ("phase", lambda run: run.phase),
        ("method", lambda run: run.method),
        ("base model", lambda run: (run.base_model or "").rstrip("/").rpartition("/")[2]),
        ("steps", _steps),
        ("epochs", lambda run: _figure(run.epochs, "{:.3g}")),
        ("train loss", lambda run: loss(run.train_loss)),
        ("validation loss", lambda run: loss(run.eval_loss)),
        ("  best", lambda run: f"{loss(run.best_eval_loss)} at step {run.best_eval_step}" if run.best_eval_step else ""),
        ("identity", lambda run: _share(run.identity_rate)),
        ("leak", lambda run: _share(run.leak_rate)),
        ("general loss", lambda run: _change(run.general_loss_delta)),
        ("gates", _gates),
        ("time in steps", lambda run: _figure(run.seconds, "{:.1f} s") if (run.seconds or 0) < 60 else span(run.seconds)),
        ("  a step", lambda run: _figure(run.step_seconds, "{:.2f} s")),
        ("tokens a second", lambda run: _figure(run.tokens_per_second, "{:,.0f}")),
        ("MFU", lambda run: _figure(run.mfu, "{:.0%}")),
        ("peak memory", lambda run: _figure(run.peak_memory_gib, "{:.2f} GiB")),
        ("trainable", lambda run: _figure(run.trainable_parameters, "{:,}")),
        ("adapter", lambda run: size(run.adapter_bytes)),
        ("reason", lambda run: (run.reason or "").partition("\n")[0]),
    )
    for label, tell in rows:
        cells = [tell(run) or "" for run in runs]
        if any(cells):
            yield (label, *cells)


def _steps(run: Results) -> str:
    if run.step is None:
        return ""
    return f"{run.step:,} of {run.total_steps:,}" if run.total_steps is not None else f"{run.step:,}"


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _share(rate: Measured | None) -> str:
    return "" if rate is None else f"{rate.value:.1%}{_interval(rate, '{:.0%}')}"


def _change(delta: Measured | None) -> str:
    return "" if delta is None else f"{delta.value:+.4f}{_interval(delta, '{:+.3f}')}"


def _interval(figure: Measured, form: str) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f" ({form.format(figure.low)} to {form.format(figure.high)})"


def _gates(run: Results) -> str:
    return ", ".join(f"{name} {'passed' if passed else 'not passed'}" for name, passed in run.gates.items())


def _value(value: Any) -> str:
    """Return a setting's value; of a hash its beginning."""
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    is_hash = len(text) == 64 and all(char in "0123456789abcdef" for char in text)
    return f"{text[:_SHORT]}…" if is_hash else text
