"""The charts of a run: losses large, the rest small; each sent anew only when its numbers have changed."""

from __future__ import annotations

from nicegui import ui

from tuneloom.runs import shown_name
from tuneloom.studio.charts import SAVE_PICTURE, Line, Options, line_chart
from tuneloom.studio.run_state import RunLook
from tuneloom.studio.tail import SMOOTHED
from tuneloom.studio.texts import Texts

SMOOTH_COOKIE = "tuneloom_smooth"
SMALL = ("learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gib")
_REMEMBER = (
    f"(value) => {{ document.cookie = '{SMOOTH_COOKIE}=' + Number(value) + '; path=/; samesite=strict; max-age=31536000'; }}"
)


class RunCharts:
    """The charts of one run's page."""

    def __init__(self, look: RunLook, texts: Texts, run_id: str, smooth: bool) -> None:
        self.look = look
        self.texts = texts
        self.run_id = run_id
        self.smooth = smooth
        self._seen: object = None

    def draw(self, *, empty: bool) -> None:
        """Draw them, as they stand or without any line yet."""
        with ui.element("div").classes("panel stack tight"):
            with ui.element("div").classes("line"):
                ui.label(self.texts("run.loss_chart")).classes("strong").props('role="heading" aria-level="2"')
                with ui.element("div").classes("line push"):
                    label = self.texts("run.smooth")
                    switch = ui.switch(label, value=self.smooth, on_change=lambda event: self._switch(event.value))
                    switch.props("dense").on("update:model-value", js_handler=_REMEMBER)
                    picture = ui.button("PNG", icon="download").props(
                        f'flat dense no-caps aria-label="{self.texts("run.png")}"'
                    )
                    place = f"/runs/{self.run_id}/metrics.csv"
                    ui.button("CSV", icon="download").props(
                        f'flat dense no-caps href="{place}" aria-label="{self.texts("run.csv")}"'
                    )
            self.loss = self._chart("run.loss_chart", {} if empty else self._losses(), "run-chart")
            picture.props["data-file"] = f"{shown_name(self.look.path)}-loss.png"
            picture.on("click", js_handler=SAVE_PICTURE)
        with ui.element("div").classes("panel grid2"):
            self.small = {
                name: self._chart(f"run.{name}", {} if empty else self._small(name), "run-chart small") for name in SMALL
            }
        self._seen = None if empty else self._sign()

    def show(self) -> None:
        """Bring them up to date."""
        sign = self._sign()
        if sign == self._seen:
            return
        self._seen = sign
        renew(self.loss, self._losses())
        for name, chart in self.small.items():
            renew(chart, self._small(name))

    def _switch(self, smooth: bool) -> None:
        self.smooth = smooth
        self.show()

    def _sign(self) -> object:
        tail = self.look.tail
        return tail.generation, tail.num_steps(), len(tail.events), self.smooth

    def _chart(self, key: str, options: Options, classes: str) -> ui.echart:
        return ui.echart(options).classes(classes).props(f'role="img" aria-label="{self.texts(key)}"')

    def _losses(self) -> Options:
        curves, texts = self.look.tail.curves(), self.texts
        lines = [Line(texts("run.train_loss"), curves["loss"].raw.points(), "--accent", faint=self.smooth)]
        if self.smooth:
            lines.append(Line(texts("run.smoothed"), curves["loss"].smooth.points(), "--accent"))
        lines.append(Line(texts("run.eval_loss"), curves["eval_loss"].raw.points(), "--base", marked=True))
        return line_chart(lines, total_steps=self.look.tail.total_steps(), legend=True)

    def _small(self, name: str) -> Options:
        curve, title = self.look.tail.curves()[name], self.texts(f"run.{name}")
        smooth = self.smooth and name in SMOOTHED
        lines = [Line(title, curve.raw.points(), "--accent", faint=smooth)]
        if smooth:
            lines.append(Line(self.texts("run.smoothed"), curve.smooth.points(), "--accent"))
        return line_chart(lines, title=title, total_steps=self.look.tail.total_steps())


def renew(chart: ui.echart, options: Options) -> None:
    """Replace what a chart shows."""
    chart.options.clear()
    chart.options.update(options)
    chart.update()
