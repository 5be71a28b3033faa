"""What other tools make of the float ONNX files of `benchmarks.quantization`.

Each is called as its documentation says, with the same calibration data. ONNX Runtime's tools get a
file that was prepared by its own `quant_pre_process`. NNCF's accuracy control is given the very
samples that judge afterwards, which favours it.

`pip install nncf`
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

MAX_DROP = 0.01  # that accuracy control may lose, as a share of the samples
Feed = dict[str, NDArray[Any]]  # arguments of one run, by the names of the file's inputs


@dataclass(frozen=True)
class Job:
    """What a peer is given.

    Attributes:
        float_path: of the float32 file.
        path: of the file to write.
        calibration: batches.
        evaluation: batches that accuracy control may look at.
        labels: of their samples.
        is_transformer: its work is in linear layers.
    """

    float_path: Path
    path: Path
    calibration: Sequence[Feed]
    evaluation: Sequence[Feed]
    labels: NDArray[np.int64]
    is_transformer: bool


def ort_defaults(job: Job) -> None:
    """`quantize_static` with its defaults: int8 activations, weights with one scale a tensor."""
    quantize_static(str(prepared(job)), str(job.path), Reader(job.calibration))


def ort_static(job: Job) -> None:
    """`quantize_static` as its documentation advises for x86: uint8 and int8 per channel."""
    quantize_static(
        str(prepared(job)),
        str(job.path),
        Reader(job.calibration),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def ort_dynamic(job: Job) -> None:
    """`quantize_dynamic`, weights int8 per channel: no calibration."""
    quantize_dynamic(
        str(prepared(job)), str(job.path), per_channel=True, weight_type=QuantType.QInt8
    )


def nncf_static(job: Job) -> None:
    """`nncf.quantize` of the ONNX backend with its defaults."""
    import nncf

    quantized = nncf.quantize(
        onnx.load(job.float_path),
        nncf.Dataset(job.calibration),
        subset_size=len(job.calibration),
        model_type=nncf.ModelType.TRANSFORMER if job.is_transformer else None,
    )
    onnx.save(quantized, job.path)


def nncf_accuracy_control(job: Job) -> None:
    """`nncf.quantize_with_accuracy_control`: back to float, layer by layer, within `MAX_DROP`."""
    import nncf

    samples = list(split_batches(job.evaluation))

    def validate(model: onnx.ModelProto, indices: Iterable[int]) -> tuple[float, list[float]]:
        chosen = list(indices)
        answers = predict(open_session(model.SerializeToString()), [samples[i] for i in chosen])
        right = (answers == job.labels[chosen]).astype(float)
        return float(right.mean()), right.tolist()

    quantized = nncf.quantize_with_accuracy_control(
        onnx.load(job.float_path),
        nncf.Dataset(job.calibration),
        nncf.Dataset(range(len(samples))),
        validate,
        max_drop=MAX_DROP,
        drop_type=nncf.DropType.ABSOLUTE,
        subset_size=len(job.calibration),
        model_type=nncf.ModelType.TRANSFORMER if job.is_transformer else None,
    )
    onnx.save(quantized, job.path)


PEERS: dict[str, Callable[[Job], None]] = {
    "ORT defaults": ort_defaults,
    "ORT static, u8/s8 per channel": ort_static,
    "ORT dynamic": ort_dynamic,
    "NNCF": nncf_static,
    "NNCF accuracy control": nncf_accuracy_control,
}
FOR_TRANSFORMERS = frozenset({"ORT dynamic"})


def run_peer(name: str, job: Job) -> None:
    """Let the peer write `job.path`, without what it prints, logs and warns of."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            PEERS[name](job)
        finally:
            logging.disable(logging.NOTSET)


def prepared(job: Job) -> Path:
    """The float file with its shapes inferred, as ONNX Runtime's tools want it."""
    path = job.path.with_suffix(".prepared.onnx")
    quant_pre_process(str(job.float_path), str(path), skip_symbolic_shape=True)
    proto = onnx.load(path)
    # quantize_dynamic transposes weights, and then refuses what was noted of their shapes before
    weights = {tensor.name for tensor in proto.graph.initializer}
    kept = [value for value in proto.graph.value_info if value.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    onnx.save(proto, path)
    return path


class Reader(CalibrationDataReader):
    """Batches, as ONNX Runtime's calibration asks for them."""

    def __init__(self, batches: Iterable[Feed]) -> None:
        self.batches: Iterator[Feed] = iter(batches)

    def get_next(self) -> Feed | None:
        """The next batch, None at the end."""
        return next(self.batches, None)


def open_session(model: Path | bytes, threads: int = 1) -> ort.InferenceSession:
    """A session on the CPU whose threads rest when it does not run."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def predict(
    session: ort.InferenceSession, samples: Sequence[Feed], batch_size: int = 16
) -> NDArray[np.int64]:
    """The likeliest class of each of the samples, which are batches of one."""
    answers = [np.zeros(0, np.int64)]
    for start in range(0, len(samples), batch_size):
        some = samples[start : start + batch_size]
        feed = {name: np.concatenate([sample[name] for sample in some]) for name in some[0]}
        answers.append(session.run(None, feed)[0].argmax(1))
    return np.concatenate(answers)


def split_batches(batches: Iterable[Feed]) -> Iterator[Feed]:
    """Each sample as a batch of one."""
    for batch in batches:
        for index in range(len(next(iter(batch.values())))):
            yield {name: array[index : index + 1] for name, array in batch.items()}
