"""Pictures of every view of the running studio, in both languages: docs/images/studio-<view>-<en|zh>.png.

python benchmarks/studio_screenshots.py --runs-dir runs [--run ada] [--out docs/images]
python benchmarks/studio_screenshots.py --runs-dir runs --out look --themes light dark --widths 1440 1024 360

The runs are shown as they are; the first finished one, or the one that is named, has its page shown.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from studio_start import started

VIEWS = {"new": "/", "runs": "/runs", "run": "/runs/{run}", "chat": "/chat", "predict": "/predict", "export": "/export"}
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
        take(page, f"http://{urlsplit(url).netloc}", given)
        browser.close()


def take(page: Any, base: str, given: argparse.Namespace) -> None:
    """Take each view in each language, theme and width."""
    run = run_id(given.runs_dir, given.run)
    for language in LANGUAGES:
        for theme in given.themes:
            page.goto(f"{base}/choose?language={language}&theme={theme}&back=/studio.css")
            for width in given.widths:
                page.set_viewport_size({"width": width, "height": HEIGHT})
                for view in given.views:
                    page.goto(base + VIEWS[view].format(run=run))
                    page.wait_for_function("window.socket?.connected === true && window.did_handshake")
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
