"""From the shell to the first tagged sentence: nothing is imported that is not used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from minibert import BertForTokenClassification
from minibert.speed.cuda import ladder

TAG = """
import sys
from minibert.cli import main
main(["tag", sys.argv[1], "who directed jaws"])
print(*sorted({"torch._dynamo", "sympy", "transformers", "matplotlib"} & sys.modules.keys()))
"""


def test_tagging_imports_no_compiler(minilm: Path, tmp_path: Path) -> None:
    """torch's takes as long to import as all the rest of torch."""
    model = BertForTokenClassification.from_pretrained(minilm, labels=["O", "B-X"], seed=0)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((minilm / name).read_bytes())
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
