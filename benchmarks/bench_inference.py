"""Inference on the test set: real tokens a second (padding not counted)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from benchmarks import peers, stage
from benchmarks.peers import Predict
from benchmarks.stage import Place, Plan, Run
from minibert.tagging.tagger import Tagger
from minibert.text.batches import Batch, Example
from minibert.text.batches import packed as pack
from minibert.text.batches import padded as pad

INFERENCE, TURNS, WARM_UP = True, 5, 1
SUBJECTS = (
    "ceiling fp32",
    "ceiling bf16",
    "ceiling fp16w",
    "minibert fp32, packed",
    "minibert bf16, packed",
    "minibert fp16w, packed",
    "transformers sdpa fp32, padded to 128",
    "transformers eager fp32, padded to longest",
    "transformers sdpa fp32, padded to longest",
    "transformers sdpa fp32, sorted by length",
    "transformers sdpa bf16, padded to longest",
    "transformers sdpa bf16, sorted by length",
    f"transformers compiled {stage.NATIVE}, sorted by length",
    "onnxruntime fp32, padded to longest",
    "onnxruntime fp32, sorted by length",
    "onnxruntime int8, padded to longest",
    "onnxruntime int8, sorted by length",
    "OpenVINO fp32, padded to longest",
    "OpenVINO fp32, sorted by length",
    "OpenVINO bf16, padded to longest",
    "OpenVINO bf16, sorted by length",
)
# How far the logits may lie from ours in fp32, as a share of the largest; int8 is another model.
NEAR = {"fp32": 1e-4, "fp16w": 1e-2, "bf16": 0.1, "int8": 1.0}


def subjects(plan: Plan) -> Sequence[str]:
    return SUBJECTS


def test_inference(found: dict) -> None:
    assert found["tokens"] > 0


def build(subject: str, place: Place) -> Run:
    plan, name = place.plan, place.plan_name
    kind, _, layout = subject.partition(", ")
    dtype = kind.split()[-1]
    examples = stage.test_examples(name)
    tokens = stage.tokens_of(examples)
    if kind.startswith("ceiling"):
        run = stage.prepacked_products(name, dtype, plan.tokens)
        return lambda: run() or {"tokens": plan.tokens}
    if kind.startswith("minibert"):
        # As the Tagger does it: prepacked, sorted by length over the whole pool, 2048 tokens to a
        # batch.
        model = stage.answering(name, dtype)
        batches = list(Tagger(model, stage.tokenizer())._batches(examples))
        assert _apart(model(**batches[0].inputs).logits, batches[0], name) <= NEAR[dtype]

        def packed() -> dict:
            for batch in batches:
                model(**batch.inputs)
            return {"tokens": tokens}

        return packed
    model = stage.in_dtype(stage.theirs, name, "fp32" if dtype == "int8" else dtype)
    if layout == "padded to 128":
        examples = examples[: max(stage.BATCH, len(examples) // 8)]  # a tenth as fast
        tokens = stage.tokens_of(examples)
    if layout == "sorted by length":
        examples = stage.by_length(examples)
    predict = predictor(kind, model if "OpenVINO" not in kind else stage.theirs(name), place)
    batches = stage.padded(examples, 128 if layout == "padded to 128" else None)
    first = pad(examples[: stage.BATCH], 0, batches[0].input_ids.shape[1])
    apart = _apart(predict(batches[0]).flatten(0, 1), first, name)
    assert apart <= NEAR[dtype], f"{subject}: the logits are {apart} apart"

    def padded() -> dict:
        for batch in batches:
            predict(batch)
        return {"tokens": tokens, "apart": apart}

    return padded


def predictor(kind: str, model: nn.Module, place: Place) -> Predict:
    if kind.startswith("transformers compiled"):
        if not place.plan.long:
            raise peers.MissingError("compiling takes a minute: it is part of make bench-full")
        return peers.compiled(model)
    if kind.startswith("transformers eager"):
        return peers.eager(model)
    if kind.startswith("onnxruntime"):
        return peers.onnxruntime_model(model, place.folder, kind.endswith("int8"))
    if kind.startswith("OpenVINO"):
        return peers.openvino_model(model, place.folder, "bf16" if "bf16" in kind else "f32")
    return peers.torch_model(model)


def _apart(logits_NL: Tensor, batch: Batch, plan_name: str) -> float:
    """Largest difference from our float32 logits at the words' first pieces, relatively."""
    examples: tuple[Example, ...] = batch.examples
    mine = pack(examples)
    assert [e.ids for e in mine.examples] == [e.ids for e in stage.by_length(examples)]
    exact_NL = stage.ours(plan_name)(**mine.inputs).logits
    exact = {id(e): part for e, part in zip(mine.examples, _words(exact_NL, mine))}
    found = zip(examples, _words(logits_NL.float(), batch))
    apart = max(float((part - exact[id(e)]).abs().max()) for e, part in found)
    return apart / float(exact_NL.abs().max())


def _words(logits_NL: Tensor, batch: Batch) -> list[Tensor]:
    counts = [len(example.firsts) for example in batch.examples]
    return list(logits_NL[batch.first_W].split(counts))
