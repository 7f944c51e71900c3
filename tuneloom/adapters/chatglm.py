"""Adapters of a ChatGLM: from the original layout's names to the native ones, and back.

In the original layout q, k and v are one module, `query_key_value`, whose rows are theirs one after another.

To native: A goes to all three, B's rows and DoRA's magnitudes are split. To original: where A is the same in all
three, B is joined by rows; else A = cat(Aq, Ak, Av) and B is block-diagonal, of the sum of their ranks, with an alpha
that leaves the scaling as it was. Both compute the same function, DoRA included, whose norms are taken row by row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tuneloom.adapters.lora import Adapter, Layer, Modules, modules_to_save, with_settings
from tuneloom.errors import UserError
from tuneloom.models.chatglm.config import Attention, attention_of, check_original, is_original, native_config
from tuneloom.models.chatglm.names import native_modules, original_module

if TYPE_CHECKING:
    from torch import Tensor

_BLOCKS = "tuneloom_blocks"
"""In the weight file's header: the ranks of q, k and v in each block-diagonal B."""

_PARTS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Sizes:
    """What a base's config says of the shapes of its modules, in either layout."""

    num_layers: int
    hidden: int
    inner: int
    vocabulary: int
    attention: Attention

    def original(self) -> Modules:
        """Return the modules by the original layout's names."""
        hidden, inner = self.hidden, self.inner
        sizes: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings": (self.vocabulary, hidden)}
        for layer in range(self.num_layers):
            stem = f"transformer.encoder.layers.{layer}."
            sizes |= {
                f"{stem}input_layernorm": (hidden,),
                f"{stem}self_attention.query_key_value": (sum(self.attention.parts), hidden),
                f"{stem}self_attention.dense": (hidden, self.attention.query_rows),
                f"{stem}post_attention_layernorm": (hidden,),
                f"{stem}mlp.dense_h_to_4h": (2 * inner, hidden),
                f"{stem}mlp.dense_4h_to_h": (hidden, inner),
            }
        sizes["transformer.encoder.final_layernorm"] = (hidden,)
        sizes["transformer.output_layer"] = (self.vocabulary, hidden)
        return Modules(sizes, "transformer.embedding.word_embeddings", "transformer.output_layer")

    def native(self) -> Modules:
        """Return the modules by their native names."""
        sizes: dict[str, tuple[int, ...]] = {}
        for module, size in self.original().sizes.items():
            names = native_modules(module)
            rows = size[:1] if len(names) == 1 else self.attention.parts
            sizes |= {name: (part, *size[1:]) for name, part in zip(names, rows, strict=True)}
        return Modules(sizes, "model.embed_tokens", "lm_head")


def sizes_of(config: Mapping[str, Any], file: Path) -> Sizes | None:
    """Return the sizes of a ChatGLM by its config.json, in either layout; None for a model of another family.

    Args:
        config: the content.
        file: where it is, for messages.

    Raises:
        UserError: a config in the original layout that is not as it must be.
    """
    if is_original(config):
        check_original(config, file)
        native, attention = native_config(config), attention_of(config)
    elif config.get("model_type") == "glm":
        from transformers import GlmConfig

        native = GlmConfig.from_dict(dict(config))
        attention = Attention(native.num_attention_heads * native.head_dim, native.num_key_value_heads * native.head_dim)
    else:
        return None
    return Sizes(native.num_hidden_layers, native.hidden_size, native.intermediate_size, native.vocab_size, attention)


def has_original_names(keys: Iterable[str]) -> bool:
    """Whether an adapter's tensors are named as in the original layout."""
    return any(
        key.startswith(("base_model.model.transformer.encoder.", "base_model.model.transformer.embedding."))
        or key.startswith("base_model.model.transformer.output_layer.")
        for key in keys
    )


def to_native(adapter: Adapter, sizes: Sizes) -> Adapter:
    """Return an adapter under the native names.

    Where B is block-diagonal, as `to_original` writes it, each of q, k and v gets its own rank back.

    Args:
        adapter: read with `sizes.original()`.
        sizes: those of the base.
    """
    blocks = _noted_blocks(adapter)
    layers: dict[str, Layer] = {}
    for module, layer in adapter.layers.items():
        names = native_modules(module)
        parts = [layer] if len(names) == 1 else _split(layer, sizes.attention, blocks.get(module), adapter.rslora)
        layers |= {name: part for name, part in zip(names, parts, strict=True) if part is not None}
    saved: dict[tuple[str, str], Tensor] = {}
    for (module, kind), tensor in adapter.saved.items():
        names = native_modules(module)
        rows = (tensor,) if len(names) == 1 else torch.split(tensor, list(sizes.attention.parts))
        saved |= {(name, kind): part for name, part in zip(names, rows, strict=True)}
    to_save = [name for module in modules_to_save(adapter.config, sizes.original()) for name in native_modules(module)]
    notes = {key: text for key, text in adapter.notes.items() if key != _BLOCKS}
    native = sizes.native()
    ordered = {name: layers[name] for name in native.sizes if name in layers}
    return with_settings(replace(adapter, layers=ordered, saved=saved, notes=notes), native, to_save)


def to_original(adapter: Adapter, sizes: Sizes) -> tuple[Adapter, list[str]]:
    """Return an adapter under the original layout's names, and what its user should know.

    Args:
        adapter: read with `sizes.native()`.
        sizes: those of the base.

    Raises:
        UserError: DoRA, or weights saved whole, on some of q, k and v and not on all three.
    """
    grouped: dict[str, dict[int | None, Layer]] = {}
    for name, layer in adapter.layers.items():
        module, part = _original(name)
        grouped.setdefault(module, {})[part] = layer
    layers, blocks, rescaled = {}, {}, False
    for module, parts in grouped.items():
        if None in parts:
            layers[module] = parts[None]
            continue
        given = [parts.get(i) for i in range(3)]
        _require_all_for_dora(adapter, module, given)
        if (joined := _stacked(given)) is not None:
            layers[module] = joined
            continue
        layers[module] = _block_diagonal(given, sizes.attention, adapter.rslora)
        blocks[module] = [part.rank if part else 0 for part in given]
        rescaled |= not _alike(given, adapter.rslora)
    saved = _joined_saved(adapter)
    to_save = {_original(name)[0] for name in modules_to_save(adapter.config, sizes.native())}
    notes = adapter.notes | ({_BLOCKS: json.dumps(blocks)} if blocks else {})
    moved = with_settings(replace(adapter, layers=layers, saved=saved, notes=notes), sizes.original(), to_save)
    return moved, _remarks(moved, blocks, rescaled)


def _split(layer: Layer, attention: Attention, noted: object, rslora: bool) -> list[Layer | None]:
    """Return the layers of q, k and v; None for one whose rows an export filled in with nothing."""
    rows = torch.split(layer.b_OR, list(attention.parts))
    magnitudes = torch.split(layer.magnitude_O, list(attention.parts)) if layer.magnitude_O is not None else (None,) * 3
    ranks = _block_ranks(rows, noted)
    if ranks is None or (layer.magnitude_O is not None and 0 in ranks):
        return [replace(layer, b_OR=b_OR, magnitude_O=m_O) for b_OR, m_O in zip(rows, magnitudes, strict=True)]
    downs = torch.split(layer.a_RI, ranks)
    found: list[Layer | None] = []
    for i, (a_RI, b_OR, m_O) in enumerate(zip(downs, rows, magnitudes, strict=True)):
        part = Layer(a_RI, torch.split(b_OR, ranks, dim=1)[i], layer.alpha, m_O)
        found.append(part.with_scaling_of(layer, rslora) if ranks[i] else None)
    return found


def _block_ranks(rows: Sequence[Tensor], noted: object) -> list[int] | None:
    """Return the ranks of q, k and v in a block-diagonal B: as noted, else three equal ones; None where it is not one."""
    rank = rows[0].shape[1]
    whole = all(bool(part.any()) for part in rows)
    ranks = _checked_ranks(noted, rank) or ([rank // 3] * 3 if rank % 3 == 0 and whole else None)
    if ranks is None:
        return None
    for i, part in enumerate(rows):
        if any(bool(block.any()) for j, block in enumerate(torch.split(part, ranks, dim=1)) if j != i):
            return None
    return ranks


def _checked_ranks(noted: object, rank: int) -> list[int] | None:
    right = isinstance(noted, list) and len(noted) == 3 and all(isinstance(number, int) and number >= 0 for number in noted)
    return noted if right and sum(noted) == rank else None  # type: ignore[call-overload,return-value]


def _noted_blocks(adapter: Adapter) -> dict[str, Any]:
    """Return the ranks that an export noted, by module; what is torn counts as nothing, as B itself has the say."""
    try:
        noted = json.loads(adapter.notes.get(_BLOCKS, "{}"))
    except ValueError:
        return {}
    return noted if isinstance(noted, dict) else {}


def _stacked(parts: Sequence[Layer | None]) -> Layer | None:
    """Return B's rows below one another where q, k and v share A, rank and alpha; None where they do not."""
    given = [part for part in parts if part is not None]
    first = given[0]
    if len(given) < 3 or any(part.alpha != first.alpha or not torch.equal(part.a_RI, first.a_RI) for part in given):
        return None
    return replace(first, b_OR=torch.cat([part.b_OR for part in given]), magnitude_O=_magnitudes(given))


def _block_diagonal(parts: Sequence[Layer | None], attention: Attention, rslora: bool) -> Layer:
    """Return A one below another and B in blocks; other scalings than the first one's are folded into B."""
    given = [part for part in parts if part is not None]
    first, scaling = given[0], given[0].scaling(rslora)
    a_RI = torch.cat([part.a_RI for part in given])
    alike = _alike(parts, rslora)
    b_OR = torch.zeros(sum(attention.parts), a_RI.shape[0], dtype=first.b_OR.dtype if alike else torch.float32)
    row = column = 0
    for layer, num_rows in zip(parts, attention.parts, strict=True):
        if layer is not None:
            block = layer.b_OR if alike else layer.b_OR.float() * (layer.scaling(rslora) / scaling)
            b_OR[row : row + num_rows, column : column + layer.rank] = block
            column += layer.rank
        row += num_rows
    return Layer(a_RI, b_OR, first.alpha, _magnitudes(given)).with_scaling_of(first, rslora)


def _alike(parts: Sequence[Layer | None], rslora: bool) -> bool:
    """Whether all parts have one scaling."""
    scalings = [part.scaling(rslora) for part in parts if part is not None]
    return all(math.isclose(scaling, scalings[0], rel_tol=1e-12) for scaling in scalings)


def _magnitudes(parts: Sequence[Layer]) -> Tensor | None:
    found = [part.magnitude_O for part in parts if part.magnitude_O is not None]
    return torch.cat(found) if found else None


def _joined_saved(adapter: Adapter) -> dict[tuple[str, str], Tensor]:
    grouped: dict[tuple[str, str], dict[int | None, Tensor]] = {}
    for (name, kind), tensor in adapter.saved.items():
        module, part = _original(name)
        grouped.setdefault((module, kind), {})[part] = tensor
    saved = {}
    for (module, kind), parts in grouped.items():
        if None not in parts and len(parts) < 3:
            there = ", ".join(name for i, name in enumerate(_PARTS) if i in parts)
            raise _refused(adapter, f"{kind} of {module} saved for {there} alone")
        saved[module, kind] = parts[None] if None in parts else torch.cat([parts[i] for i in range(3)])
    return saved


def _require_all_for_dora(adapter: Adapter, module: str, parts: Sequence[Layer | None]) -> None:
    if adapter.dora and None in parts:
        there = ", ".join(name for name, part in zip(_PARTS, parts, strict=True) if part is not None)
        raise _refused(adapter, f"DoRA on {there} alone, of {module}")


def _refused(adapter: Adapter, got: str) -> UserError:
    return UserError(
        "the adapter cannot be written in the original layout, where q, k and v are one module",
        where=str(adapter.folder),
        got=got,
        expected="all three of q_proj, k_proj and v_proj",
        mend="write the merged model instead: tuneloom export --to merged",
    )


def _original(name: str) -> tuple[str, int | None]:
    found = original_module(name)
    if found is None:
        raise ValueError(f"{name} is no module of the native layout")
    return found


def _remarks(adapter: Adapter, blocks: Mapping[str, list[int]], rescaled: bool) -> list[str]:
    remarks = []
    if blocks:
        ranks = sorted({sum(ranks) for ranks in blocks.values()})
        shown = " or ".join(map(str, ranks))
        remarks.append(f"query_key_value has rank {shown}, that of q, k and v together: A one below another, B block-diagonal")
    if rescaled:
        remarks.append("q, k and v had different scalings; the differences are folded into B")
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if adapter.config[key]]
    if patterns:
        remarks.append(
            f"the ranks differ by module, which adapter_config.json says in {' and '.join(patterns)}: "
            "PEFT reads it; a reader that ignores it refuses the shapes or scales these modules wrongly"
        )
    return remarks
