"""`tuneloom studio`: the page to configure, train, watch and talk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def studio(
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0: any that is free.")] = 7878,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at. Off this machine's own the page is open to the network.")
    ] = "127.0.0.1",
    runs_dir: Annotated[Path, typer.Option("--runs-dir", help="Parent of the run directories.")] = Path("runs"),
) -> None:
    """Open the studio: one page to configure a run, watch it train, and talk to it."""
    from tuneloom.studio.server import serve

    serve(runs_dir, host=host, port=port, say=typer.echo)
