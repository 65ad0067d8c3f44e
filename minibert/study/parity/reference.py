"""transformers, watched from outside: the model it makes of a directory, and what that computes.

transformers is no dependency of minibert; it is imported when a reference is asked for.
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
from minibert.pretrained.weights import names_of

# Our name of an intermediate on the left, the module of transformers that takes it in or gives it
# out on the right; {i} runs over the layers. Scores and maps have no module: see _Attention.
WATCHED = """
embeddings.sum              in   bert.embeddings.LayerNorm
embeddings                  out  bert.embeddings
layers.{i}.q                out  bert.encoder.layer.{i}.attention.self.query
layers.{i}.k                out  bert.encoder.layer.{i}.attention.self.key
layers.{i}.v                out  bert.encoder.layer.{i}.attention.self.value
layers.{i}.context          in   bert.encoder.layer.{i}.attention.output.dense
layers.{i}.attention_output out  bert.encoder.layer.{i}.attention.output.dense
layers.{i}.attention_norm   out  bert.encoder.layer.{i}.attention.output.LayerNorm
layers.{i}.pre_gelu         out  bert.encoder.layer.{i}.intermediate.dense
layers.{i}.post_gelu        out  bert.encoder.layer.{i}.intermediate.intermediate_act_fn
layers.{i}.ffn_output       out  bert.encoder.layer.{i}.output.dense
layers.{i}.ffn_norm         out  bert.encoder.layer.{i}.output.LayerNorm
"""
BY_HEAD = ("q", "k", "v", "context")  # (B, S, D) there, (B, S, H, K) here


def library() -> ModuleType:
    """transformers itself.

    Raises:
        MinibertError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MinibertError(
            f"parity compares with transformers, which cannot be imported ({error}): "
            "pip install 'minibert[parity]'"
        ) from None
    return transformers


def load(directory: Path, ours: BertWithHead, attn: str) -> nn.Module:
    """What transformers makes of the same directory, in fp32 and eval mode.

    Its own loader reads the file; what the file lacks, and ``ours`` therefore drew, is copied.

    Args:
        directory: with config.json and model.safetensors.
        ours: the model that was loaded from it here.
        attn: "eager" or "sdpa".

    Raises:
        MinibertError: transformers is missing or refuses the directory.
    """
    transformers = library()
    with _quiet(transformers):
        try:
            theirs = getattr(transformers, type(ours).__name__).from_pretrained(
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
    """Without progress bars and reports of fresh parameters; both come back as they were."""
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


@contextmanager
def watch(theirs: nn.Module, layers: int, heads: int) -> Iterator[dict[str, Tensor]]:
    """Within the block, a call fills the dict with every intermediate under our names.

    Args:
        theirs: what ``load`` gave.
        layers: how many it has.
        heads: H.

    Yields:
        name to tensor, padded: (B, S, ...), and (B, H, S, S) for scores and probabilities.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str, x_BSD: Tensor) -> None:
        by_head = name.rpartition(".")[2] in BY_HEAD
        seen[name] = (x_BSD.unflatten(-1, (heads, -1)) if by_head else x_BSD).detach()

    with ExitStack() as undo:
        for line in WATCHED.strip().splitlines():
            pattern, end, path = line.split()
            for i in range(layers if "{i}" in pattern else 1):
                name = pattern.replace("{i}", str(i))
                module = theirs.get_submodule(path.replace("{i}", str(i)))
                if end == "in":
                    hook = module.register_forward_pre_hook(
                        lambda _m, args, name=name: keep(name, args[0])
                    )
                else:
                    hook = module.register_forward_hook(
                        lambda _m, _args, out, name=name: keep(name, out)
                    )
                undo.callback(hook.remove)
        hook = theirs.register_forward_hook(lambda _m, _args, out: keep("logits", out.logits))
        undo.callback(hook.remove)
        undo.enter_context(_Attention(seen))
        yield seen


class _Attention(TorchFunctionMode):
    """Catches what no module shows: the input and output of every layer's softmax.

    Under sdpa there is no softmax to catch; the scores are computed once more from the very q, k
    and mask the kernel is called with. One call a layer, so counting tells the layer.
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
                # Added, as eager attention does: in fp16 the lowest number plus a score is -inf.
                lowest = torch.finfo(scores_BHSS.dtype).min
                added_BHSS = torch.zeros_like(mask_BHSS, dtype=scores_BHSS.dtype)
                scores_BHSS = scores_BHSS + added_BHSS.masked_fill(~mask_BHSS, lowest)
            self._keep(scores_BHSS, F.softmax(scores_BHSS, dim=-1))
        return out

    def _keep(self, scores_BHSS: Tensor, probs_BHSS: Tensor) -> None:
        self.seen[f"layers.{self.layer}.scores"] = scores_BHSS.detach()
        self.seen[f"layers.{self.layer}.probs"] = probs_BHSS.detach()
        self.layer += 1
