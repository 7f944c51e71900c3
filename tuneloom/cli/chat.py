"""`tuneloom chat`: talk to a run, checkpoint, adapter, merged folder or model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tuneloom.adapters.target import Target
    from tuneloom.config import GenerationConfig
    from tuneloom.data.render import Renderer

_MAX_TOOLS_BYTES = 1 << 20


def chat(
    target: Annotated[str, typer.Argument(help="A run, a checkpoint, an adapter, a merged folder, or a model's name.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Ask this and exit. None: a conversation.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Talk to the base model, with the adapter off.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with base and tuned side by side.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="System prompt.")] = None,
    tools: Annotated[
        Path | None,
        typer.Option("--tools", help="JSON file with a list of functions that the model may call; you give the results."),
    ] = None,
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
    from tuneloom.adapters.target import load_target, resolve_target, target_renderer
    from tuneloom.cli.conversation import ChatSession
    from tuneloom.errors import UserError
    from tuneloom.generate.generator import Generator

    def say(line: str) -> None:
        typer.echo(line, err=True)

    if precision not in ("auto", "bf16", "fp16", "fp32"):
        raise UserError("unknown precision", where="--precision", got=precision, expected="auto, bf16, fp16 or fp32")
    if base and compare:
        raise UserError("--base and --compare contradict each other", mend="keep one")
    if tools and compare:
        raise UserError("--tools and --compare cannot be used together", where="--tools", mend="keep one")
    functions = _read_tools(tools) if tools else ()
    resolved = resolve_target(target, base_model=base_model, say=say)
    if compare and resolved.adapter is None:
        raise UserError(
            "nothing to compare: the target has no adapter", where=target, mend="name a run, a checkpoint or an adapter"
        )
    settings = _settings(resolved, temperature, max_new_tokens)
    renderer = target_renderer(resolved)
    if functions:
        _require_tools_taken(renderer, functions, target)
    say(f"loading {resolved.base.name}{f' with {resolved.own_folder}' if resolved.adapter else ''} ...")
    loaded = load_target(resolved, precision=precision, renderer=renderer)
    generator = Generator(loaded.model, loaded.renderer)
    session = ChatSession(generator, settings, system=system, base=base, compare=compare, tools=functions)
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


def _read_tools(file: Path) -> tuple[Mapping[str, Any], ...]:
    """Read a file of tools.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    import json

    from tuneloom.data.formats import read_tools
    from tuneloom.data.row import RowError
    from tuneloom.errors import UserError, user_path

    expected = '[{"name": ..., "description": ..., "parameters": {...}}, ...], each bare or as OpenAI has them'
    try:
        with user_path(str(file)).open("rb") as source:
            raw = source.read(_MAX_TOOLS_BYTES + 1)
        if len(raw) > _MAX_TOOLS_BYTES:
            raise UserError("the file of tools is too large", where=str(file), expected="under 1 MiB, a JSON list of tools")
        tools = read_tools(json.loads(raw))
    except OSError as error:
        raise UserError(
            "the file of tools cannot be read", where=str(file), got=error.strerror, mend="check the path"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or ["?"])[0][:160]
        raise UserError("the file of tools is not JSON", where=str(file), got=reason, expected=expected) from error
    except RowError as error:
        raise UserError(
            f"the file of tools cannot be used: {error.reason}",
            where=f"{file}: {error.field}",
            got=error.value,
            expected=expected,
        ) from error
    if not tools:
        raise UserError("the file of tools is empty", where=str(file), expected=expected)
    return tools


def _require_tools_taken(renderer: Renderer, tools: tuple[Mapping[str, Any], ...], target: str) -> None:
    """Refuse tools that the model would never see."""
    from dataclasses import replace

    from tuneloom.data.row import RowError
    from tuneloom.errors import UserError
    from tuneloom.types import Conversation, Message

    probe = Conversation((Message("user", "a"),))
    try:
        taken = renderer.text(replace(probe, tools=tools)) != renderer.text(probe)
        reason = "it does not write them"
    except RowError as error:
        taken, reason = False, error.value
    if not taken:
        mend = "leave out --tools, or use a model whose chat template takes tools"
        raise UserError("the model's chat template takes no tools", where=target, got=reason, mend=mend)
