"""Models as they run on the target: deployed, timed beside the reference, exported for the user."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from compressor.config import ExportConfig, TargetConfig
from compressor.errors import ExportError, ModelError
from compressor.export.exported_program import save_exported_program
from compressor.export.onnx import export_onnx
from compressor.export.post_training import PostTraining
from compressor.export.torchscript import save_torchscript
from compressor.export.verify import parity
from compressor.frameworks.quantized_training import learned_plan
from compressor.hardware import describe_machine
from compressor.interfaces.inputs import ModelInputs
from compressor.logs import get_logger
from compressor.profiling.latency import Timing
from compressor.quantization.plan import Formats, LayerFormat
from compressor.result import Parity, Plan
from compressor.structure.factored import factor_names
from compressor.structure.fusion import fold
from compressor.structure.trace import copy_model, in_eval
from compressor.targets import Deployed, OnnxRuntimeModel, Target, make_target
from compressor.targets.layer_latencies import machine_path

logger = get_logger(__name__)

QUANTIZATION = "quantization"
TRAINED = "trained"  # in a choice's setting: its layer learns to be rounded
IMAGE_DIMS = 4


@dataclass(frozen=True)
class ExportedFiles:
    """What the user takes away."""

    paths: Mapping[str, Path]
    deployed: Deployed
    parity: Parity | None
    notes: tuple[str, ...]


class Deployment:
    """One target, and the reference on it as the baseline of every ratio."""

    def __init__(self, config: TargetConfig, folder: Path) -> None:
        """Make the target.

        Args:
            config: which.
            folder: for the reference's files.
        """
        self._config = config
        self._folder = folder
        self.target: Target = make_target(config, cache_path=machine_path())
        self._reference: Deployed | None = None
        self._quantizer: PostTraining | None = None

    def without_export(self) -> Deployment:
        """The same on torch itself, for a model that has no graph."""
        return Deployment(replace(self._config, runtime="eager"), self._folder)

    def describe(self) -> dict[str, object]:
        """Runtime, device, threads, batch size, hardware."""
        return {
            "hardware": describe_machine()["machine"],
            "runtime": self.target.name,
            "device": str(self.target.device),
            "threads": self.target.threads,
            "batch_size": self.target.batch_size,
        }

    def reference(self, model: nn.Module, inputs: ModelInputs) -> Deployed:
        """The reference in float32; deployed once."""
        if self._reference is None:
            self._reference = self.target.deploy(self._lean(model, inputs), inputs, self._folder)
        return self._reference

    def quantizer(
        self, model: nn.Module, inputs: ModelInputs, calibration: Iterable[ModelInputs]
    ) -> PostTraining:
        """Of the reference; traced, and calibrated, once.

        Raises:
            ExportError: if the model cannot be traced.
        """
        if self._quantizer is None:
            self._quantizer = PostTraining(self._lean(model, inputs), inputs, calibration)
        return self._quantizer

    def format(self, name: str) -> LayerFormat:
        """A format by name, as the target has it."""
        return self.target.format(name)

    def simulate(self, quantizer: PostTraining, formats: Formats) -> nn.Module:
        """What the target computes of the reference in these formats, in torch."""
        return self.target.simulate(quantizer, formats)

    def quantized_file(self, quantizer: PostTraining, formats: Formats) -> nn.Module:
        """The reference in these formats, as it runs on the target."""
        path = quantizer.write(self._folder / "probe_int8.onnx", formats)
        return OnnxRuntimeModel(path, threads=self.target.threads)

    def deploy(
        self,
        model: nn.Module,
        inputs: ModelInputs,
        folder: Path,
        plan: Plan,
        calibration: Iterable[ModelInputs],
    ) -> Deployed:
        """`model` on the target, with the layers quantized that `plan` names.

        Of a layer that has become a chain, all layers of the chain.
        """
        formats = self.formats(model, plan)
        learned = learned_plan(model)
        if learned is not None and learned.formats != formats:
            logger.warning(
                "The scales that were learned are for other formats than this plan has here, and "
                "are calibrated anew. Train again on this kind of machine to have them learned."
            )
            learned = None
        return self.target.deploy(
            self._lean(model, inputs),
            inputs,
            folder,
            formats=formats if learned is None else learned,
            calibration=calibration,
        )

    def formats(
        self, model: nn.Module, plan: Plan, *, trained: bool = False
    ) -> dict[str, LayerFormat]:
        """Of the layers of `model` that `plan` quantizes; or of those that it trains so, alone."""
        return {
            name: self.target.format(choice.setting["format"])
            for choice in plan.of(QUANTIZATION)
            if choice.setting.get(TRAINED, False) or not trained
            for name in factor_names(model, choice.site)
        }

    def time(self, module: nn.Module, inputs: ModelInputs) -> Timing:
        """Milliseconds of one call."""
        return self.target.measure({"model": module}, inputs)["model"]

    def time_beside(
        self, reference: nn.Module, module: nn.Module, inputs: ModelInputs, reference_ms: float
    ) -> float:
        """Milliseconds of one call of `module`, where the reference takes `reference_ms`.

        The machine's speed drifts between measurements; the ratio within one does not.
        """
        timing = self.target.measure({"reference": reference, "model": module}, inputs)
        return reference_ms * timing["model"].best_ms / timing["reference"].best_ms

    def layer_latency_ms(self, layer: nn.Module, shape: tuple[int, ...], form: str) -> float:
        """Milliseconds of one layer alone, in a format if the target has any."""
        form = form if form in self.target.formats else ""
        return self.target.layer_latency_ms(layer, shape, form)

    def export(
        self,
        model: nn.Module,
        inputs: ModelInputs,
        folder: Path,
        plan: Plan,
        calibration: Iterable[ModelInputs],
        config: ExportConfig,
    ) -> ExportedFiles:
        """Write the formats of `config`; one that fails is a note, unless it is deployed."""
        folder = Path(config.root_path) if config.root_path else folder
        folder.mkdir(parents=True, exist_ok=True)
        model = _on_cpu(model)
        deployed = self.deploy(model, inputs, folder, plan, calibration)
        paths: dict[str, Path] = dict(deployed.files)
        notes: list[str] = []
        for name, write in _writers(self._lean(model, inputs), inputs, folder, config).items():
            if name in paths:
                continue
            try:
                paths[name] = write()
            except (ExportError, ModelError) as error:
                notes.append(f"{name} was not written: {error}")
        if "onnx_float" in paths:
            paths.setdefault("onnx", paths["onnx_float"])
        checked = None
        if "onnx_float" in paths:
            try:
                checked = parity(model, OnnxRuntimeModel(paths["onnx_float"]), inputs)
            except ExportError as error:
                if paths["onnx_float"] in deployed.files.values():
                    raise
                notes.append(f"The ONNX file does not agree with the model: {error}")
        return ExportedFiles(paths, deployed, checked, tuple(notes))

    def open(self, artifacts: Mapping[str, Path], load: Callable[[Path], nn.Module]) -> nn.Module:
        """The deployed model again, from its files."""
        if self.target.name == "onnxruntime":
            return OnnxRuntimeModel(artifacts["onnx"], threads=self.target.threads)
        return self.target.open(load(artifacts["model_dir"]), artifacts)

    def _lean(self, model: nn.Module, inputs: ModelInputs) -> nn.Module:
        """A copy on the CPU; for a file with its batch norms folded and idle modules left out.

        Where the model itself is deployed it is measured as it is saved: a fold would also multiply
        the values of a clustered weight, which then packs no more.
        """
        model = _on_cpu(model)
        if self.target.name == "onnxruntime":
            fold(model, inputs.to("cpu"))
        return model


def _writers(
    model: nn.Module, inputs: ModelInputs, folder: Path, config: ExportConfig
) -> dict[str, Callable[[], Path]]:
    """Artifact name to what writes it."""
    writers: dict[str, Callable[[], Path]] = {}
    if "onnx" in config.formats:
        writers["onnx_float"] = lambda: export_onnx(model, inputs, folder / "model_float.onnx")
        if config.precision != "fp32":
            precision = config.precision
            writers[f"onnx_{precision}"] = lambda: export_onnx(
                model, inputs, folder / f"model_{precision}.onnx", precision=precision
            )
        for size in config.resolutions:
            name = "x".join(map(str, size))
            writers[f"onnx_{name}"] = partial(
                export_onnx, model, _at_resolution(inputs, size), folder / f"model_{name}.onnx"
            )
    if "exported_program" in config.formats:
        writers["exported_program"] = lambda: save_exported_program(
            model, inputs, folder / "model.pt2"
        )
    if "torchscript" in config.formats:
        writers["torchscript"] = lambda: save_torchscript(
            model, inputs, folder / "model_torchscript.pt"
        )
    return writers


def _at_resolution(inputs: ModelInputs, size: tuple[int, int]) -> ModelInputs:
    def resize(tensor: Tensor) -> Tensor:
        is_image = tensor.dim() == IMAGE_DIMS and tensor.is_floating_point()
        return F.interpolate(tensor, size) if is_image else tensor

    return inputs.map(resize)


def _on_cpu(model: nn.Module) -> nn.Module:
    """A copy for exporters, in evaluation mode; the target moves it where it runs."""
    return in_eval(copy_model(model).cpu())
