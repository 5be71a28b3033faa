"""A user's job in PyTorch, opened: the torch side of every step of `Engine.run`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.config import Config
from compressor.errors import ConfigError, ExportError, ModelError
from compressor.export.verify import agreement
from compressor.frameworks.base import Exported, Job, Judged
from compressor.frameworks.checks import check_calls, check_training
from compressor.frameworks.defaults import make_task
from compressor.frameworks.deployment import QUANTIZATION, Deployment
from compressor.frameworks.identity import source_of, stable
from compressor.frameworks.latency_model import LatencyModel, group_latency_ms
from compressor.frameworks.layer_costs import (
    costly_layers,
    latency_cost,
    layer_state,
    macs_cost,
    size_cost,
    stated_change,
    stored_layers,
    structural_changes,
)
from compressor.frameworks.numbers import Numbers
from compressor.frameworks.paired import evaluate_pairs
from compressor.frameworks.quantized_training import load_plan, save_plan, train_quantized
from compressor.frameworks.recovery import Recovery
from compressor.frameworks.subset import Subset, draw_subset, model_digest, outputs_on
from compressor.interfaces.data import check_data, first_batch, move
from compressor.interfaces.divergence import divergence
from compressor.interfaces.inputs import ModelInputs, device_of
from compressor.logs import get_logger
from compressor.profiling.counts import count
from compressor.profiling.memory import peak_activation_memory
from compressor.progress import Progress
from compressor.quantization.plan import Formats
from compressor.result import Agreement, Choice, Cost, Plan, digest
from compressor.search.space import LayerChange, LayerCost, LayerState
from compressor.structure import archive
from compressor.structure.attention import replace_attention
from compressor.structure.groups import ChannelGroup
from compressor.structure.trace import (
    copy_model,
    copy_skeleton,
    export_graph,
    in_eval,
    input_shapes,
)
from compressor.targets import Deployed
from compressor.targets.layer_latencies import LayerLatencies
from compressor.techniques import (
    TECHNIQUES,
    ChannelPruning,
    Stage,
    Technique,
    TechniqueContext,
    apply_plan,
)
from compressor.training.algorithms.batchnorm import reestimate_batchnorm

logger = get_logger(__name__)

DRYRUN_BATCHES = 2
EXAMPLE_SAMPLES = 32
TIMING_SHARE = 0.1  # of the minutes: for timing single layers
# How the kernels of each kind of target step (measured for ONNX Runtime on x86: fp32 by 16, int8
# by 4 and never below 16); bytes and MACs do not step, but odd widths leave the fast layouts.
WIDTH_MULTIPLE = {"latency": 16, "compression": 8, "macs": 8, "quantization": 8}


class TorchBench:
    """One job. Models handed out are copies on the job's device; the reference is never changed.

    Attention of hard-wired width has the form in which heads can be removed; see
    `structure.attention`.
    """

    def __init__(self, job: Job, run_dir: Path, progress: Progress) -> None:
        """Understand the job.

        Raises:
            CompressorError: for data, devices, models and configurations that cannot be worked
                with.
        """
        self.config: Config = job.config
        self.config.device.check_available()
        self.device = self.config.device.torch_device
        limit = DRYRUN_BATCHES if job.is_dryrun else None
        self.data = check_data(
            job.data, self.config.eval_split, self.config.holdout, max_batches=limit
        )
        self.task = make_task(job)
        self.techniques = _make_techniques(self.config)
        self._given = in_eval(copy_model(job.model).to(self.device))
        self.reference = copy_model(self._given)
        if ChannelPruning.name in self.techniques:  # layers compare by name, so from the beginning
            replace_attention(self.reference)
        self.task.forward_pass.infer_sampler(first_batch(self.data["train"]))
        check_calls(self.task, self.reference, self.data, self.device, self.config.seed)
        self._job = job
        self._progress = progress
        self._lost: list[str] = []
        self._looks = 0
        self._baseline: Judged | None = None
        self._folder = run_dir / "reference"
        self._deployment = Deployment(self.config.target, self._folder)
        if self.config.optimization == "quantization" and not self._deployment.target.formats:
            raise ConfigError(
                f"optimization='quantization' needs a runtime with int8, and the target is "
                f"{self.config.target.runtime!r}. {self._deployment.target.way_out()}"
            )

    # check ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Try everything once on two batches; see `frameworks.checks`."""
        check_training(self.task, self.reference, self.data, self.device, self.config)
        try:
            export_graph(copy_model(self.reference).cpu(), self.example)
            self._deployment.reference(self.reference, self.example)
        except (ModelError, ExportError) as error:
            self._deployment = self._deployment.without_export()
            self._lose(
                f"{error} The model is measured in torch instead, without int8; a technique that "
                "needs its graph is left out."
            )

    def digest(self) -> str:
        """Of the reference, the subset, and the task's way of comparing outputs."""
        return digest([model_digest(self.reference), self.subset.digest(), self.config.task_type])

    def job_digest(self) -> str:
        """Of reference, subset, first batch of the judged splits, and the user's functions."""
        splits = [self.config.eval_split, *([self.config.holdout] if self.config.holdout else [])]
        judged = [stable(first_batch(self.data[split])) for split in splits]
        job = self._job
        functions = (job.forward_pass, job.eval_func, job.loss_function_cls)
        kwargs = stable(dict(job.loss_function_kwargs or {}))
        return digest([self.digest(), judged, [source_of(f) for f in functions], kwargs])

    def lost(self) -> Sequence[str]:
        """What cannot be done with this model, and why."""
        quarantined = [
            ": ".join(filter(None, (item.technique, item.site, item.reason)))
            for item in self.context.lost
        ]
        return [*self._lost, *quarantined]

    def looks(self) -> int:
        """Evaluations of the judged split in this process."""
        return self._looks

    # profile ----------------------------------------------------------------------------------

    def target(self) -> Mapping[str, Any]:
        """Runtime, device, threads, batch size."""
        return self._deployment.describe()

    def baseline(self) -> Judged:
        """The reference: metrics in torch, cost on the target in float32."""
        metrics = self._evaluate(self.reference, self.config.eval_split)
        deployed = self._deployment.reference(self.reference, self.example)
        timing = self._deployment.time(deployed.module, self.example)
        counted = count(self.reference, self.example.with_batch(1).to(self.device))
        if counted.uncounted:
            names = ", ".join(sorted(counted.uncounted))
            self._lose(f"The MACs of these operations are not known and not counted: {names}.")
        return Judged(metrics, self._cost(self.reference, deployed.size_bytes, timing.median_ms))

    def use_baseline(self, baseline: Judged) -> None:
        """Take what an earlier process measured: latencies are reported on its scale."""
        self._baseline = baseline

    # propose and sense ------------------------------------------------------------------------

    def is_number(self, technique: str) -> bool:
        """Whether it acts on the exported file alone."""
        return TECHNIQUES.get(technique).stage is Stage.NUMBERS

    def propose(self) -> list[Choice]:
        """Every choice of every technique that the configuration allows."""
        found: list[Choice] = []
        with self._progress.task("propose", total=len(self.techniques)) as advance:
            for technique in self.techniques.values():
                try:
                    found.extend(technique.choices(self.reference, self.context))
                except ModelError as error:
                    self._lose(f"{technique.name} is left out: {error}")
                advance()
        return found

    def layers(self) -> Mapping[str, LayerState]:
        """Convolutions, linear layers and embeddings of the reference."""
        return {name: layer_state(layer) for name, layer in stored_layers(self.reference).items()}

    def effects(self, choices: Sequence[Choice]) -> Mapping[str, Mapping[str, LayerChange]]:
        """What each choice does to each layer, as it says or read off an edited copy."""
        before = self.layers()
        effects = {}
        for choice in choices:
            stated = stated_change(choice)
            if stated is not None:
                effects[choice.key] = {choice.site: stated}
            else:
                copy = copy_skeleton(self.reference)
                apply_plan(copy, Plan((choice,)), self.techniques, self.context)
                effects[choice.key] = structural_changes(before, copy)
        return effects

    def layer_cost(self, resource: str) -> LayerCost:
        """Cost of a layer in a state."""
        layers = costly_layers(self.reference)
        if resource == "size_bytes":
            stored = stored_layers(self.reference)
            return size_cost(stored, stores_compact=self._deployment.target.stores_compact)
        if resource == "macs":
            counted = count(self.reference, self.example.with_batch(1).to(self.device))
            return macs_cost(
                layers,
                {layer.name: layer.macs for layer in counted.layers},
                {layer.name: layer.input_shape for layer in counted.layers},
            )
        cost = self._latency.cost  # of LSTMs, attention and tables no time is measured alone
        return lambda name, state: cost(name, state) if name in layers else 0.0

    def damage_of(self, choice: Choice) -> float:
        """Divergence of the outputs on the subset when `choice` alone is made."""
        if self.is_number(choice.technique):
            module = self._numbers.simulate(choice)
            outputs = outputs_on(module, self.subset.inputs, device_of(module))
        else:
            variant = self.build(Plan((choice,)))
            outputs = outputs_on(variant, self.subset.inputs, self.device)
        is_classifier = self.config.task_type == "classification"
        return divergence(outputs, self._reference_outputs, is_classifier=is_classifier)

    # build, recover, judge --------------------------------------------------------------------

    def build(self, plan: Plan) -> nn.Module:
        """A copy of the reference with `plan` applied and its batch norms re-estimated."""
        model = copy_model(self.reference if len(plan) else self._given)
        if len(plan):
            apply_plan(model, plan, self.techniques, self.context)
            self._reestimate(model)
        return in_eval(model)

    def recover(
        self, model: nn.Module, plan: Plan, epochs: int, folder: Path, *, is_final: bool
    ) -> None:
        """Fine-tune `model` in place; `folder` keeps what an interrupted fit needs to go on."""
        algorithms = [
            algorithm
            for technique in self.techniques.values()
            for algorithm in technique.algorithms(plan.of(technique.name).choices)
        ]
        formats = self._deployment.formats(model, plan, trained=True)
        if formats and algorithms:
            raise ModelError(
                "Numbers of few bits are not trained beside zeros or palettes that must stay."
            )
        if formats:
            self._train_numbers(model, formats, epochs, folder, is_final=is_final)
            return
        self.recovery.fit(model, epochs, folder, is_final=is_final, algorithms=algorithms)
        if self.config.external_training_loop is not None:  # which knows nothing of the algorithms
            for technique in self.techniques.values():
                if technique.stage in (Stage.VALUES, Stage.PALETTE):
                    technique.apply(model, plan.of(technique.name).choices, self.context)

    def _train_numbers(
        self, model: nn.Module, formats: Formats, epochs: int, folder: Path, *, is_final: bool
    ) -> None:
        batch = move(first_batch(self.data["train"]), self.device)
        train_quantized(
            model,
            formats,
            self.example.to(self.device),
            (inputs.to(self.device) for inputs in self.subset.inputs),
            fit=partial(
                self.recovery.fit_quantized, epochs=epochs, folder=folder, is_final=is_final
            ),
            loss=lambda tried: self.task.loss(tried, batch),
        )

    def epoch_seconds(self) -> float:
        """A measured guess at one fine-tuning epoch of the whole reference."""
        return self.recovery.epoch_seconds(copy_model(self.reference))

    def judge(self, model: nn.Module, plan: Plan, folder: Path) -> Judged:
        """Deploy as `plan` says, evaluate the deployed model, measure it beside the reference."""
        with self._progress.task("judge", total=None):
            deployed = self._deployment.deploy(
                model, self.example, folder, plan, self.subset.inputs
            )
            latency_ms = self._latency_ms(deployed.module)
            return Judged(
                self._evaluate(deployed.module, self.config.eval_split),
                self._cost(model, deployed.size_bytes, latency_ms),
            )

    def save(self, model: nn.Module, folder: Path) -> None:
        """Structure and weights, without pickle."""
        archive.save(model, folder, reference=self._given)
        save_plan(model, folder)

    def load(self, folder: Path) -> nn.Module:
        """A saved variant, on the job's device."""
        model = archive.load(folder, self._given).to(self.device)
        return in_eval(load_plan(model, folder))

    # export -----------------------------------------------------------------------------------

    def export(self, model: nn.Module, plan: Plan, folder: Path) -> Exported:
        """Every format that was asked for, and what was measured on the file to deploy."""
        split = self.config.holdout or self.config.eval_split
        files = self._deployment.export(
            model, self.example, folder, plan, self.subset.inputs, self.config.export
        )
        self.save(model, folder / "model")
        deployed = files.deployed.module
        metrics, reference = self._evaluate(deployed, split), self._reference_metrics(split)
        key = self.config.eval_key or next(iter(reference))
        return Exported(
            artifacts={**files.paths, "model_dir": folder / "model"},
            judged=Judged(
                metrics,
                self._cost(model, files.deployed.size_bytes, self._latency_ms(deployed)),
            ),
            reference_metrics=reference,
            parity=files.parity,
            paired=evaluate_pairs(
                lambda each, loader: self.task.evaluate(each, loader, self.config.device),
                self.reference,
                deployed,
                self.data[split],
                key,
                (reference[key], metrics[key]),
            ),
            agreement=self._agreement(files.deployed, split),
            notes=files.notes,
        )

    def _agreement(self, deployed: Deployed, split: str) -> Agreement | None:
        """Of a quantized file that names classes, on the first samples of `split`, unlabelled."""
        kind = self.config.task_type
        if deployed.simulate is None or kind not in {"classification", "segmentation"}:
            return None
        judged = draw_subset(
            self.data[split],
            lambda batch: self.task.inputs(self.reference, batch),
            self.config.seed,
        )
        return agreement(
            deployed.module,
            deployed.simulate(),
            self.reference,
            judged.inputs,
            has_positions=kind == "segmentation",
        )

    def runtime_model(self, artifacts: Mapping[str, Path]) -> nn.Module:
        """The deployed file, called like the model."""
        return self._deployment.open(artifacts, self.load)

    # what is found once -----------------------------------------------------------------------

    @cached_property
    def subset(self) -> Subset:
        """The fixed sample of the training split."""
        return draw_subset(
            self.data["train"],
            lambda batch: self.task.inputs(self.reference, batch),
            self.config.seed,
        )

    @cached_property
    def example(self) -> ModelInputs:
        """One call's inputs, on the CPU. Two samples at least, so that the batch can be told."""
        inputs = self.subset.inputs[0]
        return inputs.with_batch(min(max(inputs.batch_size, 2), EXAMPLE_SAMPLES))

    @cached_property
    def context(self) -> TechniqueContext:
        """What the techniques may know."""
        multiple = WIDTH_MULTIPLE[self.config.optimization]
        return TechniqueContext(
            inputs=self.example.to(self.device),
            width_multiple=multiple,
            min_width=multiple,
            importance=self.config.importance,
            group_cost=self._group_cost if self.config.optimization == "latency" else None,
            accumulate_gradients=self._accumulate_gradients,
            stores_compact=self._counts_bytes and self._deployment.target.stores_compact,
            layer_saves=self._layer_saves if self.config.optimization == "latency" else None,
            layer_formats=lambda: self._numbers.formats,
        )

    @cached_property
    def recovery(self) -> Recovery:
        """The trainer's side of the job."""
        assert self._baseline is not None
        return Recovery(
            self.config,
            self.config.eval_key or next(iter(self._baseline.metrics)),
            self.task,
            self.reference,
            self.data,
            lambda model: self._evaluate(model, self.config.eval_split),
            self._progress,
        )

    @cached_property
    def _reference_outputs(self) -> list[list[Tensor]]:
        return list(outputs_on(self.reference, self.subset.inputs, self.device))

    def _layer_saves(self, name: str, form: str, ranks: tuple[int, ...]) -> bool:
        """Whether a layer is faster as a chain, at the widths of the reference and in float."""
        if name not in self.layers():  # inside an attention that pruning replaces
            return False
        whole = self.layers()[name]
        chain = replace(whole, form=form, ranks=ranks)
        return self._latency.cost(name, chain) < self._latency.cost(name, whole)

    def _group_cost(self, group: ChannelGroup, width: int) -> float:
        """Milliseconds of the layers of `group` at a width."""
        layers = costly_layers(self.reference)
        return group_latency_ms(group, width, layers, self._latency.cost, self._int8_layers)

    @property
    def _int8_layers(self) -> Sequence[str]:
        """Layers that may be quantized in this run."""
        return self._numbers.static_layers if QUANTIZATION in self.techniques else ()

    @cached_property
    def _latency(self) -> LatencyModel:
        """Milliseconds of layers within the reference."""
        assert self._baseline is not None
        inputs = self.example.with_batch(self.config.target.batch_size).to(self.device)
        layers, shapes = costly_layers(self.reference), input_shapes(self.reference, inputs)
        minutes = self.config.budget.minutes
        key = digest([self.digest(), dict(self.target()), minutes, sorted(self.techniques)])
        told = LayerLatencies(self._folder / f"layer_costs-{key}.jsonl")
        model = LatencyModel(
            {name: layer_state(layer) for name, layer in layers.items()},
            latency_cost(layers, shapes, self._deployment.layer_latency_ms),
            self.layer_cost("macs"),
            told,
            limit_seconds=math.inf if minutes is None else minutes * 60 * TIMING_SHARE,
        )
        model.calibrate(self._baseline.cost.latency_ms)
        if int8 := self._int8_layers:
            mixed = int8[1::3]  # none of them beside another
            int8_ms = told.get("int8", lambda: self._int8_latency_ms(int8))
            others = [name for name in int8 if name not in mixed]
            mixed_ms = told.get("mixed", lambda: self._int8_latency_ms(others))
            model.calibrate_int8(int8, int8_ms, mixed, mixed_ms)
        return model

    def _int8_latency_ms(self, layers: Sequence[str]) -> float:
        """Of the reference with `layers` in int8."""
        return self._latency_ms(self._numbers.runtime_model(layers))

    @cached_property
    def _numbers(self) -> Numbers:
        """The reference in few bits."""
        return Numbers(
            self.config,
            self._deployment,
            self.reference,
            self.example,
            self.subset.inputs,
            self._lose,
        )

    @property
    def _counts_bytes(self) -> bool:
        """Whether a smaller file is worth anything in this run."""
        is_limited = self.config.budget.size_bytes is not None
        return is_limited or self.config.optimization == "compression"

    def _accumulate_gradients(self, model: nn.Module) -> None:
        """The gradient of the user's loss over the subset; batch norms use their statistics."""
        model.eval()
        for batch in self.subset.batches:
            terms = self.task.loss(model, move(batch, self.device))
            torch.stack([term.float() for term in terms.values()]).sum().backward()  # type: ignore[no-untyped-call]

    def _reestimate(self, model: nn.Module) -> None:
        reestimate_batchnorm(
            model, self.subset.inputs, lambda m, inputs: inputs.to(self.device).call(m)
        )

    def _reference_metrics(self, split: str) -> Mapping[str, float]:
        assert self._baseline is not None
        if split == self.config.eval_split:
            return self._baseline.metrics
        return self._evaluate(self.reference, split)

    def _evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        self._looks += split == self.config.eval_split
        return self.task.evaluate(model, self.data[split], self.config.device)

    def _cost(self, model: nn.Module, size_bytes: int, latency_ms: float) -> Cost:
        inputs = self.example.with_batch(1).to(self.device)
        counted = count(model, inputs)
        memory_bytes = peak_activation_memory(model, inputs)
        return Cost(counted.params, counted.macs, size_bytes, latency_ms, memory_bytes)

    def _latency_ms(self, module: nn.Module) -> float:
        """On the scale of the baseline; see `Deployment.time_beside`."""
        assert self._baseline is not None
        deployed = self._deployment.reference(self.reference, self.example)
        return self._deployment.time_beside(
            deployed.module,
            module,
            self.example,
            reference_ms=self._baseline.cost.latency_ms,
        )

    def _lose(self, sentence: str) -> None:
        logger.warning("%s", sentence)
        self._lost.append(sentence)


def _make_techniques(config: Config) -> dict[str, Technique]:
    """One instance of each that is wanted; `quantization` wants those that change numbers alone.

    Raises:
        ConfigError: if there is no technique of a name, or none is left.
    """
    names = list(config.techniques or TECHNIQUES.names())
    classes = {name: TECHNIQUES.get(name) for name in names}
    if config.optimization == "quantization":
        classes = {name: cls for name, cls in classes.items() if cls.stage is Stage.NUMBERS}
    if not classes:
        raise ConfigError(
            f"techniques={names} has none that quantizes, and optimization='quantization'. Add "
            "'quantization', or choose another optimization."
        )
    return {name: cls() for name, cls in classes.items()}
