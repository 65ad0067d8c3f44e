"""A linear-chain conditional random field on hand-written features (Lafferty et al. 2001).

The features of a word are strings such as "w-1=directed", whatever may tell its label: it and its
neighbours, pairs and triples of them, how it begins and ends, its shape. Every feature has a weight
for every label, and a word's score is the sum over its features f; the labels y of a sentence have

    s(y) = Σ_t Σ_f weight[f, y_t] + Σ_t transition[y_t-1, y_t]      p(y | words) = exp(s(y)) / Z

(model/crf.py; the features "first" and "last" stand for the weights of start and end). Training
minimises, over the weights of all pairs that occur in the training sentences,

    Σ_sentences -log p(labels | words) + c2 Σ weight²

which is convex. Its gradient is what the model expects of each pair minus what was counted, and
L-BFGS (Liu & Nocedal 1989) finds the minimum. Features and objective are those common since
Sha & Pereira (2003) and Okazaki's CRFsuite (2007).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from minibert.baselines.chain_tagger import ChainTagger, Words
from minibert.model.crf import Chain, pack
from minibert.text.batches import chunks
from minibert.text.bio import Sentence, label_ids, labels_of

C2 = 1.0  # CRFsuite's default
BLOCK = 1024  # sentences whose forward-backward runs at once
AFFIX = 5  # most letters of a prefix or suffix


def features(words: Words) -> list[list[str]]:
    """The features of each word of a sentence."""
    padded = ["<s>", "<s>", *(word.lower() for word in words), "</s>", "</s>"]
    shapes = ["", "", *map(shape, words), "", ""]
    found = []
    for i in range(2, len(words) + 2):
        a, b, w, c, d = padded[i - 2 : i + 3]
        own = ["bias", f"w={w}", f"w-1={b}", f"w+1={c}", f"w-2={a}", f"w+2={d}"]
        own += [f"w-1,w={b} {w}", f"w,w+1={w} {c}", f"w-2,w-1={a} {b}", f"w+1,w+2={c} {d}"]
        own += [f"w-1,w+1={b} {c}", f"w-2..w={a} {b} {w}", f"w-1..w+1={b} {w} {c}"]
        own += [f"w..w+2={w} {c} {d}"]
        own += [f"begins={w[:n]}" for n in range(1, min(AFFIX, len(w)) + 1)]
        own += [f"ends={w[-n:]}" for n in range(1, min(AFFIX, len(w)) + 1)]
        own += [f"ends-1={b[-3:]}", f"ends+1={c[-3:]}"]
        own += [f"shape={shapes[i]}", f"shape-1={shapes[i - 1]}", f"shape+1={shapes[i + 1]}"]
        own += ["first"] * (i == 2) + ["last"] * (i == len(words) + 1)
        found.append(own)
    return found


def shape(word: str) -> str:
    """Classes of its characters, repeats left out: "PG-13" to "A-0", "spider-man" to "a-a"."""
    classes = ""
    for c in word:
        kind = "0" if c.isdigit() else "A" if c.isupper() else "a" if c.isalpha() else c
        classes += kind * (classes[-1:] != kind)
    return classes


class CRF(ChainTagger):
    """See above; ``CRF.fit`` makes one from sentences."""

    kind = "crf"

    def __init__(self, labels: Sequence[str], vocabulary: dict[str, list[str]]):
        super().__init__(labels, vocabulary)
        L = len(labels)
        self.weight_FL = nn.Parameter(torch.zeros(len(vocabulary["features"]), L))
        self.chain = Chain(torch.zeros(L), torch.zeros(L, L), torch.zeros(L))

    def scores(self, sentences: Sequence[Words]) -> PackedSequence:
        """The sum over the features of each word, packed: (N, L)."""
        scores_NL = _sums(self.weight_FL, *self._indices(sentences))
        return pack(scores_NL, [len(words) for words in sentences])

    def _indices(self, sentences: Sequence[Words]) -> tuple[Tensor, Tensor]:
        """Rows of the features of all words end to end, and where each word's begin."""
        row = self.row["features"]
        rows: list[int] = []
        begins: list[int] = []
        for words in sentences:
            for own in features(words):
                begins.append(len(rows))
                rows += [row[feature] for feature in own if feature in row]
        return torch.tensor(rows), torch.tensor(begins)

    @classmethod
    def fit(cls, sentences: Sequence[Sentence], c2: float = C2, iterations: int = 500) -> CRF:
        """Minimise the objective; ``iterations`` bounds L-BFGS."""
        labels = labels_of(sentences)
        words = [sentence.words for sentence in sentences]
        known = dict.fromkeys(f for each in words for own in features(each) for f in own)
        model = cls(labels, {"features": list(known)})
        objective = Objective(model, words, label_ids(sentences, labels, "training"), c2)
        objective.minimise(iterations)
        with torch.no_grad():
            weight_FL, transition_LL = objective.tables()
            model.weight_FL.copy_(weight_FL)
            model.chain.transition_LL.copy_(transition_LL)
        return model.eval()


class Objective:
    """The objective over the weights of the pairs that occur, in float64.

    ``weights`` are of the pairs (feature, label), then of (label, next label).
    """

    def __init__(self, model: CRF, words: Sequence[Words], paths: list[list[int]], c2: float):
        L, self.c2 = len(model.labels), c2
        self.shape_FL = tuple(model.weight_FL.shape)
        self.row_M, self.begin_N = model._indices(words)
        label_N = torch.tensor([label for path in paths for label in path])
        count_N = self.begin_N.diff(append=torch.tensor([len(self.row_M)]))
        pairs_M = self.row_M * L + label_N.repeat_interleave(count_N)
        steps = [a * L + b for path in paths for a, b in pairwise(path)]
        self.pair_P, emitted_P = pairs_M.unique(return_counts=True)
        self.step_T, passed_T = torch.tensor(steps, dtype=torch.long).unique(return_counts=True)
        self.counted = torch.cat([emitted_P, passed_T]).double()
        self.weights = torch.zeros(len(self.counted), dtype=torch.float64, requires_grad=True)
        # Blocks of neighbouring sentences, packed once.
        self.blocks = [
            pack(torch.arange(sum(lengths)), lengths)
            for lengths in chunks([len(path) for path in paths], BLOCK)
        ]

    def tables(self) -> tuple[Tensor, Tensor]:
        """The weights as (F, L) and (L, L); pairs that never occur have 0."""
        features, L = self.shape_FL
        place_P = torch.cat([self.pair_P, self.step_T + features * L])
        table = torch.zeros((features + L) * L, dtype=torch.float64)
        return table.index_copy(0, place_P, self.weights).view(-1, L).split([features, L])

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Its value, a scalar, and its gradient with respect to ``weights``."""
        weight_FL, transition_LL = self.tables()
        scores_NL = _sums(weight_FL, self.row_M, self.begin_N)
        # Block by block, down to the scores and transitions and no further.
        flat_NL = scores_NL.detach().requires_grad_()
        zero_L = torch.zeros(len(transition_LL), dtype=torch.float64)
        chain = Chain(zero_L, transition_LL.detach(), zero_L)
        log_Z = 0.0
        for order, part_NL in zip(self.blocks, flat_NL.split([len(b.data) for b in self.blocks])):
            block = chain.log_partition(order._replace(data=part_NL[order.data])).sum()
            block.backward()
            log_Z += block.item()
        outputs, gradients = [scores_NL, transition_LL], [flat_NL.grad, chain.transition_LL.grad]
        (expected,) = torch.autograd.grad(outputs, self.weights, gradients)
        w = self.weights.detach()
        value = log_Z - self.counted @ w + self.c2 * w @ w
        return value, expected - self.counted + 2 * self.c2 * w

    def minimise(self, iterations: int) -> None:
        """Run L-BFGS until a step gains less than 1e-7 per word."""
        words = len(self.begin_N)
        optimizer = torch.optim.LBFGS(
            [self.weights],
            max_iter=iterations,
            history_size=10,
            tolerance_grad=1e-9,
            tolerance_change=1e-7,
            line_search_fn="strong_wolfe",
        )

        def scaled() -> Tensor:
            value, gradient = self()
            self.weights.grad = gradient / words
            return value / words

        optimizer.step(scaled)


def _sums(weight_FL: Tensor, row_M: Tensor, begin_N: Tensor) -> Tensor:
    return F.embedding_bag(row_M, weight_FL, begin_N, mode="sum")
