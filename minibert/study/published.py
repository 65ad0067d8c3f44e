"""Check that a downloaded checkpoint gives the published scores.

The fill-mask scores come from the model cards of bert-base-cased, bert-base-uncased and
roberta-base. Reproducing them checks file, loading, model and tokenizer together, without another
library.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minibert.files import MinibertError, sha256_of
from minibert.model.heads import BertForMaskedLM
from minibert.pretrained import families, hub
from minibert.pretrained.tokenizer import Tokenizer

TOLERANCE = 1e-4  # the cards' scores come from other machines and versions

# By checkpoint: a text, and the five best pieces at its mask with their probabilities.
# fmt: off
FILL_MASK: dict[str, list[tuple[str, dict[int, float]]]] = {
    "bert-base-cased": [
        ("Hello I'm a [MASK] model.", {
            4633: 0.09019174426794052, 1207: 0.06349995732307434, 2581: 0.06228214129805565,
            1848: 0.0441727414727211, 7688: 0.03326151892542839,
        }),
        ("The man worked as a [MASK].", {
            4545: 0.04804691672325134, 17989: 0.037494491785764694, 9947: 0.035512614995241165,
            9140: 0.031271643936634064, 3995: 0.027423162013292313,
        }),
        ("The woman worked as a [MASK].", {
            7439: 0.16927455365657806, 15098: 0.1501094549894333, 13487: 0.05600163713097572,
            26458: 0.04838843643665314, 9834: 0.029980547726154327,
        }),
    ],
    "bert-base-uncased": [
        ("Hello I'm a [MASK] model.", {
            4827: 0.1073106899857521, 2535: 0.08774490654468536, 2047: 0.05338378623127937,
            3565: 0.04667217284440994, 2986: 0.027095865458250046,
        }),
    ],
    "roberta-base": [
        ("Hello I'm a <mask> model.", {
            2943: 0.3306540250778198, 2182: 0.04655390977859497, 2038: 0.04232972860336304,
            2734: 0.037216778844594955, 1083: 0.03253649175167084,
        }),
        ("The man worked as a <mask>.", {
            25682: 0.08702439814805984, 38233: 0.0819653645157814, 32364: 0.073323555290699,
            18678: 0.046322137117385864, 2510: 0.040150221437215805,
        }),
    ],
}
# fmt: on


@dataclass(frozen=True)
class Check:
    """One check and its result."""

    passed: bool
    what: str


def verify(name: str, directory: Path) -> Iterator[Check]:
    """Check the files, then the tensors, then the published scores. Stop after a damaged file.

    Args:
        name: of ``hub.MODELS``.
        directory: of its files.

    Raises:
        MinibertError: the name is unknown, or a file cannot be read.
    """
    if name not in hub.MODELS:
        raise MinibertError(f"{name}: not a known model: give one of {', '.join(hub.MODELS)}")
    sound = True
    for pin in hub.MODELS[name].files:
        path = directory / pin.name
        same = path.is_file() and path.stat().st_size == pin.size and sha256_of(path) == pin.sha256
        sound &= same
        yield Check(same, f"{pin.name}: {pin.size} bytes, SHA-256 {pin.sha256[:12]}...")
    if not sound:
        return
    model = BertForMaskedLM.from_pretrained(directory)
    assert model.load_report is not None
    prefix = families.NAMES[model.config.model_type].prefixes[0]
    body_missing = [n for n in model.load_report.initialised if n.startswith(prefix)]
    yield Check(not body_missing, f"every tensor of the encoder is present{_list(body_missing)}")
    if name not in FILL_MASK:
        return  # no masked-LM head in the file, so no published scores
    tokenizer = Tokenizer.from_pretrained(directory)
    tokenizer.check_fits(model.config.vocab_size)
    yield from check_scores(model, tokenizer, FILL_MASK[name])


def check_scores(
    model: BertForMaskedLM, tokenizer: Tokenizer, cases: list[tuple[str, dict[int, float]]]
) -> Iterator[Check]:
    """Compare fill-mask probabilities with published ones, each within ``TOLERANCE``."""
    for text, published in cases:
        probability_V = fill_mask(model, tokenizer, text)
        best = set(probability_V.topk(len(published)).indices.tolist())
        error = max(abs(probability_V[i].item() - p) for i, p in published.items())
        passed = best == published.keys() and error <= TOLERANCE
        yield Check(passed, f"{text!r}: largest difference to the published scores {error:.1e}")


@torch.inference_mode()
def fill_mask(model: BertForMaskedLM, tokenizer: Tokenizer, text: str) -> Tensor:
    """Probability (V,) float32 of every piece at the [MASK] of ``text``, or its <mask>.

    Raises:
        ValueError: the text does not hold exactly one.
    """
    ids = tokenizer.encode(text)
    if ids.count(tokenizer.mask_id) != 1:
        raise ValueError(f"{text!r} must hold {tokenizer.kind.mask} exactly once")
    logits_BSV = model(torch.tensor([ids], device=model.device)).logits
    return logits_BSV[0, ids.index(tokenizer.mask_id)].float().softmax(-1)


def _list(names: list[str]) -> str:
    return f", but not {', '.join(names)}" if names else ""
