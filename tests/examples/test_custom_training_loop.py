"""The example's own loop, and no other, trains what the engine prunes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from compressor.training.trainer import Trainer
from tests.examples import scripts


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return scripts.load("custom_training_loop", monkeypatch)


def test_a_batch_is_moved_by_up_to_a_pixel(example: ModuleType) -> None:
    images = torch.rand(3, 1, 8, 8)
    seen = set()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(60):
            moved = example.moved(images)
            middle = moved[:, :, 2:6, 2:6]
            found = [
                (row, column)
                for row in (1, 2, 3)
                for column in (1, 2, 3)
                if torch.equal(middle, images[:, :, row : row + 4, column : column + 4])
            ]
            assert len(found) == 1
            seen.update(found)
    assert len(seen) == 9


@pytest.mark.slow
def test_the_loop_trains_every_variant(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, float, bool]] = []
    fit = example.DigitsLoop.fit

    def watched(self: object, model: torch.nn.Module, settings: object) -> torch.nn.Module:
        told.append((settings.epochs, settings.lr, settings.validation))  # type: ignore[attr-defined]
        return fit(self, model, settings)  # type: ignore[no-any-return]

    monkeypatch.setattr(example.DigitsLoop, "fit", watched)
    fits: list[int] = []
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: fits.append(1))
    result = scripts.run(example, "--delta", 20, "--run-dir", tmp_path)
    assert told[0] == (4, 0.05, True), "the reference"
    assert told[1] == (1, 0.01, False), "a fine-tuning"
    assert set(told[2:]) <= {(4, 0.05, False), (1, 0.01, False)}
    assert not fits
    assert result.certificate.macs_ratio > 1
