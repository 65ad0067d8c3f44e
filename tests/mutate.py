"""Mutations of valid input: bytes, JSON, safetensors files, BIO files and text.

Every function takes a ``random.Random``: the same seed gives the same mutation.
"""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any


class Raw(str):
    """JSON text that no Python value produces: NaN, a number of 400 digits, a duplicate key."""


NUMBERS = (0, 1, -1, 2, 3, 255, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**9, 10**12)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    *(-number for number in NUMBERS[4:]),
    *(0.5, -0.5, 1e308, 1e-320, True, False, None, "", "a", "12", "é", "\x00", "a\nb", "[UNK]"),
    *("../../etc/passwd", "/etc/passwd", "O", "B-X", "I-X", "B-", "x" * 10_000, [], {}, [[]], [0]),
    *map(Raw, ("NaN", "Infinity", "-Infinity", "1e999", "-0", "1" * 400, "1" * 5000, "0.1e-999")),
    *map(Raw, (r'"\ud800"', r'"B-\udfff"', r'"\u0000"', r'"\u2028"', '"\t"', "'a'", "", "tru")),
    Raw("[" * 300 + "]" * 300),
    Raw("[" * 50_000 + "]" * 50_000),
    Raw('{"a":' * 5000 + "1" + "}" * 5000),
    list(range(2000)),
)
BYTES = b'\x00\xff\x80\n\r\t"{}[]:,\\ 09-\xed\xa0\xf4\xc3'
# Letters, marks, joiners, directions, separators, private and unassigned characters.
ALPHABETS = (
    "abc XYZ,.?!-'\"",
    " \t\x0b\x0c\x1c\x1d\x1e\x1f\x85\u00a0\u1680\u2000\u2028\u2029\u202f\u3000",
    "\x00\x01\x07\x08\x1b\x7f\x80\x9f",
    "e\u0301\u0300\u0327\u0489a\u20dd",
    "👨\u200d👩\u200d👧🏽🇩🇪\ufe0f1\u20e3",
    "\u200b\u200c\u200d\u2060\ufeff\u00ad",
    "\u202a\u202e\u2066\u2069\u200fשלוםمرحبا",
    "電影中文テストกำไร가\u1100\u1161",
    "\U0010ffff\ue000\ufffe\uffff\U000e0001𝒜ﬁŒİıßſ",
    "[MASK][UNK][PAD]##",
)


def bytes_(draw: Random, data: bytes) -> bytes:
    """One to four changes: bits, bytes and ranges altered, deleted, repeated, inserted."""
    damaged = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        size = len(damaged)
        a = draw.randrange(size + 1)
        b = min(size, a + draw.choice((1, 1, 2, 4, 8, 30, 300, size)))
        match draw.randrange(8):
            case 0 if a < size:
                damaged[a] ^= 1 << draw.randrange(8)
            case 1 if a < size:
                damaged[a] = draw.choice(BYTES)
            case 2:
                del damaged[a:b]
            case 3:
                damaged[b:b] = damaged[a:b] * draw.choice((1, 1, 2, 50))
            case 4:
                damaged[a:a] = draw.randbytes(draw.choice((1, 2, 8, 100)))
            case 5:
                del damaged[a:]
            case 6:
                damaged[a:b] = bytes(b - a)
            case _:
                damaged[a:b] = str(draw.choice(NUMBERS)).encode()
    return bytes(damaged)


def dumps(value: Any) -> str:
    """JSON, with ``Raw`` inserted unchanged."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{dumps(k)}:{dumps(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dumps, value)) + "]"
    return json.dumps(value)


def json_(draw: Random, value: Any) -> str:
    """The JSON of a value with one to three entries changed, deleted, duplicated or renamed."""
    root = {"": json.loads(json.dumps(value))}
    for _ in range(draw.randint(1, 3)):
        places = list(_places(root))
        # Every depth with the same probability: most entries of a tokenizer are its vocabulary.
        depth = draw.choice(sorted({depth for depth, _, _ in places}))
        _, holder, key = draw.choice([place for place in places if place[0] == depth])
        match draw.randrange(7):
            case 0 if holder is not root:
                del holder[key]
            case 1:
                _, other, other_key = draw.choice(places)
                holder[key] = json.loads(json.dumps(other[other_key]))  # Raw: a string
            case 2 if isinstance(holder, dict) and holder is not root:
                name = draw.choice((*holder, "", "../x", "\x00", "0", "x" * 300))
                holder[name] = holder.pop(key)
            case 3 if isinstance(holder, dict) and holder is not root:
                twice = f"{dumps(holder[key])},{dumps(key)}:{dumps(draw.choice(VALUES))}"
                holder[key] = Raw(twice)
            case _:
                # A copy: the next change may be inside it, and VALUES must not change.
                holder[key] = copy.deepcopy(draw.choice(VALUES))
    return dumps(root[""])


def _places(holder: dict | list, depth: int = 0):
    items = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, value in list(items):
        yield depth, holder, key
        if isinstance(value, dict | list):
            yield from _places(value, depth + 1)


def safetensors_(draw: Random, data: bytes) -> bytes:
    """A safetensors file with a wrong header: sizes, offsets, names, counts, its own length."""
    if draw.random() < 0.4:
        return bytes_(draw, data)
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if draw.random() < 0.7:
        header.pop("__metadata__", None)  # with the hash that would reveal the change
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    entry = header[name]
    match draw.randrange(9):
        case 0:
            entry["data_offsets"] = list(header[draw.choice(names)]["data_offsets"])
        case 1:
            entry["data_offsets"][draw.randrange(2)] = draw.choice(NUMBERS)
        case 2:
            entry["shape"] = [draw.choice(NUMBERS) for _ in range(draw.randint(0, 6))]
        case 3:
            # Shape and offsets that agree with each other, and claim any number of bytes.
            start, count = len(body), draw.choice((10**6, 10**9, 10**12, 2**60))
            header[name] = {"dtype": "U8", "shape": [count], "data_offsets": [start, start + count]}
        case 4:
            entry["dtype"] = draw.choice(
                ("F64", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F4", "I64", "U64", "BOOL", "C64", "X")
            )
        case 5:
            header[draw.choice(("../../x", "/etc/passwd", "", "a\nb", "\x00", "x" * 10_000))] = (
                header.pop(name)
            )
        case 6:
            shape = draw.choice(([0], [0, 2**62, 2**62], [0, 10**12], [2**64, 0], [0] * 200))
            for i in range(draw.choice((1, 10, 300))):
                header[f"t{i}"] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        case 7:
            header[name] = Raw(f"{dumps(entry)},{dumps(name)}:{dumps(entry)}")
        case _:
            pass
    text = json_(draw, header) if draw.random() < 0.3 else dumps(header)
    raw = text.encode("utf-8", "surrogatepass")
    claimed = len(raw) if draw.random() < 0.8 else draw.choice(NUMBERS)
    return (claimed % 2**64).to_bytes(8, "little") + raw + body


def text_(draw: Random, lines: int) -> str:
    """Lines from one to three alphabets, of 0 to 1000 characters."""
    made = []
    for _ in range(lines):
        letters = "".join(draw.sample(ALPHABETS, draw.randint(1, 3))) + " "
        made.append("".join(draw.choices(letters, k=draw.choice((0, 1, 5, 20, 60, 60, 1000)))))
    return "\n".join(made)


def lines_(draw: Random, data: bytes) -> bytes:
    """A file with lines deleted, repeated, swapped, joined, or with changed bytes."""
    if draw.random() < 0.4:
        return bytes_(draw, data)
    lines = data.split(b"\n")
    for _ in range(draw.randint(1, 4)):
        i, j = draw.randrange(len(lines)), draw.randrange(len(lines))
        match draw.randrange(7):
            case 0 if len(lines) > 1:
                del lines[i]
            case 1:
                lines.insert(j, lines[i])
            case 2:
                lines[i], lines[j] = lines[j], lines[i]
            case 3:
                lines[i] += draw.choice((b"\t", b" ", b"\r", b"\x00", b"")) + lines[j]
            case 4:
                lines[i] = bytes_(draw, lines[i])
            case 5:
                lines[i] = text_(draw, 1).encode("utf-8", "surrogatepass")
            case _:
                lines[i] = draw.choice(
                    (b"", b"\r", b"O", b"O\t", b"\tO", b"I-X\ty", b"[UNK]", b"\xff")
                )
    return b"\n".join(lines)
