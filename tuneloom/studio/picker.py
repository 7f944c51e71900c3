"""The control to choose a target with: a run and which of its states, an embedded model, or what is typed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nicegui import ui

from tuneloom.errors import UserError
from tuneloom.studio.frame import Studio
from tuneloom.studio.targets import OTHER, Choice, choices, find_choice, states, typed_target
from tuneloom.studio.texts import Texts

Picked = Callable[[str], None]


class TargetPicker:
    """Draws the control; `picked` is called with each target that is chosen, in the form that the command line takes.

    Args:
        studio: whose runs there are to choose from.
        texts: of the visitor.
        target: chosen at first; None: the first there is.
        picked: gets what is chosen.
        adapters_only: leave out what has no adapter.
    """

    def __init__(
        self,
        studio: Studio,
        texts: Texts,
        target: str | None,
        picked: Picked,
        *,
        adapters_only: bool = False,
    ) -> None:
        self._texts = texts
        self._picked = picked
        self._drawing = False
        self._choices = choices(studio, adapters_only=adapters_only)
        chosen = find_choice(self._choices, target)
        if chosen is None and target is None and self._choices:
            chosen = self._choices[0]
            target = chosen.target
        self.target = target if chosen is None or target not in (chosen.key, None) else chosen.target
        self._draw(chosen)

    def _draw(self, chosen: Choice | None) -> None:
        texts = self._texts
        shown = {choice.key: choice.name for choice in self._choices} | {OTHER: texts("target.other")}
        value = chosen.key if chosen else OTHER
        with ui.element("div").classes("target-picker"):
            select = ui.select(shown, value=value, label=texts("target.label"), on_change=lambda e: self._choose(e.value))
            select.props(f'dense outlined options-dense aria-label="{texts("target.label")}"').classes("grow")
            self._state = ui.select({}, label=texts("target.state"), on_change=lambda e: self._choose_state(e.value))
            self._state.props(f'dense outlined options-dense aria-label="{texts("target.state")}"').classes("grow")
            self._typed = ui.input(texts("target.typed"), value="" if chosen else self.target or "")
            self._typed.props(f'dense outlined aria-label="{texts("target.typed")}" maxlength=4096').classes("grow")
            self._typed.on("keydown.enter", self._use_typed)
            self._use = ui.button(texts("target.use"), on_click=self._use_typed).props("flat dense no-caps")
        self._fault = ui.label().classes("bad small")
        self._show(chosen)

    def _show(self, chosen: Choice | None) -> None:
        """Show the controls that go with what is chosen."""
        self._fault.set_visibility(False)
        for element in (self._typed, self._use):
            element.set_visibility(chosen is None)
        there = states(chosen.target) if chosen and chosen.run else {}
        self._state.set_visibility(len(there) > 1)
        if there:
            options = {path: self._state_name(name) for name, path in there.items()}
            current = self.target if self.target in options else next(iter(options))
            self._drawing = True
            self._state.set_options(options, value=current)
            self._drawing = False

    def _state_name(self, name: str) -> str:
        return self._texts("target.adapter") if name == "adapter" else name

    def _choose(self, key: str) -> None:
        chosen = next((choice for choice in self._choices if choice.key == key), None)
        if chosen is not None:
            self.target = chosen.target
        self._show(chosen)
        if chosen is not None:
            self._picked(chosen.target)

    def _choose_state(self, path: str) -> None:
        if self._drawing:
            return
        published = Path(path).name == "adapter"
        self.target = str(Path(path).parent) if published else path
        self._picked(self.target)

    def _use_typed(self) -> None:
        try:
            self.target = typed_target(self._typed.value or "")
        except UserError:
            self._fault.set_text(self._texts("target.none"))
            self._fault.set_visibility(True)
            return
        self._picked(self.target)
