"""A trained model put to use: text in, entities out.

tagger = Tagger.from_pretrained("runs/demo/best")
tagger("who directed jaws")   # [Entity(text='jaws', type='TITLE', start=13, stop=17, ...)]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, overload

import torch
from torch import Tensor, nn

from minibert.files import MinibertError
from minibert.machine import choose_device, choose_dtype, cpu_by_default
from minibert.model.config import FAMILIES
from minibert.model.encoder import EncoderLayer
from minibert.model.heads import BertForTokenClassification, BertWithHead
from minibert.pretrained import hub, load
from minibert.pretrained.tokenizer import Tokenizer
from minibert.speed import memory, prepacked
from minibert.speed.cuda_graphs import choose_inference
from minibert.tagging.stream import pools, read_ahead
from minibert.tagging.words import Entities, Entity, Label, Words, entities, join, split
from minibert.text.batches import Batch, Example, examples_of, packed, padded
from minibert.text.schemes import BIO, bio_labels, scheme_of, to_bio

Model = TypeVar("Model", bound=BertWithHead)
MOST_LABELS = 1000  # decoding needs memory quadratic in their number


@dataclass(eq=False)
class Scores:
    """The scores of a batch; on a GPU they may still be under way."""

    scores_WL: Tensor  # of every word, on the CPU
    dtype: torch.dtype  # of the computation
    done: torch.cuda.Event | None = None  # when they have arrived

    def wait(self, batch: Batch, sentences: Sequence[Sequence[str]]) -> list[Tensor]:
        """The scores of each example of the batch, whose words are from ``sentences``.

        Raises:
            MinibertError: they are not finite.
        """
        if self.done is not None:
            self.done.synchronize()
        parts = self.scores_WL.split([len(example.firsts) for example in batch.examples])
        if not self.scores_WL.isfinite().all():
            wrong = next(i for i, part in enumerate(parts) if not part.isfinite().all())
            sentence = " ".join(sentences[batch.examples[wrong].sentence])
            raise MinibertError(
                f"the model's scores are not finite for {sentence[:60]!r}: its weights are "
                f"damaged, or too large for {self.dtype}: download or train it again, or try "
                "--dtype fp32"
            )
        return list(parts)


class Tagger:
    """A token classification model with its tokenizer.

    Args:
        model: in eval mode; its config holds the labels.
        tokenizer: of the same checkpoint.
        batch_tokens: most word-pieces in a batch, padding included; a longer sentence is a batch
            alone.
        pack: run packed batches; False: padded ones.
        well_formed: decode the most probable sequence that the labels' scheme allows; False: the
            best label of every word on its own.

    Raises:
        MinibertError: model and tokenizer do not belong together, or the labels follow no scheme of
            text/schemes.py.
    """

    def __init__(
        self,
        model: BertForTokenClassification,
        tokenizer: Tokenizer,
        batch_tokens: int = 2016,  # ``rounded`` already
        pack: bool = True,
        well_formed: bool = True,
    ):
        config = model.config
        tokenizer.check_fits(config.vocab_size)
        if config.max_length < 3:
            raise MinibertError(
                f"config.json: max_position_embeddings is {config.max_position_embeddings}: "
                "a text needs at least 3, for [CLS], a word and [SEP]"
            )
        if FAMILIES[config.model_type].counts and tokenizer.pad_id != config.pad_token_id:
            raise MinibertError(
                f"config.json: pad_token_id is {config.pad_token_id}, but the tokenizer pads with "
                f"{tokenizer.pad_id}: use the tokenizer files that belong to the weights"
            )
        if len(config.labels) > MOST_LABELS:
            raise MinibertError(
                f"config.json: {len(config.labels)} labels, but decoding handles at most "
                f"{MOST_LABELS}: use a model for entities"
            )
        self.scheme = scheme_of(config.labels, "config.json")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.pack = pack
        self.well_formed = well_formed
        self.graphs = choose_inference(model)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        attn_implementation: str = "auto",
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        batch_tokens: int = 2016,  # ``rounded`` already
        pack: bool = True,
        prepack: bool = True,
        well_formed: bool = True,
    ) -> Tagger:
        """Load what ``train.py`` saved, or a token classifier of a known family in safetensors.

        Args:
            directory: a model's or a run's directory, or a name; see ``hub.locate_model``.
            attn_implementation: "eager", "sdpa", "fused" or "auto".
            dtype: "fp32", "bf16", "fp16", a torch.dtype, or "auto": the fastest that the hardware
                has. On a CPU with AVX2 alone, "auto" with ``prepack`` is fp32 with weights rounded
                to fp16. "int8", on a CPU only: fp32 with the products of the encoder in int8.
            device: None takes a GPU if there is one.
            batch_tokens, pack, well_formed: as above.
            prepack: lay the weights out once for inference: on a CPU in the order in which its
                matrix products read them, on a GPU with q, k and v side by side, where passes also
                become CUDA graphs. The model can then only predict: to trace, train or save it, use
                False.

        Raises:
            MinibertError: a file is missing or damaged, it holds no trained classifier, a weight is
                too large for the dtype, or int8 cannot run here.
        """
        directory = hub.locate_model(directory)
        model, tokenizer = open_model(
            BertForTokenClassification, directory, attn_implementation, dtype, device, prepack
        )
        return cls(model, tokenizer, batch_tokens, pack, well_formed)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that the tagger gives, always BIO: for a BIO model in the order of its ids."""
        labels = self.model.config.labels
        return labels if self.scheme == BIO else tuple(bio_labels(labels))

    @overload
    def __call__(self, text: str) -> Entities: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, text: Iterable[str]) -> list[list[Entity]]: ...
    def __call__(self, text: str | Iterable[str]) -> Entities | list[list[Entity]]:
        """The entities of a text, or a list of them for each of several texts.

        ``Entities`` is a list of ``Entity`` that a notebook shows marked in its text.
        A sentence that is split into words already goes to ``tag_words``.

        Raises:
            TypeError: a text is not a string.
        """
        return next(self.tag_texts([text])) if isinstance(text, str) else list(self.tag_texts(text))

    def tag_texts(self, texts: Iterable[str]) -> Iterator[Entities]:
        """The entities of each text, in order, as a stream.

        Raises:
            TypeError: a text is not a string, or ``texts`` is one.
        """
        if isinstance(texts, str):
            raise TypeError("tag_texts takes several texts, got one str: call the tagger itself")
        return self._tag(map(_split, texts))

    def tag_words(self, sentences: Iterable[Sequence[str]]) -> Iterator[Entities]:
        """The entities of each sentence given in words, in order, as a stream.

        Characters are counted in the words joined by single spaces.

        Raises:
            TypeError: a sentence is not a list or tuple of strings.
        """
        return self._tag(map(_join, sentences))

    def label(self, sentences: Iterable[Sequence[str]]) -> Iterator[list[Label]]:
        """One label for every word of every sentence, in order, as a stream.

        Raises:
            TypeError: a sentence is not a list or tuple of strings.
        """
        checked = map(_checked, sentences)
        started = map(
            self._start, pools(checked, lambda words: sum(len(word) + 1 for word in words))
        )
        for pool in read_ahead(started, self.depth):
            yield from pool

    def _tag(self, texts: Iterable[Words]) -> Iterator[Entities]:
        started = map(self._start_entities, pools(texts, lambda words: len(words.text)))
        for pool in read_ahead(started, self.depth):
            yield from pool

    def start(self, texts: Iterable[str]) -> Callable[[], list[Entities]]:
        """Start on the texts of one pool; the result, when called, gives the entities of each.

        On a GPU it returns while they are computed.
        """
        return self._start_entities([_split(text) for text in texts])

    @property
    def depth(self) -> int:
        """How many pools are started before one is read.

        On a GPU, tokenising the next pool and decoding the last one overlap with the model. On a
        CPU the model already uses every core.
        """
        return 1 if self.model.device.type == "cuda" else 0

    def _start_entities(self, pool: Sequence[Words]) -> Callable[[], list[Entities]]:
        read = self._start([words.words for words in pool])
        return lambda: [entities(words, labels) for words, labels in zip(pool, read())]

    def _start(self, sentences: Sequence[Sequence[str]]) -> Callable[[], list[list[Label]]]:
        read = self.start_scores(sentences)
        return lambda: [self._decode(scores_WL) for scores_WL in read()]

    @cpu_by_default()
    @torch.inference_mode()
    def start_scores(self, sentences: Sequence[Sequence[str]]) -> Callable[[], list[Tensor]]:
        """Start the model on the sentences of one pool, given in words.

        Returns:
            What waits for it, and gives each sentence's scores before decoding: (words, labels),
            float32, on the CPU.
        """
        config = self.model.config
        examples = examples_of(sentences, self.tokenizer, config.max_length)
        under_way = [(batch, self._scores(batch)) for batch in self._batches(examples)]

        @cpu_by_default()
        def read() -> list[Tensor]:
            # The dtype of ``Scores``; torch's default may be another one.
            shapes = [(len(words), config.num_labels) for words in sentences]
            by_sentence = [torch.empty(shape, dtype=torch.float32) for shape in shapes]
            for batch, scores in under_way:
                for example, part in zip(batch.examples, scores.wait(batch, sentences)):
                    stop = example.first_word + len(example.firsts)
                    by_sentence[example.sentence][example.first_word : stop] = part
            return by_sentence

        return read

    def _scores(self, batch: Batch) -> Scores:
        with torch.autocast(self.model.device.type, enabled=False):  # the model has its dtype
            if self.graphs.value and self.pack:
                logits = self.graphs.value(batch.inputs)
            else:
                logits = self.model(**batch.inputs).logits.flatten(end_dim=-2)
        scores_WL = logits[batch.first_W].float()
        if not scores_WL.is_cuda:
            return Scores(scores_WL, logits.dtype)
        # The event follows this batch's copy, so reading it does not wait for later batches.
        scores_WL = scores_WL.to("cpu", non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(logits.device))
        return Scores(scores_WL, logits.dtype, done)

    @cpu_by_default()
    def _decode(self, scores_WL: Tensor) -> list[Label]:
        if not len(scores_WL):
            return []
        # In the others I-X or X may begin an entity: any sequence is well-formed.
        well_formed = self.well_formed and self.scheme in (BIO, "BIOES", "BILOU")
        ids, probabilities = self.model.head.decode(scores_WL, well_formed)
        names = [self.model.config.labels[i] for i in ids]
        return list(map(Label, names if self.scheme == BIO else to_bio(names), probabilities))

    def _batches(self, examples: list[Example]) -> Iterator[Batch]:
        """Examples of similar length together, at most ``batch_tokens`` with the padding."""
        group: list[Example] = []
        tokens = 0
        for example in sorted(examples, key=lambda e: len(e.ids)):
            size = len(example.ids)
            # Sorted, so this example would be the longest of its group.
            tokens = tokens + size if self.pack else size * (len(group) + 1)
            if group and tokens > self.batch_tokens:
                yield self._batch(group)
                group, tokens = [], size
            group.append(example)
        if group:
            yield self._batch(group)

    def _batch(self, group: list[Example]) -> Batch:
        device, pad_id = self.model.device, self.tokenizer.pad_id
        if self.pack:
            compiles = device.type == "cpu" and not prepacked.runs_kernels(self.model)
            fills = compiles or self.graphs.value is not None
            return packed(group, device, pad_id if fills else None)
        return padded(group, pad_id, device=device)


def open_model(
    kind: type[Model],
    directory: Path,
    attn_implementation: str,
    dtype: str | torch.dtype,
    device: str | None,
    prepack: bool,
) -> tuple[Model, Tokenizer]:
    """A trained model for inference, and its tokenizer.

    Args:
        kind: class of the model.
        directory: of the checkpoint.
        attn_implementation, dtype, device, prepack: see ``Tagger.from_pretrained``.

    Raises:
        MinibertError: a file is missing or damaged, a parameter is missing, a weight is too large
            for the dtype, or int8 cannot run.
    """
    where = choose_device(device)
    chosen = choose_dtype("fp32" if dtype == "int8" else dtype, where).value
    linear: prepacked.Linear | None = None
    if dtype == "int8":
        found = prepacked.choose_int8(where)
        if not found.value:
            raise MinibertError(f"dtype int8: {found.reason}: use --dtype auto")
        if not prepack:
            raise MinibertError(
                "dtype int8: only prepacked layers have it: leave out --plain or prepack=False"
            )
        linear = found.value
    elif prepack:
        linear = prepacked.choose(where, chosen, may_round=dtype == "auto").value

    def convert(layer: EncoderLayer) -> nn.Module:
        assert linear
        memory.release_freed_memory()  # of the layer before
        try:
            return prepacked.PrepackedLayer(layer.to(where), linear)
        except ValueError:  # ``prepack`` raises it again, once the files are found to be whole
            return layer

    model = load.model(
        kind,
        directory,
        attn_implementation=attn_implementation,
        dtype=chosen,
        device=where,
        convert_layer=convert if linear else None,
    )
    tokenizer = Tokenizer.from_pretrained(directory)
    if model.load_report.initialised:
        raise MinibertError(
            f"{directory}: has no trained {model.load_report.initialised[0]}: "
            "train it first with train.py"
        )
    tokenizer.check_fits(model.config.vocab_size)
    if linear:
        try:
            prepacked.prepack(model, linear)
        except ValueError as error:
            raise MinibertError(f"{directory}: {error}: use it with --dtype fp32") from None
    return model, tokenizer


def _split(text: str) -> Words:
    if not isinstance(text, str):
        remedy = "give words to tag_words" if isinstance(text, list | tuple) else "leave it out"
        raise TypeError(f"a text must be a str, got {type(text).__name__}: {remedy}")
    return split(text)


def _join(words: Sequence[str]) -> Words:
    return join(_checked(words))


def _checked(words: Sequence[str]) -> Sequence[str]:
    if isinstance(words, str) or not isinstance(words, Sequence):
        kind = type(words).__name__
        raise TypeError(f"a sentence must be a list of words, got {kind}: give texts to tag_texts")
    for word in words:
        if not isinstance(word, str):
            raise TypeError(f"a word must be a str, got {type(word).__name__}: leave it out")
    return words
