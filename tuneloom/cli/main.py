"""The command `tuneloom`. Verbs import what they need when they run, so `--help` is instant."""

from __future__ import annotations

import logging
import os
import sys

import typer

from tuneloom.cli.chat import chat
from tuneloom.cli.data import app as data
from tuneloom.cli.demo import demo
from tuneloom.cli.doctor import doctor
from tuneloom.cli.estimate import estimate
from tuneloom.cli.evaluate import evaluate
from tuneloom.cli.export import export
from tuneloom.cli.finetune import finetune
from tuneloom.cli.models import models
from tuneloom.cli.runs import runs
from tuneloom.cli.studio import studio

app = typer.Typer(
    name="tuneloom",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Teach an open chat model who it is and how to talk, on the machine you have.",
)
for verb in (finetune, estimate, chat, evaluate, export, studio, demo, doctor):
    app.command()(verb)
app.add_typer(data, name="data")
app.add_typer(models, name="models")
app.add_typer(runs, name="runs")


def _version(value: bool) -> None:
    if value:
        from tuneloom import __version__

        typer.echo(f"tuneloom {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", callback=_version, is_eager=True),
) -> None:
    del version


def main() -> None:
    """Run the command line; end with the exit code that `tuneloom.errors` lists."""
    run(app)


def run(command: object) -> None:
    """Call a command and turn our errors into a short message and an exit code."""
    from tuneloom.errors import TuneloomError

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # where installed, it warns of kernels that nobody asked for
    try:
        command()  # type: ignore[operator]
    except TuneloomError as error:
        if not error.told_elsewhere:
            print(f"tuneloom: {error}", file=sys.stderr)  # noqa: T201 the one place that ends with a message
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("tuneloom: interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(130)
