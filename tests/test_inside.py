"""What is shown of a text is what the model computed, and belongs where it stands."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minibert
from minibert import BertForTokenClassification, Tagger
from minibert.cli import main
from minibert.files import MinibertError
from minibert.study.look import look, shown, terminal
from minibert.study.look_page import page, quantised
from minibert.study.look_png import write_png
from minibert.tagging.words import split
from minibert.text.batches import examples_of, packed

LABELS = ["O", "B-TITLE", "I-TITLE", "B-ACTOR", "I-ACTOR", "B-RATINGS_AVERAGE"]
TEXT = "Who directed Zimmermann's film?"
HOSTILE = (
    "</script><script>document.title='run'</script> <img src=x onerror=alert(1)> <!-- \" ' & "
    "مرحبا שלום \u202eabc\u0000 \u2028 日本語 🎬 \ud800 end"
)


@pytest.fixture(scope="session")
def trained(minilm: Path, tmp_path_factory) -> Path:
    """MiniLM with a classifier as it was drawn: what it says is arbitrary, but all is there."""
    folder = tmp_path_factory.mktemp("trained")
    model = BertForTokenClassification.from_pretrained(minilm, labels=LABELS, seed=1)
    with torch.no_grad():
        model.head.classifier.weight.mul_(20)  # sure enough of itself to have entities
    model.save_pretrained(folder)
    Tagger(model, minibert.Tokenizer.from_pretrained(minilm)).tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tagger(trained: Path) -> Tagger:
    return Tagger.from_pretrained(trained, dtype="fp32", device="cpu", prepack=False)


def data_of(html: str) -> dict:
    """What a browser would hand to the page's script."""
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL).group(1))


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_what_is_shown_is_what_was_computed(trained: Path, attn: str, pack: bool) -> None:
    tagger = Tagger.from_pretrained(
        trained, attn_implementation=attn, dtype="fp32", device="cpu", pack=pack, prepack=False
    )
    inside = look(tagger, TEXT)
    (example,) = examples_of([split(TEXT).words], tagger.tokenizer, 512)
    with torch.no_grad(), minibert.trace(tagger.model) as t:
        logits = tagger.model(**packed([example]).inputs).logits
    assert (inside.attn, inside.dtype) == (attn, "fp32")
    assert inside.layout == ("packed" if pack else "padded")
    assert len(inside.maps) == 6
    for i, maps in enumerate(inside.maps):
        torch.testing.assert_close(maps, t[f"layers.{i}.probs"][0])
    assert len(inside.predictions) == 7
    hidden = [t["embeddings"], *(t[f"layers.{i}.ffn_norm"] for i in range(6))]
    for said, x_ND in zip(inside.predictions, hidden):
        best = tagger.model.head.classifier(x_ND).softmax(-1).max(-1)
        assert [label.name for label in said] == [LABELS[i] for i in best.indices]
        assert [label.score for label in said] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert [label.name for label in inside.predictions[-1]] == [LABELS[i] for i in logits.argmax(1)]
    assert inside.entities == tagger(TEXT)


def test_pieces_belong_to_their_words(tagger: Tagger) -> None:
    inside = look(tagger, TEXT)
    words = ["Who", "directed", "Zimmermann's", "film", "?"]
    assert inside.words == words
    assert (inside.pieces[0], inside.pieces[-1]) == ("[CLS]", "[SEP]")
    assert inside.word_of[0] is inside.word_of[-1] is None
    for number, word in enumerate(words):
        own = [p for p, of in zip(inside.pieces, inside.word_of) if of == number]
        assert "".join(piece.removeprefix("##") for piece in own) == word.lower()
        assert inside.word_of[inside.firsts[number]] == number
        assert inside.word_of[inside.firsts[number] - 1] != number
    assert len(inside.firsts) == len(words)
    assert inside.ids == [tagger.tokenizer.backend.token_to_id(piece) for piece in inside.pieces]


def test_a_long_text_is_shown_by_window(tagger: Tagger) -> None:
    text = " ".join(f"word{i}" for i in range(280))
    first, second = look(tagger, text), look(tagger, text, window=2)
    count = first.window.count
    assert 505 < len(first.pieces) <= 512
    assert shown(first) == (
        f"The text is longer than the model: this is window 1 of {count}, which answers for words "
        f"1 to {first.word_of[first.firsts[-1]] + 1} of 280 (--window shows another)"
    )
    own = [w for number in range(count) for w in look(tagger, text, number + 1).word_of]
    assert {w for w in own if w is not None} == set(range(280))
    assert max(w or 0 for w in first.word_of) + 1 == min(w for w in second.word_of if w is not None)
    data = data_of(page("x", second))
    assert data["window"] == shown(second)
    here = "".join(part for part, own, *_ in data["segments"] if own)
    mine = [word for word in second.word_of if word is not None]
    assert here.split()[1:-1] == second.words[mine[0] + 1 : mine[-1]]
    assert "".join(part for part, *_ in data["segments"]) == text
    assert shown(look(tagger, TEXT)) is None
    assert terminal(second).endswith(shown(second))


@pytest.mark.parametrize(("text", "window"), [("", 1), (" \n ", 1), (TEXT, 2), (TEXT, 0)])
def test_what_cannot_be_shown_is_said(tagger: Tagger, text: str, window: int) -> None:
    with pytest.raises(MinibertError, match="give a"):
        look(tagger, text, window)


@given(p=st.floats(0, 1), levels=st.sampled_from([63, 255]))
def test_weights_are_rounded_by_no_more_than_the_page_says(p: float, levels: int) -> None:
    code = quantised(torch.tensor([p]), levels).item()
    assert abs((code / levels) ** 2 - p) <= p**0.5 / levels + 1 / (4 * levels**2) + 1e-6
    assert abs((code / levels) ** 2 - p) <= 1 / levels


def test_a_hostile_text_stays_a_text(tagger: Tagger) -> None:
    html = page("<title>", look(tagger, HOSTILE))
    raw = re.search(r'id="data">(.*?)</script>', html, re.DOTALL).group(1)
    assert raw.isascii()
    assert "<" not in raw
    data = json.loads(raw)
    assert "".join(part for part, *_ in data["segments"]) == HOSTILE
    assert data["facts"].startswith("<title> · 6 layers of 12 heads")
    assert html.count("<script") == html.count("</script>") == 2


def test_the_command(trained: Path, tagger: Tagger, tmp_path: Path, capsys, monkeypatch) -> None:
    chosen = ["--dtype", "fp32", "--device", "cpu"]
    assert main(["trace", str(trained), *TEXT.split(), *chosen]) == 0
    out = capsys.readouterr().out
    sentence, table = out.split("\n\n")
    assert re.sub(r"\[(.*?) [A-Z_]+ [\d.]+\]", r"\1", sentence) == TEXT
    rows = table.splitlines()
    layers = [f"layer {i}" for i in range(6)]
    assert re.split(r"  +", rows[0]) == ["piece", "embeddings", *layers, "label"]
    assert [row.split()[0] for row in rows[1:]] == look(tagger, TEXT).pieces
    html, png = tmp_path / "a.html", tmp_path / "a.png"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    chosen = ["trace", str(trained), *chosen]
    assert main([*chosen, "--html", str(html), "--png", str(png), "--layer", "1"]) == 0
    assert capsys.readouterr().out == ""
    assert data_of(html.read_text())["pieces"][0] == "[CLS]"
    assert png.read_bytes().startswith(b"\x89PNG")
    for wrong, message in (
        (["--layer", "1"], "add --png FILE"),
        (["--png", str(png), "--head", "12"], "head 12: the model has 12: give 0 to 11"),
        (["--window", "2"], "window 2: the text has 1"),
    ):
        assert main(["trace", str(trained), "a", *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_the_picture_has_a_weight_where_it_is(tagger: Tagger, tmp_path: Path) -> None:
    inside = look(tagger, "a $b$ costs $5 _or_ 日本")  # dollars are no mathematics
    S = len(inside.pieces)
    inside.maps[2][3].zero_()[1, S - 2] = 1.0
    write_png(inside, tmp_path / "one.png", layer=2, head=3)
    pixels = torch.tensor(matplotlib.image.imread(tmp_path / "one.png")[:, :, :3])
    height, width = pixels.shape[0], pixels.shape[1]

    def places(colour: list[int], rows: int, columns: int) -> torch.Tensor:
        gap = (pixels[:rows, :columns] - torch.tensor(colour) / 255).abs().sum(-1)
        return (gap < 0.02).nonzero().float()

    # The bar beside the map is half as high: above it, and left of it, is the map alone.
    y, x = places([8, 48, 107], height // 4, width).mean(0)  # where the colours end
    left, right = places([247, 251, 255], height // 4, width)[
        :, 1
    ].aminmax()  # and where they begin
    top, bottom = places([247, 251, 255], height, width // 2)[:, 0].aminmax()
    assert (y - top) / (bottom - top) == pytest.approx(1.5 / S, abs=0.02)
    assert (x - left) / (right - left) == pytest.approx((S - 1.5) / S, abs=0.02)
    write_png(inside, tmp_path / "all.png")
    assert matplotlib.image.imread(tmp_path / "all.png").shape[1] > 1000


def test_without_matplotlib_it_says_what_to_install(tagger: Tagger, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MinibertError, match=r"pip install 'minibert\[plot\]'"):
        write_png(look(tagger, TEXT), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
