"""Two real processes: what they tell each other, and gradients that become their mean."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from compressor.distributed import SingleProcess, alone, current_context
from compressor.distributed.replicas import Wrapped
from tests.training.ranks import Results, run_ranks


def talk(rank: int, folder: Path) -> Any:
    context = current_context()
    own = [torch.full((2,), float(rank)), torch.tensor([rank == 0]), torch.tensor(rank)]
    own.append(torch.full((1, 2), float(rank), dtype=torch.bfloat16))
    own.append(torch.tensor([1j * rank]))
    context.broadcast(own)
    means = [torch.tensor([float(rank)]), torch.tensor([3.0 * rank], dtype=torch.bfloat16)]
    context.average([*means, torch.zeros(0)])
    context.barrier()
    return {
        "who": [context.rank, context.world_size, context.is_main],
        "most": context.most(0.1 * rank),
        "infinite": context.most(float("inf") if rank else 0.0),
        "total": list(context.total({"a": rank + 1.0, f"only {rank}": 1.0}).items()),
        "gather": context.gather({"rank": rank}),
        "share": context.share(f"from {rank}"),
        "broadcast": own,
        "average": [each.tolist() for each in means],
    }


def stand_alone(rank: int, folder: Path) -> Any:
    """Rank 0 computes with what waits for others when it can."""
    from torchmetrics.classification import MulticlassAccuracy

    context = current_context()
    value = 0.0
    if rank == 0:
        with alone():
            assert isinstance(current_context(), SingleProcess)
            metric = MulticlassAccuracy(2)
            metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
            value = float(metric.compute())
            assert context.rank == 0
    return context.share(value)


class Net(nn.Module):
    """Two layers, one that idles, one parameter of the root; a method beside `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(1))
        self.unused = nn.Parameter(torch.ones(1))
        self.config = {"width": 2}

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x)

    def score(self, x: Tensor) -> Tensor:
        out: Tensor = self.scale * self.second(self.first(x).relu())
        return out


def make_net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches() -> Tensor:
    """For two processes, three batches of two samples."""
    return torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(1))


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def mean_gradients(call: Callable[[nn.Module, Tensor], Tensor]) -> list[dict[str, Tensor]]:
    """Of each batch of both processes, computed in one."""
    found = []
    for batch in batches():
        net = make_net()
        (sum(call(net, own).sum() for own in batch) / 2).backward()  # type: ignore[union-attr]
        found.append(gradients(net))
    return found


def by_forward(net: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = net(x)
    return out


def by_method(net: nn.Module, x: Tensor) -> Tensor:
    assert net.config["width"] == 2  # type: ignore[index]
    out: Tensor = net.score(x)  # type: ignore[operator]
    return out


def train_by(rank: int, call: Callable[[nn.Module, Tensor], Tensor], parts: int = 1) -> Any:
    net = make_net()
    replica = current_context().replicate(net)
    found, kinds = [], []
    for batch in batches():
        runner = replica.runner
        kinds.append(type(runner).__name__)
        for number in range(parts):
            with replica.accumulating(number == parts - 1):
                (call(runner, batch[rank]).sum() / parts).backward()
        replica.finish()
        found.append(gradients(net))
        net.zero_grad(set_to_none=True)
    replica.close()
    return {"gradients": found, "kinds": kinds}


def reduce_forward(rank: int, folder: Path) -> Any:
    return train_by(rank, by_forward)


def reduce_parts(rank: int, folder: Path) -> Any:
    return train_by(rank, by_forward, parts=3)


def reduce_method(rank: int, folder: Path) -> Any:
    return train_by(rank, by_method)


def reduce_at_the_end(rank: int, folder: Path) -> Any:
    """No micro-batch is the last: nothing may travel before all is known to fit."""
    net = make_net()
    replica = current_context().replicate(net)
    found = []
    for batch in batches():
        with replica.accumulating(False):
            replica.runner(batch[rank]).sum().backward()
        found.append(type(replica.runner).__name__)
        replica.finish()
    return found


def close_and_go_on(rank: int, folder: Path) -> Any:
    """Wrapped, closed, and wrapped anew: nothing is reduced twice, nothing is left."""
    net = make_net()
    context = current_context()
    replica = context.replicate(net)
    for batch in batches()[:2]:
        with replica.accumulating(True):
            replica.runner(batch[rank]).sum().backward()
        replica.finish()
    assert isinstance(replica.runner, Wrapped)
    replica.close()
    net.zero_grad(set_to_none=True)
    net(batches()[0, rank]).sum().backward()  # of this process alone, as `runner` is not called
    own = gradients(net)
    net.zero_grad(set_to_none=True)
    replica = context.replicate(net)
    found = []
    for batch in batches():
        with replica.accumulating(True):
            replica.runner(batch[rank]).sum().backward()
        replica.finish()
        found.append(gradients(net))
        net.zero_grad(set_to_none=True)
    replica.close()
    del replica
    gc.collect()
    left = [each for each in gc.get_objects() if isinstance(each, Wrapped)]
    marks = [name for name in vars(net) if "ddp" in name]
    marks += [name for each in net.parameters() for name in vars(each) if "ddp" in name]
    return {"own": own, "gradients": found, "left": len(left), "marks": marks}


def reduce_sparse(rank: int, folder: Path) -> Any:
    torch.manual_seed(0)
    net = nn.EmbeddingBag(6, 2, sparse=True)
    replica = current_context().replicate(net)
    found = []
    for _ in range(2):
        with replica.accumulating(True):
            replica.runner(torch.tensor([[rank, rank + 1]])).sum().backward()
        replica.finish()
        assert net.weight.grad is not None
        found.append(net.weight.grad.to_dense())
        net.zero_grad(set_to_none=True)
    return found


WORKS = (
    talk,
    stand_alone,
    reduce_forward,
    reduce_parts,
    reduce_method,
    reduce_at_the_end,
    close_and_go_on,
    reduce_sparse,
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks(tmp_path_factory.mktemp("context"), *WORKS)


def assert_equal(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for mine, other in zip(found, expected, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-6)  # float32


@pytest.mark.slow
def test_what_is_said_is_heard(results: Results) -> None:
    first, second = results.of(talk)
    assert [first.pop("who"), second.pop("who")] == [[0, 2, True], [1, 2, False]]
    assert first["most"] == second["most"] == 0.1
    assert first["infinite"] == second["infinite"] == float("inf")
    assert first["total"] == second["total"] == [("a", 3.0), ("only 0", 1.0), ("only 1", 1.0)]
    assert first["gather"] == second["gather"] == [{"rank": 0}, {"rank": 1}]
    assert first["share"] == second["share"] == "from 0"
    assert first["average"] == second["average"] == [[0.5], [1.5]]
    for mine, other in zip(first["broadcast"], second["broadcast"], strict=True):
        assert torch.equal(mine, other)
    assert first["broadcast"][1].tolist() == [True]


@pytest.mark.slow
def test_metrics_do_not_wait_for_others_alone(results: Results) -> None:
    assert results.of(stand_alone) == [1.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("work", [reduce_forward, reduce_parts, reduce_method])
def test_gradients_become_the_mean(work: Any, results: Results) -> None:
    expected = mean_gradients(by_forward)
    for result in results.of(work):
        assert_equal(result["gradients"], expected)
        assert result["kinds"] == ["Net", "Wrapped", "Wrapped"]


@pytest.mark.slow
def test_a_batch_without_a_last_part_is_not_sent_while_it_is_computed(results: Results) -> None:
    assert results.of(reduce_at_the_end) == [["Net"] * 3] * 2


@pytest.mark.slow
def test_a_replica_that_is_closed_leaves_nothing_behind(results: Results) -> None:
    expected = mean_gradients(by_forward)
    for rank, result in enumerate(results.of(close_and_go_on)):
        net = make_net()
        net(batches()[0, rank]).sum().backward()
        assert_equal([result["own"]], [gradients(net)])
        assert_equal(result["gradients"], expected)
        assert result["left"] == 0
        assert result["marks"] == []


@pytest.mark.slow
def test_sparse_gradients_become_the_mean(results: Results) -> None:
    expected = torch.zeros(6, 2)
    expected[0] = expected[2] = 0.25  # each a half of a bag of two, seen by one of two processes
    expected[1] = 0.5
    for result in results.of(reduce_sparse):
        for gradient in result:
            assert torch.equal(gradient, expected)


def test_one_process_is_left_alone() -> None:
    context = current_context()
    assert isinstance(context, SingleProcess)
    net = make_net()
    replica = context.replicate(net)
    assert replica.runner is net
    with replica.accumulating(True):
        replica.runner(batches()[0, 0]).sum().backward()
    before = gradients(net)
    replica.finish()
    replica.close()
    assert_equal([gradients(net)], [before])
    assert context.gather(3) == [3]
    assert context.total({"a": 1.0}) == {"a": 1.0}
    assert dist.is_initialized() is False
