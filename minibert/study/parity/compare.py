"""Compare minibert with transformers, tensor by tensor, and find the first that differs.

    for comparison in compare(directory, texts):    # or: minibert parity DIR
        print(table(comparison))

For every attention implementation, dtype and layout this compares every intermediate, every
gradient, every parameter after one optimiser step, and in padded batches every gradient of a step
with dropout. judge.py says what is promised and how errors are measured. The step is taken on fp32
copies, as in mixed precision: in fp16 Adam's eps of 1e-8 is zero.

It runs on a CPU or a GPU. Fused attention needs a GPU, where no bit equality is promised.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from minibert.files import MinibertError
from minibert.machine import DTYPES, choose_device, choose_dtype, name_of
from minibert.model.heads import BertForMaskedLM, BertForTokenClassification, BertWithHead
from minibert.model.labels import IGNORE
from minibert.model.layout import Packed
from minibert.pretrained import config_json, families, hub, weights
from minibert.pretrained.tokenizer import Tokenizer
from minibert.pretrained.weights import names_of
from minibert.study.intermediates import intermediate_of
from minibert.study.parity import reference
from minibert.study.parity.judge import Comparison, Values, judge, same_bits
from minibert.study.trace import trace
from minibert.tagging.stream import progress
from minibert.training.adamw import AdamW, Group

ON_CPU = ("eager", "sdpa")  # fused runs on CUDA only
LAYOUTS = ("padded", "packed")
TEXTS = (  # of different lengths, so that there is padding
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
    dtypes: Sequence[str | torch.dtype] = tuple(DTYPES),
    layouts: Sequence[str] = LAYOUTS,
    device: str = "cpu",
) -> list[Comparison]:
    """Compare minibert with transformers on a checkpoint, in all combinations.

    Args:
        directory: a checkpoint with its tokenizer, or a name of ``hub.MODELS``.
        texts: one sentence each; together they are one batch.
        attn: of "eager", "sdpa" and "fused"; fused is compared with transformers' sdpa.
        dtypes: of "fp32", "bf16" and "fp16", or torch's dtypes.
        layouts: of "padded" and "packed".
        device: where everything runs, float64 included.

    Raises:
        MinibertError: transformers is not installed, the directory cannot be loaded, a text is
            empty or too long, or the device or fused attention is not available.
    """
    where = choose_device(device)
    directory = hub.locate_model(directory)
    reference.library()
    model_class = model_class_of(directory)
    ours = {
        name: model_class.from_pretrained(
            directory, attn_implementation=name, device=where, seed=SEED
        )
        for name in {"eager", *attn}
    }
    theirs = {
        name: reference.load(directory, model, "sdpa" if name == "fused" else name).to(where)
        for name, model in ours.items()
    }
    padded, packed = batches(ours["eager"], Tokenizer.from_pretrained(directory), texts, where)
    lengths = packed["layout"].lengths
    comparisons = []
    bar = progress(None, "comparisons", len(dtypes) * len(attn) * len(layouts))
    for chosen in dtypes:
        dtype = choose_dtype(chosen, where).value
        before = {name: p.detach().to(dtype).cpu() for name, p in ours["eager"].named_parameters()}
        exact = observe(theirs["eager"], ours["eager"], padded, dtype, torch.float64)
        own = observe(ours["eager"], ours["eager"], padded, dtype, torch.float64)
        for name in attn:
            expected = observe(theirs[name], ours[name], padded, dtype, dtype)
            for layout in layouts:
                inputs = {"padded": padded, "packed": packed}[layout]
                bits = same_bits(name, layout, where.type)
                got = observe(ours[name], ours[name], inputs, dtype, dtype, bits)
                runs = [expected, exact, own]
                if not bits:  # nothing is promised at padding
                    got = got if layout == "packed" else cut(got, lengths)
                    runs = [cut(values, lengths) for values in runs]
                rows = judge(bits, got, runs[0], runs[1], runs[2], before)
                made = Comparison(name, name_of(dtype), layout, rows, where.type, bits=bits)
                comparisons.append(made)
                bar.update()
    bar.close()
    return comparisons


def model_class_of(directory: Path) -> type[BertWithHead]:
    """The model class of the head in the file; token classification if it has none."""
    model_type = config_json.read(directory / "config.json").model_type
    with weights.opened(directory / weights.WEIGHTS, model_type) as checkpoint:
        held = checkpoint.tensors
    transform = families.tensor_name("cls.predictions.transform.dense.weight", model_type)
    masked = "classifier.weight" not in held and transform in held
    return BertForMaskedLM if masked else BertForTokenClassification


def batches(
    model: BertWithHead,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    device: torch.device | str = "cpu",
) -> tuple[dict, dict]:
    """The texts as a padded and as a packed batch, with segments and labels.

    Labels are arbitrary but fixed. The second half of every text is segment 1 if the model has one,
    so that every row of the segment table gets a gradient.

    Raises:
        MinibertError: no text, one that is longer than the model, or a tokenizer that does not
            belong to the model.
    """
    config = model.config
    tokenizer.check_fits(config.vocab_size)
    ids = [tokenizer.encode(text) for text in texts]
    if not ids:
        raise MinibertError("no text: give at least one")
    for number, row in enumerate(ids, start=1):
        if len(row) > config.max_length:
            raise MinibertError(
                f"text {number}: {len(row)} word-pieces, but the model has "
                f"{config.max_length} positions: give a shorter one"
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
    """Run a copy of a model: intermediates, gradients, one step, and gradients with dropout.

    Args:
        source: the model, minibert's or transformers', in fp32. It is not changed.
        ours: minibert's model, for names and sizes.
        inputs: padded; minibert's may be packed.
        rounded: weights are rounded to this dtype first, so that a float64 run has the weights of
            the run that it judges.
        dtype: of the computation.
        dropout: whether to run with dropout too, if both can draw the same masks.

    Returns:
        All values, on the CPU.
    """
    layers, heads = ours.config.num_hidden_layers, ours.config.num_attention_heads
    model = copy.deepcopy(source).to(rounded).to(dtype).eval()
    mine = isinstance(model, BertWithHead)
    parameters = {
        name: model.get_parameter(name if mine else their_name)
        for name, their_name in names_of(ours).items()
    }
    seen: Mapping[str, Tensor | list[Tensor]]
    if isinstance(model, BertWithHead):
        with trace(model) as t:
            loss = model(**inputs).loss
        seen = {name: t[name] for name in t}
    else:
        with reference.watch(model, layers, heads) as seen:
            loss = model(**inputs).loss
    loss.backward()
    values: Values = {}
    for name in reference.watched(layers):
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
    """Zero for a parameter without one: a difference to report, not a crash."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _stepped(parameters: dict[str, nn.Parameter], mine: bool) -> dict[str, Tensor]:
    """The parameters after one step of minibert's AdamW or torch's, in fp32 or wider."""
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


def cut(values: Values, lengths: Sequence[int]) -> Values:
    """The values of a padded batch without its padding, as a packed batch has them."""
    real: Values = {}
    for name, parts in values.items():
        if ":" in name:  # of a parameter, which has no tokens
            real[name] = parts
        elif intermediate_of(name).is_map:
            real[name] = [map_HSS[:, :n, :n] for map_HSS, n in zip(parts[0], lengths)]
        else:
            real[name] = [torch.cat([row[:n] for row, n in zip(parts[0], lengths)])]
    return real
