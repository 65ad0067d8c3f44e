"""What the CPU benchmarks run: the plan, the models, and real sentences as batches.

The weights have BERT-base's shape and are drawn from a seed: their values do not change the speed.
Every contender gets the same weights and the same sentences in the same order.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minibert import BertConfig, BertForTokenClassification
from minibert.files import MinibertError
from minibert.machine import DTYPES, choose_dtype, name_of
from minibert.pretrained import config_json, hub, weights
from minibert.pretrained.tokenizer import Tokenizer
from minibert.speed import prepacked
from minibert.speed.cpu.panels import HalfPanels
from minibert.tagging.tagger import Tagger
from minibert.text import bio, demo
from minibert.text.batches import Batch, Example, chunks, epoch_batches, examples_of, padded

BATCH = 32
CPU = torch.device("cpu")
# The fastest format that this CPU multiplies natively. Emulated bf16 is a hundred times slower than
# fp32, so contenders in bf16 are left out where the CPU has no instruction for it.
NATIVE = name_of(choose_dtype("auto", CPU).value)
# What Tagger takes by default; "fp16w" is fp32 with weights rounded to fp16.
HALF_WEIGHTS = prepacked.choose(CPU, DTYPES[NATIVE], may_round=True).value is HalfPanels
OURS = "fp16w" if HALF_WEIGHTS else NATIVE


class LeftOutError(Exception):
    """A contender that cannot run here; says why."""


class Plan(NamedTuple):
    """How much is run."""

    shape: dict[str, int]  # how the model differs from BERT-base
    corpus: str
    sentences: int  # of the test set
    turns: int
    train_batches: int  # in a turn
    tokens: int  # in a batch of the curve over lengths
    lengths: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    corpora: tuple[int, ...]  # sentences
    compiles: bool  # torch.compile too, which takes minutes


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
PLANS = {
    "tiny": Plan(TINY, "demo", 40, 2, 1, 32, (8, 16), (1, 4), (50,), False),
    "usual": Plan(
        {}, "mit_movie", 192, 5, 2, 2048,
        (8, 32, 128, 512), (1, 4, 16, 64, 256), (1_000, 10_000, 50_000), False,
    ),
    "full": Plan(
        {}, "mit_movie", 10_000, 7, 4, 4096,
        (8, 16, 32, 64, 128, 256, 512), (1, 2, 4, 8, 16, 32, 64, 128, 256),
        (1_000, 10_000, 100_000, 1_000_000), True,
    ),
}  # fmt: skip

Inputs = dict[str, Tensor]  # input_ids and attention_mask, (B, S)


class Workload:
    """The models and batches of a plan, each built once.

    Args:
        plan_name: of ``PLANS``.
        folder: for temporary files.
        model_dir: a trained MiniLM, or None.
    """

    def __init__(self, plan_name: str, folder: Path, model_dir: Path | None):
        self.plan_name = plan_name
        self.plan = PLANS[plan_name]
        self.folder = folder
        self.model_dir = model_dir
        self._theirs: dict[str, nn.Module] = {}
        self._taggers: dict[str, Tagger] = {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_pretrained(hub.locate_model("minilm"))

    @cached_property
    def corpus(self) -> tuple[list[bio.Sentence], list[bio.Sentence]]:
        """Training and test sentences."""
        return sentences(self.plan.corpus)

    @cached_property
    def test_examples(self) -> list[Example]:
        """The first sentences of the test set, in the order of the file."""
        words = [sentence.words for sentence in self.corpus[1][: self.plan.sentences]]
        return examples_of(words, self.tokenizer, 512)

    @cached_property
    def calibration(self) -> list[Inputs]:
        """Sentences of the training set, for peers that choose scales of activations by them."""
        words = [sentence.words for sentence in self.corpus[0][:64]]
        return [padded([e], 0).inputs for e in examples_of(words, self.tokenizer, 512)]

    @cached_property
    def train_batches(self) -> list[list[Example]]:
        """The first batches of an epoch as train.py draws it, each sorted by length."""
        train = self.corpus[0]
        ids = bio.label_ids(train, bio.labels_of(train), self.plan.corpus)
        examples = examples_of([s.words for s in train], self.tokenizer, 512, ids)
        drawn = epoch_batches([len(e.ids) for e in examples], BATCH, seed=0, epoch=1)
        return [
            by_length([examples[i] for i in batch]) for batch in drawn[: self.plan.train_batches]
        ]

    @cached_property
    def ours(self) -> BertForTokenClassification:
        """minibert's model in float32."""
        labels = bio.labels_of(self.corpus[0])
        config = BertConfig(vocab_size=self.tokenizer.vocab_size, labels=labels, **self.plan.shape)
        torch.manual_seed(0)
        return BertForTokenClassification(config, "sdpa").eval()

    def theirs(self, dtype: str = "fp32") -> nn.Module:
        """transformers' model with the same weights, in "fp32" or "bf16"."""
        if dtype not in self._theirs:
            self._theirs[dtype] = like(self.ours).eval().to(DTYPES[dtype])
        return self._theirs[dtype]

    def tagger(self, kind: str) -> Tagger:
        """A Tagger in "fp32", "bf16", "fp16w" or "int8", prepacked where it can be."""
        if kind not in self._taggers:
            dtype = DTYPES["fp32" if kind in ("fp16w", "int8") else kind]
            model = copy.deepcopy(self.ours).to(dtype)
            linear = prepacked.choose(CPU, dtype, may_round=kind == "fp16w").value
            if kind == "int8":
                linear = prepacked.choose_int8(CPU).value
            if linear:
                prepacked.prepack(model, linear)
            self._taggers[kind] = Tagger(model, self.tokenizer)
        return self._taggers[kind]

    def packed(self, tagger: Tagger) -> list[Batch]:
        """The test sentences in the batches that the Tagger makes of them."""
        return list(tagger._batches(self.test_examples))

    def padded(self, examples: Sequence[Example], length: int | None = None) -> list[Inputs]:
        """Batches of 32, padded to ``length`` or to the longest sentence of each."""
        pad_id = self.tokenizer.pad_id
        return [padded(batch, pad_id, length).inputs for batch in chunks(examples, BATCH)]

    @cached_property
    def minilm(self) -> Path:
        """A token classifier on MiniLM's real weights: ``model_dir``, or one with a new head."""
        if self.model_dir is not None:
            return self.model_dir
        labels = bio.labels_of(demo.generate()[0])
        model = BertForTokenClassification.from_pretrained("minilm", labels=labels, seed=0)
        return self.save(model, self.folder / "minilm")

    def save(self, model: BertForTokenClassification, directory: Path) -> Path:
        """Model and tokenizer, as minibert and transformers open them."""
        model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        return directory


def sentences(corpus: str) -> tuple[list[bio.Sentence], list[bio.Sentence]]:
    """Training and test sentences of "demo" or "mit_movie"."""
    if corpus == "demo":
        return demo.generate()
    folder = hub.locate_corpus(corpus)
    return bio.read_bio(folder / "engtrain.bio"), bio.read_bio(folder / "engtest.bio")


def need(module: str) -> None:
    """Check that a library is installed.

    Raises:
        LeftOutError: it is not.
    """
    if importlib.util.find_spec(module) is None:
        raise LeftOutError(f"{module} is not installed: pip install -e '.[bench]'")


@torch.no_grad()
def like(ours: BertForTokenClassification) -> nn.Module:
    """transformers' model with the same weights, in float32."""
    need("transformers")
    import transformers

    raw = config_json.to_dict(ours.config, "BertForTokenClassification")
    config = transformers.BertConfig.from_dict(raw)
    theirs = transformers.AutoModelForTokenClassification.from_config(
        config, attn_implementation="sdpa"
    )
    parameters = dict(theirs.named_parameters())
    for mine, name in weights.names_of(ours).items():
        parameters.pop(name).copy_(ours.get_parameter(mine))
    if parameters:
        raise MinibertError(f"minibert lacks parameters of transformers: {list(parameters)}")
    return theirs.float()


def runs_here(name: str) -> bool:
    """Whether this CPU has instructions for the number format of a contender."""
    if "int8" in name and name.startswith(("minibert", "ceiling")):
        return prepacked.choose_int8(CPU).value is not None
    return not ("bf16" in name and NATIVE != "bf16") and not ("fp16w" in name and not HALF_WEIGHTS)


def by_length(examples: Sequence[Example]) -> list[Example]:
    return sorted(examples, key=lambda e: len(e.ids))


def tokens_of(examples: Sequence[Example]) -> int:
    return sum(len(example.ids) for example in examples)


def linears(model: nn.Module) -> list[nn.Linear]:
    """The encoder's linear layers, in order."""
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "bert" in name]


def products(model: nn.Module, tokens: int) -> Callable[[], None]:
    """The matrix products of the linear layers alone, over ``tokens`` rows: an upper bound."""
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


def prepacked_products(model: BertForTokenClassification, tokens: int) -> Callable[[], None]:
    """The same with prepacked weights, where the model has them."""
    layers = model.bert.layers
    if not all(isinstance(layer, prepacked.PrepackedLayer) for layer in layers):
        return products(model, tokens)
    dtype = layers[0].attention_norm.weight.dtype
    x_ND = torch.randn(tokens, model.config.hidden_size, dtype=dtype)
    x_NF = torch.randn(tokens, model.config.intermediate_size, dtype=dtype)

    def run() -> None:
        with torch.inference_mode():
            for layer in layers:
                for linear in (layer.qkv, layer.output, layer.up):
                    linear(x_ND)
                layer.down(x_NF)

    return run


def moved(count: int) -> Callable[[], None]:
    """Memory traffic of ``count`` bytes, half read and half written: numbers are negated in place.

    In place, because a cache line is read before it is written even where nothing reads it.
    """
    numbers = torch.ones(min(count // 2, 2**28) // 4)
    times, rest = divmod(count // 8, len(numbers))

    def run() -> None:
        for _ in range(times):
            numbers.neg_()
        numbers[:rest].neg_()

    return run
