"""Networks of other families: stage outputs, a new head, predictions with their own labels."""

import json

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image

import flax_resblock
from docs import family_tables
from flax_resblock import ResNetConfig
from flax_resblock.checkpoint.torch_file import from_numpy, with_tensors
from flax_resblock.cli import run
from flax_resblock.nn.resnet import build
from flax_resblock.parity.reference import ReferencePair
from parity_tests.families import FAMILIES, import_timm, randomise
from parity_tests.support import REPOSITORY, random_bits


def deep(**changes):
    fields = {
        "depths": (1, 1),
        "widths": (8, 12),
        "stem": "deep",
        "stem_hidden": (4, 6),
        "stem_width": 8,
        "shortcut": "pooled",
        "num_classes": 3,
    }
    return ResNetConfig(**{**fields, **changes})


@pytest.mark.slow
def test_features_are_the_stages_outputs_by_name():
    model = build(deep(), rngs=nnx.Rngs(0))
    model.eval()
    images = jax.numpy.asarray(np.random.default_rng(0).standard_normal((2, 65, 48, 3)), "float32")
    found = model.features(images)
    expected = {"stem": (2, 17, 12, 8), "stage1": (2, 17, 12, 8), "stage2": (2, 9, 6, 12)}
    assert {name: value.shape for name, value in found.items()} == expected
    np.testing.assert_array_equal(model.head(found["stage2"].mean((1, 2))), model(images))


@pytest.mark.slow
def test_a_new_head_leaves_everything_else_alone():
    model = build(deep(), rngs=nnx.Rngs(0), param_dtype=jax.numpy.bfloat16)
    before = {
        key: value
        for key, value in flax_resblock.to_torch(model).items()
        if not key.startswith("fc")
    }
    model.replace_head(7, rngs=nnx.Rngs(1))
    after = flax_resblock.to_torch(model)
    assert after["fc.weight"].shape == (7, 12)
    assert after["fc.weight"].dtype == before["conv1.0.weight"].dtype
    assert all(after[key].tobytes() == value.tobytes() for key, value in before.items())
    assert model.config.num_classes == 7
    images = jax.numpy.zeros((2, 33, 33, 3))
    assert model(images).shape == (2, 7)
    model.replace_head(None, rngs=None)
    assert model(images).shape == (2, 12)
    assert "fc.weight" not in flax_resblock.to_torch(model)
    model.replace_head(2, rngs=nnx.Rngs(2))
    assert model(images).shape == (2, 2)
    with pytest.raises(ValueError, match="positive integers"):
        model.replace_head(0, rngs=nnx.Rngs(1))


def photograph(path):
    rng = np.random.default_rng(5)
    Image.fromarray(
        np.asarray(Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8)).resize((300, 217)))
    ).save(path)
    return path


@pytest.mark.slow
def test_predict_sees_what_timm_sees_and_says_its_labels(tmp_path, capsys):
    timm = import_timm()
    module = randomise(FAMILIES["timm resnet18d"].build()).float().eval()
    ours = {
        "mean": (0.4, 0.5, 0.45),
        "std": (0.2, 0.25, 0.3),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "input_size": (3, 96, 96),
    }
    timm.models.save_for_hf(
        module,
        tmp_path / "net",
        model_config={"pretrained_cfg": ours, "label_names": ["a", "b", "[c]", "d", "e"]},
        safe_serialization=True,
    )
    image = photograph(tmp_path / "photo.png")
    arguments = f"predict {tmp_path / 'net'} {image} --logits {tmp_path / 'l.npy'} --top 5"
    assert run(arguments.split()) == 0
    text = capsys.readouterr().out
    assert "96x96 pixels" in text
    assert "pretrained_cfg" in text
    assert all(label in text for label in ("a ", "b ", "[c]", "d ", "e "))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=ours))
    with torch.no_grad():
        theirs = module(transform(Image.open(image).convert("RGB"))[None]).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "l.npy"), theirs, rtol=2e-5, atol=2e-5)
    arguments = (
        f"predict {tmp_path / 'net'} {image} --logits {tmp_path / 'other.npy'} --image-size 64"
    )
    assert run(arguments.split()) == 0
    assert np.abs(np.load(tmp_path / "other.npy") - theirs).max() > 1e-3


@pytest.mark.slow
def test_labels_of_transformers_survive_conversion_to_orbax(tmp_path, capsys):
    family = FAMILIES["huggingface basic"]
    family.save(randomise(family.build()).float(), tmp_path / "theirs")
    arguments = ["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--no-certificate"]
    assert run(arguments) == 0
    capsys.readouterr()
    assert run(["predict", str(tmp_path / "ours"), str(photograph(tmp_path / "photo.png"))]) == 0
    text = capsys.readouterr().out
    assert "goldfish" in text
    assert "great [white] shark" in text
    arguments = (
        f"convert {tmp_path / 'ours'} {tmp_path / 'back'} --to-naming huggingface --no-certificate"
    )
    assert run(arguments.split()) == 0
    assert (
        json.loads((tmp_path / "back" / "config.json").read_text())["id2label"]["1"] == "goldfish"
    )


@pytest.fixture
def bottleneck(tmp_path):
    config = ResNetConfig(
        block="bottleneck", depths=(1, 1), widths=(4, 8), stem_width=8, num_classes=3
    )
    state = ReferencePair.random(config).state
    torch.save(
        {key: from_numpy(np.array(value)) for key, value in state.items()}, tmp_path / "net.pth"
    )
    return tmp_path / "net.pth"


@pytest.mark.slow
def test_verify_shows_what_the_other_placement_of_the_stride_changes(bottleneck, capsys):
    flags = ["--precision", "float64", "--eval-only"]
    assert run(["verify", str(bottleneck), *flags]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "assumed, as the weights do not show it: the stride of a bottleneck is on its 3x3 "
        "convolution (torchvision); --stride-on 1x1 if" in text
    )
    assert (
        "with --stride-on 1x1 (it is on its first 1x1 convolution (Caffe, He et al. 2016)) the "
        "output would differ by" in text
    )
    assert run(["verify", str(bottleneck), "--stride-on", "1x1", *flags]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--stride-on" not in text
    assert "would differ" not in text


def test_a_choice_that_makes_no_network_is_refused(bottleneck, capsys):
    assert run(["inspect", str(bottleneck), "--antialias", "blur", "--stride-on", "1x1"]) == 2
    assert "does not suit this network" in capsys.readouterr().err


def test_inspect_says_of_another_network_what_is_closest(tmp_path, capsys):
    state = {
        "features.0.weight": torch.ones(8, 3, 3, 3),
        "features.0.bias": torch.ones(8),
        "fc.weight": torch.ones(1000, 512),
        "fc.bias": torch.ones(1000),
    }
    torch.save(state, tmp_path / "vgg.pth")
    assert run(["inspect", str(tmp_path / "vgg.pth")]) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert (
        "Closest family: resnet18 in naming scheme 'torchvision', which 2 of 4 tensors fit; "
        "these do not: features.0.weight, features.0.bias" in text
    )


def test_inspect_counts_what_fits_of_a_network_that_is_almost_one(tmp_path, capsys):
    state = random_bits(
        ResNetConfig(depths=(1, 1), widths=(4, 8), stem_width=8, num_classes=3), np.float32
    )
    state["layer1.0.extra.weight"] = np.ones(3, np.float32)
    torch.save(with_tensors(state), tmp_path / "net.pth")
    assert run(["inspect", str(tmp_path / "net.pth")]) == 2
    text = capsys.readouterr().err
    assert f"{len(state) - 1} of its {len(state)} tensors do" in text
    assert "unexpected  layer1.0.extra.weight" in text


PAGE = (REPOSITORY / "docs" / "families.md").read_text(encoding="utf-8")


def test_the_tables_of_families_are_current():
    assert family_tables.filled(PAGE) == PAGE
    assert family_tables.filled(PAGE.replace("| `conv_reduce` |", "| `other` |")) == PAGE


def test_the_table_names_the_versions_that_the_tests_run_with():
    files = "constraints.txt", "parity_tests/test_jax_families.py"
    pinned = "".join((REPOSITORY / name).read_text() for name in files)
    rows = PAGE.partition("|---|---|---|---|---|\n")[2].partition("\n\n")[0].splitlines()
    references = {row.split(" | ")[3] for row in rows} - {"none", "torch_ref"}
    assert len(references) > 5
    for reference in references:
        assert reference.replace(" ", "==") in pinned
