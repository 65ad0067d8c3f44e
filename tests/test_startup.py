"""Start-up: the tag command imports nothing that it does not use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from builders import small_checkpoint

from minibert.speed.cuda import ladder

TAG = """
import sys
from minibert.cli import main
main(["tag", sys.argv[1], "who directed jaws"])
print(*sorted({"torch._dynamo", "sympy", "transformers", "matplotlib"} & sys.modules.keys()))
"""


def test_tagging_imports_no_compiler(tmp_path: Path) -> None:
    """torch's compiler takes as long to import as the rest of torch."""
    small_checkpoint(tmp_path)
    command = [sys.executable, "-c", TAG, tmp_path]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    tagged, imported = ran.stdout.splitlines()
    assert "directed" in tagged
    assert imported == ""


def test_the_rung_is_a_constant_to_the_compiler() -> None:
    @torch.compiler.assume_constant_result
    def marked() -> None:
        pass

    assert vars(ladder.name_of_rung) == vars(marked)
