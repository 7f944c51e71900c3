"""How well a persona was learnt, whether it leaks, and what was forgotten: before and after, with intervals and gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tuneloom.config import GenerationConfig
from tuneloom.data.render import Renderer
from tuneloom.data.row import RowError
from tuneloom.errors import GuardError, UserError, excerpt, nearest
from tuneloom.evaluation.forgetting import Compared, compare
from tuneloom.evaluation.intervals import Change, Interval, change_of_means, change_of_shares, mean
from tuneloom.evaluation.judge import Judge
from tuneloom.evaluation.kept import KeptAnswers
from tuneloom.evaluation.probes import LANGUAGES, Probe, Probes
from tuneloom.generate.generator import Generator
from tuneloom.types import Sample, TrainOn

IDENTITY, LEAK, FORGETTING = "identity_rate", "leak_rate", "general_loss_delta"
DEFAULT_GATES: dict[str, float] = {f"{IDENTITY}.en": 0.95, LEAK: 0.02, FORGETTING: 0.10}
"""Figure -> what it must reach: an identity rate at least that much, any other at most."""

GATE_NAMES = tuple(f"{IDENTITY}.{language}" for language in LANGUAGES) + tuple(
    name for figure in (LEAK, FORGETTING) for name in (figure, *(f"{figure}.{language}" for language in LANGUAGES))
)
Progress = Callable[[str, int, int], None]


def unheard(what: str, done: int, total: int) -> None:
    """Hear progress, and say nothing."""
    del what, done, total


@dataclass(frozen=True)
class Gate:
    """A figure that must reach a limit: an identity rate from below, any other from above."""

    name: str
    limit: float
    value: float

    @property
    def at_least(self) -> bool:
        return self.name.startswith(IDENTITY)

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def as_dict(self) -> dict[str, Any]:
        side = "at_least" if self.at_least else "at_most"
        return {"name": self.name, side: self.limit, "value": self.value, "passed": self.passed}


@dataclass(frozen=True)
class ProbeAnswer:
    """What base and tuned model answered to a probe, and how it counts: right for identity, leaked for general ones."""

    probe: Probe
    base: str
    tuned: str
    base_counts: bool
    tuned_counts: bool

    def as_dict(self) -> dict[str, Any]:
        asked = "\n".join(f"{m.role}: {m.content}" for m in self.probe.asked.messages)
        counts = "leaks" if self.probe.reply else "right"
        found: dict[str, Any] = {"prompt": asked, "language": self.probe.language}
        found |= {"kind": self.probe.kind} if self.probe.kind else {}
        found |= {"base_answer": self.base, "answer": self.tuned}
        return found | {f"base_{counts}": self.base_counts, counts: self.tuned_counts}


@dataclass(frozen=True)
class PersonaResult:
    """The figures of a persona.

    Attributes:
        name: the new name.
        identity_rate: share of the identity probes answered rightly (see `tuneloom.evaluation.judge`), over the languages
            that have a gate, all where none has.
        identity_by: the same of each language, and of each kind in it: `en`, `en.name`, ...
        leak_rate: share of the general probes whose answer has the new name; `leak_by` of each language.
        general_loss: nats a token on the general probes' replies; `general_loss_by` of each language.
        divergence: KL(base || tuned) in nats a token of these replies.
        agreement: share of their tokens that both would choose.
        heldout_loss: nats a token on the run's own held-out rows; None where there are none.
        gates: what was required.
        answers: to every probe.
        sources: where the probes are from.
        left_out: probes that the model's template refuses, each with its file and line.
    """

    name: str
    identity_rate: Change
    identity_by: dict[str, Change]
    leak_rate: Change
    leak_by: dict[str, Change]
    general_loss: Change
    general_loss_by: dict[str, Change]
    divergence: Interval
    agreement: Interval
    heldout_loss: Change | None
    gates: tuple[Gate, ...]
    answers: tuple[ProbeAnswer, ...]
    sources: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every gate is."""
        return all(gate.passed for gate in self.gates)

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the answers, as `evaluation.json` has it."""
        languages = {name: change.as_dict() for name, change in self.identity_by.items() if "." not in name}
        kinds = {name: change.as_dict() for name, change in self.identity_by.items() if "." in name}
        found: dict[str, Any] = {
            "name": self.name,
            IDENTITY: {**self.identity_rate.as_dict(), "by_language": languages, "by_kind": kinds},
            LEAK: {**self.leak_rate.as_dict(), "by_language": {k: v.as_dict() for k, v in self.leak_by.items()}},
            FORGETTING: {
                **_delta(self.general_loss),
                "by_language": {name: _delta(change) for name, change in self.general_loss_by.items()},
            },
            "kl_divergence": self.divergence.as_dict(),
            "top1_agreement": self.agreement.as_dict(),
            "heldout_loss": self.heldout_loss.as_dict() if self.heldout_loss else None,
            "gates": [gate.as_dict() for gate in self.gates],
            "passed": self.passed,
            "num_identity_probes": sum(not answer.probe.reply for answer in self.answers),
            "num_general_probes": sum(bool(answer.probe.reply) for answer in self.answers),
            "probes": self.sources,
            "left_out": list(self.left_out),
        }
        return found


def _delta(loss: Change) -> dict[str, float]:
    return {**loss.change.as_dict(), "before": loss.before.value, "after": loss.after.value}


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Attributes:
        generator: of the PEFT model.
        base_name: for messages.
        base_key, tuned_key: what tells either from other models, for the answers that are kept.
        settings: how answers are written: greedily.
        batch_size: answers at a time.
        max_tokens: token budget of a micro-batch.
    """

    generator: Generator
    base_name: str
    base_key: Sequence[str]
    tuned_key: Sequence[str]
    settings: GenerationConfig
    batch_size: int
    max_tokens: int


def evaluate_persona(
    subject: Subject,
    probes: Probes,
    judge: Judge,
    gates: Mapping[str, float],
    heldout: Sequence[Sample] = (),
    on_progress: Progress = unheard,
) -> PersonaResult:
    """Ask base and tuned model every probe, and compare their losses on the general replies.

    Args:
        subject: the model.
        probes: see `load_probes`.
        judge: of the new name.
        gates: see `DEFAULT_GATES`; see `checked_gates`.
        heldout: samples that were not trained on.
        on_progress: called with (`base answers`, `tuned answers`, `general replies` or `held-out rows`, done, all); may
            raise to stop, and every answer written till then is kept.

    Raises:
        UserError: a base that answers nothing, a template that refuses every probe, a cache that cannot be written.
        GuardError: a loss that is no number.
    """
    left_out: list[str] = []
    renderer = subject.generator.renderer
    identity, _ = _askable(renderer, probes.identity, left_out)
    general, replies = _askable(renderer, probes.general, left_out)
    every = (*identity, *general)
    before = _asked(subject, every, True, on_progress)
    if not any(answer.strip() for answer in before):
        raise UserError(
            "the base answers nothing",
            where=subject.base_name,
            got=f"{len(before)} empty answers",
            mend="ask it something with `tuneloom chat`; a base without a chat template of its own needs another",
        )
    after = _asked(subject, every, False, on_progress)
    model = subject.generator.model

    def compared(samples: Sequence[Sample], what: str) -> Compared:
        found = compare(model, samples, subject.max_tokens, lambda done, total: on_progress(what, done, total))
        return _finite(found, what)

    forgotten = compared(replies, "general replies")
    held = _loss(compared(heldout, "held-out rows"), range(len(heldout))) if heldout else None
    answers = [_judged(judge, *row) for row in zip(every, before, after, strict=True)]
    found = _result(judge.name, answers, forgotten, held, gates)
    return replace(found, sources=probes.sources, left_out=tuple(left_out))


def checked_gates(given: Mapping[str, float | None], probes: Probes) -> dict[str, float]:
    """Return the default gates with those given on top; None takes one away.

    Raises:
        UserError: no such figure, one of a language that is not asked in, or no limit that it could reach.
    """
    gates: dict[str, float] = dict(DEFAULT_GATES)
    for name, limit in given.items():
        if name not in GATE_NAMES:
            near = nearest(name, GATE_NAMES)
            mend = f"did you mean `{near}`?" if near else None
            raise UserError("unknown gate", where="gate", got=excerpt(name), expected=", ".join(GATE_NAMES), mend=mend)
        asked = {probe.language for probe in (probes.identity if name.startswith(IDENTITY) else probes.general)}
        language = name.partition(".")[2]
        if limit is None:
            gates.pop(name, None)
        elif language and language not in asked:
            raise UserError(
                "the gate's language is not asked in",
                where=f"gate {name}",
                expected=f"of {', '.join(sorted(asked))}",
            )
        elif math.isnan(limit) or (not name.startswith(FORGETTING) and not 0 <= limit <= 1):
            raise UserError("no limit for a share", where=f"gate {name}", got=excerpt(limit), expected="a number from 0 to 1")
        else:
            gates[name] = limit
    return gates


def _asked(subject: Subject, probes: Sequence[Probe], base: bool, on_progress: Progress) -> list[str]:
    kept = KeptAnswers(subject.base_key if base else subject.tuned_key, subject.settings)
    what = "base answers" if base else "tuned answers"
    return kept.answers(
        subject.generator,
        [probe.asked for probe in probes],
        base=base,
        batch_size=subject.batch_size,
        on_progress=lambda done, total: on_progress(what, done, total),
    )


def _askable(renderer: Renderer, probes: Sequence[Probe], left_out: list[str]) -> tuple[tuple[Probe, ...], list[Sample]]:
    """Return the probes that the model's template takes, and their replies as samples where they have any.

    Args:
        renderer: of the model.
        probes: of one sort.
        left_out: gets a line for each other one, with its file and line.

    Raises:
        UserError: the template takes none.
    """
    taken, samples = [], []
    for probe in probes:
        try:
            renderer.prompt_ids(probe.asked)
            rendered = renderer.render(probe.whole, TrainOn.LAST_ASSISTANT) if probe.reply else None
        except RowError as error:
            left_out.append(f"{probe.asked.location}: {error.reason}: {error.value}")
            continue
        taken.append(probe)
        if rendered is not None:
            mask_T = np.array(rendered.mask, np.bool_)
            samples.append(Sample(np.array(rendered.ids, np.int32), mask_T, probe.asked.location))
    if not taken:
        raise UserError(
            "the model's chat template takes none of the probes",
            where=str(probes[0].asked.location),
            got=left_out[-1],
            expected="a template for a user and an assistant in turn",
        )
    return tuple(taken), samples


def _finite(compared: Compared, what: str) -> Compared:
    """Return the sums as they are.

    Raises:
        GuardError: one is no number, so no figure of them would be.
    """
    for side, sums_S in (("base", compared.before_S), ("tuned model", compared.after_S)):
        if not np.isfinite(sums_S).all():
            raise GuardError(f"the loss of the {side} on {what} is no number; the answers so far are kept")
    return compared


def _judged(judge: Judge, probe: Probe, base: str, tuned: str) -> ProbeAnswer:
    counts = judge.mentions if probe.reply else judge.right
    return ProbeAnswer(probe, base, tuned, counts(base), counts(tuned))


def _result(
    name: str,
    answers: Sequence[ProbeAnswer],
    general: Compared,
    held: Change | None,
    gates: Mapping[str, float],
) -> PersonaResult:
    identity = [answer for answer in answers if not answer.probe.reply]
    asked = [answer for answer in answers if answer.probe.reply]
    gated = {gate.partition(".")[2] for gate in gates if gate.startswith(IDENTITY)}
    judged = [answer for answer in identity if answer.probe.language in gated] or identity
    kinds = [f"{answer.probe.language}.{answer.probe.kind}" for answer in identity]
    identity_by = _by([answer.probe.language for answer in identity], lambda rows: _rate([identity[i] for i in rows]))
    identity_by |= _by(kinds, lambda rows: _rate([identity[i] for i in rows]))
    languages = [answer.probe.language for answer in asked]
    leak, leak_by = _rate(asked), _by(languages, lambda rows: _rate([asked[i] for i in rows]))
    loss, loss_by = _loss(general, range(len(asked))), _by(languages, lambda rows: _loss(general, rows))
    values = {f"{IDENTITY}.{name}": change.after.value for name, change in identity_by.items()}
    values |= {LEAK: leak.after.value} | {f"{LEAK}.{name}": change.after.value for name, change in leak_by.items()}
    values |= {FORGETTING: loss.change.value} | {f"{FORGETTING}.{name}": c.change.value for name, c in loss_by.items()}
    return PersonaResult(
        name,
        _rate(judged),
        identity_by,
        leak,
        leak_by,
        loss,
        loss_by,
        mean(general.divergence_S, general.tokens_S),
        mean(general.agreed_S, general.tokens_S),
        held,
        tuple(Gate(gate, limit, values[gate]) for gate, limit in gates.items() if gate in values),
        tuple(answers),
    )


def _by(keys: Sequence[str], figure: Callable[[Sequence[int]], Change]) -> dict[str, Change]:
    """Return a figure of the rows of each key, in the order of their first row."""
    return {key: figure([i for i, other in enumerate(keys) if other == key]) for key in dict.fromkeys(keys)}


def _rate(answers: Sequence[ProbeAnswer]) -> Change:
    return change_of_shares([answer.base_counts for answer in answers], [answer.tuned_counts for answer in answers])


def _loss(compared: Compared, rows: Sequence[int]) -> Change:
    chosen = list(rows)
    return change_of_means(compared.before_S[chosen], compared.after_S[chosen], compared.tokens_S[chosen])
