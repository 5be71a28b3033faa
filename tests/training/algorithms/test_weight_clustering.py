from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.structure import cutting
from compressor.training import Algorithm, Callback, Event, State
from compressor.training.algorithms import EMA, SAM, SWA, GradientClipping, HoldMasks
from compressor.training.algorithms.weight_clustering import (
    WeightClustering,
    assign,
    cluster_means,
    cluster_weights,
    kmeans,
)
from tests.training.algorithms.resuming import assert_resumes
from tests.training.helpers import HIDDEN, accuracy, make_loader, make_model, make_trainer


def squared_error(values: Tensor, centroids: Tensor) -> float:
    distances = (values[:, None] - centroids[None]).abs()
    return float(distances.min(1).values.square().sum())


def least_error(values: Tensor, count: int) -> float:
    """Of all ways to cut the sorted values into `count` intervals: exact k-means, the slow way."""
    ordered = values.sort().values
    return min(
        sum(float((part - part.mean()).square().sum()) for part in ordered.tensor_split(list(cuts)))
        for cuts in combinations(range(1, len(ordered)), count - 1)
    )


def random_values(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("seed", range(6))
def test_centroids_are_nearly_as_good_as_the_best_of_all(seed: int) -> None:
    values = random_values(14, seed)
    best = least_error(values, 3)
    found = squared_error(values, kmeans(values, 3))
    assert best * (1 - 1e-9) <= found <= 1.5 * best  # Lloyd's finds a local minimum


def test_separate_bunches_are_found_exactly() -> None:
    bunches = torch.tensor([-5.0, -1.0, 0.5, 3.0, 9.0], dtype=torch.float64)
    values = (bunches[:, None] + 0.01 * random_values(40).view(1, 40)).flatten()
    means = values.view(5, 40).mean(1)
    torch.testing.assert_close(kmeans(values[torch.randperm(200)], 5), means)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 300), st.integers(1, 64))
def test_lloyds_conditions_hold(seed: int, size: int, count: int) -> None:
    """Each value is with its nearest centroid, and each centroid is the mean of its values."""
    values = random_values(size, seed).pow(3)
    centroids = kmeans(values, count)
    numbers = assign(values, centroids)
    distances = (values[:, None] - centroids[None]).abs()
    assert bool((distances.gather(1, numbers[:, None])[:, 0] <= distances.min(1).values).all())
    for number, centroid in enumerate(centroids):
        mine = values[numbers == number]
        if len(mine):
            assert float(mine.mean()) == pytest.approx(float(centroid), rel=1e-6, abs=1e-9)
    assert len(centroids) <= count
    assert centroids.equal(kmeans(values.flip(0), count))  # the order does not matter


def test_more_centroids_are_better() -> None:
    values = random_values(5000)
    errors = [squared_error(values, kmeans(values, 2**bits)) for bits in range(1, 9)]
    # A bit more is a quarter of the error or less, up to the tails (high-resolution theory: 1/4).
    assert all(0.2 < b / a < 0.45 for a, b in pairwise(errors))


def test_few_values_stay_as_they_are() -> None:
    weight = torch.tensor([0.1, 0.7, -3.0])[torch.arange(60) % 3]
    assert cluster_weights(weight, 2).equal(weight)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_palette_has_the_values_that_fit_its_bits_and_zero_is_one(bits: int) -> None:
    weight = random_values(3000).float().view(30, 100)
    assert len(cluster_weights(weight, bits).unique()) <= 2**bits
    weight[:, :40] = 0
    clustered = cluster_weights(weight, bits)
    assert len(clustered.unique()) <= 2**bits
    assert (clustered == 0).equal(weight == 0)


def test_what_makes_no_palette_is_refused() -> None:
    for bits in (0, 9):
        with pytest.raises(ConfigError, match=f"bits={bits} makes no palette"):
            cluster_weights(torch.ones(4), bits)
        with pytest.raises(ConfigError, match=f"bits={bits} makes no palette"):
            WeightClustering({"0": bits})
    with pytest.raises(ConfigError, match="not finite"):
        cluster_weights(torch.tensor([1.0, float("nan")]), 2)


def test_means_of_equal_values_are_exact_and_others_are_means() -> None:
    clusters = torch.randint(0, 5, (7, 11), generator=torch.Generator().manual_seed(0))
    values = torch.rand(5)[clusters]
    assert cluster_means(values, clusters).equal(values)
    values = random_values(77).view(7, 11)
    found = cluster_means(values, clusters)
    for number in range(5):
        expected = values[clusters == number].mean()
        torch.testing.assert_close(
            found[clusters == number], expected.expand(int((clusters == number).sum()))
        )


class Watching(Callback):
    """Notes which weights of the first layer are equal."""

    events = frozenset({Event.BATCH_END, Event.EVAL_END})

    def __init__(self) -> None:
        self.patterns: list[Tensor] = []

    def on(self, event: Event, state: State) -> None:
        self.patterns.append(pattern_of(state.model))


def pattern_of(model: nn.Module) -> Tensor:
    flat = model[0].weight.detach().flatten()
    return flat[:, None] == flat[None]


@pytest.mark.parametrize(
    "optimizer",
    [
        {"name": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3},
        {"name": "Adam", "lr": 0.01},
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("others", [(), (EMA,), (SWA,), (SAM,), (GradientClipping,)])
def test_equal_weights_stay_equal_and_train(optimizer: Any, precision: Any, others: Any) -> None:
    model, watching = make_model(), Watching()
    expected = cluster_weights(model[0].weight, 2)
    make_trainer(
        model,
        algorithms=[WeightClustering(2), *(make() for make in others)],
        callbacks=[watching],
        optimizers=optimizer,
        precision=precision,
        evaluate=accuracy,
    ).fit()
    assert len(watching.patterns) >= 10
    for pattern in [*watching.patterns, pattern_of(model)]:
        assert pattern.equal(pattern_of(nn.Sequential(as_layer(expected))))
    assert not model[0].weight.detach().equal(expected)


def as_layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data.copy_(weight)
    return layer


def test_palettes_train_like_parameters_that_are_looked_up() -> None:
    """The slow way: weight = palette[clusters], its gradients summed, the step divided by size."""
    model = make_model()
    weight = cluster_weights(model[0].weight, 2)
    palette, clusters = weight.unique(return_inverse=True)
    sizes = torch.bincount(clusters.flatten()).float()

    class LookedUp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # Scaled, SGD's step on the sum of the gradients is the step on their mean.
            self.scaled = nn.Parameter(palette * sizes.sqrt())
            self.bias = nn.Parameter(model[0].bias.detach().clone())

        def forward(self, x: Tensor) -> Tensor:
            values = self.scaled / sizes.sqrt()
            return nn.functional.linear(x, values[clusters], self.bias)

    slow = make_model()
    slow[0] = LookedUp()
    options: dict[str, Any] = {"optimizers": {"name": "SGD", "lr": 0.1, "momentum": 0.9}}
    make_trainer(slow, **options).fit()
    make_trainer(model, algorithms=[WeightClustering({"0": 2})], **options).fit()
    values = (slow[0].scaled / sizes.sqrt()).detach()[clusters]
    torch.testing.assert_close(model[0].weight.detach(), values, rtol=0, atol=1e-5)


def test_zeros_and_palettes_are_held_together() -> None:
    model = make_model()
    model[0].weight.data[:, ::2] = 0
    make_trainer(model, algorithms=[WeightClustering(2), HoldMasks()], max_duration="3ep").fit()
    assert not model[0].weight[:, ::2].any()
    assert len(model[0].weight.unique()) <= 4


def test_layers_have_their_own_bits_and_others_are_free() -> None:
    model = make_model()
    make_trainer(model, algorithms=[WeightClustering({"0": 1})]).fit()
    assert len(model[0].weight.unique()) == 2
    assert len(model[4].weight.unique()) == 16


def test_a_narrower_layer_keeps_its_palette() -> None:
    class Keeping(Algorithm):
        events = frozenset({Event.BATCH_END})

        def on(self, event: Event, state: State) -> None:
            if state.clock.batch == 2:
                state.edit(lambda m: cutting.keep_channels(m, HIDDEN, (1, 3, 4, 7)))

    model = make_model()
    make_trainer(model, algorithms=[WeightClustering(1), Keeping()]).fit()
    assert model[0].weight.shape == (4, 4)
    assert len(model[0].weight.unique()) <= 2


def test_it_resumes_bit_equal() -> None:
    def make(callbacks: list[Any]) -> Any:
        return make_trainer(
            train_dataloader=make_loader(shuffle=True),
            algorithms=[WeightClustering(2), EMA(0.5, period=1)],
            callbacks=callbacks,
            optimizers={"name": "Adam", "lr": 0.01},
            max_duration="3ep",
        )

    assert_resumes(make, [1, 4, 6, 11])
