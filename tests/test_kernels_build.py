"""Compiling without a GPU: what NVRTC makes of the kernels, and the cache."""

from __future__ import annotations

import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks import kernel_resources
from minibert.speed.cuda import build

UNIT = ("attention.cu", "sm_75", {"HEAD_SIZE": 32, "DROPOUT": 0})
KERNELS = {
    kind + size for kind in ("forward", "backward_q", "backward_kv") for size in ("_long", "_short")
}
MOST_SHARED = 48 * 1024  # what a block may declare statically on every GPU


@pytest.mark.parametrize("arch", kernel_resources.ARCHITECTURES)
@pytest.mark.parametrize("dropout", [0, 1])
@pytest.mark.parametrize("head_size", [64, 32])
def test_compiles_to_tensor_core_code_without_spills(
    arch: str, head_size: int, dropout: int
) -> None:
    measured = kernel_resources.measure(arch, head_size, dropout)
    assert set(measured) == KERNELS
    for kernel, used in measured.items():
        assert used.spilled == 0, kernel
        assert used.shared <= MOST_SHARED, kernel
        # A 16 x 16 patch takes K / 8 * 2 instructions a product: two products forward, three for
        # dq, four for dk and dv. `forward_long` has two patches in a row, the others a loop.
        products = {"forward": 2, "backward_q": 3, "backward_kv": 4}[kernel.rsplit("_", 1)[0]]
        patches = 2 if kernel == "forward_long" else 1
        assert used.hmma == patches * products * head_size // 8 * 2, kernel
        assert used.ldmatrix > 0, kernel


def test_the_documented_table_is_what_the_compiler_says() -> None:
    """A change that costs registers or shared memory has to show in the document."""
    documented = kernel_resources.documented()
    if f"NVRTC {version('nvidia-cuda-nvrtc')};" not in documented:
        pytest.skip("the table is of another NVRTC; benchmarks/kernel_resources.py --write")
    assert kernel_resources.tables() == documented


def test_first_use_and_later_ones_are_quick(tmp_path: Path) -> None:
    """Under 5 s of processor time to compile the largest unit, under 50 ms to find it again."""
    unit = ("attention.cu", "sm_75", {"HEAD_SIZE": 64, "DROPOUT": 1})
    start = time.process_time()
    first = build.cubin(*unit, directory=tmp_path)
    compiled = time.process_time()
    again = build.cubin(*unit, directory=tmp_path)
    assert compiled - start < 5
    assert time.process_time() - compiled < 0.05
    assert first == again


def test_the_cache_is_used_and_knows_what_it_holds(
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
    names = [path.name for path in (tmp_path / "kernels").iterdir()]
    assert len(names) == 4, names
    assert all(name.startswith("attention-sm_") and name.endswith(".cubin") for name in names)


def test_a_directory_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "compile_source", lambda *_: (b"code", ""))
    file = tmp_path / "file"
    file.touch()
    assert build.cubin(*UNIT, directory=file / "below") == b"code"


def test_a_failed_rename_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(build, "compile_source", lambda *_: (b"code", ""))
    monkeypatch.setattr("minibert.files.os.replace", refuse)
    assert build.cubin(*UNIT, directory=tmp_path) == b"code"
    assert not list(tmp_path.iterdir())


def test_without_cuda_core_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(build.BuildError, match=r"pip install 'minibert\[cuda\]'"):
        build.compile_source("", "sm_75", {})


def test_a_source_that_does_not_compile_shows_the_line() -> None:
    text = build.source("attention.cu").replace(
        "block_barrier();  // the tile", "blok();  // the tile"
    )
    with pytest.raises(build.BuildError, match=r"attention\.cu\(\d+\).*blok"):
        build.compile_source(text, *UNIT[1:])


def test_the_sources_include_nothing_from_outside() -> None:
    assert "#include" not in build.source("attention.cu")
