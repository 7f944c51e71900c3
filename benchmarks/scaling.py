"""What several processes hold and send, by a base's shapes: the table of docs/scaling.md.

    python benchmarks/scaling.py [--ranks 8] [--rank-of-adapter 8] [--tokens 8192]

Nothing is trained and no weight is made. An adapter on all linear layers, 16-bit weights, every layer recomputed:

    whole on each    weights + 16 bytes a trained parameter (itself, gradient, two moments, fp32) + activations
    in parts         weights / ranks + the outermost unit and two layers, together while they are used + the same + activations
    sent a step      gradients, 4 bytes a trained parameter, 2 (ranks - 1) / ranks times (a ring)
    sent a pass      in parts: (ranks - 1) / ranks of all layers' weights twice, of the outermost unit's once
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tuneloom.config import AdapterConfig
from tuneloom.models.load import load_skeleton
from tuneloom.models.source import ModelSource
from tuneloom.train.memory import layers_of
from tuneloom.train.skeleton import reckon

GB = 1e9
LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": LLAMA
    | {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "ChatGLM3-6B": {
        "model_type": "glm",
        "architectures": ["GlmForCausalLM"],
        "vocab_size": 65024,
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "num_hidden_layers": 28,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "pad_token_id": 0,
    },
    "Llama-3.1-8B": LLAMA
    | {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "Qwen2.5-32B": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": 152064,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
    "Llama-3.1-70B": LLAMA
    | {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
"""As the models' own config.json files have them."""


@dataclass(frozen=True)
class Load:
    """Bytes of a training on some ranks.

    Attributes:
        weights: of the base.
        trained: of what is trained, with gradient and moments.
        activations: of a micro-batch, all layers recomputed.
        whole, parts: what a rank holds with the base whole on it, and in parts.
        step: sent by a rank in an optimizer step.
        gathered: received by a rank in a micro-batch, in parts.
    """

    weights: float
    trained: float
    activations: float
    whole: float
    parts: float
    step: float
    gathered: float


def load_of(folder: Path, num_ranks: int, r: int, num_tokens: int) -> Load:
    """Return the load of a folder's base by its config.json."""
    source = ModelSource(folder.name, folder, "folder")
    reckoned = reckon(source, AdapterConfig(r=r), torch.bfloat16)
    layers = layers_of(load_skeleton(folder))
    of_layers = 2.0 * sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    outermost = reckoned.weight_bytes - of_layers
    kept = reckoned.kept
    activations = num_tokens * (kept.of_input * kept.num_layers + kept.of_row / kept.num_layers)
    trained = 16.0 * reckoned.num_trained
    others = (num_ranks - 1) / num_ranks
    return Load(
        weights=reckoned.weight_bytes,
        trained=trained,
        activations=activations,
        whole=reckoned.weight_bytes + trained + activations,
        parts=reckoned.weight_bytes / num_ranks + outermost + 2 * of_layers / len(layers) + trained + activations,
        step=2 * others * 4 * reckoned.num_trained,
        gathered=others * (2 * of_layers + outermost),
    )


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rank-of-adapter", type=int, default=8, metavar="R")
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch")
    arguments = parser.parse_args()
    print("| base | weights | a rank, whole | a rank, in parts | sent a step | gathered a micro-batch, in parts |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        for name, shape in SHAPES.items():
            folder = Path(place) / name
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
            load = load_of(folder, arguments.ranks, arguments.rank_of_adapter, arguments.tokens)
            cells = (load.weights, load.whole, load.parts, load.step, load.gathered)
            print(f"| {name} | " + " | ".join(f"{cell / GB:,.2f} GB" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
