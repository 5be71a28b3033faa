"""Which blocks are offered, in which order, and what taking several out does."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from compressor.interfaces.inputs import ModelInputs
from compressor.result import Choice, Plan
from compressor.structure.blocks import residual_blocks
from compressor.techniques import BlockRemoval, TechniqueContext
from compressor.testing.models import TinyResNet

pytestmark = pytest.mark.slow  # each one exports a graph

INPUTS = ModelInputs((torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)),))


def small_transformer() -> tuple[torch.nn.Module, ModelInputs]:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        use_cache=False,
    )
    inputs = ModelInputs(kwargs={"input_ids": torch.arange(14).reshape(2, 7)})
    return transformers.LlamaModel(config).eval(), inputs


def test_blocks_that_do_least_come_first_and_say_how_little() -> None:
    torch.manual_seed(0)
    model = TinyResNet().eval()
    with torch.no_grad():
        model.layer2[1].bn2.weight.fill_(1e-3)  # its branch adds hardly anything
    choices = list(BlockRemoval().choices(model, TechniqueContext(INPUTS)))
    assert [choice.site for choice in choices] == ["layer2.1", "layer1.0"]
    assert choices[0].label == "removed; its influence is 0.000"
    influence = {block.name: block.influence for block in residual_blocks(model, INPUTS)}
    assert choices[1].label.endswith(f"{influence['layer1.0']:.3f}")
    assert influence["layer1.0"] > 0.01


def test_a_removed_residual_block_is_its_input() -> None:
    torch.manual_seed(0)
    model = TinyResNet().eval()
    edited = copy.deepcopy(model)
    (choice,) = [
        choice
        for choice in BlockRemoval().choices(model, TechniqueContext(INPUTS))
        if choice.site == "layer1.0"
    ]
    assert choice.setting == {"removed": True}
    BlockRemoval().apply(edited, [choice], TechniqueContext(INPUTS))
    x = model.relu(model.bn1(model.conv1(INPUTS.args[0])))
    expected = model.linear(model.pool(model.layer2(x)).flatten(1))
    torch.testing.assert_close(INPUTS.call(edited), expected)


def test_a_layer_may_go_together_with_parts_of_it() -> None:
    model, inputs = small_transformer()
    context = TechniqueContext(inputs)
    choices = list(BlockRemoval().choices(model, context))
    layer = [c for c in choices if c.site.startswith("layers.0")]
    assert len(layer) == 3
    alone, together = copy.deepcopy(model), copy.deepcopy(model)
    BlockRemoval().apply(alone, [c for c in layer if c.site == "layers.0"], context)
    BlockRemoval().apply(together, layer, context)
    with torch.no_grad():
        a, b = inputs.call(alone)[0], inputs.call(together)[0]
    assert a.equal(b)


def test_attention_goes_and_the_rest_of_the_layer_stays() -> None:
    model, inputs = small_transformer()
    context = TechniqueContext(inputs)
    edited = copy.deepcopy(model)
    choices = list(BlockRemoval().choices(model, context))
    (choice,) = [c for c in choices if c.site == "layers.1.self_attn"]
    (again,) = Plan.from_json(json.loads(json.dumps(Plan((choice,)).to_json())))
    BlockRemoval().apply(edited, [again], context)
    with torch.no_grad():
        model.layers[1].self_attn.o_proj.weight.zero_()  # nothing arrives of it
        expected, actual = inputs.call(model)[0], inputs.call(edited)[0]
    torch.testing.assert_close(actual, expected)


def test_a_plan_of_an_older_version_still_removes() -> None:
    """Its setting says no more than that."""
    model = TinyResNet().eval()
    choice = Choice("block_removal", "layer1.0", {"removed": True}, "removed", ("layer1.0",))
    BlockRemoval().apply(model, [choice], TechniqueContext(INPUTS))
    assert not list(model.layer1[0].parameters())
    assert INPUTS.call(model).shape == (4, 10)
