"""The scenes say where their digits are, and those that are judged on were not trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import their neighbours by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_boxes_and_labels_are_those_of_the_masks() -> None:
    from digit_scenes import SIZE, make_scenes

    scenes = make_scenes(20, "train")
    assert scenes.images.shape == (20, 1, SIZE, SIZE)
    for mask, boxes, labels in zip(scenes.masks, scenes.boxes, scenes.labels, strict=True):
        assert 1 <= len(boxes) == len(labels) <= 3
        assert set(labels.tolist()) == set(mask.unique().tolist()) - {0}
        drawn = torch.zeros_like(mask, dtype=torch.bool)
        for (left, top, right, bottom), label in zip(boxes.int().tolist(), labels, strict=True):
            inside = mask[top:bottom, left:right] == label
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            drawn[top:bottom, left:right] = True
        assert not mask[~drawn].any()


def test_ink_is_bright_where_the_mask_says_so() -> None:
    from digit_scenes import make_scenes

    scenes = make_scenes(20, "test")
    inked = scenes.masks > 0
    assert scenes.images[:, 0][inked].mean() > 0.6
    assert scenes.images[:, 0][~inked].mean() < 0.05


def test_the_same_seed_makes_the_same_scenes_of_other_digits_for_the_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import digit_scenes

    first, second = digit_scenes.make_scenes(4, "train"), digit_scenes.make_scenes(4, "train")
    assert torch.equal(first.images, second.images)
    used: dict[str, set[bytes]] = {"train": set(), "test": set()}

    def note(rng: object, stamps: np.ndarray, kinds: np.ndarray) -> tuple[torch.Tensor, ...]:
        del rng, kinds
        used[split].update(stamp.tobytes() for stamp in stamps)
        return torch.zeros(1), torch.zeros(1), torch.zeros(1), torch.zeros(1)

    monkeypatch.setattr(digit_scenes, "make_scene", note)
    for split in used:
        digit_scenes.make_scenes(1, split)
    assert len(used["train"]) + len(used["test"]) > 1700
    assert used["train"].isdisjoint(used["test"])
