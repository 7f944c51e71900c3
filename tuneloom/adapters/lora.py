"""A LoRA adapter as numbers, layer by layer, read from PEFT's files and written to them.

Ranks, alphas and targets are resolved for each layer as PEFT resolves them (patterns, expressions, chosen
layers), so that whoever changes an adapter need not know how its config said it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tuneloom.adapters.store import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config, strange_settings, tensor_shapes
from tuneloom.errors import UserError, excerpt

if TYPE_CHECKING:
    from torch import Tensor

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)\."
    r"(?P<kind>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B|lora_magnitude_vector(?:\.weight)?"
    r"|(?:base_layer\.)?(?:weight|bias))"
)
_A, _B, _MAGNITUDE = ("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B"), "lora_magnitude_vector"
_COPY_AGAIN = "copy the adapter again, or use another one"
_CHANGED_ALONE = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Settings that say which modules, and are said by `target_modules` alone once an adapter has been read."""


@dataclass(frozen=True)
class Modules:
    """The modules of a base that an adapter may belong to.

    Attributes:
        sizes: path -> rows and columns of its weight; of a norm, its one size.
        embedding: path of the input embedding, whose LoRA lies the other way round.
        head: path of the output layer, which `all-linear` leaves out.
    """

    sizes: Mapping[str, tuple[int, ...]]
    embedding: str
    head: str

    def size(self, module: str) -> tuple[int, int]:
        """Return (outputs, inputs) of a module as LoRA sees it."""
        rows, columns = self.sizes[module]
        return (columns, rows) if module == self.embedding else (rows, columns)

    def may_have_lora(self) -> list[str]:
        """Return the paths of all but the norms."""
        return [module for module, size in self.sizes.items() if len(size) == 2]


@dataclass(frozen=True)
class Layer:
    """The LoRA of one module.

    Attributes:
        a_RI: down.
        b_OR: up.
        alpha: of this layer.
        magnitude_O: DoRA's, one a row, where there is one.
    """

    a_RI: Tensor
    b_OR: Tensor
    alpha: float
    magnitude_O: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.a_RI.shape[0]

    def scaling(self, rslora: bool) -> float:
        """Return alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if rslora else self.rank)

    def with_scaling_of(self, other: Layer, rslora: bool) -> Layer:
        """Return this layer with the alpha that makes its scaling another one's, whatever the ranks."""
        ratio = self.rank / other.rank
        return replace(self, alpha=whole(other.alpha * (math.sqrt(ratio) if rslora else ratio)))


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        folder: where it was read, for messages.
        config: its adapter_config.json.
        layers: the LoRA of each module, by path.
        saved: whole tensors (modules to save, biases), by (module, end of the key).
        notes: what the weight file's header says besides.
    """

    folder: Path
    config: dict[str, Any]
    layers: dict[str, Layer]
    saved: dict[tuple[str, str], Tensor]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def rslora(self) -> bool:
        return bool(self.config.get("use_rslora"))

    @property
    def dora(self) -> bool:
        return bool(self.config.get("use_dora"))


def whole(number: float) -> float:
    """Return a number as the whole one that it is up to rounding, else as it is."""
    near = round(number)
    return near if math.isclose(number, near, rel_tol=1e-12) else number


def read_adapter(folder: Path, modules: Modules) -> Adapter:
    """Read an adapter and require it to be whole and to fit.

    Args:
        folder: in PEFT's layout.
        modules: those of the base, under the names that the adapter uses.

    Raises:
        UserError: torn files, a kind that is not plain LoRA, rsLoRA or DoRA; a module that the base has not, a tensor
            missing or of another shape, by name.
    """
    config = read_adapter_config(folder)
    if strange := strange_settings(config):
        raise UserError(
            "an adapter of this kind is not read under other names",
            where=str(folder / CONFIG_FILE),
            got="; ".join(f"{key} {excerpt(value, 60)}" for key, value in list(strange.items())[:3]),
            expected="LoRA, rsLoRA or DoRA on a base that was left as it was",
            mend="use it with the tool that made it",
        )
    return _Reader(folder, config, modules).adapter(*read_tensors(folder))


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return an adapter's tensors by key, and what the file's header says besides.

    Raises:
        UserError: absent or torn.
    """
    from safetensors import SafetensorError, safe_open

    tensor_shapes(folder)
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118 no mapping
    except (OSError, SafetensorError) as error:
        raise UserError(
            "the adapter's weights are torn", where=str(folder / WEIGHTS_FILE), got=str(error)[:200], mend=_COPY_AGAIN
        ) from None


def write_adapter(adapter: Adapter, folder: Path, modules: Modules) -> None:
    """Write adapter_config.json and adapter_model.safetensors into a folder."""
    from safetensors.torch import save_file

    tensors = {f"base_model.model.{module}.{kind}": tensor for (module, kind), tensor in adapter.saved.items()}
    for module, layer in adapter.layers.items():
        at = module == modules.embedding
        tensors |= {f"base_model.model.{module}.{_A[at]}": layer.a_RI, f"base_model.model.{module}.{_B[at]}": layer.b_OR}
        if layer.magnitude_O is not None:
            tensors[f"base_model.model.{module}.{_MAGNITUDE}"] = layer.magnitude_O
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}  # none may share memory
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt", **adapter.notes})
    config = json.dumps(adapter.config, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")


def with_settings(adapter: Adapter, modules: Modules, saved: Iterable[str]) -> Adapter:
    """Return an adapter whose config says what its layers are: targets, ranks, alphas.

    Args:
        adapter: its layers decide.
        modules: those of the base, under the layers' names.
        saved: paths of the modules to save.
    """
    ranks = {module: layer.rank for module, layer in adapter.layers.items()}
    alphas = {module: layer.alpha for module, layer in adapter.layers.items()}
    r, alpha = _usual(ranks, adapter.config.get("r")), _usual(alphas, adapter.config.get("lora_alpha"))
    changes = {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": _pattern({module: rank for module, rank in ranks.items() if rank != r}, adapter.layers),
        "alpha_pattern": _pattern({module: given for module, given in alphas.items() if given != alpha}, adapter.layers),
        "target_modules": sorted(_pattern(dict.fromkeys(adapter.layers, 0), modules.may_have_lora())),
        "modules_to_save": sorted(_pattern(dict.fromkeys(saved, 0), modules.sizes, _end_to_save)) or None,
        **{key: None for key in _CHANGED_ALONE if key in adapter.config},
    }
    return replace(adapter, config=adapter.config | changes)


def modules_to_save(config: Mapping[str, Any], modules: Modules) -> set[str]:
    """Return the paths that PEFT takes `modules_to_save` for: the end of a path, within a name too."""
    names = tuple(config.get("modules_to_save") or ())
    return {module for module in modules.sizes if names and module.endswith(names)}


class _Reader:
    """Checks the tensors of one adapter and puts them together."""

    def __init__(self, folder: Path, config: dict[str, Any], modules: Modules) -> None:
        self.folder, self.config, self.modules = folder, config, modules

    def adapter(self, tensors: Mapping[str, Tensor], notes: dict[str, str]) -> Adapter:
        names = self.config.get("modules_to_save")
        if not (names is None or (isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names))):
            raise self._fault_of_setting("modules_to_save", excerpt(names))
        lora: dict[str, dict[str, Tensor]] = {}
        saved: dict[tuple[str, str], Tensor] = {}
        for key, tensor in tensors.items():
            match = _KEY.fullmatch(key)
            if match is None or match["module"] not in self.modules.sizes:
                raise self._fault("a tensor that no module of the base model has", key)
            module, kind = match["module"], match["kind"].removesuffix(".weight")
            if kind.startswith("lora_"):
                lora.setdefault(module, {})[kind.removeprefix("lora_").removeprefix("embedding_")] = tensor
            else:
                self._check_saved(key, module, tensor)
                saved[module, match["kind"]] = tensor
        named = self._named()
        if stray := lora.keys() - named:
            raise self._fault("weights of a module that the adapter's config does not name", min(stray))
        layers = {module: self._layer(module, lora.get(module, {})) for module in self.modules.sizes if module in named}
        if not layers:
            raise self._fault("the adapter's config names no module of the base model", excerpt(self.config["target_modules"]))
        for module in sorted(modules_to_save(self.config, self.modules)):
            if (module, "weight") not in saved:
                raise self._fault("the adapter lacks a tensor", f"no base_model.model.{module}.weight")
        return Adapter(self.folder, self.config, layers, saved, notes)

    def _named(self) -> set[str]:
        """Return the modules that the config means, as PEFT matches them."""
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        keys = ("target_modules", "modules_to_save", *_CHANGED_ALONE)
        paths = self.modules.may_have_lora()
        if self.config.get("target_modules") == "all-linear":
            return set(paths) - {self.modules.embedding, self.modules.head}
        try:
            config = LoraConfig(**{key: self.config.get(key) for key in keys})
            return {path for path in paths if check_target_module_exists(config, path)}
        except (TypeError, ValueError, re.error) as error:
            raise self._fault_of_setting("target_modules", str(error).splitlines()[0][:120]) from None

    def _layer(self, module: str, found: Mapping[str, Tensor]) -> Layer:
        needed = ("A", "B", *(("magnitude_vector",) if self.config.get("use_dora") else ()))
        for kind in needed:
            if kind not in found:
                raise self._fault("the adapter lacks a tensor", f"no lora_{kind} of {module}")
        outputs, inputs = self.modules.size(module)
        r = self._number("r", "rank_pattern", 8, module)
        shapes = {"A": (r, inputs), "B": (outputs, r), "magnitude_vector": (outputs,)}
        for kind, tensor in found.items():
            if kind not in needed:
                raise self._fault("the adapter has a tensor that its config does not ask for", f"lora_{kind} of {module}")
            if tuple(tensor.shape) != shapes[kind]:
                raise self._fault(
                    "a tensor of another shape",
                    f"lora_{kind} of {module}: {list(tensor.shape)}",
                    f"{list(shapes[kind])}, by the base model's sizes and rank {r}",
                )
        alpha = self._number("lora_alpha", "alpha_pattern", 8, module)
        return Layer(found["A"], found["B"], alpha, found.get("magnitude_vector"))

    def _number(self, key: str, pattern_key: str, usual: int, module: str) -> Any:
        """Return the rank or the alpha of a module."""
        from peft.utils.other import get_pattern_key

        pattern = self.config.get(pattern_key) or {}
        try:
            number = pattern.get(get_pattern_key(pattern, module), self.config.get(key, usual))
        except (AttributeError, TypeError, re.error):
            raise self._fault_of_setting(pattern_key, excerpt(pattern)) from None
        right = (int,) if key == "r" else (int, float)
        if not isinstance(number, right) or isinstance(number, bool) or not 0 < number < math.inf:
            raise self._fault_of_setting(key, f"{excerpt(number)} for {module}")
        return number

    def _check_saved(self, key: str, module: str, tensor: Tensor) -> None:
        size = self.modules.sizes[module]
        expected = size[:1] if key.endswith(".bias") else size
        if tuple(tensor.shape) != expected:
            raise self._fault("a tensor of another shape", f"{key}: {list(tensor.shape)}", f"{list(expected)}")

    def _fault(self, what: str, got: str, expected: str | None = None) -> UserError:
        return UserError(what, where=str(self.folder / WEIGHTS_FILE), got=got, expected=expected, mend=_COPY_AGAIN)

    def _fault_of_setting(self, key: str, got: str) -> UserError:
        return UserError(
            "the adapter's config is wrong", where=str(self.folder / CONFIG_FILE), got=f"{key}: {got}", mend=_COPY_AGAIN
        )


def same_tensors(left: Layer, right: Layer) -> bool:
    """Whether two layers are equal bit for bit."""
    pairs = [(left.a_RI, right.a_RI), (left.b_OR, right.b_OR)]
    if left.magnitude_O is not None and right.magnitude_O is not None:
        pairs.append((left.magnitude_O, right.magnitude_O))
    return (left.magnitude_O is None) == (right.magnitude_O is None) and all(
        mine.dtype == theirs.dtype and torch.equal(mine, theirs) for mine, theirs in pairs
    )


def _usual(values: Mapping[str, float], given: Any) -> Any:
    """Return the number that the config gives, where a layer has it, else the most frequent."""
    counts = Counter(values.values())
    return given if given in counts else counts.most_common(1)[0][0]


def _end(module: str) -> str:
    return module.rpartition(".")[2]


def _end_to_save(module: str) -> str:
    """Return the name that means a module to PEFT in `modules_to_save`, where the end of a name is enough."""
    return module if _end(module) == "norm" else _end(module)


def _pattern(values: Mapping[str, Any], among: Iterable[str], end: Callable[[str], str] = _end) -> dict[str, Any]:
    """Return values by the last name of their modules where all modules of that name have the same, else by path."""
    named: dict[str, list[str]] = {}
    for module in among:
        named.setdefault(end(module), []).append(module)
    pattern: dict[str, Any] = {}
    for name, alike in named.items():
        having = [module for module in alike if module in values]
        if len(having) == len(alike) and len({values[module] for module in having}) == 1:
            pattern[name] = values[having[0]]
        else:
            pattern |= {module: values[module] for module in having}
    return pattern
