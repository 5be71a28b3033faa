"""The samples of document 1, a model that knows how it is trained: its code blocks 1 to 9."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
import torchvision
from torch import Tensor, nn, optim
from torchmetrics import MetricCollection

from compressor import TaskModel, Trainer
from compressor.training.loggers import InMemoryLogger
from compressor.training.tasks import (
    ClassifierTask,
    DetectionTask,
    HuggingFaceTask,
    LanguageCrossEntropy,
    named_metrics,
    timm_task,
)
from tests.seeds.digits import make_loader, make_test_loader, whole
from tests.training.tasks.test_detection import Detector, make_samples


class ResNet18(TaskModel):
    def __init__(self) -> None:
        super().__init__()
        self.model = torchvision.models.resnet18()

    def forward(self, batch: Any) -> Tensor:  # batch is the output of the dataloader
        # specify how batches are passed through the model
        inputs, _ = batch
        scores: Tensor = self.model(inputs)
        return scores

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        # pass batches and `forward` outputs to the loss
        _, targets = batch
        return F.cross_entropy(outputs, targets)


def right_share(net: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """The accuracy, counted one by one."""
    with torch.no_grad():
        guesses = net.eval()(inputs).argmax(1).tolist()
    return sum(a == b for a, b in zip(guesses, targets.tolist(), strict=True)) / len(guesses)


# Block 1
def test_a_task_is_a_model_with_forward_and_loss() -> None:
    model = ResNet18()
    images, labels = batch = next(iter(make_loader()))
    outputs = model(batch)
    assert outputs.shape == (8, 1000)
    by_hand = -torch.stack(
        [row.log_softmax(0)[label] for row, label in zip(outputs, labels, strict=True)]
    )
    torch.testing.assert_close(model.loss(outputs, batch), by_hand.mean())
    # The layers are in self.model: the network for inference is at hand.
    model.eval()
    assert torch.equal(model.model(images), model(batch))


# Block 2
@pytest.mark.slow
def test_a_trainer_fits_the_task() -> None:
    model = ResNet18()
    optimizer = optim.Adam(model.parameters(), lr=0.0001)
    train_dataloader = make_loader(batch_size=16)
    logger = InMemoryLogger()  # as the text after the blocks says

    trainer = Trainer(
        model=model,
        optimizers=optimizer,
        train_dataloader=train_dataloader,
        max_duration="10ep",
        loggers=[logger],
    )
    trainer.fit()

    steps, losses = logger.get("train/loss")
    assert steps == list(range(1, 11))
    assert losses[-1] < losses[0] - 1
    assert trainer.optimizer is optimizer
    assert trainer.model is model


class Measured(TaskModel):
    """The three methods that metrics need, written out; each call is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(10, average="micro")
        self.confidence = torchmetrics.classification.MulticlassCalibrationError(10)
        self.calls: list[str] = []

    def forward(self, batch: Any) -> Tensor:
        scores: Tensor = self.model(batch[0])
        return scores

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])

    # `outputs` has a default: the loop of the validation in block 4 leaves it out.
    def eval_forward(self, batch: Any, outputs: Any = None) -> Any:
        self.calls.append("eval_forward")
        assert not self.training
        assert not torch.is_grad_enabled()
        return self(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Any]:
        if is_train:
            return {}
        return {"accuracy": self.accuracy, "confidence": self.confidence}

    def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None:
        self.calls.append("update_metric")
        metric.update(outputs, batch[1])


# Block 3
def test_three_methods_let_the_trainer_measure() -> None:
    model, loader = Measured(), make_test_loader()
    metrics = Trainer(model, eval_dataloader=loader).eval()
    assert model.calls == 2 * ["eval_forward", "update_metric", "update_metric"]
    assert model.training
    assert metrics["accuracy"] == pytest.approx(right_share(model.model, *whole(loader)))


# Block 4
def test_the_evaluation_is_this_loop() -> None:
    model, val_dataloader = Measured(), make_test_loader()
    theirs = Trainer(model, eval_dataloader=val_dataloader).eval()
    model.eval()

    metrics = model.get_metrics(is_train=False)
    for metric in metrics.values():
        metric.reset()  # the trainer used the same objects
    with torch.no_grad():
        for batch in val_dataloader:
            outputs = model.eval_forward(batch)
            for m in metrics.values():
                model.update_metric(batch, outputs, m)

    ours = {name: metric.compute().item() for name, metric in metrics.items()}
    assert ours == pytest.approx(theirs)


class Classifier(TaskModel):
    def __init__(self) -> None:
        super().__init__()
        self.model = torchvision.models.resnet18()
        # torchmetrics now wants to be told the task.
        self.train_accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=1000)
        self.val_accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=1000)

    def forward(self, batch: Any) -> Any:
        inputs, _ = batch
        return self.model(inputs)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        _, targets = batch
        return F.cross_entropy(outputs, targets)

    def eval_forward(self, batch: Any, outputs: Any = None) -> Any:
        if outputs is not None:  # a tensor of several numbers is neither true nor false
            return outputs
        inputs, _ = batch
        outputs = self.model(inputs)
        return outputs

    def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None:
        _, targets = batch
        metric.update(outputs, targets)

    def get_metrics(self, is_train: bool = False) -> dict[str, Any]:
        # defines which metrics to use in each phase of training
        return {"Accuracy": self.train_accuracy} if is_train else {"Accuracy": self.val_accuracy}


# Block 5
def test_a_full_classifier_has_metrics_of_its_own_for_each_phase() -> None:
    model, loader = Classifier(), make_test_loader()
    trainer = Trainer(
        model,
        train_dataloader=make_loader(batch_size=16),
        eval_dataloader=loader,
        optimizers=optim.Adam(model.parameters(), lr=0.0001),
        max_duration="1ep",
    )
    trained_with: list[Tensor] = []
    model.register_forward_hook(lambda *call: trained_with.append(call[-1].detach()))
    trainer.fit()
    images, labels = whole(loader)
    assert trainer.state.metrics["Accuracy"] == pytest.approx(
        right_share(model.model, images, labels)
    )
    _, labels = whole(make_loader())
    share = (trained_with[0].argmax(1) == labels).float().mean().item()
    assert trainer.state.train_metrics["train/Accuracy"] == pytest.approx(share)


# Block 6
def test_a_collection_gives_several_metrics() -> None:
    model = ClassifierTask(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)))
    accuracy = torchmetrics.classification.MulticlassAccuracy(10, average="micro")
    loss = LanguageCrossEntropy()  # of any scores (..., K)

    model.train_metrics = MetricCollection([loss.clone(), accuracy.clone()])
    model.eval_metrics = MetricCollection([loss, accuracy])  # as the attribute is called here

    train_loader, test_loader = make_loader(), make_test_loader()
    trainer = Trainer(
        model, train_dataloader=train_loader, eval_dataloader=test_loader, max_duration="1ep"
    )
    trainer.fit()
    images, labels = whole(test_loader)
    expected = F.cross_entropy(model.model(images), labels).item()
    assert trainer.state.metrics == pytest.approx(
        {
            "LanguageCrossEntropy": expected,
            "MulticlassAccuracy": right_share(model.model, images, labels),
        },
        rel=1e-5,  # float32, in sums of another order
    )
    train_metrics = trainer.state.train_metrics
    assert {"train/LanguageCrossEntropy", "train/MulticlassAccuracy"} <= train_metrics.keys()
    assert train_metrics["train/LanguageCrossEntropy"] == pytest.approx(train_metrics["train/loss"])


# Block 7
@pytest.mark.slow
def test_a_model_of_timm_is_a_task() -> None:
    timm_model = timm_task(model_name="resnet50", pretrained=False)  # no download
    assert sum(p.numel() for p in timm_model.model.parameters()) == 25_557_032  # as published
    batch = next(iter(make_loader(samples=2)))
    outputs = timm_model.eval()(batch)
    assert outputs.shape == (2, 1000)
    torch.testing.assert_close(timm_model.loss(outputs, batch), F.cross_entropy(outputs, batch[1]))


# Block 8
@pytest.mark.slow
def test_a_bert_of_transformers_is_a_task() -> None:
    transformers = importlib.import_module("transformers")
    # huggingface model, of a configuration in place of downloaded weights
    config = transformers.BertConfig(
        vocab_size=30522,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=2,
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config)

    # list of torchmetrics
    # vocab_size is that of the scores: two labels, not the tokens that the model reads
    metrics = [
        LanguageCrossEntropy(vocab_size=2),
        torchmetrics.Accuracy(task="multiclass", num_classes=2),
    ]

    # a task, ready to be passed to our trainer
    task = HuggingFaceTask(model, metrics=metrics)

    tokens = torch.randint(30522, (8, 6))
    batch = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": tokens[:, 0] % 2,
    }
    logger = InMemoryLogger()
    trainer = Trainer(
        task,
        train_dataloader=[batch],
        eval_dataloader=[batch],
        optimizers=optim.Adam(task.parameters(), lr=0.01),
        max_duration="10ep",
        loggers=[logger],
    )
    trainer.fit()
    losses = logger.get("train/loss")[1]
    assert losses[-1] < losses[0]
    with torch.no_grad():
        outputs = model.eval()(**batch)
    right = (outputs.logits.argmax(1) == batch["labels"]).float().mean().item()
    assert trainer.state.metrics == pytest.approx(
        {"LanguageCrossEntropy": outputs.loss.item(), "MulticlassAccuracy": right}, rel=1e-5
    )


class Yolo(Detector):
    """Called as a detector of MMDetection is, and made of such a dict."""

    def __init__(self, **parts: dict[str, Any]) -> None:
        super().__init__()
        self.parts = parts

    def init_weights(self) -> None:
        nn.init.constant_(self.conv.weight, 0.5)


def build_detector(config: dict[str, Any]) -> Any:
    parts = dict(config)
    return {"YOLOX": Yolo}[parts.pop("type")](**parts)


# Block 9; a class of the same interface stands for the library, which not every machine can build.
def test_a_detector_of_mmdetection_is_a_task() -> None:
    yolox_s_config = dict(
        type="YOLOX",
        input_size=(640, 640),
        backbone=dict(type="CSPDarknet", deepen_factor=0.33, widen_factor=0.5),
        neck=dict(type="YOLOXPAFPN", in_channels=[128, 256, 512], out_channels=128),
        bbox_head=dict(type="YOLOXHead", num_classes=80, in_channels=128, feat_channels=128),
        train_cfg=dict(assigner=dict(type="SimOTAAssigner", center_radius=2.5)),
        test_cfg=dict(score_thr=0.01, nms=dict(type="nms", iou_threshold=0.65)),
    )

    yolox = build_detector(yolox_s_config)
    yolox.init_weights()
    model = DetectionTask(yolox, metrics=())  # mean average precision has tests of its own

    assert model.model is yolox
    assert named_metrics(model.get_metrics()) == {}
    logger = InMemoryLogger()
    Trainer(
        model,
        train_dataloader=[make_samples()],
        optimizers={"name": "SGD", "lr": 0.1},
        max_duration="5ep",
        loggers=[logger],
    ).fit()
    for term in ("train/loss_cls", "train/loss_bbox"):
        values = logger.get(term)[1]
        assert values[-1] < values[0]
