"""Networks of every family, built and saved by other packages, with norms that look trained."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from parity_tests.support import import_torchvision

NEEDS = "needs the extra 'families': pip install -c constraints.txt '.[families]'"


@functools.cache
def import_timm():
    """timm, or a skip; it needs torchvision."""
    import_torchvision()
    return pytest.importorskip("timm", reason=NEEDS)


@functools.cache
def import_transformers():
    """transformers, or a skip."""
    import_torchvision()
    return pytest.importorskip("transformers", reason=NEEDS)


def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module in float64, its norms as if trained; no scale of zero, with which some begin."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, torch.nn.GroupNorm):
                layer.weight.uniform_(0.4, 1.6, generator=generator)
                layer.bias.normal_(0, 0.5, generator=generator)
            if hasattr(layer, "running_var"):
                layer.running_mean.normal_(0, 0.5, generator=generator)
                layer.running_var.uniform_(0.3, 3, generator=generator)
                layer.weight.uniform_(0.4, 1.6, generator=generator)
                layer.bias.normal_(0, 0.5, generator=generator)
                if getattr(layer, "num_batches_tracked", None) is not None:
                    layer.num_batches_tracked.fill_(17)
    return module


@dataclass(frozen=True)
class Family:
    """One network of another package.

    Attributes:
      build: Makes it, freshly initialised.
      save: Writes it to a folder, with the package's own function.
      plain: The same module with a tensor for its output.
      naming: Its naming scheme."""

    build: Callable[[], torch.nn.Module]
    save: Callable[[torch.nn.Module, Path], None]
    plain: Callable[[torch.nn.Module], torch.nn.Module]
    naming: str


def _huggingface(head: bool = True, **changes: Any) -> Family:
    options = {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 2],
        "layer_type": "basic",
        **changes,
    }

    def build() -> torch.nn.Module:
        transformers = import_transformers()
        names = {0: "tench", 1: "goldfish", 2: "great [white] shark"}
        config = transformers.ResNetConfig(
            **options, id2label=names, label2id={name: i for i, name in names.items()}
        )
        return (transformers.ResNetForImageClassification if head else transformers.ResNetModel)(
            config
        )

    def plain(module: torch.nn.Module) -> torch.nn.Module:
        base = type(module)

        class Plain(base):
            def forward(self, x):
                output = super().forward(x)
                return output.logits if head else output.pooler_output.flatten(1)

        copy = Plain(module.config).double()
        copy.load_state_dict(module.state_dict(), strict=True)
        return copy

    return Family(
        build,
        lambda module, folder: module.save_pretrained(folder),
        plain,
        "huggingface" if head else "huggingface_backbone",
    )


def _timm(name: str, *, naming: str = "torchvision", **changes: Any) -> Family:
    options = {"channels": (8, 16, 24, 32), "layers": (1, 2, 1, 1), "num_classes": 5, **changes}
    if name.endswith("_bit"):  # its depths are in its name
        del options["layers"]

    def save(module: torch.nn.Module, folder: Path) -> None:
        import_timm().models.save_for_hf(module, folder, safe_serialization=True)

    return Family(
        lambda: import_timm().create_model(name, **options),
        save,
        lambda module: module,
        naming,
    )


def _timm_v2(name: str, naming: str = "timm_v2", **sizes: Any) -> Family:
    return _timm(name, naming=naming, **{"stem_chs": 32, **sizes})


FAMILIES = {
    "huggingface basic": _huggingface(),
    "huggingface bottleneck, first stage strided": _huggingface(
        layer_type="bottleneck", hidden_sizes=[12, 16], downsample_in_first_stage=True
    ),
    "huggingface bottleneck, stride on the 1x1": _huggingface(
        layer_type="bottleneck", downsample_in_bottleneck=True
    ),
    "huggingface without head": _huggingface(head=False, hidden_sizes=[12, 16], depths=[2, 1]),
    "timm resnet10t": _timm("resnet10t", stem_width=16),
    "timm resnet18d": _timm("resnet18d", stem_width=8),
    "timm resnet50c": _timm("resnet50c", stem_width=8),
    "timm wide_resnet50_2": _timm("wide_resnet50_2"),
    "timm resnext50d_32x4d": _timm("resnext50d_32x4d", channels=(16, 32, 32, 32), stem_width=8),
    "timm seresnext50_32x4d": _timm("seresnext50_32x4d", channels=(16, 32, 32, 32)),
    "timm ecaresnet26t": _timm("ecaresnet26t", stem_width=16),
    "timm resnetblur18": _timm("resnetblur18"),
    "timm resnetblur50d": _timm("resnetblur50d", stem_width=8),
    "timm without head": _timm("resnet26d", stem_width=8, num_classes=0),
    "timm dilated": _timm("resnet26", output_stride=8),
    "timm grey images": _timm("resnet26", in_chans=1),
    "timm resnet50_gn": _timm("resnet50_gn", channels=(32, 64, 32, 64)),
    "timm resnetv2_50": _timm_v2("resnetv2_50", channels=(128, 256), layers=(1, 2)),
    "timm resnetv2_18d": _timm_v2("resnetv2_18d", "timm_v2_d", channels=(32, 64), layers=(1, 2)),
    "timm resnetv2_50t": _timm_v2("resnetv2_50t", "timm_v2_d", channels=(64, 96), layers=(2, 1)),
    "timm resnetv2_50d_gn": _timm_v2(
        "resnetv2_50d_gn", "timm_v2_d", channels=(128, 256), layers=(1, 1), stem_chs=64
    ),
    "timm resnetv2_50x1_bit": _timm_v2("resnetv2_50x1_bit", channels=(128, 128, 128, 128)),
}
