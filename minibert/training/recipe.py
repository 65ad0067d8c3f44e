"""The recipe of a run: every number that decides its result besides data, model and seed.

``Recipe`` is what every task has; ``TaggingRecipe`` and ``PretrainingRecipe`` add their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

from minibert.files import MinibertError
from minibert.text.masking import STRATEGIES
from minibert.training.adamw import SEMANTICS

LARGEST = 10**9  # of a whole number in a recipe


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Each field is a flag of the command line; the text beside it is the flag's help.

    Raises:
        ValueError: a value out of range.
    """

    lr: Annotated[float, "peak learning rate, reached at the end of the warm-up"]
    epochs: Annotated[int, "passes over the training sentences"]
    batch_size: Annotated[int, "sentences per batch, over all processes"]
    warmup: Annotated[float, "share of all steps, in [0, 1), during which the learning rate rises"]
    weight_decay: Annotated[float, "decoupled weight decay of matrices and embeddings; 0: none"]
    eps: Annotated[float, "AdamW's eps, added to the root of the second moment"]
    clip: Annotated[float, "bound on the joint 2-norm of the gradients"]
    optimizer: Annotated[str, "whose AdamW: torch, transformers or google (docs/optimiser.md)"]
    layout: Annotated[
        str,
        "packed: no padding, the fastest; longest: pad to the longest sentence of the batch; "
        "a number: pad to that many word-pieces and split longer sentences",
    ]
    bucket: Annotated[int, "batches whose sentences are sorted by length together; 1: no sorting"]
    average: Annotated[
        float,
        "average the weights over the steps, step t counting about t^AVERAGE, for evaluation and "
        "saving; inf: take the last weights",
    ]
    accumulate: Annotated[
        int, "batches per optimiser step: raise it when a larger batch does not fit into memory"
    ] = 1

    def __post_init__(self) -> None:
        positive = ("lr", "epochs", "batch_size", "eps", "clip", "bucket", "accumulate")
        for name in positive:
            if not vars(self)[name] > 0:
                raise ValueError(f"{name} must be above 0, got {vars(self)[name]}")
        for name, value in vars(self).items():
            if isinstance(value, int) and value > LARGEST:
                raise ValueError(f"{name} must be at most {LARGEST}, got {value}")
            if value == math.inf and name not in ("clip", "average"):
                raise ValueError(f"{name} must be finite, got {value}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of all steps, in [0, 1), got {self.warmup}")
        for name in ("weight_decay", "average"):
            if not vars(self)[name] >= 0:
                raise ValueError(f"{name} must not be negative, got {vars(self)[name]}")
        if self.optimizer not in SEMANTICS:
            raise ValueError(f"optimizer must be one of {', '.join(SEMANTICS)}")
        if self.layout not in ("packed", "longest") and not self.layout.isdecimal():
            raise ValueError(f"layout must be packed, longest or a length, got {self.layout!r}")
        if self.layout.isdecimal() and not 3 <= int(self.layout) <= LARGEST:
            raise ValueError(f"layout must be at least 3 word-pieces, got {self.layout}")

    def max_length(self, positions: int) -> int:
        """Word-pieces of a sentence before it is split, with a model of ``positions``.

        Raises:
            MinibertError: the layout is longer than the model.
        """
        length = int(self.layout) if self.layout.isdecimal() else positions
        if length > positions:
            raise MinibertError(
                f"--layout {length}: the model has {positions} positions: give at most that many"
            )
        return length


@dataclass(frozen=True, kw_only=True)
class TaggingRecipe(Recipe):
    """Of fine-tuning for named entities.

    Raises:
        ValueError: a value out of range.
    """

    decode: Annotated[
        str,
        "best: the most probable well-formed BIO sequence; each: the most probable label of each "
        "word",
    ]
    r_drop: Annotated[
        float,
        "run every batch twice, and add this times the disagreement of the two passes to the loss, "
        "which takes twice the time; 0: once",
    ] = 0.0
    hide: Annotated[
        float,
        "share of the word-pieces, in [0, 1), that the second of these runs sees as [MASK]",
    ] = 0.0
    entity_cost: Annotated[
        float,
        "in [0, 100]: take this off the bias of every B- label when the model is scored and saved, "
        "so that it gives fewer doubtful entities; 0: none",
    ] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.r_drop >= 0:
            raise ValueError(f"r_drop must not be negative, got {self.r_drop}")
        if not 0 <= self.hide < 1:
            raise ValueError(f"hide is a share of the word-pieces, in [0, 1), got {self.hide}")
        if self.hide and not self.r_drop:
            raise ValueError(f"hide {self.hide} needs a second run: raise r_drop, or set hide to 0")
        if not 0 <= self.entity_cost <= 100:
            raise ValueError(f"entity_cost must be in [0, 100], got {self.entity_cost}")
        if self.decode not in ("best", "each"):
            raise ValueError(f"decode must be best or each, got {self.decode!r}")
        if self.entity_cost and self.decode == "each":
            raise ValueError(
                f"entity_cost {self.entity_cost} needs decode best, because word by word an I- "
                "label would take the place of its B-: set one of them"
            )


@dataclass(frozen=True, kw_only=True)
class PretrainingRecipe(Recipe):
    """Of masked-LM training.

    Raises:
        ValueError: a value out of range.
    """

    masking: Annotated[
        str,
        "static: hide the same pieces in every epoch; dynamic: others in every epoch; whole: as "
        "dynamic, and entities and phrases as wholes",
    ]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masking not in STRATEGIES:
            raise ValueError(f"masking must be one of {', '.join(STRATEGIES)}")


# Chosen on held-out parts of engtrain with benchmarks/choose_recipe.py.
DEFAULT = TaggingRecipe(
    lr=3e-4,
    epochs=4,
    batch_size=32,
    warmup=0.1,
    weight_decay=0.01,
    eps=1e-8,
    clip=1.0,
    optimizer="torch",
    layout="packed",
    bucket=1,
    average=1.0,
    decode="best",
)
RECIPES = {
    "default": DEFAULT,
    "accurate": replace(DEFAULT, epochs=6, r_drop=1.0, entity_cost=0.5),
    # The MIT Movie paper's. Its notebook has no warm-up, but its text says that the rate rises from
    # 0: --warmup 0.1 is the second reading.
    "paper": TaggingRecipe(
        lr=5e-5,
        epochs=4,
        batch_size=32,
        warmup=0.0,
        weight_decay=0.0,
        eps=1e-8,
        clip=1.0,
        optimizer="torch",
        layout="50",
        bucket=1,
        average=math.inf,
        decode="each",
    ),
}

# BERT's own optimiser and learning rate (Devlin et al. 2019, appendix A.2), for fewer steps.
PRETRAINING = PretrainingRecipe(
    lr=1e-4,
    epochs=10,
    batch_size=32,
    warmup=0.1,
    weight_decay=0.01,
    eps=1e-6,
    clip=1.0,
    optimizer="torch",
    layout="packed",
    bucket=1,
    average=math.inf,
    masking="dynamic",
)
