"""Reload an exported folder in a fresh process and hold it against the reference.

    python -m tuneloom.exporting.verify FOLDER REFERENCE PRECISION

prints one JSON line. fp32: logits equal to 1e-4 (and 1e-5 of a logit). 16 bits: KL and top-1 agreement are reported, and the
greedy token must be equal wherever the reference's top-2 margin exceeds what rounding can turn.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

FP32_TOLERANCE = 1e-4
FP32_RELATIVE = 1e-5
"""Logits of a few tens carry an error of their own in fp32: on top of 1e-4, this share of a logit is let pass."""
MARGIN_FACTOR = 4.0
"""A top-2 margin counts as safe from this many times the measured rounding: two logits may each move
by it, and the merged weights are rounded once more."""


@dataclass(frozen=True)
class Check:
    """The result of a verification.

    Attributes:
        passed: whether it holds.
        max_logit_difference: over all probes' answers.
        mean_kl: of the reference from the export, nats a token.
        top1_agreement: share of positions with the same greedy token.
        positions: how many were compared.
        safe_positions, safe_agreement: those whose margin rounding cannot turn; 16 bits only.
        rounding: measured on the reference's side, at least the format's last place in the largest logit.
        same_tokens: whether the exported tokenizer renders the probes to the same ids.
    """

    passed: bool
    max_logit_difference: float
    mean_kl: float
    top1_agreement: float
    positions: int
    safe_positions: int
    safe_agreement: float
    rounding: float
    same_tokens: bool

    def sentence(self) -> str:
        """Return the result for people."""
        return (
            f"largest logit difference {self.max_logit_difference:.2e}, KL {self.mean_kl:.2e} nats, "
            f"same greedy token at {self.top1_agreement:.1%} of {self.positions} positions"
        )


def verify_in_fresh_process(folder: Path, reference: Path, precision: str) -> Check:
    """Run this module as a program on a folder.

    Raises:
        RuntimeError: the process failed; its last words are the message.
    """
    command = [sys.executable, "-m", "tuneloom.exporting.verify", str(folder), str(reference), precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return Check(**json.loads(done.stdout.strip().splitlines()[-1]))


def verify(folder: Path, reference_file: Path, precision: str) -> Check:
    """Load the folder and compare."""
    import torch
    from torch.nn import functional as F

    from tuneloom.data.render import Renderer
    from tuneloom.exporting.reference import PROBES, Reference, answer_logits
    from tuneloom.models.load import load_base_model, load_tokenizer_folder
    from tuneloom.models.precision import exactly
    from tuneloom.types import Conversation, Message

    reference = Reference.load(reference_file)
    model = load_base_model(folder, exactly(precision).dtype, torch.device("cpu"))
    renderer = Renderer(load_tokenizer_folder(folder))
    prompts = [renderer.prompt_ids(Conversation((Message("user", probe),))) for probe in PROBES]
    kept = [ids[:start] for ids, start in zip(reference.sequences, reference.prompt_lengths, strict=True)]

    logits_PV = answer_logits(model, reference.sequences, reference.prompt_lengths)
    expected_PV = reference.logits_PV
    difference = float((logits_PV - expected_PV).abs().max())
    kl = F.kl_div(logits_PV.log_softmax(-1), expected_PV.log_softmax(-1), reduction="batchmean", log_target=True)
    same = logits_PV.argmax(-1) == expected_PV.argmax(-1)
    top2 = expected_PV.topk(2, dim=-1).values
    last_place = torch.finfo(model.dtype).eps * float(expected_PV.abs().max())
    rounding = max(reference.rounding, last_place)
    safe = top2[:, 0] - top2[:, 1] > MARGIN_FACTOR * rounding
    safe_agreement = float(same[safe].float().mean()) if bool(safe.any()) else 1.0
    close = torch.allclose(logits_PV, expected_PV, atol=FP32_TOLERANCE, rtol=FP32_RELATIVE)
    holds = close if precision == "fp32" else safe_agreement == 1.0
    finite = bool(torch.isfinite(logits_PV).all()) and bool(torch.isfinite(expected_PV).all())
    return Check(
        passed=finite and holds and prompts == kept,
        max_logit_difference=difference,
        mean_kl=max(0.0, float(kl)),
        top1_agreement=float(same.float().mean()),
        positions=len(same),
        safe_positions=int(safe.sum()),
        safe_agreement=safe_agreement,
        rounding=rounding,
        same_tokens=prompts == kept,
    )


if __name__ == "__main__":
    print(json.dumps(asdict(verify(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))))  # noqa: T201 the result
