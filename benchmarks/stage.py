"""What the CPU benchmarks share: the plan, the models, and the real sentences as batches.

The weights are BERT-base's in shape and drawn from a seed: speed does not ask what they are. Every
side gets the same ones, and the same sentences in the same order.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu_models import like, sentences
from minibert import BertConfig, BertForTokenClassification
from minibert.machine import DTYPES, choose_dtype, name_of
from minibert.pretrained import hub
from minibert.pretrained.tokenizer import Tokenizer
from minibert.speed import prepacked
from minibert.text import bio
from minibert.text.batches import Example, chunks, epoch_batches, examples_of
from minibert.text.batches import padded as pad

BATCH = 32
CPU = torch.device("cpu")
# The fastest format that this CPU multiplies natively. Without an instruction for bf16 its products
# take a hundred times as long as those in fp32: nobody would use them, and nothing here does.
NATIVE = name_of(choose_dtype("auto", CPU).value)
# What the Tagger takes by itself: "fp16w" is fp32 with weights rounded to fp16.
HALVES = prepacked.choose(CPU, DTYPES[NATIVE], may_round=True).linear is prepacked.HalfLinear
OURS = "fp16w" if HALVES else NATIVE


class Plan(NamedTuple):
    """How much is run."""

    shape: dict[str, int]  # what is not BERT-base about the model
    corpus: str
    sentences: int  # of the test set
    turns: int  # every subject's turns at most
    seconds: float  # after which a part begins no further turn
    train_batches: int  # in a turn
    tokens: int  # in a batch of the curve over lengths
    lengths: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    corpora: tuple[int, ...]  # sentences
    long: bool  # also what takes minutes by itself: compiling


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
PLANS = {
    "tiny": Plan(TINY, "demo", 40, 2, 60, 1, 32, (8, 16), (1, 4), (50,), False),
    "usual": Plan(
        {}, "mit_movie", 192, 5, 300, 2, 2048,
        (8, 32, 128, 512), (1, 4, 16, 64, 256), (1_000, 10_000, 50_000), False,
    ),
    "full": Plan(
        {}, "mit_movie", 10_000, 7, 3600, 4, 4096,
        (8, 16, 32, 64, 128, 256, 512), (1, 2, 4, 8, 16, 32, 64, 128, 256),
        (1_000, 10_000, 100_000, 1_000_000), True,
    ),
}  # fmt: skip


class Place(NamedTuple):
    """Where a module's subjects are built."""

    plan_name: str
    folder: Path
    model_dir: Path | None  # a trained MiniLM

    @property
    def plan(self) -> Plan:
        return PLANS[self.plan_name]


Run = Callable[[], dict[str, Any]]


class Padded(NamedTuple):
    """A batch as everyone but minibert takes it."""

    input_ids: Tensor  # (B, S)
    attention_mask: Tensor


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(hub.locate_model("minilm"))


@cache
def corpus(plan_name: str) -> tuple[list[bio.Sentence], list[bio.Sentence]]:
    return sentences(PLANS[plan_name].corpus)


@cache
def test_examples(plan_name: str) -> list[Example]:
    """The first sentences of the test set, in the order of the file."""
    words = [s.words for s in corpus(plan_name)[1][: PLANS[plan_name].sentences]]
    return examples_of(words, tokenizer(), 512)


@cache
def train_batches(plan_name: str) -> list[list[Example]]:
    """The first batches of an epoch as train.py draws it, each sorted as packing sorts it."""
    plan, (train, _) = PLANS[plan_name], corpus(plan_name)
    labels = bio.labels_of(train)
    ids = bio.label_ids(train, labels, plan.corpus)
    examples = examples_of([s.words for s in train], tokenizer(), 512, ids)
    drawn = epoch_batches([len(e.ids) for e in examples], BATCH, seed=0, epoch=1)
    chosen = [[examples[i] for i in batch] for batch in drawn[: plan.train_batches]]
    return [sorted(batch, key=lambda e: len(e.ids)) for batch in chosen]


@cache
def ours(plan_name: str) -> BertForTokenClassification:
    """Our model in float32."""
    labels = bio.labels_of(corpus(plan_name)[0])
    config = BertConfig(vocab_size=tokenizer().vocab_size, labels=labels, **PLANS[plan_name].shape)
    torch.manual_seed(0)
    return BertForTokenClassification(config, "sdpa").eval()


@cache
def theirs(plan_name: str) -> nn.Module:
    """transformers' model in float32 with the same weights."""
    return like(ours(plan_name)).eval()


@cache
def in_dtype(make: Callable[[str], nn.Module], plan_name: str, dtype: str) -> nn.Module:
    """The model that ``make`` makes, in "fp32" or "bf16"."""
    model = make(plan_name)
    return model if dtype == "fp32" else copy.deepcopy(model).to(DTYPES[dtype])


@cache
def answering(plan_name: str, kind: str) -> BertForTokenClassification:
    """Our model as the Tagger has it in "fp32", "bf16" or "fp16w"; prepacked where it can be."""
    dtype = DTYPES["fp32" if kind == "fp16w" else kind]
    model = copy.deepcopy(ours(plan_name)).to(dtype)
    linear = prepacked.choose(CPU, dtype, may_round=kind == "fp16w").linear
    if linear:
        prepacked.prepack(model, linear)
    return model


def runs_here(subject: str) -> bool:
    """Whether a subject of that name computes in a format that is of use on this CPU."""
    return not ("bf16" in subject and NATIVE != "bf16") and not ("fp16w" in subject and not HALVES)


def by_length(examples: Sequence[Example]) -> list[Example]:
    return sorted(examples, key=lambda e: len(e.ids))


def padded(examples: Sequence[Example], length: int | None = None) -> list[Padded]:
    """Batches of 32, filled up to ``length`` or to the longest of each."""
    batches = [pad(batch, tokenizer().pad_id, length) for batch in chunks(examples, BATCH)]
    return [Padded(b.inputs["input_ids"], b.inputs["attention_mask"]) for b in batches]


def tokens_of(examples: Sequence[Example]) -> int:
    return sum(len(example.ids) for example in examples)


def linears(model: nn.Module) -> list[nn.Linear]:
    """The matrices of the encoder, in order."""
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "bert" in name]


def products(model: nn.Module, tokens: int) -> Callable[[], None]:
    """The linear layers' products alone, of so many tokens at once: what no path can be under."""
    layers = linears(model)
    dtype = layers[0].weight.dtype
    inputs = {
        width: torch.randn(tokens, width).to(dtype) for width in {m.in_features for m in layers}
    }

    def run() -> None:
        with torch.inference_mode():
            for layer in layers:
                layer(inputs[layer.in_features])

    return run


def prepacked_products(plan_name: str, kind: str, tokens: int) -> Callable[[], None]:
    """The same by weights that lie as the products read them, where they can."""
    layers = answering(plan_name, kind).bert.layers
    if not all(isinstance(layer, prepacked.PrepackedLayer) for layer in layers):
        return products(answering(plan_name, kind), tokens)
    config, dtype = ours(plan_name).config, layers[0].attention_norm.weight.dtype
    x_ND = torch.randn(tokens, config.hidden_size, dtype=dtype)
    x_NF = torch.randn(tokens, config.intermediate_size, dtype=dtype)

    def run() -> None:
        with torch.inference_mode():
            for layer in layers:
                for linear in (layer.qkv, layer.output, layer.up):
                    linear(x_ND)
                layer.down(x_NF)

    return run


def moved(count: int) -> Callable[[], None]:
    """So many bytes of memory read or written, half of each: numbers that change their sign.

    In place, because a line that is only written is read all the same before it is.
    """
    numbers = torch.ones(min(count // 2, 2**28) // 4)
    times, rest = divmod(count // 8, len(numbers))

    def run() -> None:
        for _ in range(times):
            numbers.neg_()
        numbers[:rest].neg_()

    return run


def save_model(model: BertForTokenClassification, directory: Path) -> Path:
    """The model with its tokenizer, as minibert and transformers open it."""
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def minilm_directory(given: Path | None, scratch: Path) -> Path:
    """A token classifier on MiniLM's real weights: the one given, or one with a fresh head."""
    if given is not None:
        return given
    labels = bio.labels_of(corpus("tiny")[0])
    directory = hub.locate_model("minilm")
    model = BertForTokenClassification.from_pretrained(directory, labels=labels, seed=0)
    return save_model(model, scratch)
