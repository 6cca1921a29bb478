"""Networks of transformers, timm and torchvision convert with no flags and go back."""

import json
import warnings

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import flax_resblock
from flax_resblock import checkpoint
from flax_resblock.checkpoint.torch_file import state_to_numpy
from flax_resblock.cli import run
from flax_resblock.config import ARCHITECTURES
from flax_resblock.convert import StateMap
from flax_resblock.convert.opening import ReadOptions, open_checkpoint
from flax_resblock.parity.comparison import Plan, compare_pair
from flax_resblock.parity.inputs import adversarial_images
from flax_resblock.parity.oracle import FLOAT64_LIMIT, relative_l2
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.reference import ReferencePair
from flax_resblock.parity.taps import as_tensor
from parity_tests.families import FAMILIES, import_timm, import_transformers, randomise
from parity_tests.support import (
    assert_same_bits,
    fast_only,
    import_torchvision,
    output,
    torch_output,
)
from parity_tests.test_round_trip import few_architectures

QUICK = ("huggingface bottleneck, stride on the 1x1", "timm resnet18d")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the packages' own
        yield


def saved(name, folder):
    """The module of a family, and the folder that its package wrote."""
    module = randomise(FAMILIES[name].build())
    FAMILIES[name].save(module, folder)
    return module


def from_timms_folder(folder):
    """What timm builds from its config.json; in float64, which its parameters would cut off."""
    torch.set_default_dtype(torch.float64)
    try:
        return import_timm().create_model(f"local-dir:{folder}", pretrained=True)
    finally:
        torch.set_default_dtype(torch.float32)


def evaluated(path, images, **arguments):
    """What the Flax network of a checkpoint gives, in float64."""
    with jax.enable_x64(True):
        return output(flax_resblock.load(path, **arguments), images)


def convert(source, out, *more):
    """Runs the command, without a certificate."""
    assert run(["convert", str(source), str(out), "--no-certificate", *more]) == 0


@pytest.mark.parametrize("name", fast_only(["huggingface basic"], FAMILIES))
def test_a_family_converts_without_flags_computes_the_same_and_goes_back(name, tmp_path):
    family = FAMILIES[name]
    module = saved(name, tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours.safetensors")
    source = open_checkpoint(tmp_path / "ours.safetensors")
    assert source.state_map.naming.name == family.naming
    state = state_to_numpy(module.state_dict())
    assert set(source.tensors) == set(state)
    assert_same_bits({key: np.asarray(source.tensors[key]) for key in state}, state)
    images = adversarial_images(source.config, batch=2)
    twins = ReferencePair(
        source.config,
        dict(source.tensors),
        source.norm_options,
        naming=family.naming,
        module=family.plain(module),
    )
    comparison = compare_pair(twins, images, Plan(gradients=True, precisions=("float64",)))
    failed = [row for row in comparison.measurements if not row.verdict.passed]
    assert comparison.passed, failed[:3]
    stated = {row.quantity for row in comparison.measurements}
    assert {"eval forward", "train forward", "parameter gradient"} <= stated
    assert ("running statistics" in stated) == (source.config.norm == "batch")
    if name.startswith("timm"):
        target, back = {"torchvision": "timm"}.get(family.naming, family.naming), from_timms_folder
    else:
        target, back = family.naming, lambda folder: type(module).from_pretrained(folder)
    convert(tmp_path / "ours.safetensors", tmp_path / "back", "--to-naming", target)
    again = back(tmp_path / "back").double()
    assert_same_bits(state_to_numpy(again.state_dict()), state)
    outputs = [torch_output(family.plain(it), images) for it in (again, module)]
    assert relative_l2(*outputs) == 0


@pytest.mark.slow
def test_another_eps_would_be_noticed(tmp_path):
    name = QUICK[1]
    module = saved(name, tmp_path / "theirs")
    images = adversarial_images(flax_resblock.load(tmp_path / "theirs").config, batch=2)
    truth = torch_output(FAMILIES[name].plain(module), images)
    assert relative_l2(evaluated(tmp_path / "theirs", images), truth) <= FLOAT64_LIMIT
    assert (
        relative_l2(evaluated(tmp_path / "theirs", images, eps=1.1e-5), truth) > 100 * FLOAT64_LIMIT
    )


CHOICES = {
    "huggingface bottleneck, stride on the 1x1": {"stride_on": "3x3"},
    "huggingface bottleneck, first stage strided": {"first_stride": 1},
    "timm resnetblur18": {"antialias": "none"},
    "timm dilated": {"dilated_stages": ()},
}
CASES = [
    QUICK[0],
    *fast_only([], list(CHOICES)[1:]),
    pytest.param("timm seresnext50_32x4d", marks=pytest.mark.slow),
    pytest.param("timm ecaresnet26t", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", CASES[:4])
def test_what_no_tensor_tells_is_told_by_config_json(name, tmp_path):
    module = saved(name, tmp_path / "theirs")
    folder = flax_resblock.load(tmp_path / "theirs")
    images = adversarial_images(folder.config, batch=2)
    truth = torch_output(FAMILIES[name].plain(module), images)
    assert relative_l2(evaluated(tmp_path / "theirs", images), truth) <= FLOAT64_LIMIT
    (field,) = CHOICES[name]
    (tmp_path / "theirs" / "model.safetensors").rename(tmp_path / "alone.safetensors")
    alone = open_checkpoint(tmp_path / "alone.safetensors")
    assert getattr(alone.config, field) == CHOICES[name][field]  # what is assumed where nobody says
    assumed = evaluated(tmp_path / "alone.safetensors", images)
    assert relative_l2(assumed, truth) > 1e6 * FLOAT64_LIMIT
    told = ReadOptions(assumptions={field: getattr(folder.config, field)})
    assert open_checkpoint(tmp_path / "alone.safetensors", told).config == folder.config


@pytest.mark.parametrize("name", CASES)
def test_a_module_says_itself_what_no_tensor_tells(name):
    family = FAMILIES[name]
    module = family.plain(randomise(family.build()))
    with jax.enable_x64(True):
        model = flax_resblock.from_torch(module)
        images = adversarial_images(model.config, batch=2)
        ours = output(model, images)
        assert relative_l2(ours, torch_output(module, images)) <= FLOAT64_LIMIT


NAMES = [name for name in ARCHITECTURES if "cifar" not in name and "caffe" not in name]


@pytest.mark.parametrize("name", fast_only(few_architectures(), NAMES))
def test_names_and_shapes_are_timms(name):
    timm = import_timm()
    if not timm.is_model(name):
        assert name.startswith(("resnet", "preact_resnet", "preresnet", "wrn_"))  # CIFAR's
        return
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    theirs = [(key, tuple(value.shape)) for key, value in state.items()]
    config = ARCHITECTURES[name]
    first = "timm_v2_d" if config.stem in ("deep", "tiered") else "timm_v2"
    ours = StateMap(config, first if config.norm_first else "timm").entries
    assert [(entry.torch_key, entry.torch_shape) for entry in ours] == theirs


def test_sharded_and_pickled_folders_of_transformers_are_read(tmp_path):
    transformers = import_transformers()
    module = saved("huggingface bottleneck, first stage strided", tmp_path / "whole")
    state = state_to_numpy(module.state_dict())
    module.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    (tmp_path / "pickled").mkdir()
    module.config.save_pretrained(tmp_path / "pickled")
    # as transformers before version 5 did
    torch.save(module.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    for folder in ("whole", "shards", "pickled"):
        assert_same_bits(
            dict(sorted(open_checkpoint(tmp_path / folder).tensors.items())),
            dict(sorted(state.items())),
        )
        assert open_checkpoint(tmp_path / folder).hub.labels[1] == "goldfish"
    assert (
        transformers.ResNetForImageClassification.from_pretrained(
            tmp_path / "shards"
        ).config.id2label[1]
        == "goldfish"
    )


@pytest.mark.slow
def test_a_model_from_python_is_saved_for_transformers(tmp_path):
    transformers = import_transformers()
    model = flax_resblock.create(
        "resnet26",
        widths=(4, 8, 8, 16),
        num_classes=3,
        rngs=nnx.Rngs(0),
        first_stride=2,
        stride_on="1x1",
    )
    flax_resblock.save(model, tmp_path / "folder", naming="huggingface")
    theirs, report = transformers.ResNetForImageClassification.from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert theirs.config.downsample_in_first_stage
    assert theirs.config.downsample_in_bottleneck
    ours = flax_resblock.to_torch(model, "huggingface")
    assert_same_bits({key: state_to_numpy(theirs.state_dict())[key] for key in ours}, ours)
    assert flax_resblock.load(tmp_path / "folder").config == model.config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "resnet", "hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"architecture": "resnetaa50", "num_classes": 3}, "average pooling carries its strides"),
        (
            {"architecture": "resnetv2_50d_evos", "num_classes": 3},
            "pre-activation network of a kind",
        ),
        (
            {"architecture": "resnet50", "num_classes": 3, "model_args": {"act_layer": "silu"}},
            "act_layer='silu'",
        ),
        ({"model_type": "resnet", "id2label": {"1": "a"}}, "does not number the classes from 0"),
    ],
)
@pytest.mark.slow
def test_a_config_that_means_another_network_is_refused(change, message, tmp_path):
    model = flax_resblock.create("resnet26", widths=(4, 8, 8, 16), num_classes=3, rngs=nnx.Rngs(0))
    flax_resblock.save(model, tmp_path / "folder", naming="huggingface")
    state = checkpoint.read(tmp_path / "folder")
    (tmp_path / "other").mkdir()
    checkpoint.write(tmp_path / "other" / "model.safetensors", dict(state.tensors))
    assert open_checkpoint(tmp_path / "other").config.num_classes == 3
    (tmp_path / "other" / "config.json").write_text(json.dumps(change))
    with pytest.raises(flax_resblock.CheckpointError, match=message):
        open_checkpoint(tmp_path / "other")


@pytest.mark.slow
def test_the_body_of_a_torchvision_detector_is_taken_out_and_goes_back(tmp_path):
    import_torchvision()
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    module = randomise(
        FasterRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), num_classes=3)
    ).eval()
    torch.save(module.state_dict(), tmp_path / "detector.pth")
    source = open_checkpoint(tmp_path / "detector.pth")
    assert any(
        "took the network under 'backbone.body.' (torchvision detection)" in note
        for note in source.notes
    )
    assert any("no classification head" in note for note in source.notes)
    images = np.random.default_rng(2).standard_normal((1, 65, 48, 3))
    with jax.enable_x64(True):
        model = flax_resblock.load(tmp_path / "detector.pth")
        ours = model.features(jax.numpy.asarray(images))
    with torch.no_grad():
        theirs = module.backbone.body(as_tensor(images, PRECISIONS["float64"]))
    for number, value in enumerate(theirs.values(), start=1):
        found = relative_l2(np.asarray(ours[f"stage{number}"]), np.moveaxis(value.numpy(), 1, -1))
        assert found <= FLOAT64_LIMIT
    state = {key: torch.from_numpy(value) for key, value in flax_resblock.to_torch(model).items()}
    before = {key: value.clone() for key, value in module.backbone.body.state_dict().items()}
    for value in module.backbone.body.state_dict().values():
        value.zero_()
    module.backbone.body.load_state_dict(state, strict=True)
    assert all(
        torch.equal(value, before[key]) for key, value in module.backbone.body.state_dict().items()
    )


@pytest.mark.slow
def test_the_backbone_of_a_torchvision_segmenter_is_dilated(tmp_path):
    import_torchvision()
    from torchvision.models.segmentation import fcn_resnet50

    module = randomise(
        fcn_resnet50(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
    ).eval()
    torch.save(module.state_dict(), tmp_path / "segmenter.pth")
    images = np.random.default_rng(2).standard_normal((1, 33, 48, 3))
    with torch.no_grad():
        theirs = module.backbone(as_tensor(images, PRECISIONS["float64"]))["out"].numpy()
    with jax.enable_x64(True):
        assumptions = {"dilated_stages": (3, 4)}
        model = flax_resblock.load(tmp_path / "segmenter.pth", assumptions=assumptions)
        assert model.config.dilated_stages == (3, 4)
        assert (
            relative_l2(
                np.asarray(model.features(jax.numpy.asarray(images))["stage4"]),
                np.moveaxis(theirs, 1, -1),
            )
            <= FLOAT64_LIMIT
        )
