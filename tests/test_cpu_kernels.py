"""The C++ kernels for CPUs: against float64, against oneDNN, and how they are built."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders import no_bf16_kernel, no_kernels, small_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minibert import Tagger
from minibert.files import home
from minibert.speed import prepacked
from minibert.speed.cpu import build, panels
from minibert.speed.cpu.panels import Bf16Panels, BytePanels, FloatPanels, HalfPanels
from minibert.speed.linear import AVX2, BlockedLinear

needs_kernels = pytest.mark.skipif(bool(no_kernels), reason=no_kernels)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max())


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 120), st.integers(1, 1100), st.integers(1, 50), st.integers(0, 2**31))
def test_products_are_as_near_to_the_truth_as_those_of_torch(
    rows: int, inputs: int, outputs: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*shape, generator=draw)
        for shape in ((rows, inputs), (outputs, inputs), (outputs,))
    )
    # Twice the bound of a sum in any order, which holds for torch too (Higham 2002, equation 3.5).
    bound = (x.abs().double() @ weight.abs().double().T) * inputs * 2.0**-23 + 1e-6
    layer = FloatPanels(weight, bias)
    exact = x.double() @ weight.double().T + bias
    assert ((layer(x) - exact).abs() <= bound).all()
    assert ((layer.gelu(x) - F.gelu(exact)).abs() <= 1.2 * bound + 1e-6).all()
    assert torch.equal(HalfPanels(weight, bias)(x), FloatPanels(weight.half().float(), bias)(x))


@pytest.mark.skipif(bool(no_bf16_kernel), reason=no_bf16_kernel)
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 120), st.integers(1, 1100), st.integers(1, 50), st.integers(0, 2**31))
def test_products_in_bf16_are_sums_in_fp32_rounded_once(
    rows: int, inputs: int, outputs: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*shape, generator=draw).bfloat16()
        for shape in ((rows, inputs), (outputs, inputs), (outputs,))
    )
    exact = x.double() @ weight.double().T + bias
    magnitudes = x.abs().double() @ weight.abs().double().T + bias.abs()
    error = magnitudes * (inputs + 1) * 2.0**-23  # of the sum (Higham 2002, equation 3.5), doubled
    layer = Bf16Panels(weight, bias)
    residual = torch.randn(rows, outputs, generator=draw).bfloat16()
    found, gelu, plus = layer(x), layer.gelu(x), layer.plus(x, residual)
    assert found.dtype == gelu.dtype == torch.bfloat16
    assert ((found - exact).abs() <= error + exact.abs() * 2.0**-8).all()
    exact += residual
    assert ((plus - exact).abs() <= error + exact.abs() * 2.0**-8 + residual.abs() * 2.0**-23).all()
    true_gelu = F.gelu(exact - residual)
    assert ((gelu - true_gelu).abs() <= 1.2 * error + true_gelu.abs() * 2.0**-8 + 1e-6).all()


@needs_kernels
@pytest.mark.skipif(
    not AVX2 or not torch.__version__.startswith("2.13."),
    reason="seen with AVX2 alone and torch 2.13; another oneDNN may sum up in another order",
)
@pytest.mark.parametrize("shape", [(768, 768), (768, 3072), (100, 77), (5, 384), (20, 2500)])
@pytest.mark.parametrize("rows", [1, 5, 6, 12, 97, 500])
@torch.inference_mode()
def test_fp32_has_the_bits_of_onednn(rows: int, shape: tuple[int, int], threads: None) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(shape) / 20, torch.randn(shape[0]), torch.randn(rows, shape[1])
    assert torch.equal(FloatPanels(weight, bias)(x), BlockedLinear(weight, bias)(x))


@needs_kernels
def test_gelu_keeps_its_digits_in_the_tail() -> None:
    """There 1 + erf(x / sqrt(2)), which torch computes, has lost them."""
    layer = FloatPanels(torch.ones(1, 1), torch.zeros(1))
    x_N1 = torch.linspace(-13, 13, 100_001)[:, None]
    exact = x_N1.double() * torch.special.erfc(-x_N1.double() / 2**0.5) / 2
    relative = (layer.gelu(x_N1).double() - exact).abs() / exact.abs().clamp_min(1e-37)
    assert float(relative[x_N1 >= 0].max()) < 8 * 2.0**-24  # rounded in every step
    # Where y = x^2 / 2 is rounded, exp(-y) is off by y * 2^-24, and y is at most 84.5.
    assert float(relative.max()) < 100 * 2.0**-24
    extremes = torch.tensor([[0.0], [-0.0], [1e30], [-1e30], [torch.inf], [torch.nan]])
    found = layer.gelu(extremes)
    assert torch.equal(found[:5], torch.tensor([[0.0], [0.0], [1e30], [0.0], [torch.inf]]))
    assert found[5].isnan()


@needs_kernels
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=8),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 8, 26, 32, 64]),
    st.integers(0, 2**31),
)
def test_attention_is_within_the_bound_of_its_sums(
    lengths: list[int], H: int, K: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    qkv_N3HK = 2 * torch.randn(sum(lengths), 3, H, K, generator=draw)
    found_ND = panels.attend(qkv_N3HK, starts)
    unit = 2.0**-24
    for part_S3HK, found_SD in zip(qkv_N3HK.split(lengths), found_ND.split(lengths)):
        q, k, v = part_S3HK.double().permute(1, 2, 0, 3)
        weights = (q @ k.mT * K**-0.5).softmax(-1)
        exact = weights @ v
        # A sum of n products is off by n units of the sum of their magnitudes (Higham 2002,
        # equation 3.5), a weight by twice what the scores are, the context by both.
        score_error = (q.abs() @ k.abs().mT).amax(-1, keepdim=True) * K**-0.5 * (K + 3) * unit
        bound = (2 * score_error + (len(part_S3HK) + 8) * unit) * (weights @ v.abs())
        found = found_SD.view(-1, H, K).transpose(0, 1)
        assert ((found - exact).abs() <= bound).all()
        alone = panels.attend(part_S3HK.contiguous(), torch.tensor([0, len(part_S3HK)]).int())
        assert torch.equal(alone, found_SD)


@needs_kernels
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 100.0, 1e18])
def test_attention_at_the_limits(scale: float) -> None:
    """Scores that are equal, or so far apart that all weights but one are zero."""
    torch.manual_seed(0)
    qkv_N3HK = torch.randn(17, 3, 2, 8)
    qkv_N3HK[:, :2] *= scale
    found = panels.attend(qkv_N3HK, torch.tensor([0, 17], dtype=torch.int32))
    q, k, v = qkv_N3HK.double().permute(1, 2, 0, 3)
    exact = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
    assert error(found, exact) < 1e-5


@needs_kernels
def test_what_is_not_finite_stays_in_its_sentence() -> None:
    torch.manual_seed(0)
    qkv_N3HK, starts = torch.randn(30, 3, 2, 26), torch.tensor([0, 7, 30], dtype=torch.int32)
    before = panels.attend(qkv_N3HK, starts)
    for number in (torch.nan, torch.inf):
        for part in range(3):
            broken = qkv_N3HK.clone()
            broken[3, part] = number
            found = panels.attend(broken, starts)
            assert torch.equal(found[7:], before[7:])
            assert not found[3].isfinite().any()


@needs_kernels
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 800), st.floats(0.01, 100), st.integers(0, 2**31))
def test_add_norm_is_as_near_to_the_truth_as_layer_norm(
    rows: int, width: int, offset: float, seed: int
) -> None:
    torch.manual_seed(seed)
    norm, none = nn.LayerNorm(width, eps=1e-12), nn.Dropout(0.0)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    y, x = torch.randn(rows, width), torch.randn(rows, width) + offset
    with torch.no_grad():
        found = panels.add_norm(y, x, norm, none)
        theirs = norm(y + x)
        exact = norm.double()((y + x).double())
    assert error(found, exact) <= 3 * error(theirs, exact) + 1e-5


@needs_kernels
def test_a_tagger_runs_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which, is counted in the table that every call goes through."""
    monkeypatch.setattr(prepacked, "AVX2", True)
    calls: list[str] = []

    def counted(name: str):
        function = build.kernels()[name]
        return lambda *arguments: calls.append(name) or function(*arguments)

    counting = {name: counted(name) for name in build.kernels()}
    monkeypatch.setattr(panels, "kernels", lambda: counting)
    directory = small_checkpoint(tmp_path, num_hidden_layers=2)
    for dtype, product in (("fp32", "multiply_fp32"), ("int8", "multiply_int8")):
        Tagger.from_pretrained(directory, dtype=dtype, device="cpu")("who directed jaws")
        layer = [product, "attend", product, "add_norm", product, product, "add_norm"]
        assert calls == [*layer, *layer, "multiply_fp32"]  # the last is the classifier
        calls.clear()
    if not no_bf16_kernel:
        monkeypatch.setattr(prepacked, "AVX512_KERNELS", True)
        Tagger.from_pretrained(directory, dtype="bf16", device="cpu")("who directed jaws")
        assert calls == ["multiply_bf16"] * 9


@needs_kernels
@pytest.mark.parametrize("before", ["", "import sklearn.metrics; "])
def test_the_threads_are_those_of_torch(before: str) -> None:
    """scikit-learn loads another OpenMP library."""
    program = (
        before + "import ctypes, torch; from minibert.speed.cpu import build; build.kernels();"
        "torch.set_num_threads(3); library = ctypes.CDLL(build.openmp_of_torch());"
        "print(library.omp_get_max_threads(), torch.get_num_threads())"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "3 3\n"


@needs_kernels
@pytest.mark.parametrize("outputs", [1, 15, 16, 17])
def test_nothing_is_written_beside_a_result(outputs: int) -> None:
    """And not into what is read."""
    torch.manual_seed(0)
    N, D, K = 7, 9, 5
    x, weight, bias = torch.randn(N, D), torch.randn(outputs, D), torch.randn(outputs)
    qkv = torch.randn(N, 3, outputs, K)
    starts, gamma = torch.tensor([0, 3, 7], dtype=torch.int32), torch.randn(outputs)
    y = torch.randn(N, outputs)
    layers = [kind(weight, bias) for kind in (FloatPanels, HalfPanels, BytePanels)]
    if not no_bf16_kernel:
        layers.append(Bf16Panels(weight.bfloat16(), bias.bfloat16()))
    inputs = [
        x,
        qkv,
        starts,
        gamma,
        y,
        *(t for f in layers for t in (f.panels, f.bias_O, *f.extra)),
    ]
    before = [tensor.clone() for tensor in inputs]

    def check(size: int, name: str, *arguments: float, dtype: torch.dtype = torch.float32) -> None:
        room = torch.full((size + 64,), 7.0, dtype=dtype)
        arguments = tuple(room[32:].data_ptr() if a is None else a for a in arguments)
        panels.run(name, *arguments)
        assert (room[:32] == 7).all()
        assert (room[32 + size :] == 7).all()
        assert not (room[32 : 32 + size] == 7).any()

    for f in layers:
        read = F.pad(x.to(f.dtype), [0, -D % f.multiple])
        place = (read.data_ptr(), *read.shape, f.panels.data_ptr(), f.bias_O.data_ptr())
        no_residual = [0] * isinstance(f, Bf16Panels)
        extra = [*(tensor.data_ptr() for tensor in f.extra), *no_residual]
        check(N * outputs, f.kernel, *place, 1, outputs, None, *extra, dtype=f.dtype)
    scale = K**-0.5
    check(N * outputs * K, "attend", qkv.data_ptr(), starts.data_ptr(), 2, outputs, K, scale, None)
    weights = (gamma.data_ptr(), gamma.data_ptr())
    check(N * outputs, "add_norm", y.data_ptr(), y.data_ptr(), *weights, 1.0, N, outputs, None)
    assert all(map(torch.equal, inputs, before))


@needs_kernels
def test_what_the_kernels_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = FloatPanels(torch.randn(20, 30), torch.randn(20))
    for x in (torch.randn(2, 30).double(), torch.randn(2, 30).bfloat16()):
        with pytest.raises(TypeError, match="read contiguous float32 on the CPU, not torch"):
            layer(x)
    with pytest.raises(ValueError, match="x has 29 columns, the weight 30"):
        layer(torch.randn(2, 29))
    with pytest.raises(TypeError):
        BytePanels(torch.randn(20, 30).double(), torch.randn(20).double())
    assert torch.equal(layer(torch.eye(30).T[:, ::3].T), layer(torch.eye(30)[::3]))
    monkeypatch.setattr(panels, "kernels", lambda: {layer.kernel: lambda *_: 1})
    with pytest.raises(MemoryError):
        layer(torch.randn(2, 30))


@needs_kernels
def test_the_library_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that another process left is loaded; one that cannot be loaded is compiled again."""
    build.kernels()
    (library,) = (home() / "kernels").glob("cpu-*.so")

    def obstacle(content: bytes | None, path: str = "/nowhere") -> str | None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))  # the loader knows old paths
        monkeypatch.setenv("MINIBERT_HOME", str(folder))
        monkeypatch.setenv("PATH", path)
        (folder / "kernels").mkdir(parents=True)
        if content is not None:
            (folder / "kernels" / library.name).write_bytes(content)
        build.kernels.cache_clear()
        build.obstacle.cache_clear()
        return build.obstacle()

    with_compiler, no_compiler = os.environ["PATH"], "no g++ on this machine: install it"
    assert obstacle(None) == no_compiler
    assert obstacle(b"no library") == no_compiler
    assert obstacle(library.read_bytes()) is None
    assert obstacle(b"no library", with_compiler) is None


@needs_kernels
def test_what_the_compiler_says(tmp_path: Path) -> None:
    source = tmp_path / "kernels.cpp"
    source.write_text("int f() { return x; }\n")
    with pytest.raises(build.BuildError) as refused:
        build.compile_source(source, build.openmp_of_torch())
    assert str(refused.value).startswith("g++ cannot compile them: ")


@needs_kernels
def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIBERT_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(build, "compile_source", lambda *_: b"a library")
    build.kernels.cache_clear()
    with pytest.raises(build.BuildError, match=str(tmp_path / "file")):
        build.kernels()


@pytest.mark.skipif(bool(no_bf16_kernel), reason=no_bf16_kernel)
def test_avx512_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what runs without it too: tiles of one and of two panels, tails, what is not finite."""
    torch.manual_seed(0)
    x, qkv = torch.randn(200, 77) * 3, torch.randn(200, 3, 2, 26)
    x[3, 5], x[4, 5] = torch.nan, torch.inf
    qkv[100:, :2] *= 20  # scores so far apart that weights are 0
    qkv[5, 0, 0, 0] = torch.nan
    starts = torch.tensor([0, 7, 40, 200], dtype=torch.int32)
    norm, none = nn.LayerNorm(77), nn.Dropout(0.0)
    layers = [
        kind(torch.randn(outputs, 77), torch.randn(outputs))
        for kind in (FloatPanels, HalfPanels, BytePanels)
        for outputs in (5, 16, 40, 64)
    ]

    @torch.no_grad()
    def bits() -> list[Tensor]:
        build.kernels.cache_clear()
        found = [layer(x) for layer in layers] + [layer.gelu(x) for layer in layers]
        found += [panels.attend(qkv, starts), panels.add_norm(x, x, norm, none)]
        return [y.view(torch.int32) for y in found]

    assert build.instructions() == (*build.NEEDED, *build.AVX512)
    with_avx512 = bits()
    try:
        monkeypatch.setattr(build, "cpu_flags", lambda: frozenset(build.NEEDED))
        monkeypatch.setenv("MINIBERT_HOME", str(tmp_path))
        assert build.instructions() == build.NEEDED
        assert all(map(torch.equal, bits(), with_avx512))
        with pytest.raises(build.BuildError, match="multiply_bf16 is for a CPU with avx512f"):
            panels.run("multiply_bf16")
    finally:
        build.kernels.cache_clear()


def test_another_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset({"avx2"}))
    build.kernels.cache_clear()
    with pytest.raises(build.BuildError, match="a CPU with avx2, fma, f16c"):
        build.kernels()


@needs_kernels
@pytest.mark.parametrize("linear", [FloatPanels, HalfPanels, BytePanels, Bf16Panels])
def test_no_rows(linear: type) -> None:
    if linear is Bf16Panels and no_bf16_kernel:
        pytest.skip(no_bf16_kernel)
    layer = linear(torch.randn(20, 30, dtype=linear.dtype), torch.randn(20, dtype=linear.dtype))
    none = torch.empty(0, 30, dtype=linear.dtype)
    assert layer(none).shape == layer.gelu(none).shape == (0, 20)
