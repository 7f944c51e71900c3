"""Adapters of ChatGLM, between the original layout's names and the native ones: the oracle's, and all that PEFT can say."""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, make_tokenizer
from helpers import assert_mendable, logits_of, plain_base, sha256, tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from tuneloom import api
from tuneloom.adapters.attach import attach_adapter
from tuneloom.adapters.chatglm import Sizes, sizes_of, to_native, to_original
from tuneloom.adapters.lora import Adapter, Modules, read_adapter, same_tensors, write_adapter
from tuneloom.adapters.store import save_adapter
from tuneloom.adapters.target import resolve_target
from tuneloom.cli.main import app
from tuneloom.config import AdapterConfig
from tuneloom.errors import GuardError, UserError
from tuneloom.exporting import adapter as adapter_export
from tuneloom.models.chatglm.config import Attention, native_config
from tuneloom.models.chatglm.names import DROPPED, native_modules
from tuneloom.models.source import resolve_model
from tuneloom.train.run import finetune

DATA = Path(os.environ.get("TUNELOOM_TEST_DATA", ROOT.parent / "shared" / "data"))
ORACLE = DATA / "chatglm3-oracle"
RATIOS = ("rope-ratio-1", "rope-ratio-50")
IDS = [1, 40, 77, 300, 512, 9, 1033, 2, 64]
WEIGHTS = "adapter_model.safetensors"
SIZES = Sizes(2, 32, 24, 40, Attention(32, 16))
ALL = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "word_embeddings")
NATIVE_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens")


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
    folder, base = oracle
    expected = load_file(folder / "expected.safetensors")
    model = api.load_model(base, adapter=folder / "adapter_query_key_value", dtype="fp32", device="cpu")
    with torch.inference_mode():
        logits = model(input_ids=expected["unpadded.input_ids"]).logits
        with model.disable_adapter():
            bare = model(input_ids=expected["unpadded.input_ids"]).logits
    difference = float((logits - expected["with_adapter.logits"]).abs().max())
    assert difference <= 1e-4
    assert (logits - bare).abs().max() > 1e-2, "the adapter does something"
    torch.testing.assert_close(bare, expected["unpadded.logits"], rtol=0, atol=1e-4)


# Real PEFT on real modules: what it computes on the fused layout and on the separate one.


def tree(modules: Modules, weights: Mapping[str, Any]) -> nn.Module:
    """Modules at their paths, with weights."""
    root = nn.Module()
    for path, size in modules.sizes.items():
        *parents, name = path.split(".")
        node = root
        for parent in parents:
            if not hasattr(node, parent):
                node.add_module(parent, nn.Module())
            node = getattr(node, parent)
        if len(size) == 1:
            module: nn.Module = nn.RMSNorm(size[0])
        elif path == modules.embedding:
            module = nn.Embedding(*size)
        else:
            module = nn.Linear(size[1], size[0], bias=f"{path}.bias" in weights)
        module.load_state_dict({key: weights[f"{path}.{key}"] for key in module.state_dict()})
        node.add_module(name, module)
    return root.eval()


def bases() -> tuple[nn.Module, nn.Module]:
    """The same random weights as modules of the original layout and of the native one."""
    generator = torch.Generator().manual_seed(1)
    original = {f"{path}.weight": torch.randn(size, generator=generator) for path, size in SIZES.original().sizes.items()}
    fused = [path for path in SIZES.original().sizes if path.endswith("query_key_value")]
    original |= {f"{path}.bias": torch.randn(sum(SIZES.attention.parts), generator=generator) for path in fused}
    native: dict[str, torch.Tensor] = {}
    for key, tensor in original.items():
        module, _, end = key.rpartition(".")
        names = native_modules(module)
        rows = [tensor] if len(names) == 1 else tensor.split(SIZES.attention.parts)
        native |= {f"{name}.{end}": part for name, part in zip(names, rows, strict=True)}
    return tree(SIZES.original(), original), tree(SIZES.native(), native)


def peft_adapter(base: nn.Module, folder: Path, seed: int = 5, **settings: Any) -> nn.Module:
    """Put an adapter on modules with PEFT itself, move it away from its start, and save it as PEFT does."""
    generator = torch.Generator().manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**{"r": 4, "lora_alpha": 12, **settings}))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += noise * (0.3 if "magnitude" in name or "lora" not in name else 0.2)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return model.eval()


def outputs(model: nn.Module, modules: Modules) -> dict[str, torch.Tensor]:
    """What each module answers to a fixed input, by native name."""
    found: dict[str, torch.Tensor] = {}
    inputs: dict[int, torch.Tensor] = {}
    for path, size in modules.sizes.items():
        width = size[-1]
        if width not in inputs:
            inputs[width] = torch.randn(5, width, generator=torch.Generator().manual_seed(width))
        x = torch.arange(0, 40, 3) if path == modules.embedding else inputs[width]
        with torch.inference_mode():
            y = model.get_submodule(f"base_model.model.{path}")(x)
        names = native_modules(path)
        rows = [y] if len(names) < 2 else y.split(SIZES.attention.parts, dim=-1)
        found |= dict(zip(names or (path,), rows, strict=True))
    return found


def loaded(base: nn.Module, folder: Path) -> nn.Module:
    """Load an adapter with PEFT, which must find every tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()  # type: ignore[arg-type]


def assert_same_function(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, expected in left.items():
        torch.testing.assert_close(right[name], expected, rtol=2e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def written(adapter: Adapter, folder: Path, modules: Modules) -> Path:
    folder.mkdir()
    write_adapter(adapter, folder, modules)
    return folder


@pytest.fixture(scope="module")
def both() -> tuple[nn.Module, nn.Module]:
    return bases()


NATIVE_CASES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": list(NATIVE_ALL)},
    "rslora": {"target_modules": list(NATIVE_ALL), "use_rslora": True},
    "dora": {"target_modules": list(NATIVE_ALL), "use_dora": True},
    "rslora and dora": {"target_modules": list(NATIVE_ALL), "use_rslora": True, "use_dora": True},
    "q, k, v alone": {"target_modules": ["q_proj", "k_proj", "v_proj"]},
    "q and v": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "k, rslora": {"target_modules": ["k_proj"], "use_rslora": True},
    "one layer by path": {"target_modules": ["model.layers.1.self_attn.v_proj", "lm_head"]},
    "an expression": {"target_modules": r".*\.layers\.0\.(self_attn\.[qkv]_proj|mlp\.down_proj)"},
    "chosen layers": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
    "excluded": {"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "rank patterns": {
        "target_modules": list(NATIVE_ALL),
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.k_proj": 6, "embed_tokens": 3},
        "alpha_pattern": {"q_proj": 6, "layers.1.self_attn.k_proj": 18, "down_proj": 5},
    },
    "saved modules and biases": {
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "modules_to_save": ["model.norm", "lm_head"],
    },
    "biases": {"target_modules": ["q_proj", "k_proj", "v_proj"], "bias": "all"},
}

ORIGINAL_CASES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": list(ALL)},
    "rslora": {"target_modules": ["query_key_value"], "use_rslora": True},
    "dora": {"target_modules": list(ALL), "use_dora": True},
    "rslora and dora": {"target_modules": ["query_key_value", "dense"], "use_rslora": True, "use_dora": True},
    "patterns": {
        "target_modules": list(ALL),
        "rank_pattern": {"layers.1.self_attention.query_key_value": 9, "dense": 2},
        "alpha_pattern": {"query_key_value": 5, "word_embeddings": 7},
    },
    "chosen layers": {"target_modules": ["query_key_value"], "layers_to_transform": [1]},
    "by path, and the head": {"target_modules": ["layers.1.self_attention.query_key_value", "output_layer"]},
    "saved modules": {"target_modules": ["query_key_value"], "modules_to_save": ["final_layernorm", "output_layer"]},
    "biases": {"target_modules": ["query_key_value"], "bias": "all"},
}


@pytest.mark.parametrize("case", NATIVE_CASES)
def test_a_native_adapter_computes_the_same_in_the_original_layout_and_comes_back_bit_for_bit(
    case: str, both: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    fused, separate = both
    made = peft_adapter(separate, tmp_path / "native", **NATIVE_CASES[case])
    adapter = read_adapter(tmp_path / "native", SIZES.native())
    original, _ = to_original(adapter, SIZES)
    folder = written(original, tmp_path / "original", SIZES.original())
    expected = outputs(made, SIZES.native())
    assert_same_function(expected, outputs(loaded(fused, folder), SIZES.original()))

    again = to_native(read_adapter(folder, SIZES.original()), SIZES)
    back = written(again, tmp_path / "back", SIZES.native())
    before, after = load_file(tmp_path / "native" / WEIGHTS), load_file(back / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    for module, layer in adapter.layers.items():
        assert again.layers[module].alpha == layer.alpha
    assert_same_function(expected, outputs(loaded(separate, back), SIZES.native()))


@pytest.mark.parametrize("case", ORIGINAL_CASES)
def test_an_original_adapter_computes_the_same_under_native_names_and_goes_back_bit_for_bit(
    case: str, both: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    fused, separate = both
    made = peft_adapter(fused, tmp_path / "original", **ORIGINAL_CASES[case])
    native = to_native(read_adapter(tmp_path / "original", SIZES.original()), SIZES)
    folder = written(native, tmp_path / "native", SIZES.native())
    assert_same_function(outputs(made, SIZES.original()), outputs(loaded(separate, folder), SIZES.native()))

    again, notes = to_original(read_adapter(folder, SIZES.native()), SIZES)
    back = written(again, tmp_path / "back", SIZES.original())
    before, after = load_file(tmp_path / "original" / WEIGHTS), load_file(back / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert not any("block-diagonal" in note for note in notes), "A is shared, so the rank stays"


def test_scalings_that_differ_are_folded_into_b(both: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    fused, separate = both
    settings = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 7}}
    made = peft_adapter(separate, tmp_path / "native", **settings)
    original, notes = to_original(read_adapter(tmp_path / "native", SIZES.native()), SIZES)
    folder = written(original, tmp_path / "original", SIZES.original())
    assert any("folded into B" in note for note in notes)
    expected = outputs(made, SIZES.native())
    assert_same_function(expected, outputs(loaded(fused, folder), SIZES.original()))
    back = written(to_native(read_adapter(folder, SIZES.original()), SIZES), tmp_path / "back", SIZES.native())
    assert_same_function(expected, outputs(loaded(separate, back), SIZES.native()))


def test_what_is_written_says_rank_and_alpha_where_readers_look(both: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    """Attention alone needs no patterns; with other modules, they hold query_key_value's own rank and alpha."""
    _, separate = both
    peft_adapter(separate, tmp_path / "attention", target_modules=["q_proj", "k_proj", "v_proj"])
    original, notes = to_original(read_adapter(tmp_path / "attention", SIZES.native()), SIZES)
    config = original.config
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (12, 36, {}, {})
    assert config["target_modules"] == ["query_key_value"]
    assert len(notes) == 1
    assert "rank 12" in notes[0]

    peft_adapter(separate, tmp_path / "all", target_modules=list(NATIVE_ALL), use_rslora=True)
    original, notes = to_original(read_adapter(tmp_path / "all", SIZES.native()), SIZES)
    config = original.config
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 12, {"query_key_value": 12})
    assert config["alpha_pattern"] == {"query_key_value": pytest.approx(12 * 3**0.5)}
    assert config["target_modules"] == sorted(ALL)
    assert any("ignores it" in note for note in notes)


def test_blocks_are_recovered_without_our_note_too_and_never_against_the_numbers(
    both: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    _, separate = both
    peft_adapter(separate, tmp_path / "native", target_modules=["q_proj", "k_proj", "v_proj"])
    adapter = read_adapter(tmp_path / "native", SIZES.native())
    folder = written(to_original(adapter, SIZES)[0], tmp_path / "original", SIZES.original())
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})  # as another tool saves it
    again = to_native(read_adapter(folder, SIZES.original()), SIZES)
    assert all(same_tensors(layer, again.layers[module]) for module, layer in adapter.layers.items())

    noted = {"format": "pt", "tuneloom_blocks": json.dumps({module: [12, 0, 0] for module in SIZES.original().sizes})}
    save_file(tensors, folder / WEIGHTS, metadata=noted)
    wrong = to_native(read_adapter(folder, SIZES.original()), SIZES)
    assert {layer.rank for layer in wrong.layers.values()} == {12}, "split whole, as the note is not true"


def test_an_untrained_adapter_comes_back_with_its_own_ranks(both: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    _, separate = both
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    get_peft_model(copy.deepcopy(separate), config).save_pretrained(str(tmp_path / "native"))  # type: ignore[arg-type]
    adapter = read_adapter(tmp_path / "native", SIZES.native())
    folder = written(to_original(adapter, SIZES)[0], tmp_path / "original", SIZES.original())
    again = to_native(read_adapter(folder, SIZES.original()), SIZES)
    assert again.layers.keys() == adapter.layers.keys()
    assert all(same_tensors(layer, again.layers[module]) for module, layer in adapter.layers.items())


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_magnitudes_are_read_with_either_key(suffix: str, both: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    fused, _ = both
    peft_adapter(fused, tmp_path / "original", target_modules=["query_key_value"], use_dora=True)
    file = tmp_path / "original" / WEIGHTS
    tensors = {key + suffix if key.endswith("vector") else key: tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file)
    native = to_native(read_adapter(tmp_path / "original", SIZES.original()), SIZES)
    magnitudes = [layer.magnitude_O for layer in native.layers.values()]
    assert [tuple(m.shape) for m in magnitudes if m is not None] == [(32,), (16,), (16,)] * 2


def test_dora_on_some_of_q_k_v_is_refused_with_what_to_do(both: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    _, separate = both
    peft_adapter(separate, tmp_path / "native", target_modules=["q_proj", "v_proj"], use_dora=True)
    with pytest.raises(UserError, match="q, k and v are one module") as caught:
        to_original(read_adapter(tmp_path / "native", SIZES.native()), SIZES)
    assert_mendable(caught.value)
    assert "--to merged" in str(caught.value)


def test_sizes_are_the_same_from_either_config() -> None:
    original = {
        "model_type": "chatglm",
        **{"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 24, "num_attention_heads": 4, "kv_channels": 8},
        **{"multi_query_group_num": 2, "padded_vocab_size": 40, "seq_length": 64, "multi_query_attention": True},
    }
    assert sizes_of(original, Path("config.json")) == SIZES
    assert sizes_of(native_config(original).to_dict(), Path("config.json")) == SIZES
    assert sizes_of({"model_type": "llama"}, Path("config.json")) is None


# Where adapters are found: chat, the API, continued training, export.


@pytest.fixture(scope="module")
def glm_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random native Glm, as small as the others, with a tokenizer."""
    from transformers import GlmConfig, GlmForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = GlmConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512},
        **{"attention_bias": True, "tie_word_embeddings": False, "bos_token_id": None},
        **{"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
    )
    folder = tmp_path_factory.mktemp("models") / "glm"
    GlmForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def glm_run(glm_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on the seven kinds of layer, with DoRA."""
    changes = {"adapter.target_modules": list(NATIVE_ALL), "adapter.use_dora": True}
    return finetune(tiny_config(glm_base, rows_file, tmp_path_factory.mktemp("runs"), changes)).directory.path


@pytest.fixture(scope="module")
def exported(glm_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run's adapter in the original layout, as the verb writes it."""
    out = tmp_path_factory.mktemp("exports") / "original"
    result = CliRunner().invoke(app, ["export", str(glm_run), "--to", "adapter", "--layout", "original", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "checked   13 layers read back, the same bits" in result.output
    assert "note      query_key_value has rank 24" in result.output
    return out


def logits(target: str | Path, **settings: Any) -> torch.Tensor:
    model = api.load_model(target, dtype="fp32", device="cpu", **settings)
    return logits_of(model, IDS)


def old_one(exported: Path, folder: Path) -> Path:
    """The adapter as somebody else's tool left it: the two files, a base that is nowhere, a tokenizer with code of its own."""
    folder.mkdir()
    for name in ("adapter_config.json", WEIGHTS):
        shutil.copyfile(exported / name, folder / name)
    change(folder, {"base_model_name_or_path": "THUDM/chatglm3-6b"}, {})
    remote = {"tokenizer_class": "ChatGLMTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_chatglm.T", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(remote), encoding="utf-8")
    return folder


def test_an_export_in_the_original_layout_is_used_as_the_run_is(exported: Path, glm_run: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    assert {"adapter_config.json", WEIGHTS, "base_model.json", "README.md", "tokenizer.json", "export.json"} <= names
    assert not {"manifest.json", "optimizer.safetensors"} & names
    assert all(".transformer." in key for key in load_file(exported / WEIGHTS))
    report = json.loads((exported / "export.json").read_text(encoding="utf-8"))
    assert report["layout"] == "original"
    assert report["check"] == {"passed": True, "layers": 13, "max_difference": 0.0}
    assert any("rank_pattern" in note for note in report["notes"])

    tuned = logits(glm_run)
    assert torch.equal(logits(exported), tuned)
    target = resolve_target(str(exported))
    assert target.own_folder == target.tokenizer_folder == exported
    assert target.adapter is not None
    assert target.adapter.parent.name == "adapters"
    before = target.adapter.stat().st_mtime_ns
    assert resolve_target(str(exported)).adapter == target.adapter
    assert target.adapter.stat().st_mtime_ns == before, "converted once"


def test_an_old_adapter_goes_on_the_base_that_is_named(
    exported: Path, glm_base: Path, glm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tuned = old_one(exported, tmp_path / "old"), logits(glm_run)
    with pytest.raises(UserError, match="model not found") as caught:
        resolve_target(str(folder))
    assert_mendable(caught.value)
    assert "--base-model PATH" in str(caught.value.mend)
    assert str(folder) in str(caught.value.where)
    assert torch.equal(logits(glm_base, adapter=folder), tuned)

    asked = ["chat", str(folder), "--base-model", str(glm_base), "--prompt", "Hi", "--max-new-tokens", "3"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert f"with {folder} ..." in result.output
    expected = CliRunner().invoke(app, ["chat", str(glm_run), "--prompt", "Hi", "--max-new-tokens", "3"])
    assert result.stdout.splitlines()[-1] == expected.stdout.splitlines()[-1]

    result = CliRunner().invoke(app, ["chat", str(glm_base), "--base-model", str(glm_base), "--prompt", "Hi"])
    assert isinstance(result.exception, UserError)
    assert_mendable(result.exception)


def test_evaluation_takes_an_old_adapter(
    exported: Path, glm_base: Path, glm_run: Path, rows_file: Path, tmp_path: Path
) -> None:
    folder = old_one(exported, tmp_path / "old")
    evaluated = api.evaluate(folder, rows_file, base_model=glm_base, dtype="fp32", device="cpu")
    assert evaluated.loss == pytest.approx(api.evaluate(glm_run, rows_file, dtype="fp32", device="cpu").loss, abs=1e-6)


def test_training_continues_from_an_old_adapter_as_from_the_native_one(
    exported: Path, glm_base: Path, glm_run: Path, rows_file: Path, tmp_path: Path
) -> None:
    folder = old_one(exported, tmp_path / "old")

    def continued(start: Path, name: str) -> Any:
        changes = {"adapter.continue_from": str(start), "training.max_steps": 2, "name": name}
        return finetune(tiny_config(glm_base, rows_file, tmp_path / "runs", changes)).directory

    old, native = continued(folder, "old"), continued(glm_run / "adapter", "native")
    assert sha256(old.adapter / WEIGHTS) == sha256(native.adapter / WEIGHTS)
    noted = json.loads((old.path / "environment.json").read_text(encoding="utf-8"))["continued_from"]
    assert noted == {"path": str(folder), "sha256": sha256(folder / WEIGHTS)}


def test_an_original_adapter_of_another_base_is_told_so_by_its_own_folder(
    exported: Path, glm_base: Path, tiny_model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    model = plain_base(glm_base)
    model.model.norm.weight.data[0] += 1
    model.save_pretrained(other)
    for base, what in ((other, "fingerprint"), (tiny_model, "no such module")):
        with pytest.raises(UserError, match="belongs to another base model") as caught:
            api.load_model(base, adapter=exported, device="cpu")
        assert_mendable(caught.value)
        assert what in str(caught.value.got)
        assert str(exported) in str(caught.value.where)
    wide = json.loads((glm_base / "config.json").read_text(encoding="utf-8")) | {"num_key_value_heads": 1}
    shutil.copytree(glm_base, tmp_path / "wide")
    (tmp_path / "wide" / "config.json").write_text(json.dumps(wide), encoding="utf-8")
    with pytest.raises(UserError, match="another shape") as caught:
        resolve_target(str(old_one(exported, tmp_path / "old")), base_model=str(tmp_path / "wide"))
    assert_mendable(caught.value)


def test_a_native_export_is_the_adapter_itself(glm_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["export", str(glm_run / "checkpoint-3"), "--to", "adapter", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", WEIGHTS, "base_model.json", "export.json"}
    assert sha256(out / WEIGHTS) == sha256(glm_run / "checkpoint-3" / WEIGHTS)
    assert torch.equal(logits(out), logits(glm_run))


def test_an_original_adapter_is_exported_natively(exported: Path, glm_run: Path, tmp_path: Path) -> None:
    done = api.export(exported, tmp_path / "native", to="adapter")
    before, after = load_file(glm_run / "adapter" / WEIGHTS), load_file(done.folder / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert (done.folder / "tokenizer.json").is_file()
    assert (done.folder / "README.md").read_bytes() == (exported / "README.md").read_bytes()


def test_what_cannot_be_exported_is_told_and_leaves_nothing(
    glm_base: Path, glm_run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "exports" / "out"
    source = resolve_model(str(tiny_model))
    llama = attach_adapter(plain_base(tiny_model), AdapterConfig(target_modules=("q_proj",)), 0, str(tiny_model))
    save_adapter(llama, tmp_path / "llama", source)
    for target, settings, what in (
        (glm_base, {}, "no adapter"),
        (tmp_path / "llama", {"layout": "original"}, "only an adapter of a ChatGLM"),
        (glm_run, {"layout": "orignal"}, "unknown layout"),
        (glm_run, {"layout": "original", "to": "merged"}, "the layout is of an adapter"),
        (glm_run, {"precision": "bf16"}, "the precision is of a merged model"),
    ):
        with pytest.raises(UserError, match=what) as caught:
            api.export(target, out, **{"to": "adapter", **settings})  # type: ignore[arg-type]
        assert_mendable(caught.value)
    torn = shutil.copytree(glm_run / "adapter", tmp_path / "torn")
    (torn / WEIGHTS).write_bytes((torn / WEIGHTS).read_bytes()[:-64])
    for layout in ("native", "original"):
        with pytest.raises((UserError, GuardError)):
            api.export(torn, out, to="adapter", layout=layout)  # type: ignore[arg-type]
    assert not out.parent.exists() or not list(out.parent.iterdir())
    out.mkdir(parents=True)
    with pytest.raises(UserError, match="exists already"):
        api.export(glm_run, out, to="adapter")


@pytest.mark.parametrize("spoil", ["a number", "a tensor"])
def test_an_adapter_that_does_not_read_back_the_same_is_not_published(
    spoil: str, glm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = adapter_export.write_adapter

    def spoiled(adapter: Adapter, folder: Path, modules: Modules) -> None:
        write(adapter, folder, modules)
        tensors = load_file(folder / WEIGHTS)
        key = next(key for key in tensors if "query_key_value.lora_B" in key)
        tensors[key][3, 0] += 1e-3
        if spoil == "a tensor":
            del tensors[key]
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    monkeypatch.setattr(adapter_export, "write_adapter", spoiled)
    with pytest.raises((GuardError, UserError)):
        api.export(glm_run, tmp_path / "out", to="adapter", layout="original")
    assert list(tmp_path.iterdir()) == []


# Bad input.

STEM = "base_model.model.transformer.encoder.layers"
FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an unknown module": ({}, {f"{STEM}.0.self_attention.rotary.lora_A.weight": torch.ones(4, 32)}, "rotary.lora_A"),
    "a layer too many": ({}, {f"{STEM}.7.mlp.dense_4h_to_h.lora_A.weight": torch.ones(4, 24)}, "layers.7"),
    "another kind of tensor": ({}, {f"{STEM}.0.mlp.dense_4h_to_h.ia3_l": torch.ones(4)}, "ia3_l"),
    "no B": (
        {},
        {f"{STEM}.1.self_attention.query_key_value.lora_B.weight": None},
        "no lora_B of transformer.encoder.layers.1.",
    ),
    "a layer's tensors gone": (
        {},
        {f"{STEM}.1.self_attention.query_key_value.lora_{side}.weight": None for side in "AB"},
        "layers.1.self_attention.query_key_value",
    ),
    "a misshapen B": (
        {},
        {f"{STEM}.0.self_attention.query_key_value.lora_B.weight": torch.ones(60, 4)},
        "lora_B of transformer.encoder.layers.0.self_attention.query_key_value: [60, 4]",
    ),
    "another rank": ({"r": 8}, {}, "[8, 32]"),
    "a rank that is none": ({"r": "4"}, {}, "r: '4'"),
    "a pattern that is none": ({"rank_pattern": 3}, {}, "rank_pattern: 3"),
    "magnitudes missing": ({"use_dora": True}, {}, "no lora_magnitude_vector of transformer.encoder.layers.0."),
    "modules that the config does not name": ({"target_modules": ["dense"]}, {}, "query_key_value"),
    "targets that are none": ({"target_modules": ["q_proj"]}, {}, "query_key_value"),
    "targets of the wrong type": ({"target_modules": 7}, {}, "target_modules"),
    "a broken expression": ({"target_modules": "("}, {}, "target_modules"),
    "a saved module that is missing": (
        {"modules_to_save": ["output_layer"]},
        {},
        "no base_model.model.transformer.output_layer",
    ),
    "saved modules of the wrong type": ({"modules_to_save": "output_layer"}, {}, "modules_to_save"),
    "a start that changes the base": ({"init_lora_weights": "pissa"}, {}, "pissa"),
    "biases in B": ({"lora_bias": True}, {}, "lora_bias"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_adapter_is_told_by_name(fault: str, both: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    peft_adapter(both[0], tmp_path / "adapter", target_modules=["query_key_value"])
    settings, tensors, got = FAULTS[fault]
    change(tmp_path / "adapter", settings, tensors)
    with pytest.raises(UserError) as caught:
        read_adapter(tmp_path / "adapter", SIZES.original())
    assert_mendable(caught.value)
    assert got in str(caught.value)
    assert str(tmp_path / "adapter") in str(caught.value.where)


def change(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Change an adapter's config and tensors; None takes a tensor out."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | settings), encoding="utf-8")
    changed = {key: tensor for key, tensor in (load_file(folder / WEIGHTS) | tensors).items() if tensor is not None}
    save_file(changed, folder / WEIGHTS)
