"""RoBERTa and ERNIE: every naming, positions, the tokenizer, and the tools around the model.

Bit equality with transformers is in test_parity.py and test_training.py, packed against padded
batches in test_packing.py.
"""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from builders import LABELS, SMALL_FAMILIES, small_bert, small_checkpoint, twin, write_bio
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from training_runs import Run

import minibert
from minibert import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    MinibertError,
    Tagger,
    Tokenizer,
)
from minibert.files import write_text
from minibert.pretrained import config_json, hub, load
from minibert.speed import prepacked
from minibert.study.look import Untagged, look, terminal
from minibert.study.published import check_scores, fill_mask
from minibert.text import demo

KINDS = pytest.mark.parametrize("kind", [BertForTokenClassification, BertForMaskedLM])
FAMILY = pytest.mark.parametrize("family", SMALL_FAMILIES)
SENTENCES = [
    "who directed the frozen station with irene zimmer",
    "show me a black and white film from the 1950s, rated at least 7.5",
    "Hello I'm a <mask> model.",
    "the man worked as a doctor; they said it wasn't so",
]


# Checkpoints


def header(family: str, config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the published files of roberta-base and ernie-2.0-base-en."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    prefix, head = {"roberta": ("roberta", "lm_head"), "ernie": ("bert", "cls.predictions")}[family]
    old = family == "ernie"  # converted with the names of TensorFlow
    transform = "cls.predictions.transform." if old else "lm_head."
    rows = {
        "word_embeddings": V,
        "position_embeddings": config.max_position_embeddings,
        "token_type_embeddings": config.type_vocab_size,
    }
    shapes = {f"{prefix}.embeddings.{name}.weight": (n, D) for name, n in rows.items()}
    shapes[f"{head}.bias"] = (V,)
    linears = {transform + "dense": (D, D)} | ({f"{prefix}.pooler.dense": (D, D)} if old else {})
    norms = [f"{prefix}.embeddings.LayerNorm", transform + ("LayerNorm" if old else "layer_norm")]
    for layer in (f"{prefix}.encoder.layer.{i}" for i in range(config.num_hidden_layers)):
        linears |= {f"{layer}.attention.self.{name}": (D, D) for name in ("query", "key", "value")}
        linears[f"{layer}.attention.output.dense"] = (D, D)
        linears[f"{layer}.intermediate.dense"] = (F, D)
        linears[f"{layer}.output.dense"] = (D, F)
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {
            f"{name}.{part}": (D,) for part in (("gamma", "beta") if old else ("weight", "bias"))
        }
    return shapes


ROBERTA_BASE = """{
  "architectures": [
    "RobertaForMaskedLM"
  ],
  "attention_probs_dropout_prob": 0.1,
  "bos_token_id": 0,
  "eos_token_id": 2,
  "hidden_act": "gelu",
  "hidden_dropout_prob": 0.1,
  "hidden_size": 768,
  "initializer_range": 0.02,
  "intermediate_size": 3072,
  "layer_norm_eps": 1e-05,
  "max_position_embeddings": 514,
  "model_type": "roberta",
  "num_attention_heads": 12,
  "num_hidden_layers": 12,
  "pad_token_id": 1,
  "type_vocab_size": 1,
  "vocab_size": 50265
}
"""
ERNIE_BASE = json.dumps(
    {
        "model_type": "ernie",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "type_vocab_size": 4,
        "vocab_size": 30522,
    }
)


def official(folder: Path, family: str, **smaller: int) -> Path:
    """A checkpoint with a published header, or the same names and smaller shapes."""
    raw = json.loads({"roberta": ROBERTA_BASE, "ernie": ERNIE_BASE}[family]) | smaller
    write_text(folder / "config.json", json.dumps(raw))
    config = config_json.read(folder / "config.json")
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=draw) * 0.02
        for name, shape in header(family, config).items()
    }
    if family == "roberta":
        positions = torch.arange(config.max_position_embeddings)[None]
        tensors["roberta.embeddings.position_ids"] = positions
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


SMALLER = {"hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 2, "vocab_size": 100}


@pytest.mark.parametrize("smaller", [SMALLER, pytest.param({}, marks=pytest.mark.slow)])
def test_the_official_roberta_loads_whole(tmp_path: Path, smaller: dict) -> None:
    folder = official(tmp_path, "roberta", **smaller)
    if not smaller:
        pins = {pin.name: pin for pin in hub.MODELS["roberta-base"].files}
        published = pins["model.safetensors"].size
        assert abs((folder / "model.safetensors").stat().st_size - published) < 4096
        (folder / "config.json").write_text(ROBERTA_BASE)
        hub._check(folder / "config.json", pins["config.json"])
    model = BertForMaskedLM.from_pretrained(folder)
    assert model.load_report == load.LoadReport((), ())
    raw = load_file(folder / "model.safetensors")
    assert len(raw) == (203 if not smaller else 43)
    assert torch.equal(model.head.norm.weight, raw["lm_head.layer_norm.weight"])
    classifier = BertForTokenClassification.from_pretrained(folder, labels=LABELS, seed=0)
    assert classifier.load_report.initialised == ("classifier.weight", "classifier.bias")
    assert all(name.startswith("lm_head.") for name in classifier.load_report.unused)
    assert len(classifier.load_report.unused) == 5
    theirs, info = transformers.RobertaForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    ids = torch.tensor([[0, 31, 4, 1, 9, 2, 1, 1]])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("smaller", [SMALLER, pytest.param({}, marks=pytest.mark.slow)])
def test_the_official_ernie_loads_whole(tmp_path: Path, smaller: dict) -> None:
    folder = official(tmp_path, "ernie", **smaller)
    model = BertForMaskedLM.from_pretrained(folder)
    pooler = ("ernie.pooler.dense.bias", "ernie.pooler.dense.weight")
    assert model.load_report == load.LoadReport(pooler, ())
    raw = load_file(folder / "model.safetensors")
    assert torch.equal(model.bert.embeddings.norm.bias, raw["bert.embeddings.LayerNorm.beta"])


def renamed(folder: Path, rename: Callable[[str], str]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    tensors = {rename(name): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@KINDS
@FAMILY
@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"),
        lambda name: name.removeprefix("roberta.").removeprefix("ernie."),
        lambda name: name.replace("ernie.", "bert."),
    ],
    ids=["gamma and beta", "no prefix", "bert."],
)
def test_every_naming_loads(family: str, kind: type, rename, tmp_path: Path) -> None:
    saved = small_bert(kind, **SMALL_FAMILIES[family])
    saved.save_pretrained(tmp_path)
    model = kind.from_pretrained(renamed(tmp_path, rename))
    assert model.config == saved.config
    assert model.load_report == load.LoadReport((), ())
    for (name, a), b in zip(model.named_parameters(), saved.parameters()):
        assert torch.equal(a, b), name


@KINDS
@FAMILY
def test_directories_open_on_both_sides(family: str, kind: type, tmp_path: Path) -> None:
    ours = small_bert(kind, **SMALL_FAMILIES[family])
    ours.save_pretrained(tmp_path / "ours")
    auto = getattr(transformers, kind.__name__.replace("Bert", "AutoModel"))
    theirs, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(theirs) is type(twin(ours))
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.config.model_type == ours.config.model_type
    theirs.save_pretrained(tmp_path / "theirs")
    again = kind.from_pretrained(tmp_path / "theirs")
    assert again.config == ours.config
    assert again.load_report == load.LoadReport((), ())
    ids = torch.tensor([[2, 20, 1, 0, 28, 16, 3]])
    with torch.inference_mode():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)
        assert torch.equal(again(ids).logits, ours(ids).logits)


def test_a_tied_decoder_that_differs_is_refused(tmp_path: Path) -> None:
    small_bert(BertForMaskedLM, **SMALL_FAMILIES["RoBERTa"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    word = tensors["roberta.embeddings.word_embeddings.weight"]
    for decoder, refused in ((word.clone(), False), (word + 1, True)):
        both = tensors | {"lm_head.decoder.weight": decoder}
        save_file(both, tmp_path / "model.safetensors", metadata={"format": "pt"})
        if refused:
            with pytest.raises(MinibertError, match=r"lm_head.decoder.weight differs from roberta"):
                BertForMaskedLM.from_pretrained(tmp_path)
        else:
            BertForMaskedLM.from_pretrained(tmp_path)


# The model


def test_positions_of_roberta() -> None:
    """They begin after the padding id and count what is not padding, whatever the mask says."""
    net = small_bert(**SMALL_FAMILIES["RoBERTa"])
    table_PD = net.bert.embeddings.position.weight
    ids_BS = torch.tensor([[0, 7, 1, 9, 2, 1], [1, 1, 8, 8, 8, 8]])
    expected = torch.tensor([[2, 3, 1, 4, 5, 1], [1, 1, 2, 3, 4, 5]])
    padded = minibert.model.layout.Padded.from_mask(ids_BS, None)
    packed = minibert.Packed.from_lengths([6, 2, 4])
    positions = net.bert.embeddings.positions
    assert torch.equal(positions(ids_BS.flatten(), padded), table_PD[expected.flatten()])
    expected[1, 2:] = torch.tensor([2, 3, 4, 5])  # each row is counted from its start
    assert torch.equal(positions(ids_BS.flatten(), packed), table_PD[expected.flatten()])


def test_the_longest_sentence_of_roberta() -> None:
    net = small_bert(**SMALL_FAMILIES["RoBERTa"])
    assert net.config.max_length == 512
    net(torch.full((1, 512), 5))
    with pytest.raises(ValueError, match="a sentence of 513 tokens, but the model has 512"):
        net(torch.full((1, 513), 5))
    with pytest.raises(ValueError, match="a sentence of 513 tokens"):
        net(torch.full((513,), 5), layout=minibert.Packed.from_lengths([513]))


@FAMILY
def test_prepacked_layers_give_the_plain_ones(family: str) -> None:
    linear = prepacked.choose(torch.device("cpu"), torch.float32).value
    if linear is None:
        pytest.skip("no prepacked layers on this CPU")
    net = small_bert(**SMALL_FAMILIES[family])
    ids = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        plain = net(ids).logits
        prepacked.prepack(net, linear)
        assert (net(ids).logits - plain).abs().max() < 1e-4 * plain.abs().max()


# The tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Path:
    """tokenizer.json, vocab.json and merges.txt of a byte-level BPE trained on a few sentences."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES * 5, trainer)
    ids = backend.get_vocab()
    ids["<mask>"] = len(ids)
    folder = tmp_path_factory.mktemp("byte-level")
    write_text(folder / "vocab.json", json.dumps(ids))
    merges = json.loads(backend.to_str())["model"]["merges"]
    lines = "".join(" ".join(pair) + "\n" for pair in merges)
    write_text(folder / "merges.txt", "#version: 0.2\n" + lines)
    Tokenizer.from_pretrained(folder).save_pretrained(folder)
    return folder


def checkpoint(folder: Path, byte_level: Path, kind: type = BertForTokenClassification) -> Path:
    """A small RoBERTa with this tokenizer."""
    tokenizer = Tokenizer.from_pretrained(byte_level)
    sizes = SMALL_FAMILIES["RoBERTa"] | {"vocab_size": tokenizer.vocab_size}
    small_bert(kind, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder, for_words=kind is BertForTokenClassification)
    return folder


ODD = ["👩\u200d👩\u200d👧", "\u3000", "\xa0", "\u2028", "\t", "\x00", "\x7f", "\u200b", "\ufeff"]
ODD += ["😀", "é", "e\u0301", "ñ", "日本", "İ", "ﬁ", "<s>", "<", "pad", ">", "'s", "'S", "''"]


def odd_words(draw: random.Random) -> list[str]:
    """Words of the training text, of any characters, and what tokenizers tend to get wrong."""
    vocabulary = " ".join(SENTENCES[:2]).split() + ODD
    words = []
    for _ in range(draw.randint(1, 12)):
        word = draw.choice(vocabulary)
        if draw.random() < 0.3:
            word += "".join(
                chr(draw.choice([draw.randint(32, 0x24F), draw.randint(0x300, 0xD7FF)]))
                for _ in range(3)
            )
        words.append(word)
    return words


def test_pieces_equal_those_of_transformers(byte_level: Path, tmp_path: Path) -> None:
    """Ten thousand sentences, in words and as texts; transformers told to split special pieces."""
    tokenizer = Tokenizer.from_pretrained(byte_level)
    tokenizer.save_pretrained(tmp_path, for_words=True)
    in_words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    as_texts = transformers.AutoTokenizer.from_pretrained(byte_level)
    assert in_words.add_prefix_space
    draw = random.Random(0)
    sentences = [odd_words(draw) for _ in range(10_000)]
    expected = in_words(
        sentences, is_split_into_words=True, add_special_tokens=False, split_special_tokens=True
    )
    for i, (words, pieces) in enumerate(zip(sentences, tokenizer.pieces(sentences))):
        flat = [piece for word in pieces for piece in word]
        got = expected["input_ids"][i]
        assert flat == got, words
        owners = [word for word, ids in enumerate(pieces) for _ in ids]
        assert owners == expected.word_ids(i), words
    texts = [" ".join(words) for words in sentences[:2000]]
    for text, ids in zip(texts, as_texts(texts, split_special_tokens=True)["input_ids"]):
        assert tokenizer.encode(text) == ids, text
    masked = [*SENTENCES, "<mask>", "<mask> <mask>  <mask>.", "a<mask>b \u2028<mask> c", " <mask>"]
    for text, ids in zip(masked, as_texts(masked)["input_ids"]):
        assert tokenizer.encode(text) == ids, text


def test_three_forms_of_one_tokenizer(byte_level: Path, tmp_path: Path) -> None:
    """tokenizer.json; vocab.json and merges.txt; and what save_pretrained writes of either."""
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((byte_level / name).read_bytes())
    whole, bare = Tokenizer.from_pretrained(byte_level), Tokenizer.from_pretrained(tmp_path)
    words = [text.split() for text in SENTENCES]
    assert bare.pieces(words) == whole.pieces(words)
    assert [bare.encode(text) for text in SENTENCES] == [whole.encode(text) for text in SENTENCES]
    bare.save_pretrained(tmp_path / "again")
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert names == {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"}
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (byte_level / name).read_bytes()


def test_words_always_have_the_space_before_them(byte_level: Path, tmp_path: Path) -> None:
    """A directory that says add_prefix_space false, as roberta-base's does, is corrected."""
    tokenizer = Tokenizer.from_pretrained(byte_level)
    assert not tokenizer.prefix_space
    names = tokenizer.backend.id_to_token
    ((the,),) = tokenizer.pieces([["the"]])[0]
    assert names(the) == "Ġthe"
    assert names(tokenizer.encode("the frozen")[1]) == "the"
    for for_words, first in ((False, "the"), (True, "Ġthe")):
        tokenizer.save_pretrained(tmp_path, for_words=for_words)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        ids = theirs(["the"], is_split_into_words=True)["input_ids"]
        assert theirs.convert_ids_to_tokens(ids)[1] == first
        again = Tokenizer.from_pretrained(tmp_path)
        assert again.pieces([["the"]]) == [[[the]]]
        assert names(again.encode("the frozen")[1]) == first


def test_special_pieces_in_words_are_text(byte_level: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(byte_level)
    special = {tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id}
    words = ["<pad>", "<s>", "</s>", "<mask>", "a<pad>b", "<mask>."]
    for ids in tokenizer.pieces([words])[0]:
        assert not special & set(ids)
        assert tokenizer.unk_id not in ids
    assert special & set(tokenizer.encode("a <pad> b")[1:-1]) == set()
    assert tokenizer.pieces([["", "a"]])[0][0] == [tokenizer.unk_id]
    for copied in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert copied.pieces([words]) == tokenizer.pieces([words])
        for text in ("a <mask>", "a <pad>"):
            assert copied.encode(text) == tokenizer.encode(text)


def test_the_space_before_mask_belongs_to_it(byte_level: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(byte_level)
    ids = tokenizer.encode("a <mask> the")
    assert ids[2] == tokenizer.mask_id
    assert len(ids) == 5


def broken(folder: Path, byte_level: Path, change: Callable[[dict], object]) -> Path:
    raw = json.loads((byte_level / "tokenizer.json").read_text())
    change(raw)
    write_text(folder / "tokenizer.json", json.dumps(raw))
    return folder


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda raw: raw["model"].update(dropout=0.1), "dropout is not that of a RoBERTa"),
        (lambda raw: raw["model"].update(ignore_merges=True), "ignore_merges is not"),
        (
            lambda raw: [t.update(special=False) for t in raw["added_tokens"]],
            "ordinary text is read",
        ),
        (lambda raw: raw["pre_tokenizer"].update(use_regex=False), "use_regex is not"),
        (
            lambda raw: raw.update(normalizer={"type": "NFC"}),
            "has NFC where a RoBERTa has NoneType",
        ),
        (
            lambda raw: raw.update(pre_tokenizer={"type": "Whitespace"}),
            "where a RoBERTa has ByteLev",
        ),
        (lambda raw: raw["model"]["vocab"].pop("ß"), "lacks 1 of 256 bytes, such as 'ß'|not a tok"),
    ],
)
def test_other_byte_pair_encodings_are_refused(
    byte_level: Path, tmp_path: Path, change, match: str
) -> None:
    with pytest.raises(MinibertError, match=match):
        Tokenizer.from_pretrained(broken(tmp_path, byte_level, change))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("merges.txt", "#version: 0.2\na b c\n", "merges.txt:2: 'a b c' is not two pieces"),
        ("merges.txt", "#version: 0.2\nzz qq\n", "vocab.json: not a tokenizer"),
        ("vocab.json", "[]", "vocab.json"),
        ("vocab.json", '{"<pad>": "x"}', "vocab.json: not a tokenizer"),
        ("vocab.json", '{"<pad>": 0}', "not a tokenizer|lacks"),
        ("vocab.json", "{", "vocab.json"),
        ("tokenizer_config.json", '{"add_prefix_space": 1}', "add_prefix_space must be true or"),
    ],
)
def test_damaged_files_are_refused(
    byte_level: Path, tmp_path: Path, name: str, content: str, match: str
) -> None:
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).write_bytes((byte_level / file).read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(MinibertError, match=match) as raised:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


# The tools


def test_a_long_text_is_windowed(byte_level: Path, tmp_path: Path) -> None:
    """513 pieces do not fit 512 positions; every word has its label."""
    tagger = Tagger.from_pretrained(checkpoint(tmp_path, byte_level), dtype="fp32")
    words = ["the"] * 510
    assert [len(ids) for ids in tagger.tokenizer.pieces([words])[0]] == [1] * 510
    for more in ([], ["<pad>", "the"], ["the"] * 600):
        (labels,) = tagger.label([[*words, *more]])
        assert len(labels) == len(words) + len(more)


def test_layouts_agree_on_labels(byte_level: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, byte_level)
    sentences = [text.split() for text in (*SENTENCES, "<pad> who <pad>")]
    scores = []
    for pack, prepack in ((True, True), (True, False), (False, False)):
        tagger = Tagger.from_pretrained(folder, dtype="fp32", pack=pack, prepack=prepack)
        scores.append([label.score for labels in tagger.label(sentences) for label in labels])
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], abs=1e-4)


def test_a_tokenizer_with_another_padding_is_refused(byte_level: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path, byte_level)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"pad_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(MinibertError, match="pad_token_id is 0, but the tokenizer pads with 1"):
        Tagger.from_pretrained(tmp_path)


def test_a_trained_roberta_opens_here_and_in_transformers(byte_level: Path, tmp_path: Path) -> None:
    """transformers reads words as they were read in training, from the saved directory alone."""
    start = checkpoint(tmp_path / "start", byte_level, BertForMaskedLM)
    sentences = demo.generate()[0][:32]
    corpus = write_bio(tmp_path / "train.bio", sentences)
    arguments = ["--model", start, "--train", corpus, "--epochs", 1, "--batch-size", 8]
    output = tmp_path / "run"
    run = Run(["--output", output, "--device", "cpu", *arguments], tmp_path / "log.txt")
    assert run.wait() == 0, run.text()
    tagger = Tagger.from_pretrained(output / "last", dtype="fp32", prepack=False, pack=False)
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(output / "last")
    reader = transformers.AutoTokenizer.from_pretrained(output / "last")
    for sentence in sentences[:4]:
        inputs = reader([sentence.words], is_split_into_words=True, return_tensors="pt")
        (pieces,) = tagger.tokenizer.pieces([sentence.words])
        flat = [piece for word in pieces for piece in word]
        assert inputs["input_ids"][0, 1:-1].tolist() == flat
        with torch.inference_mode():
            ours = tagger.model(inputs["input_ids"], inputs["attention_mask"])
            assert torch.equal(ours.logits, theirs(**inputs).logits)


@KINDS
@pytest.mark.parametrize("family", ["RoBERTa", "ERNIE 3.0"])
def test_parity_with_transformers(
    family: str, kind: type, byte_level: Path, tmp_path: Path
) -> None:
    if family == "RoBERTa":
        folder = checkpoint(tmp_path, byte_level, kind)
    else:
        folder = small_checkpoint(tmp_path, kind, **SMALL_FAMILIES[family])
    comparisons = minibert.compare(folder, SENTENCES[:2], attn=["sdpa"], dtypes=["fp32"])
    assert len(comparisons) == 2
    assert all(comparison.kept for comparison in comparisons)
    padded = [c for c in comparisons if c.layout == "padded"]
    assert all(c.first_difference is None for c in padded)
    assert {row.operation for row in padded[0].rows} >= {"gradient", "step", "dropout", "probs"}


@FAMILY
def test_a_trace_shows_the_sum_of_the_embeddings(family: str) -> None:
    net = small_bert(**SMALL_FAMILIES[family])
    ids = torch.tensor([[2, 20, 1, 28]])
    with minibert.trace(net) as t:
        logits = net(ids).logits
    e = net.bert.embeddings
    first = e.word.weight[2] + e.segment.weight[0]
    first = first + e.position.weight[2 if family == "RoBERTa" else 0]
    if family == "ERNIE 3.0":
        first = first + e.task.weight[0]
    assert torch.equal(t["embeddings.sum"][0, 0], first)
    assert torch.equal(t["logits"], logits)


def test_fill_mask_equals_transformers(byte_level: Path, tmp_path: Path) -> None:
    """The computation of `minibert verify roberta-base`."""
    folder = checkpoint(tmp_path, byte_level, BertForMaskedLM)
    ours, tokenizer = BertForMaskedLM.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    theirs = transformers.RobertaForMaskedLM.from_pretrained(folder)
    text = "Hello I'm a <mask> model."
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    place = inputs["input_ids"][0].tolist().index(tokenizer.mask_id)
    with torch.inference_mode():
        expected = theirs(**inputs).logits[0, place].softmax(-1)
    assert torch.equal(fill_mask(ours, tokenizer, text), expected)
    best = {i: expected[i].item() for i in expected.topk(5).indices.tolist()}
    (check,) = check_scores(ours, tokenizer, [(text, best)])
    assert check.passed


@pytest.mark.parametrize("mask", ["<mask>", "[MASK]"])
def test_a_trace_predicts_the_mask(mask: str, byte_level: Path, tmp_path: Path) -> None:
    model = BertForMaskedLM.from_pretrained(checkpoint(tmp_path, byte_level, BertForMaskedLM))
    tokenizer = Tokenizer.from_pretrained(byte_level)
    view = look(Untagged(model, tokenizer), f"who directed {mask}?")
    assert view.ids == tokenizer.encode(" who directed<mask> ?")
    (place,) = view.masks
    assert view.pieces[place] == "<mask>"
    assert view.words == ["who", "directed", mask, "?"]
    assert view.word_of[place] == 2
    logits_SV = model(torch.tensor([view.ids])).logits[0]
    best = tokenizer.backend.id_to_token(int(logits_SV[place].argmax()))
    assert view.best[-1][place][0].name == best
    assert f"<mask> at {place}\n" in terminal(view)


def test_a_checkpoint_without_known_hashes_is_not_downloaded() -> None:
    with pytest.raises(MinibertError, match=r"hashes of its files are not known.*b49a502ec92a"):
        hub.locate_model("ernie-2.0-base-en")
