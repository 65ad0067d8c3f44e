"""House rules: who may import whom."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "minibert"

# From the ground up: a room imports from itself and from rooms to its left.
ORDER = (
    "files machine processes model speed pretrained text baselines tagging training study info cli "
    "__main__"
)
FORBIDDEN = {"transformers", "seqeval", "sklearn", "onnxruntime", "openvino"}


def modules() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def room(path: Path) -> str:
    """The name by which a module has a floor; the files of a sub-package share one."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "minibert":
            found += [f"minibert.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
    return found


def test_imports_go_downward_only() -> None:
    floor = {name: i for i, name in enumerate(ORDER.split())}
    for path, tree in modules().items():
        for imported in imports(tree):
            other = imported.split(".")[1] if imported.startswith("minibert.") else room(path)
            if room(path) != "__init__" and other != "__version__" and not is_door(path, imported):
                assert floor[other] <= floor[room(path)], f"{path} imports {imported}, from above"


def is_door(path: Path, imported: str) -> bool:
    """``from_pretrained`` and ``save_pretrained``: the one way up from the model, to the disk."""
    return path.parts[-2:] == ("model", "heads.py") and imported == "minibert.pretrained"


def test_the_model_imports_torch_files_and_itself() -> None:
    known = sys.stdlib_module_names | {"torch", "typing_extensions"}
    for path, tree in modules().items():
        for imported in imports(tree) if room(path) == "model" else ():
            assert imported.startswith(("minibert.model", "minibert.files")) or (
                imported.split(".")[0] in known or is_door(path, imported)
            ), f"{path} imports {imported}"


def test_the_model_can_be_read_in_an_afternoon() -> None:
    text = "".join(path.read_text() for path in modules() if room(path) == "model")
    assert len(text.splitlines()) <= 890
    assert len(text.split()) <= 4300


def test_the_package_needs_only_what_it_declares() -> None:
    for path, tree in modules().items():
        if path.name == "reference.py":  # what parity compares with, the extra parity
            continue
        assert not FORBIDDEN & {i.split(".")[0] for i in imports(tree)}, path


def test_no_pickle_is_opened() -> None:
    for path in [*PACKAGE.rglob("*.py"), ROOT / "train.py"]:
        assert not re.search(r"torch\.load\(|pickle\.load|import pickle", path.read_text()), path


def test_every_test_the_reliability_page_names_exists() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(?:test_\w+\.py::)?(test_\w+)`", page)
    assert len(named) > 40
    for test in named:
        assert f"def {test}(" in tests, test
    rows = re.findall(r"^\| (?!fault)[^\n]*", page, flags=re.MULTILINE)
    assert all(re.search(r"test_\w+`", row) for row in rows), "every promise has a test"
