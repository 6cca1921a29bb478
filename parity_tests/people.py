"""Small residual networks as people write them, drawn at random: names, the order of definition,
activation, pooling, order of norm and convolution, stem, head and wrappers.

    python -m parity_tests.people [--networks 2000]

prints how many of them are read right from their weights alone, how many are another network and
were announced so, and how many are refused. Exit status 1 if one is wrong and was not announced."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from flax_resblock.checkpoint.unwrap import record_of
from flax_resblock.convert.opening import ReadOptions, interpret
from flax_resblock.errors import InputError
from flax_resblock.parity.oracle import relative_l2
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.reference import ReferencePair

F = nn.functional
SPELLINGS = (
    # (conv, norm) of the main path and of the shortcut, over the number of the convolution from 1
    ("conv{}", "bn{}", "downsample.0", "downsample.1"),
    ("conv{}", "bn{}", "skip.0", "skip.1"),
    ("conv{}", "norm{}", "shortcut.conv", "shortcut.norm"),
    ("conv{}.conv", "conv{}.bn", "identity_conv.conv", "identity_conv.bn"),
    ("residual_function.{:3}", "residual_function.{:3n}", "shortcut.0", "shortcut.1"),
    ("block.{:3}", "block.{:3n}", "skip.0", "skip.1"),
    ("body.unit{}.convolution", "body.unit{}.batchnorm", "match.convolution", "match.batchnorm"),
    ("_{}_conv", "_{}_bn", "_0_conv", "_0_bn"),
)
STAGES = (
    "layer{stage}.{block}",
    "stage{stage}.block{block}",
    "features.stage{stage}.unit{block}",
    "groups.{stage0}.{block}",
    "{flat}",
    "blocks.{flat}",
    "layer{stage}.{block}",
)
STEMS = (
    ("conv1", "bn1"),
    ("stem.0", "stem.1"),
    ("features.init_block.conv", "features.init_block.bn"),
    ("first", "first_norm"),
)
HEADS = ("fc", "linear", "classifier", "head.1", "output", "classification_head.0")
WRAPPERS = ("", "", "", "module.", "net.", "model.", "_orig_mod.", "encoder.", "my_network.")
ACTIVATIONS = {
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "gelu": F.gelu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class Choices:
    """What one network is; by default what is assumed, under names of its author's own."""

    spelling: tuple[str, str, str, str] = ("block.{:3}", "block.{:3n}", "skip.0", "skip.1")
    stages: str = "{flat}"
    stem: tuple[str, str] = ("stem.0", "stem.1")
    head: str = "head.1"
    wrapper: str = ""
    bottleneck: bool = False
    depths: tuple[int, ...] = (1, 2)
    widths: tuple[int, ...] = (4, 8)
    kernel: Literal[3, 7] = 3
    stem_stride: int = 1
    stem_pool: Literal["none", "3x3", "2x2"] = "none"
    activation: str = "relu"
    pool_between: bool = False
    zeros: Literal["projection", "both", "behind"] = "projection"
    maximum: bool = False
    eps: float = 1e-5
    skip_first: bool = True
    reversed: bool = False
    preactivation: bool = False
    biased: Literal["none", "all", "main", "shortcut", "first"] = "none"
    last_activation: bool = True
    no_skip: bool = False
    announced: tuple[str, ...] = field(default=())
    """Words of the assumptions of which at least one says why this network is another one."""
    as_safetensors: bool = False
    """Whether its tensors are sorted by dtype and name, as safetensors has them."""

    @property
    def expansion(self) -> int:
        """Output channels over width."""
        return 4 if self.bottleneck else 1


def drawn(number: int) -> Choices:
    """The choices of a network; most of them are the usual ones."""
    rng = np.random.default_rng([11, number])

    def pick(values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    def rarely() -> bool:
        return bool(rng.random() < 0.08)

    depths = tuple(int(n) for n in rng.integers(1, 3, int(rng.integers(1, 4))))
    narrow = int(rng.integers(2, 5)) * 2
    widths = tuple(narrow * 2**i for i in range(len(depths)))
    bottleneck = bool(rng.random() < 0.25)
    made: dict[str, Any] = {
        "spelling": pick(SPELLINGS),
        "stages": pick(STAGES),
        "stem": pick(STEMS),
        "head": pick(HEADS),
        "wrapper": pick(WRAPPERS),
        "bottleneck": bottleneck,
        "depths": depths,
        "widths": widths,
        "kernel": 7 if rng.random() < 0.25 else 3,
        "activation": pick(list(ACTIVATIONS)) if rng.random() < 0.2 else "relu",
        "pool_between": rarely(),
        "zeros": pick(["both", "behind"])
        if not bottleneck and rng.random() < 0.2
        else "projection",
        "maximum": rarely(),
        "eps": 1e-3 if rng.random() < 0.15 else 1e-5,
        "skip_first": bool(rng.random() < 0.3),
        "reversed": rarely(),
        "preactivation": rarely(),
        "biased": pick(["all", "all", "main", "shortcut", "first"])
        if rng.random() < 0.25
        else "none",
        "last_activation": not rarely(),
        "no_skip": rarely(),
    }
    usual = (2, "3x3") if made["kernel"] == 7 else (1, "none")
    made["stem_stride"] = 3 - usual[0] if rarely() else usual[0]
    made["stem_pool"] = pick(["3x3", "2x2", "none"]) if rarely() else usual[1]
    if made["spelling"][0].startswith("_"):  # Keras's flat names
        made["stages"], made["stem"] = "conv{stage}_block{block}", ("conv1_conv", "conv1_bn")
    words = {
        "`activation=": made["activation"] != "relu",
        "every stage after the first halves": made["pool_between"],
        "`stem_stride=": made["stem_stride"] != usual[0],
        "`stem_pool=": made["stem_pool"] != usual[1],
        "pads with zeros, half of them": made["zeros"] == "behind",
        "the head takes the mean": made["maximum"],
        "`eps=": made["eps"] != 1e-5,
        "comes before its norm": made["preactivation"] or not made["last_activation"],
        "each block adds its input": made["no_skip"],
    }
    announced = tuple(word for word, is_so in words.items() if is_so)
    return Choices(**made, announced=announced, as_safetensors=bool(rng.random() < 0.25))


def _inside(block: str, name: str) -> str:
    return block + name if name.startswith("_") else f"{block}.{name}"


def _spelled(template: str, number: int) -> str:
    index = str(3 * (number - 1))
    return template.replace("{:3n}", str(int(index) + 1)).replace("{:3}", index).format(number)


class Network(nn.Module):
    """A network of such choices; its layers have the names that were drawn."""

    def __init__(self, choices: Choices, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.choices, self.plan = choices, []
        self.layers: dict[str, nn.Module] = {}
        c, channels = choices, choices.widths[0]
        self._conv(c.stem[0], 3, channels, c.kernel, c.stem_stride, bias=c.biased == "all")
        self._norm(c.stem[1], channels)
        flat = 3
        for stage, (depth, width) in enumerate(zip(c.depths, c.widths, strict=True), 1):
            for block in range(depth):
                name = c.stages.format(stage=stage, stage0=stage - 1, block=block, flat=flat)
                flat += 1
                halves = stage > 1 and block == 0
                stride = 2 if halves and not c.pool_between else 1
                out = width * c.expansion
                self._block(name, channels, width, out, stride)
                self.plan.append((name, stride, halves and c.pool_between))
                channels = out
        self._add(c.head, nn.Linear(channels, 5))
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.running_mean, 0, 0.3)
                nn.init.uniform_(layer.running_var, 0.05, 0.5)
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, 0, 0.3)
        self.eval()

    def _add(self, name: str, layer: nn.Module) -> None:
        home, (*parents, last) = self, name.split(".")
        for parent in parents:
            if parent not in home._modules:
                home.add_module(parent, nn.Module())
            home = home.get_submodule(parent)
        home.add_module(last, layer)
        self.layers[name] = layer

    def _conv(
        self, name: str, inside: int, out: int, size: int, stride: int, *, bias: bool
    ) -> None:
        self._add(name, nn.Conv2d(inside, out, size, stride, size // 2, bias=bias))

    def _norm(self, name: str, channels: int) -> None:
        self._add(name, nn.BatchNorm2d(channels, eps=self.choices.eps))

    def _block(self, name: str, inside: int, width: int, out: int, stride: int) -> None:
        c = self.choices
        conv, norm, skip, skip_norm = c.spelling
        sizes = (1, 3, 1) if c.bottleneck else (3, 3)
        path = (inside, *([width] * (len(sizes) - 1)), out)

        def shortcut() -> None:
            if c.zeros == "projection" and not c.no_skip and (stride > 1 or inside != out):
                bias = c.biased in ("all", "shortcut")
                self._conv(_inside(name, skip), inside, out, 1, stride, bias=bias)
                self._norm(_inside(name, skip_norm), out)

        if c.skip_first:
            shortcut()
        numbered = list(enumerate(sizes, 1))
        for i, size in numbered[::-1] if c.reversed else numbered:
            bias = c.biased in ("all", "main") or (c.biased == "first" and i == 1)
            strided = stride if i == (2 if c.bottleneck else 1) else 1
            if c.preactivation:
                self._norm(_inside(name, _spelled(norm, i)), path[i - 1])
            own = _inside(name, _spelled(conv, i))
            self._conv(own, path[i - 1], path[i], size, strided, bias=bias)
            if not c.preactivation:
                self._norm(_inside(name, _spelled(norm, i)), path[i])
        if not c.skip_first:
            shortcut()

    def _skipped(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        _, _, skip, skip_norm = self.choices.spelling
        if (conv := _inside(name, skip)) in self.layers:
            return self.layers[_inside(name, skip_norm)](self.layers[conv](x))
        step, more = max(1, round(x.shape[2] / y.shape[2])), y.shape[1] - x.shape[1]
        padding = (0, more) if self.choices.zeros == "behind" else (more // 2, more - more // 2)
        return F.pad(x[:, :, ::step, ::step], (0, 0, 0, 0, *padding))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images ``(N, 3, H, W)``."""
        c, act = self.choices, ACTIVATIONS[self.choices.activation]
        x = act(self.layers[c.stem[1]](self.layers[c.stem[0]](x)))
        if c.stem_pool != "none":
            x = F.max_pool2d(x, 3, 2, 1) if c.stem_pool == "3x3" else F.max_pool2d(x, 2)
        conv, norm, *_ = c.spelling
        for name, _, pooled in self.plan:
            if pooled:
                x = F.max_pool2d(x, 2)
            y, last = x, 3 if c.bottleneck else 2
            for i in range(1, last + 1):
                one, its = (self.layers[_inside(name, _spelled(end, i))] for end in (conv, norm))
                y = one(act(its(y))) if c.preactivation else its(one(y))
                if i < last and not c.preactivation:
                    y = act(y)
            y = y if c.no_skip else y + self._skipped(name, x, y)
            x = act(y) if c.last_activation and not c.preactivation else y
        return self.layers[c.head](x.amax((2, 3)) if c.maximum else x.mean((2, 3)))

    def saved(self) -> dict[str, torch.Tensor]:
        """The state dict inside its wrapper."""
        state = {f"{self.choices.wrapper}{key}": value for key, value in self.state_dict().items()}
        if not self.choices.as_safetensors:
            return state
        return dict(sorted(state.items(), key=lambda item: (item[1].is_floating_point(), item[0])))


Outcome = Literal["right", "announced", "refused", "WRONG"]


def outcome_of(network: Network, state: dict[str, Any] | None = None) -> tuple[Outcome, str]:
    """What becomes of a network that is read from its weights alone, and why."""
    try:
        opened = interpret(record_of(state or network.saved(), "the network"), ReadOptions())
    except InputError as error:
        return "refused", str(error)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    precision = PRECISIONS["float64"]
    with torch.no_grad():
        truth = network.double()(images).numpy()
        ours = ReferencePair.of(opened).torch(precision).eval()(images).numpy()
    network.float()
    if ours.shape == truth.shape and relative_l2(ours, truth) <= 1e-10:
        return "right", opened.state_map.naming.name
    notes = "\n".join(opened.all_notes)
    told = [word for word in network.choices.announced if word in notes]
    return ("announced", told[0]) if told else ("WRONG", notes)


def main() -> int:
    """Reads many networks and prints what became of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    for number in range(options.first, options.first + options.networks):
        outcome, why = outcome_of(Network(drawn(number), number))
        counts[outcome] += 1
        if outcome == "WRONG":
            print(f"network {number} is wrong and nothing says why: {drawn(number)}\n{why}")
    print(", ".join(f"{counts[one]} {one}" for one in ("right", "announced", "refused", "WRONG")))
    return 1 if counts["WRONG"] else 0


if __name__ == "__main__":
    sys.exit(main())
