"""Exported graphs compute what the model does, at every shape: torch.export, and ONNX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from minibert import BertForMaskedLM, BertForTokenClassification
from minibert.model.heads import BertWithHead
from tests.builders import small_bert

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = ((1, 1), (1, 64), (4, 5), (5, 1))  # (B, S); the model has 64 positions
NAMES = ("input_ids", "attention_mask")


def inputs(rows: int, length: int, masked: bool) -> tuple[Tensor, ...]:
    """Ids, and if ``masked`` a mask with holes, which keeps the first token of every row."""
    draw = torch.Generator().manual_seed(rows * 100 + length)
    ids_BS = torch.randint(5, 40, (rows, length), generator=draw)
    mask_BS = (torch.rand(rows, length, generator=draw) < 0.6).long()
    mask_BS[:, 0] = 1
    return (ids_BS, mask_BS) if masked else (ids_BS,)


def exported(model: BertWithHead, masked: bool) -> torch.export.ExportedProgram:
    example = inputs(2, 7, masked)
    axes = {name: {0: "B", 1: "S"} for name, _ in zip(NAMES, example)}
    dynamic = {name: dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC) for name in axes}
    return torch.export.export(model, example, dynamic_shapes=dynamic)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    ("kind", "attn"),
    [
        (BertForTokenClassification, "sdpa"),
        pytest.param(BertForTokenClassification, "eager", marks=pytest.mark.slow),
        pytest.param(BertForMaskedLM, "sdpa", marks=pytest.mark.slow),
    ],
)
def test_an_exported_program_gives_the_same_bits(kind: type, attn: str, masked: bool) -> None:
    model = small_bert(kind, attn, num_hidden_layers=1)
    program = exported(model, masked).module()
    for shape in SHAPES:
        given = inputs(*shape, masked)
        out = program(*given)
        assert torch.equal(out.logits, model(*given).logits), shape
        assert out.loss is out.hidden_states is out.attentions is None
    if masked:  # one that hides nothing is kept: the model without one runs another kernel
        given = (given[0], torch.ones_like(given[1]))
        torch.testing.assert_close(program(*given).logits, model(*given).logits)
    with pytest.raises(AssertionError, match="64"):
        program(*inputs(1, 65, masked))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForMaskedLM])
def test_onnxruntime_agrees(kind: type, attn: str, masked: bool, tmp_path: Path) -> None:
    import onnxruntime

    model = small_bert(kind, attn)
    program = exported(model, masked)
    names = list(NAMES[: 1 + masked])
    onnx = torch.onnx.export(
        program, dynamo=True, input_names=names, output_names=["logits"], verbose=False
    )
    assert onnx is not None
    onnx.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [x.name for x in session.get_inputs()] == names
    assert [x.name for x in session.get_outputs()] == ["logits"]
    for shape in SHAPES:
        given = inputs(*shape, masked)
        (logits,) = session.run(None, {name: x.numpy() for name, x in zip(names, given)})
        # Sums in another order: 1e-5 is some ten times the float32 rounding error of two layers.
        torch.testing.assert_close(
            torch.from_numpy(logits), model(*given).logits, rtol=0, atol=1e-5
        )
