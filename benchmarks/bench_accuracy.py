"""What the fast path changes about the predictions: against float32, padded, plain layers."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import stage
from benchmarks.stage import Place, Plan, Run
from minibert.tagging.tagger import Tagger
from minibert.text.metrics import entity_scores

INFERENCE, TURNS, WARM_UP = True, 1, 0


def subjects(plan: Plan) -> Sequence[str]:
    return (f"minibert {stage.OURS}, packed",)


def test_accuracy(found: dict, place: Place) -> None:
    """At most one word in a thousand, and 0.1 points of F1: asked of a trained model only."""
    assert found["words"] > 0
    if place.model_dir is not None:
        assert found["words_apart"] <= 0.001 * found["words"]
        assert abs(found["f1"] - found["f1_fp32_padded"]) <= 0.001


def build(subject: str, place: Place) -> Run:
    directory = stage.minilm_directory(place.model_dir, place.folder / "minilm")
    sentences = stage.corpus(place.plan_name)[1]
    true = [list(sentence.tags) for sentence in sentences]
    words = [sentence.words for sentence in sentences]

    def names(dtype: str, fast: bool) -> list[list[str]]:
        tagger = Tagger.from_pretrained(
            directory, dtype=dtype, device="cpu", pack=fast, prepack=fast
        )
        return [[label.name for label in labels] for labels in tagger.label(words)]

    def run() -> dict:
        exact, fast = names("fp32", False), names("auto", True)
        pairs = [pair for a, b in zip(exact, fast) for pair in zip(a, b)]
        return {
            "words": len(pairs),
            "words_apart": sum(a != b for a, b in pairs),
            "f1": entity_scores(true, fast).micro.f1,
            "f1_fp32_padded": entity_scores(true, exact).micro.f1,
            "trained": place.model_dir is not None,
        }

    return run
