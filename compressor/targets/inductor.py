"""`torch.compile` as a target: float, or linear layers in eight bits through torchao."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from compressor.errors import ExportError, first_line
from compressor.export.post_training import PostTraining
from compressor.interfaces.inputs import ModelInputs
from compressor.profiling.latency import Call, eager_call, interleave
from compressor.quantization.kinds import Kind
from compressor.quantization.plan import (
    FORMATS,
    FP8_FORMATS,
    Formats,
    LayerFormat,
    QuantizationPlan,
    find_format,
)
from compressor.structure.archive import packed_size_bytes
from compressor.structure.trace import FORWARD_FAILURES, copy_model, in_eval
from compressor.targets import torchao_formats
from compressor.targets.base import Deployed, Layer, Target
from compressor.targets.eager import time_eager_layer

FILE = "torchao"  # the kind of the file with weights in eight bits
FILE_NAME = "model_torchao.safetensors"


class InductorTarget(Target):
    """The model compiled by torch's inductor; with torchao, linear layers in eight bits.

    A layer's own latency is its eager one, as compiling every layer would take seconds each; in
    eight bits it is a share of that, which is measured compiled.
    """

    name = "inductor"
    devices = ("cpu", "cuda")
    stores_compact = True  # what ships is the packed archive

    @property
    def formats(self) -> frozenset[str]:
        """Those of torchao, if it is installed; floats of 8 bits on GPUs that multiply them."""
        return torchao_formats.formats_on(self.device)

    def runs(self, kind: Kind, layer: nn.Module | None, form: str) -> bool:
        """Whether it has a kernel for `layer` in that format."""
        return super().runs(kind, layer, form) and torchao_formats.is_possible(layer, self.device)

    def format(self, name: str) -> LayerFormat:
        """The format of that name; with weights of 7 bits where sums of 8 saturate."""
        form = find_format(name)
        if name != "dynamic_int8" or not torchao_formats.is_saturating(self.device):
            return form
        return replace(form, weight=replace(form.weight, reduced=True))

    def deploy(
        self,
        model: nn.Module,
        inputs: ModelInputs,
        folder: Path,
        *,
        formats: Formats | QuantizationPlan | None = None,
        calibration: Iterable[ModelInputs] | None = None,
    ) -> Deployed:
        """A compiled copy of `model`, called once so that errors come now.

        If layers are quantized, their weights are written to `model_torchao.safetensors`, and its
        size is that of what is deployed; else no file is written.
        """
        plan = formats if isinstance(formats, QuantizationPlan) else QuantizationPlan(formats or {})
        names = self._names(plan.formats)
        module = in_eval(copy_model(model).to(self.device))
        if not names:
            compiled = self._compile(module, inputs, is_quantized=False)
            return Deployed(compiled, packed_size_bytes(module))
        torchao_formats.clamp_weights(module, plan.weights)
        torchao_formats.quantize_linear(module, names)
        compiled = self._compile(module, inputs, is_quantized=True)
        path = torchao_formats.save(module, names, folder / FILE_NAME)
        return Deployed(compiled, path.stat().st_size, {FILE: path}, lambda: module)

    def open(self, model: nn.Module, files: Mapping[str, Path]) -> nn.Module:
        """The compiled model; weights in eight bits are read from their file."""
        module = model.to(self.device)
        if FILE in files:
            torchao_formats.restore(module, files[FILE])
        return CompiledModel(module)

    def simulate(self, quantizer: PostTraining, formats: Formats) -> nn.Module:
        """The model with torchao's layers, not compiled: they round as in the compiled one."""
        module = in_eval(copy_model(quantizer.model).to(self.device))
        torchao_formats.quantize_linear(module, self._names(formats))
        return module

    def way_out(self) -> str:
        """What to do about a format that is missing."""
        if not torchao_formats.is_installed():
            return "Its formats come with torchao: pip install torchao"
        return f"Its linear layers can have {', '.join(sorted(self.formats))}. {super().way_out()}"

    def _names(self, formats: Formats) -> dict[str, str]:
        """The formats of layers by name.

        Raises:
            ConfigError: for one that the target does not have.
        """
        known = {form(name): name for name in self.formats for form in (find_format, self.format)}
        for layer, form in formats.items():
            if form not in known:
                every = {**FORMATS, **FP8_FORMATS}
                name = next((name for name in every if every[name] == form), str(form))
                raise self._missing(f"{layer!r} in {name}")
        return {layer: known[form] for layer, form in formats.items()}

    def _compile(
        self, module: nn.Module, inputs: ModelInputs, *, is_quantized: bool
    ) -> CompiledModel:
        """`module` compiled and called once."""
        compiled = CompiledModel(module)
        inputs = inputs.with_batch(self.batch_size)
        try:
            with (
                torchao_formats.without_cache_warning(),
                eager_call(compiled, inputs, threads=self.threads) as call,
            ):
                call()
        except TorchDynamoException as error:
            fact = next((line for line in str(error).splitlines() if line.strip()), repr(error))
            raise ExportError(
                f"torch.compile refuses the model: {fact.strip()} "
                "Write target: {'runtime': 'eager'} or {'runtime': 'onnxruntime'}."
            ) from error
        except FORWARD_FAILURES as error:
            if not is_quantized:
                raise
            raise ExportError(
                f"torchao cannot run the model with these layers quantized: {first_line(error)} "
                "Leave layers of it in float, or write target: {'runtime': 'onnxruntime'}."
            ) from error
        return compiled

    def _call(self, module: nn.Module, inputs: ModelInputs) -> AbstractContextManager[Call]:
        return eager_call(module.to(self.device), inputs, threads=self.threads)

    def _time_layer(self, layer: Layer, input_shape: tuple[int, ...], form: str) -> float:
        eager_ms = time_eager_layer(layer, input_shape, self.device, self.threads)
        if not isinstance(layer, nn.Linear) or not form or not self.runs("linear", layer, form):
            return eager_ms
        return eager_ms * self._share(layer, input_shape, form)

    def _share(self, layer: nn.Linear, input_shape: tuple[int, ...], form: str) -> float:
        """Time of a linear layer in a format over its time in float, both compiled.

        At widths rounded up to powers of two: a search asks for hundreds, and each takes seconds.
        """
        inputs, outputs = (
            2 ** (n - 1).bit_length() for n in (layer.in_features, layer.out_features)
        )
        rounded = nn.Linear(inputs, outputs, bias=layer.bias is not None)
        shape = (*input_shape[:-1], inputs)
        key = f"{self._signature()} {form}/float {rounded} {shape}"
        return self._latencies.get(key, lambda: self._time_share(rounded, shape, form))

    def _time_share(self, layer: nn.Linear, input_shape: tuple[int, ...], form: str) -> float:
        inputs = ModelInputs((torch.zeros(input_shape),))
        with torchao_formats.without_cache_warning(), ExitStack() as stack:
            calls = {}
            for name in ("float", form):
                module = in_eval(nn.Sequential(copy_model(layer)).to(self.device))
                torchao_formats.quantize_linear(module, {"0": name} if name == form else {})
                calls[name] = stack.enter_context(self._call(CompiledModel(module), inputs))
                calls[name]()
            times = interleave(calls, total_ms=25, block_ms=2.5, warmup_ms=10, device=self.device)
        return times[form].best_ms / times["float"].best_ms


class CompiledModel(nn.Module):
    """A model that is compiled when it is first called, with the attributes of the model.

    torch keeps what it compiled with the code of a function, eight times at most, and runs what
    comes then uncompiled; the variants of a search are of one class. So the function that is
    compiled here has a code object of its own.

    Args:
        model: not copied.
        backend: of `torch.compile`.
    """

    def __init__(self, model: nn.Module, *, backend: str | Callable[..., Any] = "inductor") -> None:
        super().__init__()
        self.model = model
        self._run = torch.compile(_own_function(model), backend=backend)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        return self._run(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


def _own_function(model: nn.Module) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    run.__code__ = run.__code__.replace(co_name=run.__name__)  # equal, and another object
    return run
