"""A hidden Markov model, trained by counting.

The words w of a sentence are drawn one after the other, each from a state y that depends on the
state before (Rabiner 1989; for tagging: Brants 2000, "TnT"):

    p(w, y) = p(y_1 | start) Π_t p(y_t | y_t-1) Π_t p(w_t | y_t) p(end | y_last)

Both factors are relative frequencies, smoothed so that none is zero; V is the number of words:

    p(y | y') = (1 - ε) count(y', y) / count(y') + ε count(y) / N
    p(w | y)  = (count(w, y) + α) / (count(y) + α V)

A word that has not been seen is treated like words that end alike. Bayes' rule gives
p(w | y) = p(y | w) p(w) / p(y), in which p(w) is the same for all states and left out. p(y | w) is
estimated from suffixes, from the empty one, count(y) / N, to the longest that has been seen:

    p(y | suffix) = (count(suffix, y) + β p(y | suffix without its first letter))
                    / (count(suffix) + β)

A state is a label and what it leads to: an O knows the type of an entity that begins with the next
word ("directed by" announces a DIRECTOR), a B- or I- knows whether its entity goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from minibert.baselines.chain_tagger import ChainTagger, Words
from minibert.model.crf import Chain, pack
from minibert.text.bio import Sentence, labels_of

# Chosen on every tenth sentence of engtrain.
LONGEST = 8  # letters of a suffix
ALPHA, BETA, EPSILON = 0.3, 2.0, 0.001


def suffixes(word: str) -> list[str]:
    """From the empty one to the longest."""
    return [word[len(word) - n :] for n in range(min(LONGEST, len(word)) + 1)]


def states_of(tags: Sequence[str]) -> list[str]:
    """The state of each word: its tag, a space, and the type that begins or goes on next."""
    states = []
    for tag, following in zip(tags, [*tags[1:], "O"]):
        begins = following[2:] if tag == "O" else ""
        goes_on = "on" if following == f"I-{tag[2:]}" else ""
        states.append(f"{tag} {begins or goes_on}")
    return states


class HMM(ChainTagger):
    """See above; ``HMM.fit`` makes one from sentences."""

    kind = "hmm"
    word_VL: Tensor  # log p(w | y) of known words
    suffix_RL: Tensor  # log p(y | suffix) - log p(y)

    def __init__(self, labels: Sequence[str], vocabulary: dict[str, list[str]]):
        super().__init__(labels, vocabulary)
        L = len(vocabulary["states"])
        self.state_labels = tuple(state.split(" ")[0] for state in vocabulary["states"])
        self.chain = Chain(torch.zeros(L), torch.zeros(L, L), torch.zeros(L))
        self.register_buffer("word_VL", torch.zeros(len(vocabulary["words"]), L))
        self.register_buffer("suffix_RL", torch.zeros(len(vocabulary["suffixes"]), L))

    @classmethod
    def fit(cls, sentences: Sequence[Sentence]) -> HMM:
        """Count."""
        runs = [states_of(sentence.tags) for sentence in sentences]
        states = sorted({state for run in runs for state in run})
        L, state_id = len(states), {state: i for i, state in enumerate(states)}
        paths = [[state_id[state] for state in run] for run in runs]
        words = [word for sentence in sentences for word in sentence.words]
        tagged = list(zip(words, (state for path in paths for state in path)))
        vocabulary = sorted(set(words))

        # The last row is the start, the last column the end.
        count_SS = torch.zeros(L + 1, L + 1, dtype=torch.float64)
        steps = Counter(step for path in paths for step in zip([L, *path], [*path, L]))
        for (a, b), count in steps.items():
            count_SS[a, b] = count
        alone_S = count_SS.sum(0) / count_SS.sum()
        p_SS = (1 - EPSILON) * count_SS / count_SS.sum(1, keepdim=True) + EPSILON * alone_S

        count_VL = _counts(vocabulary, tagged, L)
        p_VL = (count_VL + ALPHA) / (count_VL.sum(0) + ALPHA * len(vocabulary))

        # Sorted by length: the shorter suffix of each comes first.
        known = sorted(
            {s for word in vocabulary for s in suffixes(word)}, key=lambda s: (len(s), s)
        )
        row = {suffix: i for i, suffix in enumerate(known)}
        count_RL = _counts(known, [(s, state) for word, state in tagged for s in suffixes(word)], L)
        p_L = count_VL.sum(0) / len(words)
        p_RL = torch.empty_like(count_RL)
        for suffix, i in row.items():
            shorter_L = p_RL[row[suffix[1:]]] if suffix else p_L
            p_RL[i] = (count_RL[i] + BETA * shorter_L) / (count_RL[i].sum() + BETA)

        tables = {"states": states, "words": vocabulary, "suffixes": known}
        model = cls(labels_of(sentences), tables)
        model.chain = Chain(*(p.log() for p in (p_SS[L, :L], p_SS[:L, :L], p_SS[:L, L])))
        model.word_VL = p_VL.log()
        model.suffix_RL = p_RL.log() - p_L.log()
        return model.float().eval()

    def scores(self, sentences: Sequence[Words]) -> PackedSequence:
        """log p(w | y); of unknown words up to a number that is the same for all states: (N, L)."""
        word_row, suffix_row = self.row["words"], self.row["suffixes"]
        row_N = [
            self.word_VL[word_row[word]]
            if word in word_row
            else self.suffix_RL[[suffix_row[s] for s in suffixes(word) if s in suffix_row][-1]]
            for words in sentences
            for word in words
        ]
        return pack(torch.stack(row_N), [len(words) for words in sentences])


def _counts(strings: Sequence[str], tagged: Sequence[tuple[str, int]], L: int) -> Tensor:
    """How often each string has each state: (strings, L)."""
    row = {string: i for i, string in enumerate(strings)}
    index_N = torch.tensor([row[string] * L + state for string, state in tagged])
    return torch.bincount(index_N, minlength=len(strings) * L).view(-1, L).double()
