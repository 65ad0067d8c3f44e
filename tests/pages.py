"""Find and run the code on the documentation's pages.

A ``text`` block directly below a ``python`` block is its output. The blocks of a page share their
names, like the cells of a notebook. ``<!-- needs mit_movie -->`` above a block names a test fixture
for data that may be missing.

    python -m tests.pages docs/numerics.md ...    run the pages and write the outputs into them
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(
    r"(?:^<!-- needs (?P<needs>\w+) -->\n\n?)?"
    r"^```python\n(?P<code>.*?)^```\n"
    r"(?:\n?^```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """Code on a page and its output there."""

    line: int  # number of the first line of code, from 1
    code: str
    output: str
    needs: str | None
    span: tuple[int, int]  # characters of code and output in the page


def blocks(text: str) -> Iterator[Block]:
    """The Python blocks of a page, from top to bottom."""
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        output = match["output"] or ""
        yield Block(line, match["code"], output, match["needs"], match.span())


def run(page: Path, block: Block, names: dict[str, object]) -> str:
    """The output of the block. Tracebacks show the line numbers of the page."""
    source = "\n" * (block.line - 1) + block.code
    printed = StringIO()
    with redirect_stdout(printed):
        exec(compile(source, str(page), "exec"), names)
    # Without trailing blanks, which editors remove.
    return "".join(line.rstrip() + "\n" for line in printed.getvalue().splitlines())


def write(page: Path) -> None:
    """Run a page and write the output of its code into it."""
    text = page.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": page.stem}
    pieces, end = [], 0
    for block in blocks(text):
        output = run(page, block, names)
        head = text[block.span[0] : block.span[1]].partition(block.code)[0]
        shown = f"\n```text\n{output}```\n" if output else ""
        pieces += [text[end : block.span[0]], head, block.code, "```\n", shown]
        end = block.span[1]
    page.write_text("".join([*pieces, text[end:]]), encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write(Path(name))
