from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError
from compressor.training import Algorithm, Event, State
from compressor.training.algorithms.gradient_clipping import GradientClipping, clip_gradients
from tests.training.helpers import make_trainer


def with_gradient(weight: Tensor, gradient: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(weight)
    parameter.grad = gradient.clone()
    return parameter


def test_gradients_keep_their_direction_and_lose_length() -> None:
    first = with_gradient(torch.zeros(2), torch.tensor([3.0, 0.0]))
    second = with_gradient(torch.zeros(1), torch.tensor([4.0]))
    assert clip_gradients([first, second], 1.0).item() == pytest.approx(5.0)
    torch.testing.assert_close(first.grad, torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(second.grad, torch.tensor([0.8]))


def test_values_are_cut_and_the_norm_before_is_told() -> None:
    parameter = with_gradient(torch.zeros(3), torch.tensor([3.0, -4.0, 0.5]))
    norm = clip_gradients([parameter, nn.Parameter(torch.zeros(1))], 1.0, "value")
    assert norm.item() == pytest.approx((9 + 16 + 0.25) ** 0.5)
    torch.testing.assert_close(parameter.grad, torch.tensor([1.0, -1.0, 0.5]))


@pytest.mark.parametrize("shape", [(5,), (4, 3), (3, 2, 3, 3)])
def test_adaptive_clipping_is_the_papers_formula_unit_by_unit(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    weight[0] = 0.0  # its norm counts as 1e-3
    gradient[-1] = 0.0
    expected = gradient.clone()
    units = [...] if len(shape) == 1 else range(shape[0])
    for unit in units:
        limit = 0.3 * max(weight[unit].norm().item(), 1e-3)
        length = gradient[unit].norm().item()
        if length > limit:
            expected[unit] = gradient[unit] * limit / length
    parameter = with_gradient(weight, gradient)
    clip_gradients([parameter], 0.3, "adaptive")
    torch.testing.assert_close(parameter.grad, expected)


class Measuring(Algorithm):
    events = frozenset({Event.BEFORE_STEP})
    after = ("GradientClipping",)

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on(self, event: Event, state: State) -> None:
        named = state.model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_norm_that_is_stepped_is_at_most_the_limit(precision: str) -> None:
    measuring = Measuring()
    make_trainer(algorithms=[measuring, GradientClipping(1e-3)], precision=precision).fit()
    norms = [
        torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
        for gradients in measuring.gradients
    ]
    assert norms == pytest.approx([1e-3] * 8, rel=1e-3)


@pytest.mark.parametrize("clips_last", [False, True])
def test_the_last_linear_layer_is_clipped_adaptively_only_when_asked(clips_last: bool) -> None:
    measuring = Measuring()
    clipping = GradientClipping(1e-4, "adaptive", clips_last=clips_last)
    trainer = make_trainer(algorithms=[measuring, clipping], max_duration="1ba")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.fit()
    for name, gradient in measuring.gradients[0].items():
        limits = [1e-4 * max(unit.norm().item(), 1e-3) for unit in before[name]]
        lengths = [unit.norm().item() for unit in gradient]
        if name.endswith("weight") and gradient.dim() > 1:
            is_clipped = all(a <= b * 1.001 for a, b in zip(lengths, limits, strict=True))
            assert is_clipped == (clips_last or not name.startswith("4"))


def test_what_leaves_nothing_or_is_unknown_is_refused() -> None:
    with pytest.raises(ConfigError, match="threshold=0"):
        GradientClipping(0)
    with pytest.raises(ConfigError, match="Did you mean 'adaptive'"):
        GradientClipping(1.0, "adaptiv")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'norms'"):
        clip_gradients([], 1.0, "norms")  # type: ignore[arg-type]
