"""Backbones inside larger checkpoints: the network is taken out, the rest is named and left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flax_resblock.checkpoint.unwrap import shared_prefixes
from flax_resblock.config import BlockConfig
from flax_resblock.convert.namings import NAMINGS
from flax_resblock.convert.state_map import StateMap, TensorInfo, matches_any
from flax_resblock.errors import CheckpointError, InputError, some


@dataclass(frozen=True)
class Backbone:
    """Where a project keeps the network.

    Attributes:
      name: The project.
      prefix: Of the network's tensors; ``""``: they have none.
      beside: The other tensors, shell-style patterns; what they name is left out even where it has
        the prefix (a projection in the head's place).
      marks: Patterns, each of which some tensor must match: names that only this project has.
      kernels: Tensors that must be convolution kernels, with four axes.
      squares: Tensors that must be square matrices.
      file: Entries that the file must have beside the state dict, and notes on its unwrapping.
      projections: Patterns of fully connected layers that take the network's features and are
        known not to be a classification head.
      may_dilate: Whether the last stages may be dilated, which the weights do not show.
    """

    name: str
    prefix: str
    beside: tuple[str, ...]
    marks: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    squares: tuple[str, ...] = ()
    file: tuple[str, ...] = ()
    projections: tuple[str, ...] = ()
    may_dilate: bool = False

    def holds(self, key: str) -> bool:
        """Whether a tensor belongs to the network."""
        return key.startswith(self.prefix) and not matches_any(key, self.beside)


BACKBONES = (
    Backbone(
        "torchvision detection", "backbone.body.",
        ("backbone.fpn.*", "rpn.*", "roi_heads.*", "head.classification_head.*",
         "head.regression_head.*"),
    ),
    Backbone(
        "torchvision segmentation", "backbone.", ("classifier.[0-4].*", "aux_classifier.[0-4].*"),
        marks=("classifier.0.*",), kernels=("classifier.4.weight",), may_dilate=True,
    ),
    Backbone(
        "detectron2 FPN", "backbone.bottom_up.",
        ("backbone.fpn_*", "backbone.top_block.*", "proposal_generator.*", "roi_heads.*",
         "sem_seg_head.*", "head.cls_subnet.*", "head.bbox_subnet.*", "head.cls_score.*",
         "head.bbox_pred.*", "anchor_generator.*", "pixel_mean", "pixel_std"),
    ),
    Backbone(
        "detectron2 C4", "backbone.",
        ("proposal_generator.*", "roi_heads.*", "pixel_mean", "pixel_std"),
    ),
    Backbone(
        "mmdetection", "backbone.",
        ("neck.*", "rpn_head.*", "roi_head.*", "bbox_head.*", "mask_head.*", "semantic_head.*",
         "panoptic_*", "data_preprocessor.*"),
    ),
    Backbone(
        "MoCo v1 and v2", "encoder_q.", ("encoder_q.fc.*", "encoder_k.*", "queue", "queue_ptr"),
        marks=("encoder_k.*", "queue"), projections=("encoder_q.fc.*", "encoder_k.fc.*"),
    ),
    Backbone(
        "MoCo v3", "base_encoder.",
        ("base_encoder.fc.[0-9].*", "momentum_encoder.*", "predictor.*"),
        marks=("base_encoder.fc.[0-9].*", "momentum_encoder.*", "predictor.*"),
    ),
    Backbone(
        "SimSiam", "encoder.", ("encoder.fc.[0-9].*", "predictor.[0-9].*"),
        marks=("encoder.fc.[0-9].*", "predictor.[0-9].*"),
    ),
    Backbone(
        "SimCLR with a projector", "encoder.", ("projector.0.*", "projector.2.*"),
        marks=("projector.0.*", "projector.2.*"),
    ),
    Backbone(
        "DINO", "backbone.", ("head.mlp.*", "head.last_layer.*"), marks=("head.last_layer.*",),
    ),
    Backbone(
        "BYOL (byol-pytorch)", "online_encoder.net.",
        ("online_encoder.projector.*", "target_encoder.*", "online_predictor.*", "net.*"),
        marks=("online_predictor.*",),
    ),
    Backbone("BYOL (online network)", "encoder.", ("projetion.net.*", "projection.net.*")),
    Backbone(
        "Barlow Twins and VICReg", "backbone.", ("projector.*", "bn.*"),
        marks=("projector.0.*", "projector.1.running_mean", "projector.3.*"),
    ),
    Backbone(
        "lightly", "backbone.",
        ("projection_head.*", "prediction_head.*", "backbone_momentum.*",
         "projection_head_momentum.*", "prototypes.*"),
        marks=("projection_head.layers.*",),
    ),
    Backbone(
        "segmentation_models_pytorch", "encoder.",
        ("decoder.blocks.*", "decoder.center.*", "decoder.p[2-5].*", "decoder.seg_blocks.*",
         "segmentation_head.*"),
        kernels=("segmentation_head.0.weight",),
    ),
    Backbone(
        "SimCLR with the projection in fc", "", ("fc.0.*", "fc.2.*"), marks=("fc.2.weight",),
        squares=("fc.0.weight",), file=("arch", "epoch", "removed the prefix 'backbone.'"),
    ),
    Backbone(
        "SwAV", "", ("projection_head.*", "prototypes.*"),
        marks=("projection_head.*", "prototypes.*"),
        projections=("projection_head.*", "prototypes.*"),
    ),
)  # fmt: skip
"""Every known place; rows without prefix, which hold whatever is not beside, come last.

A row applies only where it explains every tensor and has all that it is recognised by; nothing else
is ever left out. A name alone never says that a layer is not the network's classification head."""


def find_backbone(found: Mapping[str, TensorInfo], file: Iterable[str] = ()) -> Backbone | None:
    """The first row that explains every tensor, with some in the network and some beside it.
    ``file`` are the names of what the file holds beside the state dict, and notes on its
    unwrapping."""
    file = set(file)
    rows = (row for row in BACKBONES if _applies(row, list(found)) and not unexplained(row, found))
    return next((row for row in rows if _is_evident(row, found, file)), None)


def _is_evident(backbone: Backbone, found: Mapping[str, TensorInfo], file: set[str]) -> bool:
    """Whether everything is there that a row is recognised by."""
    shapes = {
        key: found[key].shape if key in found else () for key in backbone.kernels + backbone.squares
    }
    return (
        all(any(matches_any(key, (mark,)) for key in found) for mark in backbone.marks)
        and all(len(shapes[key]) == 4 for key in backbone.kernels)
        and all(len(shapes[key]) == 2 and len(set(shapes[key])) == 1 for key in backbone.squares)
        and file.issuperset(backbone.file)
    )


def _applies(backbone: Backbone, keys: list[str]) -> bool:
    held = sum(map(backbone.holds, keys))
    return 0 < held < len(keys)


def unexplained(backbone: Backbone, keys: Iterable[str]) -> list[str]:
    """Tensors that are neither in the network nor beside it."""
    return [
        key for key in keys if not backbone.holds(key) and not matches_any(key, backbone.beside)
    ]


def nearly(keys: Iterable[str]) -> str:
    """A sentence on the row that leaves the fewest tensors unexplained.

    Empty where that is more than a tenth of them.
    """
    keys = list(keys)
    left = {
        row.name: unexplained(row, keys)
        for row in BACKBONES
        if row.prefix and _applies(row, keys) and any(matches_any(key, row.beside) for key in keys)
    }
    name = min(left, key=lambda name: len(left[name]), default=None)
    if name is None or not left[name] or len(left[name]) > len(keys) / 10:
        return ""
    return (
        f"It is almost a checkpoint of {name}, but these are neither in its network nor beside it: "
        f"{some(left[name])}. Nothing is left out whose purpose is unknown."
    )


def describe_left_out(backbone: Backbone, keys: Iterable[str]) -> str:
    """What stays behind, in words: how many tensors of which part."""
    left = [key for key in keys if not backbone.holds(key)]
    heads = [backbone.prefix if key.startswith(backbone.prefix) else "" for key in left]
    parts = Counter(
        head + key.removeprefix(head).partition(".")[0]
        for head, key in zip(heads, left, strict=True)
    )
    listed = ", ".join(f"{part} ({count})" for part, count in parts.items())
    where = f"under '{backbone.prefix}'" if backbone.prefix else "of this checkpoint"
    return (
        f"took the network {where} ({backbone.name}); left out {len(left)} tensors beside it: "
        f"{listed}"
    )


def refuse_untold_dilation(backbone: Backbone, known: bool, source: str) -> None:
    """Raises CheckpointError unless it is known whether a segmenter's last stages are dilated."""
    if backbone.may_dilate and not known:
        raise CheckpointError(
            f"{source} holds the backbone of a segmentation network ({backbone.name}), and "
            "the weights do not show whether its last stages are dilated. Say "
            "`assumptions={'dilated_stages': (3, 4)}` if they are, as in torchvision's FCN and "
            "DeepLabV3, or `assumptions={'dilated_stages': ()}`, without a number, if they are not."
        )


def _wrapping(key: str) -> str:
    return "".join(shared_prefixes([key]))


def refuse_ignored_blocks(
    ignored: Sequence[str],
    kept: Iterable[str],
    backbone: Backbone | None,
    state_map: StateMap | None,
    source: str,
) -> None:
    """Raises InputError where tensors of a block were ignored: what is left is another network.

    Args:
      kept: The other tensors, by the names that they have in the file.
      backbone: Where the network is; None where it has no prefix, or one that wrappers leave.
      state_map: Of the network; None where what is left is none.
    """
    namings = NAMINGS.values() if state_map is None else (state_map.naming,)
    block = state_map is not None and isinstance(state_map.config, BlockConfig)
    prefixes = {_wrapping(key) for key in kept} if backbone is None else {backbone.prefix}
    inside = []
    for key in ignored:
        prefix = _wrapping(key) if backbone is None else backbone.prefix
        if prefix not in prefixes or not key.startswith(prefix):
            continue
        names = (key, key.removeprefix(prefix))
        if any(
            naming.is_inside_block(name) or (block and naming.is_in_bare_block(name))
            for naming in namings
            for name in names
        ):
            inside.append(key)
    if inside:
        raise InputError(
            f"{source}: {some(inside)} cannot be ignored. A residual block without one of its "
            "tensors would be read as another block, which computes something else. Only tensors "
            "outside the network's blocks can be ignored."
        )
