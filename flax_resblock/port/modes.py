"""What a network does in training mode alone, such as to return the logits of auxiliary heads too,
or to compute in several branches what is one kernel in evaluation mode."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from torch.fx import Node

from flax_resblock.errors import InputError, some
from flax_resblock.port.folding import NOTHING
from flax_resblock.port.graphs import held, leaves
from flax_resblock.port.layers import layer_of
from flax_resblock.port.modules import tensors_held, without_call
from flax_resblock.port.operator_names import RANDOM, name_of
from flax_resblock.port.tracing import Traced, trace, where

_OF_TRACE = torch.fx.__path__[0]
"""Where ``torch.export`` asks for the mode of its own graphs."""


@contextmanager
def asking_for_mode(module: torch.nn.Module) -> Iterator[list[str]]:
    """Within it the list gets the names of classes whose code asks whether it is in training mode.

    Where it stays empty while the module is traced in evaluation mode, training mode does the same
    but for layers of ``torch.nn``. Classes that may keep the mode elsewhere are in it at the start:
    those with a ``train``, ``eval`` or ``training`` of their own.
    """
    of_module: Any = torch.nn.Module
    parts = list(module.modules())
    layers = {id(part) for part in parts if _is_layer(part)}
    asking = [type(part).__name__ for part in parts if _has_own_switch(part)]

    def read(part: Any) -> bool:
        caller = sys._getframe(1).f_code.co_filename
        if id(part) not in layers and not caller.startswith(_OF_TRACE):
            asking.append(type(part).__name__)
        if "training" not in vars(part):
            raise AttributeError("training")
        return vars(part)["training"]

    def write(part: Any, value: bool) -> None:
        vars(part)["training"] = value

    of_module.training = property(read, write)
    try:
        yield asking
    finally:
        del of_module.training


def _has_own_switch(part: torch.nn.Module) -> bool:
    methods = {"train", "eval"}
    own = [cls for cls in type(part).__mro__ if cls is not torch.nn.Module]
    replaced = any({*methods, "training"} & vars(cls).keys() for cls in own)
    return replaced or bool(methods & vars(part).keys())


def trace_training(
    evaluation: Traced, images: Sequence[torch.Tensor]
) -> tuple[Traced, Traced | None]:
    """Traces a network in training mode too.

    Layers of ``torch.nn`` stay in evaluation mode, as those that are written for them know both
    modes: what differs is the user's own code, where it asks for ``self.training``.

    Args:
      evaluation: The trace in evaluation mode.
      images: The inputs of the network.
    Returns:
      The trace that shows what the network does, with dropout that the code calls in training mode
      alone; and the trace in training mode if it does something else there, such as to return the
      logits of auxiliary heads too, else None.
    Raises:
      InputError: In training mode it draws random numbers of its own, or cannot be traced.
    """
    module = evaluation.live
    module.train()
    _refuse_frozen(module)
    for part in filter(_is_layer, module.modules()):
        part.training = False
    try:
        fold_layout = evaluation.folded is not NOTHING
        options = {"fold_layout": fold_layout, "any_size": evaluation.any_size}
        training = trace(module, images, training=True, **options)
    finally:
        module.eval()
    _refuse_random(training)
    before, after = (sum(map(_is_dropout, _nodes(one))) for one in (evaluation, training))
    if after > before and not [*differing(evaluation, training, through_dropout=True)]:
        return training, None
    return evaluation, (training if [*differing(evaluation, training)] else None)


def _refuse_frozen(module: torch.nn.Module) -> None:
    """Refuses a ``train`` that leaves norms or dropout in evaluation mode: that of nnx does not."""
    frozen = [
        name
        for name, part in module.named_modules()
        if _is_layer(part) and not part.training and not [*part.children()]
        if hasattr(part, "running_mean") or "Drop" in type(part).__name__
    ]
    if frozen:
        first = frozen[0]
        raise InputError(
            f"{type(module).__name__} cannot be ported: its train() leaves {some(frozen)} in "
            f"evaluation mode, and train() of a port switches every layer. Port it without that "
            f"method, and call model.{first}.eval() after each model.train() in JAX."
        )


def _refuse_random(training: Traced) -> None:
    """Refuses random numbers of the user's own by name: they also move what is around them."""
    for node in _nodes(training):
        name = name_of(node)
        if name in RANDOM:
            at = where(node)
            raise InputError(
                f"{type(training.live).__name__} cannot be ported: in training mode it draws "
                f"random numbers of its own{f' at {at}' if at else ''} ({node.target}). To drop "
                f"values or branches at random, use torch.nn.Dropout or "
                f"torchvision.ops.StochasticDepth."
            )


def _is_dropout(node: Node) -> bool:
    return node.op == "call_function" and name_of(node) in ("dropout", "feature_dropout")


def has_graph(traced: Traced, path: str) -> bool:
    """Whether a module is called in this mode."""
    module: Any = traced.graphs
    for step in path.split(".") if path else ():
        module = getattr(module, step, None)
    return bool(getattr(getattr(module, "graph", None), "nodes", ()))


def shared_nodes(
    evaluation: Traced, training: Traced, path: str, *, through_dropout: bool = False
) -> Mapping[Node, Node]:
    """The nodes of a module in training mode -> the nodes in evaluation mode that compute the same.

    Args:
      path: Of the module; ``""`` is the network.
      through_dropout: Dropout computes what it is given.
    """
    numbers: dict[Any, int] = {}
    options = {"through_dropout": through_dropout}
    known: dict[int, Node] = {}
    for node, number in _numbered(evaluation, path, numbers, **options).items():
        known.setdefault(number, node)
    found = _numbered(training, path, numbers, **options)
    return {node: known[number] for node, number in found.items() if number in known}


def _numbered(
    traced: Traced, path: str, numbers: dict[Any, int], *, through_dropout: bool = False
) -> dict[Node, int]:
    """A number for every node of a module, the same for nodes that compute the same.

    Args:
      numbers: Those that were given; changed.
      through_dropout: Dropout computes what it is given.
    """
    found: dict[Node, int] = {}
    seen: Counter[Any] = Counter()

    def plain(argument: Any) -> Any:
        if isinstance(argument, Node):
            return found[argument]
        if isinstance(argument, tuple | list):
            return tuple(plain(one) for one in argument)
        return repr(argument)

    for node in _graph(traced, path).nodes:
        if node.op == "output":
            continue
        if through_dropout and _is_dropout(node):
            found[node] = found[node.args[0]]
            continue
        what: Any = without_call(str(node.target))
        if node.op == "placeholder":
            what = seen["placeholder"]
            seen["placeholder"] += 1
        elif node.op == "get_attr":
            what = _attribute(traced, path, node)
        arguments = [plain(one) for one in (*node.args, *node.kwargs.values())]
        key = (node.op, what, *arguments, *node.kwargs)
        seen[key] += 1
        found[node] = numbers.setdefault((key, seen[key]), len(numbers))
    return found


def _attribute(traced: Traced, path: str, node: Node) -> Any:
    """The name of a parameter or buffer, or the numbers of a constant."""
    live = traced.live.get_submodule(without_call(path))
    tensor = held(node.graph, node)
    if node.target in tensors_held(live) or not isinstance(tensor, torch.Tensor):
        return node.target
    return str(tensor.dtype), tuple(tensor.shape), tuple(tensor.flatten().tolist())


def differing(
    evaluation: Traced, training: Traced, *, through_dropout: bool = False
) -> Iterator[str]:
    """The paths of the modules whose own code does something else in training mode.

    Args:
      through_dropout: Dropout computes what it is given.
    """
    for path, _ in training.graphs.named_modules():
        if not (has_graph(evaluation, path) and has_graph(training, path)):
            continue
        shared = shared_nodes(evaluation, training, path, through_dropout=through_dropout)
        before, after = _outputs(evaluation, path), _outputs(training, path)
        if through_dropout:
            before = [_without_dropout(one) for one in before]
        met = {*shared.values()}
        lost = [one for one in _reached(before) if one not in met]
        if through_dropout:
            lost = [one for one in lost if not _is_dropout(one)]
        more = [one for one in _reached(after) if one not in shared]
        if lost or more or [shared[one] for one in after] != before:
            yield path


def _graph(traced: Traced, path: str) -> Any:
    return traced.graphs.get_submodule(path).graph


def _without_dropout(node: Node) -> Node:
    """What dropout is given, if a node is dropout."""
    while _is_dropout(node):
        node = node.all_input_nodes[0]
    return node


def _nodes(traced: Traced) -> Iterator[Node]:
    """The nodes of all modules."""
    for part in traced.graphs.modules():
        yield from getattr(getattr(part, "graph", None), "nodes", ())


def _outputs(traced: Traced, path: str) -> list[Node]:
    """The nodes that a module returns."""
    last = next(iter(reversed(_graph(traced, path).nodes)))
    return [one for one in leaves(last.args[0]) if isinstance(one, Node)]


def _reached(outputs: Sequence[Node]) -> list[Node]:
    """The nodes that these depend on, in order; they are among them."""
    found, stack = set(), list(outputs)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return [one for one in outputs[0].graph.nodes if one in found] if outputs else []


def _is_layer(module: torch.nn.Module) -> bool:
    try:
        return layer_of(module) is not None
    except InputError:
        return True
