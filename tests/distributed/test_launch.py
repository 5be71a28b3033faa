"""Processes meet, part, and end each other when one fails; two real ones over gloo."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from compressor.distributed import failures
from compressor.distributed.failures import (
    Failure,
    HorovodBoard,
    NoBoard,
    RankError,
    StoreBoard,
    explain_loss,
    in_common,
    is_lost_connection,
)
from compressor.distributed.launch import is_main_process, join
from compressor.errors import ConfigError, DataError, DeviceError, LossError
from compressor.interfaces import Device

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.fixture(autouse=True)
def _without_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher of this test run itself may have set."""
    for name in (*TORCHRUN, "LOCAL_RANK", "HOROVOD_SIZE", "HOROVOD_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("world_size", [None, "1"])
def test_one_process_meets_nobody(world_size: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    with join(Device.CPU) as team:
        assert team.context.world_size == 1
        assert team.context.is_main
        assert isinstance(team.board, NoBoard)
        assert not dist.is_initialized()


def test_an_error_of_the_only_process_comes_as_it_is() -> None:
    with pytest.raises(ValueError, match=r"^gloo is a word$"), join(Device.CPU):
        raise ValueError("gloo is a word")


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_of_torchruns_environment_is_refused(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in TORCHRUN.keys() - {missing}:
        monkeypatch.setenv(name, TORCHRUN[name])
    with pytest.raises(ConfigError, match=f"WORLD_SIZE=2 and no {missing}"), join(Device.CPU):
        pass


def test_horovodrun_without_use_horovod_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    with pytest.raises(ConfigError, match="Write use_horovod=True"), join(Device.CPU):
        pass


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**TORCHRUN, "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match=r"LOCAL_RANK=2 .* finds 2"), join(Device.GPU):
        pass


@pytest.mark.parametrize(
    ("environment", "is_main"),
    [({}, True), ({"RANK": "0"}, True), ({"RANK": "1"}, False), ({"HOROVOD_RANK": "1"}, False)],
)
def test_the_main_process_is_known_without_a_group(
    environment: dict[str, str], is_main: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_main_process() == is_main


def test_another_process_raises_the_same_class_if_it_is_ours() -> None:
    retold = Failure.of(LossError("it is nan"), rank=1).error()
    assert type(retold) is LossError
    assert str(retold) == "Rank 1 failed: it is nan"
    assert type(Failure.of(KeyError("a"), 0).error()) is RankError
    assert str(Failure.of(KeyError("a"), 0).error()) == "Rank 0 failed: KeyError: 'a'"
    assert type(Failure.of(KeyboardInterrupt(), 0).error()) is KeyboardInterrupt


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (dist.DistNetworkError("socket"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConfigError("Connection closed by peer"), False),
        (ValueError("gloo"), False),
    ],
)
def test_a_lost_connection_is_told_from_other_errors(error: Exception, is_lost: bool) -> None:
    assert is_lost_connection(error) == is_lost


def boards(world_size: int = 2) -> list[StoreBoard]:
    store = dist.HashStore()
    return [StoreBoard(store, rank, world_size) for rank in range(world_size)]


def test_the_lowest_rank_that_failed_is_the_reason() -> None:
    first, second, third = boards(3)
    assert first.told() is None
    third.tell(Failure(2, "ValueError", "c"))
    second.tell(Failure(1, "ValueError", "b"))
    assert first.told() == Failure(1, "ValueError", "b")
    assert second.told() == Failure(2, "ValueError", "c"), "not its own"


def test_an_error_in_all_processes_is_that_of_the_work() -> None:
    def fail() -> None:
        raise LossError("it is nan")

    caught: list[BaseException] = []

    def work_on(board: StoreBoard) -> None:
        try:
            in_common(board, 1, fail)
        except LossError as error:
            caught.append(error)

    threads = [threading.Thread(target=work_on, args=(board,)) for board in boards()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(error) for error in caught] == ["it is nan"] * 2


def test_an_error_in_one_process_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "PATIENCE_SECONDS", 0.05)

    def fail() -> None:
        raise LossError("it is nan")

    with pytest.raises(RankError, match="LossError in this process alone: it is nan"):
        in_common(boards()[0], 1, fail)
    assert in_common(boards()[0], 2, lambda: 3) == 3


def test_a_process_that_went_without_a_word_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "NEWS_SECONDS", 0.0)
    found = explain_loss(boards()[0], RuntimeError("Connection closed by peer\nmore"))
    assert type(found) is RankError
    assert "without a word: RuntimeError: Connection closed by peer" in str(found)
    assert "same run_dir" in str(found)


def test_where_horovod_cannot_tell_the_output_is_pointed_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(failures, "NEWS_SECONDS", 0.0)
    found = explain_loss(HorovodBoard(), RuntimeError("Horovod has been shut down"))
    assert "the reason is in that process's own output" in str(found)
    assert "same run_dir" in str(found)


# What two processes do, one after the other in each; all meetings are at one port.


def meet(rank: int) -> Any:
    with join(Device.CPU) as team:
        return [team.context.gather(rank), team.context.share(rank), is_main_process()]


def fail_on_one(rank: int) -> Any:
    """Rank 1 fails while rank 0 waits for it, and then for a moment more."""
    try:
        with join(Device.CPU) as team:
            if rank:
                raise DataError("The disk is gone.")
            team.context.gather(rank)
    except DataError as error:
        return str(error)


def die_on_one(rank: int) -> Any:
    try:
        with join(Device.CPU) as team:
            if rank:
                os.kill(os.getpid(), signal.SIGKILL)
            team.context.gather(rank)
    except RankError as error:
        return str(error)


def run_rank(rank: int, work: Callable[[int], Any], port: int, folder: Path) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    met = meet(rank)
    is_open = dist.is_initialized()
    began = time.monotonic()
    found = work(rank)
    torch.save([met, found, is_open, time.monotonic() - began], folder / f"{rank}.pt")
    os._exit(0)


def run_ranks(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What rank 0 found, and whether and how rank 1 did."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context: Any = start_processes(
        run_rank, (work, port, folder), nprocs=2, join=False, start_method="spawn"
    )
    for process in context.processes:
        process.join(60)
        assert not process.is_alive(), "it hangs"
    paths = [folder / f"{rank}.pt" for rank in range(2)]
    return [torch.load(path, weights_only=True) if path.exists() else None for path in paths]


@pytest.mark.slow
def test_processes_meet_and_one_that_fails_ends_the_other_with_its_error(tmp_path: Path) -> None:
    first, second = run_ranks(fail_on_one, tmp_path)
    assert first[0] == [[0, 1], 0, True]
    assert second[0] == [[0, 1], 0, False]
    assert first[1] == "Rank 1 failed: The disk is gone."
    assert second[1] == "The disk is gone."
    assert not first[2], "what was opened is closed"
    assert first[3] < 30


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other_at_once(tmp_path: Path) -> None:
    first, second = run_ranks(die_on_one, tmp_path)
    assert "Another process has ended without a word" in first[1]
    assert second is None
    assert first[3] < 30


# Two runs in one script; one process is late.
TWICE = """
import os
import time

from compressor.distributed.launch import join
from compressor.interfaces import Device

for run in range(2):
    with join(Device.CPU) as team:
        assert team.context.gather((run, team.context.rank)) == [(run, 0), (run, 1)]
    time.sleep(0.5 * int(os.environ["RANK"]))
"""


@pytest.mark.slow
def test_processes_of_torchrun_meet_twice_in_one_script(tmp_path: Path) -> None:
    """The second time they had found the addresses of the first, which torchrun keeps."""
    script = tmp_path / "twice.py"
    script.write_text(TWICE)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    root = str(Path(__file__).parents[2])
    environment = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, *launcher, str(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
