"""Two real processes of horovodrun over Gloo, compared with one on the same batches."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compressor
from compressor.distributed import horovod_context
from compressor.distributed.horovod_context import require_horovod
from compressor.distributed.horovod_replica import Travel
from compressor.errors import ConfigError
from tests.distributed.horovod_ranks import WORK, batch_of, make_net
from tests.training.helpers import are_equal, make_dataset, make_trainer

ROOT = Path(compressor.__file__).parents[1]
Results = list[dict[str, Any]]

needs_horovod = pytest.mark.skipif(
    shutil.which("horovodrun", path=sysconfig.get_path("scripts")) is None,
    reason="python -m compressor.distributed.build_horovod installs it",
)


HOROVODRUN = ("horovodrun", "-np", "2", "--gloo", "--disable-cache")


def start(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command at its end."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    return subprocess.run(
        command,
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": path,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )


def run(*command: str, **environment: str) -> str:
    """What a command says that ends well."""
    done = start(*command, **environment)
    assert not done.returncode, done.stdout[-8000:]
    return done.stdout


def run_ranks(folder: Path, *works: str) -> Results:
    """What `horovod_ranks` saved of these works, by rank."""
    command = (sys.executable, "-m", "tests.distributed.horovod_ranks", str(folder), *works)
    run(*HOROVODRUN, *command)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All but the engine."""
    works = [name for name in WORK if name != "compress_tiny"]
    return run_ranks(tmp_path_factory.mktemp("horovod"), *works)


def gradient_alone(model: nn.Module, *, only: tuple[int, ...] = (0, 1)) -> dict[str, Tensor]:
    """Of the mean over both ranks' batches, in this process; the others of `only` count 0."""
    model.zero_grad()
    for rank in only:
        x, y = batch_of(rank)
        (F.cross_entropy(model(x), y) / 2).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Any], expected: dict[str, Tensor], atol: float = 1e-6) -> None:
    """1e-6: float32 sums in another order."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol)


@pytest.mark.slow
@needs_horovod
class TestTwoRanks:
    def test_values_reach_all(self, ranks: Results) -> None:
        talks = [each["talk"] for each in ranks]
        assert [talk["rank"] for talk in talks] == [0, 1]
        assert [talk["is_main"] for talk in talks] == [True, False]
        for talk in talks:
            assert talk["size"] == 2
            assert not talk["splits"]
            assert talk["most"] == 1.0
            assert talk["total"] == {"a": 2.0, "b0": 0.0, "b1": 1.0}
            assert talk["order"] == ["b0", "a", "b1"]
            assert talk["gather"] == [{"text": "x"}, {"text": "x" * 100}]
            assert talk["kinds"] == [1, "text"]
            assert talk["share"] == [1, "a", None]
            assert talk["is_current"] == "HorovodContext"

    def test_tensors_of_all_types_become_those_of_rank_0(self, ranks: Results) -> None:
        first, second = (each["talk"]["sent"] for each in ranks)
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other)
        assert second[1].tolist() == [True, False]
        assert second[2].tolist() == [0, 2**40]
        assert second[3].tolist() == [1.5, 1.5]

    def test_tensors_become_their_mean(self, ranks: Results) -> None:
        for each in ranks:
            assert all(bool((tensor == 0.5).all()) for tensor in each["talk"]["averages"])

    def test_gradients_are_the_mean_of_both_batches(self, ranks: Results) -> None:
        expected = gradient_alone(make_net())
        for each in ranks:
            for found in each["reduce"]:
                assert_close(found, expected)
            assert_close(each["reduce_all_at_once"], expected)

    def test_gradients_travel_in_16_bits_if_asked(self, ranks: Results) -> None:
        expected = gradient_alone(make_net())
        for each in ranks:
            halves = each["reduce_in_halves"]["halves"]
            assert_close(halves, expected, atol=1e-3)  # 2^-11 of values below 1
            assert all(torch.equal(grad, grad.half().float()) for grad in halves.values())
            assert_close(each["reduce_in_halves"]["whole"], expected)
            assert not are_equal(halves, each["reduce_in_halves"]["whole"])

    def test_a_gradient_that_no_rank_has_stays_away(self, ranks: Results) -> None:
        a, b = make_net(0), make_net(1)
        both = {f"a.{name}": grad for name, grad in gradient_alone(a).items()}
        one = {f"b.{name}": grad for name, grad in gradient_alone(b, only=(0,)).items()}
        all_of_b = {f"b.{name}": grad for name, grad in gradient_alone(b).items()}
        for each in ranks:
            results = each["leave_out"]
            assert_close(with_gradient(results["first"]), {**both, **one})
            assert_close(with_gradient(results["frozen"]), all_of_b)
            assert_close(with_gradient(results["thawed"]), {**both, **all_of_b})

    def test_after_surgery_all_have_the_values_of_rank_0(self, ranks: Results) -> None:
        first, second = (each["rebuild"]["weights"] for each in ranks)
        assert are_equal(first, second)
        assert torch.equal(first["2.bias"], make_net()[2].bias)

    def test_after_surgery_gradients_are_reduced_once(self, ranks: Results) -> None:
        model = make_net()
        model.load_state_dict(ranks[0]["rebuild"]["weights"])
        expected = gradient_alone(model)
        for each in ranks:
            for found in each["rebuild"]["gradients"]:
                assert_close(found, expected)

    def test_a_fit_is_that_of_one_process_on_batches_twice_as_large(self, ranks: Results) -> None:
        alone = make_trainer(
            make_net(),
            train_dataloader=torch.utils.data.DataLoader(make_dataset(), batch_size=16),
            evaluate=lambda model: {"loss": float(loss_of(model))},
        )
        alone.fit()
        for each in ranks:
            found = each["fit"]
            assert are_equal(found["weights"], ranks[0]["fit"]["weights"])
            assert_close(found["weights"], alone.model.state_dict())
            assert found["losses"] == pytest.approx(alone.state.train_metrics, abs=1e-6)
            assert found["metrics"] == pytest.approx(alone.state.metrics, abs=1e-6)
            assert found["samples"] == alone.state.clock.sample == 64

    def test_both_go_on_alike_after_surgery_within_a_fit(self, ranks: Results) -> None:
        first, second = (each["fit_with_surgery"] for each in ranks)
        assert are_equal(first, second)
        assert not torch.equal(first["0.weight"], make_net(seed=7)[0].weight)  # it was trained

    def test_the_rate_rises_to_that_of_one_process_times_two(self, ranks: Results) -> None:
        for each in ranks:
            rates = each["recover"]["rates"]
            assert len(rates) == 80
            assert rates[:5] == pytest.approx([0.1, 0.125, 0.15, 0.175, 0.2])
            assert rates[5:] == pytest.approx([0.2] * 75)
            assert each["recover"]["epochs"] == 40

    def test_only_rank_0_writes(self, ranks: Results) -> None:
        assert [each["recover"]["wrote"] for each in ranks] == [True, False]
        assert are_equal(*(each["recover"]["weights"] for each in ranks))


@pytest.mark.slow
@needs_horovod
def test_the_engine_gives_all_processes_the_same_certified_model(tmp_path: Path) -> None:
    first, second = (each["compress_tiny"] for each in run_ranks(tmp_path, "compress_tiny"))
    assert first["plan"] == second["plan"]
    assert first["choices"], "nothing was cut"
    assert first["certificate"] == second["certificate"]
    assert are_equal(first["weights"], second["weights"])
    assert first["measured"] == pytest.approx(first["certified"])
    assert first["certified"] > first["reference"] - 15.0
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
@needs_horovod
def test_a_process_that_dies_ends_the_other() -> None:
    source = """
import os, signal
from compressor.distributed.horovod_context import require_horovod
context = require_horovod()
context.gather("met")
if context.rank:
    os.kill(os.getpid(), signal.SIGKILL)
context.gather("never")
print("went on")
"""
    began = time.monotonic()
    done = start(*HOROVODRUN, sys.executable, "-c", source)
    assert done.returncode
    assert "went on" not in done.stdout
    assert "Process name: 1" in done.stdout  # which was the first
    assert time.monotonic() - began < 60


@pytest.mark.slow
@needs_horovod
def test_under_plain_python_there_is_one_process_and_a_hint() -> None:
    source = """
import compressor.logs
from compressor.distributed.horovod_context import require_horovod
compressor.logs.set_verbosity("info")
print(type(require_horovod()).__name__, type(require_horovod()).__name__)
"""
    said = run(sys.executable, "-c", source)
    assert "SingleProcess SingleProcess" in said
    assert "horovodrun -np N" in said


@pytest.mark.slow
@needs_horovod
def test_processes_that_torchrun_started_are_refused() -> None:
    source = """
from compressor.distributed.horovod_context import require_horovod
from compressor.errors import ConfigError
try:
    require_horovod()
except ConfigError as error:
    print(error)
"""
    said = run(sys.executable, "-c", source, WORLD_SIZE="2")
    assert "torchrun started 2 processes. Start them with `horovodrun" in said


def test_what_horovod_takes_is_sent_as_it_is() -> None:
    gradient = torch.randn(3, 4)
    sent, whole = Travel(halves=False, stays_on_gpu=False).compress(gradient)
    assert sent is gradient
    assert whole is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("halves", [False, True])
def test_what_was_sent_otherwise_comes_back_as_it_was(dtype: torch.dtype, halves: bool) -> None:
    gradient = torch.arange(48.0).reshape(1, 3, 4, 4).to(dtype)
    gradient = gradient.to(memory_format=torch.channels_last)
    strides, expected = gradient.stride(), gradient.clone() / 2
    travel = Travel(halves=halves, stays_on_gpu=False)
    sent, whole = travel.compress(gradient)
    assert sent.is_contiguous()
    assert sent.dtype is not torch.bfloat16
    assert (sent.dtype is torch.float16) == halves
    back = travel.decompress(sent / 2, whole)
    assert back is gradient
    assert gradient.stride() == strides
    assert torch.equal(gradient, expected)  # such numbers fit into 16 bits


@pytest.mark.parametrize("missing", ["horovod", "horovod.torch"])
def test_without_horovod_the_error_names_the_script(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def fail(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(horovod_context.importlib, "import_module", fail)
    with pytest.raises(ConfigError, match=r"python -m compressor\.distributed\.build_horovod"):
        require_horovod()


def test_a_horovod_of_another_torch_is_to_be_built_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(horovod_context.importlib, "import_module", fail)
    with pytest.raises(ConfigError, match=r"undefined symbol: _ZN3c10\. Build it for this torch"):
        require_horovod()


def with_gradient(found: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: grad for name, grad in found.items() if grad is not None}


def loss_of(model: nn.Module) -> Tensor:
    x, y = make_dataset().tensors
    return F.cross_entropy(model(x), y)
