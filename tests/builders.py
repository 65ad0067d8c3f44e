"""Small models, checkpoints, transformers' twin of a model, batches and BIO files for all tests."""

from __future__ import annotations

import json
import os
import shutil
import string
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from minibert import BertConfig, BertForMaskedLM, BertForTokenClassification, Packed, Tokenizer
from minibert.files import write_text
from minibert.machine import cpu_flags
from minibert.model.labels import IGNORE
from minibert.pretrained import config_json
from minibert.pretrained.families import class_name
from minibert.pretrained.weights import names_of
from minibert.speed.cpu import build
from minibert.text.bio import write_bio as write_bio  # for the tests to import from here

# Changes of ``small_config`` that make it another family's; ERNIE 3.0 nano has this head size, 26.
SIZES_OF_26 = {"hidden_size": 78, "num_attention_heads": 3, "layer_norm_eps": 1e-5}
SMALL_FAMILIES: dict[str, dict] = {
    "RoBERTa": {
        "model_type": "roberta",
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "pad_token_id": 1,
    }
    | SIZES_OF_26,
    "ERNIE 1.0": {"model_type": "ernie", "max_position_embeddings": 513, "hidden_act": "relu"}
    | SIZES_OF_26,
    "ERNIE 3.0": {"model_type": "ernie", "type_vocab_size": 4, "task_type_vocab_size": 3}
    | SIZES_OF_26,
}
LABELS = ("O", "B-X", "I-X", "B-Y", "I-Y")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Why the C++ kernels cannot be tested here, or "". Where g++ rejects them, their tests fail.
no_kernels = (
    f"no {build.COMPILER}"
    if not shutil.which(build.COMPILER)
    else "another CPU"
    if not cpu_flags().issuperset(build.NEEDED)
    else ""
)
no_bf16_kernel = no_kernels or (
    "" if cpu_flags().issuperset(build.AVX512) else "no AVX512 with VNNI and BF16"
)
# Any lowercase word of ASCII letters has pieces in this vocabulary.
PIECES = (*SPECIAL, *string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase))


def small_config(**changes) -> BertConfig:
    """Two layers of 36 hidden units and 3 heads.

    The head size of 12 has no exact square root, so that a test sees in which order the scores are
    scaled and rounded.
    """
    sizes = {
        "vocab_size": len(PIECES),
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 50,
        "max_position_embeddings": 64,
        "labels": LABELS,
    }
    return BertConfig(**sizes | changes)


def small_bert(
    kind: type = BertForTokenClassification,
    attn: str = "sdpa",
    *,
    seed: int = 0,
    noise: float = 0.2,
    **changes,
) -> BertForTokenClassification | BertForMaskedLM:
    """A random model in eval mode.

    Args:
        kind: BertForTokenClassification or BertForMaskedLM.
        attn: attention implementation.
        seed: of the weights.
        noise: standard deviation of normal noise added to every parameter. With it no bias is
            zero, no LayerNorm weight is one and attention is far from uniform. 0 leaves BERT's own
            initialisation.
        changes: fields of the config, as for ``small_config``.
    """
    torch.manual_seed(seed)
    model = kind(small_config(**changes), attn).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    return model


def save(
    model: nn.Module, folder: Path, pieces: Sequence[str] = PIECES, lowercase: bool = True
) -> Path:
    """Save a model with a tokenizer, as minibert and transformers open them.

    Args:
        model: any minibert model whose vocab_size is ``len(pieces)``.
        folder: created if it does not exist.
        pieces: the vocabulary, in the order of its ids.
        lowercase: whether the tokenizer is uncased.
    """
    model.save_pretrained(folder)
    write_text(folder / "vocab.txt", "".join(f"{piece}\n" for piece in pieces))
    write_text(folder / "tokenizer_config.json", json.dumps({"do_lower_case": lowercase}))
    Tokenizer.from_pretrained(folder).save_pretrained(folder)  # adds tokenizer.json
    return folder


def small_checkpoint(
    folder: Path,
    kind: type = BertForTokenClassification,
    *,
    words: Sequence[str] = (),
    lowercase: bool = True,
    **changes,
) -> Path:
    """Save a small model with its tokenizer.

    Args:
        folder: created if it does not exist.
        kind: BertForTokenClassification or BertForMaskedLM.
        words: added to the vocabulary of letters as whole pieces.
        lowercase: whether the tokenizer is uncased.
        changes: as for ``small_bert``: seed, noise and fields of the config.
    """
    pieces = (*PIECES, *(word for word in dict.fromkeys(words) if word not in PIECES))
    return save(small_bert(kind, vocab_size=len(pieces), **changes), folder, pieces, lowercase)


def minilm_checkpoint(
    minilm: Path, folder: Path, labels: Sequence[str], *, seed: int = 0, sharpness: float = 1.0
) -> Path:
    """Save MiniLM's real weights and tokenizer with an untrained classifier.

    Its labels mean nothing. ``sharpness`` multiplies the classifier's weights: 20 makes labels vary
    from word to word, with high probabilities.
    """
    model = BertForTokenClassification.from_pretrained(minilm, labels=labels, seed=seed)
    with torch.no_grad():
        model.head.classifier.weight.mul_(sharpness)
    model.save_pretrained(folder)
    Tokenizer.from_pretrained(minilm).save_pretrained(folder)
    return folder


def python(*arguments: object, **variables: str) -> str:
    """The output of a Python process, which must succeed, with variables in its environment."""
    ran = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def config_of(model: BertForTokenClassification | BertForMaskedLM, attn: str = "sdpa"):
    """transformers' config of ``model``."""
    import transformers

    raw = config_json.to_dict(model.config, type(model).__name__)
    return transformers.AutoConfig.for_model(**raw, attn_implementation=attn)


def twin(model: BertForTokenClassification | BertForMaskedLM, attn: str = "sdpa") -> nn.Module:
    """transformers' model with the config, weights, dtype, device and mode of ``model``."""
    import transformers

    name = class_name(type(model).__name__, model.config.model_type)
    config = config_of(model, attn)
    theirs = getattr(transformers, name)(config).to(model.device, model.dtype).train(model.training)
    parameters, names = dict(theirs.named_parameters()), names_of(model)
    assert parameters.keys() == set(names.values())
    with torch.no_grad():
        for own, their in names.items():
            parameters[their].copy_(model.get_parameter(own))
    return theirs


def padded_and_packed(
    lengths: Sequence[int], config: BertConfig, device: str = "cpu"
) -> tuple[dict, dict, Tensor]:
    """Random sentences as model inputs with labels, some of them IGNORE.

    Returns:
        The padded batch, the packed batch, and the mask (B, S) of the tokens in the padded one.
    """
    draw = torch.Generator().manual_seed(sum(lengths))
    shape = (len(lengths), max(lengths))
    mask_BS = torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]
    labels_BS = torch.randint(config.num_labels, shape, generator=draw)
    labels_BS[torch.rand(shape, generator=draw) < 0.3] = IGNORE
    labels_BS[0, 0] = 0  # at least one counts
    padded = {
        "input_ids": torch.randint(1, config.vocab_size, shape, generator=draw),
        "token_type_ids": torch.randint(config.type_vocab_size, shape, generator=draw),
        "labels": labels_BS.masked_fill(~mask_BS, IGNORE),
    }
    packed = {name: x_BS[mask_BS].to(device) for name, x_BS in padded.items()}
    padded = {name: x_BS.to(device) for name, x_BS in padded.items()}
    padded["attention_mask"] = mask_BS.long().to(device)
    packed["layout"] = Packed.from_lengths(lengths, device)
    return padded, packed, mask_BS.to(device)
