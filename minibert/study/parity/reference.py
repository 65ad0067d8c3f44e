"""transformers, observed from outside: the model it loads from a directory, and its intermediates.

transformers is not a dependency of minibert. ``library`` imports it when a comparison starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minibert.files import MinibertError
from minibert.model.heads import BertWithHead
from minibert.pretrained.families import class_name
from minibert.pretrained.weights import names_of
from minibert.study.intermediates import intermediate_of, names


def library() -> ModuleType:
    """The module ``transformers``.

    Raises:
        MinibertError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MinibertError(
            f"parity compares with transformers, which cannot be imported ({error}): "
            "pip install 'transformers>=5'"
        ) from None
    return transformers


def load(directory: Path, ours: BertWithHead, attn: str) -> nn.Module:
    """Load a directory with transformers' own loader, in fp32 and eval mode.

    Parameters that the file lacks are copied from ``ours``, which has drawn them.

    Args:
        directory: with config.json and model.safetensors.
        ours: minibert's model of the same directory.
        attn: "eager" or "sdpa".

    Raises:
        MinibertError: transformers is not installed or cannot load the directory.
    """
    transformers = library()
    with _quiet(transformers):
        try:
            name = class_name(type(ours).__name__, ours.config.model_type)
            theirs = getattr(transformers, name).from_pretrained(
                directory,
                attn_implementation=attn,
                dtype=torch.float32,
                local_files_only=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise MinibertError(
                f"{directory}: transformers cannot load it ({reason}): fetch the files again"
            ) from None
    assert ours.load_report is not None
    with torch.no_grad():
        for name, their_name in names_of(ours).items():
            if their_name in ours.load_report.initialised:
                theirs.get_parameter(their_name).copy_(ours.get_parameter(name))
    return theirs.eval()


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Turn off progress bars and warnings about new parameters, and restore both afterwards."""
    log = transformers.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def watched(layers: int) -> list[str]:
    """The names of all intermediates that transformers shows, in the order of computation."""
    return [name for name in names(layers) if intermediate_of(name).theirs != "-"]


@contextmanager
def watch(theirs: nn.Module, layers: int, heads: int) -> Iterator[dict[str, Tensor]]:
    """Record the intermediates of a call inside the block under minibert's names.

    Args:
        theirs: from ``load``.
        layers: how many it has.
        heads: H.

    Yields:
        name to tensor, padded: (B, S, ...), and (B, H, S, S) for scores and probabilities.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str, x_BSD: Tensor) -> None:
        by_head = intermediate_of(name).axes == "HK"  # (B, S, D) in transformers
        seen[name] = (x_BSD.unflatten(-1, (heads, -1)) if by_head else x_BSD).detach()

    def on_input(name: str):
        return lambda _module, args: keep(name, args[0])

    def on_output(name: str):
        return lambda _module, _args, out: keep(name, out)

    base: nn.Module = theirs.base_model  # type: ignore[assignment]
    with ExitStack() as undo:
        for name in watched(layers):
            row = intermediate_of(name)
            if row.theirs in ("softmax", "logits"):  # no modules: see below
                continue
            layer = f"encoder.layer.{name.split('.')[1]}" if row.in_layer else ""
            module = base.get_submodule(layer + row.theirs)
            if row.end == "in":
                hook = module.register_forward_pre_hook(on_input(name))
            else:
                hook = module.register_forward_hook(on_output(name))
            undo.callback(hook.remove)
        hook = theirs.register_forward_hook(lambda _m, _args, out: keep("logits", out.logits))
        undo.callback(hook.remove)
        undo.enter_context(_Softmax(seen))
        yield seen


class _Softmax(TorchFunctionMode):
    """Records the input and output of every softmax, which no module has.

    sdpa calls no softmax. Its scores are computed again from the q, k and mask that the kernel is
    given. There is one call per layer, so counting the calls gives the layer.
    """

    def __init__(self, seen: dict[str, Tensor]):
        super().__init__()
        self.seen = seen
        self.layer = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.softmax:
            self._keep(args[0], out)
        elif func is F.scaled_dot_product_attention:
            q_BHSK, k_BHSK = args[0].detach(), args[1].detach()
            scores_BHSS = torch.matmul(q_BHSK, k_BHSK.transpose(2, 3)) * kwargs["scale"]
            mask_BHSS = kwargs.get("attn_mask")
            if mask_BHSS is not None:
                # Added as in eager attention: in fp16 the lowest number plus a score can be -inf.
                lowest = torch.finfo(scores_BHSS.dtype).min
                added_BHSS = torch.zeros_like(mask_BHSS, dtype=scores_BHSS.dtype)
                scores_BHSS = scores_BHSS + added_BHSS.masked_fill(~mask_BHSS, lowest)
            self._keep(scores_BHSS, F.softmax(scores_BHSS, dim=-1))
        return out

    def _keep(self, scores_BHSS: Tensor, probs_BHSS: Tensor) -> None:
        self.seen[f"layers.{self.layer}.scores"] = scores_BHSS.detach()
        self.seen[f"layers.{self.layer}.probs"] = probs_BHSS.detach()
        self.layer += 1
