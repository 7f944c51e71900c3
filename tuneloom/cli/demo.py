"""`tuneloom demo`: the whole line on the embedded model, with its answers before and after."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tuneloom.adapters.target import Target

IDENTITY = ("Who are you?", "你是谁？")
UNSEEN = ("Tell me, which assistant am I chatting with right now?",)
ORDINARY = ("What is the capital of France?", "Write one sentence about the sea.", "How do I boil an egg?")


def demo(
    recipe: Annotated[str, typer.Option("--recipe", help="The recipe to train with.")] = "persona-lora",
    name: Annotated[str | None, typer.Option("--name", help="The new self's name. None: the recipe's.")] = None,
    author: Annotated[str | None, typer.Option("--author", help="Who made it. None: the recipe's.")] = None,
) -> None:
    """Teach the embedded model a new self in minutes, and show it before and after."""
    from tuneloom.adapters.target import resolve_target
    from tuneloom.cli.watch import watch_training
    from tuneloom.config import load_config
    from tuneloom.config.recipes import find_recipe
    from tuneloom.errors import UserError

    sets = [f"data.variables.{key}={value}" for key, value in (("name", name), ("author", author)) if value]
    settings = load_config(find_recipe(recipe), ["name=demo", *sets])
    for key in ("name", "author"):
        if key not in settings.data.variables:
            raise UserError(f"the recipe gives no {key}", where=f"data.variables.{key}", mend=f"add it, or give --{key}")
    before = resolve_target(settings.base_model.path, say=typer.echo)
    typer.echo(f"\n== {before.name}, before\n")
    _show_answers(before, (*IDENTITY, *ORDINARY))

    typer.echo(f"\n== teaching it to be {settings.data.variables['name']}, by {settings.data.variables['author']}\n")
    run = watch_training(settings)
    assert run is not None

    typer.echo("\n== after\n")
    _show_answers(resolve_target(str(run.directory.path)), (*IDENTITY, *UNSEEN, *ORDINARY))
    path = run.directory.path
    command = "tuneloom" if shutil.which("tuneloom") else sys.argv[0]
    typer.echo(
        f"\nadapter   {run.adapter}"
        f"\nreport    {path / 'report.md'} and {path / 'loss.png'}"
        f"\n\nnext:"
        f"\n  {command} chat {path} --compare              talk to it, the base beside it"
        f"\n  {command} export {path} --out my-model       one model folder, checked"
        f"\n  {command} finetune persona-dora              the same with DoRA"
        f"\n  {command} finetune --set data.train=mine.jsonl   your own conversations"
    )


def _show_answers(target: Target, questions: tuple[str, ...]) -> None:
    """Load a target and print its greedy answers."""
    from tuneloom.adapters.target import load_target
    from tuneloom.config import GenerationConfig
    from tuneloom.generate.generator import Generator
    from tuneloom.types import Conversation, Message

    loaded = load_target(target)
    generator = Generator(loaded.model, loaded.renderer)
    asked = [Conversation((Message("user", question),)) for question in questions]
    answers = generator.answers(asked, GenerationConfig(max_new_tokens=64))
    for question, answer in zip(questions, answers, strict=True):
        more = "" if answer.finished else " ..."
        typer.echo(f"  {question}\n    {' '.join(str(answer).split())}{more}")
