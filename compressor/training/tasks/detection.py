"""Object detection: lists of images of several sizes, losses that the network computes itself.

Two conventions: torchvision's, and that of MMDetection 3 (Chen et al., 2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from compressor.errors import DataError, LossError
from compressor.interfaces.inputs import device_of
from compressor.optional import require
from compressor.training.tasks.base import TaskModel, held_metrics

Backend: TypeAlias = Literal["pycocotools", "faster_coco_eval"]
BACKENDS: tuple[Backend, ...] = ("pycocotools", "faster_coco_eval")


class DetectionTask(TaskModel):
    """A detector, trained on its own losses and judged by mean average precision.

    Batches of torchvision's convention are (images, targets): a list of images (C, H, W), and a
    list of dicts with 'boxes' (B, 4), 'labels' (B,) and what else the network wants. Those of
    MMDetection are {'inputs': images, 'data_samples': samples}; its detectors are known by their
    methods `loss` and `predict`.

    Args:
        net: a detector of either kind.
        metrics: of the evaluation, as `get_metrics` may return them; () is none. None is mean
            average precision, for which the extra "detection" is needed. They are updated with two
            lists of dicts: predictions ('boxes', 'scores', 'labels') and targets.
    """

    def __init__(self, net: nn.Module, metrics: Any = None) -> None:
        super().__init__()
        self.model = net
        if metrics is None:
            backend = next((name for name in BACKENDS if find_spec(name)), None)
            self.eval_metrics = None if backend is None else held_metrics(_precision(backend))
        else:
            self.eval_metrics = held_metrics(metrics)

    def forward(self, batch: Any) -> Any:
        """In training mode the network's dict of losses, in eval mode its predictions."""
        if _has_own_modes(self.model):
            inputs = _preprocess(self.model, batch)
            return self.model(**inputs, mode="loss" if self.training else "predict")
        images, targets = _parts(batch)
        return self.model(images, targets) if self.training else self.model(images)

    def loss(self, outputs: Any, batch: Any) -> dict[str, Tensor]:
        """The losses that the network computed; `batch` was seen by `forward`.

        Raises:
            LossError: if `outputs` are predictions.
        """
        del batch
        if not isinstance(outputs, Mapping):
            raise LossError(
                f"The detector returned a {type(outputs).__name__}, no dict of losses. It gives "
                "losses in training mode only: call task.train() before."
            )
        if not _has_own_modes(self.model):
            return dict(outputs)
        # Its dicts hold more than losses, an accuracy for one; only what is called so is summed.
        return {name: _total(value) for name, value in outputs.items() if "loss" in name}

    def eval_forward(self, batch: Any, outputs: Any = None) -> Any:
        """Predictions; losses are not taken for them."""
        return self(batch) if outputs is None or isinstance(outputs, Mapping) else outputs

    def get_metrics(self, is_train: bool = False) -> Any:
        """None in training, when there are no predictions.

        Raises:
            MissingDependencyError: if none were given, and the default one cannot be had.
        """
        if is_train:
            return {}
        if self.eval_metrics is None:
            require(BACKENDS[0], extra="detection")
        return self.eval_metrics

    def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None:
        """Take in predictions and targets, as lists of dicts."""
        if not _has_own_modes(self.model):
            metric.update(list(outputs), list(_parts(batch)[1]))
            return
        predictions = [_as_dict(sample.pred_instances) for sample in outputs]
        metric.update(predictions, [_as_dict(each.gt_instances) for each in batch["data_samples"]])

    def sample_count(self, batch: Any) -> int:
        """How many images there are."""
        return len(batch["inputs"] if isinstance(batch, Mapping) else _parts(batch)[0])

    def split_batch(self, batch: Any, size: int) -> list[Any]:
        """`batch` as batches of at most `size` images; what is not one per image is shared."""
        count = self.sample_count(batch)
        if size >= count:
            return [batch]
        return [_part(batch, start, start + size, count) for start in range(0, count, size)]


def _has_own_modes(net: nn.Module) -> bool:
    """Whether `net` is a detector of MMDetection: `net(inputs, data_samples, mode=...)`."""
    return callable(getattr(net, "loss", None)) and callable(getattr(net, "predict", None))


def _preprocess(net: nn.Module, batch: Any) -> Mapping[str, Any]:
    """The batch normalised, padded and stacked, if the detector does that."""
    if not isinstance(batch, Mapping) or not {"inputs", "data_samples"} <= set(batch):
        raise DataError(
            f"The batch is a {type(batch).__name__}, and this detector takes a dict with 'inputs' "
            "and 'data_samples'. Give the loader MMEngine's `pseudo_collate`, or one that does so."
        )
    preprocessor = getattr(net, "data_preprocessor", None)
    if preprocessor is None:
        return batch
    # It moves batches to a device of its own, which only its own `to` changes, not a parent's.
    if getattr(preprocessor, "device", device_of(net)) != device_of(net):
        preprocessor.to(device_of(net))
    prepared: Mapping[str, Any] = preprocessor(batch, net.training)
    return prepared


def _parts(batch: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise DataError(
            f"The batch is a {type(batch).__name__}, and this detector takes (images, targets). "
            "Give the loader collate_fn=lambda samples: tuple(zip(*samples))."
        )
    return batch[0], batch[1]


def _total(value: Tensor | Sequence[Tensor]) -> Tensor:
    """One number of a loss, which may be a list of one tensor per level of a pyramid."""
    if isinstance(value, Tensor):
        return value.mean()
    first, *others = (tensor.mean() for tensor in value)
    return sum(others, start=first)


def _as_dict(instances: Any) -> dict[str, Tensor]:
    """Instances of MMDetection as torchmetrics takes them."""
    boxes = instances.bboxes
    found = {"boxes": getattr(boxes, "tensor", boxes), "labels": instances.labels}
    if "scores" in instances:
        found["scores"] = instances.scores
    return found


def _part(batch: Any, start: int, stop: int, count: int) -> Any:
    def cut(value: Any) -> Any:
        is_per_image = isinstance(value, (list, tuple, Tensor)) and len(value) == count
        return value[start:stop] if is_per_image else value

    if isinstance(batch, Mapping):
        return {key: cut(value) for key, value in batch.items()}
    return type(batch)(cut(value) for value in batch)


def _precision(backend: Backend) -> dict[str, nn.Module]:
    # Here, because it takes seconds: torchmetrics imports torchvision and transformers.
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(backend=backend)
    metric.warn_on_many_detections = False  # networks of a hundred boxes and more are usual
    return {"mean_average_precision": metric}
