"""Start-up: a command imports nothing that it does not use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import python, small_checkpoint

from minibert.speed.cuda import ladder

TAG = "import sys; from minibert.cli import main; main(['tag', sys.argv[1], 'who directed jaws'])"


@pytest.mark.parametrize(
    ("program", "unused"),
    [
        ("from minibert import cli; cli._parser()", {"torch"}),
        (
            "from minibert import Tagger",
            {"transformers", "matplotlib", "tokenizers", "safetensors"},
        ),
        # torch's compiler takes as long to import as the rest of torch.
        (TAG, {"torch._dynamo", "sympy", "transformers", "matplotlib"}),
    ],
    ids=["help", "import", "tag"],
)
def test_only_what_is_used_is_imported(program: str, unused: set[str], tmp_path: Path) -> None:
    small_checkpoint(tmp_path)
    *tagged, imported = python(
        "-c", f"{program}; import sys; print({unused} & sys.modules.keys())", tmp_path
    ).splitlines()
    assert imported == "set()"
    assert program != TAG or "directed" in tagged[0]


def test_the_rung_is_a_constant_to_the_compiler() -> None:
    @torch.compiler.assume_constant_result
    def marked() -> None:
        pass

    assert vars(ladder.name_of_rung) == vars(marked)
