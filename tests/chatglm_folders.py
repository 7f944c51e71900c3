"""Tiny ChatGLM3 checkpoints in the original layout, and where the oracle's are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from chatglm import train_sentencepiece
from conftest import ROOT
from safetensors.torch import save_file

from tuneloom.models.chatglm.weights import expected_shapes

ORACLE = ROOT.parent / "shared" / "data" / "chatglm3-oracle"
ROPE_RATIOS = (1, 50)

CONFIG: dict[str, Any] = {
    "_name_or_path": "THUDM/chatglm3-6b",
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": "modeling_chatglm.ChatGLMModel"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": 176,
    "fp32_residual_connection": False,
    "hidden_size": 128,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 8,
    "num_layers": 2,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 512,
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""As chatglm3-6b's config.json, with small numbers; padded_vocab_size is added to fit the tokenizer."""

Layout = Literal["safetensors", "bin", "sharded safetensors", "sharded bin"]


def oracle(rope_ratio: int) -> Path:
    """Return an oracle's folder; skip where it is absent."""
    folder = ORACLE / f"rope-ratio-{rope_ratio}"
    if not folder.is_dir():
        pytest.skip(f"the ChatGLM3 oracle is not at {ORACLE}")
    return folder


def random_weights(config: Mapping[str, Any], *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return weights of the original layout: small normal numbers, norms near one, with the position tensor that is dropped."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = ((1 + 0.1 * noise) if "layernorm" in name else 0.05 * noise).to(dtype)
    head = config["kv_channels"] // 2
    weights["transformer.rotary_pos_emb.inv_freq"] = (1.0 / 10000 ** (torch.arange(0, head, 2) / head)).to(dtype)
    return weights


def write_weights(folder: Path, weights: Mapping[str, torch.Tensor], layout: Layout = "sharded safetensors") -> None:
    """Write weights as the hub has them: one file or three, safetensors or pickled."""
    pickled = "bin" in layout
    stem, suffix = ("pytorch_model", ".bin") if pickled else ("model", ".safetensors")
    names = list(weights)
    if not layout.startswith("sharded"):
        _write_shard(folder / f"{stem}{suffix}", weights)
        return
    files = {name: f"{stem}-{1 + 3 * i // len(names):05d}-of-00003{suffix}" for i, name in enumerate(names)}
    for file in sorted(set(files.values())):
        _write_shard(folder / file, {name: weights[name] for name in names if files[name] == file})
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": files}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")


def _write_shard(file: Path, weights: Mapping[str, torch.Tensor]) -> None:
    if file.suffix == ".bin":
        torch.save(dict(weights), file)
    else:
        save_file(dict(weights), file, metadata={"format": "pt"})


def make_chatglm_folder(
    folder: Path, *, layout: Layout = "sharded safetensors", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Write a random ChatGLM3 in the original layout with a tokenizer of its own, its code files and its licence.

    Args:
        folder: is made.
        layout: of the weights.
        seed: of the weights.
        dtype: of the weights.
        changes: to config.json; None takes a key out.
    """
    from sentencepiece import SentencePieceProcessor

    folder.mkdir(parents=True)
    pieces = SentencePieceProcessor(model_file=str(train_sentencepiece(folder))).get_piece_size()
    config = CONFIG | {"padded_vocab_size": -(-(pieces + 9) // 64) * 64, "torch_dtype": str(dtype).removeprefix("torch.")}
    write_weights(folder, random_weights(config, seed=seed, dtype=dtype), layout)
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in ("configuration_chatglm.py", "modeling_chatglm.py", "tokenization_chatglm.py"):
        (folder / name).write_text("raise SystemExit('this file was run')\n", encoding="utf-8")
    tokenizer = {
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "MODEL_LICENSE").write_text("The ChatGLM3-6B License\n", encoding="utf-8")
    return folder
