"""Training of classifiers, with all that is worth knowing about them, or with nothing to write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import ConfigError
from compressor.training.inspection.classifier import check_classes
from compressor.training.inspection.images import Normalization
from compressor.training.recipes.loop import Recipe, StepFunction, check_options
from compressor.training.recipes.meters import AccAvg, ConfusionMatrix, EpochMetricAvg
from compressor.training.recipes.presets import WithTestOptions, train_and_test
from compressor.training.recipes.reporting import InspectionPage
from compressor.training.recipes.stepping import LRByFraction, Optimizer
from compressor.training.schedules import warmup_cosine

if TYPE_CHECKING:
    from typing_extensions import Unpack


def classification(
    model: nn.Module,
    train_fn: StepFunction,
    test_fn: StepFunction,
    train_loader: Iterable[Any],
    test_loader: Iterable[Any],
    classes: Sequence[object],
    *,
    report_dir: str | Path | None = None,
    denormalize: Normalization | None = None,
    **options: Unpack[WithTestOptions],
) -> Recipe:
    """`train_and_test` of a classifier, with loss, accuracy, and a visual report.

    Metrics: "loss", "accuracy"; "test/loss", "test/accuracy", "test/macro_f1". The confusion matrix
    of the last test is `recipe.test_loop.state["confusion"]`.

    Args:
        model: is trained in place.
        train_fn: of a batch (inputs, labels); returns {"loss": shape (), "pred": scores (N, K)}.
        test_fn: returns the same.
        train_loader: any iterable of batches that can be iterated again.
        test_loader: likewise.
        classes: K names, by index.
        report_dir: where `inspection.html` is written when a run is complete, if the inputs are
            images; None writes none.
        denormalize: mean and standard deviation by which the images were normalised.
        options: of `train_and_test`.

    Raises:
        ConfigError: fewer than two classes.
    """
    check_options(classification, options, WithTestOptions)
    names = check_classes(classes)
    loop = train_and_test(model, train_fn, test_fn, train_loader, test_loader, **options)
    loop.callbacks.add_callbacks([EpochMetricAvg("loss"), AccAvg()])
    loop.test_loop.callbacks.add_callbacks(
        [
            EpochMetricAvg("loss", post_each_batch=False),
            AccAvg(post_each_batch=False),
            ConfusionMatrix(names),
        ]
    )
    if report_dir is not None:
        page = InspectionPage(
            lambda batch: (test_fn(batch) or {}).get("pred"),
            test_loader,
            names,
            report_dir,
            model=model,
            denormalize=denormalize,
        )
        loop.callbacks.add_callbacks([page])
    return loop


def cross_entropy_classification(
    model: nn.Module,
    train_loader: Iterable[Any],
    test_loader: Iterable[Any],
    classes: Sequence[object],
    *,
    lr: float = 1e-3,
    beta: float = 0.9,
    weight_decay: float = 0.01,
    label_smoothing: float = 0.0,
    report_dir: str | Path | None = None,
    denormalize: Normalization | None = None,
    **options: Unpack[WithTestOptions],
) -> Recipe:
    """`classification` with nothing to write: cross entropy, AdamW, warm-up and half a cosine.

    The learning rate follows the fraction of a run, so it is 0 at the end of each `run`.

    Args:
        model: gives scores (N, K) of the first element of a batch; is trained in place.
        train_loader: yields (inputs, labels).
        test_loader: likewise.
        classes: K names, by index.
        lr: the highest learning rate.
        beta: of AdamW's average of gradients.
        weight_decay: of AdamW.
        label_smoothing: 0 to 1, in training; the loss of the tests has none.
        report_dir: as in `classification`.
        denormalize: as in `classification`.
        options: of `train_and_test`.

    Raises:
        ConfigError: fewer than two classes, or an option out of range.

    >>> data = [(torch.eye(2), torch.tensor([0, 1]))]
    >>> recipe = cross_entropy_classification(nn.Linear(2, 2), data, data, ["a", "b"], lr=0.1)
    >>> recipe.run(40)["metrics"]["test/accuracy"]
    1.0
    """
    check_options(cross_entropy_classification, options, WithTestOptions)
    if not 0 <= label_smoothing <= 1:
        raise ConfigError(f"label_smoothing={label_smoothing} is no fraction. Write 0 to 1.")

    def train_fn(batch: Any) -> dict[str, Tensor]:
        inputs, labels = batch
        pred = model(inputs)
        loss = F.cross_entropy(pred, labels, label_smoothing=label_smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": loss, "pred": pred}

    def test_fn(batch: Any) -> dict[str, Tensor]:
        inputs, labels = batch
        pred = model(inputs)
        return {"loss": F.cross_entropy(pred, labels), "pred": pred}

    loop = classification(
        model,
        train_fn,
        test_fn,
        train_loader,
        test_loader,
        classes,
        report_dir=report_dir,
        denormalize=denormalize,
        **options,
    )
    try:
        opt = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(beta, 0.999), weight_decay=weight_decay
        )
    except ValueError as error:
        raise ConfigError(f"AdamW refuses its options: {error}. Correct them.") from error
    loop.callbacks.add_callbacks([LRByFraction(opt, warmup_cosine), Optimizer(opt, log_lr=True)])
    return loop
