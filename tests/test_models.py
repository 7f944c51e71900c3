"""Base models: what resolves and loads, what is refused and how, and that picking rows changes no loss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model_folder
from helpers import asked, assert_mendable, plain_base
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tuneloom.data.plan import pack, plan_step
from tuneloom.data.render import Renderer
from tuneloom.errors import UserError
from tuneloom.models.fingerprint import fingerprint
from tuneloom.models.forward import PACKED, layout_of, supervised_logits, supervised_loss_sum, use_attention
from tuneloom.models.load import load_base_model, load_tokenizer_folder, pick_device
from tuneloom.models.precision import choose_precision
from tuneloom.models.source import resolve_model
from tuneloom.types import IGNORE_INDEX, Message, Sample

CPU = torch.device("cpu")


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, to be damaged."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# Finding a model.


def test_a_native_folder_resolves(tiny_model: Path) -> None:
    source = resolve_model(str(tiny_model))
    assert (source.folder, source.kind, source.config()["model_type"]) == (tiny_model, "folder", "llama")


@pytest.mark.parametrize(
    ("name", "mend"),
    [("./no-such-folder", "check the path"), ("smollm2-135m-instrct", "did you mean `smollm2-135m-instruct`?")],
)
def test_a_missing_model_names_what_there_is_and_the_nearest(name: str, mend: str) -> None:
    with pytest.raises(UserError, match="model not found") as caught:
        resolve_model(name)
    assert_mendable(caught.value)
    assert caught.value.where == name
    assert caught.value.mend == mend
    assert "smollm2-135m-instruct" in str(caught.value.expected)


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json") as caught:
        resolve_model(str(tmp_path))
    assert_mendable(caught.value)


@pytest.mark.parametrize("text", ['{"model_type": "llama"', '["llama"]', "\x00\x01"])
def test_a_torn_config_is_named(model_copy: Path, text: str) -> None:
    (model_copy / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json") as caught:
        resolve_model(str(model_copy))
    assert_mendable(caught.value)
    assert str(caught.value.where).endswith("config.json")


def test_remote_code_is_never_run(model_copy: Path) -> None:
    edit_config(model_copy, model_type="baichuan", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    sentinel = model_copy / "ran"
    (model_copy / "modeling.py").write_text(f"open({str(sentinel)!r}, 'w')\n", encoding="utf-8")
    with pytest.raises(UserError, match="code of its own, which is never run") as caught:
        resolve_model(str(model_copy))
    assert_mendable(caught.value)
    assert "auto_map" in str(caught.value.got)
    assert not sentinel.exists()


def test_a_native_model_with_auto_map_loads_by_its_native_class(model_copy: Path) -> None:
    edit_config(model_copy, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    (model_copy / "modeling.py").write_text("raise SystemExit('remote code ran')\n", encoding="utf-8")
    model = load_base_model(resolve_model(str(model_copy)).folder, torch.float32, CPU)
    assert type(model).__module__.startswith("transformers.models.llama")


def test_an_unknown_kind_of_model_is_named(model_copy: Path) -> None:
    edit_config(model_copy, model_type="llamma")
    with pytest.raises(UserError, match="does not know this kind of model") as caught:
        resolve_model(str(model_copy))
    assert_mendable(caught.value)
    assert "'llamma'" in str(caught.value.got)


def test_an_encoder_is_no_model_that_writes_text(model_copy: Path) -> None:
    edit_config(model_copy, model_type="vit")
    with pytest.raises(UserError, match="not a model that writes text") as caught:
        resolve_model(str(model_copy))
    assert_mendable(caught.value)


def test_pickled_weights_are_not_read(model_copy: Path) -> None:
    (model_copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no safetensors weights") as caught:
        resolve_model(str(model_copy))
    assert caught.value.got == "no weights"
    (model_copy / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UserError, match="no safetensors weights") as caught:
        resolve_model(str(model_copy))
    assert_mendable(caught.value)
    assert "pytorch_model.bin" in str(caught.value.got)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.zip"
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="the model is a file") as caught:
        resolve_model(str(file))
    assert_mendable(caught.value)


def test_a_torn_gguf_is_refused_before_its_tensors_are_read(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    whole = tmp_path / "whole.gguf"
    writer = GGUFWriter(whole, "llama")
    writer.add_tensor("token_embd.weight", torch.zeros(64, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, data in (
        ("cut.gguf", whole.read_bytes()[:-4096]),
        ("header.gguf", whole.read_bytes()[:40]),
        ("noise.gguf", b"no gguf at all, " * 8),
        ("empty.gguf", b""),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match="GGUF") as caught:
            resolve_model(str(tmp_path / name))
        assert_mendable(caught.value)
        assert caught.value.where == str(tmp_path / name)


# Loading it.


def test_torn_weights_are_named(model_copy: Path) -> None:
    file = model_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="does not load") as caught:
        load_base_model(model_copy, torch.float32, CPU)
    assert_mendable(caught.value)


def test_a_missing_tensor_is_an_error_not_a_random_weight(model_copy: Path) -> None:
    edit_tensors(model_copy, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as caught:
        load_base_model(model_copy, torch.float32, CPU)
    assert_mendable(caught.value)


def test_a_tensor_of_another_shape_is_an_error(model_copy: Path) -> None:
    edit_tensors(model_copy, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)}))
    with pytest.raises(UserError, match=r"1 of another shape, e\.g\. model\.norm\.weight") as caught:
        load_base_model(model_copy, torch.float32, CPU)
    assert_mendable(caught.value)


def test_a_folder_without_tokenizer_is_named(model_copy: Path) -> None:
    for file in model_copy.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="no tokenizer") as caught:
        load_tokenizer_folder(model_copy)
    assert_mendable(caught.value)


def test_a_torn_tokenizer_is_named(model_copy: Path) -> None:
    file = model_copy / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="tokenizer does not load") as caught:
        load_tokenizer_folder(model_copy)
    assert_mendable(caught.value)


def test_the_loaded_base_is_frozen_in_evaluation_mode_and_equal_to_plain_transformers(tiny_model: Path) -> None:
    model = load_base_model(tiny_model, torch.float32, CPU)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    plain = plain_base(tiny_model).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())


# Telling bases apart.


def test_the_fingerprint_is_stable_and_sees_a_change_at_a_tensors_beginning(model_copy: Path, tiny_model: Path) -> None:
    before = fingerprint(tiny_model)
    assert fingerprint(model_copy) == before

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3

    edit_tensors(model_copy, nudge)
    assert fingerprint(model_copy) != before


@pytest.mark.parametrize("data", [b"", b"\xff" * 64, b"\x02\x00\x00\x00\x00\x00\x00\x00[]"])
def test_a_weight_file_without_a_whole_header_is_named(model_copy: Path, data: bytes) -> None:
    (model_copy / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="torn") as caught:
        fingerprint(model_copy)
    assert_mendable(caught.value)


def test_the_fingerprint_tells_seeds_apart(tiny_model: Path, tmp_path: Path) -> None:
    assert fingerprint(make_model_folder(tmp_path / "other", seed=5)) != fingerprint(tiny_model)


# Precision.


def test_fp16_on_a_cpu_becomes_another_and_says_so() -> None:
    chosen = choose_precision("fp16", CPU)
    assert chosen.name in ("bf16", "fp32")
    assert "fp16" in chosen.why


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_what_the_cpu_can_do_is_done_as_asked(name: str, dtype: torch.dtype) -> None:
    chosen = choose_precision(name, CPU)
    assert (chosen.name, chosen.dtype, chosen.why) == (name, dtype, "as asked")


def test_auto_takes_bf16_only_where_it_was_measured_faster() -> None:
    chosen = choose_precision("auto", CPU)
    faster = chosen.gflops["bf16"] > 1.1 * chosen.gflops["fp32"]
    assert chosen.name == ("bf16" if faster else "fp32")
    assert "GFLOP/s measured" in chosen.why


def test_a_device_can_be_named() -> None:
    assert pick_device("cpu") == CPU


# Micro-batches through the model.


@pytest.fixture(scope="module")
def samples(tiny_tokenizer: object) -> list[Sample]:
    """Samples of unlike lengths, one with two answers."""
    renderer = Renderer(tiny_tokenizer)  # type: ignore[arg-type]
    texts = [("Hi", "Hello there, you."), ("你是谁？", "我是小织。", "Are you sure?", "Yes, very."), ("Say no.", "No.")]
    found = []
    for row in texts:
        conversation = asked(*row[:-1])
        rendered = renderer.render(type(conversation)((*conversation.messages, Message("assistant", row[-1]))))
        ids = torch.tensor(rendered.ids, dtype=torch.int32).numpy()
        found.append(Sample(ids, torch.tensor(rendered.mask).numpy()))
    return found


def padded_forward(model: Any, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the supervised rows, by transformers alone on one padded batch."""
    width = max(sample.num_tokens for sample in samples) - 1
    ids, labels = torch.zeros(len(samples), width, dtype=torch.long), torch.full((len(samples), width), IGNORE_INDEX)
    attention = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        length = sample.num_tokens - 1
        ids[row, :length] = torch.tensor(sample.ids_T[:-1].tolist())
        wanted = torch.tensor(sample.ids_T[1:].tolist())
        labels[row, :length] = torch.where(torch.tensor(sample.mask_T[1:].tolist()), wanted, IGNORE_INDEX)
        attention[row, :length] = 1
    logits = model(input_ids=ids, attention_mask=attention).logits
    return logits[labels != IGNORE_INDEX], labels[labels != IGNORE_INDEX]


@pytest.mark.parametrize("attention", ["sdpa", PACKED])
@pytest.mark.parametrize("folder", ["tiny_model", "untied_model"])
def test_supervised_logits_are_the_full_forwards_at_the_labelled_rows(
    folder: str, attention: str, samples: list[Sample], request: pytest.FixtureRequest
) -> None:
    model = load_base_model(request.getfixturevalue(folder), torch.float32, CPU)
    with torch.inference_mode():
        full_logits, labels = padded_forward(model, samples)
        use_attention(model, attention)
        logits_RV, labels_R = supervised_logits(model, pack(samples))
    assert labels_R.tolist() == labels.tolist()
    assert len(labels_R) == sum(sample.num_supervised_tokens for sample in samples)
    torch.testing.assert_close(logits_RV, full_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", PACKED])
def test_the_summed_loss_is_cross_entropy_of_the_full_padded_forward(
    attention: str, untied_model: Path, samples: list[Sample]
) -> None:
    model = load_base_model(untied_model, torch.float32, CPU)
    with torch.inference_mode():
        expected = F.cross_entropy(*padded_forward(model, samples), reduction="sum")
        use_attention(model, attention)
        loss = supervised_loss_sum(model, pack(samples))
        plan = plan_step(samples, 20, layout_of(model, training=False))
        split = sum(supervised_loss_sum(model, part) for part in plan.micro_batches)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(split, expected, rtol=1e-5, atol=1e-5)
