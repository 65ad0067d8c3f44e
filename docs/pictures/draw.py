"""Draw README.md's pictures from the run of `make demo`: `make pictures`. Needs Chromium.

The PNGs are reduced to a palette, which makes them a third of the size.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from playwright.sync_api import sync_playwright

from minibert import cli

RUN = Path("runs/demo")
HERE = Path(__file__).parent
TEXT = "who directed the frozen station with irene zimmer"
SIZE = {"width": 1100, "height": 900}  # CSS pixels
COLOURS = 64


def main() -> None:
    """Write trace.png and loss.png beside this file."""
    with TemporaryDirectory() as scratch:
        page = Path(scratch) / "page.html"
        if status := cli.main(["trace", str(RUN), TEXT, "--html", str(page)]):
            sys.exit(status)
        picture = Path(scratch) / "trace.png"
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            opened = browser.new_page(viewport=SIZE)
            opened.goto(page.as_uri())
            opened.wait_for_selector("#strongest li")
            opened.screenshot(path=picture)
            browser.close()
        reduce(picture, HERE / "trace.png")
    reduce(RUN / "loss.png", HERE / "loss.png")


def reduce(source: Path, target: Path) -> None:
    """Save a picture with ``COLOURS`` colours."""
    with Image.open(source) as image:
        image.convert("RGB").quantize(COLOURS).save(target, optimize=True)
    print(f"{target}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
