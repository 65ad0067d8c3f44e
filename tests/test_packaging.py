"""What is installed from a wheel and from an sdist works outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import minibert

ROOT = Path(__file__).resolve().parent.parent


def run(*command: object, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()[-2000:]
    return ran.stdout.decode()


def test_the_version_is_said_once_more_where_it_is_cited() -> None:
    cited = (ROOT / "CITATION.cff").read_text()
    assert f"version: {minibert.__version__}\n" in cited
    assert f"## {minibert.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f'version = "{minibert.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_an_installed_package_trains_and_tags(kind: str, minilm: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".*", "weights", "runs", "build")
    )
    if kind == "sdist":
        code = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
        run(sys.executable, "-c", code, cwd=source)
        (archive,) = (source / "dist").glob("*.tar.gz")
        with tarfile.open(archive) as files:
            files.extractall(tmp_path / "unpacked", filter="data")
        whole = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
        (source,) = (tmp_path / "unpacked").iterdir()
        held = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
        left_out = {p for p in whole - held if not {"dist", "__pycache__"} & {*p.parts}}
        assert not left_out, "the sdist lacks files: name them in MANIFEST.in"
        fast = ("tests/test_house.py", "tests/test_metrics.py", "tests/test_packing.py")
        assert " passed" in run(sys.executable, "-m", "pytest", "-q", *fast, cwd=source)
    build = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path)
    run(sys.executable, *build, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = {name.removeprefix("minibert/") for name in files.namelist()}
        assert files.read("minibert/training/loop.py") == (ROOT / "train.py").read_bytes()
    assert {"py.typed", "speed/cpu/kernels.cpp", "speed/cuda/attention.cu"} <= names
    assert not any("emulator" in name or name.startswith("tests") for name in names)

    # An empty environment that borrows torch and its company from this one.
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(packages)
    here = Path(pytest.__file__).parent.parent
    (packages / "borrowed.pth").write_text(f"{here}\n")
    python = tmp_path / "env" / "bin" / "python"
    where = run(python, "-c", "import minibert; print(minibert.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path)
    command = (python, "-m", "minibert.cli")
    trained = ("train", "--model", minilm, "--corpus", "demo", "--epochs", 1, "--output", "run")
    assert "saved to run" in run(*command, *trained, cwd=tmp_path)
    tagged = run(*command, "tag", "run/last", "who directed the frozen station", cwd=tmp_path)
    assert "[the frozen station TITLE" in tagged
