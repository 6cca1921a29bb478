"""Backbones inside larger checkpoints: detectors, segmenters, self-supervised training. The network is taken out, what lies beside it is named and left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flax_resblock.convert.state_map import matches_any
from flax_resblock.errors import some


@dataclass(frozen=True)
class Torso:
    """Where a project keeps the network.

    Attributes:
      name: The project.
      prefix: Of the network's tensors; ``""``: they have none.
      beside: The other tensors, shell-style patterns; what they name is left out even where it has the prefix (a projection in the head's place).
      traits: What the project always does and no tensor tells; see :mod:`flax_resblock.convert.traits`.
    """

    name: str
    prefix: str
    beside: tuple[str, ...]
    traits: Mapping[str, Any] = field(default_factory=dict)

    def holds(self, key: str) -> bool:
        """Whether a tensor belongs to the network."""
        return key.startswith(self.prefix) and not matches_any(key, self.beside)


TORSOS = (
    Torso("torchvision detection", "backbone.body.", ("backbone.fpn.*", "rpn.*", "roi_heads.*", "head.*")),
    Torso("torchvision segmentation", "backbone.", ("classifier.*", "aux_classifier.*"), {"dilated_stages": (3, 4)}),
    Torso(
        "detectron2 FPN",
        "backbone.bottom_up.",
        (
            "backbone.fpn_*",
            "backbone.top_block.*",
            "proposal_generator.*",
            "roi_heads.*",
            "sem_seg_head.*",
            "head.*",
            "anchor_generator.*",
            "pixel_mean",
            "pixel_std",
        ),
    ),
    Torso("detectron2 C4", "backbone.", ("proposal_generator.*", "roi_heads.*", "pixel_mean", "pixel_std")),
    Torso(
        "mmdetection", "backbone.", ("neck.*", "rpn_head.*", "roi_head.*", "bbox_head.*", "mask_head.*", "semantic_head.*", "panoptic_*", "data_preprocessor.*")
    ),
    Torso("MoCo v1 and v2", "encoder_q.", ("encoder_q.fc.*", "encoder_k.*", "queue", "queue_ptr")),
    Torso("MoCo v3", "base_encoder.", ("base_encoder.fc.*", "momentum_encoder.*", "predictor.*")),
    Torso("SimSiam", "encoder.", ("encoder.fc.*", "predictor.*")),
    Torso("SimCLR with a projector", "encoder.", ("projector.*",)),
    Torso("DINO", "backbone.", ("head.mlp.*", "head.last_layer.*")),
    Torso("BYOL (byol-pytorch)", "online_encoder.net.", ("online_encoder.projector.*", "target_encoder.*", "online_predictor.*", "net.*")),
    Torso("BYOL (online network)", "encoder.", ("projetion.*", "projection.*")),
    Torso("Barlow Twins and VICReg", "backbone.", ("projector.*", "bn.*")),
    Torso("lightly", "backbone.", ("projection_head.*", "prediction_head.*", "backbone_momentum.*", "projection_head_momentum.*", "prototypes.*")),
    Torso("segmentation_models_pytorch", "encoder.", ("decoder.*", "segmentation_head.*", "classification_head.*")),
    Torso("SimCLR with the projection in fc", "", ("fc.[0-9].*",)),
    Torso("SwAV", "", ("projection_head.*", "prototypes.*")),
)
"""Every known place; rows without prefix, which hold whatever is not beside, come last.

A row applies only where it explains every tensor; nothing else is ever left out."""


def find_torso(keys: Iterable[str]) -> Torso | None:
    """The first row that explains every tensor, with some in the network and some beside it."""
    keys = list(keys)
    return next((torso for torso in TORSOS if _applies(torso, keys) and not unexplained(torso, keys)), None)


def _applies(torso: Torso, keys: list[str]) -> bool:
    held = sum(map(torso.holds, keys))
    return 0 < held < len(keys)


def unexplained(torso: Torso, keys: Iterable[str]) -> list[str]:
    """Tensors that are neither in the network nor beside it."""
    return [key for key in keys if not torso.holds(key) and not matches_any(key, torso.beside)]


def nearly(keys: Iterable[str]) -> str:
    """A sentence on the row that leaves the fewest tensors unexplained; empty where that is more than a tenth of them."""
    keys = list(keys)
    rows = [torso for torso in TORSOS if torso.prefix and _applies(torso, keys) and any(matches_any(key, torso.beside) for key in keys)]
    left = {torso.name: unexplained(torso, keys) for torso in rows}
    name = min(left, key=lambda name: len(left[name]), default=None)
    if name is None or not left[name] or len(left[name]) > len(keys) / 10:
        return ""
    return f"It is almost a checkpoint of {name}, but these are neither in its network nor beside it: {some(left[name])}; --ignore PATTERN drops them."


def describe_left_out(torso: Torso, keys: Iterable[str]) -> str:
    """What stays behind, in words: how many tensors of which part."""
    left = [key for key in keys if not torso.holds(key)]
    parts = Counter(
        key.partition(".")[0] if not key.startswith(torso.prefix) or not torso.prefix else torso.prefix + key.removeprefix(torso.prefix).partition(".")[0]
        for key in left
    )
    listed = ", ".join(f"{part} ({count})" for part, count in parts.items())
    where = f"under '{torso.prefix}'" if torso.prefix else "of this checkpoint"
    return f"took the network {where} ({torso.name}); left out {len(left)} tensors beside it: {listed}"
