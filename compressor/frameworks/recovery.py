"""Recovery: fine-tune a variant with the trainer, the reference as its teacher."""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from compressor.config import Config, DistillationConfig, TrainerConfig
from compressor.config.checks import check
from compressor.distributed import current_context
from compressor.errors import CheckpointError, ModelError
from compressor.interfaces.data import DataLoaderView
from compressor.interfaces.optimizers import ScaledOptimizerFactory, SchedulerConfig
from compressor.interfaces.task import Task
from compressor.logs import get_logger
from compressor.progress import Progress
from compressor.quantization.aware import QuantizationAwareTraining
from compressor.search.tuning import Recovered, Tuning
from compressor.seeding import derive_seed, isolated_rng
from compressor.training.algorithm import Algorithm, Callback
from compressor.training.algorithms.distillation import Distillation
from compressor.training.algorithms.gradient_clipping import GradientClipping
from compressor.training.algorithms.weight_average import EMA
from compressor.training.callbacks import (
    EarlyStopping,
    History,
    KeepBest,
    LearningCurveStopping,
    ProgressBar,
)
from compressor.training.errors import DivergedError
from compressor.training.evaluator import Evaluator
from compressor.training.large_batch import LargeBatchWarmup
from compressor.training.loading import epoch_length
from compressor.training.trainer import Trainer

logger = get_logger(__name__)

TIMED_BATCHES = 4
ASSUMED_BATCHES = 100  # of an epoch whose loader does not know its length
LOOP_TEST_BATCHES = 2
ROUNDED_GRADIENT_NORM = 1.0
CALM_GRADIENT_NORM = 1.0  # of a fit that begins again after it diverged
CALM = "calm"  # folder of its checkpoints
LOSS = "train/total"  # in the rows of `History`
AS_CONFIGURED = Tuning()


class Recovery:
    """Trains variants of one reference, as the configuration says."""

    def __init__(
        self,
        config: Config,
        metric: str,
        task: Task,
        teacher: Callable[[], nn.Module] | None,
        data: Mapping[str, DataLoaderView],
        evaluate: Callable[[nn.Module], Mapping[str, float]],
        progress: Progress,
    ) -> None:
        """Remember what training needs.

        Args:
            config: optimizers, schedules, distillation, precision, seed.
            metric: that is to be kept.
            task: has the loss.
            teacher: gives it, where one is wanted; None: there is none, and the loss alone trains.
            data: "train" is trained on.
            evaluate: a model's metrics on the judged split; decides which weights are kept.
            progress: shows the epochs.
        """
        self._config = config
        self._metric = metric
        self._task = task
        self._teacher = teacher
        self._data = data
        self._evaluate = evaluate
        self._progress = progress

    def fit(
        self,
        model: nn.Module,
        epochs: int,
        folder: Path,
        *,
        is_final: bool,
        algorithms: Sequence[Algorithm] = (),
        tuning: Tuning = AS_CONFIGURED,
        wanted: float | None = None,
    ) -> Recovered:
        """Train `model` in place and leave it with its best weights.

        A fit that diverges begins again with its gradients clipped, where one process trains and
        nothing clipped them. A training loop of the user's own trains as it does, without `tuning`
        and `wanted`.

        Args:
            model: a variant.
            epochs: of the training split; 0 leaves `model` as it is.
            folder: for checkpoints, in that of the variant, whose name seeds a loop of the user's
                own; an interrupted fit goes on from the last epoch.
            is_final: by the full trainer's settings, not the fine-tuner's.
            algorithms: that the variant's techniques need.
            tuning: what is to differ from the settings.
            wanted: value of the metric; a fit that is clearly not coming to it is stopped. With a
                scheduler of the user's own, whose rate may drop late, no fit is.

        Raises:
            ConfigError: if `tuning` cannot be meant.
        """
        if not epochs:
            return Recovered(0)
        loop = self._config.external_training_loop
        if loop is not None:
            # Of the variant alone: what this process did before must not matter to it.
            seed = derive_seed(self._config.seed, "external", folder.parent.name)
            with isolated_rng(seed):
                _fit_outside(loop, model, epochs, is_final=is_final)
            return Recovered(epochs)
        configured = self._config.full_trainer if is_final else self._config.fine_tuner
        settings = tuned(configured, tuning)
        context = current_context()
        is_calm = settings.gradient_clip_norm is not None or bool(algorithms)
        if not context.splits_batches:
            settings = scaled(settings, context.world_size)
            algorithms = [*algorithms, LargeBatchWarmup(context.world_size)]
        is_smooth = tuning.scheduler is not None or settings.scheduler is None
        train = partial(
            self._train,
            model,
            epochs,
            algorithms=algorithms,
            scheduler=tuning.scheduler or settings.scheduler,
            wanted=wanted if is_smooth else None,
        )
        if is_calm or context.world_size > 1:
            return train(settings, folder)
        calm = replace(settings, gradient_clip_norm=CALM_GRADIENT_NORM)
        if (folder / CALM).exists():
            return train(calm, folder / CALM)
        weights = copy.deepcopy(model.state_dict())
        try:
            return train(settings, folder)
        except DivergedError as error:
            again = f"The fit begins again, with gradients clipped at norm {CALM_GRADIENT_NORM:g}."
            logger.warning("%s %s", error, again)
            model.load_state_dict(weights)
            return train(calm, folder / CALM)

    def _train(
        self,
        model: nn.Module,
        epochs: int,
        settings: TrainerConfig,
        folder: Path,
        *,
        algorithms: Sequence[Algorithm],
        scheduler: SchedulerConfig | str | None,
        wanted: float | None,
    ) -> Recovered:
        """`fit`, by these settings alone."""
        loader: Iterable[Any] = self._data["train"]
        if settings.loop_test:
            loader = DataLoaderView(loader, max_batches=LOOP_TEST_BATCHES)
        best = KeepBest(self._metric, self._config.metric_mode)
        history = History()
        trainer = Trainer(
            model,
            self._task.loss,
            train_dataloader=loader,
            eval_dataloader=Evaluator(function=self._evaluate),
            schedulers=scheduler,
            max_duration=f"{epochs}ep",
            eval_interval=f"{settings.eval_freq}ep",
            eval_skip=f"{settings.eval_skip}ep",
            eval_key=self._metric,
            algorithms=[*algorithms, *self._algorithms(settings)],
            callbacks=[best, history, *self._callbacks(settings, wanted)],
            save_dir=folder,
            **self._shared(settings),
        )
        if not _resume(trainer, folder):
            trainer.eval()  # what the fit begins with counts among the best
            earlier = 0
        else:
            earlier = best.evaluations
        trainer.fit()
        best.restore(model)
        curve = _curve(history.rows, self._metric)
        return _account(trainer, epochs)._replace(earlier_looks=earlier, curve=curve)

    def fit_quantized(
        self,
        model: nn.Module,
        epochs: int,
        folder: Path,
        *,
        is_final: bool,
        tuning: Tuning = AS_CONFIGURED,
        wanted: float | None = None,
    ) -> Recovered:
        """Train a quantized model in place, through its rounding; as `fit`.

        Raises:
            ModelError: if the user's own loop trains.
        """
        if self._config.external_training_loop is not None:
            raise ModelError(
                "An external training loop does not train numbers of few bits: layers stay in "
                "float instead. Leave the loop out to have them trained."
            )
        settings = self._config.full_trainer if is_final else self._config.fine_tuner
        algorithms: list[Algorithm] = [QuantizationAwareTraining()]
        if settings.gradient_clip_norm is None:  # rounding makes gradients rough
            algorithms.append(GradientClipping(ROUNDED_GRADIENT_NORM))
        return self.fit(
            model,
            epochs,
            folder,
            is_final=is_final,
            algorithms=algorithms,
            tuning=tuning,
            wanted=wanted,
        )

    def epoch_seconds(self, model: nn.Module) -> float:
        """Seconds of an epoch, from a few batches of training `model`, a copy that is spent."""
        settings = self._config.fine_tuner
        loader = DataLoaderView(self._data["train"], max_batches=TIMED_BATCHES)
        trainer = Trainer(
            model,
            self._task.loss,
            train_dataloader=loader,
            max_duration="1ep",
            algorithms=list(self._algorithms(settings)),
            **self._shared(settings),
        )
        trainer.fit()  # warm-up
        clock = trainer.state.clock
        done, began = clock.batch, time.monotonic()
        trainer.fit("1ep")
        seconds = time.monotonic() - began
        length = epoch_length(self._data["train"], current_context())
        batches = ASSUMED_BATCHES if length is None else max(length, 1)
        return seconds / (clock.batch - done) * batches

    def _shared(self, settings: TrainerConfig) -> dict[str, Any]:
        return {
            "optimizers": settings.optimizer,
            "device": self._config.device.torch_device,
            "precision": self._config.training_precision,
            "seed": self._config.seed,
        }

    def _algorithms(self, settings: TrainerConfig) -> Iterator[Algorithm]:
        if settings.distillation is not None and self._teacher is not None:
            options = settings.distillation
            yield Distillation(
                self._teacher(),
                weight=options.weight,
                task_weight=options.task_weight,
                temperature=options.temperature,
            )
        if settings.gradient_clip_norm is not None:
            yield GradientClipping(settings.gradient_clip_norm)
        if settings.ema is not None:
            yield EMA(settings.ema.decay_rate, settings.ema.period)

    def _callbacks(self, settings: TrainerConfig, wanted: float | None) -> Iterator[Callback]:
        key, mode = self._metric, self._config.metric_mode
        if settings.early_stopping_patience is not None:
            yield EarlyStopping(key, settings.early_stopping_patience, mode)
        if wanted is not None:
            yield LearningCurveStopping(key, wanted, mode)
        yield ProgressBar(self._progress, metric=key)


def tuned(settings: TrainerConfig, tuning: Tuning) -> TrainerConfig:
    """`settings` with another learning rate, weight and temperature of distillation.

    A weight of distillation switches it on, and leaves the rest up to 1 to the user's loss; 0
    switches it off.

    Raises:
        ConfigError: if a number is out of range.
    """
    if tuning.lr_factor != 1:
        optimizer = ScaledOptimizerFactory(settings.optimizer, tuning.lr_factor)
        settings = replace(settings, optimizer=optimizer)
    distillation, weight = settings.distillation, tuning.distillation_weight
    if weight is not None:
        check("distillation_weight", weight, 0 <= weight <= 1, "from 0 to 1")
        distillation = replace(
            distillation or DistillationConfig(), weight=weight, task_weight=1 - weight
        )
        distillation = distillation if weight else None
    if distillation is not None and tuning.temperature is not None:
        distillation = replace(distillation, temperature=tuning.temperature)
    return replace(settings, distillation=distillation)


def scaled(settings: TrainerConfig, factor: float) -> TrainerConfig:
    """`settings` with learning rates times `factor`, for a batch that is so many times larger."""
    return replace(settings, optimizer=ScaledOptimizerFactory(settings.optimizer, factor))


def _fit_outside(loop: Any, model: nn.Module, epochs: int, *, is_final: bool) -> None:
    """The user's own loop trains; it returns the model, which may be another object."""
    trained = loop.train(model, epochs=epochs, validation=False, finetuning=not is_final)
    if trained is not model and trained is not None:
        model.load_state_dict(trained.state_dict())


def _resume(trainer: Trainer, folder: Path) -> bool:
    """Whether the fit goes on; a checkpoint that cannot be read is left out."""
    try:
        return trainer.resume()
    except CheckpointError as error:
        logger.warning("%s The fit begins anew.", error)
        shutil.rmtree(folder, ignore_errors=True)
        return False


def _account(trainer: Trainer, epochs: int) -> Recovered:
    """What was done, and why it was not more."""
    done, reason = trainer.state.clock.epoch, trainer.state.stop_reason
    return Recovered(done, f"stopped after {done} of {epochs} epochs: {reason}" if reason else "")


def _curve(rows: Sequence[Mapping[str, float]], metric: str) -> tuple[dict[str, float], ...]:
    """Metric and loss by epoch; what is no number, and could not be kept as JSON, is left out."""
    names = {"epoch": "epoch", "metric": metric, "loss": LOSS}
    found = (
        {
            name: float(row[key])
            for name, key in names.items()
            if key in row and math.isfinite(row[key])
        }
        for row in rows
    )
    return tuple(point for point in found if len(point) > 1)
