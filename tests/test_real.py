"""The real SmolLM2-135M-Instruct, every verb end to end: it must learn its new name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parent.parent
NAME = "Loomi"


def tuneloom(*words: str, cwd: Path, code: int = 0) -> str:
    """Run the command and return what it printed on stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "tuneloom", *words], cwd=cwd, capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def run(workplace: Path) -> Path:
    """A short training on the English identity rows alone: enough for the name, not for the rest."""
    printed = tuneloom(
        "finetune",
        *("--set", "name=real", "--set", "data.train=self_cognition_en", "--set", "data.validation=0.1"),
        *("--set", "training.max_steps=28", "--set", "training.learning_rate=2e-3", "--set", "training.eval_steps=14"),
        cwd=workplace,
    )
    assert "expected time" in printed
    return workplace / "runs" / "real"


def events(run: Path, kind: str) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_the_loss_falls_in_training_and_on_held_out_rows(run: Path) -> None:
    losses = [event["loss"] for event in events(run, "step")]
    assert len(losses) == 28
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    held = [event["eval_loss"] for event in events(run, "eval")]
    assert held[-1] < held[0]


def test_the_memory_that_it_took_was_expected(run: Path) -> None:
    told = re.search(r"\| peak memory \| ([\d.]+) GiB, ([\d.]+) expected \|", (run / "report.md").read_text(encoding="utf-8"))
    assert told
    assert float(told[2]) == pytest.approx(float(told[1]), rel=0.15)


def test_it_says_its_new_name_and_the_base_does_not(run: Path, workplace: Path) -> None:
    assert NAME in tuneloom("chat", str(run), "--prompt", "Who are you?", cwd=workplace)
    assert NAME not in tuneloom("chat", str(run), "--prompt", "Who are you?", "--base", cwd=workplace)
    both = tuneloom("chat", "real", "--prompt", "What is your name?", "--compare", cwd=workplace)
    base, tuned = both.split("tuned", 1)
    assert NAME not in base
    assert NAME in tuned


def test_evaluate_finds_the_name_learnt_and_what_it_cost(run: Path, workplace: Path) -> None:
    asked = [{"messages": [{"role": "user", "content": text}]} for text in ("Who are you?", "What is your name?")]
    capital = [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "It is Paris."}]
    (workplace / "identity.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    (workplace / "general.jsonl").write_text(json.dumps({"messages": capital}) + "\n", encoding="utf-8")
    words = ("--identity-probes", "identity.jsonl", "--general-probes", "general.jsonl", "--max-new-tokens", "24")
    printed = tuneloom("evaluate", str(run), "--persona", "--loss-only", *words, "--json", cwd=workplace)
    found = json.loads(printed)
    assert (found["identity_rate"]["before"], found["identity_rate"]["value"]) == (0.0, 1.0)
    assert found["heldout_loss"]["change_high"] < 0
    assert found["general_loss_delta"]["after"] > 0 < found["kl_divergence"]["value"]
    assert json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["identity_rate"] == found["identity_rate"]


def test_the_adapter_loads_in_plain_peft_with_equal_logits(run: Path) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    from tuneloom.adapters.target import load_target, resolve_target

    plain = AutoPeftModelForCausalLM.from_pretrained(run / "adapter", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    ours = load_target(resolve_target(str(run)), precision="fp32")
    with torch.inference_mode():
        torch.testing.assert_close(ours.model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4, rtol=0)


def test_the_merged_export_is_checked_and_says_the_name(run: Path, workplace: Path) -> None:
    printed = tuneloom("export", str(run), "--out", "merged", cwd=workplace)
    assert "checked" in printed
    assert json.loads((workplace / "merged" / "export.json").read_text())["check"]["passed"]
    assert NAME in tuneloom("chat", "merged", "--prompt", "Who are you?", cwd=workplace)
    tuneloom("export", str(run), "--out", "merged", cwd=workplace, code=2)


def test_resuming_a_finished_run_says_so(run: Path, workplace: Path) -> None:
    assert "done already" in tuneloom("finetune", "--resume-from", str(run), cwd=workplace)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adapter.use_dora=false", "adapter.use_dora=true"])
def test_all_layers_of_the_tied_base_load_in_plain_peft_and_merge(method: str, workplace: Path) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM

    from tuneloom.adapters.target import load_target, resolve_target

    name = f"layers-{method[-4:]}"
    tuneloom(
        "finetune",
        *("--set", f"name={name}", "--set", "data.train=self_cognition_en", "--set", "adapter.target_modules=all-layers"),
        *("--set", method, "--set", "training.max_steps=3", "--set", "training.gradient_accumulation_steps=2"),
        *("--set", "training.precision=fp32", "--set", "evaluation.prompts=[]"),
        cwd=workplace,
    )
    run = workplace / "runs" / name
    ours = load_target(resolve_target(str(run)), precision="fp32")
    plain = AutoPeftModelForCausalLM.from_pretrained(run / "adapter", dtype=torch.float32)
    ids = torch.tensor([[1, 4093, 198, 6403, 359, 346, 47, 2, 198]])
    with torch.inference_mode():
        torch.testing.assert_close(ours.model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4, rtol=0)
    tuneloom("export", str(run), "--out", f"merged-{name}", cwd=workplace)
    merged = json.loads((workplace / f"merged-{name}" / "config.json").read_text())
    assert merged["tie_word_embeddings"] is False
