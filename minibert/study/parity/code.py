"""Judge code that is not minibert's: any callable or module, compared with transformers.

    def test_my_bert():
        found = minibert.compare_code(my_bert, "checkpoint")
        assert found.kept, found

The rule is that of judge.py: an error of at most ``FORWARD`` times that of transformers itself,
gradients ``BACKWARD`` times, or with ``bits=True`` the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from minibert.files import MinibertError
from minibert.machine import choose_device, choose_dtype, name_of
from minibert.model.labels import IGNORE
from minibert.pretrained import hub
from minibert.pretrained.tokenizer import Tokenizer
from minibert.pretrained.weights import names_of
from minibert.study.parity import reference
from minibert.study.parity.compare import SEED, TEXTS, batches, cut, model_class_of, observe
from minibert.study.parity.judge import Comparison, Values, judge

Code = Callable[..., Tensor | Mapping[str, Tensor]]


def compare_code(
    code: Code,
    directory: str | Path,
    texts: Sequence[str] = TEXTS,
    *,
    attn: str = "sdpa",
    dtype: str | torch.dtype = "fp32",
    bits: bool = False,
    parameters: Mapping[str, nn.Parameter] | None = None,
    device: str = "cpu",
) -> Comparison:
    """Run a padded batch through ``code`` and through transformers, and judge the difference.

    Args:
        code: called with the keywords ``input_ids``, ``attention_mask`` and ``token_type_ids``,
            each int64 (B, S). It returns the logits (B, S, L), or a dict with "logits" and any
            other intermediates by the names of intermediates.py ("layers.0.q": (B, S, H, K),
            "layers.0.probs": (B, H, S, S), ...), so that the first wrong operation is named. Its
            weights are those of ``directory`` in ``dtype``, and it does not drop out.
        directory: a checkpoint with its head and tokenizer, or a name of ``hub.MODELS``.
        texts: one sentence each; together they are one batch.
        attn: "eager" or "sdpa", of transformers.
        dtype: in which ``code`` and transformers compute.
        bits: demand equal bits, padding included. Otherwise the error is bounded, and the numbers
            at padding do not count.
        parameters: of the code, by transformers' names, such as
            ``dict(module.named_parameters())``. The gradients of the mean cross-entropy with
            respect to those that transformers has are compared too.
        device: where everything runs.

    Raises:
        MinibertError: what ``compare`` raises; a checkpoint without a head; numbers of another
            name, shape or dtype than transformers'; no parameter with a name of transformers'.
    """
    where = choose_device(device)
    directory = hub.locate_model(directory)
    reference.library()
    ours = model_class_of(directory).from_pretrained(directory, device=where, seed=SEED)
    if ours.load_report.initialised:
        missing = sorted(ours.load_report.initialised)[0]
        raise MinibertError(f"{directory}: has no {missing}: save the model with its head first")
    theirs = reference.load(directory, ours, attn).to(where)
    padded, packed = batches(ours, Tokenizer.from_pretrained(directory), texts, where)
    chosen = choose_dtype(dtype, where).value
    expected = observe(theirs, ours, padded, chosen, chosen, dropout=False)
    exact = observe(theirs, ours, padded, chosen, torch.float64)
    got = _run(code, padded, expected, parameters or {}, names_of(ours))
    if not bits:
        lengths = packed["layout"].lengths
        got, expected, exact = (cut(values, lengths) for values in (got, expected, exact))
    rows = judge(bits, got, expected, exact, None, {})
    return Comparison(attn, name_of(chosen), "padded", rows, where.type, "the code", bits)


def _run(
    code: Code,
    padded: dict,
    expected: Values,
    parameters: Mapping[str, nn.Parameter],
    names: dict[str, str],
) -> Values:
    """What ``code`` computes, in the order of transformers; checked to have its shapes."""
    inputs = {name: x for name, x in padded.items() if name != "labels"}
    known = {own: parameters[their] for own, their in names.items() if their in parameters}
    if parameters and not known:
        some = next(iter(parameters))
        raise MinibertError(
            f"parameters: transformers has no {some!r} and no other of these: "
            "give them by transformers' names"
        )
    with torch.set_grad_enabled(bool(known)):
        result = code(**inputs)
    seen = {"logits": result} if isinstance(result, Tensor) else dict(result)
    for name, x in seen.items():
        if name not in expected:
            raise MinibertError(f"{name!r}: transformers shows no such intermediate")
        (want,) = expected[name]
        if x.shape != want.shape or x.dtype != want.dtype:
            raise MinibertError(
                f"{name}: the code gives {tuple(x.shape)} {x.dtype}, "
                f"transformers {tuple(want.shape)} {want.dtype}: they must be equal"
            )
    if "logits" not in seen:
        raise MinibertError("the code returns no logits: return them, alone or in the dict")
    got = {name: [seen[name].detach().cpu()] for name in expected if name in seen}
    if known:
        labels_BS = padded["labels"]
        loss = cross_entropy(seen["logits"].flatten(0, 1), labels_BS.flatten(), ignore_index=IGNORE)
        gradients = torch.autograd.grad(loss, list(known.values()), materialize_grads=True)
        got |= {f"gradient:{name}": [g.detach().cpu()] for name, g in zip(known, gradients)}
    return got
