from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.structure import cutting
from compressor.training import Algorithm, Callback, Event, State, Window
from compressor.training.algorithms import EMA, SAM, SWA, GradientClipping, HoldMasks
from compressor.training.algorithms.gradual_sparsity import magnitude_mask
from tests.training.algorithms.resuming import assert_resumes
from tests.training.helpers import HIDDEN, accuracy, make_loader, make_model, make_trainer

WEIGHTS = ("0.weight", "4.weight")  # 32 and 16 of them


def sparse_model(sparsity: float = 0.75) -> nn.Sequential:
    model = make_model()
    for name in WEIGHTS:
        weight = model.get_parameter(name)
        weight.data *= magnitude_mask(weight, sparsity)
    return model


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: model.get_parameter(name).detach() == 0 for name in WEIGHTS}


class Watching(Callback):
    """Notes where the zeros are: after every step, and whenever the model is evaluated."""

    events = frozenset({Event.BATCH_END, Event.EVAL_END})

    def __init__(self) -> None:
        self.zeros: list[dict[str, Tensor]] = []

    def on(self, event: Event, state: State) -> None:
        self.zeros.append(zeros_of(state.model))


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
        {"name": "Adam", "lr": 0.01},
        {"name": "AdamW", "lr": 0.01},
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("others", [(), (EMA,), (SWA,), (SAM,), (GradientClipping,)])
def test_no_zero_is_lost_or_won(optimizer: Any, precision: Any, others: Any) -> None:
    model, watching = sparse_model(), Watching()
    before = zeros_of(model)
    make_trainer(
        model,
        algorithms=[HoldMasks(), *(make() for make in others)],
        callbacks=[watching],
        optimizers=optimizer,
        precision=precision,
        evaluate=accuracy,
    ).fit()
    assert len(watching.zeros) >= 10
    for seen in [*watching.zeros, zeros_of(model)]:
        assert all(seen[name].equal(before[name]) for name in WEIGHTS)
    assert not model[0].weight.detach().equal(sparse_model()[0].weight.detach())


def test_without_it_momentum_fills_the_zeros() -> None:
    model = sparse_model()
    make_trainer(model, optimizers={"name": "SGD", "lr": 0.1, "momentum": 0.9}).fit()
    count = {name: int(zeros.sum()) for name, zeros in zeros_of(model).items()}
    assert count["4.weight"] < 6  # of 12; those of channels that are never active stay
    assert count["0.weight"] < 18  # of 24


def test_the_others_train_as_if_the_masked_ones_were_not_there() -> None:
    """The slow way: a model whose forward pass multiplies by the mask."""

    class Masked(nn.Linear):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__(layer.in_features, layer.out_features)
            self.load_state_dict(layer.state_dict())
            self.register_buffer("mask", (layer.weight != 0).float())

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight * self.mask, self.bias)

    held, masked = sparse_model(), sparse_model()
    for index in (0, 4):
        masked[index] = Masked(masked[index])
    options: dict[str, Any] = {"optimizers": {"name": "Adam", "lr": 0.01}}
    make_trainer(held, algorithms=[HoldMasks()], **options).fit()
    make_trainer(masked, **options).fit()
    for index in (0, 4):
        # 1e-6: a gradient that is zero is reached in two ways
        torch.testing.assert_close(held[index].weight, masked[index].weight, rtol=0, atol=1e-6)


def test_masks_are_given_by_layer_and_zeros_elsewhere_are_free() -> None:
    model = sparse_model()
    kept = torch.rand(2, 8, generator=torch.Generator().manual_seed(0)) > 0.5
    make_trainer(model, algorithms=[HoldMasks(masks={"4": kept})]).fit()
    assert (model[4].weight != 0).equal(kept)
    assert int(zeros_of(model)["0.weight"].sum()) < 24


def test_layers_inside_a_named_module_are_held() -> None:
    """A factored layer has its old name, and its weights in the parts."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 8)), nn.Linear(8, 2))
    model[0][1].weight.data[::2] = 0
    make_trainer(model, algorithms=[HoldMasks(["0"])]).fit()
    assert not model[0][1].weight[::2].any()
    assert model[0][0].weight.all()


def test_masks_are_cut_with_their_weights() -> None:
    class Keeping(Algorithm):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 2:
                state.edit(lambda m: cutting.keep_channels(m, HIDDEN, (1, 3, 4, 7)))

    model = sparse_model()
    before = zeros_of(model)
    make_trainer(model, algorithms=[HoldMasks(), Keeping()]).fit()
    after = zeros_of(model)
    assert after["0.weight"].equal(before["0.weight"][[1, 3, 4, 7]])
    assert after["4.weight"].equal(before["4.weight"][:, [1, 3, 4, 7]])


def test_it_resumes_bit_equal() -> None:
    def make(callbacks: list[Any]) -> Any:
        return make_trainer(
            sparse_model(),
            train_dataloader=make_loader(shuffle=True),
            algorithms=[HoldMasks(), EMA(0.5, period=1)],
            callbacks=callbacks,
            optimizers={"name": "SGD", "lr": 0.1, "momentum": 0.9},
            max_duration="3ep",
        )

    assert_resumes(make, [1, 4, 6, 11])


def test_a_resumed_training_holds_what_the_first_held() -> None:
    """Also when the model that is trained on has come without its zeros."""
    first = make_trainer(sparse_model(), algorithms=[HoldMasks()], max_duration="1ep")
    first.fit()
    second = make_trainer(make_model(), algorithms=[HoldMasks()], max_duration="2ep")
    second.load_state_dict(first.state_dict())
    second.fit()
    expected = zeros_of(sparse_model())
    assert all(zeros_of(second.model)[name].equal(expected[name]) for name in WEIGHTS)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HoldMasks(["0"], masks={}), "Both `layers` and `masks`"),
        (lambda: HoldMasks(["5"]), "no layer '5'"),
        (lambda: HoldMasks(["2"]), "'2' has no parameter `weight` that could be masked"),
        (lambda: HoldMasks(masks={"4": torch.ones(8, 2)}), r"'4' has the shape \(8, 2\)"),
    ],
)
def test_what_cannot_be_held_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_trainer(algorithms=[make()])


def test_a_window_is_refused() -> None:
    masks = HoldMasks()
    masks.window = Window.parse("0dur", "0.5dur")
    with pytest.raises(ConfigError, match="has a window"):
        make_trainer(algorithms=[masks])
