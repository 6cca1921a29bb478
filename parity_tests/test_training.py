"""Both frameworks take the same path from the same weights; and the pieces of the loop."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

import flax_resblock.training.loop
from flax_resblock import ResNetConfig, from_torch, load_run, to_torch, training
from flax_resblock.convert import NAMINGS, StateMap
from flax_resblock.parity.oracle import relative_l2
from flax_resblock.runs.optimizer_state import write_optimizer
from flax_resblock.training.config import TrainConfig
from flax_resblock.training.data import Augmentation, Dataset, batches, digits, steps_per_epoch
from flax_resblock.training.loss import Mixed, cross_entropy
from flax_resblock.training.step import make_train_step
from parity_tests.support import worst
from torch_ref import ResNet as TorchResNet
from torch_ref import training as reference

TOLERANCE = 1e-10
CONTROL = 1000 * TOLERANCE

CONFIG = ResNetConfig(
    depths=(1, 1), widths=(8, 12), stem="cifar", stem_width=8, in_channels=1, num_classes=10
)
SETTINGS = TrainConfig(
    model=CONFIG, epochs=2, batch_size=32, warmup_epochs=0.5, label_smoothing=0.1
)


@pytest.fixture(scope="module")
def data():
    return digits()


def torch_reference(seed: int = 0) -> TorchResNet:
    """A float64 network with seeded weights."""
    torch.manual_seed(seed)
    return TorchResNet(**dataclasses.asdict(CONFIG)).double()


def as_torch(images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().double(), torch.from_numpy(
        labels
    ).long()


def torch_epoch(dataset: Dataset, config: TrainConfig, epoch: int):
    return (
        as_torch(batch.images, batch.labels)
        for batch in batches(dataset, config.batch_size, seed=config.seed, epoch=epoch)
    )


def first(dataset: Dataset, count: int) -> Dataset:
    images, labels = dataset.images[:count], dataset.labels[:count]
    return dataclasses.replace(dataset, images=images, labels=labels)


def torch_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {key: value.detach().numpy().copy() for key, value in model.state_dict().items()}


SHORT = dataclasses.replace(SETTINGS, batch_size=64)


@pytest.fixture(scope="module")
def few(data):
    """The images of five steps, and a rest that makes none."""
    return first(data.train, 330)


@pytest.fixture(scope="module")
def torch_loop(few):
    """The reference loop's network after :data:`SHORT`, and what its steps report."""
    steps = steps_per_epoch(few, SHORT.batch_size)
    module = torch_reference(1)
    optimizer = reference.sgd(module, SHORT.learning_rate)
    scheduler = reference.warmup_cosine(
        optimizer, warmup_steps=round(0.5 * steps), total_steps=2 * steps
    )
    epochs = itertools.chain(*(torch_epoch(few, SHORT, epoch) for epoch in range(2)))
    smoothing = SHORT.label_smoothing
    return module, reference.train(module, epochs, optimizer, scheduler, label_smoothing=smoothing)


def fitted(few, test=None, **changes):
    """State dict and history of the same run by ``fit``."""
    config = dataclasses.replace(SHORT, **changes)
    with jax.enable_x64(True):
        model = from_torch(torch_reference(1))
        history = training.fit(model, few, config, test=test, progress=False)
        return to_torch(model), history


def test_fit_ends_where_the_torch_loop_ends_and_compiles_one_step(
    data, few, torch_loop, monkeypatch
):
    compiled = []

    def spy(*arguments, **options):
        compiled.append(make_train_step(*arguments, **options))
        return compiled[-1]

    monkeypatch.setattr(flax_resblock.training.loop, "make_train_step", spy)
    (module, theirs), (ours, history) = torch_loop, fitted(few, first(data.test, 100))
    assert [step.compilations for step in compiled] == [1]
    assert worst(ours, torch_state(module)) <= TOLERANCE
    moved = relative_l2(ours["fc.weight"], torch_state(torch_reference(1))["fc.weight"])
    assert moved > 0.1  # the path leads somewhere
    assert [step.step for step in history.steps] == list(range(len(theirs)))
    for field in ("loss", "accuracy", "learning_rate"):
        np.testing.assert_allclose(
            [getattr(step, field) for step in history.steps],
            [getattr(step, field) for step in theirs],
            rtol=1e-10,
        )
    assert len(history.test_accuracy) == 2
    test = first(data.test, 100)
    images = as_torch(test.normalised(), test.labels)
    assert history.test_accuracy[-1] == reference.evaluate(module, *images).accuracy


CHANGES = [
    {"decay": ("kernel", "scale")},
    {"warmup_steps": 7},
    {"momentum": 0.91},
    {"nesterov": False},
]


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_another_run_ends_elsewhere(change, few, torch_loop):
    """The negative controls: decay of norms, a schedule off by one step, other momenta."""
    assert worst(fitted(few, **change)[0], torch_state(torch_loop[0])) >= CONTROL


@pytest.mark.slow
def test_a_pytorch_run_that_stopped_within_an_epoch_ends_as_pytorchs(data, tmp_path):
    """As test_training_checkpoints.py shows it after an epoch: also the order goes on."""
    few, steps, done = first(data.train, 320), 10, 13
    config = dataclasses.replace(SETTINGS, epochs=4, dtype="float64")
    module = torch_reference()
    optimizer = reference.sgd(module, config.learning_rate)
    scheduler = reference.warmup_cosine(optimizer, warmup_steps=5, total_steps=4 * steps)
    every = itertools.chain(*(torch_epoch(few, config, epoch) for epoch in range(4)))

    def go_on(count):
        some, smoothing = itertools.islice(every, count), config.label_smoothing
        reference.train(module, some, optimizer, scheduler, label_smoothing=smoothing)

    go_on(done)
    reference.save_checkpoint(
        tmp_path / "run.pth", module, optimizer, scheduler, epoch=0, step=done
    )
    with jax.enable_x64(True):
        model, run = load_run(tmp_path / "run.pth")
        without = from_torch(torch_state(module))
        history = training.fit(model, few, config, run=run, progress=False)
        forgotten = dataclasses.replace(run.optimizer, tensors={"momentum_buffer": {}})
        run = dataclasses.replace(run, optimizer=forgotten)
        training.fit(without, few, config, run=run, progress=False)
        ours, ours_without = to_torch(model), to_torch(without)
    go_on(4 * steps - done)
    truth = torch_state(module)
    assert worst(ours, truth) <= TOLERANCE
    assert worst(ours_without, truth) >= CONTROL
    assert [step.step for step in history.steps] == list(range(done, 4 * steps))
    assert (history.run.epochs, history.run.steps) == (4, 4 * steps)
    back = write_optimizer(history.run.optimizer, StateMap(CONFIG, NAMINGS["torchvision"]))
    for number, tensors in optimizer.state_dict()["state"].items():
        momentum = tensors["momentum_buffer"].numpy()
        assert relative_l2(back["state"][number]["momentum_buffer"], momentum) <= TOLERANCE
    for ours, theirs in zip(back["param_groups"], optimizer.param_groups, strict=True):
        assert ours["lr"] == pytest.approx(theirs["lr"], abs=1e-15)
        assert ours["weight_decay"] == theirs["weight_decay"]


@pytest.mark.slow
def test_bfloat16_computes_with_float32_parameters_and_statistics(data):
    config = dataclasses.replace(SETTINGS, epochs=1, dtype="bfloat16")
    model = training.new_model(config)
    few = first(data.train, 64)
    history = training.fit(model, few, config, progress=False)
    assert all(np.isfinite(step.loss) for step in history.steps)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model))} == {"float32", "int32"}
    assert model(data.test.normalised(slice(2)), use_running_average=True).dtype == jnp.bfloat16


def test_cross_entropy_matches_torch():
    rng, smoothing = np.random.default_rng(0), 0.1
    logits, labels = rng.normal(3, 10, (17, 10)), rng.integers(0, 10, 17)
    expected = F.cross_entropy(
        torch.from_numpy(logits), torch.from_numpy(labels), label_smoothing=smoothing
    ).item()
    with jax.enable_x64(True):
        assert float(
            cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing)
        ) == pytest.approx(expected, rel=1e-14)
        assert float(
            cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing + 0.01)
        ) != pytest.approx(expected, rel=1e-4)


def test_evaluation_counts_every_image_exactly_once(data):
    model = from_torch(torch_reference().float())
    images, labels = data.test.normalised(slice(100)), data.test.labels[:100]
    at_once, in_sevens = (
        training.evaluate(model, images, labels, batch_size=size) for size in (100, 7)
    )
    assert in_sevens.logits.shape == (100, 10)
    np.testing.assert_allclose(in_sevens.logits, at_once.logits, rtol=1e-4, atol=1e-5)
    assert in_sevens.accuracy == np.mean(in_sevens.predictions == labels)


def test_both_evaluations_agree_and_restore_the_mode(data):
    twin, test = torch_reference().train(), first(data.test, 100)
    theirs = reference.evaluate(twin, *as_torch(test.normalised(), test.labels), batch_size=30)
    assert twin.training
    with jax.enable_x64(True):
        ours = training.evaluate(from_torch(twin), test.normalised(), test.labels)
    assert relative_l2(ours.logits, theirs.logits.numpy()) <= 1e-12
    assert ours.accuracy == theirs.accuracy
    assert np.array_equal(ours.predictions, theirs.predictions.numpy())


def test_mixed_labels_weigh_as_torchs_probabilities_do():
    rng = np.random.default_rng(1)
    logits = rng.normal(1, 4, (9, 10))
    labels = rng.integers(0, 10, 9)
    others = rng.integers(0, 10, 9)
    weight = 0.3
    first, second = (
        F.one_hot(torch.from_numpy(chosen), 10).double() for chosen in (labels, others)
    )
    expected = F.cross_entropy(
        torch.from_numpy(logits), weight * first + (1 - weight) * second, label_smoothing=0.1
    ).item()
    with jax.enable_x64(True):
        mixed = Mixed(jnp.asarray(others), jnp.full(9, weight))
        assert float(
            cross_entropy(jnp.asarray(logits), jnp.asarray(labels), 0.1, mixed)
        ) == pytest.approx(expected, rel=1e-14)


@pytest.mark.slow
def test_augmented_and_mixed_runs_are_repeated_bit_for_bit(data):
    config = dataclasses.replace(
        SETTINGS,
        epochs=1,
        batch_size=128,
        dtype="float32",
        augmentation=Augmentation(pad=1, flip=True, mixup=0.3),
    )
    ends = []
    for augmentation in (config.augmentation, config.augmentation, Augmentation()):
        model = from_torch(torch_reference().float())
        training.fit(
            model,
            data.train,
            dataclasses.replace(config, augmentation=augmentation),
            progress=False,
        )
        ends.append(to_torch(model))
    assert all(ends[0][key].tobytes() == value.tobytes() for key, value in ends[1].items())
    assert worst(ends[2], ends[0]) > 1e-3
