"""The families of checkpoints that convert, as a table in Markdown: ``python -m
flax_resblock.convert.families > docs/families.md``.

Everything in it comes from the rows that the converter itself reads (naming schemes, backbones,
architectures, assumptions) and from :data:`FAMILIES`, which says how each was tested."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from flax_resblock.config import ARCHITECTURES
from flax_resblock.convert.detection.assumption_rules import ASSUMPTION_RULES
from flax_resblock.convert.detection.backbones import BACKBONES
from flax_resblock.convert.namings import NAMINGS


class Family(NamedTuple):
    """One row of the table: a family, its naming scheme, what of it converts, the package and
    version that it was held against, and how.
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
    "the project's key set, written by hand from its code, around a torchvision network; "
    "equal bit for bit"
)
_SPELLED = (
    "the repository's conventions in a module of the tests' own, read with no flags; every slot, "
    "statistic and gradient in float64 <= 1e-12; bit for bit"
)
_PROGRAM = (
    "saved by the program itself with random statistics, read with no flags, output in float64 <= "
    "1e-12; the same in PyTorch; written back, loaded and run by the program"
)
_FLAX = "flax 0.12.8"
_TRANSFORMERS, _TIMM, _TORCHVISION = "transformers 5.24.0", "timm 1.0.31", "torchvision 0.28.0"

FAMILIES = (
    Family(
        "torchvision classification", "torchvision", "resnet, resnext, wide_resnet", _TORCHVISION,
        _NAMES,
    ),
    Family(
        "torchvision detection", "torchvision",
        "`backbone.body.*` of Faster R-CNN, RetinaNet, Mask R-CNN, FCOS", _TORCHVISION, _FEATURES,
    ),
    Family(
        "torchvision segmentation", "torchvision",
        "`backbone.*` of FCN and DeepLabV3, with --dilated-stages 3 4", _TORCHVISION, _FEATURES,
    ),
    Family(
        "transformers ResNet", "huggingface",
        "ResNetForImageClassification, ResNetModel: basic and bottleneck, any depths and "
        "widths, `downsample_in_first_stage`, `downsample_in_bottleneck`; ReLU", _TRANSFORMERS,
        _EQUAL,
    ),
    Family(
        "timm ResNet", "timm",
        "plain, c, d, s and t stems; wide; resnext; gluon, tv and a1 weights, which have the "
        "same names", _TIMM, _EQUAL,
    ),
    Family("timm SE-ResNet, SE-ResNeXt", "timm", "plain, d and t", _TIMM, _EQUAL),
    Family("timm ECA-ResNet", "timm", "d and t", _TIMM, _EQUAL),
    Family(
        "timm ResNet-Blur", "timm", "plain and d, selected by config.json or --antialias blur",
        _TIMM, _EQUAL,
    ),
    Family("timm ResNet with GroupNorm", "timm", "resnet50_gn", _TIMM, _EQUAL),
    Family("timm ResNetV2", "timm_v2", "batch norms: 18, 34, 50, 101, 152", _TIMM, _EQUAL),
    Family(
        "timm ResNetV2 with a d or t stem", "timm_v2_d",
        "the same with three convolutions in the stem and shortcuts that pool: 18d, 34d, 50d, 50t, "
        "101d, 152d, 50d_gn", _TIMM, _EQUAL,
    ),
    Family(
        "timm BiT", "timm_v2",
        "pre-activation, group norms, standardised kernels: 50x1, 50x3, 101x1 and other widths",
        _TIMM, _EQUAL,
    ),
    Family(
        "pre-activation ResNets of CIFAR", "kuangliu",
        "basic and bottleneck blocks, with or without a norm behind the last", "none", _SPELLED,
    ),
    Family(
        "pre-activation ResNets of CIFAR", "torchvision",
        "bearpaw's spelling, whose shortcuts take the block's input", "none", _SPELLED,
    ),
    Family(
        "SENet of CIFAR", "kuangliu",
        "pre-activation, squeeze-and-excitation (`fc1`, `fc2`), norm in the stem", "none", _SPELLED,
    ),
    Family(
        "SE-ResNets", "senet", "moskomule's linear layers without biases (`se.fc.0`); the row "
        "conv_reduce has convolutions (`se.conv_reduce`)", "none", _SPELLED,
    ),
    Family(
        "wide ResNets", "wide_resnet", "meliketoy's spelling: biases, dropout, shortcuts of the "
        "block's input", "none", _SPELLED,
    ),
    Family(
        "ResNet-9", "resnet9",
        "PyTorch tutorials' spelling (`res1.0.0`, `classifier.3`), any widths; the row "
        "resnet9_plain has no dropout (`classifier.2`)", "none", _SPELLED,
    ),
    Family("wide ResNets", "xternalz", "xternalz's spelling", "none", _SPELLED),
    Family(
        "wide ResNets", "zagoruyko", "tensors of code without modules (`group0.block0.conv0`)",
        "none", "a network's tensors under these names; logits in float64 <= 1e-12, bit for bit",
    ),
    Family(
        "Caffe and MSRA", "torchvision",
        "resnet50_caffe and the others, with --stride-on 1x1 or OpenMMLab's configuration",
        "transformers 5.24.0",
        "the stride placement equals that of `downsample_in_bottleneck`, which is tested there; "
        "not tested with Caffe's own weights",
    ),
    Family("detectron2", "detectron2", "stem and res2 to res5", "none", _KEYS),
    Family(
        "OpenMMLab", "openmmlab", "mmpretrain classifiers; mmdet backbones, deep stem too",
        "none", _KEYS,
    ),
    Family("nn.Sequential(*children)", "children", "lightly, BYOL", "none", _KEYS),
    Family(
        "Linen variables of this library", "flax",
        "`linen.variables` in msgpack or Orbax, trained with Linen; `nnx.state` in Orbax", _FLAX,
        "trained, saved with flax.serialization, read back bit for bit, and loaded by PyTorch",
    ),
    Family(
        "flax ImageNet example", "flax_imagenet_basic",
        "ResNetBlock; the row flax_imagenet_bottleneck has BottleneckResNetBlock; padding same",
        _FLAX, f"the example is no package, and its architecture is written anew; {_PROGRAM}",
    ),
    Family(
        "jax-resnet", "jax_resnet", "ResNet, wide ResNet, ResNeXt; ResNet-D (jax_resnet_d)",
        "jax-resnet 0.0.4", f"{_PROGRAM}; ResNet and ResNet-D are tested",
    ),
    Family(
        "transformers FlaxResNet", "flax_huggingface_bottleneck",
        "`flax_model.msgpack` with its config.json, both kinds of blocks", "transformers 4.46.3",
        f"{_PROGRAM}; FlaxResNetModel without a head by its names only",
    ),
    Family(
        "flaxmodels ResNet", "flaxmodels",
        "the published .h5 (needs h5py), and Linen variables (flaxmodels_linen_basic and "
        "flaxmodels_linen_bottleneck)", "flaxmodels 0.1.3", _PROGRAM,
    ),
    Family(
        "bonsai ResNet (NNX)", "bonsai", "`nnx.state` in Orbax", _FLAX,
        f"its package in the registry is empty, and the model is written anew by its names; "
        f"{_PROGRAM}",
    ),
    Family(
        "haiku ResNet", "haiku",
        "pickled or in an .npz, both kinds of blocks; padding same; version 2 is the row haiku_v2",
        "dm-haiku 0.0.17", _PROGRAM,
    ),
    Family(
        "BiT, published .npz", "bit", "the files of Big Transfer, whose names are TensorFlow's",
        _TIMM,
        "saved from a network of timm's, with the eps of the programs that trained the published "
        "files; output in float64 <= 1e-12; written back, and read by timm's loader bit for bit",
    ),
    Family(
        "big_vision BiT", "big_vision", "what `bit_paper` trains, as an .npz of paths", _FLAX,
        f"it is in no registry, and the model is written anew by its names; {_PROGRAM}",
    ),
)  # fmt: skip

NOT_CONVERTED = (
    ("ResNet-9 with scaled logits or other windows of pooling", "no option; `port` takes them"),
    ("timm resnetv2 evos and frn", "norms that are activations, with a third tensor"),
    ("timm resnetaa", "average pooling drops the last row of odd sizes, but the shortcut does not"),
    (
        "timm resnetrs, senet154, ecaresnet*_pruned",
        "a convolution instead of the stem's pooling, 3x3 projections, or different widths in each "
        "block",
    ),
    (
        "big_vision ResNet v1 (`bit`, with `gn_root`)",
        "each kernel is divided by its standard deviation plus 1e-5, outside the root",
    ),
    (
        "transformers with hidden_act other than relu",
        "transformers keeps ReLU within its blocks and applies hidden_act at their ends",
    ),
    (
        "Caffe2 names (`res2_0_branch2a_w`)",
        "norms are folded into scale and bias, so the statistics are missing",
    ),
)  # fmt: skip
"""What is refused, and why."""


def _table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def families_page() -> str:
    """The text of docs/families.md."""
    networks = (
        (
            row.name,
            f"`{row.prefix}*`" if row.prefix else "no prefix",
            ", ".join(map(_code, row.beside)),
        )
        for row in BACKBONES
    )
    options = (
        (_code(rule.flag), _code(value), words)
        for rule in ASSUMPTION_RULES
        for value, words in rule.choices.items()
    )
    paragraphs = [
        "# Families of checkpoints",
        "This page lists the checkpoints that convert. It is generated from the converter's own "
        "tables by `python -m flax_resblock.convert.families > docs/families.md`.",
        _table(
            ("family", "naming scheme", "what converts", "reference package", "how it is tested"),
            ((f.name, _code(f.naming), f.converts, f.reference, f.proof) for f in FAMILIES),
        ),
        "The tests are in `parity_tests/test_families.py`, `test_backbones.py` and "
        "`test_jax_families.py`. The first two need the reference packages: `pip install -c "
        "constraints.txt '.[families]'`; the third installs those of JAX into a folder of its own.",
        "Checkpoints of JAX programs are read from msgpack (`flax.serialization`), Orbax folders "
        "and folders of steps, `.npz`, `.h5` and pickles of arrays, which are not run. The "
        "variables are found wherever they lie: beside an optimizer, inside a training state, in "
        "collections or wrapped by NNX. A `.msgpack`, `.npz` or `.h5` output is the way back: "
        "`flax-resblock convert net.pth net.msgpack --to-naming flax_imagenet_bottleneck`.",
        "Convolutions and pooling of these programs may pad as TensorFlow does (`padding same`), "
        "which PyTorch's own classes do not. Such a network keeps its padding; `--torch-code "
        "FILE.py` writes it in plain PyTorch beside the weights.",
        "## Naming schemes",
        "A naming scheme says how the tensors of a network are named. `--naming NAME` selects "
        "the scheme for reading (by default it is detected), and `--to-naming NAME` the scheme for "
        "writing. If the table names a package in the last column, the output is a folder with a "
        "`config.json` which that package loads.",
        _table(
            ("naming scheme", "written by", "writes a folder for"),
            ((_code(row.name), row.origin, row.hub) for row in NAMINGS.values()),
        ),
        "Names of your own are described with `flax_resblock.Naming`, whose documentation shows an "
        "example; every function that takes the name of a scheme takes the object as well: "
        "`load(path, naming=mine)`, `save(model, path, naming=mine)`. Where no known scheme fits, "
        "one is learned: the tree of names gives the blocks, shapes give the roles, and the order "
        "of the tensors decides between layers of equal shape. `flax-resblock inspect CKPT "
        "--show-naming` prints the scheme as TOML, and `--naming FILE.toml` takes it, changed or "
        "not. A file that is written in such a scheme holds it.",
        "## Networks inside larger checkpoints",
        "The backbone of these projects' checkpoints is converted, and the rest is left out. A row "
        "applies only if it accounts for every tensor of the file and if the parts that identify "
        "the project are present. The output states how many tensors are left out. A "
        "classification head is never left out: a single fully connected layer beside a network, "
        "such as `classifier` beside `backbone.*`, is read as the network's head.",
        _table(("project", "the network", "left out"), networks),
        "torchvision's detectors with the COCO weights of 2017 use frozen norms with `eps=0`. The "
        "weights do not show this; pass `load(path, eps=0.0)`.",
        "## Options that cannot be inferred from the weights",
        "Without a flag or a configuration in the file, the first value of each option is assumed, "
        "and the output says so: in one line for a published network, otherwise in one line for "
        "each, with the pooling, the padding and everything else that is no option here. In Python "
        'it is one `AssumptionWarning`, which `assume="known"` silences. `verify` shows how the '
        "other place of a bottleneck's stride would change the output.",
        _table(("flag", "value", "meaning"), options),
        "`--dilated-stages 3 4` replaces the strides of stages 3 and 4 by dilation, as "
        "torchvision's `replace_stride_with_dilation` does.",
        "## Named architectures",
        f"There are {len(ARCHITECTURES)} named architectures: "
        f"{', '.join(map(_code, ARCHITECTURES))}. Other depths and widths are inferred from the "
        "names and shapes of the tensors.",
        "## Not converted",
        _table(("family", "reason"), NOT_CONVERTED),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _code(text: object) -> str:
    return f"`{text}`"


if __name__ == "__main__":
    print(families_page(), end="")
