"""The code in the documentation runs, page by page from top to bottom."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import compressor
from compressor import Config, load
from compressor.techniques import TECHNIQUES
from compressor.testing.models import TinyResNet
from docs.code_blocks import does_something
from docs.examples_page import examples
from docs.generate import FOLDERS, PAGES, stale_pages
from docs.reference import REFERENCE
from tests.docs.pages import (
    FOLDER,
    ROOT,
    all_blocks,
    blocks,
    links,
    name,
    pages,
    programs,
)

LANGUAGES = {"python", "pycon", "bash", "text", "yaml", "json"}
LEAST_PROGRAMS = 90  # see docs.code_blocks; CONTRIBUTING.md says how many there are

# Of these the blocks are a line or two, the same on each page: they run in one test.
MANY = [page for page in pages() if page.parent.name in FOLDERS]
CONFIGURATIONS = [FOLDER / "distributed" / file for file in ("workstation.md", "ray.md")]
GUIDES = [
    page
    for page in pages()
    if blocks(page, "python") and page not in (*MANY, *CONFIGURATIONS, ROOT / "README.md")
]

# What README shows is a job of hours on a GPU; here it is the same job in seconds on a CPU.
SMALLER = {
    '"device": "GPU"': '"device": "CPU"',
    'device="GPU"': 'device="CPU"',
    '"level": 2': '"budget": {"trials": 1}, "techniques": ["block_removal"], "run_dir": "run"',
    '"optimization": "latency"': '"optimization": "macs", "target": {"runtime": "eager"}',
    '"delta": 1.0': '"delta": 1.0, "export": {"format": []}',
    '"epochs": 50': '"epochs": 1',
    'max_duration="30ep"': 'max_duration="1ep"',
}


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_every_block_of_a_guide_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = dict(TECHNIQUES._classes)  # a guide registers one of its own
    monkeypatch.setattr(TECHNIQUES, "_classes", known)
    run(page, {})


def test_every_block_of_the_pages_made_from_the_code_runs() -> None:
    for page in MANY:
        run(page, {})


@pytest.mark.parametrize("page", CONFIGURATIONS, ids=name)
def test_the_configurations_of_the_guides_to_several_processes_are_taken(page: Path) -> None:
    namespace = run(page, {})
    config = Config.from_dict(namespace["config"])  # type: ignore[arg-type]
    assert config.executor.kind == "ray"


@pytest.mark.slow
def test_every_block_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = run(ROOT / "README.md", readers_own(), SMALLER)
    inputs = namespace["inputs"]
    torch.testing.assert_close(load("small", TinyResNet())(inputs), namespace["small"](inputs))
    assert (tmp_path / "model_int8.onnx").exists()
    assert namespace["trainer"].state.clock.epoch == 1  # type: ignore[attr-defined]


def test_blocks_say_their_language_and_are_many() -> None:
    unknown = [
        f"{name(page)}: {block.language!r}, {block.text[:40]!r}"
        for page in pages()
        for block in all_blocks(page)
        if block.language not in LANGUAGES
    ]
    assert not unknown
    count = sum(len(programs(page)) for page in pages())
    assert count >= LEAST_PROGRAMS
    assert f"\n{count} blocks on " in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize(
    ("text", "is_program"),
    [
        ("from torch import nn\nimport compressor", False),
        ('config = {"techniques": ["sparsity"]}', False),
        ("import torch\nx = torch.eye(2)", True),
        ("engine.run()", True),
    ],
)
def test_imports_and_options_alone_are_no_program(text: str, is_program: bool) -> None:
    assert does_something(text) is is_program


@pytest.mark.parametrize("page", PAGES)
def test_pages_made_from_the_code_are_up_to_date(page: str) -> None:
    assert (FOLDER / page).read_text() == PAGES[page](), "run python -m docs.generate"


def test_every_public_name_is_in_the_reference() -> None:
    described = {name for page in REFERENCE.values() for name in page.names}
    assert set(compressor.__all__) - described == {"__version__"}


@pytest.mark.parametrize("page", [ROOT / "README.md", FOLDER / "examples.md"], ids=name)
def test_every_example_is_linked(page: Path) -> None:
    linked = {Path(link.target).name for link in links(page) if "examples/" in link.target}
    assert len(examples()) >= 10
    assert {path.name for path in examples()} <= linked


def test_no_page_is_of_something_that_is_no_longer_there() -> None:
    assert not stale_pages()


def run(
    page: Path, namespace: dict[str, object], replaced: dict[str, str] | None = None
) -> dict[str, object]:
    """Execute the Python blocks of a page in one namespace, which is returned."""
    namespace["__name__"] = "guide"
    text = page.read_text()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for old in replaced or {}:
            assert old in text, f"{name(page)} no longer has {old}"
        for number, block in enumerate(blocks(page, "python")):
            for old, new in (replaced or {}).items():
                block = block.replace(old, new)
            code = compile(block, f"{name(page)}, block {number + 1}", "exec")
            exec(code, namespace)
    return namespace


def readers_own() -> dict[str, object]:
    """What README's blocks take for granted: a model, data, a loss and an evaluation."""
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, TensorDataset

    from compressor import EvaluationFunction, LossFunction

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train = TensorDataset(images[:256], labels[:256])
    test = TensorDataset(images[1600:], labels[1600:])

    class MyLoss(LossFunction):
        def __call__(self, model, batch):  # type: ignore[no-untyped-def]
            return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    class MyEval(EvaluationFunction):
        def apply(self, model, data_loader):  # type: ignore[no-untyped-def]
            pairs = [(model(inputs).argmax(1) == wanted) for inputs, wanted in data_loader]
            return {"accuracy": 100 * float(torch.cat(pairs).float().mean())}

    torch.manual_seed(0)
    model = TinyResNet().eval()
    return {
        "trained_model": model,
        "model": model,
        "inputs": images[:2],
        "batches": [images[:32]],
        "train_loader": DataLoader(train, batch_size=64),
        "test_loader": DataLoader(test, batch_size=64),
        "MyLoss": MyLoss,
        "MyEval": MyEval,
    }
