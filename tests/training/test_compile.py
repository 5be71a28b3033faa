from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compressor.structure import cutting
from compressor.training import Algorithm, Event, State, Trainer
from compressor.training.algorithms import EMA, Distillation
from compressor.training.checkpoint import LATEST, read_checkpoint
from tests.training.helpers import HIDDEN, make_model, make_trainer, weights_of

pytestmark = pytest.mark.slow


class Narrowing(Algorithm):
    events = frozenset({Event.BATCH_END})

    def on(self, event: Event, state: State) -> None:
        if state.clock.batch == 3:
            state.edit(lambda model: cutting.keep_channels(model, HIDDEN, (0, 2, 3, 5)))


def train(folder: Path, compile: Any) -> Trainer:
    trainer = make_trainer(
        optimizers={"name": "SGD", "lr": 0.1, "momentum": 0.9},
        algorithms=[Distillation(make_model(seed=5)), EMA(0.9, period=3), Narrowing()],
        eval_dataloader=[(torch.randn(4, 4), torch.zeros(4).long())],
        compile=compile,
        save_dir=folder,
    )
    trainer.fit()
    return trainer


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_trains_like_the_plain_one_with_edits_and_listeners(
    tmp_path: Path, backend: str
) -> None:
    plain, compiled = train(tmp_path / "a", False), train(tmp_path / "b", {"backend": backend})
    assert compiled.model[0].weight.shape == (4, 4)  # type: ignore[index,union-attr]
    for name, value in weights_of(plain.model).items():
        # 1e-5: fused kernels round differently, over 8 steps
        torch.testing.assert_close(compiled.model.state_dict()[name], value, rtol=0, atol=1e-5)
    saved = read_checkpoint(tmp_path / "b" / LATEST)["model"]
    assert saved.keys() == plain.model.state_dict().keys()
    torch._dynamo.reset()
