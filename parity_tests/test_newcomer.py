"""What a new user meets first: true sentences, batches that fit, files that remember."""

from __future__ import annotations

import io
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import flax_resblock
from flax_resblock import InputError, ResNetConfig, preprocess
from flax_resblock.cli import run
from flax_resblock.cli.train_data import filled_batches
from flax_resblock.cli.wrapping import for_stream, wrapped
from flax_resblock.convert.image_facts import carried_images, read_images
from flax_resblock.training import TrainConfig
from flax_resblock.training.curves import draw_curves
from flax_resblock.training.data import open_data
from flax_resblock.training.data.dataset import held_out
from flax_resblock.training.data.facts import image_facts
from flax_resblock.training.reports import EvaluationReport

COLOURS = {"ant": 60, "bee": 140, "cat": 210}


@pytest.fixture
def pictures(folder):
    """``flat/CLASS/*.png``, sixteen of each class."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / "flat" / name).mkdir(parents=True)
        for number in range(16):
            pixels = np.clip(rng.normal(colour, 40, (23, 31, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "flat" / name / f"{number}.png")
    return folder / "flat"


def said(capsys, line, status=0):
    """What a command printed, in one line."""
    code = run(line.split())
    captured = capsys.readouterr()
    assert code == status, captured.err
    return " ".join((captured.err if status else captured.out).split())


@pytest.mark.slow
def test_a_run_says_what_it_trains_on_and_its_checkpoint_remembers(pictures, capsys):
    flags = "--data flat --val-fraction 0.25 --image-size 16 --num-classes 5 --epochs 2 --out run"
    text = said(capsys, f"train {flags}")
    assert "12 of 48 in all, are set aside" in text
    assert "3 channels, as flat/train has, and 5 classes, as --num-classes says" in text
    assert "a batch has 36 images instead of 64, as flat/train has no more than 36" in text
    assert "flat: 36 training images and 12 test images of 16x16 pixels, 3 channels" in text
    assert "2 in all, 1 per epoch, 36 images each" in text
    evaluated = said(capsys, "train --eval-only run --out found")
    accuracy = json.loads(Path("found/evaluation.json").read_text())["accuracy"]
    assert f"({accuracy * 12:.0f} of 12)" in evaluated  # the same images are set aside again

    model = flax_resblock.load("run")
    files = ["flat/ant/3.png", "flat/cat/3.png"]
    assert said(capsys, "convert run copy.safetensors --no-certificate")
    assert said(capsys, "convert copy.safetensors copy.pth --no-certificate")
    assert said(capsys, "export copy.pth exported --platforms cpu")
    for number, checkpoint in enumerate(("run", "copy.safetensors", "copy.pth", "exported")):
        line = f"predict {checkpoint} {' '.join(files)} --exact --logits {number}.npy --top 5"
        text = said(capsys, line)
        assert "16x16 pixels" in text
        assert all(name in text for name in (*COLOURS, "class 3", "class 4"))
        assert all(file in text for file in files)  # both are called 3.png
        np.testing.assert_allclose(np.load(f"{number}.npy"), np.load("0.npy"), atol=1e-6)
    np.testing.assert_allclose(model(preprocess(files, model)), np.load("0.npy"), atol=1e-5)
    data = open_data("flat", image_size=16, val_fraction=0.25).train
    index = data.files.index(files[0]) if files[0] in data.files else None
    if index is not None:
        seen = data.normalised(np.array([index]))
        np.testing.assert_allclose(preprocess(files[0], model), seen, atol=2e-6)
    text = said(capsys, "train --resume run --epochs 3 --schedule constant --out on")
    assert "1 step (3 in all), last loss" in text


@pytest.mark.parametrize("fraction", [0.2, 0.25, 1 / 3, 0.5])
def test_a_fraction_of_each_class_is_set_aside(fraction):
    labels = np.repeat(np.arange(4), [10, 21, 40, 7])
    chosen = held_out(labels, fraction)
    for label in range(4):
        count = np.sum(labels == label)
        assert abs(chosen[labels == label].sum() - fraction * count) < 1
    assert (chosen == held_out(labels, fraction)).all()
    assert (chosen != held_out(labels, fraction, seed=1)).any()


def test_test_images_that_are_missing_are_told_with_the_flag_that_makes_them(pictures):
    with pytest.raises(InputError, match=r"`val_fraction=0\.2`, .* sort the class folders into"):
        open_data("flat")
    train, test = open_data("flat", val_fraction=0.2)
    assert set(train.files) | set(test.files) == {str(file) for file in Path("flat").rglob("*.png")}
    assert not set(train.files) & set(test.files)
    with pytest.raises(InputError, match="digits has test images of its own"):
        open_data("digits", val_fraction=0.2)
    with pytest.raises(InputError, match="leaves no training image of bee, cat"):
        open_data("flat", val_fraction=0.99)
    (pictures / "val" / "ant").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no data of a known kind"):
        open_data("flat", val_fraction=0.2)  # val/ would become a class


def test_a_batch_that_nobody_chose_fits_the_images(capsys):
    data = open_data("digits").test
    small = TrainConfig(batch_size=1000)
    assert filled_batches(small, data, 1).batch_size == 360
    assert "a batch has 360 images instead of 1000" in " ".join(capsys.readouterr().out.split())
    accumulated = TrainConfig(batch_size=1000, accumulate=8)
    assert filled_batches(accumulated, data, 4).batch_size == 352
    assert filled_batches(small, data, 1, {"batch_size": 1000}).batch_size == 1000
    assert filled_batches(TrainConfig(), data, 1) == TrainConfig()


@pytest.mark.parametrize("flag", ["resume", "init", "eval-only"])
def test_a_checkpoint_from_elsewhere_is_never_trained_or_tested_on_the_digits(flag, folder, capsys):
    config = ResNetConfig(depths=(1,), widths=(4,), stem="cifar", stem_width=4, num_classes=10)
    flax_resblock.save(flax_resblock.ResNet(config, rngs=nnx.Rngs(0)), "net.safetensors")
    weights = "--weights-only" if flag == "resume" else ""
    text = said(capsys, f"train --{flag} net.safetensors {weights}", status=2)
    assert "net.safetensors does not say which images it is for. Name them with --data" in text
    assert [path.name for path in folder.iterdir()] == ["net.safetensors"]


def digits_model():
    """A small network that knows its images are the digits."""
    from flax_resblock.training import fit

    few = open_data("digits").test
    config = TrainConfig(
        model=ResNetConfig(
            depths=(1,), widths=(4,), stem="cifar", stem_width=4, in_channels=1, num_classes=10
        ),
        steps=1,
        warmup_steps=0,
    )
    model = flax_resblock.ResNet(config.model, rngs=nnx.Rngs(0))
    fit(model, few, config, progress=False)
    model.eval()
    return model, few


def test_preprocess_does_what_the_checkpoint_says_and_refuses_other_units(folder):
    model, few = digits_model()
    pixels = few.images[:3]
    expected = few.normalised(slice(3))
    np.testing.assert_allclose(preprocess(pixels, model), expected, atol=1e-6)
    assert not np.allclose(preprocess(pixels, model, mean=(0.1,), std=(1.0,)), expected, atol=1e-2)
    for name in ("net.safetensors", "net.pth", "net"):
        flax_resblock.save(model, name)
        loaded = flax_resblock.load(name)
        assert carried_images(loaded) == carried_images(model) == image_facts(few)
        np.testing.assert_allclose(preprocess(pixels / 16.0, loaded), expected, atol=1e-6)
    Image.fromarray((pixels[0, ..., 0] * 15.9375).astype(np.uint8)).save("digit.png")
    np.testing.assert_allclose(preprocess("digit.png", model), expected[:1], atol=2e-2)
    with pytest.raises(InputError, match="expected 0 to 16, which is white"):
        preprocess(pixels * 15, model)
    with pytest.raises(InputError, match="pixels from 0 to 16; expected 0 to 1"):
        preprocess(pixels.astype(np.float32), model)
    with pytest.raises(InputError, match="have 3 channels, and the model takes 1"):
        preprocess(np.repeat(pixels, 3, -1), model)
    with pytest.raises(InputError, match="cannot be read as an image"):
        preprocess("net.pth", model)


def test_a_network_refuses_integers_and_an_unknown_one_warns_of_what_it_assumes():
    config = ResNetConfig(depths=(1,), widths=(4,), stem="cifar", stem_width=4, num_classes=2)
    model = flax_resblock.ResNet(config, rngs=nnx.Rngs(0))
    images = np.random.default_rng(0).integers(0, 256, (2, 9, 8, 3), np.uint8)
    with pytest.raises(InputError, match=r"Conv got uint8 \(2, 9, 8, 3\).*preprocess"):
        model(images)
    with pytest.warns(flax_resblock.AssumptionWarning, match=r"mean \(0\.485"):
        seen = preprocess(images, model)
    np.testing.assert_allclose(
        seen, (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225], atol=1e-5
    )
    with pytest.raises(InputError, match="nothing is known of the images"):
        preprocess(images, nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_floating_data_in_units_of_their_own_take_no_files(folder):
    rng = np.random.default_rng(0)
    np.savez("own.npz", images=rng.normal(size=(20, 5, 7, 2)), labels=np.arange(20) % 2)
    facts = image_facts(open_data("own.npz").train)
    assert facts.preprocessing.white is None
    assert facts.preprocessing.size == (5, 7)
    assert read_images(facts.metadata, "x") == facts
    for change in ('"size": [5, 99999]', '"size": [5]', '"size": null'):
        damaged = {"images": facts.metadata["images"].replace('"size": [5, 7]', change)}
        with pytest.raises(flax_resblock.CheckpointError, match="of its images is damaged"):
            read_images(damaged, "net.safetensors")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_every_output_has_the_permissions_of_the_umask(umask, folder):
    config = ResNetConfig(depths=(1,), widths=(4,), stem="cifar", stem_width=4, num_classes=2)
    model = flax_resblock.ResNet(config, rngs=nnx.Rngs(0))
    before = os.umask(umask)
    try:
        for name in ("net.safetensors", "net.pth", "net"):
            flax_resblock.save(model, name)
    finally:
        os.umask(before)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def test_training_and_test_curves_differ_in_colour(tmp_path):
    steps = [
        {"step": i, "loss": 2.0 - i / 9, "accuracy": 0.5, "learning_rate": 1} for i in range(9)
    ]
    tests = [EvaluationReport(i, 1, 0.4, 1.5, 0.6, 1.2) for i in (4, 9)]
    draw_curves(steps, tests, tmp_path / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).reshape(-1, 3)
    found = {tuple(pixel) for pixel in pixels.tolist()}
    assert {(31, 119, 180), (255, 127, 14), (214, 39, 40)} <= found


def test_lines_are_broken_between_words_and_continuations_indented():
    text = "  note  " + "several words and a/path/that/is/longer/than/a/terminal/is/wide " * 5
    lines = wrapped(text.rstrip(), 60)
    assert lines[0].startswith("  note  several")
    assert all(line.startswith(" " * 8) and line[8] != " " for line in lines[1:])
    assert " ".join(" ".join(lines).split()) == " ".join(text.split())
    assert all(len(line) <= 60 or " " not in line.strip() for line in lines)
    stream = io.StringIO()
    assert for_stream(text, stream) == text  # a file gets whole lines
    stream.isatty = lambda: True
    assert for_stream("flax-resblock: " + "word " * 60, stream).count("\n") >= 2
