"""Words in, word-pieces out, by the checkpoint's own files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from minibert.files import MinibertError, read_json, read_text, write_text

if TYPE_CHECKING:
    import tokenizers

MOST_PADDING = 512  # a model embeds fewer rows than this beyond its tokenizer's pieces


class Tokenizer:
    """A WordPiece tokenizer (Devlin et al. 2019, section 3), cased or uncased as it was trained.

    Raises:
        MinibertError: the backend is not a BERT tokenizer, or its vocabulary is damaged.
    """

    def __init__(self, backend: tokenizers.Tokenizer, source: Path | str):
        with _refusing(source):
            backend.no_truncation()  # some checkpoints carry a limit of 128 in tokenizer.json
            backend.no_padding()
            ids = backend.get_vocab()
        for part, kind in (
            (backend.model, "WordPiece"),
            (backend.normalizer, "BertNormalizer"),
            (backend.pre_tokenizer, "BertPreTokenizer"),
        ):
            # How other components treat a text, and how long they take, is unknown.
            if type(part).__name__ != kind:
                raise MinibertError(
                    f"{source}: has {type(part).__name__} where a BERT has {kind}: "
                    "use the tokenizer of a BERT"
                )
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
        for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"):
            if name not in ids:
                raise MinibertError(f"{source}: the vocabulary lacks {name}: use a BERT vocabulary")
        if backend.model.unk_token != "[UNK]" or backend.model.token_to_id("[UNK]") is None:
            raise MinibertError(
                f"{source}: unk_token is {backend.model.unk_token!r}: "
                "use the tokenizer of a BERT, whose unk_token is [UNK]"
            )
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
        if framed != [ids["[CLS]"], *bare, ids["[SEP]"]]:
            raise MinibertError(
                f"{source}: its post_processor does not write [CLS] before a text and [SEP] after "
                "it: use the tokenizer of a BERT"
            )
        self.backend = backend
        self.lowercase = backend.normalizer.lowercase
        self.source = source
        self.pad_id, self.unk_id = ids["[PAD]"], ids["[UNK]"]
        self.cls_id, self.sep_id, self.mask_id = ids["[CLS]"], ids["[SEP]"], ids["[MASK]"]

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
        """Load tokenizer.json, or if it is missing, vocab.txt and tokenizer_config.json.

        Raises:
            MinibertError: both are missing, or a file is damaged.
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
        if not isinstance(lowercase, bool):
            raise MinibertError(
                f"{settings_path}: do_lower_case must be true or false, got {lowercase!r}: "
                "fetch the file again"
            )
        if whole.is_file():
            with _refusing(whole):
                backend = Backend.from_str(read_text(whole, "make it readable"))
            made = cls(backend, whole)
            if made.lowercase != settings.get("do_lower_case", made.lowercase):
                raise MinibertError(
                    f"{settings_path}: do_lower_case is {lowercase}, but {whole.name} says "
                    f"{made.lowercase}: fetch both again"
                )
            return made
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

    def save_pretrained(self, directory: str | Path) -> None:
        """Write tokenizer.json, vocab.txt and tokenizer_config.json, as transformers reads them.

        Raises:
            MinibertError: the directory cannot be written or the disk is full.
        """
        directory = Path(directory)
        write_text(directory / "tokenizer.json", self.backend.to_str())
        pieces = sorted(self.backend.get_vocab().items(), key=lambda item: item[1])
        write_text(directory / "vocab.txt", "".join(f"{piece}\n" for piece, _ in pieces))
        settings = {"do_lower_case": self.lowercase, "tokenizer_class": "BertTokenizer"}
        write_text(directory / "tokenizer_config.json", json.dumps(settings) + "\n")

    def pieces(self, sentences: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """The word-piece ids of every word of every sentence, at least one a word.

        A word that normalises to nothing, such as control characters, becomes [UNK], so that it can
        have a label.
        """
        result = []
        encodings = self.backend.encode_batch(
            [[_encodable(word) for word in words] for words in sentences],
            is_pretokenized=True,
            add_special_tokens=False,
        )
        for words, encoding in zip(sentences, encodings):
            pieces: list[list[int]] = [[] for _ in words]
            for word, piece in zip(encoding.word_ids, encoding.ids):
                if word is not None:
                    pieces[word].append(piece)
            result.append([ids or [self.unk_id] for ids in pieces])
        return result

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with [CLS] and [SEP]."""
        ids = self.backend.encode(_encodable(text), add_special_tokens=False).ids
        return [self.cls_id, *ids, self.sep_id]


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
