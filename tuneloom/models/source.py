"""From what a user names as a model to a local folder that loads on native classes."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tuneloom.cache import cache_subfolder
from tuneloom.errors import UserError, nearest, user_path
from tuneloom.models.chatglm.config import check_original, is_original
from tuneloom.models.embedded import EMBEDDED, MARKER, NOTICE, convert_gguf, embedded_folder

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
_PICKLED = "*.bin"

Say = Callable[[str], None]


@dataclass(frozen=True)
class ModelSource:
    """A base model's whereabouts.

    Attributes:
        name: what the user wrote; shown to people and kept in the run.
        folder: local Hugging Face folder.
        kind: where the folder came from.
    """

    name: str
    folder: Path
    kind: Literal["embedded", "folder", "gguf", "hub"]

    def config(self) -> dict[str, Any]:
        """Return the folder's config.json."""
        return read_model_config(self.folder)

    def notice(self) -> str | None:
        """Return the notice that must go with whatever is made from the weights, if there is one."""
        if self.name in EMBEDDED:
            return EMBEDDED[self.name].notice
        try:
            return (self.folder / NOTICE).read_text(encoding="utf-8").strip() or None
        except (OSError, UnicodeDecodeError):
            return None


def silent(_: str) -> None:
    """Say nothing."""


def resolve_model(path: str, *, revision: str | None = None, say: Say = silent) -> ModelSource:
    """Find a base model by folder, GGUF file, embedded name or hub id.

    Args:
        path: what the user wrote.
        revision: branch, tag or commit, of a hub id.
        say: gets a line before anything that takes long.

    Raises:
        UserError: nothing is there, the folder is no model, or it needs code of its own.
    """
    if path in EMBEDDED:
        return ModelSource(path, embedded_folder(path, say), "embedded")
    place = user_path(path)
    if place.is_dir():
        name = _embedded_name(place) or path
        check_model_folder(place)
        return ModelSource(name, place, "embedded" if name in EMBEDDED else "folder")
    if place.is_file():
        if place.suffix.lower() != ".gguf":
            raise UserError("the model is a file", where=path, expected="a folder, or a .gguf file")
        return ModelSource(path, _converted_gguf(place, say), "gguf")
    if place.name in EMBEDDED:  # an adapter made on another machine names its cache
        return ModelSource(place.name, embedded_folder(place.name, say), "embedded")
    if _HUB_ID.fullmatch(path) and not path.startswith("."):
        return ModelSource(path, _hub_folder(path, revision, say), "hub")
    near = nearest(path, EMBEDDED)
    raise UserError(
        "model not found",
        where=path,
        expected=f"a folder, a GGUF file, a hub id, or one of {', '.join(EMBEDDED)}",
        mend=f"did you mean `{near}`?" if near else "check the path",
    )


def check_model_folder(folder: Path) -> None:
    """Require a folder to be a model that transformers implements natively, with safetensors; or a ChatGLM2 or ChatGLM3.

    Raises:
        UserError: otherwise, naming what is missing.
    """
    config = read_model_config(folder)
    if is_original(config):
        from tuneloom.models.chatglm.weights import check_weights

        check_original(config, folder / "config.json")
        check_weights(folder, config)
        return
    kind = config.get("model_type")
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if kind not in CONFIG_MAPPING:
        remote = "auto_map" in config or any(folder.glob("*.py"))
        raise UserError(
            "the model needs code of its own, which is never run"
            if remote
            else "transformers does not know this kind of model",
            where=str(folder / "config.json"),
            got=f"model_type {kind!r}" + (" with auto_map" if "auto_map" in config else ""),
            mend="use a checkpoint of the model in transformers' native layout",
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            "not a model that writes text",
            where=str(folder / "config.json"),
            got=f"model_type {kind!r}",
            expected="a causal LM",
        )
    if not any(folder.glob("*.safetensors")):
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        raise UserError(
            "the folder has no safetensors weights",
            where=str(folder),
            got=f"{pickled[0].name}: pickled weights can run code and are not read" if pickled else "no weights",
            mend="convert them to safetensors first" if pickled else "copy the model's *.safetensors files there too",
        )


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return a model folder's config.json.

    Raises:
        UserError: absent, or torn.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            "the folder is no model", where=str(folder), got="no config.json", expected="a Hugging Face model folder"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            "config.json cannot be read", where=str(file), got=str(error)[:200], mend="copy or download the model's file again"
        ) from None
    if not isinstance(config, dict):
        raise UserError("config.json is not a map", where=str(file), mend="copy or download the model's file again")
    return config


def _embedded_name(folder: Path) -> str | None:
    """Return the embedded model's name that a converted folder carries."""
    try:
        name = json.loads((folder / MARKER).read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if name in EMBEDDED else None


def _converted_gguf(file: Path, say: Say) -> Path:
    """Convert a user's GGUF file once; the cache is keyed by its content."""
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    folder = cache_subfolder("models") / f"gguf-{digest[:16]}"
    if not folder.is_dir():
        say(f"converting {file.name} to safetensors, once ...")
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".gguf.") as scratch:
            converted = Path(scratch) / "converted"
            convert_gguf(file, converted)
            converted.rename(folder)
    return folder


def _hub_folder(repo: str, revision: str | None, say: Say) -> Path:
    """Return the local snapshot of a hub model, downloading what is missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    say(f"looking for {repo} on the hub ...")
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES))
        if not any(folder.glob("*.safetensors")) and is_original(read_model_config(folder)):
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[*_HUB_FILES, _PICKLED]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            "model not found",
            where=repo,
            got=f"no such folder, and the hub gave: {(str(error).splitlines() or ['no answer'])[0][:160]}",
            mend="check the path or id and the network; the embedded model needs neither: "
            + ", ".join(name for name, model in EMBEDDED.items() if not model.consent),
        ) from error
    check_model_folder(folder)
    return folder
