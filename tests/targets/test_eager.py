"""What ships from torch is a packed archive, so zeros and palettes pay there."""

from __future__ import annotations

from pathlib import Path

import torch

from compressor.interfaces.inputs import ModelInputs
from compressor.structure.archive import WEIGHTS_FILE, save
from compressor.structure.trace import copy_model
from compressor.targets import EagerTarget
from compressor.testing.models import TinyMLP

INPUTS = ModelInputs((torch.zeros(1, 64),))


def test_its_size_is_that_of_the_weights_on_disk(tmp_path: Path) -> None:
    model = TinyMLP()
    smaller = copy_model(model)
    with torch.no_grad():
        smaller.fc1.weight[:, ::2] = 0
    sizes = []
    for each in (model, smaller):
        save(each, tmp_path, reference=model)
        sizes.append(EagerTarget().deploy(each, INPUTS, tmp_path).size_bytes)
        assert sizes[-1] == (tmp_path / WEIGHTS_FILE).stat().st_size
    entries = model.fc1.weight.numel()
    saved = entries / 2 * 4 - entries / 8
    assert abs(sizes[0] - sizes[1] - saved) < 100  # the header grows by an entry
    assert EagerTarget.stores_compact
