"""The documentation: its code prints what the pages show, its links resolve, its site builds."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import minibert
from tests.builders import minilm_checkpoint
from tests.pages import BLOCK, ROOT, blocks, run

DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if BLOCK.search(page.read_text("utf-8")))
README = ROOT / "README.md"
TEXTS = [README, *sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("notebooks/*.ipynb"))]
LINK = re.compile(r"\]\(([^()\s]+)\)")
ARXIV = re.compile(r"arXiv[: ](\S+?)[),.;]*(?=\s|$)")


@pytest.fixture
def demo_run(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory with the run of `make demo`, untrained."""
    minilm_checkpoint(minilm, tmp_path / "runs" / "demo" / "best", ("O", "B-TITLE", "I-TITLE"))
    (tmp_path / "runs" / "demo" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_the_code_on_a_page_prints_what_the_page_says(
    page: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {"__name__": page.stem}
    found = list(blocks(page.read_text("utf-8")))
    # Blocks that may skip the test run last.
    for block in sorted(found, key=lambda block: block.needs is not None):
        if block.needs is not None:
            request.getfixturevalue(block.needs)
        assert run(page, block, names) == block.output, (
            f"{page.name}:{block.line}: to accept: python -m tests.pages {page.relative_to(ROOT)}"
        )


def test_every_page_with_code_is_found() -> None:
    fences = {page.name for page in DOCS.glob("*.md") if "```python" in page.read_text("utf-8")}
    assert {page.name for page in PAGES} == fences
    assert {"reading-order.md", "numerics.md", "optimiser.md"} <= fences
    for page in PAGES:
        text = page.read_text("utf-8")
        assert text.count("```python\n") == len(list(blocks(text)))
        assert text.count("```text\n") == sum(bool(block.output) for block in blocks(text))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. MyST warns of broken links between pages and to headings."""
    folder = tmp_path_factory.mktemp("site")
    sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    built = subprocess.run([*sphinx, DOCS, folder], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_builds_without_a_warning_and_reads_offline(site: Path) -> None:
    for page in DOCS.glob("*.md"):
        html = (site / f"{page.stem}.html").read_text("utf-8")
        local = "(?!_static/|_images/)"
        fetched = re.findall(rf'<(?:script|img|iframe)[^>]+src="{local}([^"]+)"', html)
        fetched += re.findall(r'<link[^>]+rel="stylesheet"[^>]+href="(?!_static/)([^"]+)"', html)
        assert not fetched, "the site must read without a network"


def test_the_flowchart_is_what_its_script_draws_and_names_files() -> None:
    drawn = runpy.run_path(str(DOCS / "flowchart.py"))
    assert drawn["TARGET"].read_text("utf-8") == drawn["drawing"]()
    for _, _, files in drawn["BOXES"].values():
        folder = ROOT / "minibert"
        for name in files.split(", "):
            folder = folder if "/" not in name else (ROOT / "minibert" / name).parent
            assert (folder / Path(name).name).exists() or (ROOT / "minibert" / name).is_dir(), name


def test_the_api_page_has_every_public_name(site: Path) -> None:
    html = (site / "api.html").read_text("utf-8")
    for name in minibert.__all__:
        assert re.search(rf'id="minibert\.([\w.]+\.)?{name}"', html), name


def test_no_page_scrolls_sideways(site: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no browser: apt-get install chromium, then the site is tested too")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page()
        for name in ("index", "api", "numerics", "speed"):
            page.goto((site / f"{name}.html").as_uri())
            for width in (375, 1000, 1311, 1312, 1344, 1376, 1408, 1440, 1600):
                page.set_viewport_size({"width": width, "height": 800})
                wide = page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, f"{name}.html at {width} pixels"
        browser.close()


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    """Linked files exist, and URLs are well-formed."""
    text = page.read_text("utf-8")
    for target in LINK.findall(text):
        address = urlsplit(target)
        if address.scheme:
            assert address.scheme == "https", target
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", address.netloc), target
        elif address.path:
            assert (page.parent / address.path).exists(), f"{page.name}: {target}"
    for number in ARXIV.findall(text):
        assert re.fullmatch(r"\d{4}\.\d{4,5}", number), f"{page.name}: arXiv {number}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_named_on_a_page_exist(page: Path) -> None:
    named = re.findall(
        r"`((?:minibert|tests|benchmarks|notebooks)/[\w/.-]+)`", page.read_text("utf-8")
    )
    for name in named:
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_the_commands_of_the_readme_exist(command: Callable, capsys: pytest.CaptureFixture) -> None:
    shown = re.findall(r"^minibert (\w+)", README.read_text("utf-8"), flags=re.MULTILINE)
    assert {"tag", "train", "convert", "evaluate", "trace", "parity", "info"} <= set(shown)
    for name in set(shown):
        with pytest.raises(SystemExit, match="0"):
            command(name, "--help")
    extras = re.search(r"'\.\[([\w,]+)\]'", README.read_text("utf-8")).group(1).split(",")
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert all(re.search(rf"^{extra} = \[", project, flags=re.MULTILINE) for extra in extras)
