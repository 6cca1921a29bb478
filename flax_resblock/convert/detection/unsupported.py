"""What a state dict has that no network of this library has, so that a refusal names the cause."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice, pairwise
from typing import Any

from flax_resblock.errors import some

Shape = tuple[int, ...]
_REPARAMETRISED = {"weight_g", "weight_v", "weight_mask", "weight_u", "weight_orig"}
"""Of weight norm, pruning and spectral norm."""
_MOST_TENSORS, _DEEPEST = 20_000, 30
"""Tensors, and parts of a name, beyond which nothing is looked for: a file may hold anything."""
_BLOCK = 6
"""Convolutions of the largest residual block, with attention."""


class _Layers:
    """The modules with tensors, in order.

    Attributes:
      tensors: Shape of every tensor, by name; ``modules``: by module and name within it.
      kernels: Shapes of the convolution kernels, by module.
      children: Names of the modules directly inside another, by its name.
      blocks: Names of the convolutions anywhere inside a module, where they are two to six.
      norms: Channels of every batch norm, by module.
    """

    def __init__(self, tensors: Mapping[str, Shape]) -> None:
        self.tensors = tensors
        self.modules: dict[str, dict[str, Shape]] = {}
        for key, shape in tensors.items():
            module, _, name = key.rpartition(".")
            self.modules.setdefault(module, {})[name] = shape
        weights = {name: own.get("weight", ()) for name, own in self.modules.items()}
        self.kernels = {name: shape for name, shape in weights.items() if len(shape) == 4}
        self.norms = {
            name: own["running_mean"][:1]
            for name, own in self.modules.items()
            if "running_mean" in own
        }
        self.children: dict[str, list[str]] = {}
        for name in self.modules:
            self.children.setdefault(name.rpartition(".")[0], []).append(name)
        inside: dict[str, list[str]] = {}
        for name in self.kernels:
            for parent in _parents(name):
                inside.setdefault(parent, []).append(name)
        self.blocks = {one: convs for one, convs in inside.items() if 2 <= len(convs) <= _BLOCK}


def _parents(name: str) -> Iterator[str]:
    """The modules around a module, the nearest first."""
    while name := name.rpartition(".")[0]:
        yield name


def _squeezes(layers: _Layers) -> list[str]:
    """Pairs of layers that narrow the channels and widen them again, inside a block."""
    plain = {
        name: tensors.get("weight", ())
        for name, tensors in layers.modules.items()
        if not tensors.keys() - {"weight", "bias"}
    }
    sizes = {
        name: {layers.kernels[one][2] for one in convs} for name, convs in layers.blocks.items()
    }
    blocks = {name for name, found in sizes.items() if 3 in found}
    found: list[str] = []
    for (first, a), (second, b) in pairwise(plain.items()):
        if not (_is_product(a) and _is_product(b)) or a[:2] != b[1::-1] or a[0] >= a[1]:
            continue
        near = [one for one in islice(_parents(first), 3) if one in blocks]
        if any(second.startswith(f"{one}.") for one in near):
            found += [first, second]
    return found


def _is_product(shape: Shape) -> bool:
    """Whether a layer is one product per pixel."""
    return len(shape) == 2 or (len(shape) == 4 and set(shape[2:]) == {1})


def _partly_biased(layers: _Layers) -> list[str]:
    """Convolutions of blocks with a bias, where others of the same size have none."""
    inside = {one for convs in layers.blocks.values() for one in convs}
    large = [one for one in layers.kernels if one in inside and layers.kernels[one][2] > 1]
    biased = [one for one in large if "bias" in layers.modules[one]]
    return biased if len(biased) < len(large) else []


def _with(axes: int, *names: str) -> Callable[[_Layers], list[str]]:
    """Finds modules with tensors of just these names, whose weight has so many axes."""
    return lambda layers: [
        name
        for name, own in layers.modules.items()
        if own.keys() == set(names) and len(own["weight"]) == axes
    ]


def _acting_norms(layers: _Layers) -> list[str]:
    return [
        name
        for name, own in layers.modules.items()
        if own.keys() & {"v", "tau"} and own.keys() >= {"weight", "bias"}
    ]


def _five_axes(layers: _Layers) -> list[str]:
    return [key for key, shape in layers.tensors.items() if len(shape) == 5]


def _reparametrised(layers: _Layers) -> list[str]:
    found = [key for key in layers.tensors if key.rpartition(".")[2] in _REPARAMETRISED]
    return found + [key for key in layers.tensors if ".parametrizations." in key]


def _firsts(layers: _Layers) -> dict[str, list[str]]:
    """The norms of every module that begins with one and has convolutions beside it."""
    if _reparametrised(layers):
        return {}
    homes = {name.rpartition(".")[0] for name in layers.kernels}
    return {
        parent: [one for one in children if one in layers.norms]
        for parent, children in layers.children.items()
        if parent in homes and children[0] in layers.norms
    }


def _are_of_outputs(layers: _Layers, parent: str) -> bool:
    """Whether the norms have the channels that the convolutions beside them give."""
    given = [layers.kernels[one][:1] for one in layers.children[parent] if one in layers.kernels]
    norms = [layers.norms[one] for one in layers.children[parent] if one in layers.norms]
    return sorted(given) == sorted(norms)


def _norm_first(layers: _Layers) -> list[str]:
    """Norms of the channels that the convolutions of their block take: pre-activation order."""
    return [
        norms[0] for parent, norms in _firsts(layers).items() if not _are_of_outputs(layers, parent)
    ]


def _wide_shortcuts(layers: _Layers) -> list[str]:
    """Kernels larger than a pixel that take and give what their whole block does."""
    found = []
    for first, *others in layers.blocks.values():
        shape = layers.kernels[first]
        same = [one for one in others if layers.kernels[one][:2] == shape[:2]]
        wide = [one for one in same if layers.kernels[one][2] > 3]
        if len(others) == 2 and len(same) == 1 and wide and shape[0] != shape[1]:
            found += wide
    return found


def _bare_shortcuts(layers: _Layers) -> list[str]:
    """Convolutions of one pixel without a norm beside two larger ones that have theirs."""
    around: dict[str, list[str]] = {}
    for name in layers.norms:
        for parent in _parents(name):
            around.setdefault(parent, []).append(name)
    first = {norms[0] for norms in _firsts(layers).values()}
    found = []
    for block, convs in layers.blocks.items():
        norms = around.get(block, [])
        small = [one for one in convs if layers.kernels[one][2] == 1]
        alike = len({layers.norms[one] for one in norms}) == 1
        if (len(convs), len(small), len(norms)) == (3, 1, 2) and alike and not first & set(norms):
            found += small
    return found


_PORT = (
    "With the network's own code, `flax-resblock port net.py:Net weights.pth out` writes it as "
    "Flax source."
)
"""The next step, which needs no block of this library; it does not know volumes."""
_SIGNS: tuple[tuple[Callable[[_Layers], list[str]], str], ...] = (
    (_five_axes, "kernels with five axes, of convolutions over volumes or video"),
    (
        lambda layers: [name for name, shape in layers.kernels.items() if shape[2] != shape[3]],
        "kernels that are not square",
    ),
    (
        _reparametrised,
        "weight norm, spectral norm or pruning masks; remove them in PyTorch first "
        "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm, "
        "torch.nn.utils.prune.remove)",
    ),
    (
        lambda layers: [] if layers.norms else _with(1, "weight", "bias")(layers),
        "norms without running statistics, such as GroupNorm or LayerNorm; of these the networks "
        "of this library have group norms alone",
    ),
    (
        lambda layers: [name for name in layers.norms if "weight" not in layers.modules[name]],
        "batch norms without scale and bias (affine=False)",
    ),
    (
        _with(1, "weight"),
        "layers with a single vector, such as PReLU, whose slopes are learned; the activations of "
        "this library have no weights",
    ),
    (
        _squeezes,
        "squeeze-and-excitation under other names than this library knows (se.fc1 and se.fc2, fc1 "
        "and fc2, se.fc.0 and se.fc.2, se.conv_reduce and se.conv_expand), or of a ratio of inner "
        "channels that is none of 1/1, 1/2 to 1/64",
    ),
    (
        _acting_norms,
        "norms that are activations too (EvoNorm, FilterResponseNorm), which have a third tensor",
    ),
    (
        _partly_biased,
        "convolutions with a bias beside others without; in this library either all convolutions "
        "of the main paths have one or none, and so those of the shortcuts and of the stem",
    ),
    (
        _with(2, "weight"),
        "a fully connected layer without bias; the classification head of this library has one",
    ),
    (
        _norm_first,
        "norms of the channels that the convolutions after them take: pre-activation order, in "
        "which this library has no norm behind a shortcut",
    ),
    (
        _wide_shortcuts,
        "shortcuts with a kernel larger than 3x3, which the blocks of this library do not have",
    ),
    (
        _bare_shortcuts,
        "shortcuts whose convolution has no norm after it, which the blocks of this library have "
        "in post-activation order",
    ),
)


def unsupported(found: Mapping[str, Any]) -> list[str]:
    """A sentence on everything that no network of this library has."""
    if len(found) > _MOST_TENSORS or any(key.count(".") > _DEEPEST for key in found):
        return []
    layers = _Layers({key: info.shape for key, info in found.items()})
    seen = {words: names for sign, words in _SIGNS if (names := sign(layers))}
    lines = [f"It has {words}: {some(names)}." for words, names in seen.items()]
    return [*lines, _PORT] if lines and not _five_axes(layers) else lines
