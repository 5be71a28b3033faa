"""What happens in one run of a model: which modules are called when, and who uses what they give.

Seen by hooks on the modules, and by a mode of torch that sees the operations between them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from compressor.interfaces.inputs import ModelInputs
from compressor.structure.trace import eval_mode, run

SUMS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})
INPUT, OUTPUT = "input", "output"

Place = tuple[str, str]
"""The first tensor that a module takes (`INPUT`), or the tensor that it gives (`OUTPUT`)."""


@dataclass(frozen=True)
class Sum:
    """Where the output of a layer, or of the norm after it, is added to another tensor.

    Attributes:
        others: places that hold the other tensor before the layer runs.
        through: "", or a module without parameters that the tensor there has to go through first;
            the model calls it later.
    """

    others: tuple[Place, ...]
    through: str = ""


@dataclass
class RunRecord:
    """One run of a model in eval mode. Times are numbers of events; names those of the modules.

    Attributes:
        counts: how often each module was called.
        spans: times of begin and end of each module's first call, in the order of their ends.
        parents: who called it first; None for the model itself.
        forms: what each module returned, with empty tensors, if that is tensors in any nesting and
            nothing else.
        uses: of what each module gave: for each use the modules inside which it was.
        rewritten: modules whose output was written to in place later.
        norms: the batch norm that alone takes a layer's output, by the layer.
        sums: by the layer.
        shapes: of the first tensor that each module gave, by its name.
        largest_bytes: of the tensors that one module takes or gives.
        samples: that were in the run.
    """

    counts: Counter[str] = field(default_factory=Counter)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    forms: dict[str, Any] = field(default_factory=dict)
    uses: dict[str, set[frozenset[str]]] = field(default_factory=lambda: defaultdict(set))
    rewritten: set[str] = field(default_factory=set)
    norms: dict[str, str] = field(default_factory=dict)
    sums: dict[str, Sum] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    largest_bytes: int = 0
    samples: int = 1

    def start_of(self, name: str) -> int:
        """When `name` began first; one that is not called, when what holds it began."""
        while name and name not in self.spans:
            name = name.rpartition(".")[0]
        return self.spans[name][0] if name in self.spans else 0


def record_run(model: nn.Module, inputs: ModelInputs) -> RunRecord:
    """Run `model` on `inputs`, which lie on its device, and note what happens.

    Raises:
        ModelError: if the model does not run on `inputs`.
    """
    watcher = _Watcher(model)
    with eval_mode(model), torch.no_grad(), watcher.hooked(model), watcher.mode:
        outputs = run(model, inputs)
    record = watcher.finish(outputs)
    record.samples = inputs.batch_size
    return record


@dataclass(frozen=True)
class _Seen:
    """A tensor at a place: when it came there, and how often it had been written to by then."""

    place: Place
    time: int
    version: int


@dataclass
class _Known:
    """A tensor that modules took or gave; kept, so that no other gets its number."""

    tensor: Tensor
    seen: list[_Seen] = field(default_factory=list)
    users: set[str] = field(default_factory=set)  # the modules that run operations on it

    def given_by(self) -> list[str]:
        return [name for (name, kind) in (item.place for item in self.seen) if kind == OUTPUT]

    def at(self, version: int) -> _Known:
        """As it is known at a version."""
        return _Known(self.tensor, [item for item in self.seen if item.version == version])


class _Watcher:
    def __init__(self, model: nn.Module) -> None:
        self.record = RunRecord()
        self.mode = _Operations(self._operate)
        self._modules = dict(model.named_modules())
        self._names = {id(module): name for name, module in self._modules.items()}
        self._known: dict[int, _Known] = {}
        self._stack: list[tuple[str, int]] = []
        self._time = 0
        self._added: list[tuple[_Known, _Known]] = []
        self._single: dict[str, _Known] = {}  # the only argument of a module

    @contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        handles: list[Any] = []
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
            handles.append(module.register_forward_hook(self._end))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self, outputs: Any) -> RunRecord:
        record = self.record
        for known in self._of(outputs):
            self._use(known, frozenset({""}))
        for known in self._known.values():
            record.rewritten.update(
                set(known.given_by()) - set(known.at(known.tensor._version).given_by())
            )
        record.norms = self._norms()
        record.sums = self._sums()
        return record

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name, now = self._names[id(module)], self._tick()
        self.record.counts[name] += 1
        self.record.parents.setdefault(name, self._stack[-1][0] if self._stack else None)
        self._stack.append((name, now))
        with self.mode.silent():
            first = first_tensor((args, kwargs))
            if first is not None:
                self._note(first, (name, INPUT), now)
                if len(args) == 1 and args[0] is first and not kwargs:
                    self._single[name] = self._known[id(first)].at(first._version)
            self._weigh((args, kwargs))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        (name, began), now = self._stack.pop(), self._tick()
        with self.mode.silent():
            self._weigh(output)
            if name in self.record.spans:
                return
            self.record.spans[name] = (began, now)
            leaves = pytree.tree_leaves(output)
            if leaves and all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves):
                empty = torch.empty(0)
                self.record.forms[name] = pytree.tree_map_only(Tensor, lambda _: empty, output)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if tensors:
                self.record.shapes[name] = tuple(tensors[0].shape)
            for tensor in tensors:
                self._note(tensor, (name, OUTPUT), now)

    def _tick(self) -> int:
        self._time += 1
        return self._time

    def _note(self, tensor: Tensor, place: Place, now: int) -> None:
        known = self._known.setdefault(id(tensor), _Known(tensor))
        known.seen.append(_Seen(place, now, tensor._version))

    def _weigh(self, values: Any) -> None:
        sizes = [t.nbytes for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]
        self.record.largest_bytes = max([self.record.largest_bytes, *sizes])

    def _operate(self, name: str, args: Any, result: Any, versions: Mapping[int, int]) -> None:
        """Note the tensors that an operation used; `versions` are of before."""
        stack = frozenset(caller for caller, _ in self._stack)
        found = self._of(args)
        for known in found:
            self._use(known, stack)
            known.users.add(self._stack[-1][0] if self._stack else "")
        if name in SUMS and len(found) == 2 and isinstance(result, Tensor):
            a, b = (known.at(versions[id(known.tensor)]) for known in found)
            if a.tensor.shape == b.tensor.shape == result.shape:
                self._added.append((a, b))

    def _use(self, known: _Known, stack: frozenset[str]) -> None:
        for name in known.given_by():
            self.record.uses[name].add(stack)

    def _of(self, values: Any) -> list[_Known]:
        leaves = pytree.tree_leaves(values)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return [self._known[id(t)] for t in tensors if id(t) in self._known]

    def _norms(self) -> dict[str, str]:
        counts = self.record.counts
        found = {}
        for known in self._known.values():
            givers = known.given_by()
            norm = next(iter(known.users), "")
            is_norm = isinstance(self._modules.get(norm), _BatchNorm)
            if givers and known.users == {norm} and is_norm:
                if counts[givers[0]] == counts[norm] == 1:
                    found[givers[0]] = norm
        return found

    def _sums(self) -> dict[str, Sum]:
        layers = {norm: layer for layer, norm in self.record.norms.items()}
        found = {}
        for pair in self._added:
            for known, other in (pair, pair[::-1]):
                givers = known.given_by()
                layer = layers.get(givers[0], givers[0]) if givers else ""
                if not givers or self.record.counts[layer] != 1:
                    continue
                begin, through = self.record.start_of(layer), ""
                others = self._seen_before(other, begin)
                if not others:
                    through, source = self._function_for(other)
                    others = self._seen_before(source, begin) if source else ()
                if others:
                    found[layer] = Sum(others, through)
        return found

    def _seen_before(self, known: _Known, time: int) -> tuple[Place, ...]:
        places = [seen.place for seen in known.seen if seen.time < time]
        return tuple(place for place in places if self.record.counts[place[0]] == 1)

    def _function_for(self, known: _Known) -> tuple[str, _Known | None]:
        """The module without parameters that made a tensor of another one; and that one."""
        for name in known.given_by():
            source = self._single.get(name)
            if source is not None and self.record.counts[name] == 1:
                if not self._modules[name].state_dict():
                    return name, source
        return "", None


class _Operations(TorchFunctionMode):
    """Tells of every operation and, before it, how often each of its tensors was written to."""

    def __init__(self, tell: Callable[[str, Any, Any, Mapping[int, int]], None]) -> None:
        super().__init__()
        self._tell = tell
        self._is_silent = False

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Inside the `with`, nothing is told."""
        self._is_silent = True
        try:
            yield
        finally:
            self._is_silent = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, and tell of it."""
        del types
        kwargs = kwargs or {}
        if self._is_silent:
            return func(*args, **kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        versions = {id(leaf): leaf._version for leaf in leaves if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        self._tell(getattr(func, "__name__", ""), (args, kwargs), result, versions)
        return result


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor in any nesting of tuple, list and dict."""
    leaves = pytree.tree_leaves(values)
    return next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
