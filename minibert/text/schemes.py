"""The ways to write entities as one tag a word, and how each is read as BIO.

    BIO           B-X begins an entity, I-X continues one (also called IOB2)
    IOB1          I-X begins an entity; B-X only where one of the same type ends just before
    IO            I-X for every word of an entity; neighbours of one type cannot be told apart
    BIOES         as BIO, but the last word is E-X, and the only word S-X (also called IOBES)
    BILOU         the same with L-X and U-X
    plain names   X for every word of an entity, as in IO

A set of labels or tags shows its scheme: in BIO a type that has an I- has a B- too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

from minibert.files import MinibertError

BIO = "BIO"
PREFIXED = re.compile(r"[BIESLU]-\S+")
PLAIN = re.compile(r"(?!LABEL_\d+$)[^\W\d_]\S*")  # LABEL_0 is what transformers calls a class
FOREIGN = re.compile(r"(?:[BIESLUbiesluo]_|[biesluo]-)\S+|\S+[-_][BIESLU]")


def scheme_of(tags: Collection[str], source: str) -> str:
    """The scheme of these tags, by its name in the table above.

    Args:
        tags: every tag that a model gives or a file has.
        source: where they are from, for messages.

    Raises:
        MinibertError: they are of none of them; names the tag that shows it.
    """
    prefixed = [tag for tag in tags if PREFIXED.fullmatch(tag)]
    prefixes = {tag[0] for tag in prefixed}
    other = [tag for tag in tags if tag != "O" and not PREFIXED.fullmatch(tag)]
    if "O" not in tags and not prefixed:
        raise MinibertError(
            f"{source}: {_some(tags)}: no O among the tags, so they do not mark entities: "
            "name a model or file for named entities"
        )
    if prefixed and other:
        raise MinibertError(
            f"{source}: {other[0]!r}: not a tag of {'BIOES' if prefixes - set('BI') else BIO}"
            f", unlike {prefixed[0]}: write O, B-TYPE or I-TYPE"
        )
    if wrong := [tag for tag in other if FOREIGN.fullmatch(tag) or not PLAIN.fullmatch(tag)]:
        raise MinibertError(
            f"{source}: {wrong[0]!r}: neither O, B-TYPE or I-TYPE nor the name of a type: "
            "rename the labels to BIO"
        )
    if other:
        return "plain names"
    if prefixes & set("ES") and prefixes & set("LU"):
        raise MinibertError(
            f"{source}: {_some(prefixed)}: tags of BIOES and of BILOU: rename them to BIO"
        )
    if prefixes & set("ES"):
        return "BIOES"
    if prefixes & set("LU"):
        return "BILOU"
    begun = {tag[2:] for tag in prefixed if tag[0] == "B"}
    if all(tag[2:] in begun for tag in prefixed):
        return BIO
    return "IOB1" if begun else "IO"


def types_of(tags: Collection[str]) -> list[str]:
    """The entity types of these tags, in their order."""
    return list(dict.fromkeys(type_of(tag) for tag in tags if tag != "O"))


def type_of(tag: str) -> str:
    """``TITLE`` of ``B-TITLE`` and of ``TITLE``; O is O."""
    return tag[2:] if PREFIXED.fullmatch(tag) else tag


def to_bio(tags: Sequence[str]) -> list[str]:
    """The tags of one sentence in BIO.

    A tag continues the entity before it if both have the same type and the tag begins no entity.
    Every other tag with a type begins an entity, as in conlleval.
    """
    return [_bio(tag, before) for before, tag in pairwise(["O", *tags])]


def _bio(tag: str, before: str) -> str:
    if tag == "O":
        return tag
    begins = tag[0] in "BSU" and PREFIXED.fullmatch(tag)
    ended = before == "O" or (before[0] in "ELSU" and PREFIXED.fullmatch(before))
    inside = not begins and not ended and type_of(before) == type_of(tag)
    return f"{'I' if inside else 'B'}-{type_of(tag)}"


def bio_labels(labels: Sequence[str]) -> Iterator[str]:
    """O, then B- and I- of every type of these labels, in their order."""
    yield "O"
    for type_ in types_of(labels):
        yield from (f"B-{type_}", f"I-{type_}")


def _some(tags: Collection[str]) -> str:
    return ", ".join(list(tags)[:5]) + (" ..." if len(tags) > 5 else "")
