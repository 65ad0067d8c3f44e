"""What a notebook shows inline."""

from __future__ import annotations

import copy
import html
import json
import pickle
import pydoc
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from builders import small_checkpoint

import minibert
from minibert import Tagger
from minibert.study.look import look
from minibert.study.look_page import page
from minibert.tagging.words import Entities, Entity
from minibert.training.loss_curve import Curve

TEXT = "a <b> & c"
FOUND = Entities(TEXT, [Entity("<b>", "X&Y", 2, 5, 0.5)])


@pytest.fixture(scope="module")
def tagger(tmp_path_factory) -> Tagger:
    folder = small_checkpoint(tmp_path_factory.mktemp("model"))
    return Tagger.from_pretrained(folder, dtype="fp32", prepack=False)


def test_entities_are_marked_in_their_text(tagger: Tagger) -> None:
    shown = ET.fromstring(FOUND._repr_html_())
    assert "".join(shown.itertext()) == "a <b> X&Y 0.50 & c"
    assert [mark.text for mark in shown.iter("mark")] == ["<b> "]
    one, several = tagger("abc def"), tagger(["abc def", ""])
    assert one == list(one)
    assert "".join(ET.fromstring(one._repr_html_()).itertext()).startswith("abc" if one else "")
    assert several[1]._repr_html_() == '<p dir="auto"></p>'
    for twin in (copy.deepcopy(FOUND), pickle.loads(pickle.dumps(FOUND))):
        assert (twin, twin.text) == (FOUND, TEXT)
    assert json.loads(json.dumps(FOUND)) == [["<b>", "X&Y", 2, 5, 0.5]]


def test_a_view_is_its_page_in_a_frame(tagger: Tagger) -> None:
    view = look(tagger, "abc <def>")
    frame = view._repr_html_()
    (source,) = re.findall(r'srcdoc="([^"]*)"', frame)
    assert html.unescape(source) == page("minibert", view)
    assert 'sandbox="allow-scripts"' in frame


def test_a_curve_is_drawn(tmp_path: Path) -> None:
    log = [{"step": 1, "epoch": 1, "loss": 2.0}, {"step": 2, "epoch": 1, "loss": None}]
    log += [{"step": 3, "epoch": 1, "loss": 1.0}, {"step": 3, "set": "dev", "entity_f1": 0.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    curve = Curve.of_run(tmp_path)
    assert curve == Curve([2.0, 1.0], [(3, 25.0)])
    drawing = ET.fromstring(f"<div>{curve._repr_html_()}</div>")
    assert drawing.find("svg/polyline").get("points") == "0.0,0.0 600.0,100.0"
    assert drawing.find("p").text == "entity F1: 25.00 % after step 3"
    assert "training loss" in "".join(drawing.itertext())
    assert str(curve).count("\n") == 9
    ET.fromstring(Curve([], [])._repr_html_())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t([None]), "a text must be a str, got NoneType: leave it out"),
        (lambda t: t([["who"]]), "a text must be a str, got list: give words to tag_words"),
        (lambda t: list(t.tag_words([None])), "a list of words, got NoneType"),
        (lambda t: list(t.tag_words([["a", None]])), "a word must be a str, got NoneType: leave"),
        (lambda t: list(t.label([["a", None]])), "a word must be a str, got NoneType"),
        (lambda t: list(t.label(["a text"])), "a list of words, got str: give texts to tag_texts"),
    ],
)
def test_what_is_no_text_is_said(tagger: Tagger, call, message: str) -> None:
    with pytest.raises(TypeError) as raised:
        call(tagger)
    assert message in str(raised.value)


def test_help_shows_the_api() -> None:
    overview = minibert.__doc__ or ""
    shown = pydoc.plain(pydoc.render_doc(minibert))
    for name in minibert.__all__:
        assert re.search(rf"\b{name}\b", overview), name
        assert re.search(rf"(class|{name} =|\n    {name}\(|minibert[\w.]*\.{name})", shown), name
