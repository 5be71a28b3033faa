from __future__ import annotations

import subprocess
import sys

import pytest

from compressor.training import tasks


@pytest.mark.parametrize("name", tasks.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(tasks, name) is not None
    assert name in dir(tasks)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Classifier'"):
        tasks.Classifier  # noqa: B018


@pytest.mark.slow
def test_importing_the_tasks_loads_nothing_that_few_need() -> None:
    source = """
import sys
import compressor.training.tasks
print([n for n in ("torchmetrics", "transformers", "timm", "pycocotools") if n in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stderr
