"""What training is given: data and their order, configurations, and all that does not fit."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections import Counter

import jax
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import flax_resblock.training.loop
from flax_resblock import ResidualBlock, from_torch, to_torch, training
from flax_resblock.convert import StateMap
from flax_resblock.errors import InputError
from flax_resblock.runs.scheduler_state import ScheduleState
from flax_resblock.runs.schedules import OneCycleLR, Phase
from flax_resblock.training.config import TrainConfig
from flax_resblock.training.data import Dataset, batches, digits, epoch_order, steps_per_epoch
from flax_resblock.training.devices import Placement
from flax_resblock.training.pace import Pace, new_run
from flax_resblock.training.step import TrainStep
from parity_tests.test_training import CONFIG, SETTINGS
from torch_ref import ResNet as TorchResNet

SMALLEST = dataclasses.replace(
    SETTINGS, model=dataclasses.replace(CONFIG, depths=(1,), widths=(4,), stem_width=4)
)


@pytest.fixture(scope="module")
def data():
    return digits()


def test_digits_split_is_disjoint_and_complete(data):
    bunch = load_digits()
    everything = Counter(
        (image.astype(np.uint8).tobytes(), int(label))
        for image, label in zip(bunch.images, bunch.target, strict=True)
    )
    parts = Counter(
        (image.tobytes(), int(label))
        for part in data
        for image, label in zip(part.images, part.labels, strict=True)
    )
    assert parts == everything
    assert (len(data.train), len(data.test)) == (1437, 360)


def test_digits_split_is_deterministic_and_stratified(data):
    again = digits()
    for one, two in zip(data, again, strict=True):
        assert np.array_equal(one.images, two.images)
        assert np.array_equal(one.labels, two.labels)
    share = np.bincount(data.test.labels) / np.bincount(load_digits().target)
    assert np.all(np.abs(share - 0.2) < 0.01)


def test_training_images_are_normalised(data):
    pixels = data.train.normalised()
    assert pixels.dtype == np.float32
    assert abs(pixels.mean()) < 1e-5
    assert abs(pixels.std() - 1) < 1e-5


def test_batches_depend_on_seed_and_epoch_alone(data):
    def stream(seed, epoch):
        return list(batches(data.train, 100, seed=seed, epoch=epoch))

    one, two = stream(5, 3), stream(5, 3)
    assert len(one) == steps_per_epoch(data.train, 100) == 14
    for a, b in zip(one, two, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        assert np.array_equal(a.images, data.train.normalised(a.indices))
        assert np.array_equal(a.labels, data.train.labels[a.indices])
    assert np.array_equal(
        np.concatenate([batch.indices for batch in one]),
        epoch_order(len(data.train), seed=5, epoch=3)[:1400],
    )


def test_every_epoch_and_seed_has_another_order():
    orders = {
        (seed, epoch): epoch_order(500, seed=seed, epoch=epoch)
        for seed in range(3)
        for epoch in range(3)
    }
    assert all(np.array_equal(np.sort(order), np.arange(500)) for order in orders.values())
    for a, b in itertools.combinations(
        orders.values(), 2
    ):  # (seed, epoch + 1) and (seed + 1, epoch) among them
        assert np.mean(a == b) < 0.05


def test_batches_are_on_their_device_before_the_step_that_takes_them(data, monkeypatch):
    placed, taken, reported = [], [], []
    spread, advance = Placement.spread, TrainStep.advance

    def recorded(self, array, **more):
        if array.ndim == 4:
            placed.append(threading.current_thread())
        if len(placed) == 6:
            raise OSError("the sixth batch")
        return spread(self, array, **more)

    def waits(self, leaves, images, *rest, **more):
        """Calls the step when the batch after its own has been placed; fails if it never is."""
        end = time.monotonic() + 10
        while len(placed) < len(taken) + 2:
            assert time.monotonic() < end, "no batch is placed ahead"
            time.sleep(0.001)
        taken.append(images)
        return advance(self, leaves, images, *rest, **more)

    monkeypatch.setattr(Placement, "spread", recorded)
    monkeypatch.setattr(TrainStep, "advance", waits)
    device, model = jax.devices()[1], training.new_model(SMALLEST)
    with jax.default_device(device), pytest.raises(OSError, match="the sixth batch"):
        training.fit(model, data.train, SMALLEST, on_step=reported.append, progress=False)
    assert [images.devices() for images in taken] == [{device}] * 5  # those before the sixth
    assert [report.step for report in reported] == [0, 1, 2, 3]
    assert threading.main_thread() not in placed
    assert not [thread for thread in threading.enumerate() if "prefetch" in thread.name]


def test_a_diverging_run_names_the_step_and_leaves_the_model_as_it_was(data):
    config = dataclasses.replace(SMALLEST, learning_rate=1e30)
    model = training.new_model(config)
    before = {key: value.copy() for key, value in to_torch(model).items()}
    with pytest.raises(
        flax_resblock.training.TrainingError,
        match=r"the loss is (nan|inf) at step \d+ \(epoch 1, learning rate",
    ):
        training.fit(model, data.train, config, progress=False)
    after = to_torch(model)
    assert all(np.array_equal(value, after[key]) for key, value in before.items())


OUT_OF_RANGE = {
    "epochs": 0,
    "batch_size": 0,
    "accumulate": 3,
    "steps": 0,
    "optimizer": "rmsprop",
    "learning_rate": float("nan"),
    "momentum": 1.0,
    "betas": (0.9, 1.0),
    "weight_decay": -1e-4,
    "decay": ("weight",),
    "clip_norm": 0.0,
    "aux_weight": 0.0,
    "ema": 1.0,
    "warmup_epochs": 2,
    "warmup_steps": -1,
    "warmup_factor": 0.0,
    "label_smoothing": 1.0,
    "freeze": ("stage9",),
    "val_fraction": 1.0,
    "batch_norm": "local",
    "image_size": 0,
    "seed": -1,
    "dtype": "float16",
}


def test_settings_out_of_their_range_are_named():
    for name, value in OUT_OF_RANGE.items():
        with pytest.raises(InputError, match=f"^{name}="):
            dataclasses.replace(SETTINGS, **{name: value})
    with pytest.raises(InputError, match="nesterov=True must be False where momentum is 0"):
        dataclasses.replace(SETTINGS, momentum=0.0)
    unchecked = {"model", "nesterov", "augmentation", "data", "workers"}
    assert {field.name for field in dataclasses.fields(TrainConfig)} == {*OUT_OF_RANGE, *unchecked}


def test_a_run_that_cannot_go_on_here_is_refused(data):
    model = training.new_model(SETTINGS)
    steps = steps_per_epoch(data.train, SETTINGS.batch_size)
    begun = new_run(SETTINGS, steps, StateMap(CONFIG, "torchvision"))
    run = Pace.of(begun, steps).after(2 * steps)
    with pytest.raises(
        InputError,
        match="the run is over: it is at step 88, and its 2 epochs of 44 steps end at 88",
    ):
        training.fit(model, data.train, SETTINGS, run=run, progress=False)
    run = dataclasses.replace(begun, steps=None, epochs=2)
    with pytest.raises(InputError, match="the run is over: it is at step 88"):
        training.fit(model, data.train, SETTINGS, run=run, progress=False)
    deeper = StateMap(dataclasses.replace(CONFIG, depths=(1, 2)), "torchvision")
    another = new_run(SETTINGS, steps, deeper)
    with pytest.raises(
        InputError,
        match=r"the run's optimizer is another model's: stage2\.1\.\S+, .* are only on one side",
    ):
        training.fit(model, data.train, SETTINGS, run=another, progress=False)
    phases = tuple(Phase(end, "lr", "lr", "momentum", "momentum") for end in (20.0, 79.0))
    one_cycle = OneCycleLR(80, phases, "cos", True, False)
    run = dataclasses.replace(begun, schedule=ScheduleState(one_cycle, 0))
    with pytest.raises(
        InputError,
        match=(
            "the OneCycleLR of this run ends at its step 80, but its 2 epochs of 44 steps "
            "would take it to 87"
        ),
    ):
        training.fit(model, data.train, SETTINGS, run=run, progress=False)


def test_misfits_are_refused(data):
    model = training.new_model(SETTINGS)
    with pytest.raises(InputError, match=r"replace\(config, model=model\.config\)"):
        training.fit(model, data.train, TrainConfig(), progress=False)
    with pytest.raises(
        InputError, match="batch_size=2000 must be from 1 to the 1437 images of digits/train"
    ):
        training.fit(
            model, data.train, dataclasses.replace(SETTINGS, batch_size=2000), progress=False
        )
    wide_data = dataclasses.replace(data.train, num_classes=11, class_names=None)
    with pytest.raises(
        InputError, match="knows 10 classes; digits/train has images of 1 channels in 11 classes"
    ):
        training.fit(model, wide_data, SETTINGS, progress=False)
    with pytest.raises(InputError, match=r"ResidualBlock returns \(2, 8, 8, 4\)"):
        training.evaluate(
            ResidualBlock(1, 4, rngs=nnx.Rngs(0)), data.test.normalised(), data.test.labels
        )
    with pytest.raises(InputError, match="got 5 images and 4 labels"):
        training.evaluate(model, data.test.normalised(slice(5)), data.test.labels[:4])
    wide = from_torch(TorchResNet(**dataclasses.asdict(CONFIG)).double())
    with pytest.raises(InputError, match="float64, which jax would narrow"):
        training.fit(wide, data.train, SETTINGS, progress=False)
    with pytest.raises(InputError, match="JAX_ENABLE_X64=1"):
        training.new_model(dataclasses.replace(SETTINGS, dtype="float64"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((3, 8, 8), np.uint8)}, r"images have shape \(3, 8, 8\)"),
        ({"images": np.zeros((3, 8, 8, 1), np.int64)}, "images are int64"),
        ({"labels": np.zeros(2, np.int32)}, r"labels have shape \(2,\)"),
        (
            {"labels": np.array([0, 1, 10], np.int32)},
            "labels reach from 0 to 10; with 10 classes, 0 to 9",
        ),
        ({"std": (0.0,)}, "std above 0"),
        ({"mean": (0.0, 0.0)}, "must give 1 numbers each"),
        ({"class_names": ("a", "b")}, "2 class names for 10 classes"),
    ],
)
def test_dataset_errors_name_the_dataset(change, message):
    sound = {
        "images": np.zeros((3, 8, 8, 1), np.uint8),
        "labels": np.zeros(3, np.int32),
        "mean": (0.0,),
        "std": (1.0,),
    }
    with pytest.raises(InputError, match=f"^tiny: .*{message}"):
        Dataset(name="tiny", num_classes=10, **(sound | change))
