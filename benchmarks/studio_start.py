"""How quickly the studio is there: from the command to its address, and from the address to a page that answers.

python benchmarks/studio_start.py [--rounds 3] [--chromium /usr/bin/chromium]
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Round:
    """Seconds and bytes of one start.

    Attributes:
        address: from the command to the printed address.
        answer: from the command to the first answered request.
        painted: from opening the address to the first content painted, the exchange of the token included.
        interactive: from opening the address to the connected page, whose buttons do something.
        num_bytes: that the first screen took.
        num_requests: that it made.
    """

    address: float
    answer: float
    painted: float
    interactive: float
    num_bytes: int
    num_requests: int


def main() -> None:
    """Measure, and print the median of the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    given = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=given.chromium, args=["--no-sandbox", "--disable-quic"])
        rounds = [measure(browser) for _ in range(given.rounds)]
        browser.close()
    for name, unit, wanted in (
        ("address", "s", "below 2"),
        ("answer", "s", "below 2"),
        ("painted", "s", ""),
        ("interactive", "s", "below 1.5"),
        ("num_bytes", "bytes", ""),
        ("num_requests", "", ""),
    ):
        values = [getattr(one, name) for one in rounds]
        shown = ", ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in values)
        print(f"{name:13} median {statistics.median(values):10.2f} {unit:6} {wanted:10} ({shown})")


def measure(browser: Any) -> Round:
    """Start a studio, open its first screen with nothing cached, end it."""
    with tempfile.TemporaryDirectory() as runs:
        begin = time.perf_counter()
        with started(runs) as url:
            address = time.perf_counter() - begin
            return opened(browser, url, begin, address)


@contextlib.contextmanager
def started(runs: str) -> Iterator[str]:
    """Run a studio on a folder of runs; yield its address with the token."""
    words = [sys.executable, "-m", "tuneloom", "studio", "--port", "0", "--runs-dir", runs]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield next(line.strip() for line in process.stdout if "?token=" in line)
    finally:
        process.terminate()
        process.wait()


def opened(browser: Any, url: str, begin: float, address: float) -> Round:
    """Open the address and wait until its page is connected."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    network = context.new_cdp_session(page)
    network.send("Network.enable")
    sizes: list[float] = []
    network.on("Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"]))
    click = time.perf_counter()
    page.goto(url, wait_until="commit")
    answer = time.perf_counter() - begin
    page.wait_for_url(lambda place: "token=" not in place, wait_until="commit")
    page.wait_for_function("window.socket?.connected === true && window.did_handshake", polling=10)
    interactive = time.perf_counter() - click
    since = time.perf_counter()
    page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length > 0", polling=10)
    late = time.perf_counter() - since
    painted = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime - performance.now()") / 1000
    context.close()
    return Round(address, answer, interactive + late + painted, interactive, int(sum(sizes)), len(sizes))


if __name__ == "__main__":
    main()
