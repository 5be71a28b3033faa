"""The tiny models are what their docstrings promise."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from compressor.testing.models import (
    CifarResNet,
    DictModel,
    TiedModel,
    TinyMLP,
    TinyResNet,
    TinyTransformer,
)


@pytest.mark.parametrize(
    ("depth", "params"),  # He et al. (2015), table 6, in millions: 0.27, 0.46, 0.85
    [(20, 269_722), (32, 464_154), (56, 853_018)],
)
def test_cifar_resnets_have_the_published_number_of_parameters(depth: int, params: int) -> None:
    assert sum(p.numel() for p in CifarResNet(depth).parameters()) == params


def test_a_cifar_resnet_copies_but_does_not_pickle() -> None:
    model = CifarResNet(8)
    copy.deepcopy(model)
    with pytest.raises(AttributeError, match="lambda"):
        pickle.dumps(model)


def test_a_depth_that_is_not_6n_plus_2_is_refused() -> None:
    with pytest.raises(ValueError, match="depth=21"):
        CifarResNet(21)


def test_every_model_gives_scores_for_a_batch() -> None:
    image, tokens = torch.randn(3, 1, 8, 8), torch.randint(32, (3, 5))
    assert TinyMLP()(image).shape == (3, 10)
    assert TinyResNet()(image).shape == (3, 10)
    assert TinyTransformer()(tokens).shape == (3, 2)
    assert TiedModel()(tokens).shape == (3, 5, 32)
    outputs = DictModel()({"image": image, "scale": torch.ones(3)})
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "logits": (3, 10),
        "features": (3, 8),
    }


def test_the_tied_model_has_one_parameter_under_two_names() -> None:
    model = TiedModel()
    assert model.head.weight is model.embedding.weight
