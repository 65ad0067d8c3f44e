"""The peers of minibert, each as a function from padded batches to logits."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.workload import Inputs, need

Predict = Callable[[Inputs], Tensor]  # logits (B, S, L), float


def torch_model(model: nn.Module) -> Predict:
    return lambda inputs: model(**inputs).logits


def eager(model: nn.Module) -> Predict:
    """transformers' model with eager attention."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return torch_model(model)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


@cache
def onnx_file(model: nn.Module, folder: Path) -> Path:
    """transformers' model as ONNX."""
    need("onnx")
    path = folder / "model.onnx"
    ids = torch.ones(2, 7, dtype=torch.long)
    mask = ids.clone()
    mask[1, 4:] = 0  # traced with padding, or the mask would be left out of the graph
    axes = {0: "B", 1: "S"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Logits(model).eval(),
            (ids, mask),
            str(path),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes, "logits": axes},
            opset_version=17,
            dynamo=False,
        )
    return path


def onnxruntime_model(model: nn.Module, folder: Path, int8: bool = False) -> Predict:
    need("onnxruntime")
    import onnxruntime

    path = onnx_file(model, folder)
    if int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        logging.disable(logging.WARNING)
        small = folder / "model.int8.onnx"
        quantize_dynamic(str(path), str(small), weight_type=QuantType.QInt8)
        logging.disable(logging.NOTSET)
        path = small
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def predict(inputs: Inputs) -> Tensor:
        arrays = {name: x.numpy() for name, x in inputs.items()}
        return torch.from_numpy(session.run(None, arrays)[0])

    return predict


def openvino_model(
    model: nn.Module,
    folder: Path,
    precision: str,
    calibration: Sequence[Inputs] = (),
    streams: int = 1,
) -> Predict:
    """``precision``: "fp32", "bf16" or "int8", which is calibrated on real batches.

    ``streams``: batches computed at once, if as many threads call.
    """
    need("openvino")
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": streams,
    }
    path = onnx_file(model, folder)
    if precision == "int8":
        small = folder / "model.int8.xml"
        if not small.exists():
            openvino.save_model(_quantised(core.read_model(path), calibration), small)
        path = small
    network = core.compile_model(core.read_model(path), "CPU", settings)
    requests: SimpleQueue = SimpleQueue()
    for _ in range(streams):
        requests.put(network.create_infer_request())

    def predict(inputs: Inputs) -> Tensor:
        request = requests.get()
        logits = request.infer({name: x.numpy() for name, x in inputs.items()})[0]
        requests.put(request)
        return torch.from_numpy(logits)

    return predict


def _quantised(network: Any, calibration: Sequence[Inputs]) -> Any:
    """Weights and activations in int8 by NNCF, with SmoothQuant and bias correction."""
    need("nncf")
    import nncf

    nncf.set_log_level(logging.ERROR)
    data = nncf.Dataset(calibration, lambda inputs: {n: x.numpy() for n, x in inputs.items()})
    with redirect_stdout(io.StringIO()):  # progress bars
        return nncf.quantize(
            network, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(calibration)
        )
