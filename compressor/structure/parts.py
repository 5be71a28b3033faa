"""The graphs of a model: its own, or those of the largest modules in it that have one."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.export import ExportedProgram

from compressor.errors import ModelError
from compressor.interfaces.inputs import ModelInputs
from compressor.structure.trace import FORWARD_FAILURES, copy_model, export, watch


def exportable_parts(
    model: nn.Module, inputs: ModelInputs, *, trains: bool
) -> dict[str, list[ExportedProgram]]:
    """Name of a module -> its functional graphs, decomposed by an empty table.

    {"": [graph]} if the model itself can be exported; with the graph of its training mode as well,
    if that runs more of its layers, such as auxiliary heads. A detector, whose boxes are picked by
    their values, gives its backbone and its heads. Nothing, if they hold less than half of the
    weights.

    Args:
        model: in evaluation mode.
        inputs: for one call.
        trains: whether it runs on `inputs` in training mode.

    Raises:
        ModelError: if the model does not run on `inputs`.
    """
    whole = _graph(model, inputs)
    if whole is not None:
        more = _training_graph(model, inputs) if trains and _has_idle_weights(whole) else None
        return {"": [whole, more] if more is not None else [whole]}
    received: dict[str, ModelInputs] = {}

    def note(name: str, arguments: ModelInputs, _: Any) -> None:
        received.setdefault(name, arguments)

    watch(model, inputs, note)
    parts: dict[str, list[ExportedProgram]] = {}
    tried = [""]
    for name, module in model.named_modules():  # a parent comes before its children
        is_inside = any(name.startswith(f"{part}.") for part in parts)
        if name in tried or is_inside or name not in received:
            continue
        if next(module.parameters(), None) is None or not any(True for _ in module.children()):
            continue
        graph = _graph(module, received[name])
        if graph is not None:
            parts[name] = [graph]
    covered = sum(_weights(model.get_submodule(name)) for name in parts)
    return parts if 2 * covered >= _weights(model) else {}


def _has_idle_weights(graph: ExportedProgram) -> bool:
    """Whether the graph does not use all parameters."""
    names = graph.graph_signature.inputs_to_parameters
    return any(node.name in names and not node.users for node in graph.graph.nodes)


def _training_graph(model: nn.Module, inputs: ModelInputs) -> ExportedProgram | None:
    training = copy_model(model)
    training.train()
    return _graph(training, inputs)


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _graph(module: nn.Module, inputs: ModelInputs) -> ExportedProgram | None:
    try:
        graph: ExportedProgram = export(module, inputs).run_decompositions({})
        return graph
    except (ModelError, *FORWARD_FAILURES):
        return None
