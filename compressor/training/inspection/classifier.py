"""One pass of a classifier over a loader, and what it tells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import ConfigError, DataError, MetricError, ModelError, first_line
from compressor.interfaces.data import kept_generators, map_leaves, move, split_batch
from compressor.interfaces.evaluation import evaluating
from compressor.interfaces.inputs import device_of
from compressor.seeding import isolated_rng
from compressor.training.batch import get_item, set_item
from compressor.training.inspection.confusion import confusion_matrix
from compressor.training.inspection.images import Normalization
from compressor.training.inspection.inspection import Inspection
from compressor.training.inspection.saliency import input_gradients
from compressor.training.inspection.samples import Sample, SampleCollector
from compressor.training.tasks.classifier import as_indices

SAMPLES = 8


def inspect_classifier(
    call: Callable[[Any], Any],
    loader: Iterable[Any],
    classes: Sequence[object],
    *,
    model: nn.Module | None = None,
    input_key: int | str = 0,
    target_key: int | str = 1,
    denormalize: Normalization | None = None,
    samples: int = SAMPLES,
    title: str = "Inspection",
) -> Inspection:
    """Look at a classifier of images: what it takes for what, and the samples that tell most.

    Modes, gradients, the global generators and the loader's own are left as they were.

    Args:
        call: a batch to logits (N, K), or to something that has them as `logits`.
        loader: yields batches; one pass is made.
        classes: K names, by index; `range(10)` will do.
        model: what `call` runs: goes into eval mode meanwhile, and batches go to its device. None:
            `call` itself if it is a module; otherwise modes and devices are the caller's.
        input_key: where the images (N, C, H, W) or (N, H, W) are in a batch.
        target_key: where the labels are: class indices (N,), or probabilities (N, K).
        denormalize: mean and standard deviation by which the images were normalised; None shows
            each of them stretched to its own range.
        samples: how many of the best, of the worst, and of the most confused.
        title: of the page.

    Raises:
        ConfigError: fewer than two classes, or no samples.
        DataError: a loader without a batch, or what is at `input_key` is no image.
        MetricError: outputs that are no logits (N, K), or labels that are no classes.

    >>> loader = [(torch.eye(2).view(2, 1, 1, 2), torch.tensor([0, 1]))]
    >>> found = inspect_classifier(lambda batch: batch[0].flatten(1), loader, ["left", "right"])
    >>> found.accuracy, [sample.index for sample in found.best]
    (1.0, [0, 1])
    """
    names = check_classes(classes)
    collector = SampleCollector(samples)
    if model is None and isinstance(call, nn.Module):
        model = call
    device = None if model is None else device_of(model)
    confusion = torch.zeros(len(names), len(names), dtype=torch.int64)
    loss_sum = 0.0
    parts: dict[int, Any] = {}  # a batch of one for each sample that is kept

    def compute(batch: Any) -> Tensor:
        return _logits(call(batch), len(get_item(batch, input_key)), len(names))

    with ExitStack() as stack:
        stack.enter_context(isolated_rng(0))
        stack.enter_context(kept_generators(loader))
        if model is not None:
            stack.enter_context(evaluating(model))
        with torch.no_grad():
            for batch in loader:
                batch = batch if device is None else move(batch, device)
                images = _check_images(get_item(batch, input_key))
                logits = compute(batch)
                labels = _labels(get_item(batch, target_key), logits)
                first = collector.seen
                scores = collector.update(images, logits, labels)
                confusion += confusion_matrix(scores.order[:, 0], scores.labels, len(names))
                loss_sum += scores.loss.sum().item()
                parts = _parts_of(collector.kept, parts, batch, first, (input_key, target_key))
        if not collector.seen:
            raise DataError(
                "The loader to be inspected gave no batch. Check its dataset and drop_last."
            )
        maps, notes = _saliency(compute, collector.kept, parts, input_key, device)

    def finish(kept: Sequence[Sample]) -> tuple[Sample, ...]:
        return tuple(replace(each, saliency=maps.get(each.index)) for each in kept)

    return Inspection(
        classes=names,
        confusion=confusion,
        loss=loss_sum / collector.seen,
        best=finish(collector.best),
        worst=finish(collector.worst),
        most_confused=finish(collector.most_confused),
        denormalize=denormalize,
        title=title,
        notes=notes,
    )


def check_classes(classes: Sequence[object]) -> tuple[str, ...]:
    """Names of classes as strings.

    Raises:
        ConfigError: if they are fewer than two, or one string.
    """
    if isinstance(classes, str) or len(classes) < 2:
        raise ConfigError(
            f"classes={classes!r} are no names of two classes or more. "
            "Give one for each, in the order of their indices: ['cat', 'dog']."
        )
    return tuple(str(name) for name in classes)


def _logits(outputs: Any, samples: int, classes: int) -> Tensor:
    logits = getattr(outputs, "logits", outputs)
    if isinstance(logits, Tensor) and logits.shape == (samples, classes):
        return logits
    is_tensor = isinstance(logits, Tensor)
    what = f"shape {tuple(logits.shape)}" if is_tensor else f"class {type(logits).__name__}"
    raise MetricError(
        f"The outputs are of {what}, and {samples} samples of {classes} classes have logits of "
        f"shape ({samples}, {classes}). Give the name of every class, and a call or a task whose "
        "outputs are the logits."
    )


def _check_images(images: Any) -> Tensor:
    if isinstance(images, Tensor) and images.dim() in (3, 4):
        return images
    what = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
    raise DataError(
        f"The inputs of the batch are {what}, not images: (N, C, H, W) or (N, H, W). "
        "Set `input_key` to where the images are."
    )


def _labels(targets: Any, logits: Tensor) -> Tensor:
    labels = as_indices(targets, logits)
    if isinstance(labels, Tensor) and labels.shape == logits.shape[:1]:
        return labels
    what = f"shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
    raise MetricError(
        f"The targets of the batch are {what}, and {len(logits)} samples need a class index each. "
        "Set `target_key` to where the labels are."
    )


def _parts_of(
    kept: Mapping[int, Sample],
    known: Mapping[int, Any],
    batch: Any,
    first: int,
    keys: tuple[int | str, int | str],
) -> dict[int, Any]:
    """A batch of one for each of `kept`: the `known` one, or a copy of a part of `batch`.

    Args:
        kept: samples by index.
        known: parts of batches before.
        batch: the present one.
        first: index of its first sample.
        keys: of its images and its targets.
    """
    parts = {index: known[index] for index in kept if index in known}
    new = [index for index in kept if index not in known]
    cut = split_batch(batch, 1) if new else []
    is_cut = len(cut) == len(get_item(batch, keys[0]))
    for index in new:
        row = index - first
        part = cut[row] if is_cut else _with_row(batch, row, keys)
        parts[index] = _copy_to_cpu(part)
    return parts


def _with_row(batch: Any, row: int, keys: tuple[int | str, int | str]) -> Any:
    """A batch that has no parts, such as an object, with one image and one target in it."""
    for key in keys:
        batch = set_item(batch, key, get_item(batch, key)[row : row + 1].clone())
    return batch


def _copy_to_cpu(batch: Any) -> Any:
    # Not a view: that would keep the whole batch in memory.
    return map_leaves(
        lambda leaf: leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf, batch
    )


def _saliency(
    compute: Callable[[Any], Tensor],
    kept: Mapping[int, Sample],
    parts: Mapping[int, Any],
    input_key: int | str,
    device: torch.device | None,
) -> tuple[dict[int, Tensor], tuple[str, ...]]:
    """A map (H, W) by index, of the score of what was predicted; or none, and a note why."""
    maps: dict[int, Tensor] = {}
    for index, sample in kept.items():
        part = parts[index] if device is None else move(parts[index], device)
        images: Tensor = get_item(part, input_key)
        target = torch.tensor([sample.prediction], device=images.device)

        def call(inputs: Tensor, part: Any = part) -> Tensor:
            return compute(set_item(part, input_key, inputs))

        try:
            maps[index] = input_gradients(call, images, target)[0].cpu()
        except (ModelError, RuntimeError) as error:
            # RuntimeError: an operation without a derivative, an RNN of cuDNN in eval mode, memory.
            # The rest of the report is worth having without the maps.
            return {}, (f"There are no maps of the input gradients. {first_line(error)}",)
    return maps, ()
