"""Sentence vectors: the mean of the encoder's output over the word-pieces of a text, of length 1.

This is the recipe that all-MiniLM-L6-v2 was trained with (Reimers & Gurevych 2019,
arXiv:1908.10084, section 3): every piece counts, [CLS] and [SEP] included, and the mean is divided
by its 2-norm, so that the dot product of two vectors is their cosine. A text longer than
``max_length`` pieces is cut off there, as sentence-transformers does: the vector of a long text is
then that of its beginning, and equal to the one that others have stored.

On a CPU a text gets the same bits whatever shares its batch. The number of rows of a matrix product
may decide how a library sums, so every pass has a number of rows that depends on the text alone:
``SHORT``, or ``max_length`` for a longer text. What the texts leave empty is filled up, except for
the C++ kernels. The number of threads and the kind of processor do change the last bits. A GPU runs
larger batches, where nothing is promised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from minibert.files import MinibertError
from minibert.machine import cpu_by_default
from minibert.model.config import BertConfig
from minibert.model.heads import BertWithHead, Head
from minibert.model.layout import Packed
from minibert.pretrained import hub
from minibert.pretrained.tokenizer import Tokenizer
from minibert.speed.prepacked import runs_kernels
from minibert.tagging.stream import pools, read_ahead
from minibert.tagging.tagger import open_model
from minibert.text.batches import Example, packed

SHORT = 64  # word-pieces; a pass of few rows is quick when one text comes alone
ON_GPU = 8192  # word-pieces of a pass on a GPU
MINILM_LENGTH = 256  # the max_seq_length of all-MiniLM-L6-v2 in sentence-transformers


class Unchanged(Head):
    """No head: the scores are the hidden states."""

    def forward(self, x_ND: Tensor) -> Tensor:
        """(N, D) as they are."""
        return x_ND


class Encoder(BertWithHead):
    """BERT alone: what its output calls logits are the hidden states of the last layer."""

    def __init__(self, config: BertConfig, attn_implementation: str = "sdpa"):
        super().__init__(config, attn_implementation)
        self.head = Unchanged()


class Embedder:
    """A BERT that turns texts into vectors.

    Args:
        model: in eval mode; a head is not used.
        tokenizer: of the same checkpoint.
        max_length: word-pieces of a text that are read, [CLS] and [SEP] included.

    ``truncated`` counts the texts that were longer.

    Raises:
        ValueError: the model has fewer positions than ``max_length``, or that is below 2.
    """

    def __init__(self, model: BertWithHead, tokenizer: Tokenizer, max_length: int):
        positions = model.config.max_length
        if not 2 <= max_length <= positions:
            raise ValueError(
                f"max_length must be from 2 to {positions}, the positions of the model, "
                f"got {max_length}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncated = 0

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        attn_implementation: str = "auto",
        dtype: str | torch.dtype = "fp32",
        device: str | None = None,
        max_length: int | None = None,
        prepack: bool = True,
    ) -> Embedder:
        """Load any BERT in safetensors.

        Args:
            name_or_dir: a directory with config.json, model.safetensors and tokenizer files, or a
                name that ``minibert download`` knows.
            attn_implementation: "eager", "sdpa", "fused" or "auto".
            dtype: "fp32", "bf16", "fp16", "int8", a torch.dtype, or "auto". Vectors are compared
                with vectors that another machine may have made, so fp32 is the default.
            device: None takes a GPU if there is one.
            max_length: as above; None: 256, as for MiniLM in sentence-transformers, or the
                positions of a model that has fewer.
            prepack: as for ``Tagger.from_pretrained``.

        Raises:
            MinibertError: a file is missing or damaged, a weight is too large for the dtype, or
                int8 cannot run here.
            ValueError: ``max_length`` is out of range.
        """
        directory = hub.locate_model(name_or_dir)
        model, tokenizer = open_model(
            Encoder, directory, attn_implementation, dtype, device, prepack
        )
        if max_length is None:
            max_length = min(MINILM_LENGTH, model.config.max_length)
        return cls(model, tokenizer, max_length)

    @property
    def size(self) -> int:
        """D, the length of a vector."""
        return self.model.config.hidden_size

    def __call__(self, text: str | Iterable[str]) -> Tensor:
        """The vector of a text, (D,), or of each of several texts, (T, D); float32, on the CPU.

        Raises:
            TypeError: a text is not a string.
        """
        if isinstance(text, str):
            return next(self.embed_texts([text]))
        vectors = list(self.embed_texts(text))
        none = torch.empty(0, self.size, dtype=torch.float32, device="cpu")
        return torch.stack(vectors) if vectors else none

    def embed_texts(self, texts: Iterable[str]) -> Iterator[Tensor]:
        """The vector of each text, (D,), float32, in order, as a stream.

        Raises:
            TypeError: a text is not a string, or ``texts`` is one.
        """
        if isinstance(texts, str):
            raise TypeError("embed_texts takes several texts, got one str: call the embedder")
        started = map(self.start, pools(map(_checked, texts), len))
        for pool in read_ahead(started, self.depth):
            yield from pool

    @property
    def depth(self) -> int:
        """How many pools are started before one is read; see ``Tagger.depth``."""
        return 1 if self.model.device.type == "cuda" else 0

    @cpu_by_default()
    @torch.no_grad()
    def start(self, texts: Sequence[str]) -> Callable[[], list[Tensor]]:
        """Start on the texts of one pool; the result, when called, gives the vector of each.

        On a GPU it returns while they are computed.
        """
        examples = [Example(self._ids(text), (), i, 0) for i, text in enumerate(texts)]
        under_way = [self._vectors(group) for group in self._passes(examples)]

        def read() -> list[Tensor]:
            vectors = [torch.empty(0, device="cpu")] * len(examples)
            for group, vectors_BD in under_way:
                on_cpu = vectors_BD.cpu()
                finite = on_cpu.isfinite().all(1).tolist()
                if not all(finite):
                    text = texts[group[finite.index(False)].sentence]
                    raise MinibertError(
                        f"the vector is not finite for {text[:60]!r}: the model's weights are "
                        f"damaged, or too large for {self.model.dtype}: download them again, or "
                        "try --dtype fp32"
                    )
                for example, vector in zip(group, on_cpu):
                    vectors[example.sentence] = vector
            return vectors

        return read

    def _ids(self, text: str) -> tuple[int, ...]:
        ids = self.tokenizer.encode(text)
        if len(ids) > self.max_length:
            self.truncated += 1
            ids = [*ids[: self.max_length - 1], self.tokenizer.sep_id]
        return tuple(ids)

    def _rows(self, example: Example) -> int:
        """Of the pass that a text is in."""
        if self.model.device.type == "cuda":
            return ON_GPU
        return SHORT if len(example.ids) <= SHORT else self.max_length

    def _passes(self, examples: list[Example]) -> Iterator[list[Example]]:
        """Texts of similar length together, as many as the rows of their pass hold."""
        group: list[Example] = []
        left = 0
        for example in sorted(examples, key=lambda e: len(e.ids)):
            if group and (len(example.ids) > left or self._rows(example) != self._rows(group[0])):
                yield group
                group = []
            left = (left if group else self._rows(example)) - len(example.ids)
            group.append(example)
        if group:
            yield group

    def _vectors(self, group: list[Example]) -> tuple[tuple[Example, ...], Tensor]:
        """The examples in the order of their vectors, and the vectors (B, D)."""
        device = self.model.device
        fills = device.type == "cpu" and not runs_kernels(self.model)
        filler = self.tokenizer.pad_id if fills else None
        batch = packed(group, device, filler, self._rows(group[0]))
        input_N, layout = batch.inputs["input_ids"], batch.inputs["layout"]
        assert isinstance(input_N, Tensor)
        assert isinstance(layout, Packed)
        with torch.autocast(device.type, enabled=False):  # the model has its dtype
            x_ND = self.model.bert(input_N, torch.zeros_like(input_N), layout).x_ND.float()
        length_B = layout.starts.diff().long()
        mean_BD = torch.segment_reduce(x_ND, "mean", lengths=length_B)[: len(group)]
        return batch.examples, F.normalize(mean_BD, dim=1)


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"a text must be a str, got {type(text).__name__}")
    return text
