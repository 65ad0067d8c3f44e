"""R-Drop against its formula, as torch's own functions compute it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from builders import small_bert
from hypothesis import given
from hypothesis import strategies as st

from minibert.model.labels import IGNORE
from minibert.model.layout import Packed
from minibert.text.batches import Batch, Example, packed, padded
from minibert.training.r_drop import RDrop, disagreement, hidden

LABELS = ("O", "B-A", "I-A")
EXAMPLES = [
    Example((2, 7, 9, 3), (1, 2), 0, 0, (1, 2)),
    Example((2, 8, 3), (1,), 1, 0, (0,)),
    Example((2, 5, 6, 4, 3), (1, 3), 2, 0, (0, 1)),  # a word of two pieces
]


def both_divergences(p_WL: torch.Tensor, q_WL: torch.Tensor) -> torch.Tensor:
    """(KL(p || q) + KL(q || p)) / 2, by torch."""
    logp_WL, logq_WL = p_WL.log_softmax(-1), q_WL.log_softmax(-1)
    there = F.kl_div(logq_WL, logp_WL, reduction="batchmean", log_target=True)
    back = F.kl_div(logp_WL, logq_WL, reduction="batchmean", log_target=True)
    return (there + back) / 2


@pytest.mark.parametrize("hide", [0.0, 0.5])
@pytest.mark.parametrize("batch", [packed(EXAMPLES), padded(EXAMPLES, 0)], ids=["packed", "padded"])
def test_loss_and_gradients_follow_the_formula(batch: Batch, hide: float) -> None:
    weight, mask_id = 0.7, 11
    model = small_bert(noise=0.0, labels=LABELS, hidden_dropout_prob=0.3).train()
    torch.manual_seed(1)
    second = partial(hidden, share=hide, mask_id=mask_id, special_ids=(0, 2, 3))
    output = RDrop(model, weight, second)(**batch.inputs)
    output.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()

    torch.manual_seed(1)
    p, ids = model(**batch.inputs), batch.inputs["input_ids"]
    if hide:
        hits = torch.rand(ids.shape) < hide
        ids = torch.where(hits & (ids > 3), mask_id, ids)
        assert not torch.equal(ids, batch.inputs["input_ids"])
    q = model(**{**batch.inputs, "input_ids": ids})
    assert torch.equal(output.logits, p.logits)
    word = batch.inputs["labels"] != IGNORE
    apart = both_divergences(p.logits[word], q.logits[word])
    assert apart > 1e-3, "two masks must differ"
    expected = (p.loss + q.loss) / 2 + weight * apart
    expected.backward()
    torch.testing.assert_close(output.loss, expected)
    for mine, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)


def test_without_dropout_it_is_the_models_loss() -> None:
    model = small_bert(labels=LABELS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    inputs = packed(EXAMPLES).inputs
    assert torch.equal(RDrop(model.train(), 2.0)(**inputs).loss, model(**inputs).loss)


def test_how_many_pieces_are_hidden() -> None:
    """Each with the same probability, [CLS], [SEP] and padding never; the first pass sees all."""
    seen: list[torch.Tensor] = []
    model = small_bert(labels=LABELS)
    model.bert.embeddings.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    ids = torch.arange(20).repeat(500)
    layout = Packed.from_lengths([50] * 200)
    torch.manual_seed(0)
    second = partial(hidden, share=0.15, mask_id=4, special_ids=(0, 2, 3))
    RDrop(model, 1.0, second)(input_ids=ids, labels=torch.zeros_like(ids), layout=layout)
    assert torch.equal(seen[0], ids)
    hits = seen[1] != ids
    assert (seen[1][hits] == 4).all()
    counts = torch.bincount(ids[hits], minlength=20)
    ordinary = [i for i in range(20) if i not in (0, 2, 3, 4)]
    assert counts.sum() == counts[ordinary].sum()
    # Of 500 draws: 75 with a standard deviation of 8.
    assert all(35 < counts[i] < 115 for i in ordinary)
    assert abs(int(counts.sum()) - 1200) < 4 * 32  # of 8000


@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([1e-3, 1.0, 50.0]), st.booleans())
def test_disagreement(seed: int, words: int, size: float, half: bool) -> None:
    """Sure and unsure words, and scores as autocast gives them; padding counts for nothing."""
    draw = torch.Generator().manual_seed(seed)
    p_NL, q_NL = (torch.randn(words + 3, 4, generator=draw) * size for _ in range(2))
    if half:
        p_NL, q_NL = p_NL.bfloat16(), q_NL.bfloat16()
    labels_N = torch.zeros(words + 3, dtype=torch.long)
    labels_N[words:] = IGNORE
    found = disagreement(p_NL, q_NL, labels_N)
    expected = both_divergences(p_NL[:words].double(), q_NL[:words].double())
    # exp and log_softmax round sums of a few scores of this size.
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-9)
    assert found >= 0
    assert torch.equal(found, disagreement(q_NL, p_NL, labels_N))
    assert disagreement(p_NL, p_NL, labels_N) == 0
