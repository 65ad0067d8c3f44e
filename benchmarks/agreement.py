"""How alike two annotations of one sentence are in MIT Movie.

    python -m benchmarks.agreement

Some sentences occur more than once in engtrain and engtest, not always with the same labels. Every
pair of annotations is scored as a model's labels are. The 95 % intervals are from a bootstrap over
the sentences.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from benchmarks import runs
from benchmarks.report import markdown
from minibert.pretrained import hub
from minibert.text.bio import Sentence, read_bio
from minibert.text.metrics import entity_scores, token_scores

Tags = tuple[str, ...]
PAGE = runs.ROOT / "docs" / "reproducing-the-paper.md"
RESAMPLES = 1000


def main() -> None:
    corpus = hub.locate_corpus("mit_movie")
    sentences = [s for name in ("engtrain", "engtest") for s in read_bio(corpus / f"{name}.bio")]
    runs.keep("agreement-mit_movie", measured(sentences))
    runs.replace_section(PAGE, "agreement", table(runs.RESULTS))


def measured(sentences: Sequence[Sentence]) -> dict:
    """The counts, and each score with its interval, in percent."""
    annotations: dict[tuple[str, ...], list[Tags]] = defaultdict(list)
    for sentence in sentences:
        annotations[sentence.words].append(sentence.tags)
    repeated = {words: found for words, found in annotations.items() if len(found) > 1}
    # In either order: precision and recall change places, and both scores stay.
    pairs = [list(combinations(found, 2)) for found in repeated.values()]
    draw = random.Random(0)
    drawn = [_scores(draw.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES)]
    tokens, entities = (sorted(scores) for scores in zip(*drawn))
    low, high = RESAMPLES // 40, RESAMPLES - RESAMPLES // 40 - 1
    token, entity = _scores(pairs)
    return {
        "repeated": len(repeated),
        "annotated alike": sum(len(set(found)) == 1 for found in repeated.values()),
        "pairs": sum(map(len, pairs)),
        "words": sum(map(len, repeated)) / len(repeated),
        "words of all": sum(len(s.words) for s in sentences) / len(sentences),
        "token": [token, tokens[low], tokens[high]],
        "entity": [entity, entities[low], entities[high]],
    }


def _scores(pairs: Sequence[Sequence[tuple[Tags, Tags]]]) -> tuple[float, float]:
    """Token micro-F1 including O and entity F1 of all pairs together, in percent."""
    one, other = zip(*(pair for of_sentence in pairs for pair in of_sentence))
    tokens, entities = token_scores(one, other), entity_scores(one, other)
    return 100 * tokens.micro_with_o, 100 * entities.micro.f1


def table(folder: Path) -> str:
    """The newest result."""
    path = sorted(folder.glob("agreement-mit_movie-2*.json"))[-1]
    found = json.loads(path.read_text(encoding="utf-8"))
    head = ["queries that occur again", "annotated alike", "pairs", "words per query (all queries)"]
    row = [str(found[name]) for name in ("repeated", "annotated alike", "pairs")]
    row.append(f"{found['words']:.1f} ({found['words of all']:.1f})")
    for title, name in (("entity F1", "entity"), ("token micro-F1 with O", "token")):
        head.append(f"{title} of two annotations (95 % interval)")
        row.append("{:.1f} ({:.1f} to {:.1f})".format(*found[name]))
    return f"{markdown(head, [row])}\n\nFrom `benchmarks/results/{path.name}`."


if __name__ == "__main__":
    main()
