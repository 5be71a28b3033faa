"""The exported file of a finished run beside its reference in float32, at several batch sizes.

python -m benchmarks.deployed_latency --run-dir runs/cifar-resnet20
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

from benchmarks.common import finish, interleave, make_parser

BATCH_SIZES = (1, 32)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="of a finished run")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    started = time.monotonic()
    result = json.loads((arguments.run_dir / "result.json").read_text())
    files = {
        "reference": arguments.run_dir / "reference" / "model_float.onnx",
        "compressed": Path(result["artifacts"]["onnx"]),
    }
    sessions = {name: open_session(path, arguments.threads) for name, path in files.items()}
    rows = []
    for batch_size in BATCH_SIZES:
        times = measure(sessions, batch_size, arguments.quick)
        rows.append(
            {
                "batch": batch_size,
                "threads": arguments.threads,
                "reference ms": times["reference"],
                "compressed ms": times["compressed"],
                "latency ratio": times["reference"] / times["compressed"],
            }
        )
    sizes = {name: path.stat().st_size for name, path in files.items()}
    summary = {
        **{f"latency_ratio_batch_{row['batch']}": row["latency ratio"] for row in rows},
        "size_ratio": sizes["reference"] / sizes["compressed"],
        "metric": result["certificate"]["metric"],
        "reference_metric": result["certificate"]["reference_metric"],
    }
    finish(rows, summary, arguments, started)


def measure(
    sessions: dict[str, ort.InferenceSession], batch_size: int, quick: bool
) -> dict[str, float]:
    """Milliseconds of each session, in turns."""
    calls = {}
    for name, session in sessions.items():
        (item,) = session.get_inputs()
        shape = [batch_size, *item.shape[1:]]
        feed = {item.name: np.random.default_rng(0).standard_normal(shape, np.float32)}
        calls[name] = lambda session=session, feed=feed: session.run(None, feed)
    return interleave(calls, rounds=2 if quick else 11, block_seconds=0.05 if quick else 0.3)


def open_session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
