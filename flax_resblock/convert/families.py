"""The families of checkpoints that convert, as a table in Markdown: ``python -m
flax_resblock.convert.families > docs/families.md``.

Everything in it comes from the rows that the converter itself reads (naming schemes, backbones,
architectures, traits) and from :data:`FAMILIES`, which says how each was proved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flax_resblock.config import ARCHITECTURES
from flax_resblock.convert.detection.assumptions import TRAITS
from flax_resblock.convert.detection.backbones import BACKBONES
from flax_resblock.convert.naming import NAMINGS


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
      name: Of the family.
      naming: Its naming scheme.
      converts: What of it converts.
      reference: Package and version that it was held against.
      proof: How.
    """

    name: str
    naming: str
    converts: str
    reference: str
    proof: str


_EQUAL = (
    "built and saved by the package, converted with no flags; every slot, statistic and "
    "gradient in float64 <= 1e-12; loaded back strictly, bit for bit"
)
_FEATURES = (
    "built and saved by the package, converted with no flags; the stages' outputs in float64 "
    "<= 1e-12, evaluation mode"
)
_NAMES = "every key and shape of every named architecture; logits in float64 <= 1e-12"
_KEYS = (
    "the project's key set, made by hand from its code, around a network of torchvision; "
    "equal bit for bit"
)
_TRANSFORMERS, _TIMM, _TORCHVISION = "transformers 5.24.0", "timm 1.0.31", "torchvision 0.28.0"

FAMILIES = (
    Family(
        "torchvision classification",
        "torchvision",
        "resnet, resnext, wide_resnet",
        _TORCHVISION,
        _NAMES,
    ),
    Family(
        "torchvision detection",
        "torchvision",
        "`backbone.body.*` of Faster R-CNN, RetinaNet, Mask R-CNN, FCOS",
        _TORCHVISION,
        _FEATURES,
    ),
    Family(
        "torchvision segmentation",
        "torchvision",
        "`backbone.*` of FCN and DeepLabV3, with --dilated-stages 3 4",
        _TORCHVISION,
        _FEATURES,
    ),
    Family(
        "transformers ResNet",
        "huggingface",
        "ResNetForImageClassification, ResNetModel: basic and bottleneck, any depths and "
        "widths, `downsample_in_first_stage`, `downsample_in_bottleneck`; ReLU",
        _TRANSFORMERS,
        _EQUAL,
    ),
    Family(
        "timm ResNet",
        "timm",
        "plain, c, d, s and t stems; wide; resnext; gluon, tv and a1 weights, which have the "
        "same names",
        _TIMM,
        _EQUAL,
    ),
    Family("timm SE-ResNet, SE-ResNeXt", "timm", "plain, d and t", _TIMM, _EQUAL),
    Family("timm ECA-ResNet", "timm", "d and t", _TIMM, _EQUAL),
    Family(
        "timm ResNet-Blur",
        "timm",
        "plain and d, told by config.json or --antialias blur",
        _TIMM,
        _EQUAL,
    ),
    Family(
        "Caffe and MSRA",
        "torchvision",
        "resnet50_caffe and the others, with --stride-on 1x1 or an OpenMMLab configuration in "
        "the file",
        "transformers 5.24.0",
        "the stride placement is that of its downsample_in_bottleneck, proved there; no "
        "package with Caffe's own weights was at hand",
    ),
    Family("detectron2", "detectron2", "stem and res2 to res5", "none", _KEYS),
    Family(
        "OpenMMLab",
        "openmmlab",
        "mmpretrain classifiers; mmdet backbones, deep stem too",
        "none",
        _KEYS,
    ),
    Family("nn.Sequential(*children)", "children", "lightly, BYOL", "none", _KEYS),
)

NOT_CONVERTED = (
    (
        "timm resnetv2, BiT",
        "pre-activation order: the norms have other channels than the convolutions before "
        "them, and projections have none",
    ),
    (
        "timm resnetaa",
        "average pooling of odd sizes cuts off the last row, which the shortcut does not",
    ),
    (
        "timm resnetrs, senet154, ecaresnet*_pruned",
        "a convolution for the stem's pooling, 3x3 projections, widths of their own in every block",
    ),
    ("timm resnet50_gn", "GroupNorm"),
    ("transformers with hidden_act other than relu", "another activation"),
    ("Caffe2 names (`res2_0_branch2a_w`)", "norms folded into scale and bias, without statistics"),
)
"""What is refused, and why."""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def markdown() -> str:
    """The text of docs/families.md."""
    lines = [
        "# Families of checkpoints",
        "",
        "Made by `python -m flax_resblock.convert.families > docs/families.md` from the "
        "converter's own rows.",
        "",
    ]
    lines += _table(
        ("family", "naming", "what converts", "reference", "how it was proved"),
        ((f.name, f"`{f.naming}`", f.converts, f.reference, f.proof) for f in FAMILIES),
    )
    lines += [
        "The checks are in `parity_tests/test_families.py` and `test_backbones.py`; `pip "
        "install -c constraints.txt '.[families]'` installs the packages.",
        "",
    ]
    lines += [
        "## Naming schemes",
        "",
        "`--naming NAME` reads, `--to-naming NAME` writes. Those of a hub also write a folder "
        "with `config.json`.",
        "",
    ]
    lines += _table(
        ("naming", "who writes it", "folder for"),
        ((f"`{row.name}`", row.origin, row.hub) for row in NAMINGS.values()),
    )
    lines += ["## Networks inside larger checkpoints", ""]
    lines += [
        "A row applies only where it explains every tensor and finds the parts by which the "
        "project "
        "is recognised. What is left out is counted in the output. A classification head is never "
        "left out: a single fully connected layer beside a network, such as `classifier` beside "
        "`backbone.*`, is read as its head.",
        "",
    ]
    beside = (", ".join(f"`{pattern}`" for pattern in row.beside) for row in BACKBONES)
    lines += _table(
        ("project", "the network", "left out"),
        (
            (row.name, f"`{row.prefix}*`" if row.prefix else "no prefix", left)
            for row, left in zip(BACKBONES, beside, strict=True)
        ),
    )
    lines += [
        "torchvision's detectors with COCO weights of 2017 set eps of their frozen norms to 0, "
        "which no tensor tells: `load(path, eps=0.0)`.",
        "",
    ]
    lines += [
        "## What no tensor tells",
        "",
        "The first value is assumed where nobody says. `verify` shows what the other would change.",
        "",
    ]
    lines += _table(
        ("flag", "value", "meaning"),
        (
            (f"`{t.flag}`", f"`{value}`", words)
            for t in TRAITS
            for value, words in t.choices.items()
        ),
    )
    lines += [
        "`--dilated-stages 3 4` replaces strides by dilation, as torchvision's "
        "`replace_stride_with_dilation` does.",
        "",
    ]
    lines += [
        "## Architectures by name",
        "",
        ", ".join(f"`{name}`" for name in ARCHITECTURES)
        + ". Others are found from names and shapes.",
        "",
    ]
    lines += ["## Not converted", ""]
    lines += _table(("what", "why"), NOT_CONVERTED)
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")
