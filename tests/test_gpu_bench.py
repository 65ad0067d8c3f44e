"""A rehearsal of the GPU benchmark: the same code on a CPU with a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_bench, gpu_models, gpu_plan, runs
from benchmarks.workload import like
from minibert import BertConfig, BertForTokenClassification
from minibert.files import MinibertError
from minibert.text.batches import Example


@pytest.mark.slow
def test_rehearsal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(*_) -> None:
        raise AssertionError("a rehearsal writes no result")

    monkeypatch.setattr(runs, "keep", keep)
    assert gpu_bench.main(["--tiny"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rehearsal"] is True
    assert result["ceilings"].keys() == gpu_bench.PARTS.keys()
    assert all(value > 0 for part in result["ceilings"].values() for value in part.values())
    assert result["versions"]["cuda-bindings"]

    attention = result["attention"]["rows"]
    assert {row["path"] for row in attention} >= {"own kernels", "sdpa efficient, padded"}
    for row in attention:
        assert ("not_available" in row) != ("both_tflops" in row)
    ran = [row for row in attention if "both_ms" in row]
    assert ran, "a CPU has SDPA's flash path"
    for row in ran:
        operations = row["forward_tflops"] * row["forward_ms"]
        assert row["both_tflops"] * row["both_ms"] == pytest.approx(3.5 * operations)

    norm = {row["path"]: row for row in result["norm"]["rows"]}
    assert norm["three of torch"]["both_ms"] > norm["three of torch"]["forward_ms"]
    assert norm["own kernels"]["not_available"]

    for part in ("inference", "training"):
        assert result[part]["weights"].startswith("random (seed 0), 1 layers of 32")
        assert result[part]["minibert_attention"] == "sdpa: requested"
    rows = result["inference"]["rows"] + result["training"]["rows"]
    sides = ["minibert sdpa, packed", "transformers sdpa, padded"]
    assert [row["model"] for row in rows] == 3 * sides
    for row in rows:
        what = "train" if "training" in row["batch"] else "infer"
        assert len(row["all_ms"]) == 2
        assert row["host_ms_a_batch"] > 0
        assert row["predicted_ms_a_batch"] is None
        speed = 1000 * row["tokens"] / (row[f"{what}_ms_a_batch"] * row["batches"])
        assert row[f"{what}_tokens_s"] == pytest.approx(speed)
        if what == "infer":
            # The same weights and the same tokens on both sides, in float32.
            assert row["logits_apart"] < 1e-6
        else:
            assert "AdamW" in row["adamw"] or "fused CPU kernel" in row["adamw"]
            assert row["last_losses"] < row["first_loss"] < 2 * math.log(25)


def test_a_checkpoint_is_used_where_there_is_one(minilm: Path) -> None:
    plan = gpu_plan.tiny()._replace(checkpoint="minilm")
    ours, tokenizer, origin = gpu_models.checkpoint(plan, ("O", "B-TITLE", "I-TITLE"))
    assert origin == "minilm, new classifier"
    theirs = like(ours).eval()
    ids = torch.tensor([[tokenizer.cls_id, 2040, 2856, tokenizer.sep_id]])
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(MinibertError, match="no CUDA device here, nothing is measured"):
        gpu_bench.main([])


def test_what_the_notebook_compares_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    plan = gpu_plan.full()
    for length in (32, 128, 384):
        assert plan.lengths[f"32 x {length}"] == 32 * [length]
    assert sum(plan.lengths["32 x up to 128"]) / 32 == 66
    assert {*gpu_models.PREDICTED_T4_MS} <= {*plan.lengths, "mit_movie training"}
    assert (plan.corpus, plan.attn, plan.dtype) == ("mit_movie", "fused", torch.float16)


def test_the_floor_of_bert_base() -> None:
    """169.9 MFLOP a token in the linear layers; 24 batches of one sentence of one token."""
    with torch.device("meta"):
        model = BertForTokenClassification(BertConfig(labels=("O",)))
    examples = [[Example((1,), (0,), 0, 0)]] * 24
    ceiling = gpu_plan.Ceiling(product_tflops=1.0, copy_gb_s=1000.0)
    floor = gpu_models.floor_of(model, ceiling, examples, training=False)
    assert floor["products_ms"] == pytest.approx(24 * 0.1699, rel=1e-3)
    assert floor["bytes_ms"] == pytest.approx(24 * 0.1699, rel=1e-3)
    trained = gpu_models.floor_of(model, ceiling, examples, training=True)
    assert trained["products_ms"] == pytest.approx(3 * floor["products_ms"])
    parameters = sum(p.numel() for p in model.parameters())
    linear = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 768
    assert trained["bytes_ms"] == pytest.approx(24 * (10 * linear + 36 * parameters) / 1e9)
