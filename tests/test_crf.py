"""The chain of labels: against an exhaustive search, pytorch-crf, and in the head of a BERT."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from builders import LABELS, padded_and_packed, small_bert, small_checkpoint, small_config, twin
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence, unpack_sequence

from minibert import BertForTokenClassification, Tagger
from minibert.files import MinibertError
from minibert.model.crf import Chain, pack
from minibert.model.labels import may_follow
from minibert.pretrained import config_json
from minibert.pretrained.weights import names_of

pytestmark = pytest.mark.usefixtures("one_thread")


def chain_and_scores(
    lengths: Sequence[int], labels: int, seed: int, scale: float = 1.0
) -> tuple[Chain, Tensor, Tensor]:
    """A random chain, scores (N, L) and labels (N,) of sentences end to end, in float64."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((labels,), (labels, labels), (labels,), (sum(lengths), labels))
    *weights, scores_NL = (
        torch.randn(shape, generator=draw, dtype=torch.float64) * scale for shape in shapes
    )
    return Chain(*weights), scores_NL, torch.randint(labels, (sum(lengths),), generator=draw)


@torch.no_grad()
def total(chain: Chain, scores_WL: Tensor, labels: Sequence[int]) -> float:
    """s(y), added up word by word."""
    score = chain.start_L[labels[0]] + chain.end_L[labels[-1]]
    score = score + sum(scores_WL[t, label] for t, label in enumerate(labels))
    return float(score + sum(chain.transition_LL[a, b] for a, b in itertools.pairwise(labels)))


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(1, 4),
    st.integers(0, 2**31),
    st.sampled_from([1.0, 30.0]),
)
def test_all_results_equal_an_exhaustive_search(
    lengths: list[int], labels: int, seed: int, scale: float
) -> None:
    chain, scores_NL, label_N = chain_and_scores(lengths, labels, seed, scale)
    scores = pack(scores_NL, lengths)
    log_Z_B = chain.log_partition(scores)
    loss_B = chain.loss(scores, pack(label_N, lengths))
    best = unpack_sequence(chain.best(scores))
    probabilities = unpack_sequence(chain.probabilities(scores))
    for b, (scores_WL, label_W) in enumerate(zip(scores_NL.split(lengths), label_N.split(lengths))):
        paths = list(itertools.product(range(labels), repeat=len(scores_WL)))
        totals = torch.tensor(
            [total(chain, scores_WL, path) for path in paths], dtype=torch.float64
        )
        log_Z = totals.logsumexp(0)
        assert log_Z_B[b].item() == pytest.approx(log_Z.item(), rel=1e-12, abs=1e-12)
        own = total(chain, scores_WL, label_W.tolist())
        assert loss_B[b].item() == pytest.approx(log_Z.item() - own, rel=1e-12, abs=1e-11)
        highest = total(chain, scores_WL, best[b].tolist())
        assert highest == pytest.approx(totals.max().item(), rel=1e-12, abs=1e-12)
        for t, label in itertools.product(range(len(scores_WL)), range(labels)):
            through = torch.tensor([path[t] == label for path in paths])
            p = (totals[through] - log_Z).exp().sum().item()
            assert probabilities[b][t, label].item() == pytest.approx(p, abs=1e-11)


@pytest.mark.parametrize("lengths", [[7], [1, 1], [3, 12, 1, 5, 12, 9]])
def test_loss_gradients_and_paths_equal_pytorch_crf(lengths: list[int]) -> None:
    torchcrf = pytest.importorskip("torchcrf")
    labels = 25
    chain, scores_NL, label_N = chain_and_scores(lengths, labels, seed=len(lengths))
    theirs = torchcrf.CRF(labels, batch_first=True).double()
    pairs = (
        (chain.start_L, theirs.start_transitions),
        (chain.transition_LL, theirs.transitions),
        (chain.end_L, theirs.end_transitions),
    )
    with torch.no_grad():
        for own, their in pairs:
            their.copy_(own)
    x_NL, their_x_NL = scores_NL.clone().requires_grad_(), scores_NL.clone().requires_grad_()
    loss_B = chain.loss(pack(x_NL, lengths), pack(label_N, lengths))
    loss_B.sum().backward()

    padded_BSL = pad_sequence(list(their_x_NL.split(lengths)), batch_first=True)
    label_BS = pad_sequence(list(label_N.split(lengths)), batch_first=True)
    mask_BS = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    their_loss_B = -theirs(padded_BSL, label_BS, mask_BS, reduction="none")
    their_loss_B.sum().backward()
    torch.testing.assert_close(loss_B, their_loss_B, rtol=1e-12, atol=1e-12)
    for own, their in ((x_NL, their_x_NL), *pairs):
        torch.testing.assert_close(own.grad, their.grad, rtol=1e-12, atol=1e-12)
    best = unpack_sequence(chain.best(pack(scores_NL, lengths)))
    assert [path.tolist() for path in best] == theirs.decode(padded_BSL, mask_BS)


def test_sentences_without_a_word_are_left_out() -> None:
    chain, scores_NL, _ = chain_and_scores([2, 3], 4, seed=0)
    whole, holes = pack(scores_NL, [2, 3]), pack(scores_NL, [0, 2, 0, 3])
    assert torch.equal(chain.log_partition(whole), chain.log_partition(holes))


# The head of a BERT


def crf_bert(**changes) -> BertForTokenClassification:
    model = small_bert(head="crf", **changes)
    assert isinstance(model, BertForTokenClassification)
    return model


def test_the_loss_of_the_head_is_that_of_the_words_alone() -> None:
    """Padded or packed, whichever pieces carry no label; with gradients."""
    model = crf_bert().double()
    padded, packed, _ = padded_and_packed([5, 2, 9], model.config)
    output = model(**padded)
    word_N = padded["labels"].flatten() != -100
    counts = (padded["labels"] != -100).sum(1).tolist()
    scores_WL = output.logits.flatten(0, 1)[word_N]
    label_W = padded["labels"].flatten()[word_N]
    loss_B = model.head.crf.loss(pack(scores_WL, counts), pack(label_W, counts))
    torch.testing.assert_close(output.loss, loss_B.sum() / sum(counts), rtol=1e-12, atol=0.0)
    gradients = []
    for batch in (padded, packed):
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_crf_head_is_saved_loaded_and_opened_by_transformers(tmp_path: Path) -> None:
    import transformers

    folder = small_checkpoint(tmp_path, head="crf")
    assert json.loads((folder / "config.json").read_text())["head"] == "crf"
    model = BertForTokenClassification.from_pretrained(folder)
    assert str(model.load_report) == "every tensor used, none missing"
    expected = crf_bert()
    for name in names_of(model):
        assert torch.equal(model.get_parameter(name), expected.get_parameter(name)), name
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(folder).eval()
    ids = torch.tensor([[2, 7, 9, 3]])
    assert torch.equal(theirs(ids).logits, model(ids).logits)

    linear = BertForTokenClassification.from_pretrained(folder, head="linear")
    assert linear.load_report.unused == ("crf.end", "crf.start", "crf.transition")
    assert torch.equal(linear(ids).logits, model(ids).logits)
    raw = config_json.to_dict(linear.config, "BertForTokenClassification")
    assert "head" not in raw, "a file of a linear head is that of transformers"
    twin(linear)
    (folder / "config.json").write_text(json.dumps(raw | {"head": "tree"}))
    with pytest.raises(MinibertError, match="head must be one of linear, crf, got 'tree'"):
        BertForTokenClassification.from_pretrained(folder)


def test_a_crf_head_decodes_the_best_sequence_and_its_probabilities(tmp_path: Path) -> None:
    """In every mode in which the tagger may call it."""
    model = crf_bert(noise=1.0)
    draw = torch.Generator().manual_seed(0)
    differs = 0
    for words in (1, 2, 7):
        scores_WL = torch.randn(words, len(LABELS), generator=draw)
        for well_formed in (True, False):
            ids, p = model.head.decode(scores_WL, well_formed)
            with torch.inference_mode():
                again = model.head.decode(scores_WL.clone(), well_formed)
            assert again == (ids, p)
            assert all(0 < x <= 1 for x in p)
            tags = ["O", *(LABELS[i] for i in ids)]
            assert not well_formed or all(may_follow(b, a) for a, b in itertools.pairwise(tags))
        differs += ids != scores_WL.argmax(1).tolist()
    assert differs
    folder = small_checkpoint(tmp_path, head="crf", noise=1.0)
    sentences = [list("abc"), list("d"), [], list("abcdefg")]
    for prepack in (True, False):
        tagger = Tagger.from_pretrained(folder, dtype="fp32", prepack=prepack)
        found = list(tagger.label(sentences))
        assert [len(labels) for labels in found] == [3, 1, 0, 7]
        assert next(tagger.label([sentences[3]]))[0].name == found[3][0].name


def test_configurations_differ_by_their_head_only() -> None:
    torch.manual_seed(0)
    linear = BertForTokenClassification(small_config())
    torch.manual_seed(0)
    crf = BertForTokenClassification(small_config(head="crf"))
    for name, parameter in linear.named_parameters():
        assert torch.equal(parameter, crf.get_parameter(name)), name
