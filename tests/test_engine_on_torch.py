"""The engine on real models, data and runtimes: digits, a residual CNN, ONNX Runtime."""

from __future__ import annotations

import copy
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import compressor
from compressor import (
    Device,
    Engine,
    ExternalTrainingLoop,
    ForwardPass,
    LossFunction,
    NativeOptimizerFactory,
    NativeSchedulerFactory,
    TorchEvaluationFunction,
    TorchForwardPass,
    TorchFramework,
)
from compressor.cli.digits import digit_loaders
from compressor.errors import (
    ConfigError,
    DataError,
    LossError,
    MetricError,
    ModelError,
    StudyError,
)
from compressor.frameworks.torch_bench import DRYRUN_CHOICES
from compressor.interfaces.chunks import Chunk
from compressor.testing.models import TinyResNet

pytestmark = pytest.mark.slow

Batch = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def data() -> dict[str, DataLoader[tuple[Tensor, ...]]]:
    loaders = digit_loaders()
    train, test = (loaders[split].dataset for split in ("train", "test"))
    return {
        "train": DataLoader(TensorDataset(*train[:512]), 64, shuffle=True),
        "test": DataLoader(TensorDataset(*test[:200]), 100),
    }


@pytest.fixture(scope="module")
def trained(data: dict[str, Any]) -> nn.Module:
    """About 95 % accurate."""
    torch.manual_seed(0)
    model = TinyResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(8):
        for images, labels in data["train"]:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


class Accuracy(TorchEvaluationFunction):
    """As users write it: no super().__init__, the batch's own device."""

    def __init__(self) -> None:
        self.calls = 0  # on the whole split

    def _compute_inference(
        self, model: nn.Module, data_loader: Any, **kwargs: Any
    ) -> dict[str, float]:
        self.calls += not isinstance(data_loader.native_dl, Chunk)
        right = total = 0
        for images, labels in data_loader.native_dl:
            right += int((model(images).argmax(1) == labels).sum())
            total += len(labels)
        return {"accuracy": 100 * right / total, "wrong": float(total - right)}


class CrossEntropy(LossFunction):
    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        images, labels = batch
        return {"loss": self.scale * F.cross_entropy(model(images), labels)}


class Sgd(NativeOptimizerFactory):
    def make(self, native_model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(native_model.parameters(), lr=0.05, momentum=0.9)


class Decay(NativeSchedulerFactory):
    def make(self, native_optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.MultiplicativeLR(native_optimizer, lambda epoch: 0.9)


# Enough training and delta for a plan that changes the structure.
DEEP: dict[str, Any] = {
    "delta": 15.0,
    "full_trainer": {"optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9}, "epochs": 4},
    "fine_tuner": {"optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9}, "epochs": 2},
}


# For what does not depend on techniques and runtimes: a block is removed, or it is not.
PLAIN: dict[str, Any] = {
    "techniques": ["block_removal"],
    "optimization": "macs",
    "target": {"runtime": "eager"},
    "export": {"formats": []},
    "budget": {"trials": 1},
}


def make_engine(model: nn.Module, data: Any, folder: Path, **changes: Any) -> Engine:
    arguments: dict[str, Any] = {
        "forward_pass": TorchForwardPass(model_input_pattern=(0, "_")),
        "eval_func": Accuracy(),
        "loss_function_cls": CrossEntropy,
        "loss_function_kwargs": {"scale": 1.0},
    }
    config = {
        "delta": 5.0,
        "optimization": "compression",
        "run_dir": str(folder),
        "device": "CPU",
        "progress": False,
        "budget": {"trials": 2},
        "full_trainer": {"optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9}, "epochs": 2},
        "fine_tuner": {"loop_params": {"epochs": 1}},
    }
    for name in arguments.keys() & changes.keys():
        arguments[name] = changes.pop(name)
    return Engine(
        framework=TorchFramework(),
        data=data,
        model=model,
        config={**config, **changes},
        **arguments,
    )


def accuracy(model: nn.Module, loader: Any) -> float:
    """The slow way, apart from the package."""
    with torch.no_grad():
        guesses = [(model(images).argmax(1) == labels).float() for images, labels in loader]
    return 100 * float(torch.cat(guesses).mean())


@pytest.fixture(scope="module")
def finished(
    trained: nn.Module, data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, nn.Module, Path]:
    """One run, looked at by many tests; everything of the user's is as before."""
    folder = tmp_path_factory.mktemp("run")
    before = copy.deepcopy(trained.state_dict())
    flags = [parameter.requires_grad for parameter in trained.parameters()]
    trained.train()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    engine = make_engine(trained, data, folder, **DEEP)
    small = engine.run()
    assert trained.training
    trained.eval()
    assert torch.get_rng_state().equal(torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])
    assert all(trained.state_dict()[name].equal(value) for name, value in before.items())
    assert [parameter.requires_grad for parameter in trained.parameters()] == flags
    return engine, small, folder


def test_the_certificate_is_that_of_the_exported_file(
    finished: tuple[Engine, nn.Module, Path], data: dict[str, Any], trained: nn.Module
) -> None:
    engine, _, _ = finished
    assert engine.result is not None
    certificate, artifacts = engine.result.certificate, engine.result.artifacts
    assert certificate.within_delta
    assert certificate.reference_metric == pytest.approx(accuracy(trained, data["test"]))
    session = ort.InferenceSession(artifacts["onnx"])  # without our package
    right = total = 0
    for images, labels in data["test"]:
        (logits,) = session.run(["output"], {"input": images.numpy()})
        right += int((logits.argmax(1) == labels.numpy()).sum())
        total += len(labels)
    assert certificate.metric == pytest.approx(100 * right / total)
    assert certificate.size_bytes == artifacts["onnx"].stat().st_size
    assert certificate.size_ratio > 2
    assert certificate.interval is not None
    drop = certificate.reference_metric - certificate.metric
    assert certificate.interval.low <= drop <= certificate.interval.high
    assert certificate.interval.looks == certificate.looks - 1, "without that at the reference"
    assert certificate.parity is not None
    assert certificate.parity.max_rel_error < 1e-3
    assert certificate.looks == engine._job.eval_func.calls


def test_the_runtime_model_is_called_like_the_model(
    finished: tuple[Engine, nn.Module, Path], data: dict[str, Any]
) -> None:
    engine, _, _ = finished
    assert engine.result is not None
    module = engine.result.runtime_model()
    assert accuracy(module.eval().to("cpu"), data["test"]) == pytest.approx(
        engine.result.certificate.metric
    )


def test_the_returned_model_is_the_users_class_in_float(
    finished: tuple[Engine, nn.Module, Path], data: dict[str, Any]
) -> None:
    engine, small, _ = finished
    assert engine.result is not None
    assert type(small) is TinyResNet
    assert all(parameter.dtype == torch.float32 for parameter in small.parameters())
    assert sum(p.numel() for p in small.parameters()) < sum(
        p.numel() for p in TinyResNet().parameters()
    )
    images, _ = next(iter(data["test"]))
    for name in ("exported_program", "torchscript"):
        path = engine.result.artifacts[name]
        if name == "exported_program":
            again = torch.export.load(path).module()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # TorchScript's own deprecation
                again = torch.jit.load(str(path))
        torch.testing.assert_close(again(images), small(images), rtol=1e-4, atol=1e-4)


def test_the_saved_model_loads_onto_an_untrained_instance(
    finished: tuple[Engine, nn.Module, Path], data: dict[str, Any]
) -> None:
    engine, small, _ = finished
    assert engine.result is not None
    loaded = compressor.load(engine.result.artifacts["model_dir"], TinyResNet())
    images, _ = next(iter(data["test"]))
    assert loaded.eval()(images).equal(small(images))


def test_a_second_run_reads_the_result(
    finished: tuple[Engine, nn.Module, Path], trained: nn.Module, data: dict[str, Any]
) -> None:
    engine, small, folder = finished
    again = make_engine(trained, data, folder, **DEEP)
    model = again.run()
    assert again._job.eval_func.calls == 0
    assert again.result is not None
    assert engine.result is not None
    assert json.dumps(again.result.to_json()) == json.dumps(engine.result.to_json())
    images, _ = next(iter(data["test"]))
    assert model(images).equal(small(images))


class Killed(BaseException):
    """Stands for a kill."""


def test_a_run_that_dies_in_a_fine_tune_goes_on_bit_equal(
    trained: nn.Module, data: dict[str, Any], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {
        **PLAIN,
        "full_trainer": {"epochs": 3, "optimizer": {"name": "SGD", "lr": 0.05}},
        "fine_tuner": {"loop_params": {"epochs": 3}},
        "delta": 20.0,
    }
    whole = make_engine(trained, data, tmp_path / "whole", **changes)
    whole.run()

    class Dying(CrossEntropy):
        steps = 0

        def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            Dying.steps += model.training
            if Dying.steps == 18:  # in the second or third epoch
                raise Killed
            return super().__call__(model, batch)

    dying = make_engine(trained, data, tmp_path / "dead", loss_function_cls=Dying, **changes)
    with pytest.raises(Killed):
        dying.run()
    resumed = make_engine(trained, data, tmp_path / "dead", loss_function_cls=Dying, **changes)
    model = resumed.run()
    assert whole.result is not None
    expected = whole.result.model.state_dict()
    assert len(whole.result.plan) > 0
    assert all(value.equal(expected[name]) for name, value in model.state_dict().items())


class NanLoss(CrossEntropy):
    """Fine on the first batches, not a number once a smaller model trains for a while."""

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        loss = super().__call__(model, batch)["loss"]
        is_variant = sum(p.numel() for p in model.parameters()) < 19_000
        return {"loss": loss * torch.nan if is_variant and model.training else loss}


def test_a_loss_that_becomes_nan_ends_the_variant_and_not_the_run(
    trained: nn.Module, data: dict[str, Any], tmp_path: Path
) -> None:
    engine = make_engine(trained, data, tmp_path, loss_function_cls=NanLoss, **PLAIN)
    engine.run()
    assert engine.result is not None
    failed = [record for record in engine.result.variants if record.status == "failed"]
    assert failed
    assert "nan" in failed[0].reason
    assert engine.result.certificate.within_delta


class OwnForwardPass(ForwardPass):
    """The seed's: neither of the default implementations."""

    def __init__(self) -> None:
        super().__init__(model_input_pattern=None, expecting_common_inputs=False)

    def model_call(self, model: nn.Module, x: Tensor, device: Device) -> Tensor:
        return model(x.cuda() if device == Device.GPU else x.cpu())

    def create_random_model_inputs(self, batch_size: int) -> Tensor:
        return torch.rand(batch_size, *self.get_model_input_shapes()[0])

    def extract_model_inputs(self, batch: Any) -> Tensor:
        return batch["pixels"]

    def get_model_input_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((1, 8, 8),)


class DictBatches:
    """An iterable of dicts that knows no length."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for images, labels in self.loader:
            yield {"pixels": images, "digit": labels}


class DictLoss(LossFunction):
    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        loss = F.cross_entropy(model(batch["pixels"]), batch["digit"])
        return {"half": loss / 2, "other half": loss / 2}


def evaluate_dicts(model: nn.Module, loader: Any) -> dict[str, float]:
    """A plain function, of a metric that is better when it is small."""
    losses = [F.cross_entropy(model(batch["pixels"]), batch["digit"]) for batch in loader]
    return {"nll": float(torch.stack(losses).mean())}


def test_own_forms_of_everything(trained: nn.Module, data: dict[str, Any], tmp_path: Path) -> None:
    """Dict batches of unknown length, own forward pass, factories, a metric to be minimised."""
    engine = make_engine(
        trained,
        {name: DictBatches(loader) for name, loader in data.items()},
        tmp_path,
        delta=0.3,
        metric_mode="min",
        task_type="__custom__",
        techniques=["channel_pruning", "quantization"],
        budget={"trials": 1},
        full_trainer={
            "optimizer": Sgd(),
            "scheduler": {"factory": Decay(), "eval_based": False},
            "epochs": 1,
            "eval_key": "nll",
            "ema": True,
        },
        forward_pass=OwnForwardPass(),
        eval_func=evaluate_dicts,
        loss_function_cls=DictLoss,
        loss_function_kwargs=None,
    )
    engine.run()
    assert engine.result is not None
    certificate = engine.result.certificate
    assert certificate.metric_name == "nll"
    assert certificate.metric <= certificate.reference_metric + 0.3
    assert certificate.size_ratio > 1.5


def test_an_external_training_loop_trains_in_place_of_ours(
    trained: nn.Module, data: dict[str, Any], tmp_path: Path
) -> None:
    trained_epochs = []

    def train(model: nn.Module, args: dict[str, Any]) -> nn.Module:
        trained_epochs.append(args["epochs"])
        return model

    engine = make_engine(
        trained,
        data,
        tmp_path,
        external_training_loop=ExternalTrainingLoop(train, {"epochs": 7, "validation": True}),
        **PLAIN,
    )
    engine.run()
    assert trained_epochs[0] == 1
    assert engine.result is not None
    assert engine.result.certificate.within_delta


class Untraceable(TinyResNet):
    """Its control flow depends on a value."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.mean()) > 1e9:
            x = -x
        return super().forward(x)


def test_a_model_without_a_graph_is_still_pruned_and_says_what_is_lost(
    trained: nn.Module, data: dict[str, Any], tmp_path: Path
) -> None:
    model = Untraceable()
    model.load_state_dict(trained.state_dict())
    engine = make_engine(
        model, data, tmp_path, delta=20.0, techniques=["channel_pruning", "block_removal"]
    )
    engine.run()
    assert engine.result is not None
    assert any("cannot be traced" in sentence for sentence in engine.result.lost)
    assert engine.result.certificate.target["runtime"] == "eager"
    assert engine.result.certificate.params_ratio > 1
    assert "onnx" not in engine.result.artifacts


def test_a_dryrun_does_every_step_on_two_batches(
    trained: nn.Module, data: dict[str, Any], tmp_path: Path
) -> None:
    """Also under a bound that the few choices it senses cannot keep."""
    engine = make_engine(trained, data, tmp_path / "run", budget={"size_bytes": 1})
    model = engine.run(dryrun=True)
    assert isinstance(model, TinyResNet)
    assert not (tmp_path / "run").exists()
    assert engine.result is not None
    sensed = Counter(choice.technique for choice in engine.result.damages)
    assert sensed
    assert max(sensed.values()) <= DRYRUN_CHOICES  # to sense all takes as long as in a run
    assert any(variant.epochs for variant in engine.result.variants)


def bad(message: str, error: type[Exception], **changes: Any) -> Any:
    return pytest.param(message, error, changes, id="-".join(changes) + "-" + message)


class RaisingLoss(CrossEntropy):
    def __call__(self, model: nn.Module, batch: Batch) -> Any:
        raise KeyError("labels")


class VectorLoss(CrossEntropy):
    def __call__(self, model: nn.Module, batch: Batch) -> Any:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class NanFromTheStart(CrossEntropy):
    def __call__(self, model: nn.Module, batch: Batch) -> Any:
        return super().__call__(model, batch)["loss"] * torch.nan


class Detached(CrossEntropy):
    def __call__(self, model: nn.Module, batch: Batch) -> Any:
        return super().__call__(model, batch)["loss"].detach()


@pytest.mark.parametrize(
    ("message", "error", "changes"),
    [
        bad("KeyError", LossError, loss_function_cls=RaisingLoss),
        bad("shape", LossError, loss_function_cls=VectorLoss),
        bad("nan", LossError, loss_function_cls=NanFromTheStart),
        bad("gradient|depend", LossError, loss_function_cls=Detached),
        bad("pattern", ValueError, forward_pass=TorchForwardPass((0, "_", 1))),
        bad("accuracy", MetricError, eval_func=lambda model, loader: {"top1": 1.0, "loss": 2.0}),
        bad("nan", MetricError, eval_func=lambda model, loader: {"accuracy": float("nan")}),
        bad("accepts every model", ConfigError, delta=100.0),
        bad("validation", DataError, eval_split="validation"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    message: str,
    error: type[Exception],
    changes: dict[str, Any],
    trained: nn.Module,
    data: dict[str, Any],
    tmp_path: Path,
) -> None:
    engine = make_engine(trained, data, tmp_path, **changes)
    with pytest.raises(error, match=message):
        engine.run()
    assert not list(tmp_path.glob("variants/*"))


def test_splits_that_are_missing_or_empty_are_named(
    trained: nn.Module, data: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="'train'"):
        make_engine(trained, {"test": data["test"]}, tmp_path).run()
    with pytest.raises(DataError, match=r"'test'.*no batch"):
        make_engine(trained, {**data, "test": []}, tmp_path).run()


def test_a_model_that_cannot_be_copied_names_the_attribute(
    data: dict[str, Any], tmp_path: Path
) -> None:
    model = TinyResNet()
    model.layer1.cache = torch.ones(1, requires_grad=True) * 2  # not a leaf: no deepcopy
    with pytest.raises(ModelError, match=r"layer1\.cache"):
        make_engine(model, data, tmp_path).run()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(
    trained: nn.Module, data: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(compressor.errors.DeviceError, match="CUDA"):
        make_engine(trained, data, tmp_path, device="GPU").run()


def test_a_run_dir_that_cannot_be_written_is_said(
    trained: nn.Module, data: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot be written"):
        make_engine(trained, data, tmp_path / "file" / "run").run()


def test_a_model_that_does_not_fit_the_batch_is_said_with_its_split(
    data: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="batch of split 'train'"):
        make_engine(TinyResNet(in_channels=3), data, tmp_path).run()


def test_optimizers_that_cannot_be_made_and_frozen_models_are_refused_before_any_work(
    trained: nn.Module, data: dict[str, Any], tmp_path: Path
) -> None:
    wrong = {"optimizer": {"name": "SGD", "lr": -1.0}, "epochs": 1}
    with pytest.raises(ConfigError, match="learning rate"):
        make_engine(trained, data, tmp_path / "a", full_trainer=wrong).run()
    frozen = copy.deepcopy(trained).requires_grad_(False)
    with pytest.raises(ModelError, match="requires grad"):
        make_engine(frozen, data, tmp_path / "b").run()


def test_int8_alone_needs_a_runtime_that_has_it(
    trained: nn.Module, data: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="onnxruntime"):
        make_engine(
            trained, data, tmp_path, optimization="quantization", target={"runtime": "eager"}
        ).run()


def test_the_users_loader_and_its_generator_are_as_before(
    trained: nn.Module, data: dict[str, Any], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(5)
    dataset = data["train"].dataset
    loader = DataLoader(dataset, 64, shuffle=True, generator=generator)
    before = generator.get_state()
    engine = make_engine(trained, {**data, "train": loader}, tmp_path, **PLAIN)
    engine.run()
    assert generator.get_state().equal(before)


def test_the_only_metric_needs_no_key(
    trained: nn.Module, data: dict[str, Any], tmp_path: Path
) -> None:
    engine = make_engine(
        trained,
        data,
        tmp_path,
        task_type="__custom__",
        eval_func=lambda model, loader: {"score": accuracy(model, loader)},
        **PLAIN,
    )
    engine.run()
    assert engine.result is not None
    assert engine.result.certificate.metric_name == "score"


def test_a_changed_evaluation_is_another_run(
    trained: nn.Module, data: dict[str, Any], tmp_path: Path
) -> None:
    make_engine(trained, data, tmp_path, **PLAIN).run()
    halved = make_engine(
        trained,
        data,
        tmp_path,
        eval_func=lambda model, loader: {"accuracy": accuracy(model, loader) / 2},
        **PLAIN,
    )
    halved.run()
    assert halved.result is not None
    assert halved.result.certificate.reference_metric < 60
