"""Finds the architecture, the number of classes and the layout of a state dict from its names and shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

from flax_resblock.architecture import ARCHITECTURES, EXPANSION, BlockConfig, Config, Kind, ResNetConfig, Slot, architecture, name_of
from flax_resblock.convert.layouts import LAYOUTS, Layout
from flax_resblock.convert.state_map import Misfit, StateMap, TensorInfo
from flax_resblock.errors import CheckpointError, InputError

Found = Mapping[str, TensorInfo]
_KERNEL_AXES = {Kind.CONV: 4, Kind.LINEAR: 2}
_NORM_TENSORS = ("scale", "bias", "mean", "var")


@dataclass(frozen=True)
class Match:
    """One reading of a state dict."""

    state_map: StateMap
    misfit: Misfit

    @property
    def title(self) -> str:
        """``resnet18 in layout 'torchvision'``."""
        return f"{name_of(self.state_map.config)} in layout '{self.state_map.layout.name}'"


class _Reader:
    """Looks tensors up by place under one layout."""

    def __init__(self, layout: Layout, found: Found) -> None:
        self.layout = layout
        self.found = found
        self.modules = {key.rpartition(".")[0] for key in found}

    def shape(self, stage: str, block: int | None, role: str, kind: Kind, tensor: str = "kernel") -> tuple[int, ...] | None:
        """Flax shape of a tensor; None where it is absent or has another number of axes."""
        module = self.layout.module_name(Slot(stage, block, role, kind))
        row = next(row for row in self.layout.tensors[kind] if row.flax_name == tensor)
        info = self.found.get(f"{module}.{row.name}")
        shape = None if info is None else row.codec.flax_shape(info.shape)
        return shape if shape is not None and len(shape) == (_KERNEL_AXES[kind] if tensor == "kernel" else 1) else None

    def has_block(self, stage: str, block: int) -> bool:
        prefix = self.layout.block_prefix(stage, block) + "."
        return any(module.startswith(prefix) for module in self.modules)

    def width(self, stage: str, blocks: Iterable[int | None], conv: str, norm: str) -> int | None:
        """Output channels of a convolution in the first of ``blocks`` that has it: what most of its kernel and the norm after it say.

        A majority, so that one tensor of a wrong shape is found out by the others and not the other way round.
        """
        for block in blocks:
            shapes = [self.shape(stage, block, conv, Kind.CONV), *(self.shape(stage, block, norm, Kind.NORM, name) for name in _NORM_TENSORS)]
            channels = Counter(shape[-1] for shape in shapes if shape)
            if channels:
                return channels.most_common(1)[0][0]
        return None

    def grouping(self, kind: str, blocks: Iterable[tuple[str, int | None, int | None, int]]) -> tuple[int, int]:
        """``groups`` and ``base_width`` that most 3x3 kernels ``(3, 3, channels // groups, _)`` have; of two that disagree, the first is believed.

        Args:
          kind: Of every block.
          blocks: Stage, index, input channels (None: unknown) and planes of each.
        """
        seen: list[tuple[int, int, int]] = []
        for stage, block, in_channels, planes in blocks:
            inputs = {"conv1": in_channels, "conv2": planes} if kind == "basic" else {"conv2": self.width(stage, [block], "conv2", "norm2")}
            for conv, channels in inputs.items():
                kernel = self.shape(stage, block, conv, Kind.CONV)
                if kernel and channels and planes and 0 < kernel[2] <= channels:
                    seen.append((planes, kernel[2], channels))
        if not seen:
            return 1, 64
        groups = Counter(channels // fan for _, fan, channels in seen).most_common(1)[0][0]
        if kind == "basic":
            return groups, 64
        needed = [(planes, inner // groups) for planes, _, inner in seen]
        narrowest = {-(-64 * per_group // planes) for planes, per_group in needed}  # where one width serves all stages, the largest of these does
        return groups, max(narrowest, key=lambda width: (sum(planes * width // 64 == per_group for planes, per_group in needed), -width))


def infer_network(layout: Layout, found: Found) -> ResNetConfig | None:
    """The network that the names and shapes describe under ``layout``, None where they describe none.

    Tolerates single missing tensors, so that the error can name them.
    """
    reader = _Reader(layout, found)
    stages: list[range] = []
    for number in count(1):
        depth = next(block for block in count() if not reader.has_block(f"stage{number}", block))
        if depth == 0:
            break
        stages.append(range(depth))
    if not stages:
        return None
    kind = "bottleneck" if any(reader.width(f"stage{n}", blocks, "conv3", "norm3") for n, blocks in enumerate(stages, 1)) else "basic"
    last = 3 if kind == "bottleneck" else 2
    widths = [reader.width(f"stage{n}", blocks, f"conv{last}", f"norm{last}") or 0 for n, blocks in enumerate(stages, 1)]
    stem = reader.shape("stem", None, "conv", Kind.CONV)
    stem_width = reader.width("stem", [None], "conv", "norm")
    head = reader.shape("head", None, "", Kind.LINEAR) or reader.shape("head", None, "", Kind.LINEAR, "bias")
    if 0 in widths or not stem_width:
        return None
    inputs = [stem_width, *widths]
    blocks = [(f"stage{n + 1}", i, widths[n] if i else inputs[n], widths[n] // EXPANSION[kind]) for n, stage in enumerate(stages) for i in stage]
    groups, base_width = reader.grouping(kind, blocks)
    projects = any(reader.width(f"stage{n}", [0], "shortcut.conv", "shortcut.norm") for n in range(1, len(stages) + 1))
    changes = len(stages) > 1 or stem_width != widths[0]
    try:
        return ResNetConfig(
            block=kind,
            depths=tuple(len(blocks) for blocks in stages),
            widths=tuple(width // EXPANSION[kind] for width in widths),
            stem="cifar" if stem is not None and stem[0] == 3 else "imagenet",
            stem_width=stem_width,
            shortcut="projection" if projects or not changes else "zero_pad",
            groups=groups,
            base_width=base_width,
            in_channels=stem[2] if stem else 3,
            num_classes=head[-1] if head else None,
        )
    except ValueError:
        return None


def infer_block(layout: Layout, found: Found, stride: int | None) -> BlockConfig | None:
    """The bare block that the names and shapes describe under ``layout``; its stride cannot be read off the weights."""
    reader = _Reader(layout, found)
    kind = "bottleneck" if reader.width("", [None], "conv3", "norm3") else "basic"
    last = 3 if kind == "bottleneck" else 2
    out = reader.width("", [None], f"conv{last}", f"norm{last}")
    first, second, shortcut = (reader.shape("", None, role, Kind.CONV) for role in ("conv1", "conv2", "shortcut.conv"))
    if out is None or (first is None and second is None):
        return None
    groups, base_width = reader.grouping(kind, [("", None, shortcut[2] if shortcut else None, out // EXPANSION[kind])])
    if kind == "basic" and first and shortcut and first[2] and shortcut[2] % first[2] == 0:
        groups = shortcut[2] // first[2]  # a projection sees every input channel: that tells more than a second kernel, which may be the wrong one
    projects = reader.width("", [None], "shortcut.conv", "shortcut.norm") is not None
    fan = first[2] * (groups if kind == "basic" else 1) if first else out
    in_channels = shortcut[2] if shortcut else fan
    try:
        return BlockConfig(
            in_channels=in_channels,
            out_channels=out,
            kind=kind,
            stride=stride or (2 if projects and in_channels == out else 1),
            groups=groups,
            base_width=base_width,
            shortcut="projection" if projects or ((stride or 1) == 1 and in_channels == out) else "zero_pad",
        )
    except ValueError:
        return None


def _requested(wanted: str | Config, found: Found, layout: Layout, num_classes: int | None, stride: int | None) -> Config:
    """The configuration a person asked for; classes and channels that were left open come from the file."""
    if isinstance(wanted, BlockConfig):
        return wanted if stride is None else replace(wanted, stride=stride)
    if isinstance(wanted, ResNetConfig):
        return wanted if num_classes is None else replace(wanted, num_classes=num_classes)
    seen = infer_network(layout, found)
    changes: dict[str, object] = {}
    if seen is not None:
        changes = {"in_channels": seen.in_channels, "num_classes": seen.num_classes}
    if num_classes is not None:
        changes["num_classes"] = num_classes
    return architecture(wanted, **changes)


def _matches(
    found: Found,
    layouts: Iterable[Layout],
    wanted: str | Config | None,
    num_classes: int | None,
    stride: int | None,
    allow_missing: Sequence[str] = (),
) -> list[Match]:
    matches = []
    for layout in layouts:
        if wanted is not None:
            config: Config | None = _requested(wanted, found, layout, num_classes, stride)
        else:
            config = infer_network(layout, found) or infer_block(layout, found, stride)
            if isinstance(config, ResNetConfig) and num_classes is not None:
                config = replace(config, num_classes=num_classes)
        if config is None:
            continue
        try:
            state_map = StateMap(config, layout)
        except InputError:
            continue  # this scheme cannot name the network at all
        matches.append(Match(state_map, state_map.check(found, allow_missing)))
    return sorted(matches, key=lambda match: (len(match.misfit), len(match.misfit.unexpected)))  # of two, the one that knows every name


def _same(a: StateMap, b: StateMap) -> bool:
    """Whether two readings are the same conversion."""
    return a.config == b.config and [(e.torch_key, e.codec) for e in a.entries] == [(e.torch_key, e.codec) for e in b.entries]


def identify(
    found: Found,
    *,
    architecture: str | Config | None = None,
    layout: str | None = None,
    num_classes: int | None = None,
    stride: int | None = None,
    allow_missing: Sequence[str] = (),
    source: str = "the state dict",
) -> Match:
    """The one reading of a state dict that fits.

    Args:
      found: Shape and dtype of every tensor.
      architecture: A name or configuration, None to find it.
      layout: A name of :data:`LAYOUTS`, None to find it.
      num_classes: Size of the logits, None to read it off.
      stride: Of a bare block whose skip changes shape, which its weights do not tell.
      allow_missing: Keys (globs) that may be absent.
      source: What to call the state dict in messages.
    Raises:
      CheckpointError: Nothing fits, or several readings fit; the message shows the nearest and the flag to use.
      InputError: An unknown name, or a number of classes or a stride below 1.
    """
    if layout is not None and layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} is unknown; known: {', '.join(LAYOUTS)}.")
    if isinstance(architecture, str) and architecture not in ARCHITECTURES:
        raise InputError(f"architecture {architecture!r} is unknown; known: {', '.join(ARCHITECTURES)}.")
    for name, number in (("num_classes", num_classes), ("stride", stride)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise InputError(f"{name}={number!r} must be a positive integer.")
    layouts = LAYOUTS.values() if layout is None else (LAYOUTS[layout],)
    matches = _matches(found, layouts, architecture, num_classes, stride, allow_missing)
    fitting = [match for match in matches if not len(match.misfit)]
    if not fitting:
        raise CheckpointError(_no_fit(found, source, matches, architecture is not None or layout is not None or num_classes is not None, stride))
    best, *others = fitting
    rivals = [other for other in others if not _same(best.state_map, other.state_map)]
    if rivals:
        choices = "; ".join(match.title for match in (best, *rivals))
        raise CheckpointError(f"{source} fits several readings equally well: {choices}. Say which with --layout NAME or --architecture NAME.")
    config = best.state_map.config
    if isinstance(config, BlockConfig) and stride is None and config.changes_shape and isinstance(architecture, str | None):
        raise CheckpointError(
            f"{source} is a bare {config.kind} block {config.in_channels}->{config.out_channels} whose skip changes shape "
            f"(layout '{best.state_map.layout.name}'). Its stride cannot be read off the weights. Say it with --stride 1 or --stride 2 (stride=... in Python)."
        )
    return best


def _no_fit(found: Found, source: str, matches: list[Match], was_told: bool, stride: int | None) -> str:
    free = _matches(found, LAYOUTS.values(), None, None, stride) if was_told else matches
    if not matches:
        keys = list(found)
        sample = f"its {len(keys)} tensors are named like {', '.join(keys[:3])}" if keys else "it holds no tensors"
        nearest = f" Nearest: {free[0].title} ({_differences(free[0])})." if free else ""
        return (
            f"{source} is no residual network in any known layout ({', '.join(LAYOUTS)}); {sample}.{nearest} "
            "Check that it is the right file; --architecture NAME with --layout NAME lists every difference from one reading."
        )
    best = matches[0]
    lines = [f"{source} does not fit {best.title}.", *best.misfit.lines()]
    better = [match for match in free if len(match.misfit) < len(best.misfit)]
    others = [match for match in (better or matches[1:]) if match is not best]
    if better and not len(better[0].misfit):
        lines.append(f"It does fit {better[0].title}; leave out what you gave, or pass --layout {better[0].state_map.layout.name}.")
    elif others:
        lines.append(f"Next nearest: {'; '.join(f'{match.title} ({_differences(match)})' for match in others[:2])}.")
    lines.append("Try --layout NAME or --architecture NAME for another reading, --ignore KEY to drop a key, --allow-missing KEY to start one afresh.")
    return "\n".join(lines)


def _differences(match: Match) -> str:
    number = len(match.misfit)
    return f"{number} difference{'' if number == 1 else 's'}"
