"""A trained model put to use: text in, entities out.

tagger = Tagger.from_pretrained("runs/demo/best")
tagger("who directed jaws")   # [Entity(text='jaws', type='TITLE', start=13, stop=17, ...)]
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from minibert.files import MinibertError
from minibert.machine import choose_device, choose_dtype
from minibert.model.encoder import BertForTokenClassification
from minibert.model.labels import best_labels
from minibert.pretrained.tokenizer import Tokenizer
from minibert.speed import prepacked
from minibert.text.bio import TAG, Batch, Example, examples_of, packed, padded
from minibert.text.metrics import lenient_entities

T = TypeVar("T")
MOST_LABELS = 1000  # that well-formed sequences are chosen from, in memory quadratic in it
POOL = 1024  # sentences that are sorted by length together; also what streaming holds in memory
POOL_CHARACTERS = 1 << 20  # and all of them together, unless one alone has more


class Entity(NamedTuple):
    """A stretch of the text and what it is."""

    text: str
    type: str
    start: int  # of the first character; text[start:stop] is the entity
    stop: int
    score: float  # mean probability of its words' labels


class Label(NamedTuple):
    """What the model says of one word."""

    name: str
    score: float  # probability


class Answer(NamedTuple):
    """What the model says of a batch; of a GPU it may still be under way."""

    logp_WL: Tensor  # of every word, over the labels; on the CPU
    dtype: torch.dtype  # in which it was computed
    done: torch.cuda.Event | None = None  # behind it

    def read(self) -> Tensor:
        """Wait for it.

        Raises:
            MinibertError: it is not a number.
        """
        if self.done is not None:
            self.done.synchronize()
        if self.logp_WL.isnan().any():
            raise MinibertError(
                "the model answers NaN: its weights are damaged, or too large for "
                f"{self.dtype}: fetch or train it again, or try --dtype fp32"
            )
        return self.logp_WL


class Tagger:
    """A token classification model with its tokenizer.

    Args:
        model: in eval mode; its config carries the labels.
        tokenizer: of the same checkpoint.
        batch_tokens: word-pieces in a batch at most (padding counted); one sentence may be more.
        pack: run batches without padding; False pads them, as the reference does.
        well_formed: choose the best labels that are well-formed BIO; False takes the best label of
            every word by itself, as the reference does.
    """

    def __init__(
        self,
        model: BertForTokenClassification,
        tokenizer: Tokenizer,
        batch_tokens: int = 2048,
        pack: bool = True,
        well_formed: bool = True,
    ):
        if tokenizer.vocab_size > model.config.vocab_size:
            raise MinibertError(
                f"the tokenizer has {tokenizer.vocab_size} pieces, but the model embeds "
                f"{model.config.vocab_size}: use the tokenizer files that belong to the weights"
            )
        for label in model.config.labels:
            if not TAG.fullmatch(label):
                raise MinibertError(
                    f"config.json: the label {label!r} is none of O, B-TYPE and I-TYPE: "
                    "entities can be read from BIO labels only"
                )
        if model.config.max_position_embeddings < 3:
            raise MinibertError(
                f"config.json: max_position_embeddings is {model.config.max_position_embeddings}: "
                "a text needs three, for a word and the two that frame it"
            )
        if len(model.config.labels) > MOST_LABELS:
            raise MinibertError(
                f"config.json: has {len(model.config.labels)} labels, more than the {MOST_LABELS} "
                "that a tagger can choose well-formed ones from: use a model for entities"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.pack = pack
        self.well_formed = well_formed

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        attn_implementation: str = "auto",
        dtype: str = "auto",
        device: str | None = None,
        batch_tokens: int = 2048,
        pack: bool = True,
        prepack: bool = True,
        well_formed: bool = True,
    ) -> Tagger:
        """Load what ``train.py`` saved, or any BERT token classifier in safetensors.

        Args:
            directory: holds config.json, model.safetensors and tokenizer files.
            attn_implementation: "eager", "sdpa", "fused" or "auto".
            dtype: "fp32", "bf16", "fp16" or "auto", the fastest the hardware has; with ``prepack``
                on a CPU that has AVX2 alone, fp32 with weights rounded to fp16.
            device: None takes a GPU if there is one.
            batch_tokens, pack, well_formed: as above.
            prepack: lay the weights out once as the CPU's products read them, where
                ``prepacked.choose`` says that it can be done. ``model`` then only answers: False
                keeps the plain layers, which are the reference and can be traced.

        Raises:
            MinibertError: a file is missing or damaged, or there is no trained classifier in it, or
                a weight is too large for the dtype.
        """
        where = choose_device(device)
        directory = Path(directory)
        if not directory.is_dir():
            raise MinibertError(
                f"{directory}: no such directory: name one that train.py wrote, "
                "such as runs/demo/best"
            )
        tokenizer = Tokenizer.from_pretrained(directory)
        choice = choose_dtype(dtype, where)
        model = BertForTokenClassification.from_pretrained(
            directory,
            attn_implementation=attn_implementation,
            dtype=choice.dtype,
            device=where,
        )
        if model.load_report is not None and model.load_report.initialised:
            raise MinibertError(
                f"{directory}: has no trained {model.load_report.initialised[0]}: "
                "train it first with train.py"
            )
        layers = prepacked.choose(where, choice.dtype, may_round=dtype == "auto")
        if prepack and layers.linear:
            try:
                prepacked.prepack(model, layers.linear)
            except ValueError as error:
                raise MinibertError(f"{directory}: {error}: use it with --dtype fp32") from None
        return cls(model, tokenizer, batch_tokens, pack, well_formed)

    def __call__(self, text: str | Sequence) -> list:
        """Find the entities of a text, of the words of a sentence, or of each of several.

        Args:
            text: a string; the words of one sentence; or a list of either. A list of strings is
                taken as words, unless one of them holds white space, which no word does: then
                every string is a text. ``tag_texts`` and ``tag_words`` leave no doubt.

        Returns:
            The entities, or for several texts a list of them. The characters of a sentence given
            in words are counted in the words joined by single spaces.
        """
        if isinstance(text, str):
            return next(self.tag_texts([text]))
        if all(isinstance(item, str) for item in text):
            if any(re.search(r"\s", item) for item in text):
                return list(self.tag_texts(text))
            return next(self.tag_words([text]))
        # Mixed: both kinds are words with their places once they are split.
        return list(self._tag(split(t) if isinstance(t, str) else join(t) for t in text))

    def tag_texts(self, texts: Iterable[str]) -> Iterator[list[Entity]]:
        """The entities of each text, in order, read and yielded as a stream."""
        return self._tag(split(text) for text in texts)

    def tag_words(self, sentences: Iterable[Sequence[str]]) -> Iterator[list[Entity]]:
        """The entities of each sentence given in words, in order, as a stream."""
        return self._tag(join(words) for words in sentences)

    def label(self, sentences: Iterable[Sequence[str]]) -> Iterator[list[Label]]:
        """One label for every word of every sentence, in order, as a stream."""
        asked = map(self._ask, pools(sentences, lambda words: sum(len(word) + 1 for word in words)))
        for pool in read_ahead(asked, self.depth):
            yield from pool

    def _tag(self, places: Iterable[Words]) -> Iterator[list[Entity]]:
        asked = map(self._ask_entities, pools(places, lambda words: len(words.text)))
        for pool in read_ahead(asked, self.depth):
            yield from pool

    def ask(self, texts: Iterable[str]) -> Callable[[], list[list[Entity]]]:
        """Start on texts that make one pool; what it returns gives the entities of each.

        On a GPU it returns while they are computed.
        """
        return self._ask_entities([split(text) for text in texts])

    @property
    def depth(self) -> int:
        """Pools that are started before one is read.

        On a GPU the next one is cut into word-pieces, and this one's labels are chosen, while the
        model computes. A CPU has no hands free for that: the model uses all of its cores.
        """
        return 1 if self.model.classifier.weight.is_cuda else 0

    def _ask_entities(self, pool: Sequence[Words]) -> Callable[[], list[list[Entity]]]:
        read = self._ask([words.words for words in pool])
        return lambda: [entities(words, labels) for words, labels in zip(pool, read())]

    @torch.inference_mode()
    def _ask(self, sentences: Sequence[Sequence[str]]) -> Callable[[], list[list[Label]]]:
        """Start the model on a pool; what it returns waits for it and chooses the labels."""
        config = self.model.config
        examples = examples_of(sentences, self.tokenizer, config.max_position_embeddings)
        answers = [(batch, self._answer(batch)) for batch in self._batches(examples)]

        def read() -> list[list[Label]]:
            logp = [torch.empty(len(words), config.num_labels) for words in sentences]
            for batch, answer in answers:
                parts = answer.read().split([len(example.firsts) for example in batch.examples])
                for example, part in zip(batch.examples, parts):
                    stop = example.first_word + len(example.firsts)
                    logp[example.sentence][example.first_word : stop] = part
            return [self._choose(logp_WL) for logp_WL in logp]

        return read

    def _answer(self, batch: Batch) -> Answer:
        logits = self.model(**batch.inputs).logits.flatten(end_dim=-2)
        logp_WL = logits[batch.first_W].float().log_softmax(-1)
        if not logp_WL.is_cuda:
            return Answer(logp_WL, logits.dtype)
        # Copied behind the batch itself, and not behind those that are started before it is read.
        logp_WL = logp_WL.to("cpu", non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(logits.device))
        return Answer(logp_WL, logits.dtype, done)

    def _choose(self, logp_WL: Tensor) -> list[Label]:
        if not len(logp_WL):
            return []
        names = self.model.config.labels
        ids = best_labels(logp_WL, names) if self.well_formed else logp_WL.argmax(-1).tolist()
        scores = logp_WL[range(len(ids)), ids].exp().tolist()
        return [Label(names[i], score) for i, score in zip(ids, scores)]

    def _batches(self, examples: list[Example]) -> Iterator[Batch]:
        """Examples of like length together, at most ``batch_tokens`` with the padding."""
        group: list[Example] = []
        tokens = 0
        for example in sorted(examples, key=lambda e: len(e.ids)):
            size = len(example.ids)
            # Sorted, so this one would be the longest of its group.
            tokens = tokens + size if self.pack else size * (len(group) + 1)
            if group and tokens > self.batch_tokens:
                yield self._batch(group)
                group, tokens = [], size
            group.append(example)
        if group:
            yield self._batch(group)

    def _batch(self, group: list[Example]) -> Batch:
        device, pad_id = self.model.classifier.weight.device, self.tokenizer.pad_id
        if self.pack:
            return packed(group, device, pad_id if device.type == "cpu" else None)
        return padded(group, pad_id, device=device)


def pools(items: Iterable[T], characters: Callable[[T], int]) -> Iterator[list[T]]:
    """Lists of items that are tagged together, as many as fit into ``POOL``."""
    pool: list[T] = []
    held = 0
    for item in items:
        size = characters(item)
        if pool and held + size > POOL_CHARACTERS:
            yield pool
            pool, held = [], 0
        pool.append(item)
        held += size
        if len(pool) == POOL:
            yield pool
            pool, held = [], 0
    if pool:
        yield pool


def read_ahead(asked: Iterable[Callable[[], T]], depth: int) -> Iterator[T]:
    """What has been asked for, in order, while ``depth`` more are under way."""
    waiting: deque[Callable[[], T]] = deque()
    for read in asked:
        waiting.append(read)
        if len(waiting) > depth:
            yield waiting.popleft()()
    for read in waiting:
        yield read()


class Words(NamedTuple):
    """The words of a text and where they stand in it."""

    text: str
    words: list[str]
    spans: list[tuple[int, int]]


def split(text: str) -> Words:
    """Words by white space, with punctuation at either end taken off, one word a character."""
    spans = []
    for match in re.finditer(r"\S+", text):
        start, stop = match.span()
        core_start, core_stop = start, stop
        while core_start < core_stop and _is_punctuation(text[core_start]):
            core_start += 1
        while core_stop > core_start and _is_punctuation(text[core_stop - 1]):
            core_stop -= 1
        spans += [(i, i + 1) for i in range(start, core_start)]
        if core_start < core_stop:
            spans.append((core_start, core_stop))
        spans += [(i, i + 1) for i in range(core_stop, stop)]
    return Words(text, [text[start:stop] for start, stop in spans], spans)


def join(words: Sequence[str]) -> Words:
    """The text that words make when joined by single spaces."""
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return Words(" ".join(words), list(words), spans)


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] == "P"


def entities(words: Words, labels: Sequence[Label]) -> list[Entity]:
    """Words with their labels to entities, by the rule of conlleval (metrics.py)."""
    found = []
    for type_, first, stop in lenient_entities([label.name for label in labels]):
        start_char, stop_char = words.spans[first][0], words.spans[stop - 1][1]
        score = sum(label.score for label in labels[first:stop]) / (stop - first)
        found.append(Entity(words.text[start_char:stop_char], type_, start_char, stop_char, score))
    return found
