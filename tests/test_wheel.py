"""What an installed package must bring along."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_a_wheel_holds_recipes_data_and_types(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("tuneloom-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"tuneloom/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    wanted |= {f"tuneloom/data/builtin/{path.name}" for path in (ROOT / "tuneloom/data/builtin").iterdir()}
    wanted |= {f"tuneloom/models/chatglm/{name}.jinja" for name in ("chatglm2", "chatglm3")}
    assert wanted | {"tuneloom/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
