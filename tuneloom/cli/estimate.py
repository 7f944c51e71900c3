"""`tuneloom estimate`: what a training takes of memory and time, before it is started."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tuneloom.train.estimate import Estimate


def estimate(
    config: Annotated[
        str | None, typer.Argument(help="A YAML config, or a recipe's name. None: the persona recipe on the embedded model.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. --set data.cutoff_len=512. Repeatable."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Load no model: the least memory, by the shapes in its config.json, and no time.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a training takes of memory and time; nothing is trained, no run is made.

    The data is prepared first and memory reckoned by the model's shapes: what cannot fit is refused (exit code 2) before the
    model is loaded. Then it is loaded, and the heaviest micro-batch runs once or twice: the figures are measured.
    """
    from tuneloom.cli.tables import print_json, say_progress
    from tuneloom.config import load_config
    from tuneloom.config.recipes import DEFAULT_RECIPE, find_recipe
    from tuneloom.train.limits import require_memory_of_training
    from tuneloom.train.prepare import look_at, prepare_job

    settings = load_config(find_recipe(config or DEFAULT_RECIPE), set_ or [])
    facts: dict[str, Any]
    attention: str
    if quick:
        ahead = look_at(settings, say=say_progress)
        require_memory_of_training(ahead.outlook)
        found, fit = ahead.outlook.estimate, ahead.outlook.fit
        base, precision, trained = ahead.base.name, ahead.precision.name, ahead.outlook.num_trained
        attention = settings.base_model.attn_implementation
    else:
        job = prepare_job(settings, say=say_progress)
        found, fit = job.estimate, job.choice.fit
        base, precision, attention = job.base.name, job.precision.name, job.choice.attention
        trained = job.num_trained
    facts = {
        "base_model": base,
        "method": settings.method,
        "precision": precision,
        "attention": attention,
        "tokens_per_microbatch": fit.tokens_per_microbatch if fit else None,
        "recomputed_layers": fit.recomputed_layers if fit else None,
        "trained_parameters": trained,
        "steps": found.num_steps,
        "tokens": found.num_tokens,
        "measured": not quick,
    }
    if json_:
        print_json(facts | found.as_dict())
    else:
        _print(facts, found)


def _print(facts: dict[str, Any], found: Estimate) -> None:
    from tuneloom.cli.tables import print_facts, print_table

    micro_batches = f"of at most {facts['tokens_per_microbatch']:,} tokens, {facts['attention']} attention"
    print_facts(
        [
            ("base model", f"{facts['base_model']}, {facts['precision']}"),
            ("method", f"{facts['method']}, {facts['trained_parameters']:,} trained parameters"),
            ("micro-batches", micro_batches),
            *([("recomputed", f"activations of {layers:,} layers")] if (layers := facts["recomputed_layers"]) else []),
            ("steps", f"{found.num_steps:,}, {found.num_tokens:,} tokens"),
            *_time(found),
        ]
    )
    typer.echo()
    rows = [(_PARTS[name], f"{value:.2f}") for name, value in found.memory.parts.items() if value]
    rows.append(("at its height", f"{found.memory.peak:.2f}"))
    print_table(("memory, measured" if facts["measured"] else "memory at the least, by shapes alone", "GiB"), rows)


_PARTS = {
    "process": "Python, libraries, data",
    "weights": "weights of the base",
    "adapter": "adapter",
    "gradients": "its gradients",
    "optimizer": "its optimizer state",
    "activations": "activations of the heaviest micro-batch",
    "answers": "answers to the fixed prompts",
}


def _time(found: Estimate) -> Iterator[tuple[str, str]]:
    from tuneloom.cli.tables import span

    if found.seconds is None or found.seconds_per_step is None or found.tokens_per_second is None:
        yield "time", "not known without the model; leave out --quick"
        return
    yield "time of a step", f"{found.seconds_per_step:.2f} s ({found.tokens_per_second:,.0f} tokens/s)"
    yield "time of all steps", span(found.seconds)
