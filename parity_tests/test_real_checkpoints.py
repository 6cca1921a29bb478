"""Two CIFAR-10 networks that others trained, and real images."""

from dataclasses import asdict

import jax
import numpy as np
import pytest
import torch

from flax_resblock import config as arch
from flax_resblock import load, to_torch
from flax_resblock.parity.oracle import FLOAT64_LIMIT, relative_l2, verdict_of
from parity_tests.support import SHARED, needs_real_checkpoints, torch_output
from torch_ref import ResNet

pytestmark = needs_real_checkpoints
FILES = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}


@pytest.mark.parametrize("name", FILES)
def test_the_architecture_is_found_and_the_bits_come_back(name):
    model = load(SHARED / FILES[name])
    assert (arch.name_of(model.config), model.config) == (name, arch.architecture(name))
    original = torch.load(SHARED / FILES[name], map_location="cpu", weights_only=True)["state_dict"]
    back = to_torch(model, "akamaster")
    assert {key for key in back if "num_batches" not in key} == {
        key.removeprefix("module.") for key in original
    }
    for key, value in original.items():
        assert back[key.removeprefix("module.")].tobytes() == value.numpy().tobytes()


def images_and_logits():
    images = np.load(SHARED / "cifar10_20_images.npz")
    logits = np.load(SHARED / "resnet20_20_images_logits.npz")
    return (images["images"] / 255 - images["mean"]) / images["std"], images["labels"], logits


def test_logits_on_real_images_are_pytorchs_in_float64():
    images, labels, logits = images_and_logits()
    model = load(SHARED / FILES["resnet20"])
    with jax.enable_x64(True):
        ours = np.asarray(model(jax.numpy.asarray(images)))
        batch_statistics = np.asarray(model(jax.numpy.asarray(images), use_running_average=False))
    assert relative_l2(ours, logits["logits_float64"]) <= FLOAT64_LIMIT
    assert np.array_equal(ours.argmax(1), labels)
    assert relative_l2(batch_statistics, logits["logits_float64"]) > 1e-2


class Akamaster(ResNet):
    """The reference network under akamaster's names: its head is called ``linear``."""

    def __init__(self):
        super().__init__(**asdict(arch.architecture("resnet20")))
        self.linear, self.fc = self.fc, torch.nn.Identity()

    def forward(self, images):
        return self.linear(super().forward(images))


def test_back_under_akamasters_names_pytorch_computes_the_given_logits():
    images, labels, logits = images_and_logits()
    module = Akamaster().double()
    module.load_state_dict(
        {
            key: torch.from_numpy(value)
            for key, value in to_torch(load(SHARED / FILES["resnet20"]), "akamaster").items()
        },
        strict=True,
    )
    theirs = torch_output(module, images)
    assert relative_l2(theirs, logits["logits_float64"]) <= FLOAT64_LIMIT
    assert np.array_equal(theirs.argmax(1), labels)


def test_logits_on_real_images_are_within_pytorchs_own_error_in_float32():
    images, labels, logits = images_and_logits()
    ours = np.asarray(load(SHARED / FILES["resnet20"])(jax.numpy.asarray(images, np.float32)))
    assert np.array_equal(ours.argmax(1), labels)
    truth = logits["logits_float64"]
    own = relative_l2(logits["logits_float32"], truth)
    assert verdict_of(relative_l2(ours, truth), own, 2.0**-23).passed
    assert not verdict_of(relative_l2(ours * (1 + 1e-4), truth), own, 2.0**-23).passed
