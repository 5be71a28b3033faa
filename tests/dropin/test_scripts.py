"""Scripts as users of the older engine have them: only their import lines are ours.

Each runs as `python script.py --device CPU` would, in a folder of its own. To every configuration
`ONE_TRIAL` is added. Three scripts, among them one for detection and one for segmentation, run so;
those of `SHORTENED` prune channels alone, and are timed in eager torch: see `SHORT`.
"""

from __future__ import annotations

import runpy
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from torch import nn

import compressor
from compressor import Device, Engine
from compressor.config import CustomCompression, LayerCompression
from compressor.interfaces import DataLoaderView, get_accuracy, output_tensors

FOLDER = Path(__file__).parent
# What is added to what the scripts say, for time.
ONE_TRIAL: Mapping[str, Any] = {"budget": {"trials": 1}, "progress": False}
SHORT: Mapping[str, Any] = {"target": {"runtime": "eager"}, "techniques": ["channel_pruning"]}
AS_USERS_RUN_THEM = [
    "hello_ssd.py",
    "hello_unet.py",
    "hello_yolo_quantization.py --skip_layers 0",
]
SHORTENED = [
    "hello_classifier.py --fp16",
    "classifier_2021.py --bn_fuse --delta 3",
    "classifier_2022.py",
    "hello_yolo.py",
    "hello_yolo.py --external_training_loop",
]
FULL = [*AS_USERS_RUN_THEM, *SHORTENED]


@dataclass
class Run:
    """One script, run to its end.

    Attributes:
        names: what the script defined.
        folder: where it ran.
        engines: those that it made.
        warned: what it was warned of.
    """

    names: Mapping[str, Any]
    folder: Path
    engines: list[Any]
    warned: list[str]

    @property
    def engine(self) -> Any:
        (engine,) = self.engines
        return engine

    @property
    def result(self) -> Any:
        return self.engine.result

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """The script's own evaluation."""
        view = DataLoaderView(self.names["data_splits"]["test"])
        with torch.no_grad():
            return dict(self.names.get("eval_func", get_accuracy)(module.eval(), view))


class Witness(Engine):
    """The engine; notes what it was given, and what had become of it when the run ended."""

    made: list[Any]
    settings: Mapping[str, Any]
    is_run: bool

    def __init__(self, framework: Any, data: Any, model: Any, config: Any, **rest: Any) -> None:
        self.given = (data, model, config)
        self.before = self._look()
        super().__init__(framework, data, model, {**config, **ONE_TRIAL, **self.settings}, **rest)
        self.made.append(self)

    def run(self, dryrun: bool = False) -> Any:
        self.is_dryrun = dryrun
        model = super().run(dryrun) if self.is_run else self.given[1]
        self.after = self._look()
        return model

    def _look(self) -> Any:
        data, model, config = self.given
        tensors = {name: value.clone() for name, value in model.state_dict().items()}
        flags = [(module.training, type(module)) for module in model.modules()]
        grads = [parameter.requires_grad for parameter in model.parameters()]
        return tensors, flags, grads, dict(data), repr(config)


@pytest.fixture(scope="module")
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    """Runs a command line, once in this module."""

    @cache
    def run(line: str, *, is_run: bool = True) -> Run:
        name, *flags = shlex.split(line)
        folder = tmp_path_factory.mktemp(name.removesuffix(".py"))
        made: list[Any] = []
        settings = {} if line in AS_USERS_RUN_THEM else SHORT
        space = {"made": made, "settings": settings, "is_run": is_run}
        witness = type("Witness", (Witness,), space)
        with (
            pytest.MonkeyPatch.context() as patch,
            torch.random.fork_rng(),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.filterwarnings("always", "The export format")
            patch.setattr(compressor, "Engine", witness)
            patch.setattr(sys, "argv", [name, "--device", "CPU", *flags])
            patch.syspath_prepend(str(FOLDER))
            patch.chdir(folder)
            names = runpy.run_path(str(FOLDER / name), run_name="__main__")
        return Run(names, folder, made, [str(each.message) for each in caught])

    yield run
    for name in ("zoo", "yolo_parts", "external_training"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize("line", FULL)
def test_the_script_ends_in_a_model_that_is_certified(
    line: str, run_script: Callable[..., Run]
) -> None:
    run = run_script(line)
    small, reference = run.names["optimized_model"], run.names["reference_model"]
    assert small is not reference
    assert type(small) is type(reference)
    certificate = run.result.certificate
    assert certificate.within_delta, certificate
    assert certificate.reference_metric - certificate.metric <= run.engine.config.delta
    assert certificate.size_ratio > 1.2
    assert run.result.reason == "", "or the reference itself came back"
    counts = [sum(p.numel() for p in model.parameters()) for model in (reference, small)]
    assert counts[1] <= counts[0]
    assert counts[0] / counts[1] == pytest.approx(certificate.params_ratio)


@pytest.mark.slow
@pytest.mark.parametrize("line", FULL)
def test_the_certified_metric_is_that_of_the_file(
    line: str, run_script: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_script(line)
    monkeypatch.chdir(run.folder)
    certificate = run.result.certificate
    in_file = run.evaluate(run.result.runtime_model())
    assert in_file[certificate.metric_name] == pytest.approx(certificate.metric)
    of_reference = run.evaluate(run.names["reference_model"])
    assert of_reference[certificate.metric_name] == pytest.approx(certificate.reference_metric)


@pytest.mark.slow
@pytest.mark.parametrize("line", FULL)
def test_what_the_script_handed_in_is_as_it_was(line: str, run_script: Callable[..., Run]) -> None:
    run = run_script(line)
    tensors, *others = run.engine.before
    tensors_now, *others_now = run.engine.after
    assert tensors.keys() == tensors_now.keys()
    assert all(value.equal(tensors_now[name]) for name, value in tensors.items())
    assert others == others_now


@pytest.mark.slow
@pytest.mark.parametrize("line", FULL)
def test_the_exported_file_computes_what_the_returned_model_does(
    line: str, run_script: Callable[..., Run]
) -> None:
    run = run_script(line)
    files = {name: run.folder / path for name, path in run.result.artifacts.items()}
    assert all(path.exists() for path in files.values())
    images = next(iter(run.names["data_splits"]["test"]))[0]
    session = ort.InferenceSession(files["onnx_float"])
    in_file = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        outputs = output_tensors(run.names["optimized_model"](images))
    for ours, theirs in zip(outputs, in_file, strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("hello_classifier.py --fp16", {"onnx", "onnx_fp16"}),
        ("classifier_2021.py --bn_fuse --delta 3", {"onnx_fp16", "torchscript"}),
        ("classifier_2022.py", {"onnx", "torchscript", "onnx_16x24"}),
        ("hello_yolo_quantization.py --skip_layers 0", {"onnx"}),
    ],
)
def test_the_formats_that_the_script_names_are_written(
    line: str, names: set[str], run_script: Callable[..., Run]
) -> None:
    run = run_script(line)
    assert names <= run.result.artifacts.keys()
    if line == "classifier_2022.py":
        written = run.folder / "converted" / "model_16x24.onnx"
        assert ort.InferenceSession(written).get_inputs()[0].shape[2:] == [16, 24]
    is_replaced = "quantization" in line  # its format "dlrt" is of the older engine
    assert [("'dlrt' is not written" in text) for text in run.warned] == [True] * is_replaced


@pytest.mark.slow
def test_a_model_with_other_outputs_in_training_is_recovered_by_its_loss(
    run_script: Callable[..., Run],
) -> None:
    run = run_script("hello_yolo.py")
    assert "without distillation" in str(run.result.lost)
    assert run.result.certificate.metric_name == "mAP", "of several metrics, without an eval_key"
    assert "without distillation" not in str(run_script("hello_ssd.py").result.lost)


@pytest.mark.slow
@pytest.mark.parametrize("line", ["hello_ssd.py --dryrun", "hello_yolo.py --dryrun"])
def test_a_dry_run_takes_a_plain_function_and_leaves_nothing(
    line: str, run_script: Callable[..., Run]
) -> None:
    """The functions take (model, data_splits), one of them a device as well."""
    run = run_script(line)
    assert run.engine.is_dryrun
    assert isinstance(run.names["optimized_model"], type(run.names["reference_model"]))
    assert not list(run.folder.iterdir())


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (
            "hello_classifier.py -d 0.5 -l 2 -o latency --deepsearch --horovod",
            {"delta": 0.5, "level": 2, "optimization": "latency", "deepsearch": True},
        ),
        ("hello_classifier.py --horovod", {"use_horovod": True, "device": Device.CPU}),
        ("hello_classifier.py --device GPU", {"use_horovod": False, "device": Device.GPU}),
        ("classifier_2021.py", {"level": 3, "eval_key": "mykey", "eval_split": "test"}),
        ("hello_yolo.py", {"eval_key": None, "optimization": "compression", "delta": 0.02}),
        (
            "hello_yolo_quantization.py --layers head",
            {"custom_compression": CustomCompression(layers={"head": LayerCompression(2)})},
        ),
    ],
)
def test_what_the_flags_say_reaches_the_configuration(
    line: str, wanted: Mapping[str, Any], run_script: Callable[..., Run]
) -> None:
    config = run_script(line, is_run=False).engine.config
    assert {name: getattr(config, name) for name in wanted} == wanted
