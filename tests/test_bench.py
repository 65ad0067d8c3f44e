"""A rehearsal of the CPU benchmarks on a tiny model, and the documents from their results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from benchmarks import agreement, bench, choose_recipe, report, runs, scores, systems
from benchmarks.child import run_child
from benchmarks.workload import NATIVE, OURS
from minibert.files import MinibertError
from minibert.text import demo
from minibert.text.bio import Sentence, write_bio
from minibert.training.recipe import RECIPES


def rehearse(output: Path, *arguments: str) -> dict:
    status = bench.main(["--plan", "tiny", "--output", str(output), *arguments])
    (path,) = output.glob("speed-*.json")
    result = json.loads(path.read_text())
    assert (status == 0) == (not result["left_out"]), result["left_out"]
    return result


def test_rehearsal(tmp_path: Path) -> None:
    documents = [runs.ROOT / "README.md", runs.ROOT / "docs" / "speed.md"]
    before = [document.read_bytes() for document in documents]
    result = rehearse(tmp_path, "--only", "adamw", "curves")
    assert result["left_out"] == {}
    assert list(result["parts"]) == ["adamw", "curves"]
    assert next(iter(result["parts"]["adamw"])) == "ceiling"
    for rows in result["parts"].values():
        for row in rows.values():
            assert len(row["seconds"]) == 2, "two turns"
            assert row["median_s"] > 0
    after = [document.read_bytes() for document in documents]
    assert after == before, "a rehearsal changes no document"


@pytest.mark.slow
def test_rehearsal_of_everything(tmp_path: Path) -> None:
    result = rehearse(tmp_path)
    assert result["left_out"] == {}
    assert tuple(result["parts"]) == report.PARTS
    inference = result["parts"]["inference"]
    assert {f"ceiling {OURS}", f"minibert {OURS}, packed"} <= inference.keys()
    assert NATIVE == "bf16" or not any("bf16" in name for name in inference)
    assert inference["transformers sdpa fp32, padded to longest"]["apart"] < 1e-4


def test_a_part_that_fails_is_left_out_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def run_part(module: str, *_) -> tuple[dict, str | None]:
        calls.append(module)
        if module == "bench_adamw":
            return {}, "exit status 1: no memory"
        return {"test_curves": {"contenders": {"minibert, batch 1": row(1.0)}}}, None

    monkeypatch.setattr(bench, "run_part", run_part)
    result = rehearse(tmp_path, "--only", "adamw", "curves")
    assert calls == ["bench_adamw", "bench_curves"]
    assert result["left_out"] == {"adamw": "exit status 1: no memory"}
    assert list(result["parts"]) == ["curves"]


@pytest.mark.parametrize("arguments", [["--plan", "tiny"], ["--only", "adamw"]])
def test_a_rehearsal_or_a_part_is_not_a_result(arguments: list[str]) -> None:
    with pytest.raises(MinibertError, match="a rehearsal or a part is not a result"):
        bench.main(arguments)


RACE = """
def test_race(race):
    order = []
    rows = race("ab", lambda name: lambda: order.append(name), turns=3, warm_up=1)
    assert "".join(order) == "abababab"
    assert all(len(row["seconds"]) == 3 for row in rows.values())


def test_numbers(race):
    rows = race(["a"], lambda name: lambda: {"tokens": 6}, turns=2)
    assert rows["a"]["tokens"] == 6
    assert rows["a"]["median_s"] == sum(rows["a"]["seconds"]) / 2
"""


def test_contenders_alternate_and_pytest_benchmark_times_them(tmp_path: Path) -> None:
    (tmp_path / "test_race.py").write_text(RACE)
    found = tmp_path / "found.json"
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.conftest", tmp_path]
    command.append(f"--benchmark-json={found}")
    ran = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
    race, _ = json.loads(found.read_text())["benchmarks"]
    timed = race["stats"]["data"]
    contenders = race["extra_info"]["contenders"]
    assert contenders["a"]["seconds"] == timed[::2]
    assert contenders["b"]["seconds"] == timed[1::2]
    assert set(re.findall(r"^([ab]) .* 3 +1$", ran.stdout, re.MULTILINE)) == {"a", "b"}


def row(seconds: float, **more: object) -> dict:
    return {"seconds": [seconds], "median_s": seconds} | more


RESULT = {
    "date": "2026-01-02",
    "cpu": {
        "model": "A CPU",
        "instructions": "AMX",
        "dtype": "bf16",
        "why": "it has AMX",
        "threads": 2,
    },
    "load_before": [0.1, 0, 0],
    "load_after": [2.0, 0, 0],
    "left_out": {"latency": "exit status 1: no\nmore"},
    "parts": {
        "inference": {
            "ceiling fp32": row(0.5, tokens=100),
            "ceiling bf16": row(0.25, tokens=100),
            "minibert fp32, packed": row(1.0, tokens=100),
            "minibert bf16, packed": row(0.5, tokens=100),
            "transformers sdpa fp32, padded to longest": row(2.0, tokens=100),
            "onnxruntime int8, sorted by length": row(0.4, tokens=100),
        },
        "startup": {"ceiling": row(1.0), "minibert": row(2.0), "transformers": row(5.0)},
        "memory": {"minibert tag MiniLM, 50 sentences": row(3.0, peak_mb=400, sentences=50)},
        "curves": {"minibert, batch 4": row(1.0, tokens=4, curve="batch", x=4, side="minibert")},
        "accuracy": {
            "minibert bf16, packed": row(
                1.0, words=1000, words_apart=1, f1=0.5, f1_fp32_padded=0.501, trained=True
            )
        },
    },
}


def test_a_ceiling_counts_by_its_fastest_turn() -> None:
    """minibert takes 2 s mostly and 1 s at best, its ceiling 3 s mostly and 0.5 s at best."""
    rows = {
        "ceiling bf16": {"seconds": [3.0, 0.5, 3.0], "median_s": 3.0, "tokens": 100},
        "minibert bf16, packed": {"seconds": [2.0, 1.0, 2.0], "median_s": 2.0, "tokens": 100},
    }
    table = report.Part({"parts": {"inference": rows}}, "inference").table()
    assert "| ceiling bf16 | 200 |  | 100% |" in table
    assert "| minibert bf16, packed | 50 | 1.00× | 50% |" in table


def test_the_tables_show_the_result() -> None:
    page = report.page({"speed.json": RESULT})
    # 100 tokens in 2 s: minibert is four times as fast; a quarter of the fp32 ceiling.
    assert "| transformers sdpa fp32, padded to longest | 50 | 4.00× | 25% |" in page
    assert "| onnxruntime int8, sorted by length | 250 | 0.80× |  |" in page
    assert "| minibert bf16, packed | 200 | 1.00× | 50% |" in page
    # Target, measured, and the ceiling of bf16 (400 tokens/s) over the peer's 50.
    peer = "transformers sdpa fp32, padded to longest"
    assert f"| inference: minibert bf16, packed over {peer} | 9.00× | 4.00× | 8.00× |" in page
    assert "| startup: minibert over transformers | 2.22× | 2.50× | 5.00× |" in page
    assert "| minibert tag MiniLM, 50 sentences | 400 | 3.0 |" in page
    assert "1 of 1000 words differ, entity F1 50.00 and 50.10" in page
    assert "Left out: latency (exit status 1: no)." in page
    assert "load average 0.1 before and 2.0 after" in page


def test_the_summary_takes_the_fastest_peer_of_each_format() -> None:
    inference = RESULT["parts"]["inference"] | {
        "onnxruntime fp32, padded to longest": row(1.6, tokens=100),
        "OpenVINO fp32, sorted by length": row(1.5, tokens=100),
    }
    memory = {"minibert, tag": row(1.0, peak_mb=80), "transformers, tag": row(1.0, peak_mb=100)}
    result = RESULT | {"parts": RESULT["parts"] | {"inference": inference, "memory": memory}}
    summary = report.summary({"a": result, "b": SMALLER})
    assert "| speed-up over | A CPU, AMX, bf16 | A CPU, AVX2, fp32 |" in summary
    assert "| inference: transformers fp32, padded | 4.00× |  |" in summary
    assert "| inference: fastest fp32 peer | 3.00× (OpenVINO) |  |" in summary
    assert "| inference: fastest int8 peer | 0.80× (onnxruntime) | 0.50× (onnxruntime) |" in summary
    assert "| start-up: transformers | 2.50× |  |" in summary
    result["parts"]["inference"] = inference | {"minibert int8, packed": row(0.2, tokens=100)}
    assert "| inference: fastest int8 peer | 2.00× (onnxruntime) |" in report.summary({"a": result})
    assert "| peak memory, tagging | 80 MB (transformers 100 MB) |  |" in summary
    assert "bf16 peer" not in summary, "no row without a figure"


def test_a_section_is_replaced_between_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n")
    runs.replace_section(readme, "speed", "new\n\n")
    assert readme.read_text() == "before\n<!-- speed -->\nnew\n<!-- /speed -->\nafter\n"
    with pytest.raises(SystemExit, match="<!-- scores -->"):
        runs.replace_section(readme, "scores", "new")


SMALLER = {
    "date": "2026-01-01",
    "cpu": {
        "model": "A CPU", "instructions": "AVX2", "dtype": "fp32", "why": "no bf16", "threads": 2
    },
    "load_before": [0.1, 0, 0],
    "load_after": [0.2, 0, 0],
    "left_out": {},
    "parts": {
        "inference": {
            "ceiling fp32": row(0.5, tokens=100),
            "minibert fp32, packed": row(0.8, tokens=100),
            "onnxruntime int8, sorted by length": row(0.4, tokens=100),
        }
    },
}  # fmt: skip


def test_every_kind_of_cpu_has_a_column_of_its_newest_run(tmp_path: Path) -> None:
    older = RESULT | {"date": "2025-12-31", "parts": {}}
    for result in (SMALLER, RESULT, older):
        name = f"speed-{result['cpu']['instructions'].lower()}-{result['date']}.json"
        (tmp_path / name).write_text(json.dumps(result))
    found = report.newest(tmp_path)
    assert list(found) == ["speed-amx-2026-01-02.json", "speed-avx2-2026-01-01.json"]
    section = report.page(found)
    assert "| A CPU, AMX, bf16 | A CPU, AVX2, fp32 |" in section
    assert "| inference: onnxruntime int8, sorted by length | 0.80× | 0.50× |" in section
    assert "| inference: transformers sdpa fp32, padded to longest | 4.00× |  |" in section
    assert "| inference: share of the ceiling | 50% | 62% |" in section
    assert "| startup: share of the ceiling | 50% |  |" in section
    assert "## A CPU, AVX2, fp32\n\n2026-01-01, 2 threads" in section


def test_the_documents_have_the_tables_of_the_results_in_the_repository() -> None:
    results = report.newest(runs.RESULTS)
    sections = {
        "README.md": [
            ("speed", report.summary(results)),
            ("scores", scores.table()),
            ("compare", systems.section(runs.RESULTS, systems.SHORT)),
        ],
        "docs/reproducing-the-paper.md": [
            ("recipes", choose_recipe.table(runs.RESULTS)),
            ("agreement", agreement.table(runs.RESULTS)),
        ],
        "docs/speed.md": [("speed", report.page(results))],
        "docs/baselines.md": [("compare", systems.section(runs.RESULTS))],
    }
    for document, expected in sections.items():
        text = (runs.ROOT / document).read_text()
        for name, section in expected:
            assert f"<!-- {name} -->\n{section}\n<!-- /{name} -->" in text, document


def test_two_annotations_of_one_sentence_are_scored_as_a_model() -> None:
    """The one that occurs three times has three pairs; what occurs once does not count."""
    seen = [
        ("a b", "O B-X"),
        ("a b", "O B-X"),
        ("a b", "O O"),
        ("c", "B-Y"),
        ("c", "B-Y"),
        ("d", "O"),
    ]
    sentences = [Sentence(tuple(w.split()), tuple(t.split())) for w, t in seen]
    found = agreement.measured(sentences)
    counts = [found[name] for name in ("repeated", "annotated alike", "pairs", "words")]
    assert counts == [2, 1, 4, 1.5]
    # Of the three pairs of "a b", one is alike, and two share one word of two and no entity.
    assert found["token"][0] == pytest.approx(100 * (4 + 1) / 7)
    assert found["entity"][0] == pytest.approx(100 * 2 * (1 + 1) / (4 + 2))
    # A resample may have one of the two sentences twice.
    assert found["token"][1:] == pytest.approx([100 * 4 / 6, 100])
    assert found["entity"][1:] == pytest.approx([50, 100])


def test_the_peak_memory_of_a_child_is_measured() -> None:
    small = run_child([sys.executable, "-c", "pass"])
    large = run_child([sys.executable, "-c", "x = b'1' * (200 << 20)"])
    assert 190 < large - small < 230
    with pytest.raises(RuntimeError, match="exit status 3"):
        run_child([sys.executable, "-c", "raise SystemExit(3)"])


def test_scores_that_were_not_run_are_shown_as_such(tmp_path: Path) -> None:
    older = [{"seed": i, "entity_f1": f1} for i, f1 in enumerate((0.88, 0.89))]
    result = {"machine": {"dtype": "fp32"}, "runs": older}
    (tmp_path / "scores-minilm-2026-01-01.json").write_text(json.dumps(result))
    head, _, *f1 = scores.table(tmp_path).splitlines()
    assert head.startswith("| MiniLM on engtest | minibert, 2 seeds | accurate recipe | plain")
    assert f1[0] == "| entity F1, Viterbi | 88.50 ± 0.71 | not run | not run | not run |"
    assert f1[1] == "| entity F1, argmax | not run | not run | not run | not run |"


@pytest.fixture
def small_corpus(tmp_path: Path) -> tuple[Path, Path]:
    train_set, test_set = demo.generate()
    train_file = write_bio(tmp_path / "train.bio", train_set[:96])
    return train_file, write_bio(tmp_path / "test.bio", test_set[:96])


@pytest.mark.slow
def test_scores_of_minibert_and_transformers(
    small_corpus: tuple[Path, Path], minilm: Path, tmp_path: Path
) -> None:
    corpus = ["--train", str(small_corpus[0]), "--test", str(small_corpus[1])]
    scores.main(["--seeds", "3", "--epochs", "1", *corpus, "--output", str(tmp_path)])
    for name in ("scores-minilm", "scores-minilm-transformers"):
        (path,) = tmp_path.glob(f"{name}-2*.json")
        (run,) = json.loads(path.read_text())["runs"]
        assert run["seed"] == 3
        assert all(0 <= run[key] <= 1 for key in scores.ROWS)
        assert run["token_micro_f1_including_O"] > 0.2


@pytest.mark.slow
def test_transformers_is_trained_by_the_same_recipe(
    small_corpus: tuple[Path, Path], minilm: Path, tmp_path: Path
) -> None:
    """Padded, without averaging and with the plain AdamW, train.py makes the same bits."""
    file, _ = small_corpus
    recipe = replace(RECIPES["default"], epochs=2)
    theirs = scores.train_transformers(tmp_path / "theirs", file, recipe, seed=1)
    flags = ["--layout", "longest", "--average", "inf", "--plain-adamw", "--attn", "sdpa"]
    flags += ["--model", "minilm", "--train", str(file), "--epochs", "2", "--seed", "1"]
    assert train.main([*flags, "--output", str(tmp_path / "ours")]) == 0
    ours = load_file(tmp_path / "ours" / "last" / "model.safetensors")
    for name, tensor in load_file(theirs / "model.safetensors").items():
        assert torch.equal(ours[name], tensor), name
