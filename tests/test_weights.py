"""Checkpoints: every naming loads, what is saved opens in transformers, bad files are refused."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from builders import python, save, small_bert, small_checkpoint, small_config, twin
from safetensors.torch import load_file, save_file

from benchmarks.child import run_child
from minibert import BertForMaskedLM, BertForTokenClassification, Tokenizer
from minibert.files import MinibertError
from minibert.pretrained import load, weights
from minibert.speed import prepacked
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


def test_a_file_too_large_for_the_memory_limit_is_not_called_damaged(tmp_path: Path) -> None:
    path, size = tmp_path / "model.safetensors", 4 << 30
    header = {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    said = json.dumps(header).encode()
    path.write_bytes(len(said).to_bytes(8, "little") + said)
    os.truncate(path, 8 + len(said) + size)  # sparse
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + size // 2, before[1]))
    try:
        with pytest.raises(MinibertError, match=r"^out of memory \(.*annot allocate memory"):
            with weights.opened(path):
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    with weights.opened(path) as checkpoint:
        assert list(checkpoint.tensors) == ["a"]


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
        ({"hidden_size": 33}, r"has shape \(57, 36\).*asks for \(57, 33\)"),
        ({"num_hidden_layers": 1}, r"holds bert.encoder.layer.1.attention.output.LayerNorm.bias"),
        ({"vocab_size": 56}, "word_embeddings.weight has shape"),
        ({"num_attention_heads": 5}, "not a multiple"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        ({"model_type": "distilbert"}, "model_type is 'distilbert'"),
        ({"model_type": "roberta"}, "holds 111 of the 22927 parameters"),
        (
            {"model_type": "roberta", "max_position_embeddings": 2, "pad_token_id": 1},
            "positions of roberta begin after pad_token_id 1",
        ),
        (
            {"model_type": "ernie", "use_task_id": True, "task_type_vocab_size": 0},
            "task_type_vocab_size must be an integer from 1",
        ),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"id2label": {"0": "O", "2": "B-X", "3": "I-X"}}, "without a gap"),
        ({"id2label": ["O"]}, "id2label must map"),
        ({"pruned_heads": {"0": [1]}}, "has pruned_heads, which minibert does not compute with"),
        ({"quantization_config": {"quant_method": "x"}}, "has quantization_config, which"),
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
        weights.files_of(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "model.safetensors: no such file")


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", classifier__bias=torch.zeros(3, dtype=torch.int64))
    refused(folder, "classifier.bias has dtype I64: weights must be one of F64")
    save_file({"conv.weight": torch.ones(2)}, folder / "model.safetensors")
    refused(folder, "holds no tensor of a BERT")
    untied = {"cls__predictions__decoder__weight": torch.ones(57, 36)}
    refused(saved(tmp_path / "b", **untied), "decoder.weight differs")


def test_arguments_that_contradict_each_other(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    refused(folder, r"classifier.weight .*trained with 3 labels: give those 3", num_labels=4)
    with pytest.raises(ValueError, match=r"labels must be names, got \[0, 1, 2\]"):
        BertForTokenClassification.from_pretrained(folder, labels=range(3))
    with pytest.raises(ValueError, match="num_labels is 2, but 3 labels"):
        BertForTokenClassification.from_pretrained(folder, num_labels=2, labels="abc")
    with pytest.raises(ValueError, match="choose one of"):
        BertForTokenClassification.from_pretrained(folder, attn_implementation="flash")


def test_a_directory_whose_name_is_not_utf8(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a").rename(tmp_path / "\udcff")
    assert BertForTokenClassification.from_pretrained(folder).load_report == load.LoadReport((), ())


def test_the_number_of_heads_is_kept(tmp_path: Path) -> None:
    """No shape depends on it. Files of other programs do not hold it."""
    small_bert(labels=LABELS).save_pretrained(tmp_path / "ours")
    for folder in (tmp_path / "ours", saved(tmp_path / "theirs")):
        raw = json.loads((folder / "config.json").read_text()) | {"num_attention_heads": 6}
        (folder / "config.json").write_text(json.dumps(raw))
    BertForTokenClassification.from_pretrained(tmp_path / "theirs")
    refused(tmp_path / "ours", "was saved with 3 attention heads, but num_attention_heads of .* 6")


# Several files, and files that change


def sharded(folder: Path, change=lambda index, parts: None) -> Path:
    """A small checkpoint in two files and an index; ``change`` may damage them before writing."""
    tensors = load_file(saved(folder) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = {file: {n: tensors[n] for n in names[i::2]} for i, file in enumerate(files)}
    index = {"metadata": {}, "weight_map": {n: file for file in files for n in parts[file]}}
    change(index, parts)
    for file, part in parts.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_several_files_load_as_one(tmp_path: Path) -> None:
    """As those of transformers' own saving."""
    model = BertForTokenClassification.from_pretrained(sharded(tmp_path / "a"))
    assert model.load_report == load.LoadReport((), ())
    twin(model).save_pretrained(tmp_path / "b", max_shard_size="20KB")
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 2
    for folder in (saved(tmp_path / "c"), tmp_path / "b"):
        other = BertForTokenClassification.from_pretrained(folder)
        for (name, a), b in zip(model.named_parameters(), other.parameters()):
            assert torch.equal(a, b), name


FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
BIAS = "bert.embeddings.LayerNorm.bias"  # in the first file


def listed(**files) -> Callable[[dict, dict], None]:
    """Changes the file of a tensor in the index; __ stands for a dot."""
    names = {name.replace("__", "."): file for name, file in files.items()}
    return lambda index, parts: index["weight_map"].update(names)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda i, p: p.pop(SECOND), f"{SECOND}: no such file, but .* says that it holds bert"),
        (
            lambda i, p: p[FIRST].pop(BIAS),
            f"{FIRST}: {BIAS} is in .*index.json, but not in {FIRST}",
        ),
        (lambda i, p: i["weight_map"].pop(BIAS), f"{BIAS} is in {FIRST}, but not in model.safe"),
        (lambda i, p: p[SECOND].update({BIAS: p[FIRST][BIAS]}), f"{SECOND}: {BIAS} is in {SECOND}"),
        (lambda i, p: i["weight_map"].update({BIAS: SECOND}), f"{SECOND}: {BIAS} is in .*index"),
        (listed(x="../x.safetensors"), "x is in '../x.safetensors', which is not the name of a"),
        (listed(x="/dev/zero"), "x is in '/dev/zero', which is not the name"),
        (listed(x="model.bin"), "x is in 'model.bin', which is not the name of a safetensors file"),
        (listed(x=1), "x is in 1, which is not the name"),
        (lambda i, p: i.pop("weight_map"), "index.json: weight_map must map tensors to files"),
        (lambda i, p: i.update(weight_map={}), "index.json: weight_map must map tensors to files"),
        (listed(**{f"t{k}": f"{k}.safetensors" for k in range(300)}), "lists 302 files, more than"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, change, match: str) -> None:
    refused(sharded(tmp_path / "a", change), match)


def test_one_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    def twice(index: dict, parts: dict) -> None:
        parts[SECOND]["embeddings.LayerNorm.beta"] = parts[FIRST][BIAS]
        index["weight_map"]["embeddings.LayerNorm.beta"] = SECOND

    refused(sharded(tmp_path / "a", twice), f"embeddings.LayerNorm.beta and {BIAS} name the same")


SHRINKS = """
import os, sys
from minibert import BertForTokenClassification, MinibertError
from minibert.pretrained import weights
read, path = weights.Stored.read, sys.argv[1] + "/model.safetensors"
def shrinking(stored):
    os.truncate(path, 4096)
    return read(stored)
weights.Stored.read = shrinking
try:
    BertForTokenClassification.from_pretrained(sys.argv[1])
except MinibertError as error:
    print(error)
"""


def test_a_file_that_shrinks_while_it_is_read_is_one_line(tmp_path: Path) -> None:
    """A process that reads a mapped file would be killed by SIGBUS."""
    printed = python("-c", SHRINKS, saved(tmp_path / "a"))
    assert "model.safetensors: changed or damaged while it was read (it ends within" in printed
    assert len(printed.splitlines()) == 1


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


def test_loading_never_holds_both_the_file_and_a_copy_or_packed_weights(tmp_path: Path) -> None:
    size = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
    config = small_config(num_hidden_layers=12, **size)
    save(BertForTokenClassification(config), tmp_path)
    megabytes = (tmp_path / "model.safetensors").stat().st_size / 2**20
    assert megabytes > 140
    imports = "import sys; from minibert import BertForTokenClassification as B, Tagger as T; "
    imports += "from minibert.pretrained import load; "
    programs = ["B; T; load.Blank", "B.from_pretrained(sys.argv[1])"]
    if prepacked.choose_int8(torch.device("cpu")).value:
        programs.append("T.from_pretrained(sys.argv[1], device='cpu', dtype='int8')")
    least, *peaks = [
        run_child([sys.executable, "-c", imports + rest, tmp_path]) for rest in programs
    ]
    assert 0.9 < (peaks[0] - least) / megabytes < 1.4
    # A quarter of the file for the packed weights, a twelfth each for a plain layer and for what
    # packing it takes: half of the file less, of which malloc may lose some to gaps.
    assert all((peaks[0] - peak) / megabytes > 0.3 for peak in peaks[1:])
