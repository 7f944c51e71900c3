"""Imports of the page's framework without what a server never uses: they are most of what its start takes."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

CLIENTS = ("aiohttp", "requests", "websocket")
"""What engineio takes where it is there, for its client alone; it goes without where it is not."""


@contextmanager
def lean_imports() -> Iterator[None]:
    """Import without the packages of clients, and without the collector going through what only grows.

    Whoever imports one of these packages afterwards gets it as always.
    """
    hidden = [name for name in CLIENTS if name not in sys.modules]
    collects = gc.isenabled()
    gc.disable()
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # the documented way to say that there is none
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        if collects:
            gc.enable()
