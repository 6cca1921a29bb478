"""The size of the images that a network is trained on, where nobody says one."""

import numpy as np
from PIL import Image

from flax_resblock.cli.train_data import at_own_size
from flax_resblock.config import architecture
from flax_resblock.training import TrainConfig
from flax_resblock.training.data import open_data


def test_small_pictures_stay_small_for_a_stem_that_keeps_every_pixel(tmp_path):
    rng = np.random.default_rng(0)
    for number, size in enumerate([(40, 31), (20, 90), (33, 28), (12, 12)]):
        place = tmp_path / "small" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(place / f"{number}.png")
    splits = open_data(tmp_path / "small", val_fraction=0.5)
    config, cifar = TrainConfig(), architecture("resnet20")
    sized, (train, test) = at_own_size(config, splits, cifar)
    assert sized.image_size == 31  # the shorter side of the largest
    assert train.fitted().shape[1:] == test.fitted().shape[1:] == (31, 31, 3)
    # a stem that reduces its images, a size that was said, and images that are large
    assert at_own_size(config, splits, architecture("resnet18")) == (config, splits)
    said = TrainConfig(image_size=224)
    assert at_own_size(said, splits, cifar) == (said, splits)
    large = rng.integers(0, 256, (230, 300, 3), np.uint8)
    Image.fromarray(large).save(tmp_path / "small" / "class0" / "large.png")
    splits = open_data(tmp_path / "small", val_fraction=0.5)
    assert at_own_size(config, splits, cifar) == (config, splits)
