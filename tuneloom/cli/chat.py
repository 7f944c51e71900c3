"""`tuneloom chat`: talk to a run, checkpoint, adapter, merged folder or model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tuneloom.adapters.target import Target
    from tuneloom.config import GenerationConfig


def chat(
    target: Annotated[str, typer.Argument(help="A run, a checkpoint, an adapter, a merged folder, or a model's name.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Ask this and exit. None: a conversation.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Talk to the base model, with the adapter off.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with base and tuned side by side.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="System prompt.")] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", min=0.0, help="Sample at this temperature; 0: greedy. None: as the run says."),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", metavar="PATH", help="The base to put the adapter on. None: the one that it names."),
    ] = None,
    precision: Annotated[str, typer.Option("--precision", help="auto, bf16, fp16 or fp32.")] = "auto",
) -> None:
    """Talk to a model. In a conversation: /clear begins anew, /exit or Ctrl-D ends."""
    from tuneloom.adapters.target import load_target, resolve_target
    from tuneloom.cli.conversation import ChatSession
    from tuneloom.errors import UserError
    from tuneloom.generate.generator import Generator

    def say(line: str) -> None:
        typer.echo(line, err=True)

    if precision not in ("auto", "bf16", "fp16", "fp32"):
        raise UserError("unknown precision", where="--precision", got=precision, expected="auto, bf16, fp16 or fp32")
    if base and compare:
        raise UserError("--base and --compare contradict each other", mend="keep one")
    resolved = resolve_target(target, base_model=base_model, say=say)
    if compare and resolved.adapter is None:
        raise UserError(
            "nothing to compare: the target has no adapter", where=target, mend="name a run, a checkpoint or an adapter"
        )
    settings = _settings(resolved, temperature, max_new_tokens)
    say(f"loading {resolved.base.name}{f' with {resolved.own_folder}' if resolved.adapter else ''} ...")
    loaded = load_target(resolved, precision=precision)
    session = ChatSession(Generator(loaded.model, loaded.renderer), settings, system=system, base=base, compare=compare)
    if prompt is not None:
        session.ask(prompt)
    else:
        session.talk()


def _settings(target: Target, temperature: float | None, max_new_tokens: int | None) -> GenerationConfig:
    """Take the run's generation settings, changed by the options."""
    from tuneloom.config import GenerationConfig

    settings = target.config.generation if target.config else GenerationConfig()
    changes: dict[str, object] = {}
    if temperature is not None:
        changes = {"do_sample": temperature > 0, **({"temperature": temperature} if temperature > 0 else {})}
    if max_new_tokens is not None:
        changes["max_new_tokens"] = max_new_tokens
    return settings.model_copy(update=changes)
