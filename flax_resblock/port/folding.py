"""Feature maps that are flattened in front of a linear layer, whose weight can take them as they
are: with its rows in the order of channels last, nothing has to be transposed at run time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flax_resblock.convert.codecs import folded
from flax_resblock.port.layer import Layer

MARK = "flattened with channels last"
"""Key in the ``meta`` of a node that flattens a map without a transpose."""

_RESHAPES = ("view", "reshape", "flatten", "_unsafe_view")
_ELEMENTWISE = (
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh"),
    *("sigmoid", "hardswish", "hardsigmoid", "hardtanh", "softplus", "dropout", "clone"),
)
"""Operators between the two to which the order of the numbers is all the same."""


@dataclass(frozen=True)
class Folded:
    """What was found.

    Attributes:
      layers: The map that each linear layer takes, ``(C, H, W)``, by the name of the layer.
      between: Modules that return the numbers of a map in another order than PyTorch.
    """

    layers: Mapping[str, tuple[int, int, int]]
    between: frozenset[str]

    def applied(self, layer: Layer | None, path: str) -> Layer | None:
        """The layer with the weight in the order of the map that it takes."""
        if layer is None or path not in self.layers:
            return layer
        kernel, _ = layer.tensors["weight"]
        codec = folded(self.layers[path])
        return replace(layer, tensors={**layer.tensors, "weight": (kernel, codec)})

    def joined(self, other: Folded) -> Folded:
        """Those of both."""
        return Folded({**self.layers, **other.layers}, self.between | other.between)


NOTHING = Folded({}, frozenset())


def fold(program: Any) -> Folded:
    """Finds them in an exported program, and marks the nodes that flatten."""
    signature = program.graph_signature
    parameters = {**signature.inputs_to_parameters}
    layers: dict[str, tuple[int, int, int]] = {}
    between: set[str] = set()
    for node in program.graph.nodes:
        if _name(node) != "linear" or node.args[1].name not in parameters:
            continue
        weight = node.args[1]
        path, _, leaf = parameters[weight.name].rpartition(".")
        kind = _stack(node)[-1:] if leaf == "weight" and len(weight.users) == 1 else []
        if kind != [path]:
            continue  # not a layer of its own
        chain, first = [], node.args[0]
        while _name(first) in _ELEMENTWISE and len(first.users) == 1:
            chain.append(first)
            first = first.args[0]
        if _name(first) not in _RESHAPES or len(first.users) != 1:
            continue
        before, after = _shape(first.args[0]), _shape(first)
        if len(before) != 4 or len(after) != 2 or before[2:] == (1, 1) or before[1] == 1:
            continue
        if not all(isinstance(size, int) for size in before[1:]) or before[0] != after[0]:
            continue
        first.meta[MARK] = True
        layers[path] = (before[1], before[2], before[3])
        for one in (*chain, first):
            between |= {name for name in _stack(one) if not f"{path}.".startswith(f"{name}.")}
    return Folded(layers, frozenset(between))


def _name(node: Any) -> str:
    """``"relu"`` for ``aten.relu_.default``."""
    return str(getattr(node, "target", "")).removeprefix("aten.").partition(".")[0].rstrip("_")


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(getattr(node.meta.get("val"), "shape", ()))


def _stack(node: Any) -> list[str]:
    """The modules that a node is in, from the outermost; without the network."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    names = [str(path).removeprefix("L['self']").strip(".") for path, _ in stack]
    return [name for name in names if name]
