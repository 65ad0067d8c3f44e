"""The optimisers, the schedule and clipping, by trajectory: where do the weights end up?"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from builders import SMALL_FAMILIES, small_bert, twin
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minibert import BertForTokenClassification
from minibert.pretrained.weights import names_of
from minibert.training.adamw import AdamW, FusedAdamW, Group, bert_groups, choose_adamw
from minibert.training.averaging import WeightAverage
from minibert.training.schedule import LossScaler, clip_grad_norm, linear_schedule

STEPS = 20


def batches(vocab_size: int, steps: int = STEPS) -> list[dict]:
    draw = torch.Generator().manual_seed(3)
    result = []
    for step in range(steps):
        shape = (4, 9 + step % 5)
        labels = torch.randint(-1, 5, shape, generator=draw)
        labels[labels < 0] = -100
        mask = torch.ones(shape, dtype=torch.long)
        mask[1, 5:] = 0
        ids = torch.randint(5, vocab_size, shape, generator=draw)
        result.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return result


CASES = [("sdpa", 0.01), ("eager", 0.01), ("sdpa", 0.0), ("eager", 0.0)]


@pytest.mark.parametrize(
    ("attn", "decay", "family"),
    [*((*case, {}) for case in CASES), *((*CASES[0], sizes) for sizes in SMALL_FAMILIES.values())],
)
def test_twenty_steps_of_a_small_model_are_bit_equal(attn: str, decay: float, family: dict) -> None:
    ours = small_bert(attn=attn, **family).train()
    assert_twenty_equal_steps(ours, twin(ours, attn), decay)


@pytest.mark.parametrize(
    ("attn", "decay"),
    [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])],
)
def test_twenty_steps_leave_every_weight_bit_equal(minilm: Path, attn: str, decay: float) -> None:
    """Real weights, and a classifier that both draw from the same seed."""
    torch.manual_seed(0)
    theirs = transformers.BertForTokenClassification.from_pretrained(
        minilm, num_labels=5, attn_implementation=attn
    ).train()
    ours = BertForTokenClassification.from_pretrained(
        minilm, num_labels=5, attn_implementation=attn, seed=0
    ).train()
    assert_twenty_equal_steps(ours, theirs, decay)


def assert_twenty_equal_steps(ours, theirs: nn.Module, decay: float) -> None:
    """Dropout, clipping, warm-up and decay: against a loop of transformers and torch."""
    lr, warmup, vocab_size = 3e-4, 5, ours.config.vocab_size
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=lr, eps=1e-8, weight_decay=decay)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup, STEPS)
    torch.manual_seed(1)
    for inputs in batches(vocab_size):
        theirs(**inputs).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    state_after = torch.get_rng_state()

    torch.manual_seed(1)
    mine = AdamW([Group(list(ours.parameters()), decay)], "torch", eps=1e-8)
    clipped = 0
    for step, inputs in enumerate(batches(vocab_size)):
        ours(**inputs).loss.backward()
        my_norm = mine.clipped_step(lr * linear_schedule(step, STEPS, warmup), 1.0)
        clipped += bool(my_norm > 1.0)
        mine.zero_grad()

    assert clipped > 0, "clipping must be active"
    assert torch.equal(my_norm, norm)
    assert torch.equal(torch.get_rng_state(), state_after)
    state = theirs.state_dict()
    for name, their_name in names_of(ours).items():
        assert torch.equal(ours.get_parameter(name), state[their_name]), name


def walk(step_of, seed: int = 0, steps: int = 50) -> torch.Tensor:
    """Where fixed pseudo-gradients take a parameter in some steps."""
    draw = torch.Generator().manual_seed(seed)
    parameter = nn.Parameter(torch.randn(7, 5, generator=draw))
    step = step_of(parameter)
    for _ in range(steps):
        parameter.grad = torch.randn(7, 5, generator=draw) * 0.1
        step()
    return parameter.detach()


def ours(semantics: str, decay: float, eps: float | None = None):
    def step_of(parameter: nn.Parameter):
        optimizer = AdamW([Group([parameter], decay)], semantics, eps=eps)
        return lambda: optimizer.step(1e-2)

    return step_of


def transformers_adamw(decay: float):
    """The update that transformers documented for its AdamW until version 4, in float64 scalars."""

    def step_of(parameter: nn.Parameter):
        m = torch.zeros_like(parameter)
        v = torch.zeros_like(parameter)
        t = 0

        @torch.no_grad()
        def step() -> None:
            nonlocal t
            t += 1
            m.mul_(0.9).add_(parameter.grad, alpha=0.1)
            v.mul_(0.999).add_(parameter.grad**2, alpha=0.001)
            size = 1e-2 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            parameter.sub_(size * m / (v.sqrt() + 1e-6))
            parameter.sub_(1e-2 * decay * parameter)

        return step

    return step_of


def google_adamw(decay: float):
    """google-research/bert, optimization.py, AdamWeightDecayOptimizer."""

    def step_of(parameter: nn.Parameter):
        m = torch.zeros_like(parameter)
        v = torch.zeros_like(parameter)

        @torch.no_grad()
        def step() -> None:
            m.mul_(0.9).add_(0.1 * parameter.grad)
            v.mul_(0.999).add_(0.001 * parameter.grad**2)
            parameter.sub_(1e-2 * (m / (v.sqrt() + 1e-6) + decay * parameter))

        return step

    return step_of


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_each_semantics_follows_its_formula(decay: float) -> None:
    def torch_adamw(parameter):
        return torch.optim.AdamW([parameter], lr=1e-2, eps=1e-8, weight_decay=decay).step

    assert torch.equal(walk(ours("torch", decay)), walk(torch_adamw))
    # The formulas round in another order: 50 steps of a few ulps of values around 1.
    tolerance = {"rtol": 0, "atol": 50 * 4 * torch.finfo(torch.float32).eps}
    torch.testing.assert_close(
        walk(ours("transformers", decay)), walk(transformers_adamw(decay)), **tolerance
    )
    torch.testing.assert_close(walk(ours("google", decay)), walk(google_adamw(decay)), **tolerance)


SHAPES = ((300, 65), (33,), (7, 5, 3), (2,))  # whole vectors and rests; the last has no gradient


def trajectory(make, clip: float | None, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Where 30 steps lead. ``make`` takes two lists of parameters, decayed and not."""
    draw = torch.Generator().manual_seed(5)
    parameters = [nn.Parameter(torch.randn(s, generator=draw).to(dtype)) for s in SHAPES]
    step = make(parameters[:2], parameters[2:])
    for turn in range(30):
        for parameter in parameters[:3]:
            gradient = torch.randn(parameter.shape, generator=draw) * 10.0 ** (turn % 4 - 3)
            parameter.grad = gradient.to(dtype)
        step(1e-2 * (turn + 1) / 30, clip)
    return [parameter.detach() for parameter in parameters]


def by(kind: type[AdamW]):
    def make(decayed: list, spared: list):
        optimizer = kind([Group(decayed, 0.1), Group(spared, 0.0, lr_factor=0.5)])

        def step(lr: float, clip: float | None) -> None:
            optimizer.step(lr) if clip is None else optimizer.clipped_step(lr, clip)

        return step

    return make


def by_torch_fused(decayed: list, spared: list):
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, fused=True)

    def step(lr: float, clip: float | None) -> None:
        assert clip is None
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr, lr * 0.5
        optimizer.step()

    return step


def test_fused_adamw_equals_torchs() -> None:
    for mine, theirs in zip(trajectory(by(FusedAdamW), None), trajectory(by_torch_fused, None)):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_fused_adamw_errs_no_more_than_the_plain_one(clip: float | None) -> None:
    exact = trajectory(by(AdamW), clip, torch.float64)
    errors = {}
    for kind in (AdamW, FusedAdamW):
        apart = [a.double() - b for a, b in zip(trajectory(by(kind), clip), exact)]
        errors[kind] = torch.cat([difference.flatten() for difference in apart])
    assert 0 < errors[FusedAdamW].norm() <= 1.1 * errors[AdamW].norm()
    assert errors[FusedAdamW].abs().max() <= 2 * errors[AdamW].abs().max() < 1e-5


@pytest.mark.parametrize("kind", [AdamW, FusedAdamW])
def test_an_overflow_skips_a_step(kind: type[AdamW]) -> None:
    parameter = nn.Parameter(torch.ones(20))
    optimizer, scaler = kind([Group([parameter])]), LossScaler(scale=8.0)
    parameter.grad = torch.full((20,), math.inf)
    optimizer.clipped_step(0.1, 1.0, scaler)
    assert (parameter == 1).all()
    assert (optimizer.steps, scaler.scale) == (0, 4.0)
    assert not optimizer.first[0].any()
    parameter.grad = torch.full((20,), 4e-3)  # 1e-3 before it was scaled: below the bound
    optimizer.clipped_step(0.1, 1.0, scaler)
    reference = nn.Parameter(torch.ones(20))
    reference.grad = torch.full((20,), 1e-3)
    fused = kind is FusedAdamW
    torch.optim.AdamW([reference], lr=0.1, weight_decay=0.0, fused=fused).step()
    assert torch.equal(parameter, reference)


def test_which_adamw_is_taken_and_why() -> None:
    groups = [Group([nn.Parameter(torch.ones(2))])]
    fused = choose_adamw(groups, "torch")
    assert type(fused.value) is FusedAdamW
    assert fused.reason == "in one pass, with torch's fused CPU kernel"
    plain = choose_adamw(groups, "torch", plain=True)
    assert type(plain.value) is AdamW
    assert plain.reason == "one torch operation at a time: as requested"
    google = choose_adamw(groups, "google")
    assert type(google.value) is AdamW
    assert "no one-pass kernel for 'google' on cpu" in google.reason


def test_how_much_the_semantics_differ() -> None:
    """Equal eps, no decay: torch's and transformers' agree to rounding, Google's moves further."""
    start = walk(lambda parameter: lambda: None)
    torch_end = walk(ours("torch", 0.0, 1e-8))
    former_end = walk(ours("transformers", 0.0, 1e-8))
    google_end = walk(ours("google", 0.0, 1e-8))
    assert (torch_end - former_end).abs().max() < 1e-5
    assert (google_end - start).norm() > 2 * (torch_end - start).norm()


@given(st.integers(0, 400), st.integers(1, 300), st.integers(0, 300))
def test_schedule_equals_the_reference(step: int, total: int, warmup: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = transformers.get_linear_schedule_with_warmup(optimizer, warmup, total)
    assert linear_schedule(step, total, warmup) == theirs.lr_lambdas[0](step)


@given(st.floats(1e-3, 1e3), st.integers(0, 2**31))
def test_clipping_equals_torch(max_norm: float, seed: int) -> None:
    def parameters():
        draw = torch.Generator().manual_seed(seed)
        result = []
        for shape in ((3, 4), (17,), (2, 2, 2)):
            parameter = nn.Parameter(torch.zeros(shape))
            parameter.grad = torch.randn(shape, generator=draw) * 3
            result.append(parameter)
        return [*result, nn.Parameter(torch.zeros(2))]  # the last has no gradient

    mine, theirs = parameters(), parameters()
    assert torch.equal(
        clip_grad_norm(mine, max_norm), torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    )
    for a, b in zip(mine[:3], theirs[:3]):
        assert torch.equal(a.grad, b.grad)


def test_decay_spares_biases_and_norms(minilm: Path) -> None:
    model = BertForTokenClassification.from_pretrained(minilm, num_labels=3)
    groups = bert_groups(model, 0.01)
    assert {group.weight_decay for group in groups} == {0.0, 0.01}
    for group in groups:
        dimensions = 2 if group.weight_decay else 1
        assert all(p.dim() == dimensions for p in group.parameters)
    listed = [id(p) for group in groups for p in group.parameters]
    assert listed == [id(p) for p in model.parameters()], "the order in which clipping adds norms"


def test_loss_scaler_backs_off_and_recovers() -> None:
    scaler = LossScaler(scale=8.0, patience=2, limit=3)
    scales = []
    for finite in (False, True, True, True, False, False):
        assert scaler.record(finite) is finite
        scales.append(scaler.scale)
    assert scales == [4.0, 4.0, 8.0, 8.0, 4.0, 2.0]
    assert not scaler.gave_up
    scaler.record(False)
    assert scaler.gave_up


def test_gradients_are_unscaled_before_they_are_clipped() -> None:
    """A power of two changes no bit of the norm or the gradients."""
    plain, scaled = (nn.Parameter(torch.zeros(50)) for _ in range(2))
    plain.grad = torch.randn(50, generator=torch.Generator().manual_seed(0))
    scaled.grad = plain.grad * 2.0**12
    for bound in (1.0, 100.0):
        assert torch.equal(clip_grad_norm([scaled], bound, 2.0**12), clip_grad_norm([plain], bound))
        assert torch.equal(scaled.grad, plain.grad)
        scaled.grad = plain.grad * 2.0**12


@pytest.mark.parametrize(
    ("power", "shares"),
    [(0.0, [1, 1, 1, 1]), (1.0, [1, 2, 3, 4]), (2.0, [1, 3, 6, 10]), (math.inf, [0, 0, 0, 1])],
)
def test_later_weights_count_more_in_the_average(power: float, shares: list[int]) -> None:
    parameter = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    average = WeightAverage([parameter], power)
    draw = torch.Generator().manual_seed(0)
    path = torch.randn(4, 5, generator=draw, dtype=torch.float64)
    for step, point in enumerate(path, 1):
        parameter.data.copy_(point)
        average.update(step)
    weights = torch.tensor(shares, dtype=torch.float64) / sum(shares)
    with average.swapped_in():
        torch.testing.assert_close(parameter.data, weights @ path, rtol=1e-14, atol=1e-15)
    assert torch.equal(parameter.data, path[-1]), "training goes on from where it was"
