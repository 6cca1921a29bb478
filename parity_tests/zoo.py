"""Ports the convolutional networks of torchvision and timm, and writes what was measured.

    python -m parity_tests.zoo torchvision              # one or more of each family
    python -m parity_tests.zoo timm resnest14d --write

prints one line for each network: its largest errors, or why it is refused. ``--write`` brings its
row of docs/ported/zoo.md up to date. Exit status 1 if a network is refused."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch

import flax_resblock
from flax_resblock import InputError
from parity_tests.families import import_timm
from parity_tests.support import REPOSITORY, import_torchvision

PAGE = REPOSITORY / "docs" / "ported" / "zoo.md"
FACTS = PAGE.with_suffix(".json")

NETWORKS = {
    "torchvision": """
        alexnet vgg11 vgg11_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121
        googlenet inception_v3 squeezenet1_0 squeezenet1_1 shufflenet_v2_x0_5 mobilenet_v2
        mobilenet_v3_small mobilenet_v3_large mnasnet0_5 efficientnet_b0 efficientnet_v2_s
        regnet_x_400mf regnet_y_400mf convnext_tiny
    """,
    "timm": """
        resnet10t resnet26d resnetaa50d resnetblur50 resnetrs50 seresnet33ts ecaresnet26t
        gcresnet33ts resnetv2_18 resnetv2_50x1_bit res2net50_48w_2s resnest14d selecsls42 dla34
        hrnet_w18_small nfnet_l0 nf_resnet26 dm_nfnet_f0 rexnet_100 repvgg_a0 mobileone_s0
        cspresnet50 cspdarknet53 darknet53 ese_vovnet19b_slim_dw vovnet39a ghostnet_050
        ghostnetv2_100 tf_efficientnet_b0 tf_efficientnetv2_b0 tf_mixnet_s
        tf_mobilenetv3_small_minimal_100 efficientnet_lite0 mobilenetv1_100 mobilenetv2_035
        mobilenetv4_conv_small_035 mobilenet_edgetpu_100 mnasnet_small semnasnet_075 spnasnet_100
        fbnetc_100 lcnet_035 lcnetv2_small tinynet_e hardcorenas_a regnetx_002 regnety_002
        regnetz_b16 convnext_atto convnextv2_atto legacy_senet154 legacy_seresnet18 skresnet18
        gernet_s legacy_xception xception41 inception_v3 inception_v4 inception_resnet_v2 dpn48b
        densenet121 vgg11_bn tresnet_m nasnetalarge pnasnet5large hgnet_tiny hgnetv2_b0
        fasternet_t0 repghostnet_050 repvit_m0_9 inception_next_atto starnet_s050 starnet_s1
        rdnet_tiny mambaout_femto poolformerv2_s12 fastvit_t8 convmixer_768_32 focalnet_tiny_srf
        cspnext_tiny edgenext_xx_small efficientvit_b0 mobilevit_xxs lambda_resnet26t halonet26t
        botnet26t_256 visformer_tiny
    """,
}
"""A small network of each family that convolves, and some that mix it with attention."""

TITLE = """# Networks of torchvision and timm that port

Written by `python -m parity_tests.zoo torchvision --write` and `... timm --write`, with random
weights. Each number is the largest relative error of any tensor in float64, against the package's
own module on the same images: the output and every layer's output in evaluation mode and in
training mode, the running statistics after a batch, every gradient with that of the images, and
weights and statistics after five steps of SGD with momentum. The state dict returns bit for bit,
and `load_state_dict(strict=True)` takes it. The limit is 1e-12, of the five steps 1e-10.
"""
HEAD = ("network", "lines", "layers", "evaluation", "training", "statistics", "gradients", "steps")
QUANTITIES = {
    "evaluation": ("evaluation output", "evaluation activations"),
    "training": ("training output", "training activations"),
    "statistics": ("training running statistics",),
    "gradients": ("training gradients", "training gradient of the input"),
    "steps": ("weights after 5 steps of SGD",),
}


def built(package: str, name: str) -> torch.nn.Module:
    """A network with the weights that it starts with."""
    if package == "timm":
        return import_timm().create_model(name)
    slow = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return getattr(import_torchvision().models, name)(weights=None, **slow)


def row_of(package: str, name: str, *, exact: bool) -> list[str]:
    """Ports a network and returns what was measured, in the order of :data:`HEAD`.

    Raises:
      InputError: It is refused.
    """
    module = built(package, name)
    ported = flax_resblock.port(module, exact=exact, origin=name)
    back = ported.to_torch(ported.create())
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in back.items()}
    state = module.state_dict()
    module.load_state_dict(tensors, strict=True)
    assert all(torch.equal(tensors[key], value) for key, value in state.items())
    figures: dict[str, Any] = {
        name.removeprefix("float64 "): figure for name, figure in ported.figures.items()
    }
    row = [
        name,
        str(len(ported.source.splitlines())),
        str(figures.get("evaluation activations", {}).get("tensors", 0)),
    ]
    for names in QUANTITIES.values():
        errors = [figures[one]["error"] for one in names if one in figures]
        row.append(f"{max(errors):.0e}" if errors else "-")
    return row


def main() -> int:
    """Ports the networks that were named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("package", choices=NETWORKS)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", action="store_true", help="bring the page up to date")
    parser.add_argument("--quick", action="store_true", help="without the five steps")
    options = parser.parse_args()
    package = import_torchvision() if options.package == "torchvision" else import_timm()
    refused = False
    for name in options.names or NETWORKS[options.package].split():
        began, row = time.monotonic(), []
        try:
            row = row_of(options.package, name, exact=not options.quick)
            told = "  ".join(row[1:])
        except InputError as error:
            told, refused = f"refused: {error}", True
        print(f"{name:33}{time.monotonic() - began:5.0f} s  {told}", flush=True)
        if options.write:
            write(options.package, plain(package.__version__), name, row, told)
        jax.clear_caches()
        gc.collect()
    return int(refused)


def write(package: str, version: str, name: str, row: list[str], told: str) -> None:
    """Brings the facts and the page up to date."""
    facts = json.loads(FACTS.read_text(encoding="utf-8")) if FACTS.exists() else {}
    of = facts.setdefault(package, {"versions": {}, "ported": {}, "refused": {}})
    of["versions"] = {package: version, "torch": plain(torch.__version__), "jax": jax.__version__}
    of["ported"].pop(name, None)
    of["refused"].pop(name, None)
    if row:
        of["ported"][name] = row[1:]
    else:
        of["refused"][name] = told.removeprefix("refused: ")
    FACTS.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    PAGE.write_text(page(facts), encoding="utf-8")


def page(facts: dict[str, Any]) -> str:
    """The page that shows the facts."""
    parts = [TITLE]
    for package, of in facts.items():
        versions = ", ".join(f"{one} {number}" for one, number in sorted(of["versions"].items()))
        parts.append(f"## {package}: {len(of['ported'])} ported\n\nWith {versions}.\n")
        parts.append(table(HEAD, [[name, *row] for name, row in sorted(of["ported"].items())]))
        if of["refused"]:
            rows = [[name, told.replace("|", "/")] for name, told in sorted(of["refused"].items())]
            parts += ["Refused, with what the command says:\n", table(("network", "why"), rows)]
    return "\n".join(parts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plain(version: str) -> str:
    """Without the build."""
    return version.partition("+")[0]


if __name__ == "__main__":
    sys.exit(main())
