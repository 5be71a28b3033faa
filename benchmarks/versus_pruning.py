"""What other pruners make of a reference in the given minutes: prune, fine-tune, int8, bisect.

The expert's way is torch-pruning by Taylor importance, as its README drives it; the other is the
FastNAS of NVIDIA's ModelOpt. Both get the trainer, the recipe and the minutes of all rows, and
ONNX Runtime's static int8 at the end, which is faster than what they would export themselves.

`pip install torch-pruning nvidia-modelopt torchprofile==0.0.4` (with torchprofile 0.1.0 FastNAS
raises an AttributeError)
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.versus_cases import Case
from compressor.frameworks.teacher import as_teacher
from compressor.interfaces.inputs import ModelInputs
from compressor.training import Trainer
from compressor.training.algorithms import Distillation
from compressor.training.callbacks import KeepBest
from compressor.training.evaluator import Evaluator

TAYLOR_BATCHES = 8
BATCHNORM_BATCHES = 16
TIMED_BATCHES = 4
ROUND_TO = 16  # ONNX Runtime's kernels step there, and int8 below 16 channels is slower than at 16
FASTNAS_SCORED = 4  # batches of the judged split that score a subnet: it asks for hundreds
ATTEMPTS = 4  # fine-tunes that the minutes are divided by
NARROW = 1 / 32  # of the ratio: a bracket that is decided
Prune = Callable[[float], nn.Module | None]


@dataclass(frozen=True)
class Attempt:
    """One step of the bisection.

    Attributes:
        ratio: of channels, or of MACs, that was asked to be removed.
        percent: accuracy of the int8 file; None if the pruner has nothing of that ratio.
        epochs: of fine-tuning.
        minutes: of all of it.
    """

    ratio: float
    percent: float | None
    epochs: int
    minutes: float


@dataclass
class Bisection:
    """The largest ratio that holds, within a time.

    Attributes:
        make: ratio to (file, accuracy in percent), or None if there is no such model.
        least_percent: that holds.
        seconds_left: until the end.
        attempts: oldest first.
    """

    make: Callable[[float], tuple[Path, float] | None]
    least_percent: float
    seconds_left: Callable[[], float]
    epochs: int
    attempts: list[Attempt] = field(default_factory=list)

    def run(self) -> Path | None:
        """The file of the largest ratio that held; None if none did."""
        low, high, best = 0.0, 1.0, None
        slowest = 0.0
        while high - low > NARROW and self.seconds_left() > slowest:
            ratio, began = (low + high) / 2, self.seconds_left()
            made = self.make(ratio)
            seconds = began - self.seconds_left()
            slowest = max(slowest, seconds)
            percent = None if made is None else made[1]
            self.attempts.append(Attempt(ratio, percent, self.epochs, seconds / 60))
            if made is not None and made[1] >= self.least_percent:
                low, best = ratio, made[0]
            else:
                high = ratio
        return best


def prune_and_bisect(
    prune: Prune,
    case: Case,
    write_int8: Callable[[nn.Module, Path], float],
    folder: Path,
    *,
    least_percent: float,
    deadline: float,
    seed: int,
) -> tuple[Path | None, dict[str, Any]]:
    """Fine-tune and quantize what `prune` gives, for ever other ratios until the deadline.

    Args:
        prune: ratio to a pruned copy of the reference; None where it has none.
        case: network and data.
        write_int8: writes the file of a model, gives its accuracy in percent.
        folder: for the files.
        least_percent: that holds.
        deadline: on `time.monotonic`.
        seed: of the training.

    Returns:
        The file of the largest ratio that holds, None if none does; and how it came about. Where a
        library leaves whole layers alone rather than remove all of their channels, a larger ratio
        prunes less: a model that is not smaller than one that held is not made.
    """
    epochs = affordable_epochs(case, deadline - time.monotonic(), seed)
    fewest = parameter_count(case.model)

    def make(ratio: float) -> tuple[Path, float] | None:
        nonlocal fewest
        model = prune(ratio)
        if model is None or parameter_count(model) >= fewest:
            return None
        if epochs:
            fine_tune(model, case, epochs, seed)
        else:
            model = better_estimated(model, case)
        path = folder / f"ratio-{ratio:.4f}.onnx"
        percent = write_int8(model, path)
        if percent >= least_percent:
            fewest = parameter_count(model)
        return path, percent

    bisection = Bisection(make, least_percent, lambda: deadline - time.monotonic(), epochs)
    best = bisection.run()
    return best, {"attempts": [asdict(attempt) for attempt in bisection.attempts]}


def torch_pruning(case: Case, ratio: float) -> nn.Module | None:
    """A copy with `ratio` of the channels removed; None if that leaves it as it is.

    Of a transformer the hidden units of its feed-forward layers. Of a residual network whose
    shortcuts pad channels those inside the blocks: torch-pruning does not understand the padding,
    and makes models of them that raise.
    """
    import torch_pruning as tp

    model = copy.deepcopy(case.model).eval()
    pruner = tp.pruner.BasePruner(
        model,
        case.example,
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=ratio,
        global_pruning=True,
        isomorphic=True,
        round_to=ROUND_TO,
        ignored_layers=kept_layers(model, case),
    )
    model.zero_grad()
    for inputs, labels in islice(case.train, TAYLOR_BATCHES):
        F.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
    pruner.step()
    model.zero_grad()
    return model if parameter_count(model) < parameter_count(case.model) else None


def kept_layers(model: nn.Module, case: Case) -> list[nn.Module]:
    """Layers whose outputs are not pruned."""
    if case.kind == "transformer":
        return [
            module
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm))
            and not name.endswith("intermediate.dense")
        ]
    if case.kind == "residual":
        return [
            module
            for name, module in model.named_modules()
            if name in ("conv1", "linear") or name.endswith("conv2")
        ]
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def fastnas(case: Case, folder: Path) -> Prune:
    """FastNAS with its sensitivity map kept between ratios; `ratio` is of the MACs."""
    import modelopt.torch.prune as mtp

    config = mtp.fastnas.FastNASConfig()
    config["nn.Conv2d"]["*"]["channel_divisor"] = ROUND_TO
    config["nn.BatchNorm2d"]["*"]["feature_divisor"] = ROUND_TO
    config["nn.Linear"]["*"]["feature_divisor"] = ROUND_TO

    def prune(ratio: float) -> nn.Module | None:
        try:
            model, _ = mtp.prune(
                copy.deepcopy(case.model),
                mode=[("fastnas", config)],
                constraints={"flops": f"{100 * (1 - ratio):.3f}%"},
                dummy_input=case.example[:1],
                config={
                    "data_loader": case.train,
                    "collect_func": lambda batch: (batch[0],),
                    "score_func": lambda tried: accuracy(
                        tried, islice(case.judged, FASTNAS_SCORED)
                    ),
                    "checkpoint": str(folder / "sensitivity.pth"),
                },
            )
        except ValueError as error:
            if "constraints" in str(error):  # smaller than the smallest subnet
                return None
            raise
        pruned: nn.Module = model.eval()
        return pruned

    return prune


def parameter_count(model: nn.Module) -> int:
    """Of all its parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def fine_tune(model: nn.Module, case: Case, epochs: int, seed: int) -> None:
    """Train `model` in place and leave it with its best weights, as the engine does."""
    best = KeepBest("accuracy", "max")
    trainer = make_trainer(
        model,
        case,
        seed,
        train_dataloader=case.train,
        eval_dataloader=Evaluator(
            function=lambda tried: {"accuracy": accuracy(tried, case.judged)}
        ),
        eval_key="accuracy",
        callbacks=[best],
        max_duration=f"{epochs}ep",
    )
    trainer.eval()  # what the fit begins with counts among the best
    trainer.fit()
    best.restore(model)
    model.eval()


def affordable_epochs(case: Case, seconds: float, seed: int) -> int:
    """Of each attempt, so that `ATTEMPTS` of them fit; 0 where nothing is fine-tuned."""
    if case.recipe.epochs == 0:
        return 0
    batches = list(islice(case.train, TIMED_BATCHES))
    trainer = make_trainer(
        copy.deepcopy(case.model), case, seed, train_dataloader=batches, max_duration="1ep"
    )
    trainer.fit()  # warm-up
    began = time.monotonic()
    trainer.fit("1ep")
    epoch_seconds = (time.monotonic() - began) / len(batches) * len(case.train)
    began = time.monotonic()
    accuracy(case.model, case.judged)
    epoch_seconds += time.monotonic() - began
    return max(1, min(case.recipe.epochs, int(0.9 * seconds / ATTEMPTS / epoch_seconds)))


def make_trainer(model: nn.Module, case: Case, seed: int, **options: Any) -> Trainer:
    """With what the engine's fine-tuning has: loss, distillation, warm-up and cosine."""
    recipe = case.recipe
    return Trainer(
        model,
        lambda tried, batch: {"loss": F.cross_entropy(tried(batch[0]), batch[1])},
        optimizers=dict(recipe.optimizer),
        algorithms=[
            Distillation(
                as_teacher(case.model, [ModelInputs((case.example,))]),
                weight=recipe.weight,
                task_weight=recipe.task_weight,
                temperature=recipe.temperature,
            ),
        ],
        precision=recipe.precision,
        seed=seed,
        **options,
    )


def better_estimated(model: nn.Module, case: Case) -> nn.Module:
    """`model`, or a copy with its batch norms re-estimated: the more accurate one."""
    repaired = copy.deepcopy(model)
    reestimate(repaired, case)
    return max((model, repaired), key=lambda tried: accuracy(tried, case.judged))


@torch.no_grad()
def reestimate(model: nn.Module, case: Case) -> None:
    """The batch norms of `model`, in place, on training samples."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
        norm.train()
    for inputs, _ in islice(case.train, BATCHNORM_BATCHES):
        model(inputs)
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, batches: Any) -> float:
    """In percent; the mode of `model` is restored."""
    was_training = model.training
    model.eval()
    right: list[Tensor] = [model(inputs).argmax(1) == labels for inputs, labels in batches]
    model.train(was_training)
    return 100 * torch.cat(right).double().mean().item()
