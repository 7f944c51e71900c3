"""`tuneloom export`: write a run in a format that other tools read, checked before it is called done."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    MERGED = "merged"
    CHATGLM = "chatglm"


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
            "--to", help="merged: one model with the adapter folded in; chatglm: the same in ChatGLM's original layout."
        ),
    ] = Format.MERGED,
    precision: Annotated[
        StoredPrecision, typer.Option("--precision", help="Of the weights written; auto: the base's own.")
    ] = StoredPrecision.AUTO,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest safetensors file.")] = "5GB",
) -> None:
    """Write a run in another format, and prove that it still answers the same."""
    from tuneloom.adapters.target import resolve_target
    from tuneloom.exporting.merged import Layout, export_merged

    def say(line: str) -> None:
        typer.echo(line, err=True)

    resolved = resolve_target(target, say=say)
    layout: Layout = "chatglm" if to is Format.CHATGLM else "native"
    done = export_merged(resolved, out, layout=layout, precision=precision.value, max_shard_size=max_shard_size, say=say)
    typer.echo(f"written   {done.folder} ({done.precision})")
    typer.echo(f"checked   {done.check.sentence()}")
    typer.echo(f"talk to it with:  tuneloom chat {done.folder}")
