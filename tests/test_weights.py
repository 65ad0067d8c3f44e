"""Checkpoints: every naming loads, what is saved opens in transformers, bad files are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from builders import python, small_bert, small_checkpoint, small_config, twin
from safetensors.torch import load_file, save_file

from benchmarks.child import run_child
from minibert import BertForMaskedLM, BertForTokenClassification, Tokenizer
from minibert.files import MinibertError, give_back
from minibert.pretrained import load, weights
from minibert.study.published import check_scores, fill_mask

LABELS = ("O", "B-X", "I-X")


def official_header() -> dict[str, tuple[int, ...]]:
    """Names and shapes in the published bert-base-cased file."""
    D, F, V = 768, 3072, 28996
    embeddings = {"word_embeddings": V, "position_embeddings": 512, "token_type_embeddings": 2}
    shapes = {f"bert.embeddings.{name}.weight": (rows, D) for name, rows in embeddings.items()}
    shapes["cls.predictions.bias"] = (V,)
    linears = {"bert.pooler.dense": (D, D), "cls.seq_relationship": (2, D)}
    linears["cls.predictions.transform.dense"] = (D, D)
    norms = ["bert.embeddings", "cls.predictions.transform"]
    for layer in (f"bert.encoder.layer.{i}" for i in range(12)):
        linears |= {f"{layer}.attention.self.{name}": (D, D) for name in ("query", "key", "value")}
        linears[f"{layer}.attention.output.dense"] = (D, D)
        linears[f"{layer}.intermediate.dense"] = (F, D)
        linears[f"{layer}.output.dense"] = (D, F)
        norms += [f"{layer}.attention.output", f"{layer}.output"]
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.LayerNorm.gamma": (D,), f"{name}.LayerNorm.beta": (D,)}
    return shapes


@pytest.fixture(scope="module")
def official(tmp_path_factory, mit_movie: Path) -> Path:
    """A checkpoint with the published header and tokenizer, and random weights."""
    folder = tmp_path_factory.mktemp("bert-base-cased")
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=draw) * 0.02 + (1.0 if name.endswith("gamma") else 0.0)
        for name, shape in official_header().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    published = 435755784  # bytes: names and shapes determine the size of the file
    assert (folder / "model.safetensors").stat().st_size == published
    real = mit_movie.parent.parent / "weights" / "bert-base-cased"
    for name in ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((real / name).read_bytes())
    return folder


def test_the_official_file_loads_and_reports(official: Path) -> None:
    model = BertForTokenClassification.from_pretrained(official, labels=["O", "B-X"], seed=1)
    report = model.load_report
    assert report.initialised == ("classifier.weight", "classifier.bias")
    assert report.unused == (
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "cls.predictions.bias",
        "cls.predictions.transform.LayerNorm.bias",
        "cls.predictions.transform.LayerNorm.weight",
        "cls.predictions.transform.dense.bias",
        "cls.predictions.transform.dense.weight",
        "cls.seq_relationship.bias",
        "cls.seq_relationship.weight",
    )
    raw = load_file(official / "model.safetensors")
    assert torch.equal(model.bert.embeddings.norm.weight, raw["bert.embeddings.LayerNorm.gamma"])
    assert model.config.labels == ("O", "B-X")
    assert not model.training
    assert BertForMaskedLM.from_pretrained(official).load_report.initialised == ()


def test_fill_mask_arithmetic_equals_transformers(tmp_path: Path) -> None:
    """The computation of `minibert verify`."""
    small_checkpoint(tmp_path, BertForMaskedLM, words=["the", "woman", "worked"])
    ours = BertForMaskedLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    text = "The woman worked as a [MASK]"
    inputs = transformers.AutoTokenizer.from_pretrained(tmp_path)(text, return_tensors="pt")
    with torch.inference_mode():
        expected = theirs(**inputs).logits[0, -2].softmax(-1)  # [MASK], before [SEP]
    assert torch.equal(fill_mask(ours, tokenizer, text), expected)

    *first, last = expected.topk(5).indices.tolist()
    right = {i: expected[i].item() for i in (*first, last)}
    wrong = right | {last: right[last] + 2e-4}
    other = {i: right[i] for i in first} | {expected.argmin().item(): right[last]}
    for case, passes in ((right, True), (wrong, False), (other, False)):
        (check,) = check_scores(ours, tokenizer, [(text, case)])
        assert check.passed is passes
    with pytest.raises(ValueError, match="exactly once"):
        fill_mask(ours, tokenizer, "no mask")


def saved(folder: Path, rename=str, drop=(), **extra: torch.Tensor) -> Path:
    """A small checkpoint with renamed tensors; in ``extra`` names, __ stands for a dot."""
    small_bert(labels=LABELS).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    renamed = {rename(name): t for name, t in tensors.items() if name not in drop}
    renamed |= {name.replace("__", "."): tensor for name, tensor in extra.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "rename",
    [
        str,
        lambda name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"),
        lambda name: name.removeprefix("bert."),
    ],
    ids=["plain", "gamma and beta", "no prefix"],
)
def test_every_naming_loads(tmp_path: Path, rename) -> None:
    folder = saved(tmp_path / "a", rename, embeddings__position_ids=torch.arange(64)[None])
    model = BertForTokenClassification.from_pretrained(folder)
    reference = BertForTokenClassification.from_pretrained(saved(tmp_path / "b"))
    assert model.load_report == load.LoadReport((), ())
    assert str(model.load_report) == "every tensor used, none missing"
    for (name, a), b in zip(model.named_parameters(), reference.parameters()):
        assert torch.equal(a, b), name


def test_missing_and_unused_tensors_are_reported(tmp_path: Path) -> None:
    """gamma is another name for weight in a LayerNorm only."""
    dropped = ("classifier.bias", "bert.embeddings.LayerNorm.weight")
    folder = saved(tmp_path / "a", drop=dropped, other__gamma=torch.ones(3))
    model = BertForTokenClassification.from_pretrained(folder)
    names = ("bert.embeddings.LayerNorm.weight", "classifier.bias")
    assert model.load_report.initialised == names
    assert model.load_report.unused == ("other.gamma",)
    said = f"unused: other.gamma\nnewly initialised: {', '.join(names)}"
    assert str(model.load_report) == said
    assert model.bert.embeddings.norm.weight.eq(1).all()


def test_a_real_checkpoint_reports_unused_tensors(minilm: Path) -> None:
    report = BertForMaskedLM.from_pretrained(minilm).load_report
    assert report.unused == ("bert.pooler.dense.bias", "bert.pooler.dense.weight")
    assert all(name.startswith("cls.predictions.") for name in report.initialised)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_saved_directory_opens_in_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small_bert(labels=LABELS).to(dtype)
    model.save_pretrained(tmp_path)
    theirs, info = transformers.BertForTokenClassification.from_pretrained(
        tmp_path, output_loading_info=True, dtype=dtype, attn_implementation="sdpa"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.config.id2label == dict(enumerate(LABELS))
    again = BertForTokenClassification.from_pretrained(
        tmp_path, attn_implementation="sdpa", dtype=dtype
    )
    assert again.config == model.config
    ids = torch.tensor([[2, 20, 28, 16, 3]])
    with torch.inference_mode():
        assert torch.equal(theirs(ids).logits, again(ids).logits)
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    for name in "abcd":
        small_bert().save_pretrained(tmp_path / name)
    files = {(tmp_path / name / "model.safetensors").read_bytes() for name in "abcd"}
    assert len(files) == 1


def test_what_transformers_saves_opens_here(tmp_path: Path) -> None:
    theirs = twin(small_bert())
    theirs.save_pretrained(tmp_path)
    ours = BertForTokenClassification.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert ours.load_report == load.LoadReport((), ())
    ids = torch.tensor([[1, 5, 9]])
    with torch.inference_mode():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


def test_overwriting_the_file_does_not_change_loaded_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    model = BertForTokenClassification.from_pretrained(folder)
    before = model.head.classifier.weight.clone()
    path = folder / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(model.head.classifier.weight, before)


# Bad input: one line of error


def refused(folder: Path, match: str, **options) -> None:
    with pytest.raises(MinibertError, match=match) as raised:
        BertForTokenClassification.from_pretrained(folder, **options)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(folder, "damaged or not a safetensors file")


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """A saved file contains a hash of its tensors; header and data are both checked."""
    small_bert().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    draw = torch.Generator().manual_seed(1)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = torch.randint(0, header, (150,), generator=draw).tolist()
    places += torch.randint(header, len(whole), (50,), generator=draw).tolist()
    flipped_data = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            BertForTokenClassification.from_pretrained(tmp_path)
        except MinibertError as error:
            assert "\n" not in str(error)  # noqa: PT017
            flipped_data += place >= header
        else:
            # Only the free text of the metadata may change unnoticed.
            start = whole.index(b"__metadata__")
            assert start < place < whole.index(b"}", start), place
    assert flipped_data == 50


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": 33}, r"has shape \(57, 36\).*ask for \(57, 33\)"),
        ({"vocab_size": 56}, "word_embeddings.weight has shape"),
        ({"num_attention_heads": 5}, "not a multiple"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"id2label": {"0": "O", "2": "B-X", "3": "I-X"}}, "without a gap"),
        ({"id2label": ["O"]}, "id2label must map"),
        ({"id2label": {"0": "O"}}, r"classifier.weight has shape \(3, 36\).*ask for \(1, 36\)"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, change: dict, match: str) -> None:
    folder = saved(tmp_path / "a")
    raw = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(raw))
    refused(folder, match)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, '{"a": 1'])
def test_a_config_that_is_not_json_is_refused(tmp_path: Path, content: str) -> None:
    folder = saved(tmp_path / "a")
    (folder / "config.json").write_text(content)
    refused(folder, "config.json: (not valid JSON|must hold)")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"pytorch_model.bin: a pickle can run any code")
    with pytest.raises(MinibertError, match="a pickle can run any code"):
        weights.read(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "model.safetensors: no such file")


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", classifier__bias=torch.zeros(3, dtype=torch.int64))
    refused(folder, "classifier.bias has dtype torch.int64")
    save_file({"conv.weight": torch.ones(2)}, folder / "model.safetensors")
    refused(folder, "holds no tensor of a BERT")
    untied = {"cls__predictions__decoder__weight": torch.ones(57, 36)}
    refused(saved(tmp_path / "b", **untied), "decoder.weight differs")


def test_arguments_that_contradict_each_other(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    refused(folder, r"classifier.weight has shape \(3, 36\)", num_labels=4)
    with pytest.raises(ValueError, match="num_labels is 2, but 3 labels"):
        BertForTokenClassification.from_pretrained(folder, num_labels=2, labels="abc")
    with pytest.raises(ValueError, match="choose one of"):
        BertForTokenClassification.from_pretrained(folder, attn_implementation="flash")


LIMITED = """
import resource, signal, sys
from minibert import BertForTokenClassification, MinibertError
model = BertForTokenClassification.from_pretrained(sys.argv[1])
with __import__("torch").no_grad():
    model.head.classifier.bias.fill_(5.0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    model.save_pretrained(sys.argv[1])
except MinibertError as error:
    print(error)
"""


def test_a_save_that_fails_leaves_the_old_file_whole(tmp_path: Path) -> None:
    """A limit on the file size cuts off the write, as a full disk would."""
    folder = saved(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    printed = python("-c", LIMITED, folder)
    assert "model.safetensors: cannot be written" in printed
    assert "free some space" in printed
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives pages back")
def test_loading_never_holds_both_the_file_and_the_copy(tmp_path: Path) -> None:
    size = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
    config = small_config(num_hidden_layers=12, **size)
    BertForTokenClassification(config).save_pretrained(tmp_path)
    megabytes = (tmp_path / "model.safetensors").stat().st_size / 2**20
    assert megabytes > 140
    imports = "import sys; from minibert import BertForTokenClassification as B; "
    imports += "from minibert.pretrained import load; "
    peaks = [
        run_child([sys.executable, "-c", imports + rest, tmp_path])
        for rest in ("B; load.Blank", "B.from_pretrained(sys.argv[1])")
    ]
    assert 0.9 < (peaks[1] - peaks[0]) / megabytes < 1.4


def test_only_whole_pages_are_given_back() -> None:
    x = torch.ones(5 * 4096, dtype=torch.uint8)
    give_back(x.data_ptr() + 1, 3 * 4096)
    where = x.nonzero().flatten()
    assert int(x[0]) == 1
    assert bool(x[3 * 4096 + 1 :].all())
    assert len(where) in (3 * 4096, 5 * 4096)  # Linux drops the two whole pages
    give_back(x.data_ptr(), 0)
