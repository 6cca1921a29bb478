"""Backbones are taken out of checkpoints of detectors, segmenters and self-supervised training."""

import numpy as np
import pytest
import torch

from flax_resblock import CheckpointError, ResNetConfig
from flax_resblock.checkpoint.torch_file import from_numpy, with_tensors
from flax_resblock.cli import run
from flax_resblock.convert import NAMINGS
from flax_resblock.convert.detection.backbones import BACKBONES, find_backbone
from flax_resblock.convert.opening import ReadOptions, open_checkpoint
from flax_resblock.convert.state_map import describe
from parity_tests.support import assert_same_bits, healthy, random_bits

BACKBONE = ResNetConfig(
    block="bottleneck", depths=(2, 1, 1, 1), widths=(4, 8, 12, 16), stem_width=8, num_classes=None
)
COUNTERS = "num_batches_tracked"


PARTS = {
    "w": ("weight",),
    "l": ("weight", "bias"),
    "n": ("weight", "bias", "running_mean", "running_var", COUNTERS),
    "t": ("",),
}


def keys_of(modules, prefix=""):
    """Tensors by kind: ``"a:l b:n"`` is a linear layer and a norm; ``w`` has a weight alone."""
    return [
        f"{prefix}{name}.{part}".removesuffix(".")
        for name, _, kind in (module.partition(":") for module in modules.split())
        for part in PARTS[kind]
    ]


def each(prefix, numbers, suffix=""):
    """Linear layers that differ in a number."""
    return " ".join(f"{prefix}{number}{suffix}:l" for number in numbers)


DETECTRON2_RPN = keys_of(
    "conv:l objectness_logits:l anchor_deltas:l", "proposal_generator.rpn_head."
)
HEADS = keys_of("box_predictor.cls_score:l box_predictor.bbox_pred:l", "roi_heads.")

# Backbone: what the file has around the network, given the network's own keys; and how the file
# nests it.
CASES = {
    "torchvision detection": lambda keys: [
        *keys_of(
            f"{each('inner_blocks.', range(4), '.0')} {each('layer_blocks.', range(4), '.0')}",
            "backbone.fpn.",
        ),
        *keys_of("conv.0.0:l cls_logits:l bbox_pred:l", "rpn.head."),
        *keys_of("box_head.fc6:l box_head.fc7:l", "roi_heads."),
        *HEADS,
    ],
    "torchvision segmentation": lambda keys: keys_of(
        "classifier.0:w classifier.1:n classifier.4:l aux_classifier.0:w aux_classifier.4:l"
    ),
    "detectron2 FPN": lambda keys: [
        *keys_of(f"{each('lateral', range(2, 6))} {each('output', range(2, 6))}", "backbone.fpn_"),
        *DETECTRON2_RPN,
        *keys_of("box_head.fc1:l box_head.fc2:l", "roi_heads."),
        *HEADS,
        *keys_of("pixel_mean:t pixel_std:t"),
    ],
    "detectron2 C4": lambda keys: [
        *DETECTRON2_RPN,
        *keys_of("res5.0.conv1:w res5.0.conv1.norm:w box_predictor.cls_score:l", "roi_heads."),
    ],
    "mmdetection": lambda keys: [
        *keys_of(
            f"{each('lateral_convs.', range(4), '.conv')} {each('fpn_convs.', range(4), '.conv')}",
            "neck.",
        ),
        *keys_of("rpn_conv:l rpn_cls:l rpn_reg:l", "rpn_head."),
        *keys_of("fc_cls:l fc_reg:l shared_fcs.0:l shared_fcs.1:l", "roi_head.bbox_head."),
    ],
    "MoCo v1 and v2": lambda keys: [
        *(f"encoder_k.{key}" for key in keys),
        *keys_of("encoder_q.fc.0:l encoder_q.fc.2:l encoder_k.fc.0:l encoder_k.fc.2:l"),
        *keys_of("queue:t queue_ptr:t"),
    ],
    "MoCo v3": lambda keys: [
        *(f"momentum_encoder.{key}" for key in keys),
        *keys_of("base_encoder.fc.0:w base_encoder.fc.1:n base_encoder.fc.3:w"),
        *keys_of("predictor.0:w predictor.1:n"),
    ],
    "SimSiam": lambda keys: keys_of(
        "encoder.fc.0:w encoder.fc.1:n encoder.fc.6:l predictor.0:w predictor.1:n predictor.3:l"
    ),
    "SimCLR with a projector": lambda keys: keys_of("projector.0:w projector.2:w"),
    "SimCLR with the projection in fc": lambda keys: keys_of("fc.0:l fc.2:l"),
    "SwAV": lambda keys: keys_of(
        "projection_head.0:l projection_head.1:n projection_head.3:l prototypes:w"
    ),
    "DINO": lambda keys: keys_of(
        "mlp.0:l mlp.2:l mlp.4:l last_layer.weight_g:t last_layer.weight_v:t", "head."
    ),
    "BYOL (byol-pytorch)": lambda keys: [
        *(f"{net}{key}" for net in ("net.", "target_encoder.net.") for key in keys),
        *keys_of("online_encoder.projector.0:l online_encoder.projector.1:n"),
        *keys_of("target_encoder.projector.0:l online_predictor.0:l online_predictor.3:l"),
    ],
    "BYOL (online network)": lambda keys: keys_of(
        "projetion.net.0:l projetion.net.1:n projetion.net.3:l"
    ),
    "Barlow Twins and VICReg": lambda keys: keys_of(
        "projector.0:w projector.1:n projector.3:w projector.4:n projector.6:w "
        "bn.running_mean:t bn.running_var:t "
        f"bn.{COUNTERS}:t"
    ),
    "lightly": lambda keys: [
        *(f"backbone_momentum.{key}" for key in keys),
        *keys_of(
            "projection_head.layers.0:w projection_head.layers.1:n prediction_head.layers.3:l"
        ),
    ],
    "segmentation_models_pytorch": lambda keys: keys_of(
        "decoder.blocks.0.conv1.0:w decoder.blocks.0.conv1.1:n segmentation_head.0:l"
    ),
}


def parallel(state, prefix="module."):
    """As ``DataParallel`` and its like name it."""
    return {f"{prefix}{key}": value for key, value in state.items()}


NAMING_OF = {
    "detectron2 FPN": "detectron2",
    "detectron2 C4": "detectron2",
    "lightly": "children",
    "BYOL (online network)": "children",
}
SHAPES = {
    "classifier.4.weight": (3, 2, 1, 1),
    "segmentation_head.0.weight": (3, 2, 3, 3),
    "fc.0.weight": (64, 64),
    "fc.2.weight": (8, 64),
}
"""Of tensors whose shape tells what they are."""
TOLD = {"torchvision segmentation": {"dilated_stages": (3, 4)}}
"""What the user has to say."""
NO_COUNTERS = ("torchvision detection", "detectron2 FPN", "detectron2 C4")
"""Their norms are frozen and count nothing."""
WRAPPED = {
    "torchvision detection": lambda state: {"model": state, "epoch": 25},
    "mmdetection": lambda state: {
        "meta": {"epoch": 12, "config": "model = dict(backbone=dict(style='pytorch'))"},
        "state_dict": state,
    },
    "detectron2 FPN": lambda state: {"model": state, "iteration": 89999},
    **dict.fromkeys(
        ("MoCo v1 and v2", "MoCo v3", "SimSiam"),
        lambda state: {"epoch": 200, "arch": "resnet50", "state_dict": parallel(state)},
    ),
    "SimCLR with the projection in fc": lambda state: {
        "epoch": 100,
        "arch": "resnet50",
        "state_dict": parallel(state, "backbone."),
    },
    "SwAV": parallel,
    "DINO": lambda state: {
        "student": {key: value * 0 for key, value in parallel(state).items()},
        "teacher": state,
        "epoch": 800,
    },
    "Barlow Twins and VICReg": lambda state: {"epoch": 1000, "model": parallel(state)},
    "BYOL (online network)": lambda state: {
        "online_network_state_dict": state,
        "target_network_state_dict": {key: value * 0 for key, value in state.items()},
    },
}


def written(name, path, config=BACKBONE, more=()):
    """The file of a project, and the network in it by its own names; ``more`` are further names."""
    naming = NAMING_OF.get(name, "torchvision")
    if name == "detectron2 C4":
        config = ResNetConfig(
            block="bottleneck", depths=(2, 1, 1), widths=(4, 8, 12), stem_width=8, num_classes=None
        )
    network = healthy(config, naming)
    if name in NO_COUNTERS:
        network = {key: value for key, value in network.items() if COUNTERS not in key}
    prefix = next(backbone.prefix for backbone in BACKBONES if backbone.name == name)
    state = {f"{prefix}{key}": from_numpy(value) for key, value in network.items()}
    around = [*CASES[name](list(network)), *more]
    state |= {key: torch.full(SHAPES.get(key, (3,)), 0.25) for key in around}
    torch.save(WRAPPED.get(name, lambda state: state)(state), path)
    return config, network


def test_every_backbone_has_a_case():
    assert set(CASES) == {backbone.name for backbone in BACKBONES}


@pytest.mark.parametrize("name", CASES)
def test_the_network_is_taken_out_bit_for_bit_and_the_rest_is_named(name, tmp_path):
    config, network = written(name, tmp_path / "file.pth")
    source = open_checkpoint(tmp_path / "file.pth", ReadOptions(assumptions=TOLD.get(name, {})))
    expected = (config.depths, config.widths, None)
    assert (source.config.depths, source.config.widths, source.config.num_classes) == expected
    kept = {key: np.asarray(source.tensors[key]) for key in network}
    assert_same_bits(kept, network)
    (left,) = [note for note in source.notes if note.startswith("took the network")]
    assert f"({name}); left out {len(CASES[name](list(network)))} tensors beside it: " in left
    assert any(note.startswith("no classification head") for note in source.notes)


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_that_no_row_explains_is_not_left_out(name, tmp_path):
    written(name, tmp_path / "file.pth", more=["surprise.weight"])
    with pytest.raises(CheckpointError, match=r"surprise\.weight"):
        open_checkpoint(tmp_path / "file.pth")


def test_a_plain_network_is_no_backbone():
    for naming in NAMINGS.values():
        config = ResNetConfig(
            depths=(1, 1),
            widths=(4, 8),
            stem_width=8,
            num_classes=None if "backbone" in naming.name or naming.name == "children" else 3,
        )
        try:
            state = random_bits(config, np.float32, naming=naming.name)
        except ValueError:
            continue
        found = describe(state)
        assert find_backbone(found) is None, naming.name


@pytest.mark.parametrize(("style", "stride_on"), [("caffe", "1x1"), ("pytorch", "3x3")])
def test_openmmlab_says_where_the_stride_is(style, stride_on, tmp_path):
    state = {
        f"backbone.{key}": from_numpy(value)
        for key, value in random_bits(BACKBONE, np.float32).items()
    }
    state |= {key: torch.full((3,), 0.25) for key in CASES["mmdetection"]([])}
    torch.save(
        {
            "meta": {"config": f"model = dict(backbone=dict(depth=50, style='{style}'))"},
            "state_dict": state,
        },
        tmp_path / "file.pth",
    )
    source = open_checkpoint(tmp_path / "file.pth")
    assert source.config.stride_on == stride_on
    assert source.assumed.choices == ()
    assert any(f"its entry meta.config has style='{style}'" in note for note in source.notes)


def test_where_nobody_says_the_assumption_and_its_flag_are_stated(tmp_path):
    torch.save(with_tensors(random_bits(BACKBONE, np.float32)), tmp_path / "file.pth")
    source = open_checkpoint(tmp_path / "file.pth")
    assert source.config.stride_on == "3x3"
    assert any("assumed" in note and "`stride_on='1x1'` if" in note for note in source.all_notes)
    told = open_checkpoint(tmp_path / "file.pth", ReadOptions(assumptions={"stride_on": "1x1"}))
    assert told.config.stride_on == "1x1"
    assert not any("stride_on" in note for note in told.all_notes)


def backbone(prefix="backbone."):
    """A network without head as part of a larger one, as PyTorch tensors."""
    return {f"{prefix}{key}": from_numpy(value) for key, value in healthy(BACKBONE).items()}


def opened(state, path, **entries):
    torch.save({"state_dict": state, **entries} if entries else state, path)
    return open_checkpoint(path)


@pytest.mark.parametrize(
    ("head", "prefix"),
    [
        *(("classifier", "backbone."), ("head", "encoder."), ("fc.1", "model.backbone.")),
        *(("classifier.1", ""), ("linear", ""), ("linear", "encoder.")),
        *(("classification_head.3", "model.backbone."), ("decoder", "backbone.")),
    ],
)
def test_a_linear_beside_the_network_is_its_head(head, prefix, tmp_path):
    state = backbone(prefix) | {
        f"{head}.weight": torch.randn(5, 64),
        f"{head}.bias": torch.randn(5),
    }
    if (head, prefix) == ("linear", ""):
        # kuangliu's own
        state = {key.replace("downsample", "shortcut"): value for key, value in state.items()}
    source = opened(state, tmp_path / "net.pth")
    name = "linear" if source.state_map.naming.name == "kuangliu" else "fc"
    assert (source.config.num_classes, source.config.dilated_stages) == (5, ())
    assert np.array_equal(source.tensors[f"{name}.weight"], state[f"{head}.weight"].numpy())
    assert np.array_equal(source.tensors[f"{name}.bias"], state[f"{head}.bias"].numpy())
    assert not any("left out" in note for note in source.notes)
    if name == "fc":
        assert any(
            note.startswith(f"{head} is read as the classification head") for note in source.notes
        )


def test_a_head_of_several_layers_is_refused(tmp_path):
    for head, prefix in (
        ("classifier", "backbone."),
        ("fc", ""),
        ("fc", "backbone."),
        ("head", "encoder."),
    ):
        two = {f"{head}.0.weight": torch.ones(64, 64), f"{head}.0.bias": torch.ones(64)}
        two |= {f"{head}.2.weight": torch.ones(5, 64), f"{head}.2.bias": torch.ones(5)}
        entries = {"epoch": 3, "arch": "resnet50"} if not prefix else {}
        with pytest.raises(
            CheckpointError, match=rf"2 fully connected layers: {head}\.0, {head}\.2"
        ) as caught:
            opened(backbone(prefix) | two, tmp_path / "net.pth", **entries)
        assert "ignore" not in str(caught.value)


def test_a_classifier_with_the_names_of_a_segmenter_is_none(tmp_path):
    """Sequential(Linear, BatchNorm1d, ReLU, Dropout, Linear) has the names of an FCNHead."""
    mlp = {"classifier.0.weight": torch.ones(8, 64), "classifier.4.weight": torch.ones(5, 8)}
    mlp |= {key: torch.ones(8) for key in keys_of("classifier.1:n") if COUNTERS not in key}
    with pytest.raises(
        CheckpointError, match=r"2 fully connected layers: classifier\.0, classifier\.4"
    ):
        opened(backbone() | mlp, tmp_path / "net.pth")


def test_a_head_beside_a_headless_naming_scheme_is_refused_by_name(tmp_path):
    state = {
        f"backbone.{key}": from_numpy(value)
        for key, value in random_bits(BACKBONE, np.float32, naming="children").items()
    }
    state |= {"classifier.weight": torch.ones(5, 64), "classifier.bias": torch.ones(5)}
    with pytest.raises(
        CheckpointError,
        match="classification head classifier, and this naming scheme has no name for a head",
    ):
        opened(state, tmp_path / "net.pth")


def test_a_head_of_another_width_is_refused(tmp_path):
    state = backbone() | {"classifier.weight": torch.ones(5, 63), "classifier.bias": torch.ones(5)}
    with pytest.raises(CheckpointError, match="classifier was read as its head, fc"):
        opened(state, tmp_path / "net.pth")


def test_a_linear_of_the_features_among_a_projects_parts_is_no_extra_part(tmp_path):
    parts = {
        key: torch.ones(3)
        for key in [
            *keys_of("conv.0.0:l cls_logits:l bbox_pred:l", "rpn.head."),
            "backbone.fpn.inner_blocks.0.0.weight",
        ]
    }
    parts |= {"roi_heads.weight": torch.ones(5, 64), "roi_heads.bias": torch.ones(5)}
    with pytest.raises(
        CheckpointError, match=r"roi_heads takes the 64 features .* A head is never left out"
    ):
        opened(backbone("backbone.body.") | parts, tmp_path / "net.pth")


def test_no_name_says_that_a_network_is_dilated(tmp_path):
    written("torchvision segmentation", tmp_path / "file.pth")
    with pytest.raises(
        CheckpointError,
        match=r"Say `assumptions=\{'dilated_stages': \(3, 4\)}` .*, without a number",
    ):
        open_checkpoint(tmp_path / "file.pth")
    for flags, dilated in (("3", "4"), (3, 4)), ((), ()):
        assert run(["inspect", str(tmp_path / "file.pth"), "--dilated-stages", *flags]) == 0
        reading = ReadOptions(assumptions={"dilated_stages": dilated})
        assert open_checkpoint(tmp_path / "file.pth", reading).config.dilated_stages == dilated


def test_a_network_is_taken_without_its_head_where_the_user_says_so(tmp_path):
    torch.save(backbone() | {"classifier.weight": torch.ones(5, 64)}, tmp_path / "net.pth")
    source = open_checkpoint(tmp_path / "net.pth", ReadOptions(ignore=("classifier.*",)))
    assert source.config.num_classes is None
    assert "ignored classifier.weight" in source.notes
