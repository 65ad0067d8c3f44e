"""A sentence alone and in a batch: how often minibert and transformers give the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minibert.machine import choose_device, choose_dtype
from minibert.model.heads import BertForTokenClassification
from minibert.study.parity import reference
from minibert.tagging.tagger import Tagger
from minibert.text.batches import chunks, examples_of, padded

BATCH = 32  # sentences of a batch of transformers, in the order given

Words = Sequence[str]
Score = Callable[[Sequence[Words]], list[Tensor]]  # (words, labels) of every sentence


@dataclass(frozen=True)
class AloneAndTogether:
    """What changes when sentences share a batch."""

    system: str
    sentences: int
    equal: int  # sentences with the same bits
    largest: float  # difference of a label's log-probability
    changed: tuple[str, ...]  # sentences with another most probable label of a word


def compare(directory: Path, sentences: Sequence[Words], device: str) -> list[AloneAndTogether]:
    """Score every sentence alone, then all of them in batches.

    minibert is a ``Tagger`` in fp32 and with its default. transformers has padded batches and
    "sdpa", in fp32, and in bf16 where the device multiplies it natively.

    Args:
        directory: of a trained token classifier.
        sentences: in words; none longer than the model.
        device: where both run.

    Raises:
        MinibertError: a file is missing or damaged, or transformers is not installed.
    """
    found = []
    for name in ("fp32", "auto"):
        tagger = Tagger.from_pretrained(directory, dtype=name, device=device)
        found.append(_judge(f"minibert {name}", _packed(tagger), sentences))
    plain = BertForTokenClassification.from_pretrained(directory)
    theirs = reference.load(directory, plain, "sdpa").to(device)
    where = choose_device(device)
    for dtype in dict.fromkeys((torch.float32, choose_dtype("auto", where).value)):
        score = _padded(theirs.to(dtype), tagger, where)
        found.append(_judge(f"transformers {str(dtype).removeprefix('torch.')}", score, sentences))
    return found


def _packed(tagger: Tagger) -> Score:
    return lambda sentences: tagger.start_scores(sentences)()


def _padded(model: torch.nn.Module, tagger: Tagger, device: torch.device) -> Score:
    """transformers' model on batches of ``BATCH`` sentences."""
    tokenizer, limit = tagger.tokenizer, tagger.model.config.max_length

    @torch.inference_mode()
    def score(sentences: Sequence[Words]) -> list[Tensor]:
        found: list[Tensor] = []
        for group in chunks(examples_of(sentences, tokenizer, limit), BATCH):
            batch = padded(group, tokenizer.pad_id, device=device)
            scores_WL = model(**batch.inputs).logits.flatten(end_dim=-2)[batch.first_W]
            found += scores_WL.float().cpu().split([len(example.firsts) for example in group])
        return found

    return score


def _judge(system: str, score: Score, sentences: Sequence[Words]) -> AloneAndTogether:
    alone = [score([words])[0] for words in sentences]
    pairs = list(zip(alone, score(sentences), strict=True))
    differences = (a.log_softmax(-1) - b.log_softmax(-1) for a, b in pairs)
    changed = (
        " ".join(words)
        for words, (a, b) in zip(sentences, pairs)
        if not torch.equal(a.argmax(-1), b.argmax(-1))
    )
    return AloneAndTogether(
        system,
        len(sentences),
        sum(torch.equal(a, b) for a, b in pairs),
        max(float(difference.abs().max()) for difference in differences),
        tuple(changed),
    )


def table(found: Sequence[AloneAndTogether]) -> str:
    """A line for each system."""
    lines = [f"the same bits alone and in a batch, of {found[0].sentences} sentences"]
    for one in found:
        line = f"  {one.system:<22} {one.equal:>6}"
        if one.equal < one.sentences:
            line += f"   largest difference {one.largest:.0e}, labels change in {len(one.changed)}"
        lines.append(line)
    return "\n".join(lines)
