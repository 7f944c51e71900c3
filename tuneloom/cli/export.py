"""`tuneloom export`: write a run in a format that other tools read, checked before it is called done."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from tuneloom.adapters.target import Target


class Format(StrEnum):
    MERGED = "merged"
    CHATGLM = "chatglm"
    ADAPTER = "adapter"


class AdapterLayout(StrEnum):
    NATIVE = "native"
    ORIGINAL = "original"


class StoredPrecision(StrEnum):
    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


def export(
    target: Annotated[str, typer.Argument(help="A run, a checkpoint or an adapter.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new folder.")],
    to: Annotated[
        Format,
        typer.Option(
            "--to",
            help="merged: one model with the adapter folded in; chatglm: the same in ChatGLM's original layout; "
            "adapter: the adapter alone.",
        ),
    ] = Format.MERGED,
    precision: Annotated[
        StoredPrecision, typer.Option("--precision", help="Of the weights written; auto: the base's own.")
    ] = StoredPrecision.AUTO,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest safetensors file.")] = "5GB",
    layout: Annotated[
        AdapterLayout | None,
        typer.Option("--layout", help="Names of an adapter's modules; original: as ChatGLM's own code has them. None: native."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", metavar="PATH", help="The base that the adapter goes on. None: the one that it names."),
    ] = None,
) -> None:
    """Write a run in another format, and prove that it still answers the same."""
    from tuneloom.adapters.target import resolve_target
    from tuneloom.errors import UserError
    from tuneloom.exporting.merged import Layout, export_merged

    def say(line: str) -> None:
        typer.echo(line, err=True)

    resolved = resolve_target(target, base_model=base_model, say=say)
    if to is Format.ADAPTER:
        if precision is not StoredPrecision.AUTO:
            raise UserError("--precision is of a merged model", where="--to adapter", mend="leave it out")
        _export_adapter(resolved, out, layout, say)
        return
    if layout is not None:
        raise UserError("--layout is of an adapter", where=f"--to {to.value}", mend="leave it out, or give --to adapter")
    merged: Layout = "original" if to is Format.CHATGLM else "native"
    done = export_merged(resolved, out, layout=merged, precision=precision.value, max_shard_size=max_shard_size, say=say)
    typer.echo(f"written   {done.folder} ({done.precision})")
    typer.echo(f"checked   {done.check.sentence()}")
    typer.echo(f"talk to it with:  tuneloom chat {done.folder}")


def _export_adapter(target: Target, out: Path, layout: AdapterLayout | None, say: Callable[[str], None]) -> None:
    from tuneloom.exporting.adapter import export_adapter

    done = export_adapter(target, out, layout=layout.value if layout else "native", say=say)
    typer.echo(f"written   {done.folder} ({done.layout} names)")
    typer.echo(f"checked   {done.check.sentence()}")
    for note in done.notes:
        typer.echo(f"note      {note}")
