"""Pictures of every view of the running studio, in both languages: docs/images/studio-<view>-<en|zh>.png.

python benchmarks/studio_screenshots.py --runs-dir runs --run ada --fill chat predict export [--out docs/images]
python benchmarks/studio_screenshots.py --runs-dir runs --out look --themes light dark --widths 1440 1024 360

The runs are shown as they are; the first finished one, or the one that is named, has its page shown. With --fill it is
first asked two questions, predicts a few rows or is exported, so that these views have something to show.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from studio_start import started

VIEWS = {"new": "/", "runs": "/runs", "run": "/runs/{run}"} | {
    view: f"/{view}?target={{run}}" for view in ("chat", "predict", "export")
}
QUESTIONS = ("What is the capital of France?", "Who are you?")
LANGUAGES = ("en", "zh")
WIDTH, HEIGHT = 1440, 900


def main() -> None:
    """Start a studio on a folder of runs, and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", type=Path, required=True)
    parser.add_argument("--run", help="name of the run whose page is shown")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--themes", nargs="+", default=["light"], choices=["light", "dark"])
    parser.add_argument("--widths", nargs="+", type=int, default=[WIDTH])
    parser.add_argument("--views", nargs="+", default=list(VIEWS), choices=VIEWS)
    parser.add_argument("--fill", nargs="*", default=[], choices=["chat", "predict", "export"], help="do these first")
    parser.add_argument("--wait", type=float, default=2.0, help="seconds that a view has to fill itself")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    given = parser.parse_args()
    from playwright.sync_api import sync_playwright

    given.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver, started(str(given.runs_dir)) as url:
        browser = driver.chromium.launch(executable_path=given.chromium, args=["--no-sandbox", "--disable-quic"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, reduced_motion="reduce")
        page.goto(url)
        page.wait_for_url(lambda place: "token=" not in place)
        base = f"http://{urlsplit(url).netloc}"
        page.set_default_timeout(300_000)
        for what in given.fill:
            FILLS[what](page, base, run_id(given.runs_dir, given.run))
        take(page, base, given)
        browser.close()


def talk(page: Any, base: str, run: str) -> None:
    """Ask a run and its base the questions."""
    visit(page, f"{base}/choose?language=en&theme=light&back=/studio.css", f"{base}/chat?target={run}")
    for number, question in enumerate(QUESTIONS, start=1):
        page.get_by_label("Message").fill(question)
        page.keyboard.press("Enter")
        page.wait_for_function("count => document.querySelectorAll('.chat-answer .chat-text').length === count", arg=2 * number)
        page.locator("button:not([disabled])", has_text="Regenerate").wait_for()


def predict(page: Any, base: str, run: str) -> None:
    """Let a run answer a few rows of the built-in set."""
    visit(page, f"{base}/choose?language=en&theme=light&back=/studio.css", f"{base}/predict?target={run}")
    page.get_by_label("Rows at most").fill("6")
    page.get_by_label("Longest answer, tokens").fill("48")
    page.get_by_role("button", name="Start", exact=True).click()
    page.get_by_text("Perplexity").first.wait_for()


def export(page: Any, base: str, run: str) -> None:
    """Merge a run into its base."""
    visit(page, f"{base}/choose?language=en&theme=light&back=/studio.css", f"{base}/export?target={run}")
    page.get_by_role("button", name="Export", exact=True).click()
    page.get_by_text("Checked:").first.wait_for()


FILLS = {"chat": talk, "predict": predict, "export": export}


def visit(page: Any, *addresses: str) -> None:
    """Open addresses one after the other, the last one till its buttons do something."""
    for address in addresses:
        page.goto(address)
    page.wait_for_function("window.socket?.connected === true && window.did_handshake")


def take(page: Any, base: str, given: argparse.Namespace) -> None:
    """Take each view in each language, theme and width."""
    run = run_id(given.runs_dir, given.run)
    for language in LANGUAGES:
        for theme in given.themes:
            page.goto(f"{base}/choose?language={language}&theme={theme}&back=/studio.css")
            for width in given.widths:
                page.set_viewport_size({"width": width, "height": HEIGHT})
                for view in given.views:
                    visit(page, base + VIEWS[view].format(run=run))
                    if view in ("predict", "export") and (past := page.locator("a.job-line")).count():
                        visit(page, base + str(past.first.get_attribute("href")))
                    page.wait_for_timeout(given.wait * 1000)
                    usual = (theme, width) == ("light", WIDTH)
                    name = f"studio-{view}-{language}{'' if usual else f'-{theme}-{width}'}.png"
                    page.screenshot(path=given.out / name, full_page=not usual)
                    print(given.out / name)


def run_id(runs: Path, name: str | None) -> str:
    """Return the id of a run by its name, of the newest finished one without; "none" where there is none."""
    from tuneloom.runs import list_runs
    from tuneloom.studio.frame import id_of

    found = list_runs(runs).runs
    chosen = [run for run in found if (run.name == name if name else run.phase == "done")]
    return id_of(chosen[0].path) if chosen else "none"


if __name__ == "__main__":
    main()
