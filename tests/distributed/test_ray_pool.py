"""A pool of Ray's processes, with real ones: two of them, shared by the tests that leave them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from compressor.distributed import ray_pool as module
from compressor.distributed.ray_pool import Failed, NeedsRoom, RayPool, ray_pool
from compressor.distributed.shipping import check_shipping, ship, unship
from compressor.errors import ConfigError, MissingDependencyError

pytestmark = pytest.mark.slow

Task = Callable[[bool], Any]


class Calling:
    """A worker whose tasks are functions of whether they are alone."""

    def __call__(self, task: Task, *, is_alone: bool) -> Any:
        return task(is_alone)

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def pool() -> Iterator[RayPool[Task, Any]]:
    with ray_pool(ship(Calling), 2, {"CPU": 1}) as found:
        yield found


def outcomes(pool: RayPool[Task, Any], tasks: list[Task]) -> list[Any]:
    """In the order of the tasks."""
    found = dict(pool.map(tasks))
    assert sorted(found) == list(range(len(tasks)))
    return [found[number] for number in range(len(tasks))]


def test_every_task_is_done_by_one_of_two_other_processes(pool: RayPool[Task, Any]) -> None:
    def task(number: int) -> Task:
        return lambda is_alone: (time.sleep(0.2), number, os.getpid())[1:]

    found = outcomes(pool, [task(number) for number in range(5)])
    assert [number for number, _ in found] == [0, 1, 2, 3, 4]
    pids = {pid for _, pid in found}
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_a_task_is_told_of_as_soon_as_it_is_done(pool: RayPool[Task, Any], tmp_path: Path) -> None:
    def slow(is_alone: bool) -> str:
        while not (tmp_path / "told").exists():
            time.sleep(0.01)
        return "slow"

    come = []
    for number, _ in pool.map([slow, lambda is_alone: "quick"]):
        come.append(number)
        (tmp_path / "told").write_text("")
    assert come == [1, 0]


def test_the_task_of_a_killed_process_is_done_again(
    pool: RayPool[Task, Any], tmp_path: Path
) -> None:
    def dies_once(is_alone: bool) -> str:
        if not (tmp_path / "died").exists():
            (tmp_path / "died").write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"

    assert outcomes(pool, [dies_once, lambda is_alone: "other"]) == ["done", "other"]
    assert (tmp_path / "died").exists()


def test_a_task_that_kills_every_process_fails_after_the_third(
    pool: RayPool[Task, Any], tmp_path: Path
) -> None:
    def dies(is_alone: bool) -> None:
        (tmp_path / str(os.getpid())).write_text("")
        os.kill(os.getpid(), signal.SIGKILL)

    failed, other = outcomes(pool, [dies, lambda is_alone: "other"])
    assert isinstance(failed, Failed)
    assert "3 workers died" in failed
    assert other == "other"
    assert len(list(tmp_path.iterdir())) == 3
    assert outcomes(pool, [lambda is_alone: "well"]) == ["well"]


def test_what_lacks_memory_is_tried_again_when_the_others_are_done(
    pool: RayPool[Task, Any], tmp_path: Path
) -> None:
    def large(is_alone: bool) -> int:
        if not is_alone:
            raise NeedsRoom("CUDA out of memory.")
        return len(list(tmp_path.iterdir()))

    def small(number: int) -> Task:
        def task(is_alone: bool) -> bool:
            time.sleep(0.1)
            (tmp_path / str(number)).write_text("")
            return is_alone

        return task

    assert outcomes(pool, [large, small(1), small(2), small(3)]) == [3, False, False, False]


def test_what_lacks_memory_alone_too_fails(pool: RayPool[Task, Any]) -> None:
    def huge(is_alone: bool) -> None:
        raise NeedsRoom("CUDA out of memory.")

    failed, other = outcomes(pool, [huge, lambda is_alone: "other"])
    assert isinstance(failed, Failed)
    assert "CUDA out of memory" in failed
    assert other == "other"


class OwnError(Exception):
    """Of a user's function."""


def test_what_a_worker_raises_is_raised_here(pool: RayPool[Task, Any]) -> None:
    def fails(is_alone: bool) -> None:
        raise OwnError("label 12 of 10 classes")

    with pytest.raises(OwnError, match="label 12 of 10") as caught:
        outcomes(pool, [fails])
    assert type(caught.value) is OwnError
    assert outcomes(pool, [lambda is_alone: "well"]) == ["well"]


def refusing() -> Calling:
    raise ConfigError("The GPU of this node is too old. Choose another.")


def test_what_making_a_worker_raises_is_raised_before_any_task(pool: RayPool[Task, Any]) -> None:
    del pool  # Ray runs
    with pytest.raises(ConfigError, match="too old"), ray_pool(ship(refusing), 1, {"CPU": 0}):
        pytest.fail("it was opened")


def test_functions_of_the_script_travel_and_values_are_the_same() -> None:
    factor = 3
    assert unship(ship(lambda x: factor * x))(5) == 15


def test_a_part_that_cannot_be_sent_is_named_with_the_way_out() -> None:
    parts = {"model": 1, "data['train']": [threading.Lock()], "eval_func": 2}
    with pytest.raises(ConfigError, match=r"data\['train'\].*lock.*data=make_loaders"):
        check_shipping(parts)
    parts = {"eval_func": threading.Lock()}
    with pytest.raises(ConfigError, match=r"eval_func cannot be sent.*__getstate__"):
        check_shipping(parts)


def test_a_loader_in_use_is_sent_with_its_generator_and_without_its_processes() -> None:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(
        [*range(8)], 2, shuffle=True, generator=generator, num_workers=1, persistent_workers=True
    )
    list(loader)
    own = torch.Generator()
    own.set_state(generator.get_state())
    sent = unship(ship({"nested": [loader]}))["nested"][0]
    assert sent.num_workers == 1
    expected = DataLoader([*range(8)], 2, shuffle=True, generator=own)  # a first pass, as of `sent`
    assert [batch.tolist() for batch in sent] == [batch.tolist() for batch in expected]


def test_what_cannot_be_read_says_so() -> None:
    with pytest.raises(ConfigError, match=r"no_such_module.*working_dir"):
        unship(b"cno_such_module\nfunction\n.")


def test_without_ray_the_line_that_installs_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "compressor\[ray\]"'):
        check_shipping({})


def test_more_than_this_machine_has_is_refused() -> None:
    ray: Any = SimpleNamespace(cluster_resources=lambda: {"CPU": 2.0, "GPU": 1.0})
    module._check_machine(ray, 2, {"CPU": 1, "GPU": 0.5})
    with pytest.raises(ConfigError, match=r"3 workers want 1\.5 GPU, and this machine has 1"):
        module._check_machine(ray, 3, {"GPU": 0.5})


def test_more_cpus_than_this_machine_has_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # What Ray says that it has is what it was told to have: as many as are wanted.
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    ray: Any = SimpleNamespace(cluster_resources=lambda: {"CPU": 6.0})
    module._check_machine(ray, 2, {"CPU": 1})
    assert not caplog.messages
    module._check_machine(ray, 3, {"CPU": 2})
    (message,) = caplog.messages
    assert "3 workers want 6 CPUs, and this machine has 2" in message
