"""Code that is not minibert's is judged: kept where it is right, named where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import minibert
from minibert import BertForTokenClassification
from minibert.files import MinibertError
from minibert.study.parity import reference
from tests.builders import small_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ("who knows", "a", "some text here")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("tiny"))


def transformers_of(folder: Path, **changes) -> nn.Module:
    """Someone's module: here transformers' own, with other settings."""
    made = reference.library().BertForTokenClassification
    return made.from_pretrained(folder, local_files_only=True, **changes).eval()


def test_a_right_module_is_kept_and_its_gradients_are_judged(tiny: Path) -> None:
    theirs = transformers_of(tiny, attn_implementation="eager")
    named = dict(theirs.named_parameters())

    def code(**inputs: Tensor) -> Tensor:
        return theirs(**inputs).logits

    same = minibert.compare_code(code, tiny, TEXTS, attn="eager", bits=True, parameters=named)
    assert same.kept
    assert same.margin == f"{len(same.rows)} of {len(same.rows)} equal"
    assert {row.operation for row in same.rows} == {"logits", "gradient"}
    assert len(same.rows) == 1 + len(named)
    other = minibert.compare_code(code, tiny, TEXTS, attn="sdpa", parameters=named)
    assert other.kept, other
    assert other.first_difference is not None
    assert all(p.grad is None for p in theirs.parameters())
    report = str(other)
    assert "error of the code" in report
    assert "minibert" not in report


def test_a_wrong_activation_is_named(tiny: Path) -> None:
    theirs = transformers_of(tiny, hidden_act="gelu_new")

    def code(**inputs: Tensor) -> dict[str, Tensor]:
        with reference.watch(theirs, 2, 3) as seen:
            theirs(**inputs)
        return seen

    found = minibert.compare_code(code, tiny, TEXTS)
    assert found.first_broken is not None
    assert found.first_broken.name == "layers.0.post_gelu"
    assert "first broken: layers.0.post_gelu (" in str(found)


def test_any_callable_in_another_dtype(tiny: Path) -> None:
    ours = BertForTokenClassification.from_pretrained(tiny, dtype="bf16")

    def code(input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return ours(input_ids, attention_mask, token_type_ids).logits

    assert minibert.compare_code(code, tiny, TEXTS, dtype="bf16", bits=True).kept
    with pytest.raises(MinibertError, match=r"bfloat16, transformers .* torch\.float32"):
        minibert.compare_code(code, tiny, TEXTS)


def test_what_cannot_be_judged_is_an_error(tiny: Path, tmp_path: Path) -> None:
    def code(**inputs: Tensor) -> dict[str, Tensor]:
        return {"layers.9.q": torch.zeros(1)}

    with pytest.raises(MinibertError, match=r"layers\.9\.q"):
        minibert.compare_code(code, tiny, TEXTS)
    with pytest.raises(MinibertError, match="no logits"):
        minibert.compare_code(lambda **_: {}, tiny, TEXTS)
    with pytest.raises(MinibertError, match="logits: the code gives"):
        minibert.compare_code(lambda **_: torch.zeros(1), tiny, TEXTS)
    named = {"mine": nn.Parameter(torch.zeros(1))}
    with pytest.raises(MinibertError, match="by transformers' names"):
        minibert.compare_code(code, tiny, TEXTS, parameters=named)
