"""The damage of each quantizer alone: what the rounding of one tensor does to a model's outputs.

The model runs once in float on each part of the samples. Where a quantizer sits, a branch leaves:
the rest of the model with this quantizer and no other. What lies before it is not computed again,
and nothing is kept but what is still to be read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from compressor.errors import DataError, MetricError, ModelError
from compressor.files import write_text
from compressor.interfaces.divergence import divergence
from compressor.interfaces.inputs import ModelInputs, device_of, output_tensors, tensor_bytes
from compressor.quantization.corrections.walking import Values, cut, enter
from compressor.quantization.dynamic import DynamicQuantizer
from compressor.quantization.model import BiasQuantizer, QuantizedModel, Quantizer

Key = tuple[str, str]
Damages = Mapping[Key, float]
CACHE = "quantizer_damage.json"


def quantizer_sensitivity(
    model: QuantizedModel,
    inputs: Iterable[Any],
    *,
    is_classifier: bool = False,
    folder: Path | str | None = None,
) -> dict[Key, float]:
    """How far the outputs are from those in float when one tensor alone is rounded.

    Args:
        model: in evaluation mode; not changed.
        inputs: calls of the model, each a tensor, a tuple of arguments, a dict of keywords, or
            `ModelInputs`. A few dozen samples will do.
        is_classifier: outputs (N, K) are logits, compared by Kullback-Leibler divergence; all
            others by squared error over the mean square. See `divergence`.
        folder: where damages are kept, by a digest of the model, its plan and the inputs; None
            keeps nothing.

    Returns:
        By ("w", path of a weight) or ("a", name of an activation), in the order in which they run;
        infinite if an output is not finite. Biases, of 32 bits, are not rounded.

    Raises:
        ModelError: if the model is not quantized.
        DataError: if there is no sample.

    >>> from compressor.export.quantize import quantize
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> batches = [torch.randn(16, 4)]
    >>> list(quantizer_sensitivity(quantize(net, batches).module, batches))
    [('a', 'input_1'), ('w', '0.weight'), ('a', 'relu'), ('w', '2.weight')]
    """
    _check_quantized(model)
    calls = [ModelInputs.of(batch).to(device_of(model)) for batch in inputs]
    if not calls:
        raise DataError("There is no sample to measure damages on. Give one batch at least.")
    path = None if folder is None else Path(folder) / CACHE
    known: dict[str, dict[str, float]] = {}
    key = ""
    if path is not None:
        known = json.loads(path.read_text()) if path.exists() else {}
        key = _digest(model, calls, is_classifier)
        if key in known:
            return {_read_key(name): damage for name, damage in known[key].items()}
    damages = _measure(model, calls, is_classifier=is_classifier)
    if path is not None:
        known[key] = {":".join(name): damage for name, damage in damages.items()}
        write_text(path, json.dumps(known))
    return damages


@torch.no_grad()
def metric_sensitivity(
    model: QuantizedModel, evaluate: Callable[[nn.Module], float]
) -> dict[Key, float]:
    """How much worse a metric is when one tensor alone is rounded; negative is better.

    It is evaluated as often as there are quantizers, and once in float.

    Args:
        model: in evaluation mode; put back as it was.
        evaluate: the metric of a module that is called like the model; larger is better.

    Raises:
        ModelError: if the model is not quantized.
        MetricError: if the metric is not a finite number.
    """
    _check_quantized(model)
    with only(model, []):
        reference = check_metric(evaluate(model))
    drops = {}
    for key in _Branching(model).keys:
        with only(model, [key]):
            drops[key] = reference - check_metric(evaluate(model))
    return drops


@contextmanager
def only(model: QuantizedModel, keys: Iterable[Key]) -> Iterator[None]:
    """Let `model` round nothing but the tensors of `keys`; afterwards it is as it was."""
    wanted, roundings = set(keys), _roundings(model)
    off = [path for path, key in roundings.items() if key not in wanted]
    before = {path: model.graph.get_submodule(path) for path in off}
    try:
        for path in off:
            model.graph.set_submodule(path, nn.Identity())
        yield
    finally:
        for path, module in before.items():
            model.graph.set_submodule(path, module)


def layers_by_damage(needs: Mapping[str, Collection[Key]], damages: Damages) -> list[str]:
    """The layers, those first whose quantizers do most damage; equal ones in the order of `needs`.

    Of a quantizer that several layers need, each has its part of the damage. So they lie side by
    side, and an activation is in float once all that need it are.

    Args:
        needs: the quantizers that each layer would need if it were the only quantized one.
        damages: as of `quantizer_sensitivity`; a quantizer that is not there does none.

    >>> needs = {"a": [("w", "a.weight")], "b": [("a", "relu")], "c": [("a", "relu")]}
    >>> layers_by_damage(needs, {("w", "a.weight"): 0.4, ("a", "relu"): 1.0})
    ['b', 'c', 'a']
    """
    owners = Counter(key for keys in needs.values() for key in keys)

    def damage(name: str) -> float:
        return sum(damages.get(key, 0.0) / owners[key] for key in needs[name])

    return sorted(needs, key=damage, reverse=True)


def check_metric(value: float) -> float:
    """The value of a metric.

    Raises:
        MetricError: if it is not a finite number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise MetricError(
            f"`evaluate` returned {value!r}, which is not a finite number. Return one number, "
            "larger for a better model; of a loss, its negative."
        )
    return number


def _check_quantized(model: object) -> None:
    if not isinstance(model, QuantizedModel):
        raise ModelError(
            f"`model` is of type {type(model).__name__}, not a QuantizedModel. Give `module` of "
            "what compressor.quantize returns."
        )


def _measure(
    model: QuantizedModel, calls: Sequence[ModelInputs], *, is_classifier: bool
) -> dict[Key, float]:
    parts = cut(model.source.graph, calls)
    branching = _Branching(model)
    totals = dict.fromkeys(branching.keys, 0.0)
    with torch.no_grad():
        for values, part in zip(enter(model.graph, parts), parts, strict=True):
            reference = branching.finish(values, 0, None)
            for key, outputs in branching.walk(values):
                damage = divergence([outputs], [reference], is_classifier=is_classifier)
                totals[key] += damage * part.batch_size
    samples = sum(part.batch_size for part in parts)
    return {
        key: total / samples if math.isfinite(total) else math.inf for key, total in totals.items()
    }


class _Branching:
    """Runs a quantized model's graph in float, or with one quantizer."""

    def __init__(self, model: QuantizedModel) -> None:
        self._nodes = list(model.graph.graph.nodes)
        self._modules = dict(model.graph.named_modules())
        self._constants = {
            node: attrgetter(str(node.target))(model.graph)
            for node in self._nodes
            if node.op == "get_attr"
        }
        place = {node: number for number, node in enumerate(self._nodes)}
        self._dying: dict[int, list[fx.Node]] = {}
        for node in self._nodes:
            last = max((place[user] for user in node.users), default=place[node])
            self._dying.setdefault(last, []).append(node)
        self._key_of = _roundings(model)
        self._begin: dict[Key, int] = {}
        for node, number in place.items():
            key = self._key_of.get(str(node.target)) if node.op == "call_module" else None
            if key is not None:
                self._begin.setdefault(key, number)

    @property
    def keys(self) -> list[Key]:
        """Of the quantizers, in the order in which they first run."""
        return list(self._begin)

    def walk(self, values: Values) -> Iterator[tuple[Key, list[Tensor]]]:
        """For each quantizer, the outputs with this one alone; `values` are the arguments."""
        live, here = dict(values), 0
        for key, begin in self._begin.items():
            self._run(live, here, begin, None)
            here = begin
            yield key, self.finish(live, begin, key)

    def finish(self, values: Values, begin: int, key: Key | None) -> list[Tensor]:
        """The outputs, from what is read at `begin` or later; one quantizer is on, or none."""
        live = dict(values)
        self._run(live, begin, len(self._nodes) - 1, key)
        return output_tensors(
            fx.map_arg(self._nodes[-1].args[0], lambda node: self._of(node, live))
        )

    def _run(self, live: dict[fx.Node, Any], begin: int, end: int, key: Key | None) -> None:
        """Go on from `begin` to `end`, in place."""
        for number in range(begin, end):
            node = self._nodes[number]
            if node.op not in {"placeholder", "get_attr"}:
                live[node] = self._value(node, live, key)
            for dead in self._dying.get(number, ()):
                live.pop(dead, None)

    def _value(self, node: fx.Node, live: Values, key: Key | None) -> Any:
        def known(read: fx.Node) -> Any:
            return self._of(read, live)

        target = str(node.target)
        args, kwargs = fx.map_arg(node.args, known), fx.map_arg(node.kwargs, known)
        if node.op != "call_module":
            return cast(Callable[..., Any], node.target)(*args, **kwargs)
        if target in self._key_of and (key is None or self._key_of[target] != key):
            return args[0]
        return self._modules[target](*args, **kwargs)

    def _of(self, node: fx.Node, live: Values) -> Any:
        return self._constants[node] if node.op == "get_attr" else live[node]


def _roundings(model: QuantizedModel) -> dict[str, Key | None]:
    """What does nothing but round, by path; a bias, of 32 bits, has no key.

    A range that is found in each call is that of the value that is read. The hidden state of an
    LSTM is rounded inside of it: it is so in float as well.
    """
    found: dict[str, Key | None] = {}
    for node in model.graph.graph.nodes:
        target = str(node.target)
        module = model.graph.get_submodule(target) if node.op == "call_module" else None
        if isinstance(module, Quantizer):
            found[target] = module.key
        elif isinstance(module, BiasQuantizer):
            found[target] = None
        elif isinstance(module, DynamicQuantizer):
            source = cast(fx.Node, node.args[0])
            while source.op == "call_module":
                source = cast(fx.Node, source.args[0])  # rounded for other readers
            found[target] = ("a", source.name)
    return found


def _digest(model: QuantizedModel, calls: Sequence[ModelInputs], is_classifier: bool) -> str:
    found = hashlib.sha256(model.graph.code.encode())
    found.update(json.dumps([is_classifier, model.plan().to_json()]).encode())
    for tensor in (*model.graph.parameters(), *model.graph.buffers()):
        found.update(tensor_bytes(tensor))
    for call in calls:
        for tensor in call.tensors():
            found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            found.update(tensor_bytes(tensor))
    return found.hexdigest()[:16]


def _read_key(name: str) -> Key:
    kind, _, path = name.partition(":")
    return kind, path
