"""The documentation: its code prints what the pages show, its links resolve, its site builds."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.pages import BLOCK, ROOT, blocks, run

DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if BLOCK.search(page.read_text("utf-8")))
TEXTS = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("notebooks/*.ipynb"))]
LINK = re.compile(r"\]\(([^()\s]+)\)")
ARXIV = re.compile(r"arXiv[: ](\S+?)[),.;]*(?=\s|$)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
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
            f"{page.name}:{block.line}: to accept: python -m tests.pages docs/{page.name}"
        )


def test_every_page_with_code_is_found() -> None:
    fences = {page.name for page in DOCS.glob("*.md") if "```python" in page.read_text("utf-8")}
    assert {page.name for page in PAGES} == fences
    assert {"reading-order.md", "numerics.md", "optimiser.md"} <= fences
    for page in PAGES:
        text = page.read_text("utf-8")
        assert text.count("```python\n") == len(list(blocks(text)))
        assert text.count("```text\n") == sum(bool(block.output) for block in blocks(text))


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """MyST warns of broken links between pages and to headings."""
    sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    built = subprocess.run([*sphinx, DOCS, tmp_path], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in DOCS.glob("*.md"):
        html = (tmp_path / f"{page.stem}.html").read_text("utf-8")
        fetched = re.findall(r'<(?:script|img|iframe)[^>]+src="(?!_static/|_images/)([^"]+)"', html)
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
