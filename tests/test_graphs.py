"""CUDA graphs of a training step, all but the capture.

The recorder here runs the passes again and copies the result to where the first one is, as a CUDA
graph does; attention is our kernels in the emulator. The capture itself is tested on a GPU
(``test_gpu_model.py``).
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_kernels_ops  # the kernels' CPU side is the emulator
import torch
from builders import small_bert, small_checkpoint, write_bio
from torch import Tensor
from training_runs import tiny_model

import train
from benchmarks import gpu_models
from minibert import BertForTokenClassification, Tagger
from minibert.files import MinibertError
from minibert.machine import Chosen
from minibert.model import encoder
from minibert.model.attention import Attended, sdpa
from minibert.model.layout import Layout, Packed
from minibert.speed import cuda_graphs
from minibert.speed.cuda.seeds import one_draw
from minibert.speed.cuda_graphs import Graphs, InferenceGraphs, Passes, Recording, Size
from minibert.speed.prepacked import JoinedLinear, prepack
from minibert.text import demo
from minibert.text.batches import Batch, Example, packed
from minibert.training import step
from minibert.training.pretrain import HiddenWordsModel
from minibert.training.r_drop import RDrop, hidden

own_kernels = test_kernels_ops.own_kernels
LABELS = ("O", "B-A", "I-A")
POSITIONS = 100
# The first, second and fourth are of one size, with seven sentences, four, and three and a filler.
BATCHES = ([2, 2, 2, 2, 8, 8, 9], [9, 9, 9, 6], [30, 70], [5, 17, 9], [3] * 10, [12, 20], [1])


class Repeated:
    """A recorder that runs the passes again; counts the recordings."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, passes: Callable) -> Recording:
        self.count += 1
        with torch.random.fork_rng():
            result = passes()

        def replay() -> None:
            again = passes()
            if isinstance(result, Tensor):
                result.copy_(again)
                return
            result.loss.copy_(again.loss)
            for place, gradient in zip(result.gradients, again.gradients):
                assert place is not None
                assert gradient is not None
                place.copy_(gradient)

        return Recording(replay, result)


def by_starts(q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor, layout: Layout, _p: float) -> Attended:
    """Attention in any dtype that reads ``starts`` alone, like fused attention."""
    assert isinstance(layout, Packed)
    contexts = []
    for start, stop in zip(layout.starts.tolist(), layout.starts[1:].tolist()):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (q_NHK, k_NHK, v_NHK))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        contexts.append((scores.softmax(-1) @ v).transpose(0, 1))
    return Attended(torch.cat(contexts), None)


def model_of(attn: str, dropout_p: float) -> BertForTokenClassification:
    return small_bert(
        attn=attn,
        noise=0.0,
        vocab_size=50,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
        labels=LABELS,
        hidden_dropout_prob=dropout_p,
        attention_probs_dropout_prob=dropout_p,
    ).train()


def batch_of(lengths: list[int], filler: int | None = 0) -> Batch:
    draw = random.Random(str(lengths))
    examples = [
        Example(
            tuple(draw.choices(range(1, 50), k=length)),
            tuple(range(length)),
            i,
            0,
            tuple(draw.choices(range(len(LABELS)), k=length)),
        )
        for i, length in enumerate(lengths)
    ]
    return packed(examples, filler=filler)


def gradients_of(model: BertForTokenClassification) -> list[Tensor]:
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return [gradient.clone() for gradient in gradients if gradient is not None]


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("r_drop", [0.0, 1.0])
def test_replayed_steps_are_the_bits_of_plain_ones(r_drop: float) -> None:
    """Our kernels under autocast with dropout; sizes alternate and the scale changes."""
    model = model_of("fused", dropout_p=0.1)
    if r_drop:
        model = RDrop(model, r_drop, partial(hidden, share=0.2, mask_id=4, special_ids=(0,)))
    recorder = Repeated()
    recorded = Graphs(model, POSITIONS, torch.float16, recorder)
    batches = [batch_of(lengths) for lengths in BATCHES]
    for turn, index in enumerate([0, 1, 2, 3, 0, 2]):
        scale = 2.0**turn
        torch.manual_seed(turn)
        loss = recorded.backward(batches[index].inputs, scale).clone()
        state, gradients = torch.get_rng_state(), gradients_of(model)
        model.zero_grad()
        torch.manual_seed(turn)
        with one_draw(), torch.autocast("cpu", torch.float16):
            expected = model(**batches[index].inputs).loss
        (expected * scale).backward()
        assert torch.equal(loss, expected.detach())
        assert all(map(torch.equal, gradients, gradients_of(model)))
        assert torch.equal(state, torch.get_rng_state())
        model.zero_grad()
    assert recorder.count == 2


def test_filling_up_changes_rounding_alone() -> None:
    """Against the batch without a filler; no step's gradients are left in the next."""
    model = model_of("sdpa", dropout_p=0.0).double()
    layer = model.bert.layers[0]
    recorded = Graphs(model, POSITIONS, torch.float32, Repeated())
    for lengths in (*BATCHES, *reversed(BATCHES)):
        layer.attention.attend = by_starts
        loss = recorded.backward(batch_of(lengths).inputs, 3.0).clone()
        gradients = gradients_of(model)
        model.zero_grad()
        layer.attention.attend = sdpa
        expected = model(**batch_of(lengths, filler=None).inputs).loss
        (3.0 * expected).backward()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
        for mine, theirs in zip(gradients, gradients_of(model)):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_gradients_stay_where_they_are() -> None:
    """The update's table of addresses is made once for each size."""
    model = model_of("sdpa", dropout_p=0.0)
    model.bert.layers[0].attention.attend = by_starts
    recorded = Graphs(model, POSITIONS, torch.float32, Repeated())

    def addresses(lengths: list[int]) -> list[int]:
        model.zero_grad()
        recorded.backward(batch_of(lengths).inputs)
        return [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]

    first, other, again = addresses([16, 16]), addresses([30, 70]), addresses([12, 20])
    assert first == again
    assert not set(first) & set(other)


def test_sizes_beyond_the_last_graph_go_without() -> None:
    model = model_of("sdpa", dropout_p=0.0)
    model.bert.layers[0].attention.attend = by_starts
    recorder = Repeated()
    recorded = Graphs(model, POSITIONS, torch.float32, recorder, most=1)
    recorded.backward(batch_of([16, 16]).inputs)
    kept = gradients_of(model)
    loss = recorded.backward(batch_of([30, 70]).inputs, 2.0)
    gradients = gradients_of(model)
    model.zero_grad()
    expected = model(**batch_of([30, 70]).inputs).loss
    (2.0 * expected).backward()
    assert torch.equal(loss, expected.detach())
    assert all(map(torch.equal, gradients, gradients_of(model)))
    recorded.backward(batch_of([16, 16]).inputs)
    assert all(map(torch.equal, gradients_of(model), kept))
    assert recorder.count == 1


def test_few_sizes() -> None:
    """MIT Movie's batches of 32 have some 330 to 500 word-pieces and at most 50 in a sentence."""
    draw = random.Random(0)
    sizes = set()
    for _ in range(1000):
        lengths = [max(3, min(50, round(draw.gauss(12.5, 5)))) for _ in range(32)]
        sizes.add(Size.of(batch_of(lengths).inputs["layout"], 512))
    assert len(sizes) <= cuda_graphs.MOST
    assert {(size.sentences, size.longest) for size in sizes} == {(64, 64)}
    assert Size.of(Packed.from_lengths([90]), 100) == (90, 2, 100)
    assert Size.of(Packed.from_lengths([512] * 4), 512) == (2048, 8, 512)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("cpu", "fused", "packed", 1, 1), "a CUDA device, not cpu"),
        (("cuda", "sdpa", "packed", 1, 1), "fused attention, not sdpa"),
        (("cuda", "fused", "50", 1, 1), "--layout packed, not 50"),
        (("cuda", "fused", "packed", 2, 1), "--accumulate 1, not 2"),
        (("cuda", "fused", "packed", 1, 2), "one process, not 2"),
    ],
)
def test_what_is_missing_is_named(given: tuple, named: str) -> None:
    device, attention, *rest = given
    head = small_bert().head
    model = SimpleNamespace(device=torch.device(device), attn_implementation=attention, head=head)
    with pytest.raises(MinibertError, match=f"^--graphs needs {named}: "):
        cuda_graphs.choose(True, model, *rest)
    assert cuda_graphs.choose(None, model, *rest) == Chosen(False, f"they need {named}")
    assert cuda_graphs.choose(False, model, *rest) == Chosen(False, "as requested")


@pytest.mark.parametrize(
    ("kind", "changes", "name"),
    [
        (BertForTokenClassification, {"head": "crf"}, "CRFHead"),
        (HiddenWordsModel, {}, "MaskedLMHead"),
    ],
)
def test_losses_whose_shapes_depend_on_labels_are_not_captured(
    kind: type, changes: dict, name: str
) -> None:
    head = small_bert(kind, **changes).head
    model = SimpleNamespace(device=torch.device("cuda"), attn_implementation="fused", head=head)
    chosen = cuda_graphs.choose(None, model, "packed", 1, 1)
    assert chosen == Chosen(False, f"they need a linear head, not {name}")


def test_graphs_are_taken_where_a_trial_captures_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """With this file's recorder in place of a capture."""
    model = model_of("sdpa", 0.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, 1 << 34))
    monkeypatch.setattr(cuda_graphs, "Recorder", lambda _device: Repeated())
    assert cuda_graphs._obstacle(model) is None

    def stale(passes: Callable[[], Passes]) -> Recording:
        return Recording(lambda: None, passes())

    monkeypatch.setattr(cuda_graphs, "Recorder", lambda _device: stale)
    assert cuda_graphs._obstacle(model) == "a replayed product is wrong"

    def refused(_: object) -> Recording:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graphs, "Recorder", lambda _device: refused)
    assert cuda_graphs._obstacle(model).startswith("a first capture fails: operation not permitted")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 10, 1 << 34))
    assert cuda_graphs._obstacle(model).endswith("0 MiB are free")


# ---- inference ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_kernels")
@torch.inference_mode()
def test_replayed_inference_is_the_bits_of_plain_passes() -> None:
    """Our kernels and one product for q, k and v; batches of one size alternate."""
    model = model_of("fused", dropout_p=0.0).half().eval()
    prepack(model, JoinedLinear)
    recorder = Repeated()
    graphs = InferenceGraphs(model, recorder, most=2)
    for index in (0, 1, 2, 3, 0, 4):
        inputs = batch_of(BATCHES[index]).inputs
        expected = model(inputs["input_ids"], layout=inputs["layout"]).logits
        assert torch.equal(graphs(inputs), expected)
    assert recorder.count == 2
    copied = copy.deepcopy(graphs)
    assert torch.equal(copied(inputs), expected)
    assert copied.recordings.keys() == {Size.of(inputs["layout"], 100)}
    assert copied.model is not model


def test_a_trial_decides_on_graphs_for_inference() -> None:
    model = model_of("sdpa", dropout_p=0.0).eval()
    model.bert.layers[0].attention.attend = by_starts
    assert InferenceGraphs(model, Repeated()).obstacle() is None
    stale = InferenceGraphs(model, lambda passes: Recording(lambda: None, passes()))
    assert stale.obstacle() == "a replayed pass is wrong"

    def refused(_: object) -> Recording:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    assert InferenceGraphs(model, refused).obstacle() == (
        "a first capture fails: operation not permitted when stream is capturing"
    )


def test_what_graphs_for_inference_need() -> None:
    def reason(device: str, attention: str) -> str:
        bert = SimpleNamespace(layers=[encoder.EncoderLayer])
        model = SimpleNamespace(
            device=torch.device(device), attn_implementation=attention, bert=bert
        )
        chosen = cuda_graphs.choose_inference(model)
        assert chosen.value is None
        return chosen.reason

    assert reason("cpu", "fused") == "they need a CUDA device, not cpu"
    assert reason("cuda", "sdpa") == "they need fused attention, not sdpa"
    assert reason("cuda", "fused") == "they need prepacked layers, not plain ones"


def test_a_tagger_with_graphs_gives_the_same_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = encoder.Implementation(by_starts, encoder.add_norm)
    monkeypatch.setitem(encoder.IMPLEMENTATIONS, "sdpa", version)
    folder = small_checkpoint(tmp_path)
    tagger = Tagger.from_pretrained(folder, dtype="fp32", device="cpu", batch_tokens=20)
    assert tagger.graphs == Chosen(None, "they need a CUDA device, not cpu")
    sentences = [["who", "directed", "jaws"], ["a"], ["jaws"] * 9, ["b", "c"]] * 3
    expected = list(tagger.label(sentences))
    recorder = Repeated()
    tagger.graphs = Chosen(InferenceGraphs(tagger.model, recorder), "the test says so")
    found = list(tagger.label(sentences))
    assert [[x.name for x in row] for row in found] == [[x.name for x in row] for row in expected]
    assert recorder.count > 0


def test_train_py_uses_graphs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The loop with this file's recorder; the run does not resume without ``--graphs``."""
    monkeypatch.setattr(step, "choose", lambda requested, *_: Chosen(bool(requested), ""))
    recorder = Repeated()
    monkeypatch.setattr(step, "Recorder", lambda _device: recorder)
    version = encoder.Implementation(by_starts, encoder.add_norm)
    monkeypatch.setitem(encoder.IMPLEMENTATIONS, "sdpa", version)
    sentences = demo.generate()[0][:64]
    corpus, output = write_bio(tmp_path / "corpus.bio", sentences), tmp_path / "run"
    small = tiny_model(tmp_path / "small", sentences)
    command = ["--model", str(small), "--train", str(corpus), "--output", str(output)]
    command += ["--device", "cpu", "--dtype", "fp32", "--batch-size", "8", "--epochs", "4"]
    assert train.main([*command, "--graphs"]) == 0
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 32
    assert sum(losses[-8:]) < sum(losses[:8])
    assert 1 < recorder.count < len(losses)
    assert train.main([*command, "--resume"]) == 2
    assert "CUDA graphs was on and is not given" in capsys.readouterr().err


def test_the_gpu_benchmark_uses_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_models, "Recorder", lambda _device: Repeated())
    model = model_of("sdpa", dropout_p=0.1)
    model.bert.layers[0].attention.attend = by_starts
    trainer = gpu_models.graphs_trainer(model, torch.float32)
    assert "AdamW" in trainer.adamw or "fused CPU kernel" in trainer.adamw
    losses = [float(trainer.step(batch_of([16, 16]))) for _ in range(40)]
    assert losses[-1] < losses[0]
