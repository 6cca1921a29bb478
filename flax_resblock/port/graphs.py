"""What the graph of a module takes and returns."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from flax_resblock.port.layers import Layer
from flax_resblock.port.modules import identifier
from flax_resblock.port.tracing import where
from flax_resblock.port.values import Constant


def leaves(result: Any) -> Iterator[Any]:
    """What nested tuples, lists and mappings hold, in order."""
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, tuple | list):
        for one in result:
            yield from leaves(one)
    else:
        yield result


def result_of(spec: Any, texts: Iterator[str]) -> str:
    """What the network returns, with a text for each of its leaves, such as a hole for a tensor."""
    if spec.is_leaf():
        return next(texts)
    inner = [result_of(child, texts) for child in spec.children()]
    if spec.type in (tuple, list):
        ends = "[]" if spec.type is list else "()"
        return ends[0] + ", ".join(inner) + ("," if len(inner) == 1 else "") + ends[1]
    names = [str(key) for key in spec.context] if isinstance(spec.context, (list, tuple)) else []
    if len(names) != len(inner):
        names = list(getattr(spec.context, "_fields", ())) or [str(i) for i in range(len(inner))]
    pairs = (f'"{name}": {value}' for name, value in zip(names, inner, strict=True))
    return "{{" + ", ".join(pairs) + "}}"


def called_at(graphs: torch.nn.Module, path: str) -> str:
    """``, called at FILE:LINE (CODE)`` of the user's line that calls a module; empty if none
    does."""
    try:
        nodes = getattr(getattr(graphs.get_submodule(path), "graph", None), "nodes", ())
    except AttributeError:  # it is never called
        return ""
    lines = [where(node) for node in nodes if node.op == "call_function"]
    return next((f", called at {line}" for line in lines if line), "")


def is_tensor(node: Any) -> bool:
    return isinstance(node, torch.fx.Node) and hasattr(node.meta.get("val"), "shape")


def tensor_inputs(graph: Any) -> list[Any]:
    """The inputs of a graph that are tensors."""
    return [node for node in graph.nodes if node.op == "placeholder" and is_tensor(node)]


def calls_in_a_row(graph: Any) -> list[str] | None:
    """The modules that a graph calls, if it does nothing but hand one's result to the next."""
    inputs = tensor_inputs(graph)
    previous, found = None, []
    for node in graph.nodes:
        if node in inputs and previous is None:
            previous = node
        elif node.op == "call_module":
            if [one for one in node.args if is_tensor(one)] != [previous]:
                return None
            previous = node
            found.append(str(node.target))
        elif node.op != "output" and is_tensor(node):
            return None
    return found


def list_order(graph: Any) -> list[int]:
    """The order of the tensors of a list: that in which an operator takes them all."""
    tensors = tensor_inputs(graph)
    for node in graph.nodes:
        for argument in node.args:
            if isinstance(argument, (list, tuple)) and set(tensors) == set(argument):
                return [tensors.index(one) for one in argument]
    return list(range(len(tensors)))


def layer_call(layer: Layer) -> tuple[str, list[Constant]]:
    """``nn.max_pool({}, {}, stride={})``, and the constants for its holes behind the first."""
    texts = ["{}", *("{}" for _ in layer.positional)]
    holes = [Constant(value, "size") for value in layer.positional]
    for name, value in layer.options.items():
        texts.append(f"{name}={{}}")
        holes.append(Constant(value, name))
    return f"{layer.call}({', '.join(texts)})", holes


def argument_names(module: torch.nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [identifier(one.name) for one in parameters if one.kind in kinds]
    return ["x"] if names in ([], ["input"]) else names


def hint_of(target: str) -> str:
    """The name of a variable for what a module returns."""
    *rest, last = target.split(".")
    return identifier("_".join([*rest[-1:], last]) if last.isdigit() else last)


def held(graph: Any, node: Any) -> Any:
    """What an attribute of a graph is: a tensor, or a graph that an operator calls."""
    owner = graph.owning_module
    for step in str(node.target).split("."):
        owner = getattr(owner, step, None)
    return owner
