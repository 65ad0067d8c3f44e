"""Parity finds no difference where there is none, and names a planted fault where it is."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import minibert
from minibert import BertForMaskedLM, BertForTokenClassification, Tokenizer
from minibert.cli import main
from minibert.files import MinibertError
from minibert.machine import Chosen
from minibert.model import attention
from minibert.model.encoder import Embeddings
from minibert.speed import cuda, fused
from minibert.study.parity import compare as parity_module
from minibert.study.parity import reference, ulps
from minibert.study.parity.compare import TEXTS as DEFAULT_TEXTS
from minibert.study.parity.compare import compare
from minibert.study.parity.judge import COLUMNS, OPERATIONS, VANISHES, Comparison, Row, table
from minibert.study.parity.page import picture, span
from tests.builders import save, small_bert, small_checkpoint

TEXTS = ("who knows", "a", "some text here")
ATTN, DTYPES = ("eager", "sdpa"), ("fp32", "bf16", "fp16")
DOT = re.compile(r'<circle cx="[\d.]+" cy="([\d.]+)" r="[\d.]+"( class="bad")?><title>(\S+):')
COMPARED = reference.watched(2)  # every intermediate but probs_dropped


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> None:
    if "minilm" not in request.fixturenames:
        request.getfixturevalue("one_thread")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForMaskedLM])
def test_every_promise_is_kept(kind: type, tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path, kind)
    found = compare(folder, TEXTS)
    assert [(c.attn, c.dtype, c.layout) for c in found] == [
        (attn, dtype, layout)
        for dtype in DTYPES
        for attn in ATTN
        for layout in ("padded", "packed")
    ]
    parameters = [name for name, _ in kind.from_pretrained(folder).named_parameters()]
    for c in found:
        where = (c.attn, c.dtype, c.layout)
        assert c.kept, (where, str(c.first_broken))
        kinds = ("gradient", "step", "dropout") if c.layout == "padded" else ("gradient", "step")
        wanted = COMPARED + [f"{kind}:{name}" for kind in kinds for name in parameters]
        assert [row.name for row in c.rows] == wanted
        assert {row.operation for row in c.rows} <= OPERATIONS.keys()
        for row in c.rows:
            if c.layout == "padded":
                assert row.equal
                assert row.max_abs == row.ulps == 0
                assert row.error == row.reference_error
            if not row.name.startswith("dropout"):
                assert 0 < row.error < (2e-6 if c.dtype == "fp32" else 3e-2) or ":" in row.name
                # In float64 minibert equals transformers, but for rounding in packed batches.
                assert row.own_error == pytest.approx(row.error, rel=1e-3)


def test_hidden_scores_that_overflow_in_fp16(tmp_path: Path) -> None:
    """In fp16 finfo.min plus a score below -16 is -inf, in both libraries."""
    net = small_bert()
    with torch.no_grad():
        for layer in net.bert.layers:
            layer.attention.query.weight.mul_(6)
    folder = save(net, tmp_path)
    net = BertForTokenClassification.from_pretrained(folder, dtype=torch.float16)
    padded, _ = parity_module.batches(net, Tokenizer.from_pretrained(folder), TEXTS)
    with minibert.trace(net) as t, torch.no_grad():
        net(**padded)
    assert t["layers.0.scores"].isinf().any()
    for c in compare(folder, TEXTS, dtypes=["fp16"], layouts=["padded"]):
        assert c.kept, (c.attn, str(c.first_broken))


def tanh_gelu(model) -> None:
    def forward(self, x_ND):
        return self.down(F.gelu(self.up(x_ND), approximate="tanh"))

    block = model.bert.layers[1].feed_forward
    block.forward = MethodType(forward, block)


def wide_eps(model) -> None:
    model.bert.layers[1].attention_norm.eps = 1e-5


def wide_eps_in_embeddings(model) -> None:
    model.bert.embeddings.norm.eps = 1e-5


def no_bias(path: str) -> Callable:
    def plant(model) -> None:
        linear = model.get_submodule(path)
        linear.forward = MethodType(lambda self, x: F.linear(x, self.weight), linear)

    return plant


def swapped_sums(model) -> None:
    def forward(self: Embeddings, input_N, segment_N, layout):
        x_ND = self.word(input_N) + layout.spread_positions(self.position.weight)
        return self.dropout(self.norm(x_ND + self.segment(segment_N)))

    model.bert.embeddings.forward = MethodType(forward, model.bert.embeddings)


def dropout_before_norm(model) -> None:
    def forward(self: Embeddings, input_N, segment_N, layout):
        x_ND = self.word(input_N) + self.segment(segment_N)
        return self.norm(self.dropout(x_ND + layout.spread_positions(self.position.weight)))

    model.bert.embeddings.forward = MethodType(forward, model.bert.embeddings)


PLANTED = {
    "tanh gelu": (tanh_gelu, "layers.1.post_gelu"),
    "eps 1e-5": (wide_eps, "layers.1.attention_norm"),
    "eps 1e-5, embeddings": (wide_eps_in_embeddings, "embeddings"),
    "no value bias": (no_bias("bert.layers.1.attention.value"), "layers.1.v"),
    "no output bias": (no_bias("bert.layers.0.attention.output"), "layers.0.attention_output"),
    "no up bias": (no_bias("bert.layers.0.feed_forward.up"), "layers.0.pre_gelu"),
    "no down bias": (no_bias("bert.layers.1.feed_forward.down"), "layers.1.ffn_output"),
    "no classifier bias": (no_bias("head.classifier"), "logits"),
}


def plant(monkeypatch: pytest.MonkeyPatch, change: Callable) -> None:
    """Have parity load a minibert model with a mistake."""
    load = BertForTokenClassification.from_pretrained

    class Mistaken(BertForTokenClassification):
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            model = load(*args, **kwargs)
            change(model)
            return model

    monkeypatch.setattr(parity_module, "BertForTokenClassification", Mistaken)


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_found_where_it_is(mistake: str, tiny: Path, monkeypatch) -> None:
    change, name = PLANTED[mistake]
    plant(monkeypatch, change)
    for c in compare(tiny, TEXTS, attn=["sdpa"], dtypes=["fp32"]):
        assert not c.kept
        assert c.first_broken.name == name, c.layout
        if c.layout == "padded":
            assert c.first_difference.name == name
        report = table(c)
        assert f"first broken: {name} ({OPERATIONS[c.first_broken.operation]}), first at" in report
        assert "BROKEN" in report
        for shown in (report, table(c, full=True)):
            rows = [line for line in shown.splitlines() if not line.startswith("  first ")]
            assert max(map(len, rows)) <= 80
            assert any(line.startswith("> ") for line in rows)


def test_swapped_embedding_sums_are_found(tiny: Path, monkeypatch) -> None:
    plant(monkeypatch, swapped_sums)
    padded, packed = compare(tiny, TEXTS, attn=["eager"], dtypes=[torch.float32])
    assert padded.dtype == packed.dtype == "fp32"
    assert padded.first_broken.name == "embeddings.sum"
    assert 0 < padded.first_broken.max_abs < 1e-6
    # The order of a sum changes the rounding, about which packed batches promise nothing.
    assert packed.first_difference.name == "embeddings.sum"
    assert packed.kept


@pytest.mark.parametrize("fill", [-1e4, -10.0])
def test_a_bad_mask_fill_is_found(fill: float, tiny: Path, monkeypatch) -> None:
    """-1e4 does not change the outputs, only the scores."""

    def scores(block, q_BHSK, k_BHSK):
        scores_BHSS = torch.matmul(q_BHSK, k_BHSK.transpose(2, 3)) * q_BHSK.shape[-1] ** -0.5
        if block.valid_BS is not None:
            mask_BS = torch.where(block.valid_BS, 0.0, fill)
            scores_BHSS = scores_BHSS + mask_BS[:, None, None, :]
        return scores_BHSS

    monkeypatch.setattr(attention, "scores", scores)
    (c,) = compare(tiny, TEXTS, attn=["eager"], dtypes=["fp32"], layouts=["padded"])
    assert c.first_broken.name == "layers.0.scores"
    logits = next(row for row in c.rows if row.name == "logits")
    assert logits.equal == (fill == -1e4)


def test_a_kernel_without_its_mask_is_found(tiny: Path, monkeypatch) -> None:
    """Scores and probabilities are computed apart from sdpa, whose faults show in its output."""
    kernel = F.scaled_dot_product_attention

    def blind(q, k, v, attn_mask, dropout_p, scale):
        return kernel(q, k, v, dropout_p=dropout_p, scale=scale)

    class Blind:
        def __getattr__(self, name: str):
            return blind if name == "scaled_dot_product_attention" else getattr(F, name)

    monkeypatch.setattr(attention, "F", Blind())
    (c,) = compare(tiny, TEXTS, attn=["sdpa"], dtypes=["bf16"], layouts=["padded"])
    assert c.first_broken.name == "layers.0.context"


def test_dropout_in_the_wrong_place_shows_only_in_training(tiny: Path, monkeypatch) -> None:
    plant(monkeypatch, dropout_before_norm)
    (c,) = compare(tiny, TEXTS, attn=["sdpa"], dtypes=["fp32"], layouts=["padded"])
    assert c.first_broken.operation == "dropout"


def test_another_optimiser_shows_in_the_step(tiny: Path, monkeypatch) -> None:
    ours = parity_module.AdamW
    monkeypatch.setattr(parity_module, "AdamW", lambda groups, _: ours(groups, "transformers"))
    for c in compare(tiny, TEXTS, attn=["sdpa"], dtypes=["fp32"]):
        assert c.first_broken.operation == "step"


def test_the_command(tiny: Path, capsys, monkeypatch) -> None:
    chosen = ["parity", str(tiny), *TEXTS, "--attn", "eager", "--dtype", "fp32"]
    assert main([*chosen, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kept"] is True
    assert [(c["dtype"], c["layout"], c["kept"]) for c in found["comparisons"]] == [
        ("fp32", layout, True) for layout in ("padded", "packed")
    ]
    row = found["comparisons"][0]["rows"][0]
    assert row["name"] == row["operation"] == "embeddings.sum"
    assert row["equal"]
    assert main([*chosen, "--layout", "padded"]) == 0
    short = capsys.readouterr().out
    assert main([*chosen, "--padded"]) == 0
    assert capsys.readouterr().out == short
    assert short.endswith("PASS\n")
    assert short.count("no difference from transformers") == 1
    assert main([*chosen, "--layout", "packed", "--full"]) == 0
    full = capsys.readouterr().out
    assert "padded" not in full
    assert all(f"  {name} " in full for name in COMPARED)
    plant(monkeypatch, tanh_gelu)
    assert main([*chosen, "--layout", "padded"]) == 1
    assert capsys.readouterr().out.endswith("FAIL\n")
    assert main([*chosen, "--layout", "padded", "--json"]) == 1
    broken = json.loads(capsys.readouterr().out)["comparisons"][0]
    assert broken["first_broken"] == broken["first_difference"] == "layers.1.post_gelu"


class Page(HTMLParser):
    """What a browser makes of the page: tags that close, texts and addresses."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        self.addresses += [value for key, value in attributes if key in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_draws_every_intermediate_and_escapes_text(
    tiny: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    hostile = "<script>a</script>"
    plant(monkeypatch, tanh_gelu)
    file = tmp_path / "page.html"
    chosen = ["--attn", "sdpa", "--dtype", "fp32", "--layout", "packed", "--html", str(file)]
    assert main(["parity", str(tiny), hostile, "b", *chosen]) == 1
    assert "first broken: layers.1.post_gelu" in capsys.readouterr().out
    text = file.read_text()
    page = Page(text)
    assert page.open == []
    assert hostile in page.texts
    assert "script" not in page.tags
    assert page.addresses == ["#sdpa-fp32-packed"]  # from the matrix to the picture
    assert 'id="sdpa-fp32-packed"' in text
    assert 'td class="broken"' in text
    assert page.tags.count("svg") == 1
    dots = DOT.findall(text)
    assert len(dots) == page.tags.count("circle") > len(COMPARED)  # and gradients, and the step
    kept = {name: float(y) for y, bad, name in dots if not bad}
    broken = {name: float(y) for y, bad, name in dots if bad}
    assert next(iter(broken)) == "layers.1.post_gelu"
    assert {"layers.1.pre_gelu", "layers.0.post_gelu", "embeddings"} <= kept.keys()
    limit = float(re.search(r'class="limit" d="M\d+ ([\d.]+)H', text)[1])
    assert all(y > limit for y in kept.values())  # y grows downward
    assert all(y < limit for y in broken.values())
    for operation in ("pre_gelu", "gradient", "step"):
        assert f'text-anchor="end">{operation}<title>{OPERATIONS[operation]}' in text
    assert "error ÷ permitted error" in page.texts


def row_of(name: str, error: float | None, reference: float | None = 1e-7) -> Row:
    bound = None if error is None else 2 * reference
    kept = error is None or error <= bound
    return Row(name, False, 0.0, 0, error, reference, error, bound, kept, "first at [0]: 0.0")


def test_errors_beyond_the_scale_are_drawn_at_its_edges() -> None:
    rows = [row_of("embeddings.sum", 0.0), row_of("embeddings", float("inf"))]
    rows += [row_of("layers.0.q", 1e-7), row_of("dropout:bert.x", None, None)]
    c = Comparison("sdpa", "fp16", "packed", rows)
    low, high = span([c])
    assert (low, high) == (-1, 1)  # of the finite ratio 0.5, and always around 1
    assert span([c, Comparison("sdpa", "fp16", "packed", [row_of("logits", 1e-2)])]) == (-1, 5)
    dots = {name: float(y) for y, _, name in DOT.findall(picture(c, (low, high)))}
    assert list(dots) == ["embeddings.sum", "embeddings", "layers.0.q"]
    assert dots["embeddings.sum"] > dots["layers.0.q"] > dots["embeddings"]
    assert "circle" not in picture(Comparison("sdpa", "fp16", "packed", []), (low, high))


def test_a_gradient_that_is_zero_has_a_footnote() -> None:
    zero, other = row_of("gradient:bert.k.bias", 3e9, 2e9), row_of("logits", 1e-7)
    zero = replace(zero, ulps=1_576_487_936)
    report = str(Comparison("sdpa", "fp32", "packed", [other, zero]))
    (line,) = [line for line in report.splitlines() if "k.bias" in line]
    assert line.split()[2:] == ["0.0e+00", "*", "*", "*", "*", "0.75"]
    assert "1576487936" not in report
    assert f"* {VANISHES.format(who='minibert')}" in " ".join(report.split())
    assert "zero, or nearly" not in str(Comparison("sdpa", "fp32", "packed", [other]))
    for column in COLUMNS:
        assert re.search(rf"^ +{re.escape(column)}  \w", report, re.MULTILINE)


def test_fused_attention_is_held_to_a_bounded_error(tiny: Path, capsys, monkeypatch) -> None:
    """sdpa, one sentence at a time, stands in for the kernel, which needs a GPU."""

    def attend(q_NHK, k_NHK, v_NHK, starts, max_length, dropout_p=0.0):
        parts = [x.split(starts.diff().tolist()) for x in (q_NHK, k_NHK, v_NHK)]
        return torch.cat(
            [
                F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part)).transpose(0, 1)
                for part in zip(*parts)
            ]
        )

    monkeypatch.setattr(fused, "choose", lambda name, *_: Chosen(name, "a stand-in"))
    monkeypatch.setattr(cuda, "attend_packed", attend)
    for c in compare(tiny, TEXTS, attn=["fused"], dtypes=["fp32", "bf16"]):
        assert c.kept, (c.title, str(c.first_broken))
        assert c.promise.startswith("error within 2x")
        assert [row.name for row in c.rows if row.name in COMPARED] == COMPARED
        assert not any(row.name.startswith("dropout") for row in c.rows)
    half = cuda.attend_packed
    monkeypatch.setattr(cuda, "attend_packed", lambda *args: half(*args) * (1 + 1e-4))
    for c in compare(tiny, TEXTS, attn=["fused"], dtypes=["fp32"]):
        assert c.first_broken.name == "layers.0.context"


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests machines without a GPU")
@pytest.mark.parametrize("chosen", [["--attn", "fused"], ["--device", "cuda"]])
def test_without_a_gpu_it_says_so(chosen: list[str], tiny: Path, capsys) -> None:
    assert main(["parity", str(tiny), *chosen]) == 2
    error = capsys.readouterr().err
    assert "CUDA" in error
    assert error.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_promise_is_kept_on_a_gpu(minilm: Path) -> None:
    for c in compare(minilm, TEXTS, attn=["eager", "sdpa", "fused"], device="cuda"):
        assert c.kept, (c.title, str(c.first_broken))


def test_what_cannot_be_compared_is_an_error(tiny: Path, capsys, monkeypatch) -> None:
    assert main(["parity", str(tiny), "x" * 10 + " y" * 60]) == 2
    assert "text 1: 72 word-pieces, but the model has 64 positions" in capsys.readouterr().err
    with pytest.raises(MinibertError, match="no text"):
        compare(tiny, [])
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["parity", str(tiny)]) == 2
    error = capsys.readouterr().err
    assert "pip install 'transformers>=5'" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_minilm(minilm: Path) -> None:
    texts = DEFAULT_TEXTS[:2]
    padded, packed = compare(minilm, texts, attn=["eager"], dtypes=["fp32"])
    assert padded.kept
    assert packed.kept, str(packed.first_broken)
    assert len(padded.rows) == 75 + 3 * 103  # 2 + 6 * 12 + 1 intermediates, 103 parameters


DTYPE = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


@given(dtype=DTYPE, start=st.floats(-1e-3, 1e-3), steps=st.integers(0, 40))
def test_ulps_count_the_steps_between_two_numbers(dtype, start: float, steps: int) -> None:
    a = torch.tensor([start]).to(dtype)
    b = a.clone()
    for _ in range(steps):
        if dtype in (torch.float64, torch.float32):
            b = torch.nextafter(b, torch.tensor([1.0], dtype=dtype))
        else:  # torch has no nextafter for these: the neighbour is the next bit pattern
            bits = b.view(torch.int16)
            zero_next = torch.zeros_like(bits) + 1
            up = torch.where(b == 0, zero_next, torch.where(b > 0, bits + 1, bits - 1))
            b = up.view(dtype)
    assert ulps.ulps(a, b) == ulps.ulps(b, a) == steps


def test_nan_and_infinity() -> None:
    nan, one = torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0])
    assert ulps.ulps(nan, nan) == 0
    assert ulps.max_abs(nan, nan) == 0
    assert ulps.ulps(nan, one) == -1
    assert ulps.max_abs(nan, one) == float("inf")
    assert ulps.relative_error(nan, one) == float("inf")
    assert ulps.ulps(torch.tensor([-0.0]), torch.tensor([0.0])) == 0
    most = torch.tensor([torch.finfo(torch.float64).max], dtype=torch.float64)
    assert ulps.ulps(most, -most) == 2**63 - 1
    assert ulps.relative_error(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0])) == (
        pytest.approx(0.08, rel=1e-6)
    )
