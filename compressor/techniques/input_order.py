"""The order of a model's channels in which 2:4 keeps more, where an order costs nothing.

The channels that a layer reads are put in order in the layers that make them, through their channel
group, so that nothing is gathered at run time. Pool and Yu 2021, Channel permutations for N:M
sparsity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from compressor.errors import ModelError, SurgeryError
from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.logs import get_logger
from compressor.structure.channels import find_groups
from compressor.structure.check import make_probe
from compressor.structure.groups import ChannelGroup, Member
from compressor.structure.permutation import permute_channels
from compressor.structure.trace import eval_mode, run
from compressor.techniques.permutation import permutation_for_2_4

logger = get_logger(__name__)

TOLERANCE = 1e-9  # float64 sums in another order

Structure = tuple[tuple[str, tuple[int, ...]], ...]


class InputOrder:
    """Finds orders; remembers the groups of each structure that it has seen."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._groups: dict[Structure, tuple[ChannelGroup, ...]] = {}
        self._may_be_ordered: dict[tuple[Structure, str], bool] = {}

    def improve(self, model: nn.Module, scores: Mapping[str, Tensor], inputs: ModelInputs) -> bool:
        """Reorder channels of `model`, in place, so that 2:4 keeps more of `scores`.

        A group is put in order only if another order of it gives the same outputs, in float64.

        Args:
            model: whatever was done to it before.
            scores: of the weights of layers that are to be 2:4, (out, in, …), by the layer's name.
            inputs: of one call.

        Returns:
            Whether an order has changed.
        """
        structure = tuple((name, tuple(p.shape)) for name, p in model.named_parameters())
        orders = []
        for group in self._groups_of(structure, model, inputs):
            read = [scores[m.module] for m in group.consumers if _is_read_whole(m, scores)]
            if read and self._check(structure, model, group, inputs):
                order = _best_order(read)
                if order is not None:
                    orders.append((group, order))
        for group, order in orders:
            permute_channels(model, group, order)
        logger.debug("%d channel groups were put in order for 2:4", len(orders))
        return bool(orders)

    def _groups_of(
        self, structure: Structure, model: nn.Module, inputs: ModelInputs
    ) -> Sequence[ChannelGroup]:
        if structure not in self._groups:
            try:
                self._groups[structure] = find_groups(model, inputs).groups
            except ModelError as error:
                logger.info("2:4 keeps the order of the channels: %s", error)
                self._groups[structure] = ()
        return self._groups[structure]

    def _check(
        self, structure: Structure, model: nn.Module, group: ChannelGroup, inputs: ModelInputs
    ) -> bool:
        key = (structure, group.name)
        if key not in self._may_be_ordered:
            self._may_be_ordered[key] = may_be_ordered(model, group, inputs)
        return self._may_be_ordered[key]


def may_be_ordered(model: nn.Module, group: ChannelGroup, inputs: ModelInputs) -> bool:
    """Whether the channels of `group` may stand in any order: one other is tried on a copy."""
    probe, inputs = make_probe(model), inputs.to("cpu").with_batch(2).double()
    order = torch.randperm(group.size, generator=torch.Generator().manual_seed(0)).tolist()
    with eval_mode(probe), torch.no_grad():
        before = [output.clone() for output in output_tensors(run(probe, inputs))]
        try:
            permute_channels(probe, group, order)
            after = output_tensors(run(probe, inputs))
        except (SurgeryError, ModelError) as error:
            logger.info("The channels of %s keep their order: %s", group.name, error)
            return False
    return all(
        a.shape == b.shape and bool(((a - b).abs() <= TOLERANCE * b.abs().max()).all())
        for a, b in zip(after, before, strict=True)
    )


def _best_order(scores: Sequence[Tensor]) -> list[int] | None:
    """In which the layers together keep most; None if it is the one that they have."""
    # Layers count alike, whatever the scale of their weights.
    rows = [score.movedim(1, -1).flatten(0, -2) / score.mean() for score in scores]
    together = torch.cat(rows).nan_to_num()
    order = permutation_for_2_4(together).tolist()
    return None if order == sorted(order) else order


def _is_read_whole(member: Member, scores: Mapping[str, Tensor]) -> bool:
    """Whether the group is all that a layer reads, in its own order: fours do not cross groups."""
    layer, _, key = member.tensor.rpartition(".")
    identity = tuple((entry,) for entry in range(member.size))
    return key == "weight" and layer in scores and member.dim == 1 and member.index == identity
