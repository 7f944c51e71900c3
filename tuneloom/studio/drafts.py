"""What the form of a new run holds, kept on disk: a refresh, a second tab and a studio that starts again find it.

RUNS/.studio/drafts/draft.json     the form's values, and the number by which Start is one wish
RUNS/.studio/drafts/<number>.yaml  the config that a run was started with
RUNS/.studio/uploads/<id>/<name>   data files that were uploaded
"""

from __future__ import annotations

import json
import re
import secrets
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneloom.config import Config, dump_config, load_config, parse_config
from tuneloom.errors import UserError
from tuneloom.rundir import write_atomically
from tuneloom.studio.jobs import Job, Jobs
from tuneloom.studio.questions import new_values, run_name
from tuneloom.studio.uploads import UPLOADS

MAX_UPLOAD_BYTES = 512 << 20
PASTED = "pasted.yaml"
_UNSAFE = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Draft:
    """The form's content.

    Attributes:
        key: the form's number; Start with the same one is the same wish.
        values: a config's values, wrong ones among them.
    """

    key: str
    values: dict[str, Any]


class Drafts:
    """The draft of a folder of runs.

    Args:
        runs: the folder of runs; made where it is missing.
    """

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.folder = runs / ".studio" / "drafts"
        self.uploads = runs / UPLOADS

    def load(self) -> Draft:
        """Return the draft; a new one where there is none, or where it is torn."""
        try:
            stored = json.loads((self.folder / "draft.json").read_text(encoding="utf-8"))
            if isinstance(stored["key"], str) and isinstance(stored["values"], dict):
                return Draft(stored["key"], stored["values"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        draft = Draft(secrets.token_urlsafe(12), new_values())
        self.save(draft)
        return draft

    def save(self, draft: Draft) -> None:
        """Keep a draft."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stored = {"key": draft.key, "values": draft.values}
        write_atomically(self.folder / "draft.json", json.dumps(stored, ensure_ascii=False, indent=1) + "\n")

    def stamp(self) -> int:
        """Return a number that changes whenever the draft is saved."""
        try:
            return (self.folder / "draft.json").stat().st_mtime_ns
        except OSError:
            return 0

    def start(self, jobs: Jobs, draft: Draft) -> Job:
        """Start the draft's run, and give the form a new number; with a number that was used, return its job.

        Raises:
            UserError: a wrong value.
        """
        if (there := jobs.get(draft.key)) is not None:
            return there
        config = run_config(draft.values, self.runs, taken_names(self.runs, jobs))
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{draft.key}.yaml"
        write_atomically(file, dump_config(config))
        about = {"run": config.name, "config": str(file), "method": config.method, "base_model": config.base_model.path}
        job = jobs.start(draft.key, "finetune", ["finetune", str(file)], about)
        self.save(Draft(secrets.token_urlsafe(12), draft.values))
        return job

    def upload_place(self, name: str) -> Path:
        """Return where an uploaded file goes: a folder of its own, under a safe form of its name.

        Raises:
            UserError: no kind of data file.
        """
        from tuneloom.data.read import SUFFIXES

        safe = safe_name(name)
        if Path(safe).suffix.lower() not in SUFFIXES:
            raise UserError("unknown kind of data file", where=name[:80], expected=", ".join(SUFFIXES))
        folder = self.uploads / secrets.token_urlsafe(12)
        folder.mkdir(parents=True)
        return folder / safe


def safe_name(name: str) -> str:
    """Return a file's name without a folder, of letters, digits, `.`, `-` and `_`, not hidden."""
    last = re.split(r"[/\\]", name)[-1]
    stem, dot, suffix = _UNSAFE.sub("_", last).strip("._-").rpartition(".")
    return f"{(stem or suffix)[:60]}{dot if stem else ''}{suffix[:12] if stem else ''}" or "data"


def run_config(values: Mapping[str, Any], runs: Path, taken: Collection[str]) -> Config:
    """Return the config that Start runs: the form's, in the studio's folder, under a name that is free.

    Raises:
        UserError: a wrong value.
    """
    return parse_config({**values, "output_dir": str(runs), "name": run_name(dict(values), taken)})


def taken_names(runs: Path, jobs: Jobs) -> set[str]:
    """Return the names of the runs that are there, and of those that are about to be."""
    there = {path.name for path in runs.iterdir()} if runs.is_dir() else set()
    coming = {str(job.about.get("run")) for job in jobs.all("finetune") if job.ended() == "running"}
    return there | coming


def read_text(text: str) -> dict[str, Any]:
    """Return the values of a config that was pasted or uploaded, ours or ChatGLM3's `finetune_demo`.

    Raises:
        UserError: no YAML, an unknown key, a wrong value.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / PASTED
        file.write_text(text, encoding="utf-8", errors="replace")
        try:
            values = load_config(file).model_dump(mode="json")
        except UserError as error:
            where = (error.where or "").replace(str(file), PASTED)
            raise UserError(error.what, where=where or None, got=error.got, expected=error.expected, mend=error.mend) from None
    return values
