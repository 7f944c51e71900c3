"""The studio starts with one address, is quick to show, and talks to nothing but itself."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from .conftest import RunningStudio, Visit

pytestmark = pytest.mark.browser


def test_the_terminal_shows_one_address_with_a_token(studio: RunningStudio) -> None:
    assert re.findall(r"http\S+", studio.said()) == [studio.url]
    assert re.fullmatch(rf"http://127\.0\.0\.1:{studio.port}/\?token=[\w-]{{32}}", studio.url)


@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_every_view_opens_without_an_error_or_a_foreign_request(
    studio: RunningStudio, visit: Callable[..., Visit], language: str
) -> None:
    visitor = visit(studio, locale=language)
    for place in ("/", "/runs", "/chat", "/predict", "/export"):
        page = visitor.open(place)
        assert page.locator("header.top nav a").count() >= 5
        assert page.locator("header.top nav a[aria-current=page]").get_attribute("href") == place
    visitor.page.wait_for_timeout(300)
