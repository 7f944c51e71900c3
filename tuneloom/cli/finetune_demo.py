"""The three commands of ChatGLM3's `finetune_demo`, over the same engine.

python3 finetune_hf.py DATA_DIR MODEL CONFIG [yes|no|STEP]
python3 inference_hf.py output/checkpoint-3000/ --prompt "..."
python3 model_export_hf.py output/checkpoint-3000/ --out-dir DIR
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuneloom.cli.export import Format, export

if TYPE_CHECKING:
    from tuneloom.train.resume import ResumePoint

Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, after translation.")]


def finetune_hf(
    data_dir: Annotated[Path, typer.Argument(help="Folder with train.json, dev.json, test.json (json, jsonl or csv).")],
    model_dir: Annotated[str, typer.Argument(help="A model's folder or name.")],
    config_file: Annotated[str, typer.Argument(help="A finetune_demo config, e.g. configs/lora.yaml.")],
    auto_resume_from_checkpoint: Annotated[
        str, typer.Argument(help="yes: from the newest whole checkpoint; a number: from that one; no: start anew.")
    ] = "no",
    set_: Sets = None,
    override: Annotated[bool, typer.Option("--override", help="Resume although settings that matter have changed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say every number, train nothing, make no run.")] = False,
) -> None:
    """Fine-tune as finetune_demo does; checkpoints appear as output/checkpoint-STEP."""
    from tuneloom.cli.watch import watch_training
    from tuneloom.config import load_config
    from tuneloom.config.finetune_demo import without_effect
    from tuneloom.config.load import read_yaml

    for key in without_effect(read_yaml(config_file).plain()):
        typer.echo(f"note: {key} changes nothing here", err=True)
    settings = load_config(config_file, set_ or [], data_dir=data_dir)
    settings = settings.model_copy(update={"base_model": settings.base_model.model_copy(update={"path": model_dir})})
    output = Path(settings.output_dir) / (settings.name or "output")
    point = _resume_point(output, auto_resume_from_checkpoint)
    if point is None:
        _refuse_to_move(settings.adapter.continue_from, output)
    move = None if point else lambda: _move_aside(output)
    done = watch_training(settings, point, override=override, dry_run=dry_run, before_start=move)
    if done is None:
        return
    newest = list(done.directory.checkpoints().values())[-1]
    typer.echo(f'\ncheckpoint  {newest}\ntalk to it with:  python3 inference_hf.py {newest}/ --prompt "..."')


def inference_hf(
    model_dir: Annotated[str, typer.Argument(help="A checkpoint, an adapter, a run, or a model.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Ask this and exit. None: a conversation.")] = None,
) -> None:
    """Answer a prompt with a checkpoint."""
    from tuneloom.cli.chat import chat

    chat(model_dir, prompt=prompt)


def model_export_hf(
    model_dir: Annotated[str, typer.Argument(help="A checkpoint, an adapter or a run.")],
    out_dir: Annotated[Path, typer.Option("--out-dir", help="The new folder.")],
    to: Annotated[
        Format, typer.Option("--to", help="merged: transformers' native layout; chatglm: ChatGLM's original one.")
    ] = Format.MERGED,
) -> None:
    """Write a checkpoint as one model, the adapter folded in."""
    export(model_dir, out=out_dir, to=to)


def _resume_point(output: Path, answer: str) -> ResumePoint | None:
    """Turn the fourth argument into a place to resume from; None: start anew.

    Raises:
        UserError: neither yes, no nor a number; or no such checkpoint.
    """
    from tuneloom.errors import UserError
    from tuneloom.rundir import RunDirectory
    from tuneloom.train.resume import find_resume

    word = answer.strip().lower()
    if word in ("no", "n", "false", ""):
        return None
    if word in ("yes", "y", "true"):
        if not RunDirectory.is_run(output):
            typer.echo(f"{output} holds no run; starting anew", err=True)
            return None
        return find_resume(str(output), output.parent)
    if not word.isdigit():
        raise UserError("the fourth argument says how to resume", got=answer, expected="yes, no, or a step's number")
    checkpoint = output / f"checkpoint-{int(word)}"
    if not checkpoint.is_dir():
        there = ", ".join(str(step) for step in RunDirectory(output).checkpoints()) or "none"
        raise UserError("no such checkpoint", where=str(checkpoint), expected=f"one of the steps there: {there}")
    return find_resume(str(checkpoint), output.parent)


def _refuse_to_move(adapter: str | None, output: Path) -> None:
    """Keep the adapter that a new run continues from where the run's settings say that it is.

    Raises:
        UserError: it lies in the output that would be moved aside.
    """
    from tuneloom.errors import UserError

    if adapter is not None and Path(adapter).expanduser().resolve().is_relative_to(output.resolve()):
        raise UserError(
            "the adapter to continue from lies in the output that a new run moves aside",
            where="adapter.continue_from",
            got=adapter,
            mend=f"rename {output} and name the adapter there, or write elsewhere with --set name=NEW",
        )


def _move_aside(output: Path) -> None:
    """Make room for a new run without losing an old one.

    Raises:
        UserError: the old one is being trained, or cannot be moved.
    """
    from tuneloom.errors import UserError
    from tuneloom.rundir import RunDirectory
    from tuneloom.train.resume import refuse_live

    if not output.exists():
        return
    refuse_live(RunDirectory(output))
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()
        return
    aside = output.with_name(f"{output.name}-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        output.rename(aside)
    except OSError as error:
        raise UserError(
            "the old output cannot be moved aside", where=str(output), got=error.strerror, mend="move it yourself"
        ) from error
    typer.echo(f"{output} was there already; moved to {aside}")
