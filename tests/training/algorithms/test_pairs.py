"""Two methods at once: they train together, or the refusal says why."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import CompressorError, ConfigError
from compressor.quantization.aware import QuantizationAwareTraining
from compressor.testing.models import ResidualBlock
from compressor.training import Algorithm
from compressor.training.algorithms import (
    EMA,
    BatchNormReestimation,
    BlurPool,
    CutMix,
    Distillation,
    Factorize,
    GhostBatchNorm,
    LabelSmoothing,
    MixUp,
    ProgressiveResizing,
    SqueezeExcite,
    WeightStandardization,
)
from compressor.training.dispatch import Dispatch
from tests.training.algorithms.settings import SETTINGS, Case, Images
from tests.training.helpers import weights_of


class MeetingNet(nn.Module):
    """What every method for images acts on: both norms for images, one of layers, residual blocks.

    Modules have the names that they have in the other jobs.
    """

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        for name, layer in net.named_children():
            self.add_module(name, layer)
        self.layer1 = nn.Sequential(ResidualBlock(8, 8), nn.GroupNorm(2, 8))
        self.layer2 = nn.Sequential(ResidualBlock(8, 8), ResidualBlock(8, 8))
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        for name in (*"0123", "layer1", "layer2", *"456789", "norm"):
            x = getattr(self, name)(x)
        return x


class Meeting(Images):
    """Where methods meet whose own jobs have nothing in common."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = MeetingNet(self.model)  # type: ignore[assignment]


MEETING = "a net of everything"
JOBS = {**SETTINGS, MEETING: Case(EMA, Meeting)}


def train_two_batches(job: str, algorithms: list[Algorithm]) -> None:
    trainer = JOBS[job].make_trainer(algorithms, max_duration="2ba")
    trainer.fit()
    assert all(torch.isfinite(value).all() for value in weights_of(trainer.model).values())


@cache
def acts_on(name: str, job: str) -> bool:
    """Whether the method `name` alone trains on a job: tokens are not mixed."""
    try:
        train_two_batches(job, [SETTINGS[name].make()])
    except CompressorError:
        return False
    except RuntimeError:  # of a teacher who knows images only
        assert name.startswith("Distillation"), (name, job)
        return False
    return True


def jobs_of(first: str, second: str) -> list[str]:
    """Those of the two on which either acts, or the meeting place if it does there."""
    own = {SETTINGS[name].task: name for name in (first, second)}
    both = [job for job in (*own.values(), MEETING) if acts_on(first, job) and acts_on(second, job)]
    return both if both == [MEETING] else [job for job in both if job != MEETING]


def make_pair(first: str, second: str) -> list[Algorithm]:
    pair = [SETTINGS[name].make() for name in (first, second)]
    if pair[0].key == pair[1].key:
        pair[1].key = "another"
    return pair


def conflict(pair: list[Algorithm]) -> str:
    """The reason that is declared, which the trainer gives; '' if there is none."""
    reasons = {reason for each in pair for reason in each.conflicts.values()}
    try:
        Dispatch(pair, [])
    except ConfigError as error:
        return next(reason for reason in reasons if str(error).endswith(reason))
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("first", SETTINGS)
def test_any_two_train_together_or_are_declared_a_conflict(first: str) -> None:
    """Wherever either acts alone, and in either order."""
    names = list(SETTINGS)
    for second in names[names.index(first) + 1 :]:
        for order in ((first, second), (second, first)):
            if not conflict(make_pair(*order)):
                for job in jobs_of(first, second):
                    train_two_batches(job, make_pair(*order))


@pytest.mark.slow
def test_methods_that_never_meet_are_for_images_and_for_tokens() -> None:
    of_tokens = {n for n, case in SETTINGS.items() if not issubclass(case.task, Images)}
    for first, second in combinations(SETTINGS, 2):
        if not jobs_of(first, second):
            assert {first, second} & of_tokens, (first, second)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, c in SETTINGS.items() if not issubclass(c.task, Images)])
def test_methods_for_tokens_are_distilled_too(name: str) -> None:
    teacher = SETTINGS[name].task(seed=3).model  # type: ignore[call-arg]
    train_two_batches(name, [Distillation(teacher), SETTINGS[name].make()])


def refuses(*algorithms: Algorithm) -> pytest.ExceptionInfo[ConfigError]:
    with pytest.raises(ConfigError) as found:
        Dispatch(algorithms, [])
    return found


def test_only_one_may_mix_losses() -> None:
    refuses(MixUp(interpolate_loss=True), CutMix()).match("'MixUp' and 'CutMix' both mix inputs")
    refuses(CutMix(), MixUp(interpolate_loss=True)).match("'CutMix' and 'MixUp' both mix inputs")
    Dispatch([MixUp(), CutMix()], [])


def test_quantized_models_see_one_size() -> None:
    refuses(ProgressiveResizing(), QuantizationAwareTraining()).match("are those of one size")


def test_masks_do_not_hold_standardized_weights() -> None:
    masks = SETTINGS["HoldMasks"].make()
    refuses(masks, WeightStandardization()).match("zeros and equal entries")


def test_groups_are_those_of_the_model_that_is_given() -> None:
    for change in (SqueezeExcite(), WeightStandardization(), Factorize()):
        function = change.card.functional  # type: ignore[union-attr]
        for name in ("GradualPruning", "GroupRegularization"):
            refuses(SETTINGS[name].make(), change).match(rf"functional\.{function}\(model\)")
    train_two_batches("BlurPool", make_pair("GradualPruning", "BlurPool"))


def test_layers_are_exchanged_before_others_look_for_them() -> None:
    given = [SETTINGS["WeightClustering"].make(), WeightStandardization(), SqueezeExcite()]
    given[0].conflicts = given[1].conflicts = {}
    ordered = Dispatch([*given, BlurPool(), Factorize()], []).algorithms
    assert [type(each).__name__ for each in ordered] == [
        "Factorize",
        "BlurPool",
        "SqueezeExcite",
        "WeightStandardization",
        "WeightClustering",
    ]


@pytest.mark.parametrize("is_smoothing_first", [False, True])
def test_smoothing_is_of_the_labels_and_never_of_the_teacher(is_smoothing_first: bool) -> None:
    def terms(*algorithms: Algorithm) -> dict[str, float]:
        trainer = SETTINGS["LabelSmoothing"].make_trainer(algorithms, max_duration="1ba")
        trainer.fit()
        return {name: float(value) for name, value in trainer.state.train_metrics.items()}

    pair: list[Algorithm] = [Distillation(Images(seed=3).model), LabelSmoothing(0.2)]
    both = terms(*(reversed(pair) if is_smoothing_first else pair))
    alone = terms(Distillation(Images(seed=3).model))
    smoothed = terms(LabelSmoothing(0.2))
    assert both["train/distillation"] == alone["train/distillation"]
    assert both["train/loss"] == smoothed["train/loss"]


def test_micro_batches_are_parts_of_which_ghosts_are_parts() -> None:
    """A ghost batch is never larger than a micro-batch: 4 samples, of which 2 and then 2."""

    def train(size: int | None, ghosts: int | None) -> dict[str, Tensor]:
        algorithms = [] if ghosts is None else [GhostBatchNorm(ghosts)]
        task = Images()
        task.model[8].p = 0.0
        trainer = SETTINGS["EMA"].make_trainer(
            algorithms, task=task, micro_batch_size=size, max_duration="1ba"
        )
        trainer.fit()
        return {n: v for n, v in weights_of(trainer.model).items() if "running" not in n}

    micro, ghostly = train(2, 4), train(None, 2)
    for name, value in train(2, None).items():
        torch.testing.assert_close(micro[name], value)
        if "num_batches" not in name:
            torch.testing.assert_close(ghostly[name], value, rtol=0, atol=1e-6)


def test_statistics_are_reestimated_on_plain_batches() -> None:
    """What mixes or resizes inputs acts on what is trained, not on what norms are measured on."""

    class Seen(Images):
        sizes: list[tuple[int, ...]]

        def forward(self, batch: Any) -> Tensor:
            if not torch.is_grad_enabled():
                self.sizes.append(tuple(batch[0].shape))
            return super().forward(batch)

    task = Seen()
    task.sizes = []
    chosen = [BatchNormReestimation(count=2), ProgressiveResizing(0.5), MixUp()]
    SETTINGS["MixUp"].make_trainer(chosen, task=task, max_duration="1ba").fit()
    assert task.sizes == [(4, 3, 8, 8)] * 2
