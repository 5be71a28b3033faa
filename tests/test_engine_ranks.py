"""The engine on two processes, over gloo, compared with one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from compressor import ExternalTrainingLoop
from tests import ranks_job
from tests.ranks_job import SGD, CrossEntropy, PlainNet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ONE_SAMPLE = 0.5 + 1e-6  # percent of the test split: rounding may turn one answer
MASKS: dict[str, Any] = {"techniques": ["channel_pruning", "sparsity"]}
NUMBERS: dict[str, Any] = {
    "techniques": ["quantization"],
    "optimization": "quantization",
    "target": {"runtime": "onnxruntime"},
    "delta": 12.0,
    "fine_tuner": {"optimizer": SGD, "epochs": 2},
    "full_trainer": {"optimizer": SGD, "epochs": 1},
}


class NanLoss(CrossEntropy):
    """Not a number as soon as a smaller model trains."""

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        loss = super().__call__(model, batch)["loss"]
        is_variant = sum(p.numel() for p in model.parameters()) < sum(
            p.numel() for p in PlainNet().parameters()
        )
        return {"loss": loss * torch.nan if is_variant and model.training else loss}


class FailsOnOne(CrossEntropy):
    """A bug that shows on rank 1 only."""

    def __call__(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        if dist.is_initialized() and dist.get_rank() == 1 and model.training:
            raise ValueError("a broken sample")
        return super().__call__(model, batch)


class Breaks(ranks_job.Accuracy):
    """An evaluation with a bug, or one that the user is tired of."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, model: nn.Module, loader: Any) -> dict[str, float]:
        raise self.error


class OwnLoop(ExternalTrainingLoop):
    """Trains nothing; counts the calls in this process."""

    calls = 0

    def __init__(self) -> None:
        super().__init__(self.count, {"epochs": 1, "validation": False})

    def count(self, model: nn.Module, args: Any) -> nn.Module:
        OwnLoop.calls += 1
        return model


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("reference") / "weights.pt"
    ranks_job.train_reference(path)
    return path


def jobs_of_a_rank(rank: int, weights: Path, folder: Path) -> dict[str, Any]:
    """Several runs, one after the other, in one group of the caller's own."""
    mine = folder / f"rank{rank}"  # which only rank 0 makes

    def attempt(name: str, **changes: Any) -> Any:
        try:
            return ranks_job.run(weights, mine / name, **changes)
        except BaseException as error:  # whatever it is, a test looks at it
            return [type(error).__name__, str(error)]

    found = {
        "masks": attempt("masks", **MASKS),
        "numbers": attempt("numbers", **NUMBERS),
        "nan": attempt("nan", loss=NanLoss),
        "finished": attempt("masks", **MASKS),
        "too large a delta": attempt("delta", delta=95.0),
        "another model": attempt("model", model=PlainNet(16 + rank)),
        "another configuration": attempt("seed", seed=rank),
        "ray": attempt("ray", executor="ray"),
        "no test split": attempt("split", data=ranks_job.make_data() if not rank else {"train": 0}),
        "a bug on rank 0": attempt("bug on 0", judge=Breaks(ValueError("no answer"))),
        "interrupted": attempt("interrupted", judge=Breaks(KeyboardInterrupt())),
        "own loop": attempt("own loop", external_training_loop=OwnLoop()),
        "calls of the loop": OwnLoop.calls,
        "still a group": dist.is_initialized(),
    }
    engine = ranks_job.make_engine(weights, mine / "dryrun")
    engine.run(dryrun=True)
    assert engine.result is not None
    found["dryrun"] = engine.result.certificate.metric
    found["bug on one"] = attempt("bug", loss=FailsOnOne)
    return found


def run_rank(
    rank: int, work: Callable[[int, Path, Path], Any], weights: Path, folder: Path
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(work(rank, weights, folder), folder / f"{rank}.pt")
    os._exit(0)  # not through the destructors: a thread of autograd that still runs would abort


@pytest.fixture(scope="module")
def spawned(
    weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """What rank 0 and rank 1 found, and their folder."""
    folder = tmp_path_factory.mktemp("spawned")
    arguments = (jobs_of_a_rank, weights, folder)
    start_processes(run_rank, arguments, nprocs=2, start_method="spawn")
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    return first, second, folder


def check_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Rank 0 and rank 1 return the same, bit by bit."""
    for name in ours.keys() - {"weights", "evaluations"}:
        assert ours[name] == theirs[name], name
    for name, value in ours["weights"].items():
        assert torch.equal(value, theirs["weights"][name]), name
    assert ours["evaluations"] > 0
    assert theirs["evaluations"] == 0, "rank 0 alone evaluates"


def check_like_one(
    several: dict[str, Any], one: dict[str, Any], *, tolerance: float = 1e-3, samples: int = 1
) -> None:
    for name in ("plan", "structure", "size_bytes", "macs", "looks", "variants", "is_quantized"):
        assert several[name] == one[name], name
    assert several["reference_metric"] == one["reference_metric"]
    assert several["metric"] == pytest.approx(one["metric"], abs=samples * ONE_SAMPLE)
    for name, value in several["weights"].items():
        torch.testing.assert_close(value, one["weights"][name], rtol=0, atol=tolerance)


def test_pruned_and_masked_variants_recover_as_in_one_process(
    spawned: tuple[dict[str, Any], dict[str, Any], Path], weights: Path, tmp_path: Path
) -> None:
    ours, theirs, folder = spawned
    one = ranks_job.run(weights, tmp_path, **MASKS)
    techniques = {choice["technique"] for choice in one["plan"]}
    assert techniques == {"channel_pruning", "sparsity"}
    check_same(ours["masks"], theirs["masks"])
    check_like_one(ours["masks"], one)
    zeros = {name: (value == 0).sum() for name, value in ours["masks"]["weights"].items()}
    assert any(zeros.values())
    assert all((one["weights"][name] == 0).sum() == count for name, count in zeros.items())
    assert (folder / "rank0" / "masks" / "result.json").exists()
    assert not (folder / "rank1").exists(), "one rank writes"


def test_numbers_are_trained_as_in_one_process(
    spawned: tuple[dict[str, Any], dict[str, Any], Path], weights: Path, tmp_path: Path
) -> None:
    ours, theirs, _ = spawned
    one = ranks_job.run(weights, tmp_path, **NUMBERS)
    assert one["is_quantized"], "they were trained"
    check_same(ours["numbers"], theirs["numbers"])
    # Rounding makes steps of differences in the last bit: weights drift apart, as they do in one
    # process when those of the reference are changed by 3e-7 of their values.
    check_like_one(ours["numbers"], one, tolerance=torch.inf, samples=4)


def test_a_variant_that_fails_everywhere_ends_alone(
    spawned: tuple[dict[str, Any], dict[str, Any], Path],
) -> None:
    ours, theirs, _ = spawned
    check_same(ours["nan"], theirs["nan"])
    assert "failed" in {status for _, status, _, _ in ours["nan"]["variants"]}


def test_a_finished_run_is_read_by_rank_0_and_shared(
    spawned: tuple[dict[str, Any], dict[str, Any], Path],
) -> None:
    for rank in range(2):
        first, again = spawned[rank]["masks"], spawned[rank]["finished"]
        assert again["evaluations"] == 0
        assert again["plan"] == first["plan"]
        for name, value in first["weights"].items():
            assert torch.equal(value, again["weights"][name])


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("too large a delta", "ConfigError", "delta=95 accepts every model"),
        ("another model", "ModelError", "'conv1.weight' differs"),
        ("another configuration", "ConfigError", "seed is 1 here and 0 there"),
        ("ray", "ConfigError", "was started in 2"),
        ("no test split", "DataError", "'test'"),
    ],
)
def test_what_is_wrong_is_said_by_every_rank(
    spawned: tuple[dict[str, Any], dict[str, Any], Path], name: str, kind: str, text: str
) -> None:
    for rank in range(2):
        assert spawned[rank][name][0] == kind
        assert text in spawned[rank][name][1]
        assert spawned[rank]["still a group"]


def test_what_ends_rank_0_ends_the_others_that_wait(
    spawned: tuple[dict[str, Any], dict[str, Any], Path],
) -> None:
    ours, theirs, _ = spawned
    assert ours["a bug on rank 0"] == ["ValueError", "no answer"]
    assert theirs["a bug on rank 0"] == ["RankError", "Rank 0 failed: ValueError: no answer"]
    for kind, message in (ours["interrupted"], theirs["interrupted"]):
        assert kind == "KeyboardInterrupt"
        assert "run again with run_dir=" in message


def test_a_loop_of_the_users_own_trains_in_rank_0_alone(
    spawned: tuple[dict[str, Any], dict[str, Any], Path],
) -> None:
    ours, theirs, _ = spawned
    check_same(ours["own loop"], theirs["own loop"])
    assert ours["calls of the loop"] > 0
    assert theirs["calls of the loop"] == 0


def test_a_dryrun_leaves_no_folder(
    spawned: tuple[dict[str, Any], dict[str, Any], Path],
) -> None:
    ours, theirs, folder = spawned
    assert ours["dryrun"] == theirs["dryrun"]
    assert not (folder / "rank0" / "dryrun").exists()


def test_a_bug_on_one_rank_ends_the_others_with_its_message(
    spawned: tuple[dict[str, Any], dict[str, Any], Path],
) -> None:
    kind, message = spawned[0]["bug on one"]
    assert kind == "RankError"
    assert "Rank 1 failed: ValueError: a broken sample" in message


def start(launcher: Sequence[str], arguments: Sequence[Path], **environment: str) -> Any:
    """A process of the job's script."""
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "tests.ranks_job", *map(str, arguments)],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def one(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What comes of the job in one process."""
    return ranks_job.run(weights, tmp_path_factory.mktemp("one"))


def test_torchrun_gives_what_one_process_gives(
    weights: Path, one: dict[str, Any], tmp_path: Path
) -> None:
    process = start(TORCHRUN, [weights, tmp_path / "run", tmp_path])
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert len(one["plan"]) > 0
    check_same(ours, theirs)
    check_like_one(ours, one)
    assert not (tmp_path / "run" / "of-rank-1").exists()


@pytest.mark.parametrize(
    ("before", "after", "killed"), [(TORCHRUN, [], 1), ([], TORCHRUN, 0)], ids=["2 to 1", "1 to 2"]
)
def test_a_rank_that_is_killed_ends_the_others_and_another_number_goes_on(
    weights: Path,
    one: dict[str, Any],
    tmp_path: Path,
    before: Sequence[str],
    after: Sequence[str],
    killed: int,
) -> None:
    run_dir = tmp_path / "run"
    arguments = [weights, run_dir, tmp_path]
    in_its_second_epoch = {ranks_job.KILL: f"{killed},18"}  # an epoch has 11 steps
    process = start(before, arguments, **in_its_second_epoch)
    while process.poll() is None and not list(run_dir.glob("variants/*/fit/*.ckpt")):
        time.sleep(0.05)
    said, _ = process.communicate(timeout=60)
    assert process.returncode != 0, said
    assert list(run_dir.glob("variants/*/fit/*.ckpt")), said
    assert not (run_dir / "result.json").exists()
    process = start(after, arguments)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    check_like_one(torch.load(tmp_path / "0.pt", weights_only=True), one)
    assert "going on after epoch 1" in (run_dir / "engine.log").read_text()
