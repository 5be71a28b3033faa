"""The modules whose outputs a residual network adds to its stream."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from compressor.errors import ModelError
from compressor.interfaces.inputs import ModelInputs
from compressor.structure.residuals import SUMS, ResidualGraph
from compressor.structure.trace import copy_for_analysis, export_graph, watch

# Between a branch and the sum: what gives 0 for 0, and twice as much for twice as much.
HOMOGENEOUS = frozenset(
    "alias clone contiguous dropout dropout_ to _to_copy relu relu_ leaky_relu leaky_relu_ mul "
    "mul_ div div_ view reshape _unsafe_view flatten unflatten permute transpose roll slice".split()
)


def residual_branches(model: nn.Module, inputs: ModelInputs) -> list[str]:
    """Names of the modules whose output is a whole branch, in the order of the sums.

    For each sum of a stream and a branch that was computed from it, the module that comes last in
    the branch: scaled, or left out, its output is as the branch scaled or left out. Branches beside
    which the stream is changed, as by the strided convolution of a shortcut, are not listed; nor
    are those that end in a function, or in a module that is called more than once. The model is not
    changed.

    Args:
        model: traced in evaluation mode.
        inputs: of one call of it.

    Raises:
        ModelError: if the model does not run on `inputs`, cannot be traced, or has no branch.
    """
    copied, inputs = copy_for_analysis(model), inputs.to("cpu")
    counts: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str, _: ModelInputs, outputs: Any) -> None:
        counts[name] += 1
        first = outputs[0] if isinstance(outputs, tuple) and outputs else outputs
        if isinstance(first, Tensor):
            shapes[name] = tuple(first.shape)

    watch(copied, inputs, note)
    once = {name: shape for name, shape in shapes.items() if name and counts[name] == 1}
    program = export_graph(copied, inputs)
    graph = ResidualGraph(program, once)
    place = {node: index for index, node in enumerate(program.graph.nodes)}
    found: dict[int, tuple[int, str]] = {}  # by the place of the sum: that of the branch's end
    for name in once:
        pair = graph.end_of_branch(name)
        if pair is None:
            continue
        end, where = _end(graph.inside[name]), place[pair[1]]
        if _leads_to(end, pair[1]) and place[end] >= found.get(where, (-1, ""))[0]:
            found[where] = place[end], name
    if not found:
        raise ModelError(
            f"In the {type(model).__name__} no module's output is added to what it was computed "
            "from. Name the modules yourself, as `branches`, or use a residual network."
        )
    return [name for _, (_, name) in sorted(found.items())]


def _end(nodes: list[Node]) -> Node:
    """The one operation of a branch whose value is used outside."""
    own = set(nodes)
    return next(node for node in nodes if any(user not in own for user in _users(node)))


def _leads_to(node: Node, total: Node) -> bool:
    """Whether `total` is the sum that `node` enters, changed by nothing but a factor."""
    while True:
        users = _users(node)
        if len(users) != 1:
            return False
        node = users[0]
        if node is total:
            return _operation(node) in SUMS
        if _operation(node) not in HOMOGENEOUS:
            return False


def _users(node: Node) -> list[Node]:
    return [user for user in node.users if not _operation(user).startswith("_assert")]


def _operation(node: Node) -> str:
    """`add` for `aten.add.Tensor`."""
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
