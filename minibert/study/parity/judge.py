"""What a comparison with transformers found: every tensor judged, as a table or JSON.

What is promised depends on what runs:

padded, eager or sdpa, on a CPU
        the same bits as transformers.
packed, fused or on a GPU
        another order of summation, so a bounded error: at most ``FORWARD`` times that of
        transformers, for gradients ``BACKWARD`` times, both measured against transformers in
        float64 with the same weights (the rule of flash-attention's tests/models/test_bert.py).

Errors are relative and in the 2-norm, ‖x − exact‖ / ‖exact‖: the largest error of one element of a
small tensor is mostly chance, the root mean square is not. The error of a parameter after a step
is relative to the distance that the step moves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from textwrap import fill

import torch
from torch import Tensor

from minibert.study.intermediates import INTERMEDIATES, intermediate_of
from minibert.study.parity import ulps

FORWARD, BACKWARD = 2.0, 3.0

PARAMETERS = {
    "gradient": "gradient of a parameter",
    "step": "parameter after one AdamW step",
    "dropout": "gradient of a parameter with dropout",
}
OPERATIONS = {row.name: row.what for row in INTERMEDIATES.values()} | PARAMETERS

# By name; one tensor each, or for packed attention maps one per sentence. The name of a parameter's
# tensor is "gradient:", "step:" or "dropout:" and minibert's name of the parameter.
Values = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Row:
    """One tensor of minibert compared with the same tensor of transformers."""

    name: str
    equal: bool
    max_abs: float  # largest absolute difference
    ulps: int  # largest distance in representable numbers; -1 where one side is not finite
    error: float | None  # of minibert, relative to transformers in float64
    reference_error: float | None  # of transformers in this dtype, relative to the same
    own_error: float | None  # of minibert, relative to minibert in float64
    bound: float | None  # the error that a bounded promise permits
    kept: bool  # the promise
    where: str | None  # the first element that differs, and both values

    @property
    def operation(self) -> str:
        """Key of ``OPERATIONS``."""
        kind = self.name.partition(":")[0]
        return kind if kind in PARAMETERS else intermediate_of(self.name).name

    @property
    def ratio(self) -> float | None:
        """The error as a fraction of the permitted one: above 1 is too much."""
        return None if self.error is None or self.bound is None else self.error / self.bound

    @property
    def vanishes(self) -> bool:
        """Whether the exact value is zero, or nearly, and both libraries hold rounding alone.

        Such is the gradient of the key's bias, which adds one number to all scores of a row; the
        softmax cancels it.
        """
        return self.reference_error is not None and 1 < self.reference_error < inf

    def __str__(self) -> str:
        return f"{self.name} ({OPERATIONS[self.operation]}), {self.where}"


@dataclass(frozen=True)
class Comparison:
    """One combination of attention, dtype and layout; rows in the order of computation."""

    attn: str
    dtype: str
    layout: str
    rows: list[Row]
    device: str = "cpu"
    who: str = "minibert"  # whose numbers are judged
    bits: bool = False  # whether bit equality is promised, and not only a bounded error

    @property
    def title(self) -> str:
        """The combination."""
        where = "" if self.device == "cpu" else f" on {self.device}"
        return f"{self.attn} {self.dtype} {self.layout}{where}"

    @property
    def promise(self) -> str:
        """What is promised for the combination."""
        if self.bits:
            return "bit-equal"
        return f"error within {FORWARD:g}x, gradients {BACKWARD:g}x, of transformers' own"

    @property
    def kept(self) -> bool:
        """Whether every row keeps the promise."""
        return self.first_broken is None

    @property
    def margin(self) -> str:
        """How far the promise is from breaking, in a few words."""
        if self.bits:
            equal = sum(row.equal for row in self.rows)
            return f"{equal} of {len(self.rows)} equal"
        ratios = [row.ratio for row in self.rows if row.ratio is not None]
        return f"{max(ratios, default=0):.2f} of the bound"

    def __str__(self) -> str:
        return f"{table(self)}\n{legend([self])}"

    @property
    def first_difference(self) -> Row | None:
        """The first tensor whose bits differ."""
        return next((row for row in self.rows if not row.equal), None)

    @property
    def first_broken(self) -> Row | None:
        """The first tensor that breaks the promise."""
        return next((row for row in self.rows if not row.kept), None)


def same_bits(attn: str, layout: str, device: str) -> bool:
    """Whether bit equality is promised, and not only a bounded error."""
    return layout == "padded" and attn != "fused" and device == "cpu"


def judge(
    bits: bool,
    got: Values,
    expected: Values,
    exact: Values,
    own: Values | None,
    before: dict[str, Tensor],
) -> list[Row]:
    """Compare every tensor of minibert with transformers', and check the promise.

    Args:
        bits: whether bit equality is promised; see ``same_bits``.
        got, expected: minibert's and transformers' in the dtype under test.
        exact, own: transformers' and minibert's in float64; without ``own`` no ``own_error``.
        before: the parameters before the step, by minibert's name.
    """
    # The reference can be accidentally exact on small tensors, so each bound is floored by the
    # error of its inputs: a gradient's by that of the logits, and a parameter's by that of all
    # parameters together, because Adam's first step is little more than the gradient's sign.
    floor = {"gradient": _error("logits", expected["logits"], exact["logits"], before)}
    if before:
        floor["step"] = _joint_error(expected, exact, before)
    rows: list[Row] = []
    for name, parts in got.items():
        x, other = _flat(parts), _flat(expected[name])
        equal = kept = bool(ulps.same(x, other).all())
        error = reference_error = own_error = bound = None
        if name in exact:
            reference_error = _error(name, expected[name], exact[name], before)
            error = reference_error if equal else _error(name, parts, exact[name], before)
            own_error = None if own is None else _error(name, parts, own[name], before)
            kind = name.partition(":")[0]
            factor = BACKWARD if kind in floor else FORWARD
            rounding = torch.finfo(x.dtype).eps / 2  # one more than the reference
            bound = factor * max(reference_error, floor.get(kind, 0.0)) + rounding
            if not bits:
                kept = error <= bound
        rows.append(
            Row(
                name,
                equal,
                0.0 if equal else ulps.max_abs(x, other),
                ulps.ulps(x, other),
                error,
                reference_error,
                own_error,
                bound,
                kept,
                None if equal else _first(parts, expected[name]),
            )
        )
    return rows


def _error(name: str, parts: list[Tensor], exact: list[Tensor], before: dict[str, Tensor]) -> float:
    """The relative error of one tensor."""
    x, true = _flat(parts), _flat(exact)
    if name.endswith(".scores"):  # masked scores hold the lowest number of their dtype: leave out
        unmasked = true > torch.finfo(true.dtype).min / 2
        x, true = x[unmasked], true[unmasked]
    kind, _, parameter = name.partition(":")
    if kind == "step":  # float64 holds both with far more digits than the step needs
        start = before[parameter].flatten().double()
        x, true = x.double() - start, true - start
    return ulps.relative_error(x, true)


def _joint_error(values: Values, exact: Values, before: dict[str, Tensor]) -> float:
    """The relative error of the step of all parameters as one vector."""
    gap = moved = 0.0
    for name, start in before.items():
        x, true = values[f"step:{name}"][0].double(), exact[f"step:{name}"][0]
        gap += torch.linalg.vector_norm(x - true).item() ** 2
        moved += torch.linalg.vector_norm(true - start.double()).item() ** 2
    return (gap / moved) ** 0.5


def _flat(parts: list[Tensor]) -> Tensor:
    return parts[0].flatten() if len(parts) == 1 else torch.cat([part.flatten() for part in parts])


def _first(parts: list[Tensor], expected: list[Tensor]) -> str:
    """The first element that differs: its index and both values."""
    for number, (x, other) in enumerate(zip(parts, expected)):
        differ = (~ulps.same(x, other)).flatten().nonzero()
        if len(differ):
            index = [int(i) for i in torch.unravel_index(differ[0, 0], x.shape)]
            sentence = f"sentence {number}, " if len(parts) > 1 else ""
            a, b = x[tuple(index)].item(), other[tuple(index)].item()
            return f"first at {sentence}{index}: {a!r} instead of {b!r}"
    raise AssertionError("nothing differs")


COLUMNS = {
    "max |Δ|": "largest absolute difference from transformers",
    "ULPs": "largest difference in representable numbers; inf where one side is not finite",
    "error": "relative error of {who}: ‖x − exact‖ / ‖exact‖, exact being transformers in float64",
    "reference": "the same error of transformers in this dtype",
    "float64": "error of {who} relative to {who} itself in float64",
    "÷ bound": "error as a fraction of the permitted one; above 1 breaks a bounded promise",
}
WIDTHS = dict(zip(COLUMNS, (7, 10, 7, 9, 7, 7)))  # of the columns of ``table``, in characters
NAME = 25  # the same of the names: an operation and a layer
VANISHES = (
    "zero, or nearly, in exact arithmetic, such as the gradient of the key's bias, which the "
    "softmax cancels: both sides hold rounding alone, so ULPs and relative errors mean nothing. "
    "It is kept while the rounding of {who} is no larger than permitted."
)


def table(comparison: Comparison, full: bool = False) -> str:
    """A comparison as text: the worst tensor of every operation, or with ``full`` every tensor.

    Rows have at most 80 columns: a long name stands above its numbers.
    ``>`` marks a broken promise; ``legend`` explains the columns.
    """
    c = comparison
    head = " ".join(f"{name:>{width}}" for name, width in WIDTHS.items())
    lines = [
        f"{c.title}: {c.promise}: {'kept' if c.kept else 'BROKEN'}",
        f"  {'':{NAME}} {head}",
    ]
    for row in c.rows if full else _worst(c.rows):
        name = row.name if full else f"{row.operation:16} {_short(row)}"
        numbers = [
            format(row.max_abs, ".1e"),
            "*" if row.vanishes and not row.equal else "inf" if row.ulps < 0 else str(row.ulps),
            *("*" if row.vanishes else _number(x) for x in (row.error, row.reference_error)),
            "*" if row.vanishes else _number(row.own_error),
            "-" if row.ratio is None else format(row.ratio, ".2f" if row.ratio < 1000 else ".1e"),
        ]
        mark = "  " if row.kept else "> "
        if len(name) > NAME:
            lines.append(f"{mark}{name}")
            mark, name = "  ", ""
        cells = (f"{x:>{width}}" for x, width in zip(numbers, WIDTHS.values()))
        lines.append(f"{mark}{name:{NAME}} " + " ".join(cells))
    if c.first_difference is None:
        lines.append("  no difference from transformers")
    else:
        lines.append(f"  first difference: {c.first_difference}")
    if c.first_broken is not None:
        lines.append(f"  first broken: {c.first_broken}")
    return "\n".join(lines)


def _number(x: float | None) -> str:
    return "-" if x is None else format(x, ".1e")


def legend(comparisons: Sequence[Comparison]) -> str:
    """What the columns of ``table`` mean, with a footnote if a tensor needs it."""
    who = comparisons[0].who if comparisons else "minibert"
    lines = [f"  {name:>9}  {what.format(who=who)}" for name, what in COLUMNS.items()]
    if any(row.vanishes for c in comparisons for row in c.rows):
        lines.append(f"  {'*':>9}  {VANISHES.format(who=who)}")
    return "\n".join(fill(line, 80, subsequent_indent=" " * 13) for line in lines)


def _worst(rows: list[Row]) -> list[Row]:
    """The worst row of every operation: a broken promise, a difference, the largest ratio."""
    worst: dict[str, Row] = {}
    for row in rows:
        known = worst.setdefault(row.operation, row)
        if _badness(row) > _badness(known):
            worst[row.operation] = row
    return list(worst.values())


def _badness(row: Row) -> tuple[bool, bool, float]:
    return not row.kept, not row.equal, row.max_abs if row.ratio is None else row.ratio


def _short(row: Row) -> str:
    """What tells the rows of one operation apart: the parameter or the layer."""
    if ":" in row.name:
        return row.name.partition(":")[2].removeprefix("bert.")
    return f"layer {row.name.split('.')[1]}" if intermediate_of(row.name).in_layer else ""


def to_dict(comparison: Comparison) -> dict:
    """A comparison for JSON, with null for infinite numbers."""
    c = comparison
    found = {"first_difference": c.first_difference, "first_broken": c.first_broken}
    return {
        "attn": c.attn,
        "dtype": c.dtype,
        "layout": c.layout,
        "device": c.device,
        "promise": c.promise,
        "kept": c.kept,
        **{key: row and row.name for key, row in found.items()},
        "rows": [
            {
                key: None if value in (inf, -1) else value
                for key, value in {**asdict(row), "operation": row.operation}.items()
            }
            for row in c.rows
        ],
    }
