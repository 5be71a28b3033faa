from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator

from compressor.errors import DataError, LossError, MissingDependencyError
from compressor.structure.describe import diff, rebuild
from compressor.structure.trace import copy_model
from compressor.training.tasks import DetectionTask, compute_metrics, named_metrics
from compressor.training.tasks import detection as tasks_detection


class Backbone(nn.Sequential):
    out_channels = 4

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3, stride=8, padding=1), nn.ReLU())


def make_faster_rcnn() -> nn.Module:
    return detection.FasterRCNN(
        Backbone(),
        min_size=48,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
        box_head=detection.faster_rcnn.TwoMLPHead(4 * 7 * 7, 8),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(8, 3),
        box_detections_per_img=10,
        rpn_pre_nms_top_n_test=50,
        rpn_post_nms_top_n_test=20,
    )


def make_ssd() -> nn.Module:
    boxes = DefaultBoxGenerator([[2]], scales=[0.3, 0.6])
    head = detection.ssd.SSDHead([4], boxes.num_anchors_per_location(), 3)
    return detection.ssd.SSD(Backbone(), boxes, (64, 64), 3, head=head, detections_per_img=10)


def make_ssdlite() -> nn.Module:
    return detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )


NETS = [make_faster_rcnn, make_ssd, pytest.param(make_ssdlite, marks=pytest.mark.slow)]


def make_batch(samples: int = 2) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    random = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 48, 56 + 4 * n, generator=random) for n in range(samples)]
    targets = [
        {
            "boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0], [20.0, 10.0, 50.0, 44.0]]),
            "labels": torch.tensor([1, 2]),
        }
        for _ in range(samples)
    ]
    return images, targets


def make_task(make_net: Any = make_faster_rcnn, **options: Any) -> DetectionTask:
    torch.manual_seed(0)
    return DetectionTask(make_net(), **{"metrics": (), **options})


@pytest.mark.parametrize("make_net", NETS)
def test_losses_and_predictions_are_torchvisions_own(make_net: Any) -> None:
    task, (images, targets) = make_task(make_net), make_batch()
    direct = copy.deepcopy(task.model)
    torch.manual_seed(3)  # proposals are sampled
    losses = direct(images, copy.deepcopy(targets))
    torch.manual_seed(3)
    terms = task.loss(task((images, targets)), (images, targets))
    assert terms.keys() == losses.keys()
    assert all(torch.equal(terms[name], losses[name]) for name in losses)
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)
    task.eval(), direct.eval()
    for mine, theirs in zip(task.eval_forward((images, targets)), direct(images), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in ("boxes", "scores", "labels"))


def test_predictions_are_no_losses() -> None:
    task, batch = make_task().eval(), make_batch()
    with pytest.raises(LossError, match=r"returned a list, no dict of losses.*task.train\(\)"):
        task.loss(task(batch), batch)


def test_losses_are_not_taken_for_predictions() -> None:
    task, batch = make_task(), make_batch()
    losses = task(batch)
    assert isinstance(task.eval().eval_forward(batch, losses), list)


def test_batches_of_lists_are_counted_and_split_by_image() -> None:
    task, batch = make_task(), make_batch(5)
    parts = task.split_batch(batch, 2)
    assert [task.sample_count(part) for part in parts] == [2, 2, 1]
    assert [image is mine for image, mine in zip(batch[0][2:4], parts[1][0], strict=True)]
    assert parts[2][1][0] is batch[1][4]
    assert task.split_batch(batch, 5)[0] is batch
    stacked = [torch.zeros(4, 3, 8, 8), batch[1][:4]]
    assert [len(part[0]) for part in task.split_batch(stacked, 3)] == [3, 1]


@pytest.mark.parametrize("batch", [torch.zeros(2, 3, 8, 8), ([],), {"inputs": []}])
def test_a_batch_of_another_form_is_an_error(batch: Any) -> None:
    with pytest.raises(DataError, match=r"takes \(images, targets\)"):
        make_task()(batch)


def measure(task: DetectionTask, batch: Any, predictions: Any) -> dict[str, float]:
    metrics = named_metrics(task.get_metrics())
    for metric in metrics.values():
        task.update_metric(batch, predictions, metric)
    return compute_metrics(metrics)


@pytest.mark.slow
def test_mean_average_precision_of_known_boxes() -> None:
    task, batch = make_task(metrics=None), make_batch(2)
    right = [{**target, "scores": torch.tensor([0.9, 0.8])} for target in batch[1]]
    assert measure(task, batch, right)["map"] == 1.0
    # Class 1 always found, class 2 never: the mean over classes is one half.
    half = [{name: value[:1] for name, value in each.items()} for each in right]
    task = make_task(metrics=None)
    assert measure(task, batch, half)["map"] == pytest.approx(0.5)
    # An overlap of 20 / 26 counts at the thresholds 0.5, 0.55, ... 0.75: 6 of 10.
    task, batch = make_task(metrics=None), (batch[0][:1], [dict(batch[1][0])])
    batch[1][0] = {name: value[:1] for name, value in batch[1][0].items()}
    narrow = {**batch[1][0], "boxes": torch.tensor([[4.0, 4.0, 24.0, 30.0]])}
    values = measure(task, batch, [{**narrow, "scores": torch.ones(1)}])
    assert values["map"] == pytest.approx(0.6)
    assert (values["map_50"], "classes" in values) == (1.0, False)


@pytest.mark.slow
def test_a_task_with_mean_average_precision_is_copied_and_described() -> None:
    task, batch = make_task(make_ssd, metrics=None), make_batch()
    reference = copy_model(task)
    task.eval()
    measure(task, batch, task.eval_forward(batch))
    rebuilt = rebuild(reference, diff(reference, task))
    rebuilt.load_state_dict(task.state_dict())
    assert all(name.startswith("model.") for name in task.state_dict())
    mine, theirs = task(batch)[0], rebuilt.eval()(batch)[0]
    assert torch.equal(mine["scores"], theirs["scores"])


def test_without_its_library_mean_average_precision_is_missed_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tasks_detection, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    task = make_task(metrics=None)
    assert task.get_metrics(is_train=True) == {}
    with pytest.raises(MissingDependencyError, match=r'pip install "compressor\[detection\]"'):
        task.get_metrics()
    assert named_metrics(make_task(metrics=()).get_metrics()) == {}


class Sample(SimpleNamespace):
    """As MMDetection's DetDataSample: has `gt_instances`, is given `pred_instances`."""


class Instances(dict[str, Any]):
    __getattr__ = dict.__getitem__


class Preprocessor(nn.Module):
    """Stacks and scales; knows by itself where to, as MMEngine's does."""

    device = torch.device("cpu")

    def forward(self, batch: Any, training: bool) -> dict[str, Any]:
        images = torch.stack([image.to(self.device) for image in batch["inputs"]]).float() / 255
        return {"inputs": images, "data_samples": batch["data_samples"]}

    def to(self, device: Any) -> Preprocessor:
        self.device = torch.device(device)
        return super().to(device)


class Detector(nn.Module):
    """The interface of MMDetection 3, with losses that can be worked out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.data_preprocessor = Preprocessor()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
        return getattr(self, mode)(inputs, data_samples)

    def loss(self, inputs: Tensor, data_samples: Any) -> dict[str, Any]:
        levels = [self.conv(inputs), self.conv(inputs[:, :, ::2, ::2])]
        return {
            "loss_cls": [level.square() for level in levels],
            "loss_bbox": levels[0].abs().mean(),
            "acc": torch.tensor(99.0),
        }

    def predict(self, inputs: Tensor, data_samples: Any) -> Any:
        boxes = SimpleNamespace(tensor=torch.tensor([[4.0, 4.0, 30.0, 30.0]]))
        found = Instances(bboxes=boxes, labels=torch.tensor([1]), scores=torch.ones(1))
        return [Sample(pred_instances=found, gt_instances=s.gt_instances) for s in data_samples]


def make_samples(samples: int = 3) -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    inputs = [torch.randint(255, (3, 8, 8), generator=random) for _ in range(samples)]
    box = torch.tensor([[4.0, 4.0, 30.0, 30.0]])
    truth = Instances(bboxes=box, labels=torch.tensor([1]))
    return {"inputs": inputs, "data_samples": [Sample(gt_instances=truth) for _ in inputs]}


def test_lists_of_losses_are_summed_and_what_is_no_loss_is_left_out() -> None:
    task, batch = make_task(Detector), make_samples()
    images = torch.stack(batch["inputs"]).float() / 255
    outputs = task.model.conv(images)
    terms = task.loss(task(batch), batch)
    assert terms.keys() == {"loss_cls", "loss_bbox"}
    both = outputs.square().mean() + outputs[:, :, ::2, ::2].square().mean()
    torch.testing.assert_close(terms["loss_cls"], both)
    torch.testing.assert_close(terms["loss_bbox"], outputs.abs().mean())


def test_samples_are_counted_split_and_judged() -> None:
    boxes = Boxes()
    task, batch = make_task(Detector, metrics={"boxes": boxes}).eval(), make_samples(3)
    parts = task.split_batch(batch, 2)
    assert [task.sample_count(part) for part in parts] == [2, 1]
    assert parts[1]["data_samples"] == batch["data_samples"][2:]
    assert measure(task, batch, task.eval_forward(batch)) == {"boxes": 3.0}
    assert set(boxes.predictions[0]) == {"boxes", "scores", "labels"}
    assert torch.equal(boxes.predictions[0]["boxes"], boxes.targets[0]["boxes"])
    assert set(boxes.targets[0]) == {"boxes", "labels"}


def test_a_preprocessor_follows_the_model_to_its_device() -> None:
    task = make_task(Detector).to("meta")
    losses = task.loss(task(make_samples()), None)
    assert task.model.data_preprocessor.device.type == "meta"
    assert losses["loss_bbox"].device.type == "meta"


@pytest.mark.parametrize("batch", [([], []), {"inputs": []}])
def test_a_batch_without_samples_is_an_error(batch: Any) -> None:
    with pytest.raises(DataError, match="takes a dict with 'inputs' and 'data_samples'"):
        make_task(Detector)(batch)


class Boxes:
    """Counts pictures; keeps what it was given."""

    def update(self, predictions: Any, targets: Any) -> None:
        self.predictions, self.targets = predictions, targets

    def compute(self) -> int:
        return len(self.predictions)

    def reset(self) -> None:
        self.predictions = self.targets = ()
