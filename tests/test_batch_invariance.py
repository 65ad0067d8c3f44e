"""A sentence gets the same bits, whatever is tagged with it (CPU, prepacked layers)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from builders import PIECES, no_bf16_kernel, no_kernels, small_bert, small_checkpoint

from minibert import Tagger
from minibert.speed import prepacked
from minibert.speed.cpu.panels import Bf16Panels, BytePanels, FloatPanels, HalfPanels, Panels
from minibert.speed.linear import BlockedLinear, ByteLinear
from minibert.text.batches import Example, packed, rounded

# MiniLM's shape, so that the products are those of a real model; two layers, to be quick.
SHAPE = {
    "hidden_size": 384,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
}
DTYPES = ["auto", "fp32", "bf16", "int8"]
LETTERS = PIECES[5:31]


@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.slow), 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("model"), noise=0.05, **SHAPE)


@pytest.fixture(params=DTYPES)
def tagger(request: pytest.FixtureRequest, directory: Path) -> Tagger:
    if request.param == "int8" and not prepacked.choose_int8(torch.device("cpu")).value:
        pytest.skip("int8 cannot run here")
    found = Tagger.from_pretrained(directory, dtype=request.param, device="cpu")
    if not isinstance(found.model.bert.layers[0], prepacked.PrepackedLayer):
        pytest.skip(f"no prepacked layers in {request.param} on this CPU")
    return found


def check_groupings(tagger: Tagger, draw: random.Random, longest: int, groupings: int) -> None:
    """Tag random subsets in random order and batch size; compare with every sentence alone."""
    lengths = [draw.randint(1, longest) if draw.random() < 0.2 else draw.randint(1, 14)
               for _ in range(60)]  # fmt: skip
    sentences = [draw.choices(LETTERS, k=length) for length in lengths]
    alone = [tagger.start_scores([sentence])()[0] for sentence in sentences]
    for _ in range(groupings):
        tagger.batch_tokens = draw.choice([64, 300, 2048])
        chosen = draw.sample(range(len(sentences)), draw.randint(2, len(sentences)))
        together = tagger.start_scores([sentences[i] for i in chosen])()
        for i, scores in zip(chosen, together, strict=True):
            assert torch.equal(scores, alone[i]), f"{lengths[i]} words"


def test_every_grouping_gives_the_same_bits(tagger: Tagger, threads: int) -> None:
    check_groupings(tagger, random.Random(threads), longest=200, groupings=4)


@pytest.mark.skipif(not prepacked.AVX2, reason="only shown with AVX2 alone")
def test_every_number_of_threads_gives_the_same_bits(tagger: Tagger) -> None:
    """A long batch, whose products are shared by the threads, and a short one."""
    draw = random.Random(0)
    long = [draw.choices(LETTERS, k=draw.randint(1, 40)) for _ in range(60)]
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append([*tagger.start_scores(long)(), *tagger.start_scores(long[:1])()])
    torch.set_num_threads(before)
    for scores in zip(*found, strict=True):
        assert torch.equal(scores[0], scores[1])
        assert torch.equal(scores[0], scores[2])


@pytest.mark.slow
def test_a_thousand_groupings_give_the_same_bits(tagger: Tagger, threads: int) -> None:
    """Windows of a long text included."""
    for seed in range(25):
        check_groupings(tagger, random.Random(seed), longest=600, groupings=40)


@pytest.mark.parametrize(
    "linear", [BlockedLinear, ByteLinear, FloatPanels, HalfPanels, BytePanels, Bf16Panels]
)
@pytest.mark.parametrize(("inner", "outer"), [(384, 1152), (3072, 768), (384, 5)])
@torch.inference_mode()
def test_a_row_of_a_product_does_not_depend_on_the_number_of_rows(
    linear: type, inner: int, outer: int, threads: int
) -> None:
    """For the numbers of rows that batches have, and any place among them.

    For torch's libraries they are filled up.
    """
    if issubclass(linear, Panels) and no_kernels:
        pytest.skip(no_kernels)
    if linear is Bf16Panels and no_bf16_kernel:
        pytest.skip(no_bf16_kernel)
    if linear is ByteLinear and not prepacked.choose_int8(torch.device("cpu")).value:
        pytest.skip("int8 cannot run here")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if linear is Bf16Panels else torch.float32
    layer = linear(torch.randn(outer, inner, dtype=dtype) / 20, torch.randn(outer, dtype=dtype))
    x = torch.randn(rounded(250), inner, dtype=dtype)
    residual = torch.randn(len(x), outer, dtype=dtype)
    whole, gelu, plus = layer(x), layer.gelu(x), layer.plus(x, residual)
    filled = {rounded(n) for n in range(1, len(x), 7)}
    for rows in range(1, 30) if issubclass(linear, Panels) else sorted(filled):
        for start in (0, len(x) - rows):
            part = slice(start, start + rows)
            assert torch.equal(layer(x[part]), whole[part]), rows
            assert torch.equal(layer.gelu(x[part]), gelu[part]), rows
            assert torch.equal(layer.plus(x[part], residual[part]), plus[part]), rows


def test_training_does_not_depend_on_the_order_in_a_batch() -> None:
    """Packed, without dropout. Sentences of unequal lengths: no bit changes."""
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = small_bert(noise=0.05, **none).double().train()
    draw = random.Random(0)

    def step(examples: list[Example]) -> list[torch.Tensor]:
        model.zero_grad()
        loss = model(**packed(examples).inputs).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    for unequal in (True, False):
        lengths = range(3, 23) if unequal else [3 + i % 4 for i in range(20)]
        examples = [
            Example(tuple(draw.choices(range(5, 31), k=n)), tuple(range(n)), i, 0, (i % 3,) * n)
            for i, n in enumerate(lengths)
        ]
        expected = step(examples)
        for _ in range(3):
            found = step(draw.sample(examples, len(examples)))
            if unequal:
                assert all(map(torch.equal, found, expected))
            else:
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_lines_of_a_shuffled_file_are_tagged_alike(
    directory: Path, tmp_path: Path, command: Callable
) -> None:
    """50,000 lines."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(LETTERS, k=draw.randint(1, 16))) for _ in range(50_000)]
    order = draw.sample(range(len(lines)), len(lines))
    outputs = []
    for name, chosen in (("sorted", lines), ("shuffled", [lines[i] for i in order])):
        path, output = tmp_path / f"{name}.txt", tmp_path / f"{name}.json"
        path.write_text("".join(f"{line}\n" for line in chosen))
        status, _, error = command("tag", directory, "--json", "--file", path, "--output", output)
        assert status == 0, error
        outputs.append(output.read_text().splitlines())
    assert [outputs[0][i] for i in order] == outputs[1]


def test_parity_counts_the_sentences(directory: Path, command: Callable) -> None:
    arguments = ("parity", directory, "--batches", 20, "--dtype", "fp32", "--attn", "sdpa")
    status, out, error = command(*arguments, "--layout", "padded", "--json")
    assert status == 0, error
    found = {row["system"]: row for row in json.loads(out)["batches"]}
    for ours in ("minibert fp32", "minibert auto"):
        assert (found[ours]["equal"], found[ours]["largest"]) == (20, 0)
    # A CPU that multiplies bf16 has a row for it too.
    theirs = found["transformers float32"]
    assert theirs["equal"] < 20
    assert theirs["largest"] > 0


def test_parity_refuses_a_wrong_count(directory: Path, refused: Callable) -> None:
    assert "--batches 0: give 1 to" in refused("parity", directory, "--batches", 0)
