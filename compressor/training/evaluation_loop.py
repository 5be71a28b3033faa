"""Evaluations in the course of a training: on one process, for all."""

from __future__ import annotations

from collections.abc import Sequence

from compressor.distributed import run_on_main
from compressor.distributed.agreement import agree_on
from compressor.seeding import derive_seed, isolated_rng
from compressor.training.dispatch import Dispatch
from compressor.training.evaluator import Evaluations, Evaluator, run_evaluator
from compressor.training.events import Event
from compressor.training.state import State


class EvaluationLoop:
    """Runs evaluators one after the other.

    Of several processes rank 0 evaluates, on all of the loader, and the others take its metrics: so
    all decide alike by them.

    Args:
        state: of the training.
        dispatch: calls who listens.
        evaluations: says when which evaluator runs.
        eval_key: the metric that a schedule with interval "eval" is stepped with.
    """

    def __init__(
        self, state: State, dispatch: Dispatch, evaluations: Evaluations, eval_key: str | None
    ) -> None:
        self._state = state
        self._dispatch = dispatch
        self._fire = dispatch.bind(state)
        self._evaluations = evaluations
        self._eval_key = eval_key

    def run(self, evaluators: Sequence[Evaluator], *, is_fitting: bool) -> None:
        """Set `state.metrics` by `evaluators`, as the model is."""
        state = self._state
        if not evaluators:
            return
        for evaluator in evaluators:
            with isolated_rng(derive_seed(state.seed, "evaluate", state.clock.batch)):
                metrics = self._evaluate(evaluator)
                state.take_metrics(metrics)
                self._fire(Event.EVAL_END)
                state.log(metrics)
            if is_fitting and self._eval_key in state.evaluated:
                self._step_with_metric()
        self._evaluations.note(evaluators, state.clock)
        if self._eval_key is not None and self._evaluations.is_up_to_date(state.clock):
            state.metric(self._eval_key)  # raises, if none gives it

    def _evaluate(self, evaluator: Evaluator) -> dict[str, float]:
        state = self._state
        state.evaluator = evaluator.label
        try:
            self._fire(Event.EVAL_START)
            agree_on(state.context, list(state.model.buffers()))
            return run_on_main(state.context, lambda: run_evaluator(evaluator, state, state.step))
        except BaseException:
            self._dispatch.leave(Event.EVAL_END, state)
            raise

    def _step_with_metric(self) -> None:
        state, schedule = self._state, self._state.schedule
        if schedule is not None and schedule.interval == "eval" and self._eval_key is not None:
            schedule.step(state.metric(self._eval_key))
