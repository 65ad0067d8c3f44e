"""Compiling and launching without a GPU: NVRTC's code, the cache, and what the driver is given."""

from __future__ import annotations

import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

import emulator
import pytest
from test_kernels_adamw import draw, new_sweep
from test_kernels_attention import KINDS, run
from test_kernels_norm import check as check_norm

from benchmarks import kernel_resources
from minibert.speed.cuda import build, launch

UNIT = ("attention.cu", "sm_75", {"HEAD_SIZE": 32, "DROPOUT": 0})
ATTENTION = {f"{kind}_{size}" for kind in KINDS for size in ("long", "short")}
MOST_SHARED = 48 * 1024  # bytes a block may declare statically on every GPU
ARCHITECTURES = [
    pytest.param(arch, marks=[] if arch == "sm_75" else pytest.mark.slow)
    for arch in kernel_resources.ARCHITECTURES
]


# ---- the compiled code -------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("defines", kernel_resources.ATTENTION, ids=str)
def test_attention_is_tensor_core_code_without_spills(arch: str, defines: dict[str, int]) -> None:
    measured = kernel_resources.measure("attention.cu", arch, defines)
    assert set(measured) == ATTENTION
    for kernel, used in measured.items():
        # NVRTC 12.8 spills 16 bytes in and 16 out, in forward_long with dropout.
        assert used.spilled <= (0 if build.compiler() >= (13, 0) else 32), kernel
        assert used.shared <= MOST_SHARED, kernel
        # A 16 x 16 patch takes K / 8 * 2 instructions per product: two products forward, three for
        # dq, four for dk and dv. `forward_long` unrolls two patches, the others are loops.
        products = {"forward": 2, "backward_q": 3, "backward_kv": 4}[kernel.rsplit("_", 1)[0]]
        patches = 2 if kernel == "forward_long" else 1
        assert used.hmma == patches * products * defines["HEAD_SIZE"] // 8 * 2, kernel
        assert used.ldmatrix > 0, kernel


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("defines", kernel_resources.NORM, ids=str)
def test_add_norm_compiles_without_spills(arch: str, defines: dict[str, int]) -> None:
    measured = kernel_resources.measure("norm.cu", arch, defines)
    assert set(measured) == {"add_norm", "add_norm_backward", "add_norm_sums"}
    assert not any(used.spilled for used in measured.values())
    assert measured["add_norm_backward"].shared == 4 * 2 * defines["HIDDEN"] * 4 <= MOST_SHARED


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("defines", kernel_resources.ADAMW, ids=str)
def test_adamw_compiles_without_spills(arch: str, defines: dict[str, int]) -> None:
    measured = kernel_resources.measure("adamw.cu", arch, defines)
    assert measured["adamw"].spilled == measured["squares"].spilled == 0


@pytest.mark.slow
def test_the_documented_tables_are_what_the_compiler_says() -> None:
    """A change that costs registers or shared memory has to show in the document."""
    documented = kernel_resources.documented()
    if f"NVRTC {version('nvidia-cuda-nvrtc')};" not in documented:
        pytest.skip("the table is of another NVRTC; benchmarks/kernel_resources.py --write")
    assert kernel_resources.tables() == documented


def test_a_source_that_does_not_compile_shows_the_line() -> None:
    text = build.source("attention.cu").replace(
        "block_barrier();  // the tile", "blok();  // the tile"
    )
    with pytest.raises(build.BuildError, match=r"attention\.cu\(\d+\).*blok"):
        build.compile_source(text, *UNIT[1:])


def test_the_sources_include_nothing_from_outside() -> None:
    assert "#include" not in build.source("attention.cu")


# ---- the cache ---------------------------------------------------------------------------------


def test_first_use_and_later_ones_are_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under 5 s of processor time to compile the largest unit, under 50 ms to find it again."""
    monkeypatch.setenv("MINIBERT_HOME", str(tmp_path))
    unit = ("attention.cu", "sm_75", {"HEAD_SIZE": 64, "DROPOUT": 1})
    start = time.process_time()
    first = build.cubin(*unit)
    compiled = time.process_time()
    again = build.cubin(*unit)
    assert compiled - start < 5
    assert time.process_time() - compiled < 0.05
    assert first == again


def test_every_part_of_a_binary_is_in_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def compile_source(text: str, arch: str, defines: dict[str, int]) -> tuple[bytes, str]:
        compiled.append((text, arch, defines))
        return b"code %d" % len(compiled), ""

    monkeypatch.setattr(build, "compile_source", compile_source)
    monkeypatch.setenv("MINIBERT_HOME", str(tmp_path))
    file, arch, defines = UNIT
    assert build.cubin(file, arch, defines) == b"code 1"
    assert build.cubin(file, arch, defines) == b"code 1"
    assert build.cubin(file, "sm_80", defines) == b"code 2"
    assert build.cubin(file, arch, {**defines, "DROPOUT": 1}) == b"code 3"
    original = build.source
    monkeypatch.setattr(build, "source", lambda *names: original(*names) + "// changed\n")
    assert build.cubin(file, arch, defines) == b"code 4"
    monkeypatch.setattr(build, "compiler", lambda: (99, 9))
    assert build.cubin(file, arch, defines) == b"code 5"
    names = [path.name for path in (tmp_path / "kernels").iterdir()]
    assert len(names) == 5, names
    assert all(name.startswith("attention-sm_") and name.endswith(".cubin") for name in names)


def test_without_a_writable_cache_it_compiles_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(build, "compile_source", lambda *_: (b"code", ""))
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("MINIBERT_HOME", str(file))  # no directory can be made in it
    assert build.cubin(*UNIT) == b"code"
    monkeypatch.setenv("MINIBERT_HOME", str(tmp_path))
    monkeypatch.setattr("minibert.files.os.replace", refuse)
    assert build.cubin(*UNIT) == b"code"
    assert not list((tmp_path / "kernels").iterdir())


def test_without_cuda_core_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(build.BuildError, match=r"pip install '\.\[cuda\]'"):
        build.compile_source("", "sm_75", {})


def test_without_nvrtc_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    build.compiler.cache_clear()
    with pytest.raises(build.BuildError, match=r"NVRTC.*pip install '\.\[cuda\]'"):
        build.cubin(*UNIT)


# ---- launches ----------------------------------------------------------------------------------


def test_parameters_are_those_of_the_sources() -> None:
    """Names, order and C types of every kernel: what is packed is what the kernel reads."""
    with emulator.recorded() as launches:
        run([3], heads=1, dropout_p=0.1)
        run([65], heads=1, dropout_p=0.1)
        check_norm(2, 64, 0.1, True)
        new_sweep().step(draw(), 1e-2)
    seen = {one.kernel for one in launches}
    assert seen == {
        *ATTENTION,
        "add_norm",
        "add_norm_backward",
        "add_norm_sums",
        "squares",
        "adamw",
    }
    packed_as = {"int": "int32", "float": "float32", "u32": "int32"}
    for one in launches:
        source = build.source(one.file)
        pattern = rf"KERNEL\({one.kernel}, [^(]*\((.*?)\),\n"
        if one.file == "attention.cu":
            pattern = r"#define PROBLEM_PARAMETERS\s*\\\s*\((.*?)\)\n"
        declared = re.search(pattern, source, re.S)
        assert declared, one.kernel
        packed = launch.pack(one)
        for text, name, value in zip(
            declared[1].replace("\\", " ").split(","), one.parameters, packed, strict=True
        ):
            words = re.split(r"[\s*]+", text.strip())
            assert words[-1] == name, one.kernel
            expected = "int" if "*" in text else packed_as[words[0]]
            assert type(value).__name__ == expected, (one.kernel, name)


def test_problem_takes_its_parameters_in_order() -> None:
    source = (build.HERE / "problem.cuh").read_text()
    passed = re.search(r"Problem \{(.*?)\}", source.split("#define PROBLEM ")[1], re.S)
    with emulator.recorded() as launches:
        run([3], heads=1)
    assert passed
    names = [name.strip() for name in passed[1].replace("\\", " ").split(",")]
    assert names == list(launches[0].parameters)
