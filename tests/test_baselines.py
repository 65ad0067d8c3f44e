"""HMM, CRF and BiLSTM-CRF: against hmmlearn and python-crfsuite, saved, loaded and scored."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import unpack_sequence

from minibert.baselines.bilstm_crf import BiLSTMCRF
from minibert.baselines.chain_tagger import ChainTagger
from minibert.baselines.crf import CRF, Objective, features, shape
from minibert.baselines.hmm import HMM, states_of, suffixes
from minibert.files import MinibertError
from minibert.model.labels import may_follow, well_formed_chain
from minibert.tagging.evaluate import evaluate
from minibert.text.bio import Sentence, label_ids, labels_of
from minibert.text.demo import generate

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN, TEST = (sentences[:count] for sentences, count in zip(generate(), (100, 40)))
WORDS = [sentence.words for sentence in TRAIN]


@pytest.fixture(scope="module")
def systems() -> dict[str, ChainTagger]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trained = {
        "hmm": HMM.fit(TRAIN),
        "crf": CRF.fit(TRAIN, iterations=30),
        "bilstm-crf": BiLSTMCRF.fit(TRAIN, epochs=20),
    }
    torch.set_num_threads(threads)
    return trained


KINDS = pytest.mark.parametrize("kind", ["hmm", "crf", "bilstm-crf"])


@KINDS
def test_a_system_learns_and_labels_well_formed(systems: dict, kind: str) -> None:
    """Unknown words and letters, empty sentences and long ones included."""
    system = systems[kind]
    assert evaluate(system, TRAIN, "demo").entity.micro.f1 > 0.5
    sentences = [[], ["who"], ["zxq", "日本", "é" * 300, "a" * 2000], [], WORDS[0] * 60, [""]]
    found = list(system.label(iter(sentences)))
    assert [len(labels) for labels in found] == [len(words) for words in sentences]
    for labels in found:
        tags = ["O", *(label.name for label in labels)]
        assert all(may_follow(b, a) for a, b in itertools.pairwise(tags))
        assert all(0 < label.score <= 1 for label in labels)
    assert list(system.label([])) == []


@KINDS
def test_the_pool_does_not_change_the_labels(systems: dict, kind: str) -> None:
    together = list(systems[kind].label(WORDS[:20]))
    alone = [next(systems[kind].label([words])) for words in WORDS[:20]]
    for one, other in zip(together, alone):
        assert [label.name for label in one] == [label.name for label in other]
        np.testing.assert_allclose([x.score for x in one], [x.score for x in other], atol=1e-5)


def test_labelling_leaves_the_rules_as_they_are(systems: dict) -> None:
    """They are shared with BERT's decoding, which is in float32 on the CPU."""
    hmm = systems["hmm"].double()
    try:
        list(hmm.label(WORDS[:2]))
        rules = well_formed_chain(hmm.state_labels)
        assert {weight.dtype for weight in rules.parameters()} == {torch.float32}
    finally:
        hmm.float()


@KINDS
def test_a_saved_system_gives_the_same_labels(systems: dict, kind: str, tmp_path: Path) -> None:
    system = systems[kind]
    system.save_pretrained(tmp_path)
    loaded = type(system).from_pretrained(tmp_path)
    words = [sentence.words for sentence in TEST]
    assert list(loaded.label(words)) == list(system.label(words))
    assert loaded.labels == labels_of(TRAIN)

    config = json.loads((tmp_path / "config.json").read_text())
    wrong = (
        config | {"model_type": "tree"},
        config | {"labels": ["O"]},
        config | {"settings": {"depth": 3}},
        {},
        [],
    )
    for value in wrong:
        (tmp_path / "config.json").write_text(json.dumps(value))
        with pytest.raises(MinibertError, match=f"not a {kind} that minibert saved"):
            type(system).from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for value in ({}, {"words": [1, [2]]}, []):
        (tmp_path / "vocabulary.json").write_text(json.dumps(value))
        with pytest.raises(MinibertError, match=f"not a {kind} that minibert saved"):
            type(system).from_pretrained(tmp_path)


# HMM


def test_states_of_a_sentence() -> None:
    tags = ["O", "O", "B-X", "I-X", "B-Y", "O"]
    assert states_of(tags) == ["O ", "O X", "B-X on", "I-X ", "B-Y ", "O "]
    assert suffixes("abc") == ["", "c", "bc", "abc"]


def test_the_hmm_equals_hmmlearn(systems: dict) -> None:
    """Log-likelihood and paths; hmmlearn has no end, so a state that emits one stands for it."""
    hmmlearn = pytest.importorskip("hmmlearn.hmm")
    hmm = systems["hmm"]
    vocabulary, L = hmm.vocabulary["words"], len(hmm.state_labels)
    theirs = hmmlearn.CategoricalHMM(n_components=L + 1)
    start_S, step_SS = np.zeros(L + 1), np.zeros((L + 1, L + 1))
    start_S[:L] = hmm.chain.start_L.detach().double().exp()
    start_S[L] = 1 - start_S.sum()  # of an empty sentence
    step_SS[:L, :L] = hmm.chain.transition_LL.detach().double().exp()
    step_SS[:L, L] = hmm.chain.end_L.detach().double().exp()
    step_SS[L, L] = 1
    emission_SV = np.zeros((L + 1, len(vocabulary) + 1))
    emission_SV[:L, :-1] = hmm.word_VL.double().exp().T
    emission_SV[L, -1] = 1
    assert 0 < start_S[L] < 1e-3
    for p in (step_SS, emission_SV):
        np.testing.assert_allclose(p.sum(-1), 1, atol=1e-5)  # the HMM keeps float32
    theirs.startprob_, theirs.transmat_, theirs.emissionprob_ = start_S, step_SS, emission_SV
    theirs.n_features = len(vocabulary) + 1
    own = hmm.double()
    try:
        row = {word: i for i, word in enumerate(vocabulary)}
        scores = own.scores(WORDS)
        log_p_B = own.chain.log_partition(scores)
        for words, log_p, path in zip(WORDS, log_p_B, unpack_sequence(own.chain.best(scores))):
            symbols = np.array([[row[word]] for word in words] + [[len(vocabulary)]])
            np.testing.assert_allclose(log_p.item(), theirs.score(symbols), rtol=1e-9)
            _, their_path = theirs.decode(symbols, algorithm="viterbi")
            assert path.tolist() == their_path[:-1].tolist()
    finally:
        hmm.float()


# CRF


def test_features_of_a_sentence() -> None:
    first, _, last = features(["Show", "PG-13", "films"])
    assert {"w=show", "w+1=pg-13", "w-1=<s>", "begins=sh", "ends=how", "shape=Aa", "first"} <= {
        *first
    }
    assert {"w-2..w=show pg-13 films", "w+1=</s>", "last", "ends=films"} <= {*last}
    assert shape("PG-13") == "A-0"
    assert shape("spider-man") == "a-a"


def crfsuite(folder: Path, c2: float, sentences: Sequence[Sentence]) -> tuple[float, Callable]:
    """The objective that python-crfsuite reaches with our features, and its tagger."""
    pycrfsuite = pytest.importorskip("pycrfsuite")
    trainer = pycrfsuite.Trainer(algorithm="lbfgs", verbose=False)
    for sentence in sentences:
        trainer.append([list(map(escaped, f)) for f in features(sentence.words)], sentence.tags)
    trainer.set_params(
        {"c1": 0.0, "c2": c2, "max_iterations": 1000, "delta": 1e-9, "epsilon": 1e-7}
    )
    trainer.train(str(folder / "crf.bin"))
    tagger = pycrfsuite.Tagger()
    tagger.open(str(folder / "crf.bin"))
    return trainer.logparser.last_iteration["loss"], lambda words: tagger.tag(
        [list(map(escaped, f)) for f in features(words)]
    )


def escaped(feature: str) -> str:
    """A colon separates a feature from its value there."""
    return feature.replace("\\", "\\\\").replace(":", "\\:")


def trained_crf(sentences: Sequence[Sentence], c2: float) -> tuple[CRF, float]:
    """A CRF and the value of its objective at its weights."""
    model = CRF.fit(sentences, c2)
    labels = model.labels
    words = [sentence.words for sentence in sentences]
    objective = Objective(model, words, label_ids(sentences, labels, "training"), c2)
    with torch.no_grad():
        flat = torch.cat([model.weight_FL.flatten(), model.chain.transition_LL.flatten()]).double()
        place_P = torch.cat([objective.pair_P, objective.step_T + model.weight_FL.numel()])
        objective.weights.copy_(flat[place_P])
    return model, float(objective()[0])


@pytest.mark.parametrize("c2", [pytest.param(0.1, marks=pytest.mark.slow), 1.0])
def test_the_crf_reaches_the_optimum_of_crfsuite(tmp_path: Path, c2: float) -> None:
    theirs, tag = crfsuite(tmp_path, c2, TRAIN)
    model, own = trained_crf(TRAIN, c2)
    assert own == pytest.approx(theirs, rel=1e-4)
    best = unpack_sequence(model.chain.best(model.scores([s.words for s in TEST])))
    for sentence, path in zip(TEST, best):
        assert [model.labels[i] for i in path.tolist()] == tag(sentence.words)


def test_the_gradient_of_the_objective() -> None:
    """Against differences, in random directions."""
    model = CRF(
        labels_of(TRAIN), {"features": sorted({f for w in WORDS for x in features(w) for f in x})}
    )
    objective = Objective(model, WORDS, label_ids(TRAIN, model.labels, "training"), 0.3)
    draw = torch.Generator().manual_seed(0)
    at_P = torch.randn(len(objective.weights), generator=draw, dtype=torch.float64) * 0.1
    for _ in range(3):
        direction_P = torch.randn(len(at_P), generator=draw, dtype=torch.float64)
        values = []
        for step in (1e-6, -1e-6, 0.0):
            objective.weights.data.copy_(at_P + step * direction_P)
            value, gradient_P = objective()
            values.append(float(value))
        slope = (values[0] - values[1]) / 2e-6
        assert float(gradient_P @ direction_P) == pytest.approx(slope, rel=1e-6)


# BiLSTM-CRF


def test_the_bilstm_crf_depends_on_its_seed_alone() -> None:
    few = TRAIN[:20]
    first, again, other = (BiLSTMCRF.fit(few, seed, epochs=1) for seed in (0, 0, 1))
    for a, b in zip(first.parameters(), again.parameters()):
        assert torch.equal(a, b)
    assert not torch.equal(first.output.weight, other.output.weight)


def test_the_bilstm_crf_reads_letters_and_both_sides(systems: dict) -> None:
    model = systems["bilstm-crf"]

    def scores(*words: str) -> torch.Tensor:
        with torch.no_grad():
            return model.scores([words]).data

    assert not torch.equal(scores("zzz"), scores("zzq")), "unknown words differ by their letters"
    left, right = scores("who", "directed", "zzz"), scores("jaws", "directed", "zzz")
    assert not torch.equal(left[1], right[1])
    assert not torch.equal(scores("who", "directed", "it")[1], left[1])


def test_the_bilstm_crf_on_one_sentence_equals_its_equations(systems: dict) -> None:
    model = systems["bilstm-crf"].double()
    try:
        words = list(WORDS[3])
        x_WE = []
        with torch.no_grad():
            for word in words:
                letters = torch.tensor([model.row["letters"][letter] for letter in word])
                states, _ = model.spelling(model.letter(letters)[:, None])
                C = model.letter.embedding_dim
                row = torch.tensor(model.row["words"][word])
                x_WE.append(torch.cat([model.word(row), states[-1, 0, :C], states[0, 0, C:]]))
            states, _ = model.context(torch.stack(x_WE)[:, None])
            expected = model.output(states[:, 0])
            torch.testing.assert_close(model.scores([words]).data, expected, rtol=1e-10, atol=1e-10)
            batch = model.scores([WORDS[0], words, WORDS[1]])
            torch.testing.assert_close(unpack_sequence(batch)[1], expected, rtol=1e-10, atol=1e-10)
    finally:
        model.float()
