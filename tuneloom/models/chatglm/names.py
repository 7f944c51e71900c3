"""Which native module a module of the original layout is, and back.

Rows of `query_key_value` are q, k and v one after another; everything else is as it is. Rotary
positions need no permutation: both sides turn neighbouring pairs of a head's first half.
"""

from __future__ import annotations

import re

_LAYER = re.compile(r"transformer\.encoder\.layers\.(\d+)\.(.+)")
_NATIVE_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")

_OUTSIDE = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.output_layer": "lm_head",
}
_INSIDE = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
_FUSED = "self_attention.query_key_value"
_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OUTSIDE_BACK = {native: original for original, native in _OUTSIDE.items()}
_INSIDE_BACK = {native: original for original, native in _INSIDE.items()}

DROPPED = frozenset({"transformer.rotary_pos_emb.inv_freq"})
"""Tensors of the original layout that are computed anew."""


def native_modules(module: str) -> tuple[str, ...]:
    """Return the native module, or for query_key_value the three; () for a name that the layout does not have."""
    if module in _OUTSIDE:
        return (_OUTSIDE[module],)
    match = _LAYER.fullmatch(module)
    if match is None:
        return ()
    layer, rest = match.groups()
    names = _PARTS if rest == _FUSED else (_INSIDE[rest],) if rest in _INSIDE else ()
    return tuple(f"model.layers.{layer}.{name}" for name in names)


def original_module(native: str) -> tuple[str, int | None] | None:
    """Return the original module of a native one, and which part of it (0 q, 1 k, 2 v); None for another name."""
    if native in _OUTSIDE_BACK:
        return _OUTSIDE_BACK[native], None
    match = _NATIVE_LAYER.fullmatch(native)
    if match is None:
        return None
    layer, rest = match.groups()
    stem = f"transformer.encoder.layers.{layer}."
    if rest in _PARTS:
        return stem + _FUSED, _PARTS.index(rest)
    return (stem + _INSIDE_BACK[rest], None) if rest in _INSIDE_BACK else None
