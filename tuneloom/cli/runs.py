"""`tuneloom runs`: the runs below a folder; `show`, one at length; `compare`, several; `stop`, one that is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuneloom.cli.runs_compare import compare

if TYPE_CHECKING:
    from rich.text import Text

    from tuneloom.runs import Listing, RunDetails, RunSummary
    from tuneloom.stopping import Stopped

runs = typer.Typer(rich_markup_mode=None, add_completion=False)
runs.command()(compare)

_DIR = "runs"
_STYLES = {"done": "green", "failed": "red", "dead": "red", "interrupted": "yellow", "unknown": "yellow"}


@runs.callback(invoke_without_command=True)
def list_(
    context: typer.Context,
    dir_: Annotated[str, typer.Option("--dir", metavar="DIR", help="The folder that the runs are in.")] = _DIR,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the runs, newest first."""
    if context.invoked_subcommand is not None:
        context.obj = {"dir": dir_, "json": json_}
        return
    from tuneloom.cli.tables import print_json
    from tuneloom.runs import list_runs

    listing = list_runs(dir_)
    if json_:
        print_json(listing.as_dict())
    else:
        _print_listing(listing)


@runs.command()
def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A run's name, or its path.")],
    dir_: Annotated[
        str | None, typer.Option("--dir", metavar="DIR", help=f"The folder that the runs are in. None: {_DIR}.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a run: settings, data, losses, checkpoints, answers, and what to do next."""
    from tuneloom.cli.tables import print_json
    from tuneloom.runs import describe, find_run

    details = describe(find_run(name, dir_ or context.obj["dir"]))
    if json_ or context.obj["json"]:
        print_json(details.as_dict())
    else:
        _print_details(details)


@runs.command()
def stop(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A run's name, or its path.")],
    dir_: Annotated[
        str | None, typer.Option("--dir", metavar="DIR", help=f"The folder that the runs are in. None: {_DIR}.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Wait at most so long. None: until it has ended.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Stop a run that is being trained: it saves a checkpoint and ends, and can be gone on with."""
    from tuneloom.cli.tables import print_json
    from tuneloom.runs import find_run
    from tuneloom.stopping import ask, require_trainer, wait

    as_json = json_ or context.obj["json"]
    run = find_run(name, dir_ or context.obj["dir"])
    process = require_trainer(run)
    asked = ask(run, process)
    typer.echo(f"process {process.pid} {'is' if asked else 'was'} asked to save a checkpoint and end", err=as_json)
    try:
        stopped = wait(run, process, lambda line: typer.echo(line, err=as_json), timeout)
    except KeyboardInterrupt:
        typer.echo("it was asked, and ends without anybody waiting", err=True)
        raise
    if as_json:
        print_json(stopped.as_dict())
    else:
        _print_stopped(stopped)


def _print_stopped(stopped: Stopped) -> None:
    from tuneloom.cli.tables import print_facts

    step = f"step {stopped.step} of {stopped.total_steps}"
    if stopped.resume is None:
        typer.echo(f"{stopped.run} was done, at {step}, before it could be stopped")
        return
    typer.echo(f"{stopped.run} has stopped at {step}")
    print_facts([("reason", stopped.reason or "not told"), ("kept", stopped.checkpoint or "nothing; no step was done")])
    typer.echo(f"go on with:  {stopped.resume}")


def _print_listing(listing: Listing) -> None:
    from tuneloom.cli.tables import loss, moment, print_table, size, span

    if listing.runs:
        columns = ("run", "phase", "step", "base model", "method", "loss", "validation", "started", "took", "size")
        rows = [
            (
                run.name,
                _phase(run),
                _steps(run),
                _short(run.base_model),
                run.method or "",
                loss(run.train_loss),
                loss(run.eval_loss),
                moment(run.started),
                span(run.seconds),
                size(run.num_bytes),
            )
            for run in listing.runs
        ]
        print_table(columns, rows, droppable=("size", "base model", "took", "method", "started"))
        typer.echo("\none at length:  tuneloom runs show NAME")
        if len(listing.runs) > 1:
            typer.echo("side by side:   tuneloom runs compare NAME NAME")
    else:
        typer.echo(f"there are no runs in {listing.folder}")
        typer.echo("make one with:  tuneloom finetune")
    if listing.others:
        more = f" and {len(listing.others) - 5} more" if len(listing.others) > 5 else ""
        typer.echo(f"no runs, passed over: {', '.join(listing.others[:5])}{more}")


def _print_details(details: RunDetails) -> None:
    from tuneloom.cli.tables import print_facts, print_table

    print_facts(_facts(details))
    for title, rows in (("settings that are not the default", _settings(details)), ("data", _data(details))):
        if rows:
            typer.echo(f"\n{title}")
            print_facts(rows)
    if details.answers:
        typer.echo("\nanswers")
        print_table(("prompt", "step", "answer"), list(_answers(details)))
    if details.next:
        typer.echo("\nnext")
        print_facts([(f"  {command}", what) for command, what in details.next])


def _facts(details: RunDetails) -> Iterator[tuple[str, Any]]:
    """Yield what a run is and how it went."""
    from tuneloom.cli.tables import moment, size, span

    run = details.summary
    yield "run", run.path
    yield "phase", _phase(run)
    if run.reason:
        yield "reason", run.reason
    yield "step", _steps(run)
    if run.early_stop:
        yield "ended early", run.early_stop
    yield "base model", run.base_model or "not told"
    yield "method", run.method or "not told"
    yield "started", f"{moment(run.started)}, took {span(run.seconds)}" if run.seconds is not None else moment(run.started)
    yield "size", size(run.num_bytes)
    for label, points in (("train loss", details.train_losses), ("validation loss", details.eval_losses)):
        if points:
            best = f" (best {run.best_eval_loss:.4f})" if label == "validation loss" else ""
            yield label, ", ".join(f"step {point.step}: {point.value:.4f}" for point in points) + best
    for warning in details.warnings:
        yield "warning", warning
    yield "adapter", details.adapter or "none yet"
    yield "checkpoints", ", ".join(f"checkpoint-{step}" for step in details.checkpoints) or "none"
    if details.config_fault:
        yield "config.yaml", f"cannot be read: {details.config_fault}"


def _settings(details: RunDetails) -> list[tuple[str, str]]:
    import json

    return [(f"  {key}", json.dumps(value, ensure_ascii=False)) for key, value in details.changed.items()]


def _data(details: RunDetails) -> list[tuple[str, str]]:
    """Return the data report in lines."""
    data = details.data
    if not data:
        return []
    counts = ("read", "used", "repaired", "cut", "dropped", "duplicates", "leaks")
    rows = [("  rows", ", ".join(f"{data[key]:,} {key}" for key in counts if data[key] is not None))]
    for key in ("train", "validation"):
        if data[key].get("samples"):
            names = ("samples", "tokens", "supervised_tokens", "longest")
            told = [f"{data[key][name]:,} {name.replace('_', ' ')}" for name in names if name in data[key]]
            rows.append((f"  {key}", ", ".join(told).replace("longest", "tokens in the longest")))
    for source in data["sources"]:
        role = f" ({source['role']})" if source["role"] else ""
        rows.append(("  source", f"{source['path']}{role}: {source['read']} read, {source['used']} used"))
    return rows


def _answers(details: RunDetails) -> Iterator[tuple[str, int, str]]:
    """Yield each prompt's first answer, and its last where there was a later one."""
    for answer in details.answers:
        yield answer.prompt, answer.first_step, answer.first
        if answer.last_step != answer.first_step:
            yield "", answer.last_step, answer.last


def _phase(run: RunSummary) -> Text:
    from rich.text import Text

    from tuneloom.cli.tables import plain

    return Text(plain(run.phase), style=_STYLES.get(run.phase, "cyan"))


def _steps(run: RunSummary) -> str:
    if run.step is None:
        return ""
    return f"{run.step:,} of {run.total_steps:,}" if run.total_steps is not None else f"{run.step:,}"


def _short(base_model: str | None) -> str:
    """Return a base model's name without the folders that it lies in."""
    return (base_model or "").rstrip("/").rpartition("/")[2]
