"""Two real processes, compared with one process on the same loader."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from compressor.training import Algorithm, Callback, Event, State, TaskModel, Trainer
from compressor.training.algorithms import EMA, SAM
from compressor.training.callbacks import EarlyStopping
from compressor.training.checkpoint import LATEST
from tests.training.helpers import (
    are_equal,
    cross_entropy,
    make_dataset,
    make_model,
    make_trainer,
    weights_of,
)
from tests.training.ranks import Results, run_ranks

pytestmark = pytest.mark.slow

SAMPLES = 29  # the last batch of eight has five: three and two


def make_plain_model(seed: int = 0) -> nn.Module:
    """Without a batch norm, whose statistics are those of a part of the batch."""
    model = make_model(seed)
    model[1] = nn.Identity()
    return model


class History(Callback):
    """Metrics of all epochs and evaluations, and what was called in place of the model."""

    events = frozenset({Event.EPOCH_END, Event.EVAL_END, Event.AFTER_STEP})

    def __init__(self) -> None:
        self.losses: list[dict[str, float]] = []
        self.metrics: list[dict[str, float]] = []
        self.is_wrapped: list[bool] = []

    def on(self, event: Event, state: State) -> None:
        if event is Event.EPOCH_END:
            self.losses.append(state.train_metrics)
        elif event is Event.EVAL_END:
            self.metrics.append(dict(state.metrics))
        else:
            self.is_wrapped.append(state.runner is not state.model)


def train(model: nn.Module | None = None, **options: Any) -> dict[str, Any]:
    """Losses, metrics and weights of a fit."""
    history = History()
    dataset = make_dataset(SAMPLES)
    options = {
        "train_dataloader": DataLoader(dataset, batch_size=8, shuffle=True),
        "eval_dataloader": DataLoader(dataset, batch_size=7),
        **options,
    }
    callbacks = [history, *options.pop("callbacks", [])]
    trainer = make_trainer(model or make_plain_model(), callbacks=callbacks, **options)
    trainer.fit()
    return {
        "losses": history.losses,
        "metrics": history.metrics,
        "is_wrapped": history.is_wrapped,
        "weights": weights_of(trainer.model),
        "clock": [trainer.state.clock.batch, trainer.state.clock.sample],
        "lr": trainer.state.optimizer.param_groups[0]["lr"],
    }


def assert_alike(results: list[Any], alone: dict[str, Any]) -> None:
    """Two processes have the same, to the bit, and it is what one has, up to rounding."""
    first, second = results
    assert are_equal(first["weights"], second["weights"])
    for name, value in alone["weights"].items():
        # 1e-6: float32 sums in another order
        torch.testing.assert_close(first["weights"][name], value, rtol=0, atol=1e-6)
    for kind in ("losses", "metrics"):
        assert first[kind] == second[kind]
        assert len(first[kind]) == len(alone[kind])
        for mine, other in zip(first[kind], alone[kind], strict=True):
            assert mine == pytest.approx(other, abs=1e-6)
    assert first["clock"] == second["clock"] == alone["clock"]
    assert first["lr"] == alone["lr"]


def train_map(rank: int, folder: Path) -> Any:
    return train(make_plain_model(seed=rank), save_dir=folder / f"run{rank}")  # rank 0 decides


def train_seeded(rank: int, folder: Path) -> Any:
    generator = torch.Generator().manual_seed(7)
    loader = DataLoader(
        make_dataset(SAMPLES), batch_size=8, shuffle=True, generator=generator, num_workers=1
    )
    return train(train_dataloader=loader, log_interval="2ba")


class Stream(IterableDataset[Any]):
    """The samples one after the other, in an order that the global generators decide."""

    def __iter__(self) -> Iterator[Any]:
        x, y = make_dataset(SAMPLES).tensors
        for index in torch.randperm(SAMPLES).tolist():
            yield x[index], y[index]


def train_stream(rank: int, folder: Path) -> Any:
    return train(train_dataloader=DataLoader(Stream(), batch_size=8))


def train_list(rank: int, folder: Path) -> Any:
    return train(train_dataloader=list(DataLoader(make_dataset(SAMPLES), batch_size=8)))


def train_in_parts(rank: int, folder: Path) -> Any:
    return train(micro_batch_size=2)


def train_one_left(rank: int, folder: Path) -> Any:
    """The last batch has one sample: none for rank 1."""
    loader = DataLoader(make_dataset(25), batch_size=8)
    return train(train_dataloader=loader)


def train_compiled(rank: int, folder: Path) -> Any:
    return train(compile={"backend": "aot_eager"})


def train_sharp(rank: int, folder: Path) -> Any:
    return train(algorithms=[SAM(0.1)])


class Counted(TaskModel):
    """A classifier whose own metrics are those of the whole set: F1 is no mean over batches."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_plain_model()
        self.metrics = {
            is_train: {
                "accuracy": MulticlassAccuracy(2, average="micro"),
                "f1": MulticlassF1Score(2),
            }
            for is_train in (True, False)
        }

    def forward(self, batch: Any) -> Tensor:
        out: Tensor = self.model(batch[0])
        return out

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])

    def get_metrics(self, is_train: bool = False) -> Any:
        return self.metrics[is_train]

    def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None:
        metric.update(outputs, batch[1])


def train_task(rank: int, folder: Path) -> Any:
    return train(Counted(), step=None)


ALIKE = (
    train_map,
    train_seeded,
    train_stream,
    train_list,
    train_in_parts,
    train_one_left,
    train_compiled,
    train_sharp,
    train_task,
)


def train_own_sampler(rank: int, folder: Path) -> Any:
    seen: list[list[int]] = []
    dataset = [(x, y, index) for index, (x, y) in enumerate(make_dataset(32))]
    loader = DataLoader(dataset, batch_size=4, sampler=DistributedSampler(dataset, seed=3))  # type: ignore[arg-type,var-annotated]

    def step(model: nn.Module, batch: Any) -> Any:
        seen.append(batch[2].tolist())
        return cross_entropy(model, batch)

    return {**train(train_dataloader=loader, eval_dataloader=None, step=step), "seen": seen}


class Unlike:
    """A loader that says that it gives each process its own batches, and not as many."""

    is_sharded = True

    def __init__(self, rank: int, size: int = 2) -> None:
        x, y = make_dataset(32).tensors
        first = size * rank
        self.batches = [(x[i + first :][:size], y[i + first :][:size]) for i in range(0, 32, 4)]
        self.batches += self.batches[:rank]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def train_unlike(rank: int, folder: Path) -> Any:
    return train(train_dataloader=Unlike(rank))


def train_other_batches(rank: int, folder: Path) -> Any:
    loader = Unlike(rank)
    loader.is_sharded = False
    try:
        train(train_dataloader=loader)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class Loaded(list[Any]):
    """A dataset that notes what is asked of it."""

    def __init__(self, samples: int) -> None:
        super().__init__(make_dataset(samples))
        self.asked: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.asked.append(index)
        return super().__getitem__(index)


def load_a_part(rank: int, folder: Path) -> Any:
    dataset = Loaded(SAMPLES)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=8, shuffle=True)  # type: ignore[arg-type]
    train(train_dataloader=loader, eval_dataloader=None, max_duration="1ep")
    return dataset.asked


class AtFitEnd(Callback):
    """The statistics that this process has come to."""

    events = frozenset({Event.FIT_END})

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def on(self, event: Event, state: State) -> None:
        self.buffers = {name: value.clone() for name, value in state.model.named_buffers()}


def train_norms(rank: int, folder: Path) -> Any:
    own = AtFitEnd()
    result = train(make_model(), callbacks=[own])
    return {**result, "own": own.buffers}


def train_averaged_norms(rank: int, folder: Path) -> Any:
    """Killed within an epoch, and resumed; and straight."""

    def make(name: str, *callbacks: Callback) -> Trainer:
        return make_trainer(
            make_model(dropout=0.5),
            train_dataloader=DataLoader(make_dataset(SAMPLES), batch_size=8, shuffle=True),
            eval_dataloader=DataLoader(make_dataset(SAMPLES), batch_size=7),
            algorithms=[EMA(0.5, period=3)],
            callbacks=list(callbacks),
            save_dir=folder / f"{name}{rank}",  # rank 1 never sees what rank 0 wrote
            save_interval="1ba",
            autoresume=True,
        )

    straight = make("a")
    straight.fit()
    try:
        make("b", Interrupt(3)).fit()
    except KeyboardInterrupt:
        pass
    resumed = make("b")
    resumed.fit()
    return [
        {"weights": weights_of(each.model), "losses": each.state.train_metrics}
        for each in (straight, resumed)
    ]


class Interrupt(Callback):
    """Ctrl-C after a batch."""

    events = frozenset({Event.BATCH_START})

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on(self, event: Event, state: State) -> None:
        if state.clock.batch == self.batch:
            raise KeyboardInterrupt


class HungryOnOne(nn.Module):
    """Runs out of memory on rank 1, above two samples."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.net = make_plain_model()

    def forward(self, x: Tensor) -> Tensor:
        if self.rank == 1 and len(x) > 2:
            torch.empty(2**60, dtype=torch.uint8)
        out: Tensor = self.net(x)
        return out


def train_hungry(rank: int, folder: Path) -> Any:
    trainer = make_trainer(HungryOnOne(rank), micro_batch_size="auto")
    trainer.fit()
    return {"size": trainer.micro_batch_size, "weights": weights_of(trainer.model.net)}  # type: ignore[arg-type]


class Branches(nn.Module):
    """Each rank uses a layer of its own, beside one that all use."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([make_plain_model(seed=1), make_plain_model(seed=2)])
        self.common = nn.Linear(2, 2)
        self.idle = nn.Linear(2, 2)
        self.rank = rank

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.common(self.layers[self.rank](x))
        return out


def train_branches(rank: int, folder: Path) -> Any:
    torch.manual_seed(0)
    model = Branches(rank)
    before = weights_of(model)
    after = train(model, max_duration="3ba", eval_dataloader=None)
    moved = {name for name, value in before.items() if (value != after["weights"][name]).any()}
    names = sorted({name.rpartition(".")[0] for name in moved})
    return {**after, "moved": names}


class Waking(nn.Module):
    """A layer that idles, and is used from the fifth call on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_plain_model()
        self.late = nn.Linear(4, 2, bias=False)
        nn.init.ones_(self.late.weight)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        out: Tensor = self.net(x)
        return out + self.late(x) if self.calls > 4 else out


def train_waking(rank: int, folder: Path) -> Any:
    return train(Waking(), eval_dataloader=None)


class Tiring(nn.Module):
    """A layer that is no longer used from the fifth call on."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_plain_model()
        self.early = nn.Linear(4, 2, bias=False)
        nn.init.ones_(self.early.weight)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.net(x)
        return out + self.early(x) if self.calls < 5 else out


def train_tiring(rank: int, folder: Path) -> Any:
    try:
        train(Tiring(), eval_dataloader=None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def train_tiring_apart(rank: int, folder: Path) -> Any:
    return train(Tiring(), eval_dataloader=None, micro_batch_size="auto")


class Freeze(Algorithm):
    """The first layer is frozen after four batches."""

    events = frozenset({Event.BATCH_START})

    def on(self, event: Event, state: State) -> None:
        state.model[0].requires_grad_(state.clock.batch < 4)  # type: ignore[index]


def train_freezing(rank: int, folder: Path) -> Any:
    return train(algorithms=[Freeze()])


def stop_in_different_ways(rank: int, folder: Path) -> Any:
    calls = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        calls.append(model)
        return {"loss": 1.0}

    stopping = EarlyStopping("loss", 1 if rank else 3, "min")
    trainer = make_trainer(
        make_plain_model(), callbacks=[stopping], evaluate=evaluate, max_duration="9ep"
    )
    trainer.fit()
    batches = list(DataLoader(make_dataset(), batch_size=8)) * 2000
    clocked = make_trainer(make_plain_model(), train_dataloader=batches, max_duration="1s")
    if rank:
        time.sleep(0.3)
    clocked.fit()
    state = trainer.state
    return [state.clock.epoch, state.metrics, clocked.state.clock.batch, len(calls)]


OTHERS = (
    train_own_sampler,
    train_unlike,
    train_other_batches,
    load_a_part,
    train_norms,
    train_averaged_norms,
    train_hungry,
    train_branches,
    train_waking,
    train_tiring,
    train_tiring_apart,
    train_freezing,
    stop_in_different_ways,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return run_ranks(folder, *ALIKE, *OTHERS)


@pytest.mark.parametrize("work", ALIKE)
def test_two_processes_train_like_one(work: Any, results: Results, tmp_path: Path) -> None:
    assert_alike(results.of(work), work(0, tmp_path))
    torch._dynamo.reset()


def test_the_model_is_wrapped_from_the_second_batch_on(results: Results) -> None:
    for work in (train_map, train_in_parts, train_sharp):
        for result in results.of(work):
            assert result["is_wrapped"] == [False, *[True] * 7]


def test_nothing_wraps_the_model_of_one_process(tmp_path: Path) -> None:
    assert not any(train_map(0, tmp_path)["is_wrapped"])


def test_only_rank_0_writes(results: Results, folder: Path) -> None:
    assert (folder / "train_map" / "run0" / LATEST).exists()
    assert not (folder / "train_map" / "run1").exists()


def test_a_distributed_sampler_is_left_alone_and_told_the_epoch(results: Results) -> None:
    first, second = results.of(train_own_sampler)
    assert are_equal(first["weights"], second["weights"])
    assert first["losses"] == second["losses"]
    assert first["clock"] == [8, 64]
    for epoch in (slice(0, 4), slice(4, 8)):
        seen = [
            index for each in (first, second) for batch in each["seen"][epoch] for index in batch
        ]
        assert sorted(seen) == list(range(32))
    assert first["seen"][:4] != first["seen"][4:]


def test_a_loader_may_shard_itself_and_ends_for_all_when_one_has_no_batch_left(
    results: Results, tmp_path: Path
) -> None:
    assert_alike(results.of(train_unlike), train(train_dataloader=Unlike(0, size=4)))


def test_batches_that_differ_between_processes_are_an_error(results: Results) -> None:
    for message in results.of(train_other_batches):
        assert message.startswith("DataError")
        assert "is_sharded" in message


def test_a_process_loads_only_its_part(results: Results) -> None:
    first, second = results.of(load_a_part)
    assert [len(first), len(second)] == [4 + 4 + 4 + 3, 4 + 4 + 4 + 2]
    assert sorted(first + second) == list(range(SAMPLES))


def test_statistics_of_batch_norms_are_the_mean_of_all(results: Results) -> None:
    first, second = results.of(train_norms)
    assert are_equal(first["weights"], second["weights"])
    assert not torch.equal(first["own"]["1.running_mean"], second["own"]["1.running_mean"])
    for name in ("1.running_mean", "1.running_var"):
        mean = (first["own"][name] + second["own"][name]) / 2
        torch.testing.assert_close(first["weights"][name], mean, rtol=0, atol=1e-6)
    assert first["weights"]["1.num_batches_tracked"] == 8


def test_processes_go_on_bit_equal_within_an_epoch(results: Results) -> None:
    for straight, resumed in results.of(train_averaged_norms):
        assert are_equal(straight["weights"], resumed["weights"])
        assert straight["losses"] == resumed["losses"]


def test_processes_agree_when_one_runs_out_of_memory(results: Results) -> None:
    first, second = results.of(train_hungry)
    assert [first["size"], second["size"]] == [2, 2]
    alone = make_trainer(make_plain_model())
    alone.fit()
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(first["weights"][name], value, rtol=0, atol=1e-6)


def test_a_layer_that_only_one_process_uses_is_trained_alike_in_both(results: Results) -> None:
    first, second = results.of(train_branches)
    assert first["moved"] == ["common", *[f"layers.{i}.{j}" for i in (0, 1) for j in (0, 4)]]
    assert are_equal(first["weights"], second["weights"])
    assert first["is_wrapped"] == [False] * 3


def test_a_layer_that_idles_at_first_is_trained_later(results: Results, tmp_path: Path) -> None:
    assert_alike(results.of(train_waking), train_waking(0, tmp_path))
    assert all(results.of(train_waking)[0]["is_wrapped"][1:])


def test_a_layer_that_is_used_no_longer_is_named(results: Results) -> None:
    for message in results.of(train_tiring):
        assert message.startswith("ConfigError: 'early.weight' got no gradient")
        assert "micro_batch_size='auto'" in message


def test_it_may_be_so_where_gradients_travel_apart(results: Results, tmp_path: Path) -> None:
    assert_alike(results.of(train_tiring_apart), train_tiring_apart(0, tmp_path))


def test_freezing_within_a_fit_is_followed(results: Results, tmp_path: Path) -> None:
    assert_alike(results.of(train_freezing), train_freezing(0, tmp_path))
    assert results.of(train_freezing)[0]["is_wrapped"] == [False, *[True] * 3] * 2


def test_processes_end_together(results: Results) -> None:
    (epochs, metrics, batches, calls), second = results.of(stop_in_different_ways)
    assert [epochs, metrics] == [2, {"loss": 1.0}]
    assert second == [epochs, metrics, batches, 0]
    assert calls == 2  # rank 0 alone
