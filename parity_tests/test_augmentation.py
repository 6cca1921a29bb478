"""Augmentation against torchvision; the stream of batches depends on seed and step alone."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import threading
import time
from dataclasses import replace
from multiprocessing import util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from flax_resblock.errors import InputError
from flax_resblock.training.data import (
    Augmentation,
    Dataset,
    FolderDataset,
    Stream,
    batches,
    evaluation_batches,
)
from flax_resblock.training.data.augment import augmented, crop_window, draw, pad_crop
from flax_resblock.training.data.dataset import normalise
from flax_resblock.training.data.folder import IMAGENET_MEAN, IMAGENET_STD
from flax_resblock.training.data.images import fit, resize
from flax_resblock.training.data.mix import cut_box, draw_mixing, mix
from parity_tests.support import REPOSITORY, import_torchvision, python

EVERYTHING = Augmentation(pad=2, flip=True, mixup=0.4, cutmix=1.0)


def made(
    count: int = 26, height: int = 7, width: int = 6, channels: int = 3, dtype: type = np.uint8
) -> Dataset:
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, height, width, channels)).astype(dtype)
    return Dataset(
        name="made",
        images=images,
        labels=np.arange(count) % 5,
        num_classes=5,
        mean=(100.0, 120.0, 90.0)[:channels],
        std=(50.0, 60.0, 70.0)[:channels],
    )


def same(one, two) -> bool:
    """All fields of two batches, bit for bit."""
    return all(
        (x is None and y is None)
        or (type(x) is type(y) and x.dtype == y.dtype and np.array_equal(x, y))
        for x, y in zip(one, two, strict=True)
    )


def first(stream: Stream, count: int, step: int = 0) -> list:
    iterator = stream.from_step(step)
    got = list(itertools.islice(iterator, count))
    iterator.close()
    return got


# Images: evaluation, crops, mixing


@settings(max_examples=60)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([1, 8, 32, 65, 97, 224]),
    st.integers(0, 2**32 - 1),
)
def test_evaluation_sees_the_bits_that_torchvision_sees(height, width, size, seed):
    import_torchvision()
    from torchvision import transforms

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    theirs = transforms.Compose(
        [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
    )(Image.fromarray(pixels))
    assert np.array_equal(fit(pixels, size), np.asarray(theirs))


def test_normalised_images_differ_from_torchvisions_by_rounding_alone():
    import_torchvision()
    from torchvision import transforms

    pixels = np.random.default_rng(0).integers(0, 256, (61, 47, 3), dtype=np.uint8)
    theirs = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    )(Image.fromarray(pixels))
    difference = np.abs(
        normalise(pixels[None], IMAGENET_MEAN, IMAGENET_STD)[0] - theirs.numpy().transpose(1, 2, 0)
    )
    assert (
        0 < difference.max() <= 4.8e-7
        # pixels from 0 to 255 here and from 0 to 1 there: two roundings in other places, 2 ulp of a
        # value near 2
    )


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_are_resized_each_for_itself(channels):
    pixels = np.random.default_rng(channels).integers(0, 256, (23, 31, channels), dtype=np.uint8)
    ours = resize(pixels, 9, 40)
    for channel in range(channels):
        assert np.array_equal(
            ours[..., channel],
            np.asarray(
                Image.fromarray(pixels[..., channel].copy()).resize(
                    (40, 9), Image.Resampling.BILINEAR
                )
            ),
        )


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_pad_crop_moves_every_pixel_by_its_corner_and_fills_with_zeros(pad, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(1, 256, (3, 6, 7, 2), dtype=np.uint8)
    corners = rng.integers(0, 2 * pad + 1, (3, 2))
    cropped = pad_crop(images, pad, corners)
    for (n, y, x), pixel in zip(np.ndindex(3, 6, 7), cropped.reshape(-1, 2), strict=True):
        top, left = y + corners[n, 0] - pad, x + corners[n, 1] - pad
        assert np.array_equal(
            pixel, images[n, top, left] if 0 <= top < 6 and 0 <= left < 7 else [0, 0]
        )


def test_padding_comes_before_normalisation():
    # no pixel is at the mean
    data, augmentation = (replace(made(), mean=(99.5, 120.5, 90.5)), Augmentation(pad=3))
    batch = first(Stream(data, 26, seed=0, augmentation=augmentation), 1)[0]
    black = normalise(np.zeros((1, 1, 1, 3), np.uint8), data.mean, data.std)[0, 0, 0]
    assert np.any(np.all(batch.images == black, axis=-1))
    assert not np.any(batch.images == 0)


def test_windows_and_mirrors_are_drawn_evenly():
    images = np.tile(np.arange(1, 37, dtype=np.uint8).reshape(1, 6, 6, 1), (2000, 1, 1, 1))
    data = Dataset(
        name="one",
        images=images,
        labels=np.zeros(2000, int),
        num_classes=1,
        mean=(0.0,),
        std=(1.0,),
    )
    augmentation = Augmentation(pad=1, flip=True)
    seen = augmented(
        augmentation, data, np.arange(2000), draw(augmentation, np.random.default_rng(0), 2000)
    )
    kinds, counts = np.unique(seen.reshape(2000, -1), axis=0, return_counts=True)
    assert len(kinds) == 9 * 2
    assert counts.min() > 2000 / 18 * 0.6


class Fed:
    """What torchvision's search of a window takes from torch, with given random numbers."""

    log, exp = torch.log, torch.exp

    def __init__(self, tries: np.ndarray) -> None:
        self.tries, self.drawn, self.placed = tries, 0, 0

    def tensor(self, values):
        return torch.tensor(values, dtype=torch.float64)

    def empty(self, _size):
        return self

    def uniform_(self, low, high):
        number = self.tries[divmod(self.drawn, 2)]  # two for each attempt
        self.drawn += 1
        return self.tensor(float(low) + number * float(high - low))

    def randint(self, _low, high, size):
        # two more for the attempt that fits
        number = self.tries[(self.drawn - 1) // 2, 2 + self.placed]
        self.placed += 1
        return torch.tensor(int(number * high))


@example(3, 400, 1.0, 0.0, 0)  # no window of the whole area fits
@example(400, 3, 1.0, 0.0, 0)
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_random_resized_crops_are_torchvisions(height, width, least, share, seed):
    import_torchvision()
    from torchvision import transforms
    from torchvision.transforms import functional

    area = (least, least + share * (1 - least))
    tries = np.random.default_rng(seed).random((10, 4))
    pixels = np.zeros((height, width, 3), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.transforms.transforms.torch", Fed(tries))
        theirs = transforms.RandomResizedCrop.get_params(
            Image.fromarray(pixels), list(area), [3 / 4, 4 / 3]
        )
    assert crop_window(height, width, area, tries) == theirs
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    top, left, h, w = theirs
    cut = functional.resized_crop(Image.fromarray(pixels), top, left, h, w, [11, 13])
    assert np.array_equal(resize(pixels[top : top + h, left : left + w], 11, 13), np.asarray(cut))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_is_torchvisions(kind):
    import_torchvision()
    from torchvision.transforms import v2

    rng = np.random.default_rng(3)
    images, labels = rng.standard_normal((5, 8, 9, 3)).astype(np.float32), np.array([0, 3, 1, 2, 3])
    mixing = draw_mixing(Augmentation(**{kind: 1.0}), rng, 8, 9)
    assert 0.05 < mixing.weight < 0.95
    theirs = v2.MixUp(num_classes=4) if kind == "mixup" else v2.CutMix(num_classes=4)
    top, left, bottom, right = mixing.box or (0, 0, 0, 0)
    parameters = {
        "lam": mixing.weight,
        "lam_adjusted": mixing.weight,
        "box": (left, top, right, bottom),
    }
    theirs.make_params = lambda _: dict(parameters)
    want, soft = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2)), torch.from_numpy(labels))
    ours = mix(images, np.roll(images, 1, axis=0), mixing)
    assert np.allclose(ours.transpose(0, 3, 1, 2), want.numpy(), rtol=0, atol=3e-7)
    one_hot = np.eye(4)[labels]
    assert np.allclose(
        mixing.weight * one_hot + (1 - mixing.weight) * np.roll(one_hot, 1, axis=0),
        soft.numpy(),
        atol=1e-6,
    )


@given(
    st.floats(0, 1),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_the_weight_of_a_cut_is_the_share_of_pixels_that_stay(weight, row, column, height, width):
    mixing = cut_box(weight, row, column, height, width)
    mixed = mix(
        np.ones((1, height, width, 1), np.float32),
        np.zeros((1, height, width, 1), np.float32),
        mixing,
    )
    assert np.isclose(mixed.mean(), mixing.weight, atol=1e-6)
    assert mixing.weight >= weight - 1e-9  # the border can only make the box smaller


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pad": -1}, "pad=-1 must be"),
        (
            {"random_resized_crop": (0.0, 1.0)},
            r"random_resized_crop=\(0.0, 1.0\) must be two shares",
        ),
        ({"random_resized_crop": (0.5, 0.2)}, "must be two shares"),
        ({"random_resized_crop": (0.1, 1.0), "pad": 4}, "must be None where pad is 4"),
        ({"size": 64}, "size=64 must be None without random_resized_crop"),
        ({"size": 0, "random_resized_crop": (0.1, 1.0)}, "size=0 must be a positive"),
        ({"mixup": -0.1}, "mixup=-0.1 must be"),
        ({"cutmix": float("nan")}, "cutmix=nan must be"),
    ],
)
def test_augmentation_errors_name_the_field(fields, message):
    with pytest.raises(InputError, match=message):
        Augmentation(**fields)


# The stream of batches


def test_without_augmentation_the_stream_is_the_epochs_one_after_the_other():
    data = made()
    epochs = [batch for epoch in range(3) for batch in batches(data, 8, seed=4, epoch=epoch)]
    stream = Stream(data, 8, seed=4)
    assert (stream.steps_per_epoch, len(epochs)) == (3, 9)
    assert all(same(a, b) for a, b in zip(first(stream, 9), epochs, strict=True))


@settings(max_examples=15)
@given(
    st.integers(0, 11),
    st.sampled_from([None, EVERYTHING, Augmentation(random_resized_crop=(0.3, 1.0), size=5)]),
)
def test_a_step_does_not_depend_on_where_iteration_began(step, augmentation):
    stream = Stream(made(), 8, seed=4, augmentation=augmentation)
    assert all(
        same(a, b) for a, b in zip(first(stream, 3, step), first(stream, 14)[step:], strict=False)
    )


def test_augmentation_differs_between_steps_epochs_images_and_seeds():
    # the same image again and again
    images = np.tile(np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8, 1), (32, 1, 1, 1))
    data = Dataset(
        name="one", images=images, labels=np.zeros(32, int), num_classes=1, mean=(0.0,), std=(1.0,)
    )
    got = [
        first(Stream(data, 16, seed=seed, augmentation=Augmentation(pad=4, flip=True)), 4)
        for seed in (0, 1)
    ]
    everything = [batch.images.tobytes() for run in got for batch in run]
    assert len(set(everything)) == 8
    assert len({image.tobytes() for image in got[0][0].images}) > 8
    mixed = first(Stream(made(), 8, seed=0, augmentation=EVERYTHING), 12)
    assert len({float(batch.weight[0]) for batch in mixed}) > 9


@pytest.mark.parametrize(
    ("shards", "augmentation"),
    [
        (2, None),
        (3, EVERYTHING),
        (12, Augmentation(random_resized_crop=(0.2, 0.9), flip=True, cutmix=0.5)),
    ],
)
def test_shards_joined_are_the_whole_batch(shards, augmentation):
    data = made()
    whole = first(Stream(data, 12, seed=9, augmentation=augmentation), 5)
    parts = [
        first(Stream(data, 12, seed=9, augmentation=augmentation, shard=(i, shards)), 5)
        for i in range(shards)
    ]
    for step, want in enumerate(whole):
        joined = [
            None if fields[0] is None else np.concatenate(fields)
            for fields in zip(*(part[step] for part in parts), strict=True)
        ]
        assert same(joined, want)
    assert not np.array_equal(parts[0][0].indices, parts[1][0].indices)


def test_mixed_batches_say_which_labels_have_which_share():
    data = made()
    plain = Stream(data, 8, seed=2)
    mixed = Stream(data, 8, seed=2, augmentation=Augmentation(mixup=0.5))
    for a, b in zip(first(plain, 4), first(mixed, 4), strict=True):
        assert b.labels_b is not None
        assert b.weight is not None
        assert (b.labels_b.dtype, b.weight.dtype, b.weight.shape) == (np.int32, np.float32, (8,))
        assert np.array_equal(b.labels, a.labels)
        assert np.array_equal(b.labels_b, np.roll(a.labels, 1))
        weight = b.weight[0]
        assert np.allclose(
            b.images, weight * a.images + (1 - weight) * np.roll(a.images, 1, axis=0), atol=1e-6
        )
    kinds = {
        draw_mixing(EVERYTHING, np.random.default_rng(seed), 8, 8).box is None for seed in range(20)
    }
    assert kinds == {True, False}


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    files = []
    for i in range(12):
        files.append(str(tmp_path / f"{i}.jpg"))
        Image.fromarray(rng.integers(0, 256, (20 + i, 34 - i, 3), dtype=np.uint8)).save(
            files[-1], quality=90
        )
    return FolderDataset(
        name="pictures",
        files=tuple(files),
        labels=np.arange(12) % 3,
        class_names=("a", "b", "c"),
        size=16,
    )


def test_workers_change_nothing_and_are_gone_when_the_stream_is_closed(pictures):
    augmentation = Augmentation(random_resized_crop=(0.1, 1.0), size=12, flip=True, mixup=0.3)
    here, workers = (
        Stream(pictures, 4, seed=5, augmentation=augmentation, shard=(1, 2), workers=n)
        for n in (0, 2)
    )
    iterator = workers.from_step(2)
    assert all(
        same(a, b) for a, b in zip(first(here, 5, 2), itertools.islice(iterator, 5), strict=True)
    )
    assert len(multiprocessing.active_children()) == 2
    iterator.close()
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_no_worker_searches_the_current_folder_while_it_starts(monkeypatch):
    """The last worker starts later than the first, and all of them must be told."""
    started, spawn = [], util.spawnv_passfds

    def recorded(*arguments):
        time.sleep(0.2 * len(started))  # the first is long ready when the last one starts
        started.append(os.environ.get("PYTHONSAFEPATH"))
        return spawn(*arguments)

    monkeypatch.setattr(util, "spawnv_passfds", recorded)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    batches = Stream(made(40, 9, 9), 8, seed=0, workers=3).from_step(0)
    next(batches)
    batches.close()
    assert len(started) >= 3
    assert set(started) == {"1"}
    assert "PYTHONSAFEPATH" not in os.environ


@pytest.mark.slow
def test_a_program_may_end_while_a_stream_is_open(tmp_path):
    script = tmp_path / "open.py"
    script.write_text(
        "import numpy as np\n"
        "from flax_resblock.training.data import Augmentation, Dataset, Stream\n"
        "if __name__ == '__main__':\n"
        # slow enough that the workers are busy at the end
        "    images = np.zeros((64, 400, 400, 3), np.uint8)\n"
        "    data = Dataset(name='slow', images=images, labels=np.zeros(64, int), "
        "num_classes=1, mean=(0.0,) * 3, std=(1.0,) * 3)\n"
        "    iterator = Stream(data, 32, seed=0, "
        "augmentation=Augmentation(random_resized_crop=(0.9, 1.0)), workers=2).from_step(0)\n"
        "    print(next(iterator).images.shape)\n"
    )
    done = python(
        script, check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    assert done.stdout == "(32, 400, 400, 3)\n"
    assert "Traceback" not in done.stderr


def test_workers_without_enough_shared_memory_are_refused(monkeypatch):
    free = SimpleNamespace(f_bavail=2**10, f_frsize=2**10)
    monkeypatch.setattr("flax_resblock.training.data.prefetch.os.statvfs", lambda _: free)
    with pytest.raises(
        InputError,
        match=(
            r"workers=2 need 2 MiB of shared memory for batches of 0\.2 MiB; /dev/shm has 1 MiB "
            r"free\. .*--shm-size"
        ),
    ):
        Stream(made(9, 100, 70), 9, seed=0, workers=2).from_step(0)


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "prefetch" in thread.name]


def test_batches_are_made_ahead_and_a_dropped_stream_leaves_no_thread(pictures):
    stream = Stream(pictures, 4, seed=0)
    iterator = stream.from_step(0)
    next(iterator)
    assert len(prefetch_threads()) == 1
    del iterator
    gc.collect()
    deadline = time.monotonic() + 10
    while prefetch_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert prefetch_threads() == []


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_image_lost_during_a_run_ends_it_by_name(pictures, tmp_path, workers):
    (tmp_path / "7.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"7\.jpg cannot be decoded") as caught:
        first(Stream(pictures, 4, seed=0, workers=workers), 3)
    assert multiprocessing.active_children() == []  # although the traceback is still held
    assert caught.traceback


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 27}, "batch_size=27 must be from 1 to the 26 images of made"),
        ({"shard": (2, 2)}, r"shard=\(2, 2\) must be \(number, count\)"),
        ({"shard": (0, 3)}, "batch_size=8 must be a positive multiple of the 3 shards"),
        ({"workers": -1}, "workers=-1 must be"),
        ({"seed": -1}, "seed=-1 must be"),
        (
            {"augmentation": Augmentation(pad=6)},
            "pad=6 is not below the 6 pixels that the images of made have",
        ),
        (
            {
                "dataset": made(dtype=np.float32),
                "augmentation": Augmentation(random_resized_crop=(0.1, 1)),
            },
            "needs uint8 images; those of made are float32",
        ),
    ],
)
def test_stream_errors_say_what_does_not_fit(change, message):
    with pytest.raises(InputError, match=message):
        Stream(**({"dataset": made(), "batch_size": 8, "seed": 0} | change))


def test_a_negative_step_is_refused_at_once():
    with pytest.raises(InputError, match="step=-1 must be 0 or more"):
        Stream(made(), 8, seed=0).from_step(-1)


@settings(max_examples=25)
@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 4))
def test_evaluation_takes_every_image_once_over_all_shards(count, rows, shards):
    data = made(count)
    parts = [list(evaluation_batches(data, rows * shards, (i, shards))) for i in range(shards)]
    assert {len(part) for part in parts} == {-(-count // (rows * shards))}
    seen = []
    for batch in itertools.chain(*parts):
        expected = ((rows, 7, 6, 3), np.float32, np.int32, np.bool_)
        found = (batch.images.shape, batch.images.dtype, batch.labels.dtype, batch.valid.dtype)
        assert found == expected
        seen += batch.indices[batch.valid].tolist()
        assert np.array_equal(
            batch.images[batch.valid], data.normalised(batch.indices[batch.valid])
        )
        assert np.array_equal(batch.labels[batch.valid], data.labels[batch.indices[batch.valid]])
        assert np.all(batch.indices[~batch.valid] == -1)
        assert not batch.images[~batch.valid].any()
    assert sorted(seen) == list(range(count))


def test_evaluation_in_workers_is_the_same(pictures):
    here, workers = (list(evaluation_batches(pictures, 5, workers=n)) for n in (0, 1))
    assert len(here) == 3
    assert all(same(a, b) for a, b in zip(here, workers, strict=True))
    assert multiprocessing.active_children() == []


def test_evaluation_errors_say_what_does_not_fit():
    with pytest.raises(
        InputError, match="batch_size=5 must be a positive multiple of the 2 shards"
    ):
        evaluation_batches(made(), 5, (0, 2))
    with pytest.raises(InputError, match="workers=-2 must be"):
        evaluation_batches(made(), 4, workers=-2)
