"""PyTorch: opens a job as a bench."""

from __future__ import annotations

from pathlib import Path

from compressor.frameworks.base import Job
from compressor.frameworks.torch_bench import TorchBench
from compressor.progress import Progress


class TorchFramework:
    """Models that are `torch.nn.Module`s."""

    def open(self, job: Job, run_dir: Path, progress: Progress) -> TorchBench:
        """Understand `job`; bad data and configuration are refused here."""
        return TorchBench(job, run_dir, progress)
