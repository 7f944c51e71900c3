"""What training looks like in a terminal: the numbers first, then a live bar, answers as they change."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

if TYPE_CHECKING:
    from tuneloom.train.resume import ResumePoint

_PLAIN_EVERY_SECONDS = 5.0


class TrainingView:
    """Shows a run's events; a live bar on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self._live = self._console.is_terminal
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_plain = 0.0

    def __enter__(self) -> TrainingView:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Print one line above the bar."""
        self._console.print(Text(line, style="dim"))

    def say_resume(self, point: ResumePoint) -> None:
        """Say where a resumed run goes on, and which checkpoints were passed over."""
        for fault in point.skipped:
            self.say(f"skipped {fault}")
        self.say(f"resuming {point.run.path} from {point.checkpoint.name if point.checkpoint else 'its first step'}")

    def show_job(self, event: str, fields: dict[str, Any]) -> None:
        """Print every derived number of a job."""
        del event
        for label, value in fields["job"].summary():
            self._console.print(Text.assemble((f"{label:>16}  ", "bold"), value))
        for problem in fields["job"].data.report.problems[:10]:
            self._console.print(Text(f"{problem.action:>16}  {problem}", style="yellow"))

    def show(self, event: str, fields: dict[str, Any]) -> None:
        """Show one event."""
        shower = getattr(self, f"_show_{event}", None)
        if shower:
            shower(fields)

    def _show_progress(self, fields: dict[str, Any]) -> None:
        left = _clock(fields["eta_seconds"])
        figures = f"loss {fields['loss']:.3f}  {fields['tokens_per_second']:,.0f} tokens/s  eta {left}"
        self._advance("training", fields["step"], fields["total"], figures)

    def _show_within(self, fields: dict[str, Any]) -> None:
        self._advance(fields["what"], fields["done"], fields["total"], "")
        if fields["done"] == fields["total"] and self._live:
            self._bar.remove_task(self._tasks.pop(fields["what"]))

    def _show_eval(self, fields: dict[str, Any]) -> None:
        names = ("eval_loss", "perplexity", "rouge-1", "rouge-2", "rouge-l", "bleu-4")
        found = "  ".join(f"{name} {fields[name]:.4g}" for name in names if name in fields)
        self._console.print(Text(f"step {fields['step']}: {found}", style="cyan"))

    def _show_test(self, fields: dict[str, Any]) -> None:
        self._show_eval(fields)

    def _show_sample(self, fields: dict[str, Any]) -> None:
        answer = " ".join(fields["answer"].split())
        self._console.print(Text.assemble((f"step {fields['step']}: ", "dim"), f"{fields['prompt']} → ", (answer, "green")))

    def _show_early_stop(self, fields: dict[str, Any]) -> None:
        self._console.print(Text(f"step {fields['step']}: ended early: {fields['message']}", style="cyan"))

    def _show_warning(self, fields: dict[str, Any]) -> None:
        self._console.print(Text(f"warning: {fields['message']}", style="yellow"))

    def _show_checkpoint(self, fields: dict[str, Any]) -> None:
        if fields["action"] == "saved":
            self.say(f"step {fields['step']}: saved {fields['path']}")

    def _advance(self, name: str, done: int, total: int, figures: str) -> None:
        if self._live:
            if name not in self._tasks:
                self._tasks[name] = self._bar.add_task(name, total=total, figures="")
            self._bar.update(self._tasks[name], completed=done, total=total, figures=figures)
        elif time.monotonic() - self._last_plain > _PLAIN_EVERY_SECONDS or done == total:
            self._last_plain = time.monotonic()
            self._console.print(f"{name} {done}/{total}  {figures}".rstrip())


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02d}"
