"""`tuneloom finetune`: parse, resolve, say every number, train, say what to do next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tuneloom.config import Config
    from tuneloom.train.resume import ResumePoint


def finetune(
    config: Annotated[
        str | None, typer.Argument(help="A YAML config, or a recipe's name. None: the persona recipe on the embedded model.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. --set adapter.r=16. Repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the newest run of this config.")] = False,
    resume_from: Annotated[
        str | None, typer.Option("--resume-from", metavar="RUN|CHECKPOINT", help="Continue this run or from this checkpoint.")
    ] = None,
    override: Annotated[bool, typer.Option("--override", help="Resume although settings that matter have changed.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be used.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say every number, train nothing, make no run.")] = False,
) -> None:
    """Fine-tune a model and publish its adapter."""
    from tuneloom.cli.watch import watch_training
    from tuneloom.train.team import team

    settings, point = team().agreed(lambda: _asked(config, set_ or [], resume, resume_from))
    done = watch_training(settings, point, override=override, strict=strict, dry_run=dry_run)
    if done is not None:
        typer.echo(f"\nadapter   {done.adapter}")
        typer.echo(f"report    {done.directory.path / 'report.md'}")
        typer.echo(f"talk to it with:  tuneloom chat {done.directory.path}")


def _asked(config: str | None, sets: list[str], resume: bool, resume_from: str | None) -> tuple[Config, ResumePoint | None]:
    """Return the settings and where to resume."""
    from tuneloom.config import load_config
    from tuneloom.config.recipes import DEFAULT_RECIPE, find_recipe
    from tuneloom.train.resume import find_resume, newest_run

    if resume_from is not None:
        point = find_resume(resume_from, load_config(None, [s for s in sets if s.startswith("output_dir=")]).output_dir)
        return load_config(find_recipe(config) if config else point.run.config, sets), point
    settings = load_config(find_recipe(config or DEFAULT_RECIPE), sets)
    if not resume:
        return settings, None
    point = newest_run(settings, of_any_config=config is None and not sets)
    return settings if config is not None else load_config(point.run.config, sets), point
