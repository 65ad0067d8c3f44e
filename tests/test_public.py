"""The public surface: what an editor, a type checker and ``dir`` see of minibert."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import minibert

PROGRAM = """
from collections.abc import Iterator

import torch

import minibert
from minibert import BertConfig, BertForMaskedLM, BertForTokenClassification, Embedder, Entity
from minibert import Label, MinibertError, Packed, Tagger, Tokenizer, evaluate


def tag(directory: str, texts: list[str]) -> list[list[Entity]]:
    tagger = Tagger.from_pretrained(directory, dtype=torch.float32)
    one: list[Entity] = tagger(texts[0])
    several: list[list[Entity]] = tagger(texts)
    words: Iterator[list[Entity]] = tagger.tag_words([["who", "directed", "jaws"]])
    labels: Iterator[list[Label]] = tagger.label([["who"]])
    print([entity.text.upper() for entity in one], next(words), next(labels)[0].score)
    return several


def embed(directory: str, texts: list[str]) -> Iterator[torch.Tensor]:
    embedder = Embedder.from_pretrained(directory)
    print(embedder(texts[0]) @ embedder(texts).T, embedder.size)
    return embedder.embed_texts(texts)


def run(directory: str) -> torch.Tensor:
    model = BertForTokenClassification.from_pretrained(directory, dtype="fp32", num_labels=3)
    with minibert.trace(model) as t:
        output = model(torch.tensor([1, 2, 3]), layout=Packed.from_lengths([3]))
    print(t.axes("logits"), output.loss, model.device, model.dtype)
    masked = BertForMaskedLM(BertConfig(hidden_size=24, num_attention_heads=2), "eager")
    print(Tokenizer.from_pretrained(directory).vocab_size, masked.head.norm.eps)
    logits: torch.Tensor = output.logits
    return logits


try:
    run("minilm")
except MinibertError as error:
    print(error, minibert.__version__)
print(evaluate, minibert.compare)
"""


def test_mypy_strict_accepts_a_typed_program_and_refuses_a_wrong_one(tmp_path: Path) -> None:
    wrong = "from minibert import Tagger\nn: int = Tagger.from_pretrained('x')('jaws')[0].score\n"
    (tmp_path / "user.py").write_text(PROGRAM)
    (tmp_path / "wrong.py").write_text(wrong)
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports", "silent", "."],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(Path(minibert.__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    errors = [line for line in ran.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, ran.stdout
    assert errors[0].startswith("wrong.py:2: error: Incompatible types")


def test_dir_shows_every_name_and_each_can_be_imported() -> None:
    assert set(minibert.__all__) == set(minibert._HOME) <= set(dir(minibert))
    source = Path(minibert.__file__).read_text()
    typed = source[source.index("if TYPE_CHECKING") : source.index("_HOME")]
    for name, home in minibert._HOME.items():
        assert f"minibert.{home} import" in typed
        assert name in typed
        assert getattr(minibert, name).__module__ == f"minibert.{home}"
    assert (Path(minibert.__file__).parent / "py.typed").is_file()
