"""What an evaluation leaves in its run: evaluation.json, the answers, a section of report.md and of the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tuneloom.rundir import EVALUATION, REPORT, RunDirectory, write_atomically

ANSWERS = "evaluation-answers.jsonl"
_HEADING = "## Evaluation"


def write_evaluation(run: RunDirectory, report: Mapping[str, Any], answers: list[dict[str, Any]]) -> None:
    """Write a persona's figures into its run; what an earlier evaluation wrote is replaced.

    Args:
        run: the run.
        report: `PersonaResult.as_dict`, and whatever else belongs to it.
        answers: a row for each probe.
    """
    run.write_json(EVALUATION, report)
    run.write_text(ANSWERS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers))
    section = evaluation_section(report)
    for file in (run.path / REPORT, run.adapter / "README.md"):
        if file.is_file():
            write_atomically(file, with_section(file.read_text(encoding="utf-8"), section))


def evaluation_section(report: Mapping[str, Any]) -> str:
    """Return the section of Markdown that tells a persona's figures."""
    lines = [_HEADING, "", "| figure | before | after |", "|---|---|---|"]
    lines += [f"| {label} | {before} | {after} |" for label, before, after in evaluation_rows(report)]
    lines += ["", *(f"- {line}" for line in gate_lines(report)), ""]
    lines += [
        f"Greedy answers to {report['num_identity_probes']:,} questions of identity and {report['num_general_probes']:,} "
        "general ones that no built-in set is trained on. In brackets: 95 % intervals, by the bootstrap."
    ]
    return "\n".join(lines) + "\n"


def with_section(text: str, section: str) -> str:
    """Return Markdown with the section in the place of an earlier one, else before `## Use`, else at the end."""
    lines = text.splitlines()
    if _HEADING in lines:
        start = lines.index(_HEADING)
        end = next((i for i in range(start + 1, len(lines)) if lines[i].startswith("## ")), len(lines))
    else:
        start = end = lines.index("## Use") if "## Use" in lines else len(lines)
    before, after = "\n".join(lines[:start]).rstrip("\n"), "\n".join(lines[end:])
    return f"{before}\n\n{section}" + (f"\n{after}\n" if after else "")


def evaluation_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (figure, before, after) for people."""
    rows = []
    for language, figure in report["identity_rate"]["by_language"].items():
        rows.append((f"identity, {language}", *_shares(figure)))
        kinds = report["identity_rate"]["by_kind"]
        rows += [(f"identity, {name}", *_shares(kinds[name])) for name in kinds if name.startswith(f"{language}.")]
    rows.append(("leak", *_shares(report["leak_rate"])))
    for language, figure in report["leak_rate"]["by_language"].items():
        rows.append((f"leak, {language}", *_shares(figure)))
    delta = report["general_loss_delta"]
    rows.append(("loss on general replies, nats a token", f"{delta['before']:.4f}", f"{delta['after']:.4f}"))
    rows.append(("its change", "", _signed(delta)))
    for language, figure in delta["by_language"].items():
        rows.append((f"its change, {language}", "", _signed(figure)))
    divergence, agreement = report["kl_divergence"], report["top1_agreement"]
    rows.append(
        ("KL to the base, nats a token", "", f"{divergence['value']:.4f} [{divergence['low']:.4f}, {divergence['high']:.4f}]")
    )
    rows.append(("tokens chosen as the base does", "", _share(agreement)))
    held = report.get("heldout_loss")
    if held:
        rows.append(("held-out loss, nats a token", f"{held['before']:.4f}", f"{held['value']:.4f}"))
        change = {"value": held["change"], "low": held["change_low"], "high": held["change_high"]}
        rows.append(("its change", "", _signed(change)))
    return rows


def gate_lines(report: Mapping[str, Any]) -> list[str]:
    """Return a line for each gate: what was required, what was found, passed or not."""
    lines = []
    for gate in report["gates"]:
        shown = "{:+.4f}" if gate["name"].startswith("general_loss") else "{:.1%}"
        side, limit = ("at least", gate["at_least"]) if "at_least" in gate else ("at most", gate["at_most"])
        found = f"{gate['name']} {shown.format(gate['value'])}, {side} {shown.format(limit)}"
        lines.append(f"{'passed' if gate['passed'] else 'NOT PASSED'}: {found}")
    return lines


def _shares(figure: Mapping[str, float]) -> tuple[str, str]:
    before = {"value": figure["before"], "low": figure["before_low"], "high": figure["before_high"]}
    return _share(before), _share(figure)


def _share(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.1%} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def _signed(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:+.4f} [{figure['low']:+.4f}, {figure['high']:+.4f}]"
