"""Laws of channel groups on nets put together by chance."""

from __future__ import annotations

import copy
import json
from collections import defaultdict

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.profiling.counts import count
from compressor.structure.channels import find_groups
from compressor.structure.cutting import keep_many
from compressor.structure.describe import diff, rebuild
from tests.structure.labels.nets import Cuts, assert_same, masked_outputs, pruned_outputs
from tests.structure.labels.random_nets import JOINS, KINDS, OPERATIONS, STARTS, Choice, build

LAWS = settings(
    max_examples=60,
    deadline=None,  # a shared machine has no deadlines
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # to shrink would take minutes, and the nets are small
    suppress_health_check=[HealthCheck.too_slow],
)
CHOICES = st.lists(
    st.tuples(
        *(st.sampled_from(sorted({*OPERATIONS[kind], *JOINS})) for kind in KINDS),
        st.integers(0, 11),
    ),
    min_size=2,
    max_size=8,
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")
@LAWS
@given(start=st.sampled_from(STARTS), choices=CHOICES)
def test_every_group_keeps_the_laws(start: str, choices: list[Choice]) -> None:
    model, inputs = build(start, choices)
    found = find_groups(model, inputs)
    for name, reason in found.quarantined:
        assert "proves nothing" in reason, (name, reason)  # no rule may be wrong, nor too narrow
    for group in found.groups:
        cuts = [(group, range(1, group.size))]
        assert_same(pruned_outputs(model, inputs, cuts), masked_outputs(model, inputs, cuts))
    together = [(group, range(0, group.size, 2)) for group in found.groups]
    assert_same(pruned_outputs(model, inputs, together), masked_outputs(model, inputs, together))
    if together:
        assert_saves_what_it_promises(model, inputs, together)
        assert_is_rebuilt(model, inputs, together)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning")
@settings(LAWS, max_examples=4)
@given(start=st.sampled_from(STARTS), choices=CHOICES)
def test_the_same_net_has_the_same_groups(start: str, choices: list[Choice]) -> None:
    model, inputs = build(start, choices)
    assert find_groups(model, inputs) == find_groups(copy.deepcopy(model), inputs)


def assert_saves_what_it_promises(model: nn.Module, inputs: ModelInputs, cuts: Cuts) -> None:
    """Parameters by the entries of the members, counted here; multiply-accumulates fall."""
    gone: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for group, kept in cuts:
        for member in group.members:
            for channel in set(range(group.size)) - set(kept):
                gone[member.tensor][member.dim] |= set(member.index[channel])
    promised = 0
    for name, parameter in model.named_parameters():
        left = list(parameter.shape)
        for dim, entries in gone[name].items():
            left[dim] -= len(entries)
        promised += parameter.numel() - torch.Size(left).numel()
    pruned = copy.deepcopy(model)
    keep_many(pruned, cuts)
    saved = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in pruned.parameters())
    assert saved == promised > 0
    assert count(pruned, inputs).macs < count(model, inputs).macs


def assert_is_rebuilt(model: nn.Module, inputs: ModelInputs, cuts: Cuts) -> None:
    """From the text of its description, with the weights loaded strictly."""
    pruned = copy.deepcopy(model)
    keep_many(pruned, cuts)
    rebuilt = rebuild(model, json.loads(json.dumps(diff(model, pruned))))
    rebuilt.load_state_dict(pruned.state_dict(), strict=True)
    with torch.no_grad():
        outputs = [output_tensors(inputs.call(m.eval())) for m in (pruned, rebuilt)]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
