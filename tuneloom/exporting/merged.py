"""Export a run, checkpoint or adapter as one model with the adapter folded in, in the native layout or ChatGLM's own."""

from __future__ import annotations

import gc
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from tuneloom.adapters.merge import merge_adapter
from tuneloom.adapters.target import Loaded, Target, load_target
from tuneloom.errors import GuardError, UserError
from tuneloom.exporting.folder import partial_folder
from tuneloom.exporting.original import require_original, write_original
from tuneloom.exporting.reference import make_reference
from tuneloom.exporting.verify import Check, verify_in_fresh_process
from tuneloom.models.chatglm.config import is_original
from tuneloom.models.embedded import EMBEDDED, NOTICE
from tuneloom.models.precision import exactly
from tuneloom.models.quiet import quiet_transformers
from tuneloom.rundir import write_atomically

Say = Callable[[str], None]
Layout = Literal["native", "original"]
REPORT = "export.json"


@dataclass(frozen=True)
class Exported:
    """A folder that was written and checked."""

    folder: Path
    precision: str
    check: Check


def export_merged(
    target: Target,
    out: Path,
    *,
    layout: Layout = "native",
    precision: str = "auto",
    max_shard_size: str = "5GB",
    say: Say,
) -> Exported:
    """Write base and adapter as one Hugging Face folder, verified by reloading it in a fresh process.

    Args:
        target: something with an adapter; or a ChatGLM in its original layout, to change its layout.
        out: the new folder; it must not exist.
        layout: `native`, or `original`: ChatGLM's own, from a base in that layout.
        precision: auto (the base's own), fp32, bf16 or fp16.
        max_shard_size: of a safetensors file, e.g. `5GB`.
        say: gets a line before each part.

    Raises:
        UserError: nothing to merge, a base of another layout, a shard size that is none, `out` exists or cannot be written.
        GuardError: the reloaded model does not answer as the unmerged one; nothing is published.
    """
    if layout == "original":
        require_original(target)
    if target.adapter is None and not is_original(target.base.config()):
        raise UserError(
            "nothing to merge: the target has no adapter", where=target.name, expected="a run, a checkpoint or an adapter"
        )
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?\s*[KMGT]i?B", max_shard_size, re.IGNORECASE):
        raise UserError(
            "not a shard size", where="--max-shard-size", got=max_shard_size, expected="a size such as 5GB or 500MB"
        )
    if target.config is not None and target.config.base_model.quantization != "none":
        say("the base was quantised in training; merging into its unquantised weights")
    partial = partial_folder(out)
    reference_file = partial.with_suffix(".reference")
    try:
        chosen = stored_precision(target) if precision == "auto" else precision
        say(f"loading {target.base.name} in {chosen} ...")
        loaded = load_target(_unquantised(target), precision=exactly(chosen), device="cpu")
        say("keeping its answers as the reference ...")
        make_reference(loaded.model, loaded.renderer).save(reference_file)
        say("merging and writing ..." if target.adapter else "writing ...")
        _write(loaded, partial, layout, max_shard_size)
        del loaded
        gc.collect()
        say("reloading it in a fresh process ...")
        check = _checked(partial, reference_file, chosen)
        made = {"target": target.name, "base_model": target.base.name, "layout": layout, "precision": chosen}
        report = made | {"check": asdict(check)}
        (partial / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.rename(out)
    finally:
        reference_file.unlink(missing_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(out, chosen, check)


def stored_precision(target: Target) -> str:
    """Return the precision that the base's weights are stored in."""
    config = target.base.config()
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return {"bfloat16": "bf16", "float16": "fp16"}.get(stored, "fp32")


def _unquantised(target: Target) -> Target:
    return replace(target, config=None, run=None)


def _write(loaded: Loaded, folder: Path, layout: Layout, max_shard_size: str) -> None:
    model = merge_adapter(loaded.model) if loaded.target.adapter else loaded.model
    with quiet_transformers(), torch.inference_mode():
        if layout == "original":
            write_original(model, loaded.target.base.folder, folder, max_shard_size)
        else:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            loaded.renderer.tokenizer.save_pretrained(folder)
    write_atomically(folder / "README.md", _card(loaded.target, layout))
    if notice := loaded.target.base.notice():
        write_atomically(folder / NOTICE, notice + "\n")


def _card(target: Target, layout: Layout) -> str:
    """Return the exported model's card; what the run measured is in the adapter's own."""
    embedded = EMBEDDED.get(target.base.name)
    base = json.dumps(embedded.hub_id if embedded else target.base.name, ensure_ascii=False)
    license_line = f"license: {embedded.license}\n" if embedded else ""
    name = (target.config.data.variables.get("name") if target.config else None) or Path(target.name).name
    method = target.config.method if target.config else "LoRA"
    made = f" with a {method} adapter folded in" if target.adapter else ""
    kept = "in its original layout" if layout == "original" else "in transformers' native layout"
    tags = "[tuneloom, merged]" if target.adapter else "[tuneloom]"
    return (
        f"---\nbase_model: {base}\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: {tags}\n"
        f"{license_line}---\n\n# {name}\n\n`{target.base.name}`{made}, {kept}, written by Tuneloom. "
        f"`{REPORT}` holds the check of this folder against the model that it was made from.\n\n"
        f"{_ORIGINAL_USE if layout == 'original' else _NATIVE_USE}{_licence(target)}"
    )


_NATIVE_USE = (
    "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained("PATH_TO_THIS_FOLDER")\n'
    'tokenizer = AutoTokenizer.from_pretrained("PATH_TO_THIS_FOLDER")\n```\n'
)
_ORIGINAL_USE = (
    "For tools that read the original ChatGLM layout, such as llama.cpp's converter and vLLM. Tuneloom reads it too:\n\n"
    "```\ntuneloom chat PATH_TO_THIS_FOLDER\n```\n"
)


def _licence(target: Target) -> str:
    notice = target.base.notice()
    return f"\n## Licence of the base model\n\n{notice}\n" if notice else ""


def _checked(folder: Path, reference: Path, precision: str) -> Check:
    try:
        check = verify_in_fresh_process(folder, reference, precision)
    except RuntimeError as error:
        raise GuardError(f"the exported model does not load again: {error}\n  nothing was published") from error
    if not check.passed:
        raise GuardError(f"the exported model does not answer as the tuned one: {check.sentence()}\n  nothing was published")
    return check
