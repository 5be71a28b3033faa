"""What holds for every technique, as tests: subclass `TechniqueContract` beside your own.

::

    class TestMyTechnique(TechniqueContract):
        technique = MyTechnique

It needs pytest. The models are small; override `model`, `inputs` or `context` for others.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from compressor.export.onnx import export_onnx
from compressor.export.onnxruntime_model import OnnxRuntimeModel
from compressor.export.verify import parity
from compressor.frameworks.layer_costs import (
    costly_layers,
    layer_state,
    macs_cost,
    structural_changes,
)
from compressor.interfaces.inputs import ModelInputs, output_tensors
from compressor.profiling.counts import count
from compressor.result import Choice, Plan
from compressor.search.space import LayerChange
from compressor.structure.describe import diff, rebuild
from compressor.structure.packing import pack
from compressor.structure.trace import input_shapes
from compressor.techniques import Stage, Technique, TechniqueContext
from compressor.testing.models import TiedModel, TinyResNet
from compressor.training import Callback, Event, State, Trainer

PARITY = 1e-4  # of float32 outputs between two runtimes
SLACK_BYTES = 256  # of a packed tensor: its header


FORMATS = ("static_int8", "weight_int4")


class TechniqueContract:
    """Subclass it as `Test…` and name the technique.

    Attributes:
        technique: the class.
        largest_loss: of the outputs when the mildest choice is made at each site in turn, as a part
            of what is lost when the weights of the site are drawn anew: a technique that keeps
            nothing of what was learnt has 1.
    """

    technique: ClassVar[type[Technique]]
    largest_loss: ClassVar[float] = 0.8

    # what may be overridden -------------------------------------------------------------------

    def model(self) -> nn.Module:
        """A model with sites for the technique, in evaluation mode; the same each time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return TinyResNet().eval()

    def inputs(self) -> ModelInputs:
        """Of one call of `model()`."""
        return ModelInputs((torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)),))

    def context(self, inputs: ModelInputs) -> TechniqueContext:
        """What the technique may know."""

        def add_gradients(model: nn.Module) -> None:
            for output in output_tensors(inputs.call(model)):
                output.square().mean().backward()  # type: ignore[no-untyped-call]

        return TechniqueContext(
            inputs,
            accumulate_gradients=add_gradients,
            stores_compact=True,
            layer_formats=lambda: dict.fromkeys(costly_layers(self.model()), FORMATS),
        )

    def keep_all(self, model: nn.Module, choice: Choice) -> dict[str, Any] | None:
        """The setting at the site of `choice` that keeps everything; None if there is none."""
        del model, choice
        return None

    # the contract -----------------------------------------------------------------------------

    def test_it_has_a_name_a_stage_and_a_card(self) -> None:
        """All that is told of it elsewhere."""
        card = self.technique.card
        assert self.technique.name
        assert isinstance(self.technique.stage, Stage)
        assert card is not None, "give the class a `card`"
        assert all((card.summary, card.source, card.use_when, card.avoid_when, card.cost))

    def test_proposing_changes_nothing(self) -> None:
        """Weights, modes, flags, gradients, modules, and the global random numbers."""
        model, random = self.model(), torch.get_rng_state()
        before, seen = copy.deepcopy(model.state_dict()), _seen(model)
        assert list(self.technique().choices(model, self.context(self.inputs())))
        assert _seen(model) == seen
        assert _are_equal(before, model.state_dict())
        assert torch.equal(torch.get_rng_state(), random)

    def test_proposing_twice_gives_the_same(self) -> None:
        """Also from a fresh instance; every choice has a key of its own."""
        first = self._choices()
        assert first == list(self.technique().choices(self.model(), self.context(self.inputs())))
        assert len({choice.key for choice in first}) == len(first)

    def test_every_choice_names_modules_of_the_model(self) -> None:
        """What it acts on can be shown."""
        names = {name for name, _ in self.model().named_modules(remove_duplicate=False)}
        for choice in self._choices():
            assert choice.technique == self.technique.name
            assert choice.modules, choice
            assert set(choice.modules) <= names, choice
            assert choice.label, choice

    def test_keeping_everything_is_the_identity(self) -> None:
        """Nothing chosen, and everything kept at every site that can say so."""
        reference = self.model()
        plans: list[list[Choice]] = [[]]
        for choice in self._choices():
            setting = self.keep_all(reference, choice)
            if setting is not None:
                plans.append([Choice(choice.technique, choice.site, setting)])
        for choices in plans:
            edited = self._apply(choices)
            assert diff(reference, edited) == diff(reference, reference), choices
            assert _are_equal(reference.state_dict(), edited.state_dict()), choices

    def test_the_promised_saving_is_the_measured_one(self) -> None:
        """MACs as the search adds them up, against a count; stored bits against packed tensors."""
        reference, inputs = self.model(), self.inputs()
        counted = count(reference, inputs)
        layers = costly_layers(reference)
        macs = {layer.name: layer.macs for layer in counted.layers}
        cost = macs_cost(layers, macs, input_shapes(reference, inputs))
        before = {name: layer_state(layer) for name, layer in layers.items()}
        for choice in self._choices():
            edited = self._apply([choice])
            measured = count(edited, inputs).macs
            changes = structural_changes(before, edited)
            states = {
                name: changes.get(name, LayerChange()).applied_to(before[name]) for name in before
            }
            promised = sum(cost(name, state) for name, state in states.items())
            others = counted.macs - sum(macs.get(name, 0) for name in layers)
            if self.technique.stage >= Stage.VALUES:
                assert measured == counted.macs, choice
                self._check_stored(choice, edited)
            else:
                assert measured < counted.macs, choice
                assert promised <= measured <= promised + others, choice

    def test_more_is_kept_than_by_chance(self) -> None:
        """Outputs move less than when the same weights are drawn anew."""
        reference, inputs = self.model(), self.inputs()
        lost, by_chance = 0.0, 0.0
        for site, choices in _by_site(self._choices()).items():
            moved = [_distance(reference, self._apply([choice]), inputs) for choice in choices]
            assert all(distance < float("inf") for distance in moved), site
            lost += min(moved)
            by_chance += _distance(reference, _redrawn(reference, choices[0].modules), inputs)
        assert lost <= self.largest_loss * by_chance, f"{lost / by_chance:.2f}"

    def test_the_same_plan_gives_the_same_model(self) -> None:
        """From JSON, by a fresh instance, whatever the global random numbers are."""
        fresh = self.technique()
        for choice in self._choices():
            (again,) = Plan.from_json(json.loads(json.dumps(Plan((choice,)).to_json())))
            first, second = self._apply([choice]), self.model()
            with torch.random.fork_rng():
                torch.manual_seed(99)
                fresh.apply(second, [again], self.context(self.inputs()))
            assert _are_equal(first.state_dict(), second.state_dict()), choice

    def test_the_structure_is_rebuilt_from_json_and_takes_the_weights(self) -> None:
        """On a fresh copy of the reference; the outputs are equal bit by bit."""
        reference, inputs = self.model(), self.inputs()
        for choice in [*self._choices(), None]:
            edited = self._apply([choice] if choice else self._harshest())
            rebuilt = rebuild(reference, json.loads(json.dumps(diff(reference, edited))))
            rebuilt.load_state_dict(edited.state_dict(), strict=True)
            assert all(
                torch.equal(a, b)
                for a, b in zip(_outputs(edited, inputs), _outputs(rebuilt, inputs), strict=True)
            ), choice

    def test_all_sites_at_once_run(self) -> None:
        """The last choice of each."""
        reference, inputs = self.model(), self.inputs()
        outputs = _outputs(self._apply(self._harshest()), inputs)
        assert [o.shape for o in outputs] == [o.shape for o in _outputs(reference, inputs)]
        assert all(bool(output.isfinite().all()) for output in outputs)

    def test_tied_parameters_stay_tied(self) -> None:
        """Or their layers are not offered."""
        torch.manual_seed(0)
        model, inputs = TiedModel().eval(), ModelInputs((torch.arange(10).reshape(2, 5),))
        context = self.context(inputs)
        context.layer_formats = lambda: dict.fromkeys(["hidden", "head"], FORMATS)
        for choice in self.technique().choices(model, context):
            edited = copy.deepcopy(model)
            self.technique().apply(edited, [choice], context)
            assert edited.head.weight is edited.embedding.weight, choice
            assert _outputs(edited, inputs)[0].shape == (2, 5, 32), choice

    def test_a_model_that_is_a_single_layer_is_no_trap(self) -> None:
        """Its name is ''; nothing holds it, so it cannot be replaced."""
        torch.manual_seed(0)
        model, inputs = nn.Linear(64, 64).eval(), ModelInputs((torch.randn(4, 64),))
        context = self.context(inputs)
        context.layer_formats = lambda: {"": FORMATS}
        for choice in self.technique().choices(model, context):
            edited = copy.deepcopy(model)
            self.technique().apply(edited, [choice], context)
            assert _outputs(edited, inputs)[0].shape == (4, 64), choice

    @pytest.mark.slow
    def test_it_exports_and_onnx_runtime_agrees(self, tmp_path: Path) -> None:
        """With the last choice at each site."""
        edited, inputs = self._apply(self._harshest()), self.inputs()
        path = export_onnx(edited, inputs, tmp_path / "model.onnx")
        found = parity(edited, OnnxRuntimeModel(path), inputs)
        assert found.max_rel_error < PARITY

    @pytest.mark.slow
    def test_its_training_resumes_bit_by_bit(self, tmp_path: Path) -> None:
        """With what the technique does while training, from the middle on."""
        choices = self._harshest()
        saving = _Saving()
        straight = saving.trainer = self._trainer(choices, tmp_path, [saving])
        straight.fit()
        resumed = self._trainer(choices, tmp_path, [])
        resumed.load_state_dict(saving.saved)
        resumed.fit()
        assert _are_equal(straight.model.state_dict(), resumed.model.state_dict())

    # helpers ----------------------------------------------------------------------------------

    @property
    def _instance(self) -> Technique:
        """One for all tests: an instance serves one reference."""
        shared = vars(type(self)).get("_shared")
        if shared is None:
            type(self)._shared = shared = self.technique()  # type: ignore[attr-defined]
        return shared

    def _choices(self) -> list[Choice]:
        return list(self._instance.choices(self.model(), self.context(self.inputs())))

    def _apply(self, choices: Sequence[Choice]) -> nn.Module:
        edited = self.model()
        self._instance.apply(edited, choices, self.context(self.inputs()))
        return edited

    def _harshest(self) -> list[Choice]:
        return [choices[-1] for choices in _by_site(self._choices()).values()]

    def _check_stored(self, choice: Choice, edited: nn.Module) -> None:
        if "stored_bits" not in choice.setting:
            return
        weight = edited.get_parameter(f"{choice.site}.weight".lstrip("."))
        size_bytes = sum(part.nbytes for part in pack("weight", weight.detach()).values())
        promised = choice.setting["stored_bits"] * weight.numel() / 8
        assert abs(size_bytes - promised) <= SLACK_BYTES + 0.02 * promised, choice

    def _trainer(
        self, choices: Sequence[Choice], folder: Path, callbacks: Sequence[Callback]
    ) -> Trainer:
        inputs = self.inputs()

        def loss(model: nn.Module, _: Tensor) -> Tensor:
            return torch.stack(
                [o.square().mean() for o in output_tensors(inputs.call(model))]
            ).sum()

        return Trainer(
            self._apply(choices),
            loss,
            train_dataloader=[torch.zeros(1)] * 4,
            optimizers={"name": "SGD", "lr": 0.01, "momentum": 0.9},
            algorithms=self.technique().algorithms(choices),
            callbacks=callbacks,
            max_duration="4ba",
            save_dir=folder,
        )


class _Saving(Callback):
    """Takes the trainer's state after the second batch."""

    events = frozenset({Event.BATCH_END})

    def __init__(self) -> None:
        self.trainer: Trainer | None = None
        self.saved: dict[str, Any] = {}

    def on(self, event: Event, state: State) -> None:
        if state.clock.batch == 2 and self.trainer is not None:
            self.saved = copy.deepcopy(self.trainer.state_dict())


def _seen(model: nn.Module) -> list[Any]:
    """Modules, modes, flags and gradients."""
    modules = [(n, id(m), m.training, len(m._forward_hooks)) for n, m in model.named_modules()]
    flags = [(n, id(p), p.requires_grad, p.grad is None) for n, p in model.named_parameters()]
    return [modules, flags]


def _are_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _outputs(model: nn.Module, inputs: ModelInputs) -> list[Tensor]:
    with torch.no_grad():
        return output_tensors(inputs.call(model.eval()))


def _distance(reference: nn.Module, other: nn.Module, inputs: ModelInputs) -> float:
    """Between the outputs, as a part of their norm."""
    pairs = zip(_outputs(reference, inputs), _outputs(other, inputs), strict=True)
    return sum(float((b - a).norm() / a.norm()) for a, b in pairs)


def _redrawn(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy whose modules of these names have fresh weights."""
    redrawn = copy.deepcopy(model)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name in names:
            reset = getattr(redrawn.get_submodule(name), "reset_parameters", None)
            if callable(reset):
                reset()
    return redrawn


def _by_site(choices: Sequence[Choice]) -> dict[str, list[Choice]]:
    found: dict[str, list[Choice]] = {}
    for choice in choices:
        found.setdefault(choice.site, []).append(choice)
    return found
