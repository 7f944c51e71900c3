"""A data report and the label view in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

if TYPE_CHECKING:
    from tuneloom.data.prepare import Progress as OnProgress
    from tuneloom.data.report import DataReport
    from tuneloom.data.view import RowView, TokenView

_BAR_WIDTH = 40
_LABEL_WIDTH = 13
_MAX_LEAKS = 5
_ROLE_STYLES = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}


@contextmanager
def reading_progress(shown: bool) -> Iterator[OnProgress]:
    """Show a bar on a terminal while files are read."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.percentage:.0f} %"))
    bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not (shown and console.is_terminal))
    tasks: dict[str, int] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done)  # type: ignore[arg-type]

    with bar:
        yield progress


def print_report(report: DataReport, cutoff_len: int, max_problems: int) -> None:
    """Print what became of every row, the lengths as a histogram, and each bad row with its mend."""
    console = Console(highlight=False, soft_wrap=True)
    for label, value in report_lines(report, cutoff_len):
        console.print(Text.assemble((f"{label:>{_LABEL_WIDTH}}  ", "bold"), value))
    _print_histogram(console, report, cutoff_len)
    for source in report.sources:
        for line in source.unfilled_lines():
            _print_finding(console, "placeholder", line)
    for line in report.leak_lines(_MAX_LEAKS):
        _print_finding(console, "leak", line)
    for line in report.leaked_probe_lines():
        _print_finding(console, "leaked probe", line)
    for reason, count in report.dropped_by_reason.most_common():
        _print_finding(console, "dropped", f"{count:,}  {reason}")
    for reason, count in report.repaired_by_reason.most_common():
        _print_finding(console, "repaired", f"{count:,}  {reason}")
    problems = report.problems
    for problem in problems[:max_problems]:
        console.print(Text(f"{problem.action:>{_LABEL_WIDTH}}  {problem}", style="yellow"))
    if more := report.num_dropped + report.num_repaired - min(len(problems), max_problems):
        console.print(Text(f"{'':>{_LABEL_WIDTH}}  and {more:,} more: --problems N, or --json", style="dim"))


def report_lines(report: DataReport, cutoff_len: int) -> list[tuple[str, str]]:
    """Return the report's figures as (label, text) lines."""
    from tuneloom.data.report import TRAIN

    lines = []
    for source in report.sources:
        formats = ", ".join(f"{name} {count:,}" for name, count in source.formats.most_common()) or "no usable row"
        role = "" if source.role == TRAIN else f" ({source.role})"
        lines.append(("source", f"{source.path}{role}: {formats}"))
    lines.append(
        (
            "rows",
            f"{report.num_read:,} read, {sum(source.usable for source in report.sources):,} usable, "
            f"{report.num_dropped:,} dropped, {report.num_repaired:,} repaired",
        )
    )
    lines.append(("duplicates", f"{report.duplicates:,}"))
    if not report.train["samples"]:
        return lines
    train = report.train
    lines.append(("tokens", f"{train['tokens']:,} in all, {train['supervised_tokens']:,} supervised"))
    lines.append(
        ("lengths", f"shortest {train['shortest']:,}, median {train['median']:,}, longest {train['longest']:,} tokens")
    )
    lost = report.num_answer_tokens_lost / max(1, report.num_answer_tokens)
    lines.append(("cutoff", f"{report.num_cut:,} cut at {cutoff_len:,} tokens; {lost:.1%} of the answer tokens lost"))
    return lines


def _print_histogram(console: Console, report: DataReport, cutoff_len: int) -> None:
    rows = report.train.get("histogram") or []
    most = max((row["count"] for row in rows), default=1)
    for row in rows:
        bar = "█" * max(round(_BAR_WIDTH * row["count"] / most), 1 if row["count"] else 0)
        style = "red" if row["from"] > cutoff_len else "green"
        tokens = f"{row['from']:,} to {row['to'] - 1:,}" if row["to"] - row["from"] > 1 else f"{row['from']:,}"
        console.print(Text.assemble(f"{tokens:>{_LABEL_WIDTH + 4}}  ", (bar, style), f" {row['count']:,}"))


def _print_finding(console: Console, label: str, text: str) -> None:
    console.print(Text.assemble((f"{label:>{_LABEL_WIDTH}}  ", "bold yellow"), text))


def print_rows(rows: Sequence[RowView]) -> None:
    """Print rows as chat, and as tokens coloured by label."""
    console = Console(highlight=False)
    bare = not console.is_terminal or console.no_color  # then brackets say what colour cannot
    legend = ("⟦learnt⟧" if bare else "learnt", _style(True, False))
    console.print(Text.assemble("tokens: ", legend, "  context  ", ("special", "bold")))
    for row in rows:
        where = row.conversation.location
        console.rule(Text(f"row {row.number}  {where}"), align="left")
        for message in row.conversation.messages:
            style = _ROLE_STYLES[message.role]
            title = message.role if message.weight else f"{message.role}, weight 0"
            calls = [f"{call.name}({call.arguments})" for call in message.tool_calls]
            body = Text("\n".join([*([message.content] if message.content or not calls else []), *calls]))
            console.print(Panel(body, title=Text(title, style), title_align="left", border_style=style))
        if row.error is not None:
            console.print(Text(f"no sample: {row.error.reason} (got {row.error.value}; {row.error.mend})", style="yellow"))
            continue
        console.print(_token_text(row.tokens, bare))
        cut = f", {row.num_cut_tokens:,} cut off" if row.num_cut_tokens else ""
        console.print(Text(f"{row.num_tokens:,} tokens, {row.num_supervised_tokens:,} learnt{cut}", style="dim"))


def _token_text(tokens: Sequence[TokenView], bare: bool) -> Text:
    text = Text()
    for learnt, group in groupby(tokens, key=lambda token: token.supervised):
        text.append("⟦" if bare and learnt else "")
        for token in group:
            text.append(token.text, _style(token.supervised, token.special))
        text.append("⟧" if bare and learnt else "")
    return text


def _style(supervised: bool, special: bool) -> str:
    colour = "black on green" if supervised else "dim"
    return f"bold {colour}" if special else colour
