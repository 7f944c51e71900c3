"""The original config.json of ChatGLM2 and ChatGLM3: what it must say, and the native config that means the same."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneloom.errors import UserError, excerpt

if TYPE_CHECKING:
    from transformers import GlmConfig

MODEL_TYPE = "chatglm"
EOS_ID, PAD_ID = 2, 0

_SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "multi_query_group_num",
    "kv_channels",
    "padded_vocab_size",
    "seq_length",
)
_ROPE_THETA = 10_000.0
_GLM4_VOCABULARY = 151_552
_NATIVE_GLM4 = "use the native checkpoint, whose name ends in -hf: zai-org/glm-4-9b-chat-hf or zai-org/glm-4-9b-hf"

_MUST_BE = {
    "rmsnorm": (True, True),
    "post_layer_norm": (True, True),
    "original_rope": (True, True),
    "multi_query_attention": (True, False),
    "add_bias_linear": (False, False),
    "apply_residual_connection_post_layernorm": (False, False),
    "fp32_residual_connection": (False, False),
    "interleaved_qkv": (False, False),
    "tie_word_embeddings": (False, False),
}
"""Switches of the original code: what the native classes compute, and what an absent switch means there."""


@dataclass(frozen=True)
class Attention:
    """Sizes of the attention's projections.

    Attributes:
        query_rows: heads x head size.
        key_rows: groups x head size; the values have as many.
    """

    query_rows: int
    key_rows: int

    @property
    def parts(self) -> tuple[int, int, int]:
        """Rows of q, k and v in the fused weight, in this order."""
        return self.query_rows, self.key_rows, self.key_rows


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a ChatGLM in its original layout, of whatever generation."""
    return config.get("model_type") == MODEL_TYPE


def attention_of(config: Mapping[str, Any]) -> Attention:
    """Return the attention's sizes of a checked original config."""
    head = config["kv_channels"]
    return Attention(config["num_attention_heads"] * head, config["multi_query_group_num"] * head)


def check_original(config: Mapping[str, Any], file: Path) -> None:
    """Require a config that the native classes compute the same function for.

    Args:
        config: its content.
        file: where it is, for messages.

    Raises:
        UserError: another generation or family, quantised or P-tuned weights, a switch that is not as usual, a wrong size.
    """
    _refuse_others(config, file)
    for key in _SIZES:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(
                f"not the config of a ChatGLM2 or ChatGLM3: {key} is {'wrong' if key in config else 'missing'}",
                where=str(file),
                got=f"{key} {excerpt(value)}" if key in config else f"keys {excerpt(', '.join(sorted(config)))}",
                expected=f"{key}, a whole number above 0",
                mend="copy the model's own config.json again",
            )
    for key, positive in (("layernorm_epsilon", 1e-5), ("rope_ratio", 1)):
        value = config.get(key, positive)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise UserError(
                f"{key} is wrong",
                where=str(file),
                got=excerpt(value),
                expected="a number above 0",
                mend="copy config.json again",
            )
    for key, (needed, default) in _MUST_BE.items():
        if config.get(key, default) is not needed:
            raise UserError(
                "a ChatGLM of another shape than ChatGLM2 and ChatGLM3",
                where=str(file),
                got=f"{key} {json.dumps(config[key])[:80]}" if key in config else f"no {key}",
                expected=f"{key} {json.dumps(needed)}",
                mend="use the published ChatGLM2-6B or ChatGLM3-6B",
            )
    if config["num_attention_heads"] % config["multi_query_group_num"]:
        raise UserError(
            "the attention's groups do not divide its heads",
            where=str(file),
            got=f"num_attention_heads {config['num_attention_heads']}, multi_query_group_num {config['multi_query_group_num']}",
            mend="copy the model's own config.json again",
        )


def native_config(config: Mapping[str, Any]) -> GlmConfig:
    """Return the native config of a checked original one. Every field is set: Glm's defaults are those of GLM-4."""
    from transformers import GlmConfig

    dtype = str(config.get("torch_dtype") or config.get("dtype") or "float32").removeprefix("torch.")
    return GlmConfig(
        vocab_size=config["padded_vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["ffn_hidden_size"],
        num_hidden_layers=config["num_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["multi_query_group_num"],
        head_dim=config["kv_channels"],
        hidden_act="silu",
        attention_bias=bool(config.get("add_qkv_bias", False)),
        attention_dropout=float(config.get("attention_dropout", 0.0)),
        max_position_embeddings=config["seq_length"],
        rms_norm_eps=float(config.get("layernorm_epsilon", 1e-5)),
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        bos_token_id=None,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _ROPE_THETA * float(config.get("rope_ratio", 1)),
            "partial_rotary_factor": 0.5,
        },
        architectures=["GlmForCausalLM"],
        dtype=dtype,
    )


def _refuse_others(config: Mapping[str, Any], file: Path) -> None:
    """Refuse by name what says `chatglm` too and is something else."""
    got, mend = "", ""
    if config.get("position_encoding_2d") is not None or "inner_hidden_size" in config:
        what = "the first ChatGLM-6B is another architecture, which is not supported"
        got, mend = "position_encoding_2d, inner_hidden_size", "use ChatGLM3-6B (zai-org/chatglm3-6b)"
    elif config.get("quantization_bit"):
        what = "the checkpoint is quantised with cpm_kernels, which is not read"
        got = f"quantization_bit {excerpt(config['quantization_bit'])}"
        mend = "use the unquantised checkpoint; base_model.quantization: 4bit or 8bit quantises it while loading"
    elif config.get("pre_seq_len"):
        what = "the checkpoint is a P-tuning one, which is not supported"
        got, mend = f"pre_seq_len {excerpt(config['pre_seq_len'])}", "use the model that it was made from, and train a LoRA"
    elif config.get("padded_vocab_size") == _GLM4_VOCABULARY or isinstance(config.get("eos_token_id"), list):
        what = "GLM-4 in its original layout is not read"
        got = f"padded_vocab_size {config.get('padded_vocab_size')}, eos_token_id {excerpt(config.get('eos_token_id'))}"
        mend = _NATIVE_GLM4
    else:
        return
    raise UserError(what, where=str(file), got=got, mend=mend)
