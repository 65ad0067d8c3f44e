"""What a comparison with transformers found: every tensor judged, and the whole as text or JSON.

The promise depends on what is computed:

padded, eager or sdpa, on the CPU
        the same bits as transformers.
packed, fused or on a GPU
        other kernels or no padding to compute, hence other sums: an error at most ``FORWARD``
        times, for gradients ``BACKWARD`` times, that of transformers itself, both measured against
        transformers in float64 with the same weights (the rule of flash-attention's
        tests/models/test_bert.py).

An error is a relative one in the 2-norm, ‖x − exact‖ / ‖exact‖: the largest single error of a small
tensor is a matter of luck, their root mean square is not. That of a parameter after a step is
relative to how far the step moves it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from minibert.study.parity import ulps

FORWARD, BACKWARD = 2.0, 3.0

OPERATIONS = {
    "embeddings.sum": "(word + segment) + position",
    "embeddings": "LayerNorm of the embeddings",
    "q": "query projection",
    "k": "key projection",
    "v": "value projection",
    "scores": "q kᵀ / √K + mask",
    "probs": "softmax of the scores",
    "context": "probabilities times values",
    "attention_output": "output projection of attention",
    "attention_norm": "LayerNorm of attention output + residual",
    "pre_gelu": "first linear layer of the FFN",
    "post_gelu": "GELU",
    "ffn_output": "second linear layer of the FFN",
    "ffn_norm": "LayerNorm of FFN output + residual",
    "logits": "head",
    "gradient": "gradient of a parameter",
    "step": "parameter after one AdamW step",
    "dropout": "gradient of a parameter with dropout",
}

Values = dict[str, list[Tensor]]  # by name; one tensor, or for packed maps one a sentence


@dataclass(frozen=True)
class Row:
    """One tensor of ours against the same of transformers."""

    name: str
    equal: bool
    max_abs: float  # largest absolute difference
    ulps: int  # largest distance in representable numbers; -1 where one side is not finite
    error: float | None  # ours, relative to transformers in float64
    reference_error: float | None  # that of transformers at this dtype
    own_error: float | None  # ours, relative to minibert in float64
    kept: bool  # the promise
    where: str | None  # the first element that differs, and both values

    @property
    def operation(self) -> str:
        """Key of ``OPERATIONS``."""
        kind = self.name.partition(":")[0]
        if kind in ("gradient", "step", "dropout"):
            return kind
        return self.name.rpartition(".")[2] if self.name.startswith("layers.") else self.name

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

    @property
    def title(self) -> str:
        """The combination."""
        where = "" if self.device == "cpu" else f" on {self.device}"
        return f"{self.attn} {self.dtype} {self.layout}{where}"

    @property
    def promise(self) -> str:
        """What is promised for the combination."""
        if same_bits(self.attn, self.layout, self.device):
            return "bit-equal"
        return f"error within {FORWARD:g}x, gradients {BACKWARD:g}x, of transformers' own"

    @property
    def kept(self) -> bool:
        """Whether every row keeps the promise."""
        return self.first_broken is None

    @property
    def first_difference(self) -> Row | None:
        """The first tensor whose bits differ."""
        return next((row for row in self.rows if not row.equal), None)

    @property
    def first_broken(self) -> Row | None:
        """The first tensor that breaks the promise."""
        return next((row for row in self.rows if not row.kept), None)


def same_bits(attn: str, layout: str, device: str) -> bool:
    """Whether bit equality is promised, or else a bounded error."""
    return layout == "padded" and attn != "fused" and device == "cpu"


def judge(
    bits: bool, got: Values, expected: Values, exact: Values, own: Values, start: dict[str, Tensor]
) -> list[Row]:
    """Every tensor of ours against the same of transformers, and the promise on it.

    Args:
        bits: whether the same bits are promised; see ``same_bits``.
        got, expected: ours and transformers' at the dtype in question.
        exact, own: transformers' and ours in float64.
        start: the parameters before the step, by our name.
    """
    rows: list[Row] = []
    # Transformers may hit a few numbers by luck, so none is asked to be better than what it comes
    # from: a gradient than the logits; a parameter after Adam's first step, which is but the sign
    # of its gradient, than all parameters together.
    least = {"gradient": _error("logits", expected["logits"], exact["logits"], start)}
    least["step"] = _joint_error(expected, exact, start)
    for name, parts in got.items():
        x, other = _flat(parts), _flat(expected[name])
        error = reference_error = own_error = None
        equal = torch.equal(x, other) or bool(ulps.same(x, other).all())
        kept = equal
        if name in exact:
            true, mine = _flat(exact[name]), _flat(own[name])
            reference_error = _error(name, expected[name], exact[name], start)
            error = reference_error if equal else _error(name, parts, exact[name], start)
            own_error = error if torch.equal(mine, true) else _error(name, parts, own[name], start)
            if not bits:
                kind = name.partition(":")[0]
                factor = BACKWARD if kind in least else FORWARD
                rounding = torch.finfo(x.dtype).eps / 2  # on top, one
                kept = error <= factor * max(reference_error, least.get(kind, 0.0)) + rounding
        rows.append(
            Row(
                name,
                equal,
                0.0 if equal else ulps.max_abs(x, other),
                0 if equal else ulps.ulps(x, other),
                error,
                reference_error,
                own_error,
                kept,
                None if equal else _first(parts, expected[name]),
            )
        )
    return rows


def _error(name: str, parts: list[Tensor], exact: list[Tensor], start: dict[str, Tensor]) -> float:
    """The relative error of one tensor."""
    x, true = _flat(parts), _flat(exact)
    if name.endswith(".scores"):  # but not of hidden ones: they hold the lowest of their dtype
        shown = true > torch.finfo(true.dtype).min / 2
        x, true = x[shown], true[shown]
    kind, _, parameter = name.partition(":")
    if kind == "step":  # float64 holds both to far more digits than the step needs
        before = start[parameter].flatten().double()
        x, true = x.double() - before, true - before
    return ulps.relative_error(x, true)


def _joint_error(values: Values, exact: Values, start: dict[str, Tensor]) -> float:
    """The relative error of one step of all parameters taken as one vector."""
    gap = moved = 0.0
    for name, before in start.items():
        x, true = values[f"step:{name}"][0].double(), exact[f"step:{name}"][0]
        gap += torch.linalg.vector_norm(x - true).item() ** 2
        moved += torch.linalg.vector_norm(true - before.double()).item() ** 2
    return (gap / moved) ** 0.5


def _flat(parts: list[Tensor]) -> Tensor:
    return parts[0].flatten() if len(parts) == 1 else torch.cat([part.flatten() for part in parts])


def _first(parts: list[Tensor], expected: list[Tensor]) -> str:
    """The first element that differs: where, and both values."""
    for number, (x, other) in enumerate(zip(parts, expected)):
        differ = (~ulps.same(x, other)).flatten().nonzero()
        if len(differ):
            index = [int(i) for i in torch.unravel_index(differ[0, 0], x.shape)]
            sentence = f"sentence {number}, " if len(parts) > 1 else ""
            a, b = x[tuple(index)].item(), other[tuple(index)].item()
            return f"first at {sentence}{index}: {a!r} instead of {b!r}"
    raise AssertionError("nothing differs")


def table(comparison: Comparison, full: bool = False) -> str:
    """A comparison as text: the worst of every operation, or with ``full`` every tensor."""
    c = comparison
    verdict = "kept" if c.kept else "BROKEN"
    lines = [
        f"{c.title}: {c.promise}: {verdict}",
        f"  {'':54} {'max |Δ|':>9} {'ULPs':>10} {'error':>9} {'reference':>9} {'float64':>9}",
    ]
    for row in c.rows if full else _worst(c.rows):
        numbers = [row.error, row.reference_error, row.own_error]
        errors = " ".join(f"{'-' if x is None else format(x, '.1e'):>9}" for x in numbers)
        name = row.name if full else f"{row.operation:17} {_short(row)}"
        mark = "" if row.kept else "  <-"
        lines.append(
            f"  {name:54} {row.max_abs:9.1e} {'inf' if row.ulps < 0 else row.ulps:>10} "
            f"{errors}{mark}"
        )
    if c.first_difference is None:
        lines.append("  no difference to transformers")
    else:
        lines.append(f"  first difference: {c.first_difference}")
    if c.first_broken is not None:
        lines.append(f"  first broken: {c.first_broken}")
    return "\n".join(lines)


def _worst(rows: list[Row]) -> list[Row]:
    """Of every operation the worst tensor: broken, differing, far above the reference's error."""
    worst: dict[str, Row] = {}
    for row in rows:
        known = worst.get(row.operation)
        if known is None or _badness(row) > _badness(known):
            worst[row.operation] = row
    return list(worst.values())


def _badness(row: Row) -> tuple[bool, bool, float]:
    if row.error is None or not row.reference_error:
        return not row.kept, not row.equal, row.max_abs
    return not row.kept, not row.equal, row.error / row.reference_error


def _short(row: Row) -> str:
    if ":" in row.name:
        return row.name.partition(":")[2].removeprefix("bert.")
    return f"layer {row.name.split('.')[1]}" if row.name.startswith("layers.") else ""


def to_dict(comparison: Comparison) -> dict:
    """A comparison for JSON; what is infinite is null there."""
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
                key: None if value in (float("inf"), -1) else value
                for key, value in {**asdict(row), "operation": row.operation}.items()
            }
            for row in c.rows
        ],
    }
