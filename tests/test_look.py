"""The view of a text shows what the model computed, each number in its place."""

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
from safetensors.torch import load_file

import minibert
from minibert import BertForMaskedLM, Tagger, Tokenizer
from minibert.cli import main
from minibert.files import MinibertError
from minibert.pretrained import weights
from minibert.study.look import Untagged, look, terminal, window_note
from minibert.study.look_page import page, quantised
from minibert.study.look_png import write_png
from minibert.tagging.words import split
from minibert.text.batches import examples_of, packed
from tests.builders import LABELS, PIECES, small_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "Who directed Zimmermann's film?"
HOSTILE = (
    "</script><script>document.title='run'</script> <img src=x onerror=alert(1)> <!-- \" ' & "
    "مرحبا שלום \u202eabc\u0000 \u2028 日本語 🎬 \ud800 end"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("checkpoint"), words=("'", "?"))


def tagger_of(folder: Path, attn: str = "auto", pack: bool = True) -> Tagger:
    return Tagger.from_pretrained(
        folder, attn_implementation=attn, dtype="fp32", device="cpu", pack=pack, prepack=False
    )


@pytest.fixture(scope="module")
def tagger(checkpoint: Path) -> Tagger:
    return tagger_of(checkpoint)


def data_of(html: str) -> dict:
    """What a browser hands to the page's script."""
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL).group(1))


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_what_is_shown_is_what_was_computed(checkpoint: Path, attn: str, pack: bool) -> None:
    tagger = tagger_of(checkpoint, attn, pack)
    view = look(tagger, TEXT)
    (example,) = examples_of([split(TEXT).words], tagger.tokenizer, 64)
    with torch.no_grad(), minibert.trace(tagger.model) as t:
        logits = tagger.model(**packed([example]).inputs).logits
    assert (view.attn, view.dtype) == (attn, "fp32")
    assert view.layout == ("packed" if pack else "padded")
    assert len(view.maps) == 2
    for i, maps in enumerate(view.maps):
        torch.testing.assert_close(maps, t[f"layers.{i}.probs"][0])
    assert len(view.predictions) == 3
    hidden = [t["embeddings"], *(t[f"layers.{i}.ffn_norm"] for i in range(2))]
    for predicted, x_ND in zip(view.predictions, hidden):
        best = tagger.model.head(x_ND).softmax(-1).max(-1)
        assert [label.name for label in predicted] == [LABELS[i] for i in best.indices]
        assert [label.score for label in predicted] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert [label.name for label in view.predictions[-1]] == [LABELS[i] for i in logits.argmax(1)]
    assert view.entities == tagger(TEXT)


def masked_reader(folder: Path, kind: type, **changes) -> Untagged:
    small_checkpoint(folder, kind, **changes)
    model = BertForMaskedLM.from_pretrained(folder, attn_implementation="sdpa")
    return Untagged(model, Tokenizer.from_pretrained(folder))


def test_a_masked_language_model_shows_the_best_pieces_by_layer(tmp_path: Path) -> None:
    reader = masked_reader(tmp_path, BertForMaskedLM)
    view = look(reader, "who [MASK] jaws?")
    assert look(reader, "who<mask>jaws?").ids == view.ids
    assert view.masks == [4]
    assert view.pieces == [
        "[CLS]",
        *["w", "##h", "##o", "[MASK]", "j", "##a", "##w", "##s", "[UNK]", "[SEP]"],
    ]
    with torch.no_grad(), minibert.trace(reader.model) as t:
        logits_SV = reader.model(torch.tensor([view.ids])).logits[0]
        embedded_SV = reader.model.head(t["embeddings"][0])
    for layer, scores_SV in ((0, embedded_SV), (2, logits_SV)):
        best = scores_SV.softmax(-1).topk(5)
        for place, found in enumerate(view.best[layer]):
            assert [p.name for p in found] == [PIECES[i] for i in best.indices[place]]
            assert [p.score for p in found] == pytest.approx(best.values[place].tolist(), abs=1e-5)
            assert view.predictions[layer][place] == found[0]
    assert (view.labels, view.entities, view.label_names) == ([], [], ())
    assert "[MASK] at 4\n" in terminal(view)
    data = data_of(page("model", view))
    assert data["start"] == 4
    assert data["best"][2][4][0][0] == PIECES[logits_SV[4].argmax()]


def test_an_encoder_alone_shows_attention(tmp_path: Path) -> None:
    reader = masked_reader(tmp_path, BertForMaskedLM)
    expected = look(reader, TEXT)
    whole = load_file(tmp_path / weights.WEIGHTS)
    body = {name: x.clone() for name, x in whole.items() if name.startswith("bert.")}
    weights.write(tmp_path / weights.WEIGHTS, body, {"format": "pt"})
    model = BertForMaskedLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    view = look(Untagged(model, reader.tokenizer), TEXT)
    assert all(map(torch.equal, view.maps, expected.maps))
    assert expected.predictions
    assert not view.predictions
    assert not view.best
    assert terminal(view) == "no head, so no predictions: --html or --png shows attention"
    assert data_of(page("model", view))["predictions"] == []


def test_the_tables_fit_the_terminal(tmp_path: Path) -> None:
    small_checkpoint(tmp_path, num_hidden_layers=12)
    view = look(tagger_of(tmp_path), TEXT)
    lines = terminal(view).splitlines()
    assert max(map(len, lines)) <= 80
    found = [name for line in lines for name in re.findall(r"layer \d+|label|embeddings", line)]
    assert found == ["embeddings", *(f"layer {i}" for i in range(12)), "label"]


def test_pieces_belong_to_their_words(tagger: Tagger) -> None:
    view = look(tagger, TEXT)
    words = ["Who", "directed", "Zimmermann's", "film", "?"]
    assert view.words == words
    assert (view.pieces[0], view.pieces[-1]) == ("[CLS]", "[SEP]")
    assert view.word_of[0] is view.word_of[-1] is None
    for number, word in enumerate(words):
        own = [p for p, of in zip(view.pieces, view.word_of) if of == number]
        assert "".join(piece.removeprefix("##") for piece in own) == word.lower()
        assert view.word_of[view.firsts[number]] == number
        assert view.word_of[view.firsts[number] - 1] != number
    assert len(view.firsts) == len(words)
    assert view.ids == [tagger.tokenizer.backend.token_to_id(piece) for piece in view.pieces]


def test_a_long_text_is_shown_by_window(tagger: Tagger) -> None:
    text = " ".join(f"{a}{b}" for a in "abcdefghijkl" for b in "uvwxyz")  # 72 words of two pieces
    first, second = look(tagger, text), look(tagger, text, window=2)
    assert len(first.pieces) == 64
    assert first.windows > 2
    assert window_note(first) == (
        "The text is longer than the model: this is window 1 of "
        f"{first.windows}, which labels words 1 to {first.word_of[first.firsts[-1]] + 1} of 72 "
        "(--window shows another)"
    )
    views = [look(tagger, text, number + 1) for number in range(first.windows)]
    own = [[w for w in view.word_of if w is not None] for view in views]
    firsts = [word for words in own for word in dict.fromkeys(words)]
    assert firsts == list(range(72))  # every word in one window, in order
    data = data_of(page("x", second))
    assert data["window"] == window_note(second)
    assert "".join(part for part, *_ in data["segments"]) == text
    start, here = 0, range(second.spans[own[1][0]][0], second.spans[own[1][-1]][1])
    for part, is_here, *_ in data["segments"]:
        assert is_here == (start in here)
        start += len(part)
    assert len({is_here for _, is_here, *_ in data["segments"]}) == 2
    assert window_note(look(tagger, TEXT)) is None
    assert terminal(second).endswith(window_note(second))


@pytest.mark.parametrize(("text", "window"), [("", 1), (" \n ", 1), (TEXT, 2), (TEXT, 0)])
def test_what_cannot_be_shown_is_an_error(tagger: Tagger, text: str, window: int) -> None:
    with pytest.raises(MinibertError, match=r"give a sentence|give one from 1 to 1"):
        look(tagger, text, window)


@given(p=st.floats(0, 1), levels=st.sampled_from([63, 255]))
def test_the_rounding_error_is_as_stated_on_the_page(p: float, levels: int) -> None:
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
    assert data["facts"].startswith("<title> · 2 layers of 3 heads")
    assert html.count("<script") == html.count("</script>") == 2


def test_the_command(checkpoint: Path, tagger: Tagger, tmp_path: Path, capsys, monkeypatch) -> None:
    chosen = ["--dtype", "fp32", "--device", "cpu"]
    assert main(["trace", str(checkpoint), *TEXT.split(), *chosen]) == 0
    out = capsys.readouterr().out
    sentence, table = out.split("\n\n")
    assert re.sub(r"\[(.*?) [A-Z_]+ [\d.]+\]", r"\1", sentence) == TEXT
    rows = table.splitlines()
    assert re.split(r"  +", rows[0]) == ["piece", "embeddings", "layer 0", "layer 1", "label"]
    assert [row.split()[0] for row in rows[1:]] == look(tagger, TEXT).pieces
    html, png = tmp_path / "a.html", tmp_path / "a.png"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    chosen = ["trace", str(checkpoint), *chosen]
    assert main([*chosen, "--html", str(html), "--png", str(png), "--layer", "1"]) == 0
    assert capsys.readouterr().out == ""
    assert data_of(html.read_text())["pieces"][0] == "[CLS]"
    assert png.read_bytes().startswith(b"\x89PNG")
    for wrong, message in (
        (["--layer", "1"], "add --png FILE"),
        (["--png", str(png), "--head", "3"], "head 3: the model has 3: give 0 to 2"),
        (["--window", "2"], "window 2: the text has 1"),
    ):
        assert main(["trace", str(checkpoint), "a", *wrong]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_the_picture_shows_a_weight_in_its_place(tagger: Tagger, tmp_path: Path) -> None:
    view = look(tagger, "a $b$ costs $5 _or_ 日本")  # dollar signs are not mathematics
    S = len(view.pieces)
    view.maps[1][2].zero_()[1, S - 2] = 1.0
    write_png(view, tmp_path / "one.png", layer=1, head=2)
    pixels = torch.tensor(matplotlib.image.imread(tmp_path / "one.png")[:, :, :3])
    height, width = pixels.shape[0], pixels.shape[1]

    def places(colour: list[int], rows: int, columns: int) -> torch.Tensor:
        gap = (pixels[:rows, :columns] - torch.tensor(colour) / 255).abs().sum(-1)
        return (gap < 0.02).nonzero().float()

    # The colour bar is half as high as the map: the top quarter and left half hold the map only.
    y, x = places([8, 48, 107], height // 4, width).mean(0)  # the colour of weight 1
    white = [247, 251, 255]  # of weight 0
    left, right = places(white, height // 4, width)[:, 1].aminmax()
    top, bottom = places(white, height, width // 2)[:, 0].aminmax()
    assert (y - top) / (bottom - top) == pytest.approx(1.5 / S, abs=0.02)
    assert (x - left) / (right - left) == pytest.approx((S - 1.5) / S, abs=0.02)
    write_png(view, tmp_path / "all.png")
    shape = matplotlib.image.imread(tmp_path / "all.png").shape
    assert shape[1] > shape[0] > 300  # two rows of three maps


def test_without_matplotlib_it_says_what_to_install(tagger: Tagger, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MinibertError, match="pip install matplotlib"):
        write_png(look(tagger, TEXT), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
