"""What models are at hand without a hub: those that ship in PyPI packages, and what the cache holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tuneloom.cache import cache_dir
from tuneloom.errors import UserError, nearest
from tuneloom.models.embedded import EMBEDDED, EmbeddedModel, ready_folder
from tuneloom.rundir import folder_bytes, read_json_map


@dataclass(frozen=True)
class Listed:
    """An embedded model and where it stands.

    Attributes:
        model: what it is and where it comes from.
        folder: its converted folder in the cache, None where it is not there.
        num_bytes: of that folder.
    """

    model: EmbeddedModel
    folder: Path | None
    num_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values with stable keys."""
        model = self.model
        return {
            "name": model.name,
            "about": model.about,
            "license": model.license,
            "license_name": model.license_name,
            "license_url": model.license_url,
            "consent_needed": model.consent and self.folder is None,
            "hub_id": model.hub_id,
            "packages": list(model.requirements),
            "download_bytes": model.num_bytes,
            "ready": self.folder is not None,
            "folder": str(self.folder) if self.folder else None,
            "cached_bytes": self.num_bytes,
        }


@dataclass(frozen=True)
class Converted:
    """A user's GGUF file as the cache holds it.

    Attributes:
        name: of the folder; it carries the file's sha256.
        model_type: as transformers calls it, None where config.json does not say.
        folder, num_bytes: the folder and its size.
    """

    name: str
    model_type: str | None
    folder: str
    num_bytes: int


@dataclass(frozen=True)
class Library:
    """All of it."""

    cache: Path
    models: tuple[Listed, ...]
    converted: tuple[Converted, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values with stable keys."""
        return {
            "cache": str(self.cache),
            "models": [model.as_dict() for model in self.models],
            "converted": [asdict(model) for model in self.converted],
        }


def list_models() -> Library:
    """Look through the cache; nothing is fetched, made or loaded."""
    models = tuple(listed(model) for model in EMBEDDED.values())
    return Library(cache_dir(), models, tuple(_converted(cache_dir() / "models")))


def listed(model: EmbeddedModel) -> Listed:
    """Return where an embedded model stands."""
    folder = ready_folder(model.name)
    return Listed(model, folder, folder_bytes(folder) if folder else 0)


def known_model(name: str) -> EmbeddedModel:
    """Return the embedded model of a name.

    Raises:
        UserError: there is none; the nearest name is told.
    """
    if name in EMBEDDED:
        return EMBEDDED[name]
    near = nearest(name.lower(), EMBEDDED)
    raise UserError(
        "no model of this name comes without a hub",
        where=name,
        expected=f"one of {', '.join(EMBEDDED)}",
        mend=f"did you mean `{near}`?" if near else "name a folder, a GGUF file or a hub id as base_model; it needs no pull",
    )


def has_chat_template(folder: Path) -> bool:
    """Whether a model's folder brings a chat template, without loading its tokenizer."""
    if (folder / "chat_template.jinja").is_file():
        return True
    return bool((read_json_map(folder / "tokenizer_config.json") or {}).get("chat_template"))


def _converted(folder: Path) -> list[Converted]:
    """Return the GGUF files of the user's own that were converted."""
    try:
        found = sorted(path for path in folder.glob("gguf-*") if path.is_dir())
    except OSError:
        return []
    return [
        Converted(path.name, (read_json_map(path / "config.json") or {}).get("model_type"), str(path), folder_bytes(path))
        for path in found
    ]
