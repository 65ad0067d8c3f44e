"""Is it the same? minibert against transformers, number by number, and where it first is not.

    for comparison in compare(directory, texts):    # or: minibert parity DIR
        print(table(comparison))

For every attention implementation, dtype and layout: every intermediate of every layer (the names
are those of tracing.py), every gradient, every parameter after one optimiser step, and in padded
batches every gradient of a step with dropout. What is promised, and how an error is measured,
stands in verdict.py. The optimiser's step is taken on fp32 copies, as in mixed precision: in fp16
Adam's eps of 1e-8 is zero. Runs on the CPU, and on a GPU, which fused attention needs: there
nothing is promised to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from minibert.files import MinibertError
from minibert.machine import DTYPES, choose_device
from minibert.model.heads import BertForMaskedLM, BertForTokenClassification, BertWithHead
from minibert.model.labels import IGNORE
from minibert.model.layout import Packed
from minibert.pretrained import hub, weights
from minibert.pretrained.tokenizer import Tokenizer
from minibert.pretrained.weights import names_of
from minibert.study.parity import reference
from minibert.study.parity.judge import Comparison, Values, judge, same_bits
from minibert.study.trace import MAPS, names, trace
from minibert.training.adamw import AdamW, Group

ON_CPU = ("eager", "sdpa")  # fused runs on CUDA only
LAYOUTS = ("padded", "packed")
TEXTS = (  # of unlike lengths, so that there is padding
    "who directed the frozen station with irene zimmer",
    "Jaws",
    "show me a black and white science fiction movie from the 1950s in which a scientist's "
    "experiment goes terribly wrong, rated at least 7.5",
)
LR, DECAY, SEED = 1e-4, 0.01, 0


def compare(
    directory: str | Path,
    texts: Sequence[str] = TEXTS,
    attn: Sequence[str] = ON_CPU,
    dtypes: Sequence[str] = tuple(DTYPES),
    layouts: Sequence[str] = LAYOUTS,
    device: str = "cpu",
) -> list[Comparison]:
    """Compare minibert with transformers on a checkpoint.

    Args:
        directory: of the checkpoint, tokenizer included, or a name of ``hub.MODELS``.
        texts: one sentence each, run as one batch.
        attn, dtypes, layouts: all combinations of these are compared; fused with transformers'
            sdpa.
        device: where everything runs, float64 included.

    Raises:
        MinibertError: transformers is missing, the directory or a text does not do, there is no
            such device, or fused attention cannot run on it.
    """
    where = choose_device(device)
    directory = hub.locate_model(directory)
    reference.library()
    kind = _kind(directory)
    ours = {
        name: kind.from_pretrained(directory, attn_implementation=name, device=where, seed=SEED)
        for name in {"eager", *attn}
    }
    theirs = {
        name: reference.load(directory, model, "sdpa" if name == "fused" else name).to(where)
        for name, model in ours.items()
    }
    padded, packed = batches(ours["eager"], Tokenizer.from_pretrained(directory), texts, where)
    lengths = packed["layout"].lengths
    comparisons = []
    for dtype_name in dtypes:
        dtype = DTYPES[dtype_name]
        start = {name: p.detach().to(dtype).cpu() for name, p in ours["eager"].named_parameters()}
        exact = observe(theirs["eager"], ours["eager"], padded, dtype, torch.float64)
        own = observe(ours["eager"], ours["eager"], padded, dtype, torch.float64)
        for name in attn:
            reference_run = observe(theirs[name], ours[name], padded, dtype, dtype)
            for layout in layouts:
                inputs = padded if layout == "padded" else packed
                bits = same_bits(name, layout, where.type)
                got = observe(ours[name], ours[name], inputs, dtype, dtype, bits)
                runs = [reference_run, exact, own]
                if not bits:  # what stands at padding means nothing and is promised by nobody
                    got = got if layout == "packed" else _cut(got, lengths)
                    runs = [_cut(values, lengths) for values in runs]
                expected, true, mine = runs
                rows = judge(bits, got, expected, true, mine, start)
                comparisons.append(Comparison(name, dtype_name, layout, rows, where.type))
    return comparisons


def _kind(directory: Path) -> type[BertWithHead]:
    """The head that the file holds; a fresh classifier where it holds none."""
    held = weights.read(directory / weights.WEIGHTS).keys()
    masked = "classifier.weight" not in held and "cls.predictions.transform.dense.weight" in held
    return BertForMaskedLM if masked else BertForTokenClassification


def batches(
    model: BertWithHead,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    device: torch.device | str = "cpu",
) -> tuple[dict, dict]:
    """The texts as a padded and as a packed batch, with segments and labels to have gradients.

    Labels are arbitrary but fixed; the second half of every text is segment 1 where there is one,
    so that no row of the segment table goes unseen.

    Raises:
        MinibertError: no text, or one that the model has no positions for, or strange ids.
    """
    config = model.config
    ids = [tokenizer.encode(text) for text in texts]
    if not ids:
        raise MinibertError("no text: give at least one")
    for number, row in enumerate(ids, start=1):
        if len(row) > config.max_position_embeddings:
            raise MinibertError(
                f"text {number}: {len(row)} word-pieces, but the model has "
                f"{config.max_position_embeddings} positions: give a shorter one"
            )
        if max(row) >= config.vocab_size:
            raise MinibertError(
                f"text {number}: word-piece {max(row)}, but the model has {config.vocab_size}: "
                "use the tokenizer that belongs to it"
            )
    lengths = [len(row) for row in ids]
    mask_BS = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids_BS = torch.full(mask_BS.shape, config.pad_token_id)
    ids_BS[mask_BS] = torch.tensor(list(chain.from_iterable(ids)))
    half_B1 = torch.tensor(lengths)[:, None] // 2
    segment_BS = (torch.arange(max(lengths)) >= half_B1).long() * (config.type_vocab_size > 1)
    classes = config.vocab_size if isinstance(model, BertForMaskedLM) else config.num_labels
    draw = torch.Generator().manual_seed(SEED)
    labels_BS = torch.randint(0, classes, mask_BS.shape, generator=draw)
    padded = {
        "input_ids": ids_BS,
        "attention_mask": mask_BS.long(),
        "token_type_ids": segment_BS * mask_BS,
        "labels": labels_BS.masked_fill(~mask_BS, IGNORE),
    }
    packed = {
        "input_ids": ids_BS[mask_BS],
        "token_type_ids": segment_BS[mask_BS],
        "labels": labels_BS[mask_BS],
    }
    padded, packed = ({k: x.to(device) for k, x in d.items()} for d in (padded, packed))
    return padded, {**packed, "layout": Packed.from_lengths(lengths, device)}


def observe(
    source: nn.Module,
    ours: BertWithHead,
    inputs: dict,
    rounded: torch.dtype,
    dtype: torch.dtype,
    dropout: bool = True,
) -> Values:
    """Run a copy of a model: intermediates, gradients, one step, and a step with dropout.

    Args:
        source: ours or transformers', in fp32; left as it is.
        ours: names and sizes.
        inputs: padded, or for ours packed.
        rounded: what the weights are rounded to before anything else, so that a float64 run has
            the very weights of the run it judges.
        dtype: of the computation.
        dropout: also take the step with dropout, where masks can be equal.

    Returns:
        All on the CPU.
    """
    config = ours.config
    model = copy.deepcopy(source).to(rounded).to(dtype).eval()
    mine = isinstance(model, BertWithHead)
    parameters = {
        name: model.get_parameter(name if mine else their_name)
        for name, their_name in names_of(ours).items()
    }
    if isinstance(model, BertWithHead):
        with trace(model) as t:
            loss = model(**inputs).loss
        seen: Mapping[str, Tensor | list[Tensor]] = {name: t[name] for name in t}
    else:
        with reference.watch(model, config.num_hidden_layers, config.num_attention_heads) as kept:
            loss = model(**inputs).loss
        seen = kept
    loss.backward()
    values: Values = {}
    for name in names(config.num_hidden_layers):
        value = seen[name]
        values[name] = [x.detach().cpu() for x in (value if isinstance(value, list) else [value])]
    values |= {f"gradient:{name}": [_gradient(p).cpu()] for name, p in parameters.items()}
    values |= {f"step:{name}": [x] for name, x in _stepped(parameters, mine).items()}
    if dropout and "layout" not in inputs and dtype == rounded:  # masks depend on both
        model.zero_grad(set_to_none=True)
        torch.manual_seed(SEED)
        model.train()(**inputs).loss.backward()
        values |= {f"dropout:{name}": [_gradient(p).cpu()] for name, p in parameters.items()}
    return values


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Zero for a parameter that no longer takes part, which is then a difference and no crash."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _stepped(parameters: dict[str, nn.Parameter], mine: bool) -> dict[str, Tensor]:
    """The parameters after one step of our AdamW or of torch's, in fp32 at least."""
    copies = {}
    for name, parameter in parameters.items():
        wide = torch.promote_types(parameter.dtype, torch.float32)
        copies[name] = nn.Parameter(parameter.detach().to(wide, copy=True))
        copies[name].grad = _gradient(parameter).to(wide)
    if mine:
        AdamW([Group(list(copies.values()), DECAY)], "torch").step(LR)
    else:
        torch.optim.AdamW(copies.values(), lr=LR, weight_decay=DECAY).step()
    return {name: parameter.detach().cpu() for name, parameter in copies.items()}


def _cut(values: Values, lengths: Sequence[int]) -> Values:
    """A padded batch's values with the padding cut away."""
    cut: Values = {}
    for name, parts in values.items():
        if ":" in name:  # of parameters, which have no tokens
            cut[name] = parts
        elif name.rpartition(".")[2] in MAPS:
            cut[name] = [map_HSS[:, :n, :n] for map_HSS, n in zip(parts[0], lengths)]
        else:
            cut[name] = [torch.cat([row[:n] for row, n in zip(parts[0], lengths)])]
    return cut
