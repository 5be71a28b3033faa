"""Work in a process of its own, with a limit of processor time and of memory.

What it has found by then comes back even if it is stopped, or dies.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

Report = Callable[..., None]  # report(stage="...", fact=value, ...), as often as wanted
PATIENCE = 8  # seconds of the clock for one of the processor, on a busy machine


@dataclass
class Outcome:
    """What a piece of work reported, and how it ended.

    Attributes:
        facts: everything reported; the last value of a name counts.
        stopped: None, or why the work did not come to its end.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    stopped: str | None = None


def run_limited(work: Callable[[Report], None], *, seconds: float, memory_gib: float) -> Outcome:
    """Run `work` in a forked process; its prints are dropped.

    Args:
        work: is given the function by which it reports. Values must be picklable.
        seconds: of processor time.
        memory_gib: that it may allocate besides what it was forked with.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_child, args=(work, sender, seconds, memory_gib))
    process.start()
    sender.close()
    outcome = Outcome()
    end = time.monotonic() + PATIENCE * seconds
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            outcome.facts |= receiver.recv()
        process.kill()
    except EOFError:
        pass
    process.join()
    stage = outcome.facts.pop("stage", "starting")
    if process.exitcode == 0:
        return outcome
    if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
        outcome.stopped = f"over the limit of {seconds:g} s while {stage}"
    elif process.exitcode == 1:
        outcome.stopped = f"{outcome.facts.pop('error', 'it failed')} while {stage}"
    else:
        outcome.stopped = f"the process died ({process.exitcode}) while {stage}"
    return outcome


def _in_child(
    work: Callable[[Report], None], sender: Connection, seconds: float, memory_gib: float
) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    limit = round(seconds + time.process_time()) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    _limit_memory(memory_gib)

    def report(**facts: Any) -> None:
        sender.send(facts)

    try:
        work(report)
    except BaseException as error:  # whatever it is, the row says so and the list goes on
        report(error=one_line(error))
        os._exit(1)
    os._exit(0)


def _limit_memory(gib: float) -> None:
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[5])  # data and stack
    now = pages * resource.getpagesize()
    limit = now + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def one_line(error: BaseException, width: int = 300) -> str:
    """Class and first line of the message."""
    text = " ".join(str(error).strip().split("\n", 1)[0].split())
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= width else f"{text[:width]}…"
