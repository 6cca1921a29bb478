"""Backbones inside larger checkpoints: the network is taken out, the rest is named and left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flax_resblock.checkpoint.unwrap import PREFIXES
from flax_resblock.convert.state_map import TensorInfo, matches_any
from flax_resblock.errors import some


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
        "torchvision detection",
        "backbone.body.",
        (
            "backbone.fpn.*",
            "rpn.*",
            "roi_heads.*",
            "head.classification_head.*",
            "head.regression_head.*",
        ),
    ),
    Backbone(
        "torchvision segmentation",
        "backbone.",
        ("classifier.[0-4].*", "aux_classifier.[0-4].*"),
        marks=("classifier.0.*",),
        kernels=("classifier.4.weight",),
        may_dilate=True,
    ),
    Backbone(
        "detectron2 FPN",
        "backbone.bottom_up.",
        (
            "backbone.fpn_*",
            "backbone.top_block.*",
            "proposal_generator.*",
            "roi_heads.*",
            "sem_seg_head.*",
            "head.cls_subnet.*",
            "head.bbox_subnet.*",
            "head.cls_score.*",
            "head.bbox_pred.*",
            "anchor_generator.*",
            "pixel_mean",
            "pixel_std",
        ),
    ),
    Backbone(
        "detectron2 C4",
        "backbone.",
        ("proposal_generator.*", "roi_heads.*", "pixel_mean", "pixel_std"),
    ),
    Backbone(
        "mmdetection",
        "backbone.",
        (
            "neck.*",
            "rpn_head.*",
            "roi_head.*",
            "bbox_head.*",
            "mask_head.*",
            "semantic_head.*",
            "panoptic_*",
            "data_preprocessor.*",
        ),
    ),
    Backbone(
        "MoCo v1 and v2",
        "encoder_q.",
        ("encoder_q.fc.*", "encoder_k.*", "queue", "queue_ptr"),
        marks=("encoder_k.*", "queue"),
        projections=("encoder_q.fc.*", "encoder_k.fc.*"),
    ),
    Backbone(
        "MoCo v3",
        "base_encoder.",
        ("base_encoder.fc.[0-9].*", "momentum_encoder.*", "predictor.*"),
        marks=("base_encoder.fc.[0-9].*", "momentum_encoder.*", "predictor.*"),
    ),
    Backbone(
        "SimSiam",
        "encoder.",
        ("encoder.fc.[0-9].*", "predictor.[0-9].*"),
        marks=("encoder.fc.[0-9].*", "predictor.[0-9].*"),
    ),
    Backbone(
        "SimCLR with a projector",
        "encoder.",
        ("projector.0.*", "projector.2.*"),
        marks=("projector.0.*", "projector.2.*"),
    ),
    Backbone(
        "DINO", "backbone.", ("head.mlp.*", "head.last_layer.*"), marks=("head.last_layer.*",)
    ),
    Backbone(
        "BYOL (byol-pytorch)",
        "online_encoder.net.",
        ("online_encoder.projector.*", "target_encoder.*", "online_predictor.*", "net.*"),
        marks=("online_predictor.*",),
    ),
    Backbone("BYOL (online network)", "encoder.", ("projetion.net.*", "projection.net.*")),
    Backbone(
        "Barlow Twins and VICReg",
        "backbone.",
        ("projector.*", "bn.*"),
        marks=("projector.0.*", "projector.1.running_mean", "projector.3.*"),
    ),
    Backbone(
        "lightly",
        "backbone.",
        (
            "projection_head.*",
            "prediction_head.*",
            "backbone_momentum.*",
            "projection_head_momentum.*",
            "prototypes.*",
        ),
        marks=("projection_head.layers.*",),
    ),
    Backbone(
        "segmentation_models_pytorch",
        "encoder.",
        (
            "decoder.blocks.*",
            "decoder.center.*",
            "decoder.p[2-5].*",
            "decoder.seg_blocks.*",
            "segmentation_head.*",
        ),
        kernels=("segmentation_head.0.weight",),
    ),
    Backbone(
        "SimCLR with the projection in fc",
        "",
        ("fc.0.*", "fc.2.*"),
        marks=("fc.2.weight",),
        squares=("fc.0.weight",),
        file=("arch", "epoch", "removed the prefix 'backbone.'"),
    ),
    Backbone(
        "SwAV",
        "",
        ("projection_head.*", "prototypes.*"),
        marks=("projection_head.*", "prototypes.*"),
        projections=("projection_head.*", "prototypes.*"),
    ),
)
"""Every known place; rows without prefix, which hold whatever is not beside, come last.

A row applies only where it explains every tensor and has all that it is recognised by; nothing else
is ever left out. A name alone never says that a layer is not the network's classification head."""


def find_backbone(found: Mapping[str, TensorInfo], file: Iterable[str] = ()) -> Backbone | None:
    """The first row that explains every tensor, with some in the network and some beside it.

    Args:
      found: Shape and dtype of every tensor.
      file: Names of what the file holds beside the state dict, and notes on its unwrapping.
    """
    file = set(file)
    return next(
        (
            backbone
            for backbone in BACKBONES
            if _applies(backbone, list(found))
            and not unexplained(backbone, found)
            and _is_evident(backbone, found, file)
        ),
        None,
    )


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
    rows = [
        backbone
        for backbone in BACKBONES
        if backbone.prefix
        and _applies(backbone, keys)
        and any(matches_any(key, backbone.beside) for key in keys)
    ]
    left = {backbone.name: unexplained(backbone, keys) for backbone in rows}
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
    parts = Counter(
        key.partition(".")[0]
        if not key.startswith(backbone.prefix) or not backbone.prefix
        else backbone.prefix + key.removeprefix(backbone.prefix).partition(".")[0]
        for key in left
    )
    listed = ", ".join(f"{part} ({count})" for part, count in parts.items())
    where = f"under '{backbone.prefix}'" if backbone.prefix else "of this checkpoint"
    return (
        f"took the network {where} ({backbone.name}); left out {len(left)} tensors beside it: "
        f"{listed}"
    )


def linears(found: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Number of inputs of every fully connected layer, by module name."""
    return {
        key.removesuffix(".weight"): info.shape[1]
        for key, info in found.items()
        if key.endswith(".weight") and len(info.shape) == 2
    }


@dataclass(frozen=True)
class Head:
    """The classification head of a network, where the naming scheme does not expect it.

    Attributes:
      module: Its name, such as ``"classifier"`` beside ``backbone.*``, or ``"fc.1"``.
      prefix: Of the network's other tensors; ``""``: they have none.
    """

    module: str
    prefix: str

    def holds(self, key: str) -> bool:
        """Whether a tensor belongs to the head."""
        return key in (f"{self.module}.weight", f"{self.module}.bias")

    def note(self, name: str) -> str:
        """What was taken for the head and what that assumes."""
        where = f" of the network under '{self.prefix}'" if self.prefix else ""
        return (
            f"took {self.module} as the classification head{where} and named it {name}; assumed, "
            "as no tensor tells, that it takes the mean of the features over all pixels"
        )


def find_head(found: Mapping[str, TensorInfo]) -> Head | None:
    """The head, where exactly one fully connected layer lies beside the rest."""
    modules = list(linears(found))
    if len(modules) != 1:
        return None
    head = Head(modules[0], "")
    rest = [key for key in found if not head.holds(key)]
    prefix = ""
    while rest and (more := next((p for p in PREFIXES if _all_start(rest, prefix + p)), None)):
        prefix += more
    return Head(head.module, prefix) if rest else None


def _all_start(keys: Iterable[str], prefix: str) -> bool:
    return all(key.startswith(prefix) for key in keys)


def head_left_out(backbone: Backbone, found: Mapping[str, TensorInfo], features: int) -> str | None:
    """The classification head among the tensors beside a network; None where there is none.

    Args:
      backbone: Where the network is.
      found: Shape and dtype of every tensor.
      features: Channels that the network ends with.
    """
    left = {
        name: width
        for name, width in linears(
            {key: found[key] for key in found if not backbone.holds(key)}
        ).items()
        if not matches_any(f"{name}.weight", backbone.projections)
    }
    layers = Counter(name.partition(".")[0] for name in left)
    heads = (name for name, width in left.items() if width == features)
    return next((name for name in heads if layers[name.partition(".")[0]] == 1), None)


def several_layers(found: Mapping[str, TensorInfo]) -> str:
    """A sentence on a head of several fully connected layers; empty where there is none."""
    names = list(linears(found))
    if len(names) < 2:
        return ""
    return (
        f"It has {len(names)} fully connected layers: {some(names)}. The tensors do not say what "
        "lies between them, or whether they are the network's head; a network that this library "
        "reads has one, the classification head, which is never left out."
    )
