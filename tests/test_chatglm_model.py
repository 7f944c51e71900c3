"""ChatGLM in its original layout: the oracle's numbers on native classes, bounded memory, and refusals by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chatglm_folders import CONFIG, ROPE_RATIOS, Layout, make_chatglm_folder, oracle, random_weights, write_weights
from conftest import ROOT
from helpers import assert_mendable
from safetensors.torch import load_file
from torch.nn import functional as F

from tuneloom.errors import UserError
from tuneloom.models.chatglm.config import attention_of, native_config
from tuneloom.models.chatglm.names import native_modules, original_module
from tuneloom.models.chatglm.weights import expected_shapes
from tuneloom.models.fingerprint import fingerprint
from tuneloom.models.load import load_base_model
from tuneloom.models.source import resolve_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=ROPE_RATIOS, ids=[f"rope_ratio {ratio}" for ratio in ROPE_RATIOS])
def oracle_folder(request: pytest.FixtureRequest) -> Path:
    return oracle(request.param)


@pytest.fixture(scope="module")
def model(oracle_folder: Path) -> Any:
    return load_base_model(resolve_model(str(oracle_folder)).folder, torch.float32, CPU)


@pytest.fixture(scope="module")
def expected(oracle_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(oracle_folder / "expected.safetensors")


# The oracle's numbers.


def test_logits_are_the_original_code_s(model: Any, expected: dict[str, torch.Tensor]) -> None:
    logits = model(input_ids=expected["unpadded.input_ids"]).logits
    assert torch.allclose(logits, expected["unpadded.logits"], atol=1e-5)


def test_logits_behind_left_padding_are_the_original_code_s(model: Any, expected: dict[str, torch.Tensor]) -> None:
    real = expected["left_padded.attention_mask"].bool()
    assert not real.all()
    logits = model(
        input_ids=expected["left_padded.input_ids"],
        attention_mask=expected["left_padded.attention_mask"],
        position_ids=expected["left_padded.position_ids"],
    ).logits
    assert torch.allclose(logits[real], expected["left_padded.logits"][real], atol=1e-5)


def test_loss_and_gradient_are_the_original_code_s(oracle_folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """The gradients of q, k and v, stacked, are the fused weight's."""
    model = load_base_model(oracle_folder, torch.float32, CPU)
    attention = model.model.layers[0].self_attn
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    for weight in weights:
        weight.requires_grad_(True)
    labels = expected["labels"]
    logits = model(input_ids=expected["unpadded.input_ids"]).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert float(loss.detach()) == pytest.approx(float(expected["loss"]), abs=1e-6)
    fused = expected["grad.layers.0.query_key_value.weight"]
    stacked = torch.cat(torch.autograd.grad(loss, weights))
    assert float((stacked - fused).abs().max()) < 1e-5 * float(fused.abs().max()) + 1e-7


def test_greedy_answers_are_the_original_code_s(model: Any, expected: dict[str, torch.Tensor]) -> None:
    prompt, output = expected["greedy.prompt"], expected["greedy.output"]
    for use_cache in (True, False):
        written = model.generate(
            prompt, max_new_tokens=output.shape[1] - prompt.shape[1], do_sample=False, eos_token_id=None, use_cache=use_cache
        )
        assert torch.equal(written, output)


# Layouts, names, numbers.


@pytest.mark.parametrize("layout", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
def test_every_way_of_storing_gives_the_same_model(layout: Layout, chatglm: Path, tmp_path: Path) -> None:
    other = make_chatglm_folder(tmp_path / "other", layout=layout)
    (a, b) = (load_base_model(folder, torch.float32, CPU).state_dict() for folder in (chatglm, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert fingerprint(chatglm) == fingerprint(other)
    assert not any(weight.requires_grad for weight in load_base_model(other, torch.float32, CPU).parameters())


def test_q_k_and_v_are_rows_of_the_fused_weight_in_this_order(chatglm: Path) -> None:
    loaded = load_base_model(chatglm, torch.float32, CPU)
    config = json.loads((chatglm / "config.json").read_text())
    original = random_weights(config)
    sizes = attention_of(config).parts
    assert sizes == (128, 32, 32)
    for kind in ("weight", "bias"):
        fused = original[f"transformer.encoder.layers.1.self_attention.query_key_value.{kind}"]
        attention = loaded.model.layers[1].self_attn
        for part, module in zip(fused.split(sizes), (attention.q_proj, attention.k_proj, attention.v_proj), strict=True):
            assert torch.equal(getattr(module, kind), part)


def test_names_go_both_ways_and_cover_the_model() -> None:
    config = CONFIG | {"padded_vocab_size": 64}
    there = {name.rpartition(".")[0] for name in expected_shapes(config)}
    natives = {native: module for module in there for native in native_modules(module)}
    with torch.device("meta"):
        from transformers import GlmForCausalLM

        built = {name.rpartition(".")[0] for name, _ in GlmForCausalLM(native_config(config)).named_parameters()}
    assert natives.keys() == built
    for native, module in natives.items():
        back = original_module(native)
        assert back is not None
        assert back[0] == module
        assert (native_modules(module)[back[1] or 0]) == native
    assert native_modules("transformer.encoder.layers.0.mlp.gate") == ()
    assert original_module("model.layers.0.mlp.gate") is None


def test_the_published_numbers_of_chatglm3_6b() -> None:
    """200 tensors with the position tensor, 6,243,584,000 parameters."""
    sizes = {"num_layers": 28, "hidden_size": 4096, "ffn_hidden_size": 13696, "num_attention_heads": 32}
    full = CONFIG | sizes | {"kv_channels": 128, "padded_vocab_size": 65024, "seq_length": 8192}
    shapes = expected_shapes(full)
    assert len(shapes) + 1 == 200
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 6_243_584_000
    native = native_config(full | {"rope_ratio": 50})
    assert native.rope_parameters["rope_theta"] == 500_000
    assert native.rope_parameters["partial_rotary_factor"] == 0.5
    assert (native.rms_norm_eps, native.eos_token_id, native.pad_token_id) == (1e-5, 2, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, chatglm: Path) -> None:
    loaded = load_base_model(chatglm, dtype, CPU)
    assert {weight.dtype for weight in loaded.parameters()} == {dtype}
    exact = load_base_model(chatglm, torch.float32, CPU).state_dict()
    assert all(torch.equal(weight, exact[name].to(dtype)) for name, weight in loaded.state_dict().items())


def test_a_folder_in_the_native_layout_has_the_same_fingerprint_and_answers(chatglm: Path, tmp_path: Path) -> None:
    loaded = load_base_model(chatglm, torch.float32, CPU)
    loaded.save_pretrained(tmp_path / "native")
    assert fingerprint(tmp_path / "native") == fingerprint(chatglm)
    again = load_base_model(resolve_model(str(tmp_path / "native")).folder, torch.float32, CPU)
    ids = torch.arange(5, 45)[None]
    assert torch.equal(again(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_a_native_glm_folder_is_told_apart(tmp_path: Path) -> None:
    from transformers import GlmConfig, GlmForCausalLM

    config = GlmConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        head_dim=8,
        num_key_value_heads=2,
        eos_token_id=[1, 2],
        pad_token_id=0,
    )
    GlmForCausalLM(config).save_pretrained(tmp_path / "glm4")
    loaded = load_base_model(resolve_model(str(tmp_path / "glm4")).folder, torch.float32, CPU)
    assert type(loaded).__name__ == "GlmForCausalLM"
    assert loaded.config.rope_parameters["partial_rotary_factor"] == 0.5


# Memory.

_PEAK = """
import resource, sys, torch
from pathlib import Path
from tuneloom.models.load import load_base_model
load_base_model(Path(sys.argv[1]), torch.bfloat16, torch.device("cpu"))  # imports and pools are no weights
def high(): return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10
def now(): return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) << 10
for folder in sys.argv[2:]:
    open("/proc/self/clear_refs", "w").write("5")
    before = now()
    model = load_base_model(Path(folder), torch.bfloat16, torch.device("cpu"))
    print(high() - before, sum(w.nbytes for w in model.parameters()))
    del model
"""
LAYOUTS: tuple[Layout, ...] = ("sharded safetensors", "sharded bin")


@pytest.fixture(scope="module")
def memory(chatglm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """The most memory that loading a folder of each layout takes, and what its weights take."""
    big = {"hidden_size": 1024, "ffn_hidden_size": 2048, "num_layers": 16, "kv_channels": 128}
    config = json.loads((chatglm / "config.json").read_text()) | big
    weights = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in expected_shapes(config).items()}
    folders = []
    for layout in LAYOUTS:
        folders.append(tmp_path_factory.mktemp("big") / "model")
        shutil.copytree(chatglm, folders[-1], ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
        (folders[-1] / "config.json").write_text(json.dumps(config))
        write_weights(folders[-1], weights, layout)
    command = [sys.executable, "-c", _PEAK, str(chatglm), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    for folder in folders:
        shutil.rmtree(folder)
    pairs = (tuple(map(int, line.split())) for line in done.stdout.splitlines())
    return {layout: (peak, size) for layout, (peak, size) in zip(LAYOUTS, pairs, strict=True)}


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own account of memory")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_at_its_highest_is_near_the_weights(layout: Layout, memory: dict[str, tuple[int, int]]) -> None:
    peak, size = memory[layout]
    assert size > 250_000_000
    assert peak <= 1.15 * size, f"{peak / size:.2f} x the weights"


# Refusals.


def change(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return edit


def rewrite(**tensors: torch.Tensor | None) -> Callable[[Path], None]:
    """Store other weights; `__` in a name stands for a dot."""

    def edit(folder: Path) -> None:
        weights = random_weights(json.loads((folder / "config.json").read_text()))
        for name, tensor in tensors.items():
            weights.pop(name.replace("__", "."), None)
            if tensor is not None:
                weights[name.replace("__", ".")] = tensor
        for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
            file.unlink()
        write_weights(folder, weights)

    return edit


def torn(name: str, keep: int | None) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / name
        content = file.read_bytes()
        file.unlink()
        if keep is not None:
            file.write_bytes(content[:keep])

    return edit


def as_bin(content: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
            file.unlink()
        if isinstance(content, bytes):
            (folder / "pytorch_model.bin").write_bytes(content)
        else:
            torch.save(content, folder / "pytorch_model.bin")

    return edit


class Code:
    """Runs a command when it is unpickled by an unsafe reader."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('unpickled')",))


SHARD = "model-00002-of-00003.safetensors"
EMBEDDING = "transformer__embedding__word_embeddings__weight"
DENSE = "transformer.encoder.layers.0.self_attention.dense.weight"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "int4 by cpm_kernels": (change(quantization_bit=4), "quantised with cpm_kernels"),
    "int8 by cpm_kernels": (change(quantization_bit=8), "quantization_bit 8"),
    "P-tuning": (change(pre_seq_len=128), "P-tuning"),
    "the first ChatGLM-6B": (change(position_encoding_2d=True, inner_hidden_size=16384), "the first ChatGLM-6B"),
    "GLM-4-9B": (change(padded_vocab_size=151552, num_layers=40), "zai-org/glm-4-9b-chat-hf"),
    "GLM-4 by its eos": (change(eos_token_id=[151329, 151336, 151338]), "-hf"),
    "another norm": (change(rmsnorm=False), "rmsnorm false"),
    "biases everywhere": (change(add_bias_linear=True), "add_bias_linear true"),
    "no last norm": (change(post_layer_norm=False), "post_layer_norm false"),
    "residual after the norm": (change(apply_residual_connection_post_layernorm=True), "post_layernorm true"),
    "residual in fp32": (change(fp32_residual_connection=True), "fp32_residual_connection true"),
    "another rope": (change(original_rope=False), "original_rope false"),
    "a head for each": (change(multi_query_attention=False), "multi_query_attention false"),
    "no word on groups": (change(multi_query_attention=None), "no multi_query_attention"),
    "tied": (change(tie_word_embeddings=True), "tie_word_embeddings true"),
    "another family's fields": (
        change(num_layers=None, ffn_hidden_size=None, num_hidden_layers=2, intermediate_size=176),
        "num_layers is missing",
    ),
    "a size as text": (change(hidden_size="128"), "hidden_size is wrong"),
    "a size of nothing": (change(kv_channels=0), "kv_channels is wrong"),
    "a rope ratio that is none": (change(rope_ratio=-1), "rope_ratio is wrong"),
    "groups that do not divide": (change(multi_query_group_num=3), "do not divide"),
    "a shard missing": (torn(SHARD, None), f"no {SHARD}"),
    "a shard cut off": (torn(SHARD, 3000), "torn"),
    "a shard empty": (torn(SHARD, 0), "torn"),
    "an index that is none": (torn("model.safetensors.index.json", 10), "index of the weight files is torn"),
    "no index": (torn("model.safetensors.index.json", None), "no index"),
    "a tensor missing": (rewrite(**{EMBEDDING: None}), "lack a tensor"),
    "a tensor left over": (rewrite(transformer__extra__weight=torch.zeros(3)), "transformer.extra.weight"),
    "a prefix encoder left over": (
        rewrite(transformer__prefix_encoder__embedding__weight=torch.zeros(3)),
        "this is a P-tuning checkpoint",
    ),
    "a tensor of another shape": (rewrite(**{EMBEDDING: torch.zeros(7, 128)}), "[7, 128]"),
    "int8 weights": (
        rewrite(**{DENSE.replace(".", "__"): torch.zeros(128, 64, dtype=torch.int8)}),
        "the weights are quantised",
    ),
    "a .bin that runs code": (as_bin({"x": Code()}), "never read"),
    "a .bin of something else": (as_bin([1, 2]), "something else than tensors"),
    "a .bin of text": (as_bin({"x": "y"}), "something else than tensors"),
    "a .bin that is none": (as_bin(b"not a pickle at all"), "torn"),
    "a .bin that is empty": (as_bin(b""), "torn"),
    "a git-lfs pointer": (as_bin(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "torn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_chatglm_is_refused_by_name(case: str, chatglm: Path, tmp_path: Path) -> None:
    edit, message = REFUSED[case]
    folder = shutil.copytree(chatglm, tmp_path / "model")
    edit(folder)
    with pytest.raises(UserError) as caught:
        resolve_model(str(folder))
    text = str(caught.value)
    assert message in text
    assert_mendable(caught.value)


def test_an_index_cannot_lead_out_of_the_folder(chatglm: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chatglm, tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(UserError, match="index of the weight files is torn"):
        resolve_model(str(folder))
