"""Labels of the default format and layout against those of fp32, padded, with plain layers."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import workload
from benchmarks.workload import Workload
from minibert.tagging.tagger import Tagger
from minibert.text.metrics import entity_scores


def test_accuracy(race: Callable, work: Workload) -> None:
    """A trained model changes at most one word in a thousand, and 0.1 points of F1."""
    name = f"minibert {workload.OURS}, packed"
    found = race([name], lambda _: lambda: compare(work), turns=1, warm_up=0)[name]
    if work.model_dir is not None:
        assert found["words_apart"] <= 0.001 * found["words"]
        assert abs(found["f1"] - found["f1_fp32_padded"]) <= 0.001


def compare(work: Workload) -> dict:
    sentences = work.corpus[1]
    true = [list(sentence.tags) for sentence in sentences]

    def names(dtype: str, fast: bool) -> list[list[str]]:
        tagger = Tagger.from_pretrained(
            work.minilm, dtype=dtype, device="cpu", pack=fast, prepack=fast
        )
        labelled = tagger.label([sentence.words for sentence in sentences])
        return [[label.name for label in labels] for labels in labelled]

    exact, fast = names("fp32", False), names("auto", True)
    pairs = [pair for a, b in zip(exact, fast) for pair in zip(a, b)]
    return {
        "words": len(pairs),
        "words_apart": sum(a != b for a, b in pairs),
        "f1": entity_scores(true, fast).micro.f1,
        "f1_fp32_padded": entity_scores(true, exact).micro.f1,
        "trained": work.model_dir is not None,
    }
