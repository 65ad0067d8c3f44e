"""A bidirectional LSTM under a CRF (Huang, Xu & Yu 2015, arXiv:1508.01991).

A word is represented by its embedding and by how it is spelled: the last states of an LSTM
that reads its letters forwards and of one that reads them backwards (Lample et al. 2016,
arXiv:1603.01360). Two more LSTMs (Hochreiter & Schmidhuber 1997) read the sentence in both
directions; their states at a word, joined, give the scores of its labels by one linear layer, and a
chain of labels (model/crf.py) weighs them together:

    x_t = dropout([word(w_t); LSTM>(letters); LSTM<(letters)])
    score_t = A dropout([LSTM>(x)_t; LSTM<(x)_t]) + b         p(y | words) = exp(s(y)) / Z

Everything starts at random and is trained on -log p(labels | words) with Adam, whose rate falls to
0. A word that occurs once is often hidden while training, so that unknown words have a vector too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from minibert.baselines.chain_tagger import ChainTagger, Words
from minibert.model.crf import Chain, pack
from minibert.text.batches import epoch_batches
from minibert.text.bio import Sentence, label_ids, labels_of

# The usual values; not tuned.
EPOCHS, BATCH, BUCKET = 20, 32, 8
LR, CLIP, DROPOUT = 3e-3, 5.0, 0.5
HIDDEN_ONCE = 0.5  # probability of hiding a word that occurs once
LETTERS = 40  # read of a word


class BiLSTMCRF(ChainTagger):
    """See above; ``BiLSTMCRF.fit`` makes one from sentences.

    Row 0 of both embeddings is that of unknown words and letters.
    """

    kind = "bilstm-crf"

    def __init__(
        self,
        labels: Sequence[str],
        vocabulary: dict[str, list[str]],
        word_size: int = 100,
        letter_size: int = 25,
        hidden_size: int = 128,
    ):
        sizes = {"word_size": word_size, "letter_size": letter_size, "hidden_size": hidden_size}
        super().__init__(labels, vocabulary, **sizes)
        L = len(labels)
        self.word = nn.Embedding(len(vocabulary["words"]), word_size)
        self.letter = nn.Embedding(len(vocabulary["letters"]), letter_size)
        self.spelling = nn.LSTM(letter_size, letter_size, bidirectional=True)
        self.context = nn.LSTM(word_size + 2 * letter_size, hidden_size, bidirectional=True)
        self.dropout = nn.Dropout(DROPOUT)
        self.output = nn.Linear(2 * hidden_size, L)
        self.chain = Chain(torch.zeros(L), torch.zeros(L, L), torch.zeros(L))
        self.once: set[str] = set()  # words to hide while training

    def scores(self, sentences: Sequence[Words]) -> PackedSequence:
        """The network's output for every word, packed: (N, L)."""
        words = [word for sentence in sentences for word in sentence]
        distinct = {word: i for i, word in enumerate(dict.fromkeys(words))}
        which_N = self._tensor([distinct[word] for word in words])
        row_N = self._tensor(self._rows("words", words))
        if self.training:
            once_N = self._tensor([word in self.once for word in words])
            row_N = row_N.masked_fill(once_N & (torch.rand(len(words)) < HIDDEN_ONCE).to(once_N), 0)
        spelled_UC = self._spelled(list(distinct))
        x_NE = torch.cat([self.word(row_N), spelled_UC[which_N]], 1)
        state, _ = self.context(pack(self.dropout(x_NE), [len(s) for s in sentences]))
        return state._replace(data=self.output(self.dropout(state.data)))

    def _spelled(self, words: Words) -> Tensor:
        """The last states of both directions over each word's letters: (U, 2 letter_size)."""
        letters = [word[:LETTERS] or " " for word in words]
        row_M = self._tensor(self._rows("letters", "".join(letters)))
        _, (last_2UC, _) = self.spelling(pack(self.letter(row_M), [len(word) for word in letters]))
        return last_2UC.transpose(0, 1).flatten(1)

    def _rows(self, table: str, strings: Sequence[str]) -> list[int]:
        return [self.row[table].get(string, 0) for string in strings]

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values).to(self.output.bias.device, non_blocking=True)

    @classmethod
    def fit(
        cls,
        sentences: Sequence[Sentence],
        seed: int = 0,
        epochs: int = EPOCHS,
        device: torch.device | str = "cpu",
    ) -> BiLSTMCRF:
        """Train."""
        torch.manual_seed(seed)
        labels = labels_of(sentences)
        counts = Counter(word for sentence in sentences for word in sentence.words)
        letters = sorted({letter for word in counts for letter in word})
        model = cls(labels, {"words": ["", *sorted(counts)], "letters": ["", *letters]}).to(device)
        model.once = {word for word, count in counts.items() if count == 1}
        ids = label_ids(sentences, labels, "training")
        lengths = [len(path) for path in ids]
        optimizer = torch.optim.Adam(model.parameters(), LR)
        steps = epochs * -(-len(ids) // BATCH)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for epoch in range(epochs):
            for batch in epoch_batches(lengths, BATCH, seed, epoch, BUCKET):
                scores = model.scores([sentences[i].words for i in batch])
                label_N = torch.tensor([label for i in batch for label in ids[i]]).to(device)
                truth = pack(label_N, [lengths[i] for i in batch])
                loss = model.chain.loss(scores, truth).mean()
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                schedule.step()
        return model.eval()
