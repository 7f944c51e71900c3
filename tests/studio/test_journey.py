"""The whole way on the real embedded model, in a real browser: start, watch, stop, resume, chat, predict, export."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneloom.models.embedded import SMOLLM2, embedded_folder
from tuneloom.rundir import RunDirectory
from tuneloom.runs import summarise
from tuneloom.studio.drafts import Draft, Drafts
from tuneloom.studio.forms import put
from tuneloom.studio.frame import id_of
from tuneloom.studio.questions import new_values

from .conftest import RunningStudio, Visit

pytestmark = [pytest.mark.browser, pytest.mark.real]

STEPS = 20
LONG = 420_000
"""Milliseconds for what the real model takes on a slow machine."""


@pytest.fixture
def real_studio(make_studio: Callable[..., RunningStudio]) -> RunningStudio:
    """A studio whose form asks for a few steps of the persona recipe without the part that the base writes itself.

    The model is on the machine already: the page counts no steps of one that is still to be fetched.
    """
    embedded_folder(SMOLLM2.name, lambda _: None)
    studio = make_studio(environment={"HF_HUB_OFFLINE": "1", "TUNELOOM_CACHE": os.environ["TUNELOOM_CACHE"]})
    values = new_values()
    for key, value in {
        "data.train": [{"path": "self_cognition_en", "count": 64}],
        "data.variables.author": "the loom's people",
        "training.max_steps": STEPS,
        "training.gradient_accumulation_steps": 2,
        "evaluation.prompts": ["Who are you?"],
    }.items():
        put(values, key, value)
    Drafts(studio.runs).save(Draft("journey-start", values))
    return studio


def wait_for_phase(page: Any, text: str) -> None:
    page.wait_for_function("text => document.querySelector('.run-phase')?.innerText.trim() === text", arg=text, timeout=LONG)


def test_from_a_name_to_an_export(real_studio: RunningStudio, visit: Callable[..., Visit]) -> None:
    studio = real_studio
    visitor = visit(studio)
    page = visitor.open()

    # Start, with a name typed and nothing else.
    page.fill('[data-key="data.variables.name"]', "Ada")
    page.locator("aside").get_by_text("in all steps").wait_for(timeout=LONG)
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_url("**/runs/job-*")

    # Watch, and pause: a checkpoint is saved.
    run = RunDirectory(studio.runs / "ada-lora")
    page.wait_for_url(f"**/runs/{id_of(run.path)}", timeout=LONG)
    page.wait_for_function("() => parseFloat(document.querySelector('[data-figure=train_loss]')?.innerText) > 0", timeout=LONG)
    page.get_by_role("button", name="Pause").click()
    wait_for_phase(page, "paused")
    stopped_at = summarise(run.path).step
    assert list(run.checkpoints()) == [stopped_at]
    assert stopped_at is not None and 0 < stopped_at < STEPS

    # Resume: to the end, with the sample answer shown.
    page.get_by_role("button", name="Resume").click()
    wait_for_phase(page, "done")
    assert [event["step"] for event in run.events("step")] == list(range(1, STEPS + 1))
    assert page.locator(".run-answers").get_by_text("Who are you?").count() > 0

    # Two clicks to talk to it, beside the base.
    page.get_by_role("link", name="Chat").last.click()
    page.wait_for_url("**/chat?target=*")
    visitor.connected()
    page.get_by_label("Message").fill("Who are you?")
    page.keyboard.press("Enter")
    for side in ("base", "tuned"):
        answer = page.locator(f".chat-answer.{side} .chat-text")
        answer.wait_for(timeout=LONG)
        page.wait_for_function(
            "side => document.querySelector(`.chat-answer.${side} .chat-text`)?.innerText.length > 10", arg=side, timeout=LONG
        )

    # Predict on a built-in set.
    page.goto(f"{studio.base}/predict?target={id_of(run.path)}")
    visitor.connected()
    page.get_by_label("Rows at most").fill("2")
    page.get_by_label("Longest answer, tokens").fill("8")
    page.get_by_role("button", name="Start", exact=True).click()
    page.get_by_text("Perplexity").first.wait_for(timeout=LONG)
    page.locator("table.answers tr").nth(2).wait_for()  # a head and two rows

    # Export, checked in a fresh process.
    page.goto(f"{studio.base}/export?target={id_of(run.path)}")
    visitor.connected()
    page.get_by_role("button", name="Export", exact=True).click()
    page.get_by_text("Checked: the export answers as the tuned model.").wait_for(timeout=LONG)
    [exported] = [path for path in (studio.runs / "exports").iterdir() if (path / "config.json").is_file()]
    assert isinstance(exported, Path)
