"""Products in int8 are exact in integers, and int8 runs only where it is requested."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from builders import no_kernels, small_checkpoint, write_bio
from torch import Tensor

from minibert import BertForTokenClassification, Embedder, Label, Tagger, evaluate
from minibert.files import MinibertError
from minibert.speed import prepacked
from minibert.speed.cpu.panels import BytePanels
from minibert.speed.linear import ByteLinear
from minibert.speed.prepacked import choose_int8
from minibert.tagging.evaluate import difference
from minibert.text.bio import Sentence

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not choose_int8(CPU).value, reason=choose_int8(CPU).reason)

MOST_X, MOST_W = 127, 64  # of the integers


Product = Callable[..., Tensor]


@pytest.fixture(params=[ByteLinear, BytePanels])
def linear(request: pytest.FixtureRequest) -> type:
    if request.param is BytePanels and no_kernels:
        pytest.skip(no_kernels)
    return request.param


@pytest.fixture
def product(linear: type) -> Product:
    """x (N, I), W (O, I) and b (O,), or none, to x Wᵀ + b.

    Torch's libraries share few rows and many among them, and must give the same bits.
    """

    def product(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        bias_O = torch.zeros(len(weight_OI)) if bias_O is None else bias_O
        layer = linear(weight_OI, bias_O)
        few_NI = x_NI[: ByteLinear.many - 1]
        with torch.inference_mode():
            few_NO = layer(few_NI)
            many_NO = layer(torch.cat([x_NI, few_NI.new_zeros(ByteLinear.many, x_NI.shape[1])]))
        finite = few_NO.isfinite()
        assert torch.equal(finite, many_NO[: len(few_NO)].isfinite())
        assert torch.equal(few_NO[finite], many_NO[: len(few_NO)][finite])
        return many_NO[: len(x_NI)]

    return product


@pytest.mark.parametrize(
    ("rows", "inner", "outer"),
    [
        (1, 1, 1),
        (2, 5, 3),
        (13, 36, 50),
        (7, 384, 1153),
        (25, 3072, 96),
        (300, 3072, 50),
        (517, 5, 3),
    ],
)
def test_products_are_those_of_int64(rows: int, inner: int, outer: int, product: Product) -> None:
    """The integers fill their range, so that scales are powers of two and x and W are not rounded.

    Only the conversion of the sum to float32 is.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(-MOST_X, MOST_X + 1, (rows, inner), generator=draw)
    x[:, 0] = torch.tensor([MOST_X, -MOST_X]).repeat(rows)[:rows]
    weight = torch.randint(-MOST_W, MOST_W + 1, (outer, inner), generator=draw)
    weight[:, -1] = MOST_W
    scale_N1 = 2.0 ** torch.randint(-20, 20, (rows, 1), generator=draw)
    scale_O1 = 2.0 ** torch.randint(-20, 20, (outer, 1), generator=draw)
    got = product(x * scale_N1, weight * scale_O1)
    assert torch.equal(got, (x @ weight.T).float() * scale_N1 * scale_O1.T)


@pytest.mark.parametrize("x_sign", [1, -1])
@pytest.mark.parametrize("sign", [1, -1])
def test_nothing_saturates_at_the_limits(sign: int, x_sign: int, product: Product) -> None:
    """AVX2 adds two products in 16 bits."""
    x = torch.full((13, 3072), x_sign * MOST_X)
    weight = torch.full((96, 3072), sign * MOST_W)
    for signs in ([1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1]):
        mixed = weight * torch.tensor(signs).repeat(768)
        assert torch.equal(product(x.float(), mixed.float()), (x @ mixed.T).float())
    swung = x * torch.tensor([1, 1, -1, -1]).repeat(768)
    assert torch.equal(product(swung.float(), mixed.float()), (swung @ mixed.T).float())


def test_halves_are_rounded_to_even(product: Product) -> None:
    """With a scale of 1, half of the values lie between integers."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(-2 * MOST_X, 2 * MOST_X + 1, (13, 384), generator=draw) / 2
    x[:, 0] = MOST_X
    weight = torch.randint(-MOST_W, MOST_W + 1, (96, 384), generator=draw)
    weight[:, 0] = MOST_W
    expected = (x.round().long() @ weight.T).float()
    assert torch.equal(product(x, weight.float()), expected)


def test_rounding_is_at_most_half_a_step(product: Product) -> None:
    """The bound adds up what rounding x and W may change in every term."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(50, 384), torch.randn(96, 384) / 20, torch.randn(96)
    exact = x.double() @ weight.double().T + bias
    step_N1 = x.abs().amax(1, keepdim=True).double() / MOST_X
    step_O1 = weight.abs().amax(1, keepdim=True).double() / MOST_W
    rounded_x = x.abs().double() + step_N1 / 2
    bound = step_N1 / 2 @ weight.abs().double().sum(1, keepdim=True).T
    bound += rounded_x.sum(1, keepdim=True) @ step_O1.T / 2
    assert bool(((product(x, weight, bias) - exact).abs() <= bound + 1e-4).all())


def test_a_row_keeps_its_values_to_itself(product: Product) -> None:
    """Zeros, constants, denormals, outliers and what is not finite, beside ordinary rows."""
    torch.manual_seed(0)
    weight, bias = torch.randn(96, 384) / 20, torch.randn(96)
    x = torch.randn(12, 384)
    alone = product(x, weight, bias)
    tiny = torch.finfo(torch.float32).smallest_normal
    x[0] = 0
    x[1] = 2.5
    x[2] = tiny / 1024
    x[3] = -(2.0**-149)
    x[4, 7] = 1e30
    x[5, 7] = torch.inf
    x[6, 7] = torch.nan
    x[7, 7] = -torch.inf
    got = product(x, weight, bias)
    assert torch.equal(got[8:], alone[8:])
    assert torch.equal(got[0], bias)
    step_O = weight.abs().amax(1) / MOST_W
    assert bool(((got[1] - 2.5 * weight.sum(1) - bias).abs() <= 2.5 * 384 * step_O / 2).all())
    assert torch.equal(got[2], bias)
    assert torch.equal(got[3], bias)
    assert bool(((got[4] / 1e30 - weight[:, 7]).abs() <= step_O / 2 + 1e-6).all())
    assert not got[5:8].isfinite().any()


def test_weights_of_zero_or_not_finite(product: Product) -> None:
    weight = torch.ones(4, 8)
    weight[0] = 0
    weight[1] = 2.0**-149
    weight[2, 3] = torch.nan
    weight[3, 3] = torch.inf
    got = product(torch.ones(2, 8), weight, torch.ones(4))
    assert torch.equal(got[:, :2], torch.ones(2, 2))
    assert not got[:, 2:].isfinite().any()


def test_an_empty_batch(product: Product) -> None:
    assert product(torch.empty(0, 36), torch.randn(50, 36)).shape == (0, 50)


def test_a_copy_has_the_same_bits(linear: type) -> None:
    torch.manual_seed(0)
    x = torch.randn(13, 36)
    for _ in range(50):
        layer = linear(torch.randn(50, 36) * torch.rand(50, 1), torch.randn(50))
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), layer(x))


def test_packing_leaves_the_engine_as_it_is() -> None:
    before = torch.backends.quantized.engine
    ByteLinear(torch.randn(3, 2), torch.zeros(3))
    assert torch.backends.quantized.engine == before


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("model"))


def test_int8_is_an_option(directory: Path, command: Callable) -> None:
    def kind(dtype: str) -> type:
        return type(
            Tagger.from_pretrained(directory, dtype=dtype, device="cpu").model.bert.layers[0].qkv
        )

    assert kind("int8") is choose_int8(CPU).value
    assert kind("auto") not in (ByteLinear, BytePanels)
    assert (
        len(Embedder.from_pretrained(directory, dtype="int8", device="cpu", max_length=16)("jaws"))
        == 36
    )
    for name in ("tag", "embed"):
        options = ["--max-length", "16"] if name == "embed" else []
        status, out, error = command(
            name, directory, "jaws", "--dtype", "int8", "--device", "cpu", *options
        )
        assert (status, error) == (0, "")
        assert out


def test_where_int8_cannot_run(
    directory: Path, command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, _, error = command(
        "tag", directory, "jaws", "--dtype", "int8", "--device", "cpu", "--plain"
    )
    assert status == 2
    assert error == (
        "minibert: dtype int8: only prepacked layers have it: leave out --plain or prepack=False\n"
    )
    assert choose_int8(torch.device("cuda")).reason == "int8 runs on a CPU, not on cuda"
    for instructions in ("AVX2", "AVX512_KERNELS"):
        monkeypatch.setattr(prepacked, instructions, False)
    monkeypatch.setattr(prepacked, "BYTE", ("quantized::gone",))
    with pytest.raises(MinibertError) as refused:
        Tagger.from_pretrained(directory, dtype="int8", device="cpu")
    assert str(refused.value) == (
        f"dtype int8: torch {torch.__version__} has no quantized::gone: use --dtype auto"
    )


def test_texts_without_a_word(directory: Path) -> None:
    tagger = Tagger.from_pretrained(directory, dtype="int8", device="cpu")
    assert tagger([]) == []
    assert tagger(["", " "]) == [[], []]
    assert tagger("") == []


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_weight_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    model = BertForTokenClassification.from_pretrained(small_checkpoint(tmp_path))
    model.bert.layers[0].feed_forward.up.weight.data[3, 5] = value
    model.save_pretrained(tmp_path)
    tagger = Tagger.from_pretrained(tmp_path, dtype="int8", device="cpu")
    with pytest.raises(MinibertError, match="scores are not finite for 'who directed jaws'"):
        tagger("who directed jaws")


def test_scores_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tagger = Tagger.from_pretrained(small_checkpoint(tmp_path), dtype="int8", device="cpu")
    _, piece, _ = tagger.tokenizer.encode("b")
    tagger.model.bert.embeddings.word.weight.data[piece] = torch.inf
    list(tagger.tag_texts(["a a", "a"]))
    with pytest.raises(MinibertError, match="scores are not finite for 'a b': its weights"):
        list(tagger.tag_texts(["a", "a b", "a a a"]))
    in_windows = "a " * tagger.model.config.max_length + "b"
    with pytest.raises(MinibertError, match="scores are not finite for 'a a a a"):
        list(tagger.tag_texts(["a", in_windows]))


def test_evaluate_compares_two_dtypes(directory: Path, tmp_path: Path, command: Callable) -> None:
    words = [("who", "directed", "jaws"), ("jaws",), ("a", "film", "by", "me")] * 5
    labels = list(Tagger.from_pretrained(directory, dtype="fp32", device="cpu").label(words))
    tags = [tuple(label.name for label in found) for found in labels]
    path = write_bio(tmp_path / "test.bio", list(map(Sentence, words, tags)))
    options = ("--device", "cpu", "--compare", "int8")
    status, out, error = command("evaluate", directory, path, *options)
    assert (status, error) == (0, "")
    assert "int8 against fp32: " in out.splitlines()[-1]
    found = json.loads(command("evaluate", directory, path, *options, "--json")[1])
    compared = found["compare"]
    right = sum(row[true] for true, row in found["confusion"].items())
    assert (compared["reference"], compared["compared"]) == ("fp32", "int8")
    assert compared["words"] == right == 40
    assert compared["entity_f1_reference"] == found["entity_f1"] == 1.0
    itself = command("evaluate", directory, path, *options, "--dtype", "int8", "--json")[1]
    assert json.loads(itself)["compare"]["different"] == 0


def test_differing_labels_are_counted() -> None:
    sentences = [Sentence(("a", "b"), ("B-X", "O")), Sentence(("c",), ("O",))]

    class Fixed:
        labels = ("O", "B-X", "I-X")

        def __init__(self, names: list[list[str]]):
            self.names = names

        def label(self, sentences: object) -> Iterator[list[Label]]:
            return iter([[Label(name, 1.0) for name in sentence] for sentence in self.names])

    first = evaluate(Fixed([["B-X", "O"], ["O"]]), sentences, "file")
    second = evaluate(Fixed([["O", "O"], ["B-X"]]), sentences, "file")
    found = difference("fp32", first, "int8", second)
    assert str(found) == (
        "int8 against fp32: 2 of 3 labels differ (66.67%), entity F1 0.00% against 100.00%"
    )
