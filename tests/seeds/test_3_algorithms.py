"""The samples of document 3, training methods alone and in a trainer: its code blocks 1 to 10.

Blocks 6 to 10 are those that are commented out at its end.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torchvision import datasets, models, transforms

from compressor import Algorithm, Callback, ClassifierTask, Event, EventEngine, State, Trainer
from compressor import functional as cf
from compressor.training.algorithms import BlurPool, ChannelsLast
from compressor.training.algorithms.blurpool import BlurConv2d, BlurMaxPool2d
from compressor.training.loggers import InMemoryLogger
from tests.seeds.digits import make_loader, make_test_loader


def make_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))


# Block 1; FakeData yields PIL images as CIFAR10 does, without a download.
def test_randaugment_is_one_of_the_transforms_of_a_dataset() -> None:
    mean, std = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
    c10_transforms = transforms.Compose(
        [
            cf.randaugment(),  # <---- Add RandAugment
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )

    dataset = datasets.FakeData(size=12, image_size=(3, 32, 32), transform=c10_transforms)
    dataloader = torch.utils.data.DataLoader(dataset, batch_size=1024)

    (first, labels), (second, same_labels) = next(iter(dataloader)), next(iter(dataloader))
    assert first.shape == (12, 3, 32, 32)
    assert torch.equal(labels, same_labels)
    assert first.min() >= -2  # 0 and 1, normalised
    assert first.max() <= 2
    plain = transforms.Compose(c10_transforms.transforms[1:])
    untouched = torch.stack(
        [image for image, _ in datasets.FakeData(12, (3, 32, 32), transform=plain)]
    )
    changes = [(a != b).any().item() for a, b in zip(first, untouched, strict=True)]
    assert sum(changes) > 6  # one operation of fourteen is to do nothing
    assert not torch.equal(first, second)


def is_pasted(mixed: Tensor, image: Tensor, others: Tensor) -> bool:
    """Whether all but a rectangle, half of it at most, is of `image`, and that of one other."""
    differs = (mixed != image).any(0)
    if not differs.any():
        return True
    rows, columns = differs.any(1).nonzero(), differs.any(0).nonzero()
    box = (
        slice(None),
        slice(int(rows.min()), int(rows.max()) + 1),
        slice(int(columns.min()), int(columns.max()) + 1),
    )
    area = mixed[box][0].numel()
    return area <= image[0].numel() / 2 and any(torch.equal(mixed[box], o[box]) for o in others)


# Block 2
def test_cutmix_can_be_written_into_the_loop() -> None:
    model, dataloader = make_net(), make_loader()
    optimizer, loss_fn = optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
    losses: list[float] = []
    pasted = 0

    cutmix_alpha = 1
    num_classes = 10
    for _epoch in range(10):
        for _batch_idx, (data, target) in enumerate(dataloader):
            # Noise, so that no two pixels are alike and what was pasted can be told.
            images = data = data + 0.01 * torch.rand_like(data)
            data = cf.cutmix(data, target, alpha=cutmix_alpha, num_classes=num_classes)
            optimizer.zero_grad()
            output = model(data)
            loss = loss_fn(output, target)
            loss.backward()
            optimizer.step()

            losses.append(loss.item())
            assert all(is_pasted(a, b, images) for a, b in zip(data, images, strict=True))
            pasted += int((data != images).any())

    assert pasted > 10
    assert sum(losses[-4:]) < sum(losses[:4]) - 1


# Block 3
def test_blurpool_is_put_into_a_network() -> None:
    model = models.resnet18()
    before, names = list(model.parameters()), list(model.state_dict())

    cf.apply_blurpool(model)

    kinds = [type(module) for module in model.modules()]
    # Three stages begin with a strided block, and that with two strided convolutions; the first
    # convolution of all sees three channels only.
    assert kinds.count(BlurConv2d) == 6
    assert kinds.count(BlurMaxPool2d) == 1
    assert type(model.conv1) is nn.Conv2d
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert list(model.state_dict()) == names
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 1000)


# Block 4; heads are counted by the model, and how attention is exchanged is known to its library,
# so three names remain. The embedding is at "wpe" in a bare GPT2Model.
@pytest.mark.slow
def test_alibi_takes_the_positions_out_of_a_transformer() -> None:
    transformers = importlib.import_module("transformers")
    GPT2Model = transformers.GPT2Model

    config = transformers.GPT2Config(
        n_layer=2,
        n_head=4,
        n_embd=16,
        vocab_size=50,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    model = GPT2Model(config)
    tokens = torch.randint(50, (2, 40))
    with pytest.raises(IndexError):
        model(tokens)  # longer than what it was made for

    cf.apply_alibi(
        model=model,
        max_sequence_length=8192,
        position_embedding_attribute="wpe",
    )

    model.eval()
    assert not any("wpe" in name for name, _ in model.named_parameters())
    assert model.config.max_position_embeddings == 8192
    with torch.no_grad():
        states = model(tokens).last_hidden_state
        moved = model(tokens, position_ids=torch.arange(7, 47)[None]).last_hidden_state
        short = model(tokens[:, :8]).last_hidden_state
    assert states.shape == (2, 40, 16)
    assert torch.equal(states, moved)
    torch.testing.assert_close(states[:, :8], short)  # what comes later is not seen
    # Where every token is the same, only distance is left to attend by: the slopes of the paper.
    with torch.no_grad():
        layers = model(torch.full((1, 40), 7), output_attentions=True).attentions
    distance = torch.arange(39.0, -1.0, -1.0)
    slopes = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256])
    expected = (-slopes[:, None] * distance).softmax(-1)
    for weights in layers:
        torch.testing.assert_close(weights[0, :, -1], expected)


# Block 5; which of a batch are the inputs and how the loss is computed is a task's to say.
@pytest.mark.slow
def test_algorithms_are_given_to_the_trainer_as_a_list() -> None:
    model = ClassifierTask(models.resnet18())
    train_dataloader, test_dataloader = make_loader(batch_size=16), make_test_loader()
    logger = InMemoryLogger()

    trainer = Trainer(
        model=model,
        algorithms=[ChannelsLast(), BlurPool()],
        train_dataloader=train_dataloader,
        eval_dataloader=test_dataloader,
        max_duration="10ep",
        loggers=[logger],
    )
    strides: list[tuple[int, ...]] = []
    model.model.register_forward_pre_hook(lambda _, inputs: strides.append(inputs[0].stride()))
    trainer.fit()

    blurred = [m for m in model.modules() if isinstance(m, BlurConv2d)]
    assert len(blurred) == 6
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in blurred)
    assert strides[0] == (192, 1, 24, 3)  # channels are neighbours
    assert logger.get("accuracy")[0] == list(range(1, 11))
    losses = logger.get("train/loss")[1]
    assert losses[-1] < losses[0] - 1


class Note(Algorithm):
    """Writes down when it is called."""

    def __init__(self, key: str, seen: list[str], events: Any, pairs: Any = ()) -> None:
        self.key = key
        self.seen = seen
        self.events = events
        self.pairs = pairs

    def on(self, event: Event, state: State) -> None:
        self.seen.append(f"{self.key} {event.name}")


# Block 6; BATCH_START and AFTER_STEP stand for the events around the loader and the whole batch,
# and SETUP comes when there is a model and a loader, but no optimizer yet: surgery is free then.
def test_the_events_of_an_epoch_in_order() -> None:
    seen: list[str] = []
    with_optimizer: list[bool] = []

    class Prepare(Algorithm):
        events = frozenset({Event.SETUP})

        def on(self, event: Event, state: State) -> None:
            assert state.model is model
            assert state.train_dataloader is train_dataloader
            with_optimizer.append(state.optimizer is not None)

    model, train_dataloader = ClassifierTask(make_net()), make_loader()
    trainer = Trainer(
        model,
        train_dataloader=train_dataloader,
        max_duration="2ep",
        algorithms=[Note("note", seen, frozenset(Event)), Prepare()],
    )
    assert seen == ["note SETUP"]
    assert with_optimizer == [False]
    trainer.fit()
    batch = [
        "BATCH_START",
        "BEFORE_FORWARD",
        "AFTER_FORWARD",
        "AFTER_LOSS",
        "BEFORE_STEP",
        "AFTER_STEP",
        "BATCH_END",
    ]
    epoch = ["EPOCH_START", *batch, *batch, "EPOCH_END"]
    events = ["SETUP", "FIT_START", *epoch, *epoch, "FIT_END"]
    assert seen == [f"note {event}" for event in events]


# The text after block 6; who wants to be left in reverse order says which events are a pair.
def test_what_an_event_begins_its_counterpart_ends_in_reverse_order() -> None:
    seen: list[str] = []
    pair = (Event.BEFORE_FORWARD, Event.AFTER_FORWARD)
    engine = EventEngine(
        State(make_net(), "1ep"), [Note(key, seen, pair, pairs=(pair,)) for key in "ABC"]
    )
    engine.run_event("before_forward")
    engine.run_event("after_forward")
    order = [entry[0] for entry in seen]
    assert order == ["A", "B", "C", "C", "B", "A"]


def process_inputs(batch: Any, factor: float = 2.0) -> Any:
    inputs, targets = batch
    return factor * inputs, targets


def process_outputs(outputs: Tensor) -> Tensor:
    return outputs / 4


# Block 7; the batch is whole, and just out of the loader, at BATCH_START.
def test_match_says_at_which_events_apply_is_called() -> None:
    seen: list[Event] = []

    class Chosen(Algorithm):
        def match(self, event: Event, state: State) -> bool:
            return event in [Event.BATCH_START, Event.AFTER_FORWARD]

        def apply(self, event: Event, state: State) -> None:
            seen.append(event)

    fit_one_epoch(Chosen())
    assert seen == 2 * [Event.BATCH_START, Event.AFTER_FORWARD]


# Block 8
def test_apply_changes_the_state() -> None:
    class Processing(Algorithm):
        def apply(self, event: Event, state: State, logger: Any) -> None:
            if event == Event.BATCH_START:
                state.batch = process_inputs(state.batch)
            if event == Event.AFTER_FORWARD:
                state.outputs = process_outputs(state.outputs)

    check_processed(Processing(), factor=2.0)


class MyAlgorithm(Algorithm):
    def __init__(self, hparam1: float = 1) -> None:
        self.hparam1 = hparam1

    def match(self, event: Event, state: State) -> bool:
        return event in [Event.BATCH_START, Event.AFTER_FORWARD]

    def apply(self, event: Event, state: State, logger: Any) -> None:
        if event == Event.BATCH_START:
            state.batch = process_inputs(state.batch, self.hparam1)
        if event == Event.AFTER_FORWARD:
            state.outputs = process_outputs(state.outputs)


# Block 9
@pytest.mark.parametrize("hparam1", [1, 3])
def test_an_algorithm_of_ones_own_has_options(hparam1: float) -> None:
    check_processed(MyAlgorithm(hparam1=hparam1), factor=hparam1)


class SeeLoss(Callback):
    events = frozenset({Event.AFTER_LOSS})

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.expected: list[Tensor] = []

    def on(self, event: Event, state: State) -> None:
        self.losses.append(state.loss.detach())
        self.expected.append(nn.functional.cross_entropy(state.outputs, state.batch[1]))


def fit_one_epoch(*algorithms: Algorithm) -> None:
    Trainer(
        ClassifierTask(make_net()),
        train_dataloader=make_loader(),
        max_duration="1ep",
        algorithms=algorithms,
    ).fit()


def check_processed(algorithm: Algorithm, factor: float) -> None:
    """The first loss is that of inputs times `factor`, and a quarter of the scores."""
    see, net = SeeLoss(), make_net()
    trainer = Trainer(
        ClassifierTask(net),
        train_dataloader=make_loader(),
        max_duration="1ep",
        algorithms=[algorithm],
        callbacks=[see],
    )
    images, labels = next(iter(make_loader()))
    expected = nn.functional.cross_entropy(net(factor * images) / 4, labels)
    trainer.fit()
    torch.testing.assert_close(see.losses[0], expected)
    torch.testing.assert_close(see.losses[1], see.expected[1])


# Block 10; the device is one that is here, and "never but at the end" is written as an interval as
# long as the whole: there always is one evaluation at the end.
@pytest.mark.slow
def test_an_algorithm_of_ones_own_is_used_as_the_others() -> None:
    channels_last = ChannelsLast()
    blurpool = BlurPool(replace_convs=True, replace_maxpools=True, blur_first=True)
    custom_algorithm = MyAlgorithm(hparam1=1)
    see, logger = SeeLoss(), InMemoryLogger()
    model = ClassifierTask(models.resnet18())
    train_dataloader, test_dataloader = make_loader(batch_size=16), make_test_loader()

    trainer = Trainer(
        model=model,
        train_dataloader=train_dataloader,
        eval_dataloader=test_dataloader,
        max_duration="9ep",
        device="cpu",
        algorithms=[channels_last, blurpool, custom_algorithm],
        callbacks=[see],
        loggers=[logger],
        eval_interval="9ep",
        seed=42,
    )
    trainer.fit()

    assert logger.get("accuracy")[0] == [9]
    assert len(see.losses) == 9
    assert see.losses[-1] < see.losses[0] - 0.5
    # The loss saw the outputs as the algorithm had left them.
    for loss, expected in zip(see.losses, see.expected, strict=True):
        torch.testing.assert_close(loss, expected)
    assert sum(isinstance(module, BlurConv2d) for module in model.modules()) == 6
