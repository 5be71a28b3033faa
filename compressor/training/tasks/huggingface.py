"""Models of the transformers library (Wolf et al., 2020) as tasks: dict batches, their own loss."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressor.errors import DataError, LossError, MetricError, ModelError
from compressor.optional import require
from compressor.training.tasks.base import TaskModel, held_metrics
from compressor.training.tasks.classifier import as_indices

BatchLoss: TypeAlias = Callable[[Any, Any], "Tensor | Mapping[str, Tensor]"]
IGNORED = -100  # label of tokens that do not count, in all of transformers


class HuggingFaceTask(TaskModel):
    """A transformer, trained and judged on what a tokenizer or a collator gives: dicts.

    Of a batch, the model is given what its `forward` names. The loss is the one that the model
    computes from the labels.

    Metrics are updated with (logits, labels). Those of tokens are flattened before, (T, V) and
    (T,), without the ignored ones; in a causal language model each token is judged by the logits of
    the one before. The numbers of a regression with one label are (N,) and (N,).

    Attributes:
        class_dim: where algorithms find the classes in logits of three dimensions: (N, T, K).

    Args:
        model: a model of transformers with a head; it is called with keywords.
        tokenizer: is kept beside the model; its vocabulary must fit.
        metrics: of the evaluation, as `get_metrics` may return them.
        use_logits: False hands metrics the model's whole outputs, and the labels as they are.
        train_metrics: None is copies of `metrics`; () is none.
        loss_fn: (outputs, batch) to a scalar or to named ones, in place of the model's own loss.
            The labels are then kept from the model, unless its decoder begins with them.
        label_key: of the labels in a batch, and in the model's `forward`.
        shift_labels: whether logits are for the next token; None: if it is a causal language model.

    Raises:
        MissingDependencyError: without transformers.
        ModelError: if the tokenizer knows more tokens than the model.
    """

    class_dim = -1

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        metrics: Any = (),
        use_logits: bool = True,
        *,
        train_metrics: Any = None,
        loss_fn: BatchLoss | None = None,
        label_key: str = "labels",
        shift_labels: bool | None = None,
    ) -> None:
        super().__init__()
        _check_vocabulary(model, tokenizer)
        self.model = model
        self.tokenizer = tokenizer
        self.eval_metrics = held_metrics(metrics)
        self.train_metrics = (
            copy.deepcopy(self.eval_metrics)
            if train_metrics is None
            else held_metrics(train_metrics)
        )
        self.use_logits = use_logits
        self.loss_fn = loss_fn
        self.label_key = label_key
        self.shift_labels = _is_causal(model) if shift_labels is None else shift_labels
        self._names = _argument_names(model)
        self._seen_labels: Tensor | None = None  # from which the model computed its last loss
        self._has_known_loss = False

    def around(self, net: nn.Module) -> HuggingFaceTask:
        """This task with another network, which is given what its own `forward` names."""
        task = super().around(net)
        task._names = _argument_names(net)
        task._seen_labels = None
        return task

    def forward(self, batch: Any) -> Any:
        """The model's outputs: a mapping with 'logits', and 'loss' if there are labels."""
        if not isinstance(batch, Mapping):
            raise DataError(
                f"The batch is a {type(batch).__name__}, and this model is called with keywords. "
                "Let the loader yield dicts, as a tokenizer or a collator of transformers does."
            )
        arguments = {
            key: value for key, value in batch.items() if self._names is None or key in self._names
        }
        if self.loss_fn is not None and not self._config("is_encoder_decoder", False):
            arguments.pop(self.label_key, None)
        is_needed = self.loss_fn is None and torch.is_grad_enabled()  # else not kept alive
        self._seen_labels = arguments.get(self.label_key) if is_needed else None
        return self.model(**arguments)

    def loss(self, outputs: Any, batch: Any) -> Tensor | Mapping[str, Tensor]:
        """The model's own loss, or what `loss_fn` returns.

        When an algorithm has put other labels into the batch since `forward`, the cross entropy (or
        squared error) of these.

        Raises:
            LossError: if the model gave none, or one that cannot be had for other labels.
        """
        if self.loss_fn is not None:
            return self.loss_fn(outputs, batch)
        own: Tensor | None = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if own is None:
            raise LossError(
                f"The model gave no loss. Batches need {self.label_key!r}, which this one has not "
                f"(it has {', '.join(map(str, batch))}), or the task a loss_fn(outputs, batch)."
            )
        labels = batch.get(self.label_key)
        if self._seen_labels is None or labels is None or labels is self._seen_labels:
            return own
        self._check_loss(outputs["logits"], own)
        return self._loss_of(outputs["logits"], labels)

    def eval_forward(self, batch: Any, outputs: Any = None) -> Any:
        """The logits, or with use_logits=False all outputs."""
        outputs = self(batch) if outputs is None else outputs
        return _logits(outputs) if self.use_logits else outputs

    def get_metrics(self, is_train: bool = False) -> Any:
        """Those that were given."""
        return self.train_metrics if is_train else self.eval_metrics

    def update_metric(self, batch: Any, outputs: Any, metric: Any) -> None:
        """Take in logits and labels; tokens are flattened, and ignored ones left out."""
        labels = batch.get(self.label_key)
        if labels is None:
            raise MetricError(
                f"The batch of the evaluation has no {self.label_key!r}. Give its loader labels."
            )
        if not self.use_logits:
            metric.update(outputs, labels)
            return
        logits = _logits(outputs)
        if self._config("num_labels", 0) == 1 and logits.shape[1:] == (1,):
            metric.update(logits.reshape(-1), labels.reshape(-1))
        elif logits.dim() == 3:
            self._update_tokens(logits, labels, metric)
        elif self._config("problem_type", None) == "multi_label_classification":
            metric.update(logits, labels.long())
        else:
            metric.update(logits, as_indices(labels, logits))

    def _update_tokens(self, logits: Tensor, labels: Tensor, metric: Any) -> None:
        logits, labels = self._aligned(logits, labels)
        if labels.dim() == logits.dim():  # weights of the classes, 0 for ignored tokens
            counts, labels = labels.sum(-1) > 0, labels.argmax(-1)
        else:
            counts = labels != IGNORED
        logits, labels = logits[counts], labels[counts]
        if type(metric).__name__ == "Perplexity":  # torchmetrics' own demands sequences
            logits, labels = logits[None], labels[None]
        if labels.numel():
            metric.update(logits, labels)

    def _aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, T, V) and the labels that they are for."""
        return (logits[:, :-1], labels[:, 1:]) if self.shift_labels else (logits, labels)

    def _loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss that heads of transformers have, of labels of any kind."""
        if logits.dim() == 3:
            logits, labels = (part.flatten(0, 1) for part in self._aligned(logits, labels))
        elif self._config("problem_type", None) == "regression":
            return F.mse_loss(logits.squeeze(), labels.squeeze())
        elif self._config("problem_type", None) == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels)
        logits = logits.float()
        if labels.shape == logits.shape:
            # Divided by what counts: of shifted tokens, fewer are ignored than algorithms saw.
            return F.cross_entropy(logits, labels, reduction="sum") / labels.sum()
        return F.cross_entropy(logits, labels, ignore_index=IGNORED)

    def _check_loss(self, logits: Tensor, own: Tensor) -> None:
        """Do nothing if the model's loss is the one that `_loss_of` computes; look at it once."""
        if self._has_known_loss:
            return
        assert self._seen_labels is not None
        with torch.no_grad():
            ours = self._loss_of(logits, self._seen_labels) if logits.dim() < 4 else None
            # 0.01: under autocast the model's is rounded to 8 bits; another loss is farther off.
            self._has_known_loss = ours is not None and torch.allclose(ours, own.float(), rtol=0.01)
        if not self._has_known_loss:
            raise LossError(
                f"The labels were changed after {type(self.model).__name__} had computed its loss, "
                "which is no plain cross entropy. Give the task a loss_fn(outputs, batch)."
            )

    def _config(self, name: str, default: Any) -> Any:
        return getattr(getattr(self.model, "config", None), name, default)


def _logits(outputs: Any) -> Tensor:
    """The logits of a model's outputs, which may be the logits already."""
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"The model returned a {type(outputs).__name__} without 'logits'. Set its "
            "config.return_dict=True and use a model with a head, or write a TaskModel."
        )
    return logits


def _argument_names(model: nn.Module) -> frozenset[str] | None:
    """What `forward` names; None if it names nothing and takes everything."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return frozenset(named) or None


def _is_causal(model: Any) -> bool:
    models = require("transformers.models.auto.modeling_auto", extra="transformers")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters of peft
    return type(base).__name__ in models.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _check_vocabulary(model: Any, tokenizer: Any) -> None:
    if tokenizer is None or not hasattr(model, "get_input_embeddings"):
        return
    rows = getattr(model.get_input_embeddings(), "num_embeddings", len(tokenizer))
    if len(tokenizer) > rows:
        raise ModelError(
            f"The tokenizer knows {len(tokenizer)} tokens and the model {rows}. "
            "Call model.resize_token_embeddings(len(tokenizer)), or give the model's tokenizer."
        )
