from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MultilabelAccuracy
from torchmetrics.text import Perplexity

from compressor.errors import DataError, LossError, MetricError, ModelError
from compressor.structure.describe import diff, rebuild
from compressor.structure.trace import copy_model
from compressor.training import Event, State, Trainer
from compressor.training.algorithms.label_smoothing import LabelSmoothing, smooth_labels
from compressor.training.tasks import (
    HuggingFaceTask,
    LanguageCrossEntropy,
    compute_metrics,
    named_metrics,
)

transformers = importlib.import_module("transformers")
pytestmark = pytest.mark.slow  # transformers takes seconds to import

VOCABULARY = 17


def make_bert(num_labels: int = 3, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, intermediate_size=8, num_labels=num_labels, **sizes, **options
    )
    return transformers.BertForSequenceClassification(config).eval()


def make_gpt2() -> Any:
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=8, n_layer=1, n_head=2, **ids
    )
    return transformers.GPT2LMHeadModel(config).eval()


def make_t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(config).eval()


def make_texts(samples: int = 4, length: int = 6) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (samples, length), generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def make_sentences(samples: int = 4) -> dict[str, Tensor]:
    return {**make_texts(samples), "labels": torch.arange(samples) % 3}


def make_tokens(samples: int = 4) -> dict[str, Tensor]:
    """Tokens to predict; the last ones of every second text do not count."""
    batch = make_texts(samples)
    labels = batch["input_ids"].clone()
    labels[::2, 4:] = -100
    return {**batch, "labels": labels}


def measure(task: HuggingFaceTask, batches: Any) -> dict[str, float]:
    metrics = named_metrics(task.get_metrics())
    with torch.no_grad():
        for batch in batches:
            outputs = task.eval_forward(batch)
            for metric in metrics.values():
                task.update_metric(batch, outputs, metric)
    return compute_metrics(metrics)


@pytest.mark.parametrize(
    ("make_model", "make_batch"),
    [(make_bert, make_sentences), (make_gpt2, make_tokens), (make_t5, make_tokens)],
)
def test_outputs_and_loss_are_the_models_own(make_model: Any, make_batch: Any) -> None:
    model, batch = make_model(), make_batch()
    task, direct = HuggingFaceTask(model), model(**batch)
    outputs = task(batch)
    assert torch.equal(task.loss(outputs, batch), direct.loss)  # type: ignore[arg-type]
    assert torch.equal(task.eval_forward(batch, outputs), direct.logits)


def test_batches_come_straight_from_a_tokenizer() -> None:
    tokenizer = make_tokenizer("a b c d".split())
    batch = tokenizer(["a b", "c d a"], padding=True, return_tensors="pt")
    batch["labels"] = torch.tensor([0, 2])
    batch["source"] = ["first", "second"]  # what forward does not name
    task = HuggingFaceTask(make_bert(pad_token_id=0), tokenizer)
    named = {key: value for key, value in batch.items() if key != "source"}
    assert type(batch).__name__ == "BatchEncoding"
    assert torch.equal(task(batch).logits, task.model(**named).logits)
    assert task.sample_count(batch) == 2
    assert [part["input_ids"].tolist() for part in task.split_batch(batch, 1)] == [
        batch["input_ids"][:1].tolist(),
        batch["input_ids"][1:].tolist(),
    ]


def test_a_tokenizer_that_knows_more_than_the_model_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"knows 21 tokens and the model 17.*resize_token"):
        HuggingFaceTask(make_bert(), make_tokenizer(list(map(str, range(20)))))


def test_accuracy_is_the_share_of_right_sentences() -> None:
    task, batch = HuggingFaceTask(make_bert(), metrics=[MulticlassAccuracy(average="micro")]), {}
    batch = make_sentences(9)
    right = (task.model(**batch).logits.argmax(1) == batch["labels"]).float().mean().item()
    assert measure(task, [batch]) == {"MulticlassAccuracy": pytest.approx(right)}
    assert 0 < right < 1


def test_each_token_is_judged_by_the_one_before() -> None:
    metrics = MetricCollection(
        [LanguageCrossEntropy(VOCABULARY), MulticlassAccuracy(VOCABULARY, average="micro")]
    )
    task = HuggingFaceTask(make_gpt2(), metrics=metrics)
    batches = [make_tokens(4), make_tokens(1)]
    losses, right = [], []
    for batch in batches:
        logits = task.model(**batch).logits
        for text, row in zip(batch["labels"], logits, strict=True):
            for place in range(1, len(text)):
                if text[place] != -100:
                    losses.append(-row[place - 1].log_softmax(0)[text[place]].item())
                    right.append(row[place - 1].argmax().item() == text[place].item())
    values = measure(task, batches)
    assert len(losses) == 2 * 3 + 2 * 5 + 3
    assert values["LanguageCrossEntropy"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert values["MulticlassAccuracy"] == pytest.approx(sum(right) / len(right))


def test_perplexity_of_torchmetrics_is_the_exponential_of_the_cross_entropy() -> None:
    metrics = {"perplexity": Perplexity(), "entropy": LanguageCrossEntropy()}
    values = measure(HuggingFaceTask(make_gpt2(), metrics=metrics), [make_tokens(4)])
    assert values["perplexity"] == pytest.approx(math.exp(values["entropy"]), rel=1e-5)


def test_a_decoder_with_an_encoder_is_not_shifted() -> None:
    task = HuggingFaceTask(make_t5(), metrics=LanguageCrossEntropy(VOCABULARY))
    batch = make_tokens()
    loss = task.model(**batch).loss.item()
    assert measure(task, [batch]) == {"LanguageCrossEntropy": pytest.approx(loss, rel=1e-5)}


@pytest.mark.parametrize("make_model", [make_gpt2, make_t5])
def test_smoothed_tokens_have_the_loss_that_torch_smooths(make_model: Any) -> None:
    model, batch = make_model(), make_tokens()
    batch["labels"][1, 0] = -100
    task = HuggingFaceTask(model)
    trainer = Trainer(
        task,
        train_dataloader=[batch],
        max_duration="1ba",
        optimizers={"name": "SGD", "lr": 0.0},
        algorithms=[LabelSmoothing(0.3, target_key="labels")],
    )
    shift = int(task.shift_labels)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    logits, labels = task(batch).logits, batch["labels"][:, shift:]
    expected = F.cross_entropy(
        logits[:, : logits.shape[1] - shift].flatten(0, 1), labels.flatten(), label_smoothing=0.3
    ).item()
    trainer.fit()
    assert trainer.state.train_metrics["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_logits_with_as_many_tokens_as_classes_are_smoothed_over_the_classes() -> None:
    # Positions were taken for classes.
    task = HuggingFaceTask(make_t5())
    batch = make_texts(2, VOCABULARY)
    state = State(task, "1ba", batch={**batch, "labels": batch["input_ids"]})  # type: ignore[arg-type]
    state.outputs = {"logits": torch.zeros(2, VOCABULARY, VOCABULARY)}
    LabelSmoothing(0.34, target_key="labels").on(Event.AFTER_FORWARD, state)
    expected = 0.66 * F.one_hot(batch["input_ids"], VOCABULARY) + 0.02
    torch.testing.assert_close(state.batch["labels"], expected)


def test_metrics_leave_ignored_tokens_out_of_smoothed_labels() -> None:
    task = HuggingFaceTask(make_gpt2(), metrics=MulticlassAccuracy(VOCABULARY, average="micro"))
    batch = make_tokens()
    logits = task.eval_forward(batch)
    soft = smooth_labels(logits, batch["labels"], class_dim=-1)
    metric = named_metrics(task.get_metrics())
    values = []
    for labels in (batch["labels"], soft):
        task.update_metric({**batch, "labels": labels}, logits, metric["MulticlassAccuracy"])
        values.append(compute_metrics(metric))
        metric["MulticlassAccuracy"].reset()
    assert values[0] == values[1]
    right = (logits[:, :-1].argmax(-1) == batch["labels"][:, 1:])[batch["labels"][:, 1:] != -100]
    assert values[0]["MulticlassAccuracy"] == pytest.approx(right.float().mean().item())


def test_labels_are_not_kept_where_no_other_loss_can_be_asked_for() -> None:
    batch = make_sentences()
    for task in (HuggingFaceTask(make_bert()), HuggingFaceTask(make_bert(), loss_fn=own_loss)):
        with torch.set_grad_enabled(task.loss_fn is not None):
            outputs = task(batch)
        assert task._seen_labels is None
        assert task.loss(outputs, batch) is not None
    kept = HuggingFaceTask(make_bert())
    kept(batch)
    assert kept.around(make_bert())._seen_labels is None


def own_loss(outputs: Any, batch: Any) -> Tensor:
    return F.cross_entropy(outputs["logits"], batch["labels"])


def test_a_batch_without_a_token_that_counts_changes_nothing() -> None:
    task = HuggingFaceTask(make_gpt2(), metrics=LanguageCrossEntropy())
    batch = make_tokens()
    ignored = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert measure(task, [batch, ignored]) == measure(
        HuggingFaceTask(make_gpt2(), metrics=LanguageCrossEntropy()), [batch]
    )


def test_cross_entropy_of_another_vocabulary_is_an_error() -> None:
    task = HuggingFaceTask(make_gpt2(), metrics=LanguageCrossEntropy(vocab_size=30522))
    with pytest.raises(MetricError, match=r"scores 17 tokens.*vocab_size=30522"):
        measure(task, [make_tokens()])


def test_a_regression_has_one_number_per_text() -> None:
    task = HuggingFaceTask(make_bert(num_labels=1), metrics=[MeanSquaredError()])
    batch = {**make_texts(), "labels": torch.tensor([0.0, 1.0, 2.0, 3.0])}
    errors = [(task.model(**make_texts()).logits[i, 0].item() - i) ** 2 for i in range(4)]
    assert measure(task, [batch]) == {"MeanSquaredError": pytest.approx(sum(errors) / 4)}
    assert task.loss(task(batch), batch).item() == pytest.approx(  # type: ignore[union-attr]
        sum(errors) / 4
    )


def test_several_labels_may_be_right_at_once() -> None:
    model = make_bert(problem_type="multi_label_classification")
    task = HuggingFaceTask(model, metrics=MultilabelAccuracy(3, average="micro"))
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    right = ((model(**make_texts()).logits > 0) == labels.bool()).float().mean().item()
    values = measure(task, [{**make_texts(), "labels": labels}])
    assert values == {"MultilabelAccuracy": pytest.approx(right)}


def test_labels_that_an_algorithm_replaced_are_the_labels_of_the_loss() -> None:
    task, batch = HuggingFaceTask(make_bert()), make_sentences()
    outputs, others = task(batch), batch["labels"].roll(1)
    expected = task.model(**{**batch, "labels": others}).loss
    torch.testing.assert_close(task.loss(outputs, {**batch, "labels": others}), expected)
    soft = 0.3 * F.one_hot(batch["labels"], 3) + 0.7 * F.one_hot(others, 3)
    mixture = 0.3 * outputs.loss + 0.7 * expected
    torch.testing.assert_close(task.loss(outputs, {**batch, "labels": soft}), mixture)


@pytest.mark.parametrize("make_model", [make_gpt2, make_t5])
def test_replaced_tokens_are_the_tokens_of_the_loss(make_model: Any) -> None:
    task, batch = HuggingFaceTask(make_model()), make_tokens()
    outputs, others = task(batch), batch["labels"].roll(1, dims=0)
    expected = -sum(
        row[place - task.shift_labels].log_softmax(0)[text[place]]
        for text, row in zip(others, outputs.logits, strict=True)
        for place in range(int(task.shift_labels), 6)
        if text[place] != -100
    ) / sum(int((text[int(task.shift_labels) :] != -100).sum()) for text in others)
    torch.testing.assert_close(task.loss(outputs, {**batch, "labels": others}), expected)


def test_replaced_labels_of_a_loss_that_is_not_known_are_an_error() -> None:
    class Odd(transformers.BertForSequenceClassification):  # type: ignore[misc, name-defined]
        def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Any:
            outputs = super().forward(input_ids, attention_mask, labels=labels)
            outputs.loss = outputs.loss + 1
            return outputs

    task, batch = HuggingFaceTask(Odd(make_bert().config)), make_sentences()
    outputs = task(batch)
    assert task.loss(outputs, batch) is outputs.loss
    with pytest.raises(LossError, match=r"after Odd had computed its loss.*loss_fn"):
        task.loss(outputs, {**batch, "labels": batch["labels"].roll(1)})


def test_a_given_loss_takes_the_place_of_the_models() -> None:
    def loss_fn(outputs: Any, batch: Any) -> Tensor:
        assert outputs.loss is None  # not computed in vain
        return F.cross_entropy(outputs.logits, batch["labels"], label_smoothing=0.1)

    task, batch = HuggingFaceTask(make_bert(), loss_fn=loss_fn), make_sentences()
    expected = F.cross_entropy(
        task.model(**make_texts()).logits, batch["labels"], label_smoothing=0.1
    )
    torch.testing.assert_close(task.loss(task(batch), batch), expected)


def test_a_decoder_that_begins_with_the_labels_has_them_beside_a_given_loss() -> None:
    def loss_fn(outputs: Any, batch: Any) -> Tensor:
        return 2 * F.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten())

    task, batch = HuggingFaceTask(make_t5(), loss_fn=loss_fn), make_tokens()
    torch.testing.assert_close(task.loss(task(batch), batch), 2 * task.model(**batch).loss)


def test_without_labels_there_is_no_loss_and_no_metric() -> None:
    task, batch = HuggingFaceTask(make_bert(), metrics=LanguageCrossEntropy()), make_texts()
    with pytest.raises(LossError, match=r"need 'labels', which this one has not \(it has input_"):
        task.loss(task(batch), batch)
    with pytest.raises(MetricError, match="has no 'labels'"):
        measure(task, [batch])
    with pytest.raises(DataError, match="The batch is a Tensor"):
        task(batch["input_ids"])


def test_a_bare_network_has_no_logits() -> None:
    task = HuggingFaceTask(transformers.BertModel(make_bert().config))
    with pytest.raises(ModelError, match="without 'logits'"):
        task.eval_forward(make_texts())


def test_training_and_evaluation_have_metrics_of_their_own() -> None:
    task = HuggingFaceTask(make_bert(), metrics=MulticlassAccuracy(3))
    train = named_metrics(task.get_metrics(is_train=True))
    assert train.keys() == named_metrics(task.get_metrics()).keys()
    assert train["MulticlassAccuracy"] is not named_metrics(task.get_metrics())
    batch = make_sentences()
    task.update_metric(batch, task(batch), train["MulticlassAccuracy"])  # the model's outputs
    assert train["MulticlassAccuracy"].update_count == 1  # type: ignore[attr-defined]
    silent = HuggingFaceTask(make_bert(), metrics=MulticlassAccuracy(3), train_metrics=())
    assert named_metrics(silent.get_metrics(is_train=True)) == {}


def test_metrics_may_ask_for_all_outputs() -> None:
    class Depth:
        """How many tokens are in the deepest state."""

        def update(self, outputs: Any, labels: Tensor) -> None:
            self.value = outputs.hidden_states[-1].shape[1] + 100 * len(labels)

        def compute(self) -> float:
            return self.value

        def reset(self) -> None:
            self.value = 0

    model = make_bert(output_hidden_states=True)
    task = HuggingFaceTask(model, metrics={"depth": Depth()}, use_logits=False)
    assert measure(task, [make_sentences()]) == {"depth": 406.0}


def test_a_teacher_with_other_arguments_is_called_with_its_own() -> None:
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=8, hidden_dim=8, n_layers=1, n_heads=2, num_labels=3
    )
    teacher = transformers.DistilBertForSequenceClassification(config).eval()
    batch = {**make_sentences(), "token_type_ids": torch.zeros(4, 6, dtype=torch.long)}
    task = HuggingFaceTask(make_bert())
    assert torch.equal(task.around(teacher)(batch).logits, teacher(**make_texts()).logits)
    assert torch.equal(task(batch).logits, task.model(**batch).logits)


def test_a_transformer_task_is_copied_and_described() -> None:
    task, batch = HuggingFaceTask(make_bert(), metrics=MulticlassAccuracy(3)), make_sentences()
    reference = copy_model(task)
    measure(task, [batch])
    rebuilt = rebuild(reference, diff(reference, task))
    rebuilt.load_state_dict(task.state_dict())
    assert torch.equal(rebuilt(batch).logits, task(batch).logits)
    assert all(name.startswith("model.") for name in task.state_dict())


def test_a_language_model_learns_a_sequence_by_heart() -> None:
    task, batch = HuggingFaceTask(make_gpt2().train()), make_tokens(1)
    optimizer = torch.optim.Adam(task.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = task.loss(task(batch), batch)
        assert isinstance(loss, Tensor)
        loss.backward()
        optimizer.step()
    assert loss < 0.5 < math.log(VOCABULARY)


def make_tokenizer(words: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    known = {word: index for index, word in enumerate(["[PAD]", *words])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")


def test_a_model_that_is_called_with_anything_gets_the_whole_batch() -> None:
    class Anything(nn.Module):
        def forward(self, **inputs: Tensor) -> Any:
            return {"logits": inputs["a"] + inputs["b"]}

    batch = {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}
    assert torch.equal(HuggingFaceTask(Anything()).eval_forward(batch), 2 * batch["a"])
