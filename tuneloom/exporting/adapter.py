"""Export an adapter as a folder of its own, in PEFT's layout, under native names or a ChatGLM's original ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tuneloom.adapters.chatglm import Sizes, sizes_of, to_native, to_original
from tuneloom.adapters.lora import Adapter, Layer, read_adapter, read_tensors, same_tensors, write_adapter
from tuneloom.adapters.store import BASE_FILE, CONFIG_FILE, WEIGHTS_FILE, check_fingerprint, tensor_shapes
from tuneloom.adapters.target import Target
from tuneloom.errors import GuardError, UserError
from tuneloom.exporting.folder import partial_folder
from tuneloom.exporting.merged import REPORT
from tuneloom.models.chatglm.config import is_original, native_config
from tuneloom.models.embedded import NOTICE
from tuneloom.models.fingerprint import fingerprint
from tuneloom.models.quiet import quiet_peft, quiet_transformers
from tuneloom.models.source import ModelSource

Say = Callable[[str], None]
Layout = Literal["native", "original"]

_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "vocab.json", "merges.txt"),
)
_BESIDE = (BASE_FILE, "README.md", NOTICE)
_TOLERANCE = 1e-6
"""Of the largest number in a layer's B x A: what folding one scaling into another may round."""


@dataclass(frozen=True)
class AdapterCheck:
    """What was compared.

    Attributes:
        passed: whether it holds.
        layers: LoRA layers that were compared.
        max_difference: of scaling x B x A over all layers, relative to the largest number of the layer; 0.0: the same bits.
    """

    passed: bool
    layers: int
    max_difference: float

    def sentence(self) -> str:
        """Return the result for people."""
        same = "the same bits" if self.max_difference == 0.0 else f"largest relative difference {self.max_difference:.1e}"
        return f"{self.layers} layers read back, {same}"


@dataclass(frozen=True)
class ExportedAdapter:
    """An adapter's folder that was written and checked.

    Attributes:
        folder: where it is.
        layout: native or original.
        notes: what its user should know.
        check: of what was written against what it was made from.
    """

    folder: Path
    layout: Layout
    notes: tuple[str, ...]
    check: AdapterCheck


def export_adapter(target: Target, out: Path, *, layout: Layout = "native", say: Say) -> ExportedAdapter:
    """Write a target's adapter with the tokenizer, card and notes beside it; no base weights are loaded.

    Native: the files as they are, accepted by PEFT on the base's empty shell. Original: converted, read back,
    and each layer's scaling x B x A compared in fp32.

    Args:
        target: something with an adapter.
        out: the new folder; it must not exist.
        layout: whose names the modules have.
        say: gets a line before each part.

    Raises:
        UserError: no adapter, one of another base, the original layout of what is no ChatGLM or cannot be said in it;
            `out` exists or cannot be written.
        GuardError: what was written does not read back the same; nothing is published.
    """
    if target.adapter is None:
        raise UserError(
            "nothing to export: the target has no adapter", where=target.name, expected="a run, a checkpoint or an adapter"
        )
    read_tensors(target.adapter)
    check_fingerprint(target.adapter, target.base, fingerprint(target.base.folder))
    sizes = _sizes(target) if layout == "original" else None
    partial = partial_folder(out)
    try:
        say(f"writing the adapter in the {layout} layout ...")
        _copy_beside(target, partial)
        if sizes is None:
            notes: list[str] = []
            check = _copied(target.adapter, partial, target.base)
        else:
            check, notes = _converted(target, partial, sizes)
        if not check.passed:
            raise GuardError(f"the exported adapter is not the one that it was made from: {check.sentence()}\n{_UNPUBLISHED}")
        report: dict[str, Any] = {"target": target.name, "base_model": target.base.name, "layout": layout, "notes": notes}
        report |= {"check": asdict(check)}
        (partial / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ExportedAdapter(out, layout, tuple(notes), check)


_UNPUBLISHED = "  nothing was published"


def _sizes(target: Target) -> Sizes:
    base = target.base
    sizes = sizes_of(base.config(), base.folder / "config.json")
    if sizes is None:
        raise UserError(
            "only an adapter of a ChatGLM has an original layout",
            where=target.name,
            got=f"a base of model_type {base.config().get('model_type')!r}: {base.name}",
            mend="leave --layout out",
        )
    return sizes


def _copy_beside(target: Target, folder: Path) -> None:
    """Copy the adapter's own tokenizer, card and notes."""
    own = target.own_folder
    assert own is not None
    names = (*_BESIDE, *(_TOKENIZER if target.tokenizer_folder == own else ()))
    for name in names:
        if (own / name).is_file():
            shutil.copyfile(own / name, folder / name)


def _copied(adapter: Path, folder: Path, base: ModelSource) -> AdapterCheck:
    """Copy an adapter's two files; PEFT must take them on the base, and every tensor must find its place."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(adapter / name, folder / name)
        if _sha256(adapter / name) != _sha256(folder / name):
            raise GuardError(f"{name} was not copied whole\n{_UNPUBLISHED}")
    taken, written = _taken_by_peft(folder, base), tensor_shapes(folder)
    wrong = {key for key in taken if written.get(key) != taken[key]}
    if wrong:
        raise GuardError(f"PEFT does not find the adapter's tensors, e.g. {min(wrong)}\n{_UNPUBLISHED}")
    return AdapterCheck(True, sum(".lora_A" in key or ".lora_embedding_A" in key for key in written), 0.0)


def _taken_by_peft(folder: Path, base: ModelSource) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's tensors as PEFT has them on a base without weights."""
    from peft import PeftModel, get_peft_model_state_dict

    with quiet_transformers(), quiet_peft(), torch.device("meta"):
        try:
            model = PeftModel.from_pretrained(_shell(base), folder, low_cpu_mem_usage=True, local_files_only=True)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0][:240]
            raise GuardError(f"PEFT does not load the adapter again: {said}\n{_UNPUBLISHED}") from error
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _shell(base: ModelSource) -> Any:
    """Return the base's model without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = base.config()
    known = native_config(config) if is_original(config) else AutoConfig.from_pretrained(base.folder, local_files_only=True)
    return AutoModelForCausalLM.from_config(known)


def _converted(target: Target, folder: Path, sizes: Sizes) -> tuple[AdapterCheck, list[str]]:
    """Write an adapter under the original names, read it back and compare."""
    assert target.adapter is not None
    adapter = read_adapter(target.adapter, sizes.native())
    original, notes = to_original(adapter, sizes)
    write_adapter(original, folder, sizes.original())
    if not is_original(target.base.config()):
        notes.append("it goes on the model in its original layout; base_model_name_or_path still names the native one")
    again = to_native(read_adapter(folder, sizes.original()), sizes)
    return _compared(adapter, again), notes


def _compared(adapter: Adapter, again: Adapter) -> AdapterCheck:
    alike = adapter.layers.keys() == again.layers.keys() and _same_saved(adapter, again)
    worst = 0.0
    for module, layer in adapter.layers.items() if alike else ():
        worst = max(worst, _difference(layer, again.layers[module], adapter.rslora))
    return AdapterCheck(alike and worst <= _TOLERANCE, len(adapter.layers), worst)


def _difference(layer: Layer, again: Layer, rslora: bool) -> float:
    """Return by how much two layers' scaling x B x A differ, relative to the largest number; inf: not the same magnitudes."""
    scalings = layer.scaling(rslora), again.scaling(rslora)
    if same_tensors(layer, again) and abs(scalings[0] - scalings[1]) <= 1e-12 * scalings[0]:
        return 0.0
    mine, theirs = layer.magnitude_O, again.magnitude_O
    if (mine is None) != (theirs is None) or (mine is not None and theirs is not None and not torch.equal(mine, theirs)):
        return float("inf")
    one, other = (
        scaling * part.b_OR.float() @ part.a_RI.float() for part, scaling in zip((layer, again), scalings, strict=True)
    )
    largest = float(one.abs().max())
    return float((one - other).abs().max()) / largest if largest else float((one - other).abs().max())


def _same_saved(adapter: Adapter, again: Adapter) -> bool:
    return adapter.saved.keys() == again.saved.keys() and all(
        torch.equal(tensor, again.saved[key]) for key, tensor in adapter.saved.items()
    )


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
