"""Takes the picture of a report card: `python docs/report_screenshot.py out/demo/dpo` opens the page in Chromium, wide
and light, and dark on a phone.

The run must be there, such as the demo's, and its report.html is made anew. Needs Playwright and a Chromium.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check("requirements-dev.txt")

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from evaluation.report.command import main as make_card
from tests.page_browser import a_browser
from utils.paths import a_path
from utils.terminal import run_main

ROOT = Path(__file__).resolve().parent.parent
HEIGHT, GAP = 1120, 24


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=a_path, nargs="?", default="out/demo/dpo")
    parser.add_argument("--to", type=a_path, default=str(ROOT / "docs" / "images" / "report-card.png"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, a_browser() as browser:
        code = make_card([args.run, "--output", folder])
        if code:
            return code
        shots = [
            _shot(browser, Path(folder), "curves", "part-2", width=1000, color_scheme="light"),
            _shot(browser, Path(folder), "scores", "part-3", width=420, color_scheme="dark", is_mobile=True),
        ]
        pictures = [Image.open(shot).convert("RGB") for shot in shots]
        whole = Image.new("RGB", (sum(one.width for one in pictures) + GAP, HEIGHT), "white")
        at = 0
        for one in pictures:
            whole.paste(one, (at, 0))
            at += one.width + GAP
        # 255 colours are enough for smooth letters.
        whole.quantize(255, dither=Image.Dither.NONE).save(args.to, optimize=True)
    print(args.to, Path(args.to).stat().st_size)
    return 0


def _shot(browser, folder: Path, name: str, place: str, width: int, **options) -> Path:
    """Picture of the page from one of its parts on."""
    context = browser.new_context(viewport={"width": width, "height": HEIGHT}, reduced_motion="reduce", **options)
    page = context.new_page()
    page.goto(f"{(folder / 'report.html').as_uri()}#{place}")
    path = folder / f"{name}.png"
    page.screenshot(path=path)
    return path


if __name__ == "__main__":
    run_main(main)
