"""Adapters of ChatGLM, between the original layout's names and the native ones: the oracle's, and all that PEFT can say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from tuneloom.adapters.chatglm import Sizes, sizes_of
from tuneloom.models.chatglm.config import Attention, native_config
from tuneloom.models.chatglm.names import DROPPED, native_modules

DATA = Path(os.environ.get("TUNELOOM_TEST_DATA", ROOT.parent / "shared" / "data"))
ORACLE = DATA / "chatglm3-oracle"
RATIOS = ("rope-ratio-1", "rope-ratio-50")
WEIGHTS = "adapter_model.safetensors"
SIZES = Sizes(2, 32, 24, 40, Attention(32, 16))
ALL = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "word_embeddings")
NATIVE_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens")

needs_oracle = pytest.mark.skipif(not ORACLE.is_dir(), reason="the ChatGLM3 oracle is not beside the checkout")


# The oracle: an adapter that the original code wrote and ran.


def native_model(folder: Path) -> Any:
    """The oracle's base on native classes."""
    from transformers import GlmForCausalLM

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = GlmForCausalLM(native_config(config))
    parts = sizes_of(config, folder).attention.parts
    weights: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        for key, tensor in load_file(shard).items():
            if key in DROPPED:
                continue
            module, _, end = key.rpartition(".")
            names = native_modules(module)
            rows = [tensor] if len(names) == 1 else tensor.split(parts)
            weights |= {f"{name}.{end}": part for name, part in zip(names, rows, strict=True)}
    model.load_state_dict(weights, strict=True)
    return model.eval()


@pytest.fixture(scope="module", params=RATIOS)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder of the oracle, folder of its base on native classes)."""
    if not ORACLE.is_dir():
        pytest.skip("the ChatGLM3 oracle is not beside the checkout")
    native = tmp_path_factory.mktemp("oracle") / request.param
    native_model(ORACLE / request.param).save_pretrained(native)
    return ORACLE / request.param, native


def test_an_old_adapter_gives_the_logits_that_the_original_code_gave(oracle: tuple[Path, Path]) -> None:
    import tuneloom

    folder, base = oracle
    expected = load_file(folder / "expected.safetensors")
    model = tuneloom.load_model(base, adapter=folder / "adapter_query_key_value", dtype="fp32", device="cpu")
    with torch.inference_mode():
        logits = model(input_ids=expected["unpadded.input_ids"]).logits
        with model.disable_adapter():
            bare = model(input_ids=expected["unpadded.input_ids"]).logits
    difference = float((logits - expected["with_adapter.logits"]).abs().max())
    print("max difference", difference)
    assert difference <= 1e-5
    assert (logits - bare).abs().max() > 1e-2, "the adapter does something"
    assert torch.equal(bare, expected["unpadded.logits"])
