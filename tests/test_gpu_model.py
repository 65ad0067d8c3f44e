"""The whole model with fused attention on a GPU, against transformers and float64."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import minilm_checkpoint, padded_and_packed, twin, write_bio
from torch import Tensor

from minibert import BertConfig, BertForTokenClassification, Tagger
from minibert.pretrained.weights import names_of
from minibert.speed.cuda_graphs import Graphs, Recorder, choose_inference
from minibert.speed.prepacked import JoinedLinear, prepack
from minibert.text import batches, demo
from minibert.text.bio import labels_of

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = [12, 3, 70, 9, 128, 31]
LABELS = 25


CONFIG = BertConfig(
    vocab_size=1000, num_hidden_layers=4, labels=tuple(f"L{i}" for i in range(LABELS))
)


def build(attn: str, dropout_p: float = 0.0) -> BertForTokenClassification:
    """Four layers of BERT-base on the GPU, with the same weights for every ``attn``."""
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": dropout_p, "attention_probs_dropout_prob": dropout_p}
    return BertForTokenClassification(replace(CONFIG, **rates), attn).cuda()


def batch() -> tuple[dict, dict, Tensor]:
    return padded_and_packed(LENGTHS, CONFIG, "cuda")


def test_error_is_within_that_of_transformers() -> None:
    """In float16 autocast: at most twice transformers' error, three times in gradients."""
    ours = build("fused").eval()
    theirs = twin(ours)
    exact = copy.deepcopy(theirs).double()
    padded, packed, real = batch()
    scale = 1024.0
    results = []
    for model, inputs, half in (
        (exact, padded, False),
        (theirs, padded, True),
        (ours, packed, True),
    ):
        with torch.autocast("cuda", torch.float16, enabled=half):
            output = model(**inputs)
        (output.loss * scale).backward()
        results.append(output.logits[real] if output.logits.dim() == 3 else output.logits)
    want, reference_logits, logits = (x.detach().double() for x in results)
    allowed = 2 * (reference_logits - want).abs().max() + 1e-5
    assert (logits - want).abs().max() <= allowed

    exact_grads = {name: p.grad for name, p in exact.named_parameters()}
    their_grads = {name: p.grad for name, p in theirs.named_parameters()}
    our_grads = {name: p.grad for name, p in ours.named_parameters()}
    for mine, name in names_of(ours).items():
        exact_grad = exact_grads[name]
        allowed = 3 * (their_grads[name] - exact_grad).abs().max() + 1e-5 * scale
        assert (our_grads[mine] - exact_grad).abs().max() <= allowed, name


def test_twenty_amp_steps_follow_the_eager_path() -> None:
    """At most three times as far from eager float32 as eager float16 is."""
    runs = {}
    for attn, half in (("eager", False), ("eager", True), ("fused", True)):
        model = build(attn).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
        scaler = torch.amp.GradScaler(enabled=half)
        _, packed, _ = batch()
        losses = []
        for _ in range(20):
            with torch.autocast("cuda", torch.float16, enabled=half):
                loss = model(**packed).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(float(loss))
        runs[attn, half] = torch.tensor(losses)
    exact = runs["eager", False]
    assert exact[-1] < 0.9 * exact[0]
    allowed = 3 * (runs["eager", True] - exact).abs().max() + 1e-3
    assert (runs["fused", True] - exact).abs().max() <= allowed


def test_a_padded_batch_and_a_fully_masked_row() -> None:
    """Finite everywhere, and at most twice transformers' error on tokens."""
    ours = build("fused").eval()
    theirs = twin(ours)
    exact = copy.deepcopy(theirs).double()
    padded, _, real = batch()
    padded.pop("labels")
    padded["attention_mask"][1] = 0
    real[1] = False
    with torch.no_grad():
        want = exact(**padded).logits[real]
        with torch.autocast("cuda", torch.float16):
            their_logits = theirs(**padded).logits[real].double()
            logits = ours(**padded).logits
    assert torch.isfinite(logits).all()
    allowed = 2 * (their_logits - want).abs().max() + 1e-5
    assert (logits[real].double() - want).abs().max() <= allowed


def test_a_replayed_step_is_a_plain_one() -> None:
    """With dropout and alternating sizes: the same masks, and gradients equal to float16 rounding.

    They need not be bit-equal, because cuBLAS may choose another algorithm during capture.
    """
    model = build("fused", dropout_p=0.1).train()
    device = torch.device("cuda")
    recorded = Graphs(model, model.config.max_length, torch.float16, Recorder(device))
    plain = Graphs(model, model.config.max_length, torch.float16, Recorder(device), most=0)
    inputs = []
    for lengths in ([12, 30, 9, 31, 40], [12, 30, 9, 31, 41], LENGTHS):
        ids = [tuple(torch.randint(1, 1000, (n,)).tolist()) for n in lengths]
        labels = [tuple(torch.randint(LABELS, (n,)).tolist()) for n in lengths]
        examples = [
            batches.Example(x, tuple(range(len(x))), i, 0, y)
            for i, (x, y) in enumerate(zip(ids, labels))
        ]
        inputs.append(batches.packed(examples, device, filler=0).inputs)
    for turn, index in enumerate([0, 2, 1, 0, 2]):
        found = []
        for graphs in (recorded, plain):
            torch.manual_seed(turn)
            loss = graphs.backward(inputs[index], 1024.0).clone()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            found.append((loss, gradient, torch.cuda.get_rng_state()))
            model.zero_grad()
        (loss, gradient, state), (plain_loss, plain_gradient, plain_state) = found
        assert torch.equal(state, plain_state)
        torch.testing.assert_close(loss, plain_loss, rtol=2**-9, atol=0)
        assert (gradient - plain_gradient).norm() <= 2**-7 * plain_gradient.norm()
    assert len(recorded.recordings) == 2


def test_pools_started_ahead_give_the_same(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten pools; each is decoded while the GPU computes the next."""
    sentences, _ = demo.generate()
    minilm_checkpoint(minilm, tmp_path, labels_of(sentences), sharpness=20)
    tagger = Tagger.from_pretrained(tmp_path, dtype="fp16", device="cuda")
    monkeypatch.setattr("minibert.tagging.stream.POOL", 100)
    texts = [" ".join(s.words) for s in sentences[:1000]]
    assert tagger.depth == 1
    ahead = list(tagger.tag_texts(texts))
    monkeypatch.setattr(Tagger, "depth", 0)
    assert ahead == list(tagger.tag_texts(texts))
    assert sum(map(len, ahead)) > 100


@torch.inference_mode()
def test_replayed_inference_gives_the_plain_logits() -> None:
    """Batches of one size alternate; the replay's sentences are others than the capture's."""
    model = build("fused").half().eval()
    plain = copy.deepcopy(model)
    prepack(model, JoinedLinear)
    chosen = choose_inference(model)
    assert chosen.value, chosen.reason
    captured = len(chosen.value.recordings)
    for lengths in ([12, 30], [21, 21], [7], [40, 2], [7]):
        _, inputs, _ = padded_and_packed(lengths, CONFIG, "cuda")
        del inputs["labels"], inputs["token_type_ids"]
        want = plain(**inputs).logits.float()
        assert (chosen.value(inputs).float() - want).abs().max() <= 2**-7 * want.abs().max()
    assert len(chosen.value.recordings) == captured + 2


@pytest.mark.parametrize("graphs", [(), ("--graphs",)])
def test_train_py_in_half_precision(graphs: tuple, minilm: Path, tmp_path: Path) -> None:
    """The command line trains with fused attention, a loss scaler and fused AdamW."""
    stdout, losses = trained(
        minilm, tmp_path, "--device", "cuda", "--dtype", "fp16", "--attn", "fused", *graphs
    )
    assert "fp16 (as requested)" in stdout
    assert "attention fused, AdamW in one pass, with the CUDA kernel" in stdout
    assert torch.isfinite(losses).all()
    assert losses[-6:].mean() < 0.8 * losses[:6].mean()


def trained(minilm: Path, tmp_path: Path, *arguments: str) -> tuple[str, Tensor]:
    """The output of train.py, and the losses of its 24 steps."""
    sentences, _ = demo.generate()
    corpus, output = write_bio(tmp_path / "corpus.bio", sentences[:96]), tmp_path / "run"
    command = [sys.executable, ROOT / "train.py", "--model", minilm, "--output", output]
    command += ["--train", corpus, "--test", corpus, "--epochs", "2", "--batch-size", "8"]
    ran = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 24
    return ran.stdout, torch.tensor(losses)
