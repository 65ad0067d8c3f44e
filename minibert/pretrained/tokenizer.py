"""Words in, word-pieces out, by the checkpoint's own files.

``WordPiece``  BERT and ERNIE (Devlin et al. 2019, section 3)
``BPE``        RoBERTa: byte-level byte-pair encoding (Radford et al. 2019, section 2.2). A space is
               part of the piece that follows it, so a word given alone needs one before it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from minibert.files import MinibertError, read_json, read_text, write_text

if TYPE_CHECKING:
    import tokenizers

MOST_PADDING = 512  # a model embeds fewer rows than this beyond its tokenizer's pieces


class Kind(NamedTuple):
    """The components of a family's tokenizer, and its special pieces."""

    family: str
    model: str
    normalizer: str
    pre_tokenizer: str
    pad: str
    unk: str
    cls: str
    sep: str
    mask: str


WORDPIECE = Kind(
    *("BERT", "WordPiece", "BertNormalizer", "BertPreTokenizer"),
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
)
BYTE_LEVEL = Kind(
    *("RoBERTa", "BPE", "NoneType", "ByteLevel"),
    *("<pad>", "<unk>", "<s>", "</s>", "<mask>"),
)


class Tokenizer:
    """A tokenizer of one of the two kinds, cased or uncased as it was trained.

    Args:
        backend: the components.
        source: for messages.
        prefix_space: for ``encode`` with BPE: whether a text begins with a space that it does not
            have. ``pieces`` puts one before every word.

    Raises:
        MinibertError: the backend is not a tokenizer of these kinds, or its vocabulary is damaged.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, source: Path | str, prefix_space: bool = False
    ):
        with _refusing(source):
            backend.no_truncation()  # some checkpoints carry a limit of 128 in tokenizer.json
            backend.no_padding()
            ids = backend.get_vocab()
        kind = BYTE_LEVEL if type(backend.model).__name__ == BYTE_LEVEL.model else WORDPIECE
        for part, name in (
            (backend.model, kind.model),
            (backend.normalizer, kind.normalizer),
            (backend.pre_tokenizer, kind.pre_tokenizer),
        ):
            # How other components treat a text, and how long they take, is unknown.
            if type(part).__name__ != name:
                raise MinibertError(
                    f"{source}: has {type(part).__name__} where a {kind.family} has {name}: "
                    f"use the tokenizer of a {kind.family}"
                )
        for name in (kind.pad, kind.unk, kind.cls, kind.sep, kind.mask):
            if name not in ids:
                raise MinibertError(
                    f"{source}: the vocabulary lacks {name}: use a {kind.family} vocabulary"
                )
        if kind == WORDPIECE:
            _check_wordpiece(backend, source)
        else:
            _check_byte_level(backend, ids, source)
        if len(set(ids.values())) < len(ids):
            twice, times = Counter(ids.values()).most_common(1)[0]
            raise MinibertError(
                f"{source}: {times} pieces have the number {twice}: fetch the file again"
            )
        if max(ids.values()) != len(ids) - 1:
            raise MinibertError(
                f"{source}: has {len(ids)} pieces, but numbers them up to {max(ids.values())}: "
                "fetch the file again"
            )
        with _refusing(source):
            bare, framed = (backend.encode("a", add_special_tokens=x).ids for x in (False, True))
        if framed != [ids[kind.cls], *bare, ids[kind.sep]]:
            raise MinibertError(
                f"{source}: its post_processor does not write {kind.cls} before a text and "
                f"{kind.sep} after it: use the tokenizer of a {kind.family}"
            )
        self.source = source
        self.kind = kind
        self.backend = backend
        self.prefix_space = prefix_space
        self.lowercase = kind == WORDPIECE and backend.normalizer.lowercase
        self.pad_id, self.unk_id, self.mask_id = ids[kind.pad], ids[kind.unk], ids[kind.mask]
        self.cls_id, self.sep_id = ids[kind.cls], ids[kind.sep]
        if kind == BYTE_LEVEL:
            self.backend.pre_tokenizer = _byte_level(prefix_space=True)
            # "<pad>" in a text is text: as the padding piece it would shift all positions after it.
            self.backend.encode_special_tokens = True
            special = {self.pad_id, self.cls_id, self.sep_id, self.mask_id}
            names = [kind.pad, kind.cls, kind.sep, kind.mask]
            if special & set(chain.from_iterable(self.pieces([names])[0])):
                raise MinibertError(
                    f"{source}: {kind.pad} in ordinary text is read as a special piece: "
                    f"use the tokenizer of a {kind.family}"
                )

    def __setstate__(self, state: dict) -> None:
        """After pickling or copying: a backend forgets how it reads special pieces."""
        self.__dict__.update(state)
        self.__dict__.pop("_of_texts", None)
        self.backend.encode_special_tokens = self.kind == BYTE_LEVEL

    @property
    def vocab_size(self) -> int:
        """Number of word-pieces, including special ones."""
        return self.backend.get_vocab_size()

    def check_fits(self, vocab_size: int) -> None:
        """Compare with the number of pieces that a model embeds.

        It may be larger, because tables are padded to round sizes.

        Raises:
            MinibertError: the tokenizer cannot be the model's.
        """
        if not self.vocab_size <= vocab_size < self.vocab_size + MOST_PADDING:
            raise MinibertError(
                f"{self.source}: the tokenizer has {self.vocab_size} pieces, but the model embeds "
                f"{vocab_size}: use the tokenizer files that belong to the weights"
            )

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Tokenizer:
        """Load tokenizer.json, or if it is missing, vocab.txt or vocab.json and merges.txt.

        Raises:
            MinibertError: all are missing, or a file is damaged.
        """
        from tokenizers import Tokenizer as Backend
        from tokenizers.implementations import BertWordPieceTokenizer

        directory = Path(directory)
        whole, vocabulary = directory / "tokenizer.json", directory / "vocab.txt"
        settings_path = directory / "tokenizer_config.json"
        settings = {}
        if settings_path.is_file():
            settings = read_json(settings_path, "make it readable")
            if not isinstance(settings, dict):
                raise MinibertError(f"{settings_path}: must hold a JSON object: fetch it again")
        lowercase = settings.get("do_lower_case", True)
        prefix_space = settings.get("add_prefix_space", False)
        for name, value in (("do_lower_case", lowercase), ("add_prefix_space", prefix_space)):
            if not isinstance(value, bool):
                raise MinibertError(
                    f"{settings_path}: {name} must be true or false, got {value!r}: "
                    "fetch the file again"
                )
        if whole.is_file():
            with _refusing(whole):
                backend = Backend.from_str(read_text(whole, "make it readable"))
            made = cls(backend, whole, prefix_space)
            if (
                made.kind == WORDPIECE
                and lowercase != made.lowercase
                and "do_lower_case" in settings
            ):
                raise MinibertError(
                    f"{settings_path}: do_lower_case is {lowercase}, but {whole.name} says "
                    f"{made.lowercase}: fetch both again"
                )
            return made
        if (directory / "merges.txt").is_file() and not vocabulary.is_file():
            return cls(_from_merges(directory), directory / "merges.txt", prefix_space)
        pieces = read_text(vocabulary, "name a directory with tokenizer.json or vocab.txt")
        ids: dict[str, int] = {}
        for i, piece in enumerate(pieces.rstrip("\n").split("\n")):
            piece = piece.rstrip("\r")
            if ids.setdefault(piece, i) != i:
                raise MinibertError(
                    f"{vocabulary}:{i + 1}: {piece!r} is on line {ids[piece] + 1} already: "
                    "fetch the file again"
                )
        with _refusing(vocabulary):
            backend = BertWordPieceTokenizer(ids, lowercase=lowercase)._tokenizer
        return cls(backend, vocabulary)

    def save_pretrained(self, directory: str | Path, *, for_words: bool = False) -> None:
        """Write tokenizer.json, tokenizer_config.json and the vocabulary, as transformers does.

        Args:
            directory: created if it does not exist.
            for_words: of a model trained on ``pieces``: with BPE, transformers will put a space
                before every word as well.

        Raises:
            MinibertError: the directory cannot be written or the disk is full.
        """
        directory = Path(directory)
        pieces = dict(sorted(self.backend.get_vocab().items(), key=lambda item: item[1]))
        settings: dict[str, bool | str]
        if self.kind == BYTE_LEVEL:
            prefix_space = for_words or self.prefix_space
            whole = json.loads(self.backend.to_str())
            whole["pre_tokenizer"]["add_prefix_space"] = prefix_space
            text = json.dumps(whole, ensure_ascii=False, indent=2)
            merges = "".join(f"{' '.join(pair)}\n" for pair in whole["model"]["merges"])
            write_text(directory / "vocab.json", json.dumps(pieces, ensure_ascii=False))
            write_text(directory / "merges.txt", f"#version: 0.2\n{merges}")
            settings = {"add_prefix_space": prefix_space, "tokenizer_class": "RobertaTokenizer"}
        else:
            text = self.backend.to_str()
            write_text(directory / "vocab.txt", "".join(f"{piece}\n" for piece in pieces))
            settings = {"do_lower_case": self.lowercase, "tokenizer_class": "BertTokenizer"}
        write_text(directory / "tokenizer.json", text)
        write_text(directory / "tokenizer_config.json", json.dumps(settings) + "\n")

    def pieces(self, sentences: Sequence[Sequence[str | None]]) -> list[list[list[int]]]:
        """The word-piece ids of every word of every sentence, at least one a word.

        None is the mask. A word that normalises to nothing, such as control characters, becomes
        [UNK], so that it can have a label. With BPE, words that look like special pieces are
        ordinary text.
        """
        result = []
        encodings = self.backend.encode_batch(
            [[_encodable(word or "") for word in words] for words in sentences],
            is_pretokenized=True,
            add_special_tokens=False,
        )
        for words, encoding in zip(sentences, encodings):
            pieces: list[list[int]] = [[] for _ in words]
            for number, piece in zip(encoding.word_ids, encoding.ids):
                if number is not None:
                    pieces[number].append(piece)
            for word, ids in zip(words, pieces):
                if not ids:
                    ids.append(self.mask_id if word is None else self.unk_id)
            result.append(pieces)
        return result

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with [CLS] and [SEP]. With BPE, <mask> is the only special piece in it."""
        *masked, rest = [_encodable(text)]
        if self.kind == BYTE_LEVEL:
            *masked, rest = rest.split(self.kind.mask)
        ids = [self.cls_id]
        for part in masked:  # the space before <mask> belongs to it
            ids += [*self._text_ids(part.rstrip()), self.mask_id]
        return [*ids, *self._text_ids(rest), self.sep_id]

    def _text_ids(self, text: str) -> list[int]:
        return self._of_texts.encode(text, add_special_tokens=False).ids

    @cached_property
    def _of_texts(self) -> tokenizers.Tokenizer:
        """The backend of ``encode``; with BPE it differs from that of ``pieces`` in the space."""
        if self.kind == WORDPIECE:
            return self.backend
        backend = type(self.backend).from_str(self.backend.to_str())
        backend.pre_tokenizer = _byte_level(self.prefix_space)
        backend.encode_special_tokens = True
        return backend


def _check_wordpiece(backend: tokenizers.Tokenizer, source: Path | str) -> None:
    if not 0 < backend.model.max_input_chars_per_word <= 1000:  # time is quadratic in it
        raise MinibertError(
            f"{source}: max_input_chars_per_word is {backend.model.max_input_chars_per_word}: "
            "use the 100 of BERT"
        )
    if backend.model.continuing_subword_prefix != "##":
        raise MinibertError(
            f"{source}: continuing_subword_prefix is "
            f"{backend.model.continuing_subword_prefix!r}: use the ## of BERT"
        )
    if backend.model.unk_token != "[UNK]" or backend.model.token_to_id("[UNK]") is None:
        raise MinibertError(
            f"{source}: unk_token is {backend.model.unk_token!r}: "
            "use the tokenizer of a BERT, whose unk_token is [UNK]"
        )


def _check_byte_level(
    backend: tokenizers.Tokenizer, ids: dict[str, int], source: Path | str
) -> None:
    model = backend.model
    for name, value in {
        "use_regex": not backend.pre_tokenizer.use_regex,
        "dropout": model.dropout,
        "ignore_merges": model.ignore_merges,
        "continuing_subword_prefix": model.continuing_subword_prefix,
        "end_of_word_suffix": model.end_of_word_suffix,
    }.items():
        if value:
            raise MinibertError(
                f"{source}: {name} is not that of a RoBERTa: use the tokenizer of one"
            )
    lacking = set(backend.pre_tokenizer.alphabet()) - ids.keys()
    if lacking:  # these bytes would vanish
        raise MinibertError(
            f"{source}: the vocabulary lacks {len(lacking)} of 256 bytes, such as "
            f"{min(lacking)!r}: use a RoBERTa vocabulary"
        )


def _byte_level(prefix_space: bool) -> tokenizers.pre_tokenizers.PreTokenizer:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)


def _from_merges(directory: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a RoBERTa from vocab.json and merges.txt."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    vocabulary, merges = directory / "vocab.json", directory / "merges.txt"
    ids = read_json(
        vocabulary, "name a directory with tokenizer.json, or vocab.json and merges.txt"
    )
    pairs = []
    for number, line in enumerate(read_text(merges, "make it readable").split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.removesuffix("\r").split(" ")
        if len(pair) != 2:
            raise MinibertError(
                f"{merges}:{number}: {line!r} is not two pieces: fetch the file again"
            )
        pairs.append((pair[0], pair[1]))
    with _refusing(vocabulary):
        backend = Tokenizer(models.BPE(ids, pairs))
        backend.pre_tokenizer = _byte_level(prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        kind = BYTE_LEVEL
        # The space before <mask> belongs to it, as in pre-training.
        for name in (kind.cls, kind.pad, kind.sep, kind.unk, kind.mask):
            if name in ids:
                token = AddedToken(name, lstrip=name == kind.mask, normalized=False, special=True)
                backend.add_special_tokens([token])
        if kind.cls in ids and kind.sep in ids:
            sep, cls = ((name, ids[name]) for name in (kind.sep, kind.cls))
            backend.post_processor = processors.RobertaProcessing(sep, cls, add_prefix_space=False)
    return backend


@contextmanager
def _refusing(source: Path | str) -> Iterator[None]:
    """Turn an error of the tokenizers library into one line.

    The library raises bare Exceptions. Where it panics, the exception is not an Exception and its
    type cannot be imported.

    Raises:
        MinibertError: with the library's message.
    """
    try:
        yield
    except MinibertError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise MinibertError(f"{source}: not a tokenizer ({error}): fetch the file again") from None


def _encodable(word: str) -> str:
    """Replace lone surrogates, which the backend refuses."""
    return word.encode("utf-8", "replace").decode("utf-8")
