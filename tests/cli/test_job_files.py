"""A job file as the documentation shows it, and a run in two processes, as one types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from docs.cli_page import HEAD
from tests.cli.conftest import Invoke

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
QUICK = ("target.runtime=eager", "export.formats=[]", "techniques=[low_rank]", "optimization=macs")


def block(language: str) -> str:
    """The first of the page."""
    return HEAD.partition(f"```{language}\n")[2].partition("```")[0]


def settings(*texts: str) -> list[str]:
    """As options."""
    return [word for text in texts for word in ("--set", text)]


def test_the_job_of_the_documentation_runs(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.yaml").write_text(block("yaml"))
    (tmp_path / "train.py").write_text(block("python"))
    monkeypatch.chdir(tmp_path)
    done = invoke("run", "job.yaml", "--dry-run", *settings(*QUICK))
    assert done.exit_code == 0, done.stderr
    assert "Every step works on two batches" in done.stdout


def test_two_processes_of_torchrun_do_one_job(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    job = ["tests.cli.tiny_job:make", "--run-dir", str(tmp_path), "--json", "-q"]
    trained = ("fine_tuner.epochs=1", "full_trainer.epochs=1", "delta=90")
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "compressor", "run", *job, *settings(*QUICK, *trained)],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)  # of one process alone
    written = json.loads((tmp_path / "result.json").read_text())
    assert printed["certificate"] == written["certificate"]
    assert (tmp_path / "job.json").exists()
    assert any(variant["epochs"] for variant in written["variants"])
