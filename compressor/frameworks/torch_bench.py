"""A user's job in PyTorch, opened: the torch side of every step of `Engine.run`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from compressor.config import ExecutorConfig
from compressor.distributed import Context, current_context
from compressor.errors import ExportError, ModelError
from compressor.evidence import Frozen, LayerRow
from compressor.frameworks.base import Exported, Judged
from compressor.frameworks.checks import check_training
from compressor.frameworks.code_version import damage_version
from compressor.frameworks.deployment import QUANTIZATION
from compressor.frameworks.further import further
from compressor.frameworks.identity import check_same_structure, source_of, stable
from compressor.frameworks.layer_costs import effects_of, layer_state, stored_layers
from compressor.frameworks.layer_rows import layer_latencies_ms, layer_rows
from compressor.frameworks.quantized_training import (
    load_plan,
    plan_from_bytes,
    plan_to_bytes,
    save_plan,
    train_quantized,
)
from compressor.frameworks.torch_job import TorchJob
from compressor.frameworks.workers import RayMaker, check_sendable, ray_workers
from compressor.interfaces.data import first_batch, move
from compressor.logs import get_logger
from compressor.profiling.counts import count
from compressor.quantization.plan import Formats
from compressor.result import Choice, Cost, Plan, digest
from compressor.search.making import Base
from compressor.search.space import LayerChange, LayerCost, LayerState
from compressor.search.tuning import Recovered, Tuning
from compressor.structure import archive
from compressor.structure.origin import remember_origin
from compressor.structure.trace import (
    copy_model,
    copy_skeleton,
    export_graph,
    in_eval,
)
from compressor.targets import Deployed
from compressor.techniques import (
    TECHNIQUES,
    ChannelPruning,
    Stage,
    apply_plan,
)

logger = get_logger(__name__)

DRYRUN_CHOICES = 2  # of each technique
SENSED = (Stage.DEPTH, Stage.WIDTH, Stage.RANK, Stage.VALUES, Stage.PALETTE, Stage.NUMBERS)


class TorchBench(TorchJob):
    """Works on one job. Models handed out are copies on its device; the reference is never changed.

    Attributes:
        can_export: whether the model can be exported, as far as is known.
    """

    can_export = True

    # check ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Try everything once on two batches; see `frameworks.checks`."""
        if self.config.executor.kind == "ray":
            check_sendable(self._job)
        check_training(self.task, self.reference, self.data, self.device, self.config)
        counted = count(self.reference, self.example.with_batch(1).to(self.device))
        if counted.uncounted:
            names = ", ".join(sorted(counted.uncounted))
            self._lose(f"The MACs of these operations are not known and not counted: {names}.")
        try:
            export_graph(copy_model(self.reference).cpu(), self.example)
            self._deployment.reference(self.reference, self.example)
        except (ModelError, ExportError) as error:
            self.leave_export()
            self._lose(
                f"{error} The model is measured in torch instead, without int8; a technique that "
                "needs its graph is left out."
            )

    def leave_export(self) -> None:
        """Take note that the model cannot be exported: it is deployed in torch from now on."""
        if self.can_export:
            self.can_export = False
            self._deployment = self._deployment.without_export()

    def digest(self) -> str:
        """Of what damages depend on: reference, subset, how outputs are compared, and our code."""
        return digest([self._reference_digest(), damage_version()])

    def job_digest(self) -> str:
        """Of reference, subset, first batch of the judged splits, and the user's functions."""
        splits = [self.config.eval_split, *([self.config.holdout] if self.config.holdout else [])]
        judged = [stable(first_batch(self.data[split])) for split in splits]
        job = self._job
        functions = (job.forward_pass, job.eval_func, job.loss_function_cls)
        kwargs = stable(dict(job.loss_function_kwargs or {}))
        return digest([self._reference_digest(), judged, [source_of(f) for f in functions], kwargs])

    def lost(self) -> Sequence[str]:
        """What cannot be done with this model, and why."""
        return [*self._lost, *map(str, self.frozen())]

    def frozen(self) -> Sequence[Frozen]:
        """What techniques left alone, and why."""
        return [Frozen(item.technique, item.site, item.reason) for item in self.context.lost]

    def looks(self) -> int:
        """Evaluations of the judged split in this process."""
        return self._judging.looks

    # profile ----------------------------------------------------------------------------------

    def target(self) -> Mapping[str, Any]:
        """Runtime, device, threads, batch size."""
        return self._deployment.describe()

    def baseline(self) -> Judged:
        """The reference: metrics in torch, cost on the target in float32."""
        return self._judging.judge_reference()

    @property
    def reference_judged(self) -> Judged:
        """The baseline, which must be known by now."""
        return self._judging.reference

    def use_baseline(self, baseline: Judged) -> None:
        """Take what an earlier process measured: latencies are reported on its scale."""
        self._judging.baseline = baseline

    # propose and sense ------------------------------------------------------------------------

    def is_number(self, technique: str) -> bool:
        """Whether it acts on the exported file alone."""
        return TECHNIQUES.get(technique).stage is Stage.NUMBERS

    def propose(self) -> list[Choice]:
        """Every choice of every technique that the configuration allows; in a dry run a few."""
        found: list[Choice] = []
        with self._progress.task("propose", total=len(self.techniques)) as advance:
            for technique in self.techniques.values():
                try:
                    found.extend(technique.choices(self.reference, self.context))
                except ModelError as error:
                    self._lose(f"{technique.name} is left out: {error}")
                advance()
        # First what saves most surely, should the minutes not suffice to sense all; then in the
        # order in which the model runs: what runs before is computed once; see `Sensing`.
        stages = {name: SENSED.index(TECHNIQUES.get(name).stage) for name in self.techniques}
        found.sort(
            key=lambda choice: (stages[choice.technique], self._sensing.time_of(choice.site))
        )
        return _few_of_each(found) if self._job.is_dryrun else found

    def further(self, choices: Sequence[Choice], made: Plan) -> list[Choice]:
        """Those of `choices` that can be made of a variant of the plan `made`."""
        return further(choices, made)

    def layers(self) -> Mapping[str, LayerState]:
        """Convolutions, linear layers and embeddings of the reference."""
        return {name: layer_state(layer) for name, layer in stored_layers(self.reference).items()}

    def effects(self, choices: Sequence[Choice]) -> Mapping[str, Mapping[str, LayerChange]]:
        """What each choice does to each layer, as it says or read off an edited copy."""
        return effects_of(self.reference, choices, self._applied)

    def _applied(self, choice: Choice) -> nn.Module:
        """A copy of the reference that has the structure after one choice."""
        copy = copy_skeleton(self.reference)
        apply_plan(copy, Plan((choice,)), self.techniques, self.context)
        return copy

    def layer_cost(self, resource: str) -> LayerCost:
        """Cost of a layer in a state."""
        return self._costs.layer_cost(resource)

    def layer_rows(self, model: nn.Module, plan: Plan) -> Sequence[LayerRow]:
        """What each layer costs, in the reference and in `model`, a variant of `plan`."""
        inputs = self.example.with_batch(1).to(self.device)
        reference = count(self.reference, inputs)
        latencies_ms: Mapping[str, tuple[float, float]] = {}
        if self.config.optimization == "latency":  # only then layers were timed
            changes = list(self.effects(plan.choices).values())
            cost = self.layer_cost("latency_ms")
            latencies_ms = layer_latencies_ms(self.layers(), changes, cost)
        return layer_rows(
            reference,
            count(model, inputs) if len(plan) else reference,
            latencies_ms,
            {choice.site: choice.setting["format"] for choice in plan.of(QUANTIZATION)},
        )

    def damage_of(self, plan: Plan, base: Base[nn.Module] | None = None) -> float:
        """Divergence of the outputs on the subset when `plan` is made."""
        damage = 0.0
        numbers = Plan(tuple(choice for choice in plan if self.is_number(choice.technique)))
        if len(numbers):
            damage += self._sensing.divergence_of(self._numbers.simulate(numbers))
        if len(numbers) < len(plan):
            damage += self._sensing.damage_of(plan, base)
        return damage

    # build, recover, judge --------------------------------------------------------------------

    def build(self, plan: Plan, base: Base[nn.Module] | None = None) -> nn.Module:
        """A copy of the reference, or of `base`, with `plan` applied and repaired."""
        if not len(plan):
            return in_eval(copy_model(self._given))
        return self._sensing.build(plan, base)

    def reranked(self, plan: Plan, importance: str) -> Plan:
        """`plan` with as many channels kept everywhere, by another criterion."""
        pruning = self.techniques.get(ChannelPruning.name)
        if not isinstance(pruning, ChannelPruning):
            return plan
        mine, others = plan.of(pruning.name), plan.without(pruning.name)
        reranked = pruning.reranked(self.reference, mine.choices, importance, self.context)
        return Plan((*others, *reranked))

    def recover(
        self,
        model: nn.Module,
        plan: Plan,
        epochs: int,
        folder: Path,
        *,
        is_final: bool,
        tuning: Tuning,
        wanted: float | None = None,
    ) -> Recovered:
        """Fine-tune `model` in place; `folder` keeps what an interrupted fit needs to go on."""
        self._sensing.release()
        algorithms = [
            algorithm
            for technique in self.techniques.values()
            for algorithm in technique.algorithms(plan.of(technique.name).choices)
        ]
        # Rank 0 knows the machine that its formats are for.
        formats = current_context().share(self._deployment.formats(model, plan, trained=True))
        if formats and algorithms:
            raise ModelError(
                "Numbers of few bits are not trained beside zeros or palettes that must stay."
            )
        how: dict[str, Any] = {"is_final": is_final, "tuning": tuning, "wanted": wanted}
        if formats:
            fit = partial(self.recovery.fit_quantized, epochs=epochs, folder=folder, **how)
            return self._train_numbers(model, formats, fit)
        told = self.recovery.fit(model, epochs, folder, algorithms=algorithms, **how)
        if self.config.external_training_loop is not None:  # which knows nothing of the algorithms
            for technique in self.techniques.values():
                if technique.stage in (Stage.VALUES, Stage.PALETTE):
                    technique.apply(model, plan.of(technique.name).choices, self.context)
        return told

    def _train_numbers(
        self, model: nn.Module, formats: Formats, fit: Callable[[nn.Module], Recovered]
    ) -> Recovered:
        batch = move(first_batch(self.data["train"]), self.device)
        return train_quantized(
            model,
            formats,
            self.example.to(self.device),
            (inputs.to(self.device) for inputs in self.subset.inputs),
            fit=fit,
            loss=lambda tried: self.task.loss(tried, batch),
        )

    def epoch_seconds(self) -> float:
        """A measured guess at one fine-tuning epoch of the whole reference."""
        return self.recovery.epoch_seconds(copy_model(self.reference))

    def judge(self, model: nn.Module, plan: Plan, folder: Path) -> Judged:
        """Deploy as `plan` says, evaluate the deployed model, measure it beside the reference."""
        with self._progress.task("judge", total=None):
            deployed = self._deploy(model, plan, folder)
            return self._judging.judge(model, deployed, self.config.eval_split)

    def evaluate(self, model: nn.Module, plan: Plan, folder: Path) -> Mapping[str, float]:
        """The part of `judge` that may be done beside others: the metrics."""
        deployed = self._deploy(model, plan, folder)
        return self._judging.evaluate(deployed.module, self.config.eval_split)

    def measure(self, model: nn.Module, plan: Plan, folder: Path) -> Cost:
        """The part of `judge` that must be done alone: the cost."""
        return self._judging.measure(model, self._deploy(model, plan, folder))

    def _deploy(self, model: nn.Module, plan: Plan, folder: Path) -> Deployed:
        return self._deployment.deploy(model, self.example, folder, plan, self.subset.inputs)

    def workers(
        self, executor: ExecutorConfig, folder: Path
    ) -> AbstractContextManager[RayMaker | None]:
        """What makes variants in `folder` beside this process; None: this one is to make them."""
        if executor.kind == "inline":
            return nullcontext()
        return ray_workers(self, type(self), self._job, executor, folder, self._progress)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Structure and weights, without pickle."""
        archive.save(model, folder, reference=self._given)
        save_plan(model, folder)

    def load(self, folder: Path) -> nn.Module:
        """A saved variant, on the job's device."""
        model = archive.load(folder, self._given).to(self.device)
        return in_eval(load_plan(model, folder))

    def pack(self, model: nn.Module) -> dict[str, bytes]:
        """What `save` writes, by the name of the file."""
        return {**archive.to_bytes(model, reference=self._given), **plan_to_bytes(model)}

    def unpack(self, files: Mapping[str, bytes]) -> nn.Module:
        """What `load` reads."""
        model = archive.from_bytes(files, self._given).to(self.device)
        return in_eval(plan_from_bytes(model, files))

    def meet(self, context: Context) -> None:
        """Take the reference of rank 0; see `frameworks.leading`."""
        check_same_structure(self._given, context)
        for model in (self._given, self.reference):
            context.broadcast([*model.parameters(), *model.buffers()])

    # export -----------------------------------------------------------------------------------

    def export(self, model: nn.Module, plan: Plan, folder: Path) -> Exported:
        """Every format that was asked for, and what was measured on the file to deploy."""
        self._sensing.release()
        remember_origin(model, self._given)  # the user saves it without a reference
        split = self.config.holdout or self.config.eval_split
        files = self._deployment.export(
            model, self.example, folder, plan, self.subset.inputs, self.config.export
        )
        self.save(model, folder / "model")
        judged = self._judging.judge(model, files.deployed, split)
        reference = self._judging.reference_metrics(split)
        key = self.config.eval_key or next(iter(reference))
        whole = (reference[key], judged.metrics[key])
        return Exported(
            artifacts={**files.paths, "model_dir": folder / "model"},
            judged=judged,
            reference_metrics=reference,
            parity=files.parity,
            paired=self._judging.pair(files.deployed.module, split, key, whole),
            agreement=self._judging.agreement(files.deployed, split),
            notes=files.notes,
        )

    def runtime_model(self, artifacts: Mapping[str, Path]) -> nn.Module:
        """The deployed file, called like the model."""
        return self._deployment.open(artifacts, self.load)


def _few_of_each(choices: Sequence[Choice]) -> list[Choice]:
    """`DRYRUN_CHOICES` of each technique, from all over the model, in their order."""
    few = []
    for technique in dict.fromkeys(choice.technique for choice in choices):
        mine = [choice for choice in choices if choice.technique == technique]
        few += mine[:: -(-len(mine) // DRYRUN_CHOICES)]
    return few
