"""Runs of edited copies of a model that begin where the first edit is.

What runs before the first changed module gives what it gives in the unchanged model; it is
computed once and kept. A module that ended before is not run: it returns what was kept, or an empty
tensor where nobody outside such modules uses that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.logs import get_logger
from compressor.structure.run_record import RunRecord
from compressor.structure.trace import FORWARD_FAILURES, eval_mode

logger = get_logger(__name__)

MOST_BYTES = 2**30  # of all that is kept
PROBE, OTHER = -1, -2  # in place of the number of a part


@dataclass(frozen=True)
class Cut:
    """The modules that do not run.

    Attributes:
        time: of the run's record; they ended before.
        live: those whose outputs are used.
        dead: the others.
    """

    time: int
    live: tuple[str, ...] = ()
    dead: tuple[str, ...] = ()


class PrefixCache:
    """Outputs of the modules of one model on some inputs, as far as they were asked for."""

    def __init__(
        self,
        model: nn.Module,
        record: RunRecord,
        probe: ModelInputs,
        parts: Sequence[ModelInputs],
        most_bytes: int = MOST_BYTES,
    ) -> None:
        """Keep nothing yet.

        Args:
            model: in eval mode, on the device of the inputs. It runs with other `forward`s, which
                are taken off again.
            record: of a run of it.
            probe: a small input: on it is tried whether a cut changes nothing.
            parts: inputs of the runs.
            most_bytes: of the outputs that are kept; those used longest ago go first.
        """
        self._model = model
        self._record = record
        other = probe.map(lambda tensor: tensor.flip(0) if tensor.dim() else tensor)
        self._inputs = {PROBE: probe, OTHER: other, **dict(enumerate(parts))}
        self._most_bytes = most_bytes
        self._modules = dict(model.named_modules())
        self._kept: OrderedDict[tuple[int, str], Any] = OrderedDict()
        self._cuts: dict[int, Cut] = {}

    @contextmanager
    def cut(self, model: nn.Module, since: int, part: int) -> Iterator[None]:
        """Inside the `with`, `model` run on that part computes only what is not known.

        Args:
            model: an edited copy, or the model itself.
            since: time of the first changed module in the record.
            part: number of the inputs.
        """
        with self._replaced(dict(model.named_modules()), self._usable(since, part), part):
            yield

    def _usable(self, since: int, part: int) -> Cut:
        """The latest cut up to `since` of which everything is known, or can be."""
        cut = self._cut_at(since)
        if self._has(cut, part) or self._fill(cut, part):
            return cut
        return self._latest_known(since, part)

    def _latest_known(self, since: int, part: int) -> Cut:
        known = [c for c in self._cuts.values() if c.time <= since and self._has(c, part)]
        return max(known, key=lambda cut: cut.time, default=Cut(0))

    def _cut_at(self, time: int) -> Cut:
        if time not in self._cuts:
            cut = self._make_cut(time)
            self._cuts[time] = cut  # so that filling finds it
            if not self._changes_nothing(cut):
                logger.debug("the model runs in full: its modules do more than return tensors")
                self._cuts[time] = Cut(0)
        return self._cuts[time]

    def _make_cut(self, time: int) -> Cut:
        record = self._record
        ended = {name for name, (_, end) in record.spans.items() if name and end < time}
        single = {name for name in ended if record.counts[name] == 1 and name in record.forms}
        single = {n for n in single if not isinstance(self._modules[n], torch.jit.ScriptModule)}
        chosen = {name for name in single if not any(p in single for p in self._callers(name))}
        live = {n for n in chosen if any(chosen.isdisjoint(stack) for stack in record.uses[n])}
        order = [name for name in record.spans if name in chosen]
        return Cut(
            time,
            tuple(name for name in order if name in live),
            tuple(name for name in order if name not in live),
        )

    def _callers(self, name: str) -> Iterator[str]:
        parent = self._record.parents[name]
        while parent is not None:
            yield parent
            parent = self._record.parents[parent]

    def _changes_nothing(self, cut: Cut) -> bool:
        """Whether the model itself gives the same on the probe."""
        if not cut.live or not self._fill(cut, PROBE):
            return False
        try:
            self._run(OTHER)  # what modules remember beside their outputs is of other inputs now
            with self._replaced(self._modules, cut, PROBE):
                ours = self._run(PROBE)
            theirs = self._run(PROBE)
        except FORWARD_FAILURES:
            return False
        finally:
            for name in cut.live:
                self._kept.pop((PROBE, name), None)
        return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))

    def _run(self, part: int) -> list[Tensor]:
        with eval_mode(self._model), torch.no_grad():
            return [t.clone() for t in output_tensors(self._inputs[part].call(self._model))]

    def _has(self, cut: Cut, part: int) -> bool:
        return all((part, name) in self._kept for name in cut.live)

    def _fill(self, cut: Cut, part: int) -> bool:
        """Compute what is missing; whether everything is there then."""
        missing = [name for name in cut.live if (part, name) not in self._kept]
        before = self._latest_known(cut.time - 1, part) if part != PROBE else Cut(0)
        handles = [
            self._modules[name].register_forward_hook(partial(self._keep, (part, name), missing))
            for name in list(missing)
        ]
        try:
            with (
                eval_mode(self._model),
                torch.no_grad(),
                self._replaced(self._modules, before, part),
            ):
                self._inputs[part].call(self._model)
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        self._forget(cut, part)
        return self._has(cut, part)

    def _keep(
        self, key: tuple[int, str], missing: list[str], _: nn.Module, args: Any, output: Any
    ) -> None:
        del args
        is_rewritten = key[1] in self._record.rewritten
        self._kept[key] = _copied(output) if is_rewritten else output
        missing.remove(key[1])
        if not missing:
            raise _Enough

    def _forget(self, cut: Cut, part: int) -> None:
        """Drop what was used longest ago, until the rest is small enough."""
        for name in cut.live:
            if (part, name) in self._kept:
                self._kept.move_to_end((part, name))
        sizes = {key: _bytes(output) for key, output in self._kept.items()}
        total = sum(sizes.values())
        for key, size in sizes.items():
            if total > self._most_bytes:
                del self._kept[key]
                total -= size

    @contextmanager
    def _replaced(self, modules: Mapping[str, nn.Module], cut: Cut, part: int) -> Iterator[None]:
        names = [*cut.live, *cut.dead]
        before = {name: vars(modules[name]).get("forward") for name in names}
        for name in cut.live:
            vars(modules[name])["forward"] = partial(self._recall, part, name)
        for name in cut.dead:
            vars(modules[name])["forward"] = partial(self._nothing, name)
        try:
            yield
        finally:
            for name in names:
                if before[name] is None:
                    vars(modules[name]).pop("forward", None)
                else:
                    vars(modules[name])["forward"] = before[name]

    def _recall(self, part: int, name: str, *_: Any, **__: Any) -> Any:
        output = self._kept[part, name]
        return _copied(output) if name in self._record.rewritten else output

    def _nothing(self, name: str, *_: Any, **__: Any) -> Any:
        return self._record.forms[name]


class _Enough(BaseException):  # no error, and not for a model's `except Exception`
    """All that was wanted of a run has been seen."""


def first_change(record: RunRecord, changed: Collection[str]) -> int:
    """When the first of the modules began in the recorded run; late, if none did."""
    return min((record.start_of(name) for name in changed), default=2**62)


def _copied(output: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.clone, output)


def _bytes(output: Any) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
