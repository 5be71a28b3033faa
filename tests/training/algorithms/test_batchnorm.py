from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from compressor.errors import DataError
from compressor.structure import surgery
from compressor.training import Algorithm, Event, State
from compressor.training.algorithms.batchnorm import BatchNormReestimation, reestimate_batchnorm
from tests.training.algorithms.resuming import assert_resumes
from tests.training.helpers import make_dataset, make_loader, make_model, make_trainer


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 4, generator=generator) * 3 + 1 for _ in range(3)]


def test_statistics_are_the_mean_over_the_batches() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    reestimate_batchnorm(model, batches(), lambda m, x: m(x))
    hidden = [model[0](x).detach() for x in batches()]
    norm = model[1]
    torch.testing.assert_close(norm.running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([h.var(0) for h in hidden]).mean(0))


def test_modes_momenta_and_everything_else_are_left_as_they_were() -> None:
    model = make_model(dropout=0.5)
    model[1].momentum = 0.3
    model[0].eval()
    weights = [p.detach().clone() for p in model.parameters()]
    seen = []
    model[3].register_forward_hook(lambda module, args, out: seen.append(module.training))
    reestimate_batchnorm(model, batches(), lambda m, x: m(x), count=2)
    assert model[1].momentum == 0.3
    assert [module.training for module in model] == [False, True, True, True, True]
    assert seen == [False, False]
    assert all(map(torch.equal, weights, model.parameters()))


def test_an_error_puts_momenta_and_modes_back() -> None:
    model = make_model().eval()

    def fail(model: nn.Module, x: torch.Tensor) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        reestimate_batchnorm(model, batches(), fail)
    assert model[1].momentum == 0.1
    assert not any(module.training for module in model)


def test_a_model_without_batch_norm_is_not_called() -> None:
    reestimate_batchnorm(nn.Linear(4, 4), batches(), lambda model, x: pytest.fail("called"))


def test_norms_without_running_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False))
    reestimate_batchnorm(model, batches(), lambda m, x: m(x))
    assert model[0].running_mean is None


def test_a_fit_begins_with_fresh_statistics_and_gets_them_after_an_edit() -> None:
    calls: list[int] = []

    def call(model: nn.Module, batch: object) -> None:
        calls.append(trainer.state.clock.batch)

    algorithm = BatchNormReestimation(make_loader(), call, count=2)
    trainer = make_trainer(algorithms=[algorithm])
    trainer.fit("3ba")
    trainer.state.edit(lambda model: surgery.replace(model, "4", nn.Linear(8, 2)))
    trainer.fit("3ba")
    assert calls == [0, 0, 3, 3]


def test_the_loaders_own_generator_is_left_as_it_was() -> None:
    loader = make_loader(shuffle=True, seed=3)
    state = loader.generator.get_state()
    reestimate_batchnorm(make_model(), loader, lambda m, batch: m(batch[0]))
    assert torch.equal(loader.generator.get_state(), state)


def test_left_to_itself_it_takes_the_training_data_and_the_training_step() -> None:
    trainer = make_trainer(
        algorithms=[BatchNormReestimation()],
        optimizers={"name": "SGD", "lr": 0.0},
        max_duration="1ba",
    )
    norm = trainer.model[1]
    norm.momentum = 0.0  # the training step itself leaves them alone
    trainer.fit()
    with torch.no_grad():
        hidden = [trainer.model[0](x) for x, _ in make_loader()]
    torch.testing.assert_close(norm.running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0))


def test_the_loaders_own_generator_has_no_say_in_which_batches_are_taken() -> None:
    def statistics(seed: int) -> torch.Tensor:
        seen: list[torch.Tensor] = []

        class Noting(Algorithm):
            events = frozenset({Event.EPOCH_START})

            def on(self, event: Event, state: State) -> None:
                seen.append(state.model[1].running_mean.clone())

        trainer = make_trainer(
            train_dataloader=make_loader(shuffle=True, seed=seed),
            algorithms=[BatchNormReestimation(count=1), Noting()],
            max_duration="1ep",
        )
        trainer.fit()
        return seen[0]

    assert torch.equal(statistics(3), statistics(4))


class Editing(Algorithm):
    events = frozenset({Event.BATCH_END})

    def on(self, event: Event, state: State) -> None:
        if state.clock.batch in (2, 4):
            state.edit(lambda m: surgery.slice_parameter(m, "0.bias", 0, range(8)))


def test_it_resumes_before_on_and_after_an_edit() -> None:
    def make(callbacks: list[Any]) -> Any:
        return make_trainer(
            make_model(dropout=0.2),
            train_dataloader=make_loader(shuffle=True),
            algorithms=[BatchNormReestimation(count=2), Editing()],
            callbacks=callbacks,
        )

    assert_resumes(make, [1, 2, 3, 4, 5])


@pytest.mark.slow
def test_a_loader_that_cannot_be_iterated_twice_at_once_is_refused() -> None:
    loader = DataLoader(make_dataset(), 8, num_workers=1, persistent_workers=True)
    trainer = make_trainer(
        train_dataloader=loader, algorithms=[BatchNormReestimation(count=1), Editing()]
    )
    with pytest.raises(DataError, match="persistent_workers"):
        trainer.fit()
