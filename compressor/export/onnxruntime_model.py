"""An ONNX file as a module that is called like the model it was exported from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from torch import Tensor, nn

from compressor.errors import ExportError, first_line
from compressor.export.signature import METADATA_KEY, Signature
from compressor.interfaces.inputs import ModelInputs

# They have no common base but Exception.
ORT_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int8)": torch.int8,
    "tensor(int16)": torch.int16,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


class OnnxRuntimeModel(nn.Module):
    """Runs a file that `export_onnx` or `quantize_onnx` wrote, on the CPU.

    It takes the model's arguments, on any device and in any batch size, and returns the model's
    results on the device of the first argument: evaluation code that puts everything on the GPU
    runs unchanged. `.to()`, `.half()` and the like do nothing; it has one empty parameter, for
    code that asks `next(model.parameters()).device`.

    Args:
        path: of the file.
        threads: of one call.

    Raises:
        ExportError: if ONNX Runtime refuses the file, or another program wrote it.
    """

    def __init__(self, path: Path | str, *, threads: int = 1) -> None:
        super().__init__()
        self.path = Path(path)
        self.session = open_session(self.path, threads)
        metadata = self.session.get_modelmeta().custom_metadata_map
        if METADATA_KEY not in metadata:
            raise ExportError(
                f"{self.path} does not say how it is called. Write it with `export_onnx`."
            )
        self.signature = Signature.from_json(metadata[METADATA_KEY])
        self._inputs = [(item.name, DTYPES[item.type]) for item in self.session.get_inputs()]
        self._placeholder = nn.Parameter(torch.zeros(0), requires_grad=False)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's results, computed by the file.

        Raises:
            ExportError: if the arguments are not those of the exported call.
        """
        inputs = ModelInputs(args, kwargs)
        device = next((tensor.device for tensor in inputs.tensors()), torch.device("cpu"))
        arrays = self.bind(inputs)()
        outputs = [torch.from_numpy(np.asarray(array)).to(device) for array in arrays]
        return self.signature.unflatten(outputs)

    def bind(self, inputs: ModelInputs) -> Callable[[], list[NDArray[Any]]]:
        """A call of the file alone, for timing: the inputs are converted now and not each time."""
        tensors = self.signature.flatten(inputs)
        feed = {
            name: tensor.detach().to("cpu", dtype).numpy()
            for (name, dtype), tensor in zip(self._inputs, tensors, strict=True)
        }
        return lambda: self._run(feed)

    def _run(self, feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        try:
            arrays: list[NDArray[Any]] = self.session.run(None, feed)
        except ORT_ERRORS as error:
            shapes = {name: array.shape for name, array in feed.items()}
            raise ExportError(
                f"ONNX Runtime cannot run {self.path} on {shapes}: {first_line(error)} "
                "Only the batch may differ from the call that the file was exported with."
            ) from error
        return arrays

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OnnxRuntimeModel:
        return self  # what .to(), .cuda(), .half() come down to: the file stays where it is


def open_session(path: Path, threads: int, profile_prefix: Path | None = None) -> Any:
    """A session on the CPU that leaves the other threads alone when it is not running.

    Args:
        path: of the file.
        threads: of one call.
        profile_prefix: of the file into which every node's time is written; None times nothing.

    Raises:
        ExportError: if ONNX Runtime refuses the file.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors: warnings are about its own optimiser
    # Between two calls its threads would else spin and slow down what is timed in turn with it.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        raise ExportError(
            f"ONNX Runtime {ort.__version__} refuses {path}: {first_line(error)} "
            "Export the model again; if it stays so, choose target: {'runtime': 'eager'}."
        ) from error
