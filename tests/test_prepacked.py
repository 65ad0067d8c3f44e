"""Prepacked layers give the results of plain ones."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from builders import no_bf16_kernel, no_kernels, small_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import minibert
from minibert import BertForTokenClassification, Tagger, cli, machine
from minibert.files import MinibertError
from minibert.model.encoder import EncoderLayer
from minibert.speed import linear as linear_layers
from minibert.speed import prepacked
from minibert.speed.cpu import build
from minibert.speed.cpu.panels import Bf16Panels, BytePanels, FloatPanels, HalfPanels, Panels
from minibert.speed.linear import BlockedLinear, ByteLinear, JoinedLinear
from minibert.speed.prepacked import PrepackedLayer, choose, prepack
from minibert.study.parity.ulps import max_abs
from minibert.text.batches import Example, packed, rounded
from tests.test_packing import MIXES, batch, model

CPU = torch.device("cpu")
KINDS = {
    "fp32": (torch.float32, BlockedLinear, False),
    "fp32 with AVX2": (torch.float32, BlockedLinear, True),  # another GELU
    "fp32 in panels": (torch.float32, FloatPanels, True),
    "bf16": (torch.bfloat16, BlockedLinear, False),
    "bf16 in panels": (torch.bfloat16, Bf16Panels, False),
    "fp16 weights": (torch.float32, HalfPanels, True),
    "joined": (torch.float32, JoinedLinear, False),  # on a GPU
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_the_error_is_within_twice_that_of_the_plain_layers(
    attn: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors are measured against float64, with the weights already rounded.

    The bound is over all mixes: the plain layers can be exact on a single token by accident.
    """
    dtype, linear, avx2 = KINDS[kind]
    monkeypatch.setattr(linear_layers, "AVX2", avx2)
    monkeypatch.setattr(prepacked, "AVX2", issubclass(linear, Panels))
    monkeypatch.setattr(prepacked, "AVX512_KERNELS", linear is Bf16Panels)
    if linear is Bf16Panels and no_bf16_kernel:
        pytest.skip(no_bf16_kernel)
    device = torch.device("cuda") if linear is JoinedLinear else CPU
    found = choose(device, dtype, may_round=linear is HalfPanels)
    if found.value is not linear:
        pytest.skip(found.reason)
    net, fast = model(attn, dtype), model(attn, dtype)
    if linear is HalfPanels:
        with torch.no_grad():
            for layer in net.bert.layers:
                for module in layer.modules():
                    if isinstance(module, nn.Linear):
                        module.weight.copy_(module.weight.half())
    exact = copy.deepcopy(net).double()
    prepack(fast, linear)
    assert all(isinstance(layer.qkv, linear) for layer in fast.bert.layers)
    truth, plain, ours, padded = [], [], [], []
    for lengths in [*MIXES.values(), [128, 128, 128, 5]]:
        padded_inputs, packed_inputs, mask = batch(lengths)
        with torch.no_grad():
            truth.append(exact(**packed_inputs).logits)
            plain.append(net(**packed_inputs).logits)
            ours.append(fast(**packed_inputs).logits)
            padded.append(fast(**padded_inputs).logits[mask])
    allowed = 2 * max_abs(torch.cat(plain), torch.cat(truth))
    assert max_abs(torch.cat(ours), torch.cat(truth)) <= allowed
    assert max_abs(torch.cat(padded), torch.cat(truth)) <= allowed


def test_attention_maps_are_those_of_the_plain_layers() -> None:
    _, inputs, _ = batch(MIXES["mixed"])
    net = model("eager", torch.float32)
    with torch.no_grad():
        expected = net(**inputs, output_attentions=True).attentions
        prepack(net)
        got = net(**inputs, output_attentions=True).attentions
    for maps, expected_maps in zip(got, expected, strict=True):
        assert all(max_abs(a, b) < 1e-5 for a, b in zip(maps, expected_maps, strict=True))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return small_checkpoint(tmp_path)


def test_a_tagger_is_prepacked_by_default(directory: Path, tmp_path: Path) -> None:
    fast = Tagger.from_pretrained(directory, dtype="fp32", device="cpu")
    plain = Tagger.from_pretrained(directory, dtype="fp32", device="cpu", prepack=False)
    assert all(isinstance(layer, PrepackedLayer) for layer in fast.model.bert.layers)
    assert all(isinstance(layer, EncoderLayer) for layer in plain.model.bert.layers)
    with minibert.trace(plain.model):
        plain("who directed jaws")
    with pytest.raises(ValueError, match="prepack=False"):
        fast.model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="cannot be trained"):
        fast.model.train()
    assert not fast.model.eval().training
    assert not fast.model(torch.tensor([[1, 2, 3]])).logits.requires_grad


def test_the_reason_for_plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "AVX2", False)
    assert choose(CPU, torch.float32).value is BlockedLinear
    assert "CPU" in choose(torch.device("mps"), torch.float16).reason
    assert not choose(torch.device("mps"), torch.float16).value
    assert not choose(CPU, torch.float64).value
    monkeypatch.setattr(prepacked, "BLOCKED", ("mkldnn::_gone",))
    assert choose(CPU, torch.float32).reason == f"torch {torch.__version__} has no mkldnn::_gone"


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "AVX2", True)
    monkeypatch.setattr(build, "obstacle", lambda: "no g++ on this machine: install it")
    why = "; the C++ kernels cannot run: no g++ on this machine: install it"
    found = choose(CPU, torch.float32, may_round=True)
    assert found.value is BlockedLinear
    assert found.reason == "oneDNN reads weights that are packed once" + why
    if (found := prepacked.choose_int8(CPU)).value:
        assert found.value is ByteLinear
        assert found.reason.endswith(why)
    monkeypatch.setattr(prepacked, "AVX512_KERNELS", True)
    if (found := choose(CPU, torch.bfloat16)).value:
        assert found.value is BlockedLinear
        assert found.reason.endswith(why)


@pytest.mark.parametrize(
    ("avx2", "avx512", "linear"),
    [(True, False, BytePanels), (False, True, BytePanels), (False, False, ByteLinear)],
)
def test_which_cpu_multiplies_int8_by_the_kernels(
    avx2: bool, avx512: bool, linear: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "obstacle", lambda: None)
    monkeypatch.setattr(prepacked, "AVX2", avx2)
    monkeypatch.setattr(prepacked, "AVX512_KERNELS", avx512)
    found = prepacked.choose_int8(CPU)
    if not found.value:
        pytest.skip(found.reason)
    assert found.value is linear


def test_amx_is_left_to_onednn() -> None:
    flags = frozenset(build.AVX512)
    assert prepacked.avx512_kernels(flags)
    assert not prepacked.avx512_kernels(flags | {"amx_int8"})
    assert not prepacked.avx512_kernels(flags - {"avx512_bf16"})


def as_with_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the CPU has AVX2 and no more."""
    if no_kernels:
        pytest.skip(no_kernels)
    monkeypatch.setattr(machine, "cpu_flags", frozenset)
    monkeypatch.setattr(prepacked, "AVX2", True)
    monkeypatch.setattr(prepacked, "AVX512_KERNELS", False)


def test_weights_are_rounded_only_with_avx2_and_dtype_auto(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kind(dtype: str) -> type:
        tagger = Tagger.from_pretrained(directory, dtype=dtype, device="cpu")
        return type(tagger.model.bert.layers[0].qkv)

    monkeypatch.setattr(machine, "cpu_flags", frozenset)
    monkeypatch.setattr(prepacked, "AVX2", False)
    assert kind("auto") is BlockedLinear
    as_with_avx2(monkeypatch)
    assert kind("auto") is HalfPanels
    assert kind("fp32") is FloatPanels


def test_tag_reports_its_configuration_on_a_terminal(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def said(*options: str) -> str:
        assert cli.main(["tag", str(directory), "who", "--device", "cpu", *options]) == 0
        return capsys.readouterr().err

    assert said() == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert (
        said("--dtype", "fp32", "--plain") == "minibert: cpu, fp32, attention sdpa, plain layers\n"
    )
    with monkeypatch.context() as patch:
        patch.setattr(prepacked, "AVX2", False)
        assert said("--dtype", "fp32").endswith("weights packed for oneDNN\n")
    as_with_avx2(monkeypatch)
    assert said("--dtype", "fp32").endswith("weights in panels for the C++ kernels\n")
    assert said().endswith("weights rounded to fp16, in panels for the C++ kernels\n")


def test_a_weight_too_large_for_fp16_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_with_avx2(monkeypatch)
    HalfPanels(torch.full((3, 2), -65504.0), torch.zeros(3))
    net = BertForTokenClassification.from_pretrained(directory)
    with torch.no_grad():
        net.bert.layers[1].feed_forward.up.weight[3, 4] = -1e5
    net.save_pretrained(directory)
    with pytest.raises(MinibertError) as refused:
        Tagger.from_pretrained(directory, device="cpu")
    assert str(refused.value) == (
        f"{directory}: a weight of 100000 is too large for fp16: use it with --dtype fp32"
    )
    Tagger.from_pretrained(directory, device="cpu", dtype="fp32")
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    with pytest.raises(MinibertError, match="do not match the hash"):  # a damaged file comes first
        Tagger.from_pretrained(directory, device="cpu")


@pytest.mark.parametrize("dtype", ["fp32", "auto", "int8"])
def test_a_model_prepacked_while_it_is_loaded_has_the_same_bits(tmp_path: Path, dtype: str) -> None:
    """Here layer 10 comes after layer 1, and each layer is split over two files."""
    directory = small_checkpoint(tmp_path, num_hidden_layers=11)
    tagger = Tagger.from_pretrained(directory, dtype=dtype, device="cpu")
    whole = directory / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    parts = {f"{i}.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
    for file, part in parts.items():
        save_file(part, directory / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    split = Tagger.from_pretrained(directory, dtype=dtype, device="cpu")
    net = BertForTokenClassification.from_pretrained(
        directory, attn_implementation="auto", dtype=tagger.model.dtype
    )
    if not isinstance(tagger.model.bert.layers[0], EncoderLayer):
        prepack(net, type(tagger.model.bert.layers[0].qkv))
    _, inputs, _ = batch(MIXES["mixed"])
    with torch.no_grad():
        expected = net(**inputs).logits
        assert torch.equal(tagger.model(**inputs).logits, expected)
        assert torch.equal(split.model(**inputs).logits, expected)
    assert [name for name, _ in tagger.model.named_modules()] == [n for n, _ in net.named_modules()]


@given(st.integers(1, 100_000))
def test_a_rounded_number_is_little_larger(tokens: int) -> None:
    assert tokens <= rounded(tokens) < tokens + max(3, tokens * 3 / 32)
    assert rounded(rounded(tokens)) == rounded(tokens)


def test_there_are_few_rounded_numbers() -> None:
    assert len({rounded(tokens) for tokens in range(1, 2049)}) == 77


@settings(max_examples=25)
@given(st.lists(st.integers(3, 40), min_size=1, max_size=15))
def test_filler_changes_no_result(lengths: list[int]) -> None:
    examples = [
        Example(tuple(range(1, n + 1)), (1,), sentence=i, first_word=0, labels=(2,))
        for i, n in enumerate(lengths)
    ]
    net = model("sdpa", torch.float64)
    tight, filled = packed(examples), packed(examples, filler=7)
    layout = filled.inputs["layout"]
    assert sum(layout.lengths) == rounded(sum(lengths))
    assert max(layout.lengths) == max(lengths)
    assert (filled.examples, filled.tokens) == (tight.examples, tight.tokens)
    with torch.no_grad():
        expected, got = net(**tight.inputs), net(**filled.inputs)
    assert max_abs(got.logits[filled.first_W], expected.logits[tight.first_W]) < 1e-10
    assert abs(got.loss - expected.loss) < 1e-10


@pytest.mark.parametrize("layout", [["--padded"], ["--layout", "padded"], ["--packed"], []])
@pytest.mark.parametrize("plain", [["--plain"], []])
def test_layout_and_layers_are_chosen_apart(
    directory: Path, layout: list[str], plain: list[str]
) -> None:
    options = cli._parser()[0].parse_args(["tag", str(directory), "who", *layout, *plain])
    tagger = cli._tagger(options)
    assert tagger.pack == ("padded" not in "".join(layout))
    prepacks = prepacked.choose(tagger.model.device, tagger.model.dtype, may_round=True).value
    is_plain = [isinstance(layer, EncoderLayer) for layer in tagger.model.bert.layers]
    assert all(is_plain) if plain or not prepacks else not any(is_plain)
