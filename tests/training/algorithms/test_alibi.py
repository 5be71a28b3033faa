from __future__ import annotations

import copy
import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import ConfigError, MissingDependencyError, ModelError
from compressor.structure.describe import diff
from compressor.training import Trainer
from compressor.training.algorithms import alibi
from compressor.training.algorithms.alibi import (
    ALiBi,
    NoPositions,
    alibi_bias,
    alibi_slopes,
    apply_alibi,
)

TOKENS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
needs_transformers = pytest.mark.slow  # importing it takes seconds


def make_gpt2(attention: str = "eager", **options: Any) -> Any:
    transformers = importlib.import_module("transformers")
    config = transformers.GPT2Config(
        n_layer=2,
        n_head=3,
        n_embd=12,
        vocab_size=50,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config).eval()


def make_bert(attention: str = "eager") -> Any:
    transformers = importlib.import_module("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_size=16,
        intermediate_size=32,
        vocab_size=50,
        max_position_embeddings=16,
        attn_implementation=attention,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config).eval()


def papers_slopes(heads: int) -> list[float]:
    """As the authors publish them, https://github.com/ofirpress/attention_with_linear_biases."""
    if math.log2(heads).is_integer():
        start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
        return [start * start**index for index in range(heads)]
    closest = 2 ** math.floor(math.log2(heads))
    return papers_slopes(closest) + papers_slopes(2 * closest)[0::2][: heads - closest]


def slow_attention(query: Tensor, key: Tensor, is_causal: bool) -> Tensor:
    """Weights (heads, L, L) of one sequence, (heads, L, D) each, number by number."""
    heads, length, dim = query.shape
    slopes = papers_slopes(heads)
    weights = torch.zeros(heads, length, length)
    for h in range(heads):
        for i in range(length):
            seen = range(i + 1) if is_causal else range(length)
            scores = {
                j: float(query[h, i] @ key[h, j]) / math.sqrt(dim) - slopes[h] * abs(i - j)
                for j in seen
            }
            total = sum(math.exp(score) for score in scores.values())
            for j, score in scores.items():
                weights[h, i, j] = math.exp(score) / total
    return weights


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 20])
def test_slopes_are_the_authors(heads: int) -> None:
    torch.testing.assert_close(alibi_slopes(heads), torch.tensor(papers_slopes(heads)))


def test_the_bias_grows_with_the_distance_on_both_sides() -> None:
    bias = alibi_bias(torch.tensor([0, 2]), key_length=4, heads=8)
    expected = torch.tensor([[0.0, -1.0, -2.0, -3.0], [-2.0, -1.0, 0.0, -1.0]])
    torch.testing.assert_close(bias[0], expected / 2)
    torch.testing.assert_close(bias[7], expected / 256)


@needs_transformers
def test_attention_of_gpt2_is_the_formula() -> None:
    model = make_gpt2()
    apply_alibi(model)
    seen: list[Tensor] = []
    model.transformer.h[0].attn.c_attn.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        weights = model(TOKENS, output_attentions=True).attentions[0]
    query, key, _ = seen[0].unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    for sample in range(2):
        expected = slow_attention(query[sample], key[sample], is_causal=True)
        torch.testing.assert_close(weights[sample], expected)


@needs_transformers
def test_attention_of_bert_is_the_formula() -> None:
    model = make_bert()
    apply_alibi(model)
    layer = model.bert.encoder.layer[0].attention.self
    seen: list[Tensor] = []
    for projection in (layer.query, layer.key):
        projection.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        weights = model(TOKENS, output_attentions=True).attentions[0]
    query, key = (tensor.unflatten(2, (4, 4)).transpose(1, 2) for tensor in seen)
    for sample in range(2):
        expected = slow_attention(query[sample], key[sample], is_causal=False)
        torch.testing.assert_close(weights[sample], expected)


@needs_transformers
@pytest.mark.parametrize("make", [make_gpt2, make_bert])
def test_fused_and_eager_attention_give_the_same(make: Any) -> None:
    mask = torch.ones_like(TOKENS)
    mask[0, 8:] = 0
    outputs = []
    for attention in ("eager", "sdpa"):
        model = make(attention)
        before = model(TOKENS, attention_mask=mask).logits
        apply_alibi(model)
        after = model(TOKENS, attention_mask=mask).logits
        assert not torch.allclose(before, after)
        outputs.append(after)
    torch.testing.assert_close(outputs[0][1], outputs[1][1])
    assert outputs[0].isfinite().all()


@needs_transformers
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_cache_gives_what_the_whole_sequence_gives(attention: str) -> None:
    model = make_gpt2(attention)
    apply_alibi(model)
    with torch.no_grad():
        whole = model(TOKENS, use_cache=False).logits
        first = model(TOKENS[:, :7], use_cache=True)
        rest = model(TOKENS[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, whole[:, 7:])
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": 60}
    written = [
        model.generate(TOKENS[:, :4], **options, **cache)
        for cache in ({"use_cache": False}, {}, {"cache_implementation": "static"})
    ]
    assert written[0].shape == (2, 24)  # beyond the 16 positions of the embedding
    assert torch.equal(written[0], written[1])
    assert torch.equal(written[0], written[2])


@needs_transformers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_only_distances_count_so_padding_on_the_left_changes_nothing(
    attention: str, dtype: torch.dtype
) -> None:
    model = make_gpt2(attention).to(dtype)
    apply_alibi(model)
    padding = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(TOKENS)], 1)
    with torch.no_grad():
        padded = model(torch.cat([padding, TOKENS], 1), attention_mask=mask).logits
        alone = model(TOKENS).logits
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(padded[:, 3:], alone, rtol=tolerance, atol=tolerance)
    assert padded.isfinite().all()


@needs_transformers
def test_bert_takes_longer_sequences_when_it_is_told() -> None:
    model = make_bert()
    apply_alibi(model, max_sequence_length=40)
    tokens = TOKENS.repeat(1, 3)
    assert model(tokens).logits.isfinite().all()
    assert model.config.max_position_embeddings == 40
    padding = torch.zeros(2, 4, dtype=torch.long)
    mask = torch.cat([torch.ones_like(tokens), padding], 1)
    padded = model(torch.cat([tokens, padding], 1), attention_mask=mask).logits
    torch.testing.assert_close(padded, model(tokens).logits)


@needs_transformers
def test_other_models_of_the_configuration_stay_as_they_are() -> None:
    transformers = importlib.import_module("transformers")
    first = make_gpt2()
    second = transformers.GPT2LMHeadModel(first.config).eval()
    before = second(TOKENS).logits
    apply_alibi(first, max_sequence_length=64)
    assert torch.equal(second(TOKENS).logits, before)
    assert second.config.max_position_embeddings == 16
    assert isinstance(second.transformer.wpe, nn.Embedding)


@needs_transformers
def test_copies_do_the_same_and_done_twice_is_done_once() -> None:
    model = make_gpt2()
    edit = apply_alibi(model)
    assert edit.removed == {"transformer.wpe.weight"}
    assert not edit.added
    once = model(TOKENS).logits
    assert torch.equal(copy.deepcopy(model)(TOKENS).logits, once)
    again = apply_alibi(model)
    assert (again.added, again.removed) == (frozenset(), frozenset())
    assert torch.equal(model(TOKENS).logits, once)


@needs_transformers
def test_a_file_of_the_structure_says_that_it_cannot_hold_this() -> None:
    model = make_gpt2()
    apply_alibi(model)
    with pytest.raises(ModelError, match="position_bias"):
        diff(make_gpt2(), model)
    assert not diff(model, copy.deepcopy(model))["changed"]


@needs_transformers
def test_the_embedding_may_be_named() -> None:
    wrapped = nn.ModuleDict({"net": make_gpt2()})
    apply_alibi(wrapped, position_embedding_attribute="net.transformer.wpe")
    assert isinstance(wrapped["net"].transformer.wpe, NoPositions)


@needs_transformers
def test_a_trainer_trains_the_changed_model_and_resumes_it(tmp_path: Any) -> None:
    def step(model: nn.Module, batch: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=batch, labels=batch).loss
        return loss

    def make() -> Trainer:
        return Trainer(
            make_gpt2("sdpa"),
            step,
            train_dataloader=[TOKENS] * 2,
            max_duration="2ep",
            optimizers={"name": "AdamW", "lr": 0.01},
            algorithms=[ALiBi(max_sequence_length=32)],
            save_dir=tmp_path,
        )

    trainer = make()
    trainer.fit()
    names = [name for name, _ in trainer.model.named_parameters()]
    assert not any("wpe" in name for name in names)
    assert trainer.state.train_metrics["train/loss"] < 3.9  # log 50, of tokens drawn at random
    resumed = make()
    assert resumed.resume()
    with torch.no_grad():
        ours, theirs = (each.model.eval()(TOKENS).logits for each in (trainer, resumed))
    assert torch.equal(ours, theirs)


@needs_transformers
def test_the_exported_program_equals_the_model() -> None:
    model = make_gpt2("sdpa")
    apply_alibi(model)
    model.config.use_cache = False
    program = torch.export.export(model, (TOKENS,), {"use_cache": False}, strict=False)
    with torch.no_grad():
        exported = program.module()(TOKENS, use_cache=False).logits
        torch.testing.assert_close(exported, model(TOKENS).logits)


@needs_transformers
def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="no GPT-2 or BERT"):
        apply_alibi(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="second sequence"):
        apply_alibi(make_gpt2(add_cross_attention=True))
    model = make_gpt2()
    with pytest.raises(ConfigError, match="max_sequence_length=0"):
        apply_alibi(model, max_sequence_length=0)
    assert isinstance(model.transformer.wpe, nn.Embedding)


def test_without_the_library_the_line_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(module: str, extra: str) -> Any:
        raise MissingDependencyError(f'pip install "compressor[{extra}]"')

    monkeypatch.setattr(alibi, "require", missing)
    with pytest.raises(MissingDependencyError, match=r"compressor\[transformers\]"):
        apply_alibi(nn.Linear(2, 2))
