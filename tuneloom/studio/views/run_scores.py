"""What `tuneloom evaluate` found in a run: each figure before and after as bars with intervals, and the gates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nicegui import ui

from tuneloom.rundir import EVALUATION, RunDirectory
from tuneloom.studio.texts import Texts

LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Share:
    """A share from 0 to 1, and its interval."""

    value: float
    low: float
    high: float

    def text(self) -> str:
        return f"{self.value:.1%} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Row:
    """A share of the base and of the tuned model; `label` is a key of the texts."""

    label: str
    before: Share
    after: Share


@dataclass(frozen=True)
class Scores:
    """What the card shows: bars, facts as (key of the texts, text), gates as (name, figure and limit, passed)."""

    name: str
    rows: tuple[Row, ...]
    facts: tuple[tuple[str, str], ...]
    gates: tuple[tuple[str, str, bool], ...]


def scores_of(run: Path) -> Scores | None:
    """Return what a run's evaluation.json says; None where there is none, or it is no evaluation."""
    report = RunDirectory(run).read_json(EVALUATION)
    if report is None:
        return None
    try:
        return _scores(report)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _scores(report: Mapping[str, Any]) -> Scores:
    by_language = report["identity_rate"]["by_language"]
    rows = [_row(f"scores.identity_{name}", by_language[name]) for name in LANGUAGES if name in by_language]
    rows.append(_row("scores.leak", report["leak_rate"]))
    delta, divergence, agreement = report["general_loss_delta"], report["kl_divergence"], report["top1_agreement"]
    facts = [
        ("scores.loss", f"{delta['before']:.4f} → {delta['after']:.4f}"),
        ("scores.delta", f"{delta['value']:+.4f} [{delta['low']:+.4f}, {delta['high']:+.4f}]"),
        ("scores.divergence", f"{divergence['value']:.4f} [{divergence['low']:.4f}, {divergence['high']:.4f}]"),
        ("scores.agreement", _share(agreement).text()),
    ]
    held = report.get("heldout_loss")
    if held:
        facts.append(("scores.heldout", f"{held['before']:.4f} → {held['value']:.4f}"))
    return Scores(str(report["name"]), tuple(rows), tuple(facts), tuple(_gate(gate) for gate in report["gates"]))


def _row(label: str, figure: Mapping[str, Any]) -> Row:
    before = {"value": figure["before"], "low": figure["before_low"], "high": figure["before_high"]}
    return Row(label, _share(before), _share(figure))


def _share(figure: Mapping[str, Any]) -> Share:
    return Share(*(float(figure[name]) for name in ("value", "low", "high")))


def _gate(gate: Mapping[str, Any]) -> tuple[str, str, bool]:
    shown = "{:+.4f}" if str(gate["name"]).startswith("general_loss") else "{:.1%}"
    side, limit = ("≥", gate["at_least"]) if "at_least" in gate else ("≤", gate["at_most"])
    return str(gate["name"]), f"{shown.format(gate['value'])} ({side} {shown.format(limit)})", bool(gate["passed"])


def draw_scores(texts: Texts, scores: Scores) -> None:
    """Draw the card."""
    with ui.element("div").classes("line"):
        ui.label(texts("scores.title")).classes("strong").props('role="heading" aria-level="2"')
        ui.label(scores.name).classes("small muted")
    with ui.element("div").classes("run-wide"), ui.element("table").classes("plain run-scores"):
        with ui.element("thead"), ui.element("tr"):
            for key in ("scores.figure", "scores.before", "scores.after"):
                _cell(texts(key), "th")
        with ui.element("tbody"):
            for row in scores.rows:
                with ui.element("tr"):
                    _cell(texts(row.label))
                    for share, side in ((row.before, "scores.before"), (row.after, "scores.after")):
                        _bar(share, f"{texts(row.label)}, {texts(side)}")
    with ui.element("table").classes("plain figures"):
        for key, text in scores.facts:
            with ui.element("tr"):
                _cell(texts(key))
                _cell(text)
    for name, text, passed in scores.gates:
        with ui.element("div").classes("line"):
            ui.label(texts("scores.passed" if passed else "scores.not_passed")).classes("good" if passed else "bad")
            ui.label(f"{name} {text}").classes("small mono")
    ui.label(texts("scores.intervals")).classes("small muted")


def _bar(share: Share, label: str) -> None:
    with ui.element("td"):
        ui.label(share.text()).classes("small")
        bar = ui.element("div").classes("bar")
        with bar.props(f'role="meter" aria-label="{label}" aria-valuenow="{100 * share.value:.1f}" aria-valuemin="0"'):
            ui.element("div").style(f"width:{100 * share.value:.1f}%")
        bar.props('aria-valuemax="100"')


def _cell(text: str, tag: str = "td") -> None:
    with ui.element(tag):
        ui.label(text)
