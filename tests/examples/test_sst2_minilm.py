"""The flow of the example on a thin encoder and a few sentences of our own."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from tests.examples import scripts

pytestmark = pytest.mark.slow

PRAISE = ("a joy", "a delight", "wonderful", "great fun", "moving and wise", "superb")
BLAME = ("a bore", "a mess", "dreadful", "no fun", "clumsy and dull", "awful")
SUBJECTS = ("the film is", "its second half is", "the acting is", "all of it is")


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With an encoder like MiniLM, but of one thin layer, and MiniLM's own tokenizer."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module = scripts.load("sst2_minilm", monkeypatch)
    folder = tmp_path / "encoder"
    tokenizer = AutoTokenizer.from_pretrained(module.get_model_path())
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setattr(module, "get_model_path", lambda: folder)
    monkeypatch.setattr(module, "TOKENS", 16)
    return module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    lines = [
        f"{subject} {word}\t{label}"
        for subject in SUBJECTS
        for words in zip(PRAISE, BLAME, strict=True)
        for label, word in zip((1, 0), words, strict=True)
    ]
    folder = tmp_path / "sst2"
    folder.mkdir()
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_heads_and_bits_go_and_the_file_is_judged(
    example: ModuleType, data: Path, tmp_path: Path
) -> None:
    options = ("--delta", 45, "--optimization", "compression", "--run-dir", tmp_path / "run")
    result = scripts.run(example, "--data", data, *options)
    certificate = result.certificate
    tokenizer = example.AutoTokenizer.from_pretrained(example.get_model_path())
    batches = list(example.Sentences(data / "sst2" / "dev.tsv", tokenizer, 64, shuffle=False))
    right = []
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = scripts.outputs_of_file(result.artifacts["onnx"], inputs)
        right.append((logits.argmax(1) == batch["labels"]).float())
    assert certificate.metric == pytest.approx(100 * torch.cat(right).mean().item())
    assert certificate.within_delta
    assert certificate.size_ratio > 1
    assert {choice.technique for choice in result.plan} <= {"channel_pruning", "quantization"}
    assert len(result.plan)
