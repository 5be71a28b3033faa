"""One script alone, under torchrun, and with the flag of Horovod."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from compressor.errors import ConfigError
from tests.examples import scripts


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return scripts.load("distributed", monkeypatch)


@pytest.mark.slow
def test_two_processes_of_torchrun_compress_together(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    module = ["-m", "tests.brevity", "distributed"]
    options = ["--quick", "--delta", "20", "--run-dir", str(tmp_path)]
    folders = os.pathsep.join(map(str, (scripts.EXAMPLES.parent, scripts.EXAMPLES)))
    environment = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": folders}
    done = subprocess.run(
        [sys.executable, *launcher, *module, *options],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("size on disk") == 1, "rank 0 alone prints"
    result = json.loads((tmp_path / "result.json").read_text())
    certificate = result["certificate"]
    assert certificate["within_delta"]
    assert certificate["macs_ratio"] > 1


def test_the_flag_of_horovod_reaches_the_engine(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which then asks for Horovod, before any work."""
    monkeypatch.setitem(sys.modules, "horovod", None)
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    monkeypatch.setattr(example, "train", lambda model, *_, **__: model)
    with pytest.raises(ConfigError, match="build_horovod"):
        scripts.run(example, "--horovod", "--run-dir", tmp_path)
