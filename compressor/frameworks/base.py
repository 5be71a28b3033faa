"""What the engine and the search see of a framework: a bench on which one user's job is worked.

Everything torch lives behind this protocol, so the search can be tested with numbers instead of
networks, in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from compressor.config import Config, ExecutorConfig
from compressor.distributed import Context
from compressor.evidence import Frozen, LayerRow
from compressor.progress import Progress
from compressor.result import Agreement, Choice, Cost, Parity, Plan
from compressor.search.interval import Paired
from compressor.search.making import Base, Maker
from compressor.search.space import LayerChange, LayerCost, LayerState
from compressor.search.tuning import Recovered, Tuning

Model = TypeVar("Model")


@dataclass(frozen=True)
class Job:
    """What the user handed in, as it came; the framework makes sense of it."""

    data: Mapping[str, Any] | Callable[[], Mapping[str, Any]]
    model: Any
    config: Config
    forward_pass: Any = None
    eval_func: Any = None
    loss_function_cls: Any = None
    loss_function_kwargs: Mapping[str, Any] | None = None
    is_dryrun: bool = False

    def open_data(self) -> Mapping[str, Any]:
        """The loaders by split; in every process that opens the job, a function makes them once."""
        data = self.data
        return data() if callable(data) and not isinstance(data, Mapping) else data


@dataclass(frozen=True)
class Judged:
    """A model as deployed on the target: the user's metrics, and what it costs."""

    metrics: Mapping[str, float]
    cost: Cost


@dataclass(frozen=True)
class Exported:
    """The files of the final model, and what was measured on the one to deploy.

    Metrics are of the holdout split where there is one, else of the evaluated split. `paired` has
    them on its parts, or says why there are none.
    """

    artifacts: Mapping[str, Path]
    judged: Judged
    reference_metrics: Mapping[str, float]
    parity: Parity | None
    paired: Paired | str = ""
    agreement: Agreement | None = None
    notes: tuple[str, ...] = field(default=())


class Workbench(Protocol[Model]):
    """One job, opened. Models handed out are copies; the reference is never changed.

    Attributes:
        can_export: whether the model can be exported, as far as is known.
    """

    can_export: bool

    def leave_export(self) -> None:
        """Take note that the model cannot be exported: it is deployed in torch from now on."""

    def check(self) -> None:
        """Try everything once on two batches: copy, trace, forward, loss, gradient.

        Raises:
            CompressorError: the fact and the way out.
        """

    def digest(self) -> str:
        """Of the reference's weights and structure, and of the data that damage is measured on."""

    def job_digest(self) -> str:
        """Of all that decides a variant's outcome besides plan and configuration.

        The reference, what is known of the data, and the user's functions.
        """

    def baseline(self) -> Judged:
        """The reference: its metrics in torch, its cost on the target in float32."""

    def use_baseline(self, baseline: Judged) -> None:
        """Take what an earlier process measured: latencies are reported on its scale."""

    def target(self) -> Mapping[str, Any]:
        """Where costs are measured: runtime, device, threads, batch_size, hardware."""

    def lost(self) -> Sequence[str]:
        """Sentences: what cannot be done with this model, and why."""

    def frozen(self) -> Sequence[Frozen]:
        """What techniques left alone, and why; among `lost` as sentences."""

    def is_number(self, technique: str) -> bool:
        """Whether that technique leaves structure and weights as they are."""

    def propose(self) -> list[Choice]:
        """Every choice of every technique."""

    def further(self, choices: Sequence[Choice], made: Plan) -> list[Choice]:
        """Those of `choices`, of structure, that can be made of a variant of the plan `made`."""

    def layers(self) -> Mapping[str, LayerState]:
        """The layers whose cost can change, as they are in the reference."""

    def effects(self, choices: Sequence[Choice]) -> Mapping[str, Mapping[str, LayerChange]]:
        """What each choice, by key, does to each layer."""

    def layer_cost(self, resource: str) -> LayerCost:
        """Cost of a layer in a state, for resource "latency_ms", "size_bytes" or "macs"."""

    def layer_rows(self, model: Model, plan: Plan) -> Sequence[LayerRow]:
        """What each layer costs, in the reference and in `model`, a variant of `plan`."""

    def damage_of(self, plan: Plan, base: Base[Model] | None = None) -> float:
        """Divergence of the outputs from the reference's when `plan` is made; 0 is none.

        Of a plan of structure and of numbers the sum of both.
        """

    def build(self, plan: Plan, base: Base[Model] | None = None) -> Model:
        """A copy of the reference, or of `base`, with `plan` applied and the cheap repair done."""

    def reranked(self, plan: Plan, importance: str) -> Plan:
        """`plan` with as many channels kept everywhere, by another criterion."""

    def recover(
        self,
        model: Model,
        plan: Plan,
        epochs: int,
        folder: Path,
        *,
        is_final: bool,
        tuning: Tuning,
        wanted: float | None = None,
    ) -> Recovered:
        """Fine-tune `model` in place; `folder` keeps what an interrupted fit needs to go on.

        A fit whose learning curve says that the metric will not come to `wanted` is stopped.
        """

    def epoch_seconds(self) -> float:
        """A measured guess at one fine-tuning epoch of the whole reference."""

    def judge(self, model: Model, plan: Plan, folder: Path) -> Judged:
        """Deploy `model` to the target as `plan` says, evaluate it there, measure it."""

    def workers(
        self, executor: ExecutorConfig, folder: Path
    ) -> AbstractContextManager[Maker | None]:
        """What makes variants in `folder` beside this process; None: this process is to make them.

        Raises:
            CompressorError: if the job cannot be handed to others, or there are none.
        """

    def save(self, model: Model, folder: Path) -> None:
        """Write structure and weights."""

    def load(self, folder: Path) -> Model:
        """Read them back onto a copy of the reference."""

    def pack(self, model: Model) -> dict[str, bytes]:
        """What `save` writes, by the name of the file."""

    def unpack(self, files: Mapping[str, bytes]) -> Model:
        """What `load` reads."""

    def meet(self, context: Context) -> None:
        """Take the reference of rank 0, in every process that has opened the job.

        Raises:
            ModelError: if a process was given a model of another structure.
        """

    def export(self, model: Model, plan: Plan, folder: Path) -> Exported:
        """Write every format that the user asked for, and compare the float file with the model."""

    def runtime_model(self, artifacts: Mapping[str, Path]) -> Any:
        """The deployed file as something that is called like the model."""

    def looks(self) -> int:
        """How many times the judged split was evaluated in this process."""


class Framework(Protocol):
    """Opens jobs."""

    def open(self, job: Job, run_dir: Path, progress: Progress) -> Workbench[Any]:
        """Understand `job`; bad data and configuration are refused here."""
