"""Traces a live PyTorch module: one small graph of ATen operators per submodule.

Source: https://docs.pytorch.org/docs/stable/export.html
"""

from __future__ import annotations

import io
import logging
import os
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental import symbolic_shapes

from flax_resblock.errors import InputError, visible
from flax_resblock.port.folding import NOTHING, Folded, fold
from flax_resblock.port.frozen import PYTORCH, detach, no_idle_autocast, without_gradients_seen
from flax_resblock.port.layers import direct_calls_seen, stochastic_depth_seen
from flax_resblock.port.sizes import put_in_place, remember_sizes
from flax_resblock.port.windows import Windows

_VIEWS = (
    *("view", "reshape", "transpose", "permute", "slice", "select", "chunk", "split", "squeeze"),
    *("split_with_sizes", "unsqueeze", "flatten", "unbind", "expand", "expand_as", "narrow", "t"),
    *("contiguous", "dropout", "alias", "detach", "view_as", "reshape_as", "unflatten", "to"),
)
"""Operators whose result may share memory with their input."""


@dataclass(frozen=True)
class Traced:
    """A module and what it does.

    Attributes:
      live: The module, in evaluation mode.
      graphs: The module again, with a graph for each submodule.
      out_spec: How its outputs are put together, a pytree.
      dtype: Of its input.
      constants: Tensors in the code that are neither parameters nor buffers.
      folded: Linear layers that take flattened maps with channels last.
      custom_gradients: Functions whose gradient is written by hand, each with its place.
      any_size: Whether it is a trace with images of any size.
    """

    live: torch.nn.Module
    graphs: torch.nn.Module
    out_spec: Any
    dtype: torch.dtype
    constants: Mapping[str, Any]
    folded: Folded = NOTHING
    custom_gradients: tuple[str, ...] = ()
    any_size: bool = False


def trace(
    module: torch.nn.Module,
    images: Sequence[torch.Tensor],
    *,
    training: bool = False,
    fold_layout: bool = False,
    any_size: bool = False,
) -> Traced:
    """Traces a module with a batch of any size.

    Args:
      module: In the mode that is traced, its layers in evaluation mode.
      images: Its inputs, each with the batch first.
      training: Show batch norm and dropout as functions as they are in evaluation mode.
      fold_layout: Look for flattened maps that linear layers can take with channels last.
      any_size: With heights, widths and lengths of any size as well.
    Raises:
      InputError: The module does what cannot be traced, or changes its input in place.
    """
    free: dict[int, Any] = {0: torch.export.Dim.DYNAMIC}
    if any_size:  # where the code asks for one size, that is what it has
        free |= dict.fromkeys(range(2, 10), torch.export.Dim.AUTO)
    dynamic = [{k: v for k, v in free.items() if k < image.ndim} for image in images]
    with (
        _quiet(),
        no_idle_autocast(),
        stochastic_depth_seen(module),
        direct_calls_seen(module),
        _custom_gradients() as custom,
        _unsolved() if any_size else nullcontext(),
        without_gradients_seen(),
        Windows(),
    ):
        try:
            program = torch.export.export(
                module,
                tuple(images),
                dynamic_shapes=tuple(dynamic),
                strict=False,
            )
        except Exception as error:
            raise InputError(_why_not(module, error)) from error
        detach(program.graph)
        if training:
            _as_in_evaluation(program.graph)
        if _changes_a_part(program, type(module).__name__):
            program = program.run_decompositions({})  # writes as functions, and nothing else
        remember_sizes(program, images)
        put_in_place(program.graph)
        folded = fold(program) if fold_layout else NOTHING
        try:
            graphs = torch.export.unflatten(program)
        except Exception as error:
            raise InputError(_why_not(module, error)) from error
    spec, constants = program.call_spec.out_spec, program.constants
    dtype, custom = images[0].dtype, tuple(custom)
    return Traced(module, graphs, spec, dtype, constants, folded, custom, any_size)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export writes what concerns its own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _unsolved() -> Iterator[None]:
    """Within it, the conditions on sizes that a trace collects are not solved for the sizes, which
    not all can be: whether a port is right at other sizes is found out by comparing."""
    constraints: Any = symbolic_shapes.DimConstraints
    before = constraints.solve
    constraints.solve = lambda *_, **__: None
    try:
        yield
    finally:
        constraints.solve = before


@contextmanager
def _custom_gradients() -> Iterator[dict[str, None]]:
    """The places that use functions with a gradient of their own, of which a trace shows the value
    alone.
    """
    function: Any = torch.autograd.Function
    before = vars(function)["apply"]
    found: dict[str, None] = {}

    def apply(cls: Any, *arguments: Any, **named: Any) -> Any:
        frames = [one for one in traceback.extract_stack()[:-1] if _is_own(one.filename)]
        place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        found[f"{cls.__qualname__}{place}"] = None
        return before.__get__(None, cls)(*arguments, **named)

    function.apply = classmethod(apply)
    try:
        yield found
    finally:
        function.apply = before


def where(node: Any) -> str:
    """``FILE:LINE (CODE)`` of the user's line that a node comes from; empty if it is unknown."""
    lines = (node.meta.get("stack_trace") or "").strip().splitlines()
    places = [place for place, line in enumerate(lines) if line.strip().startswith("File ")]
    own = [place for place in places if _is_own(lines[place])] or places
    if not own:
        return ""
    head = lines[own[-1]].strip().split('"')
    number = head[2].split(",")[1].strip().removeprefix("line ")
    code = lines[own[-1] + 1].strip() if own[-1] + 1 < len(lines) else ""
    return f"{head[1]}:{number}" + (f" ({code[:100]})" if code else "")


def _is_own(line: str) -> bool:
    return not any(folder in line for folder in (PYTORCH, f"{Path(__file__).parent}{os.sep}"))


def _why_not(module: torch.nn.Module, error: Exception) -> str:
    """One paragraph on a module that cannot be traced."""
    name, mode = type(module).__name__, "in training mode " if module.training else ""
    of_all = traceback.extract_tb(error.__traceback__)
    frames = [one for one in of_all if _is_own(one.filename)]
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    code = f" ({frames[-1].line})" if frames and frames[-1].line else ""
    kind, text = type(error).__name__, str(error)
    said = visible(text.strip().splitlines()[0][:200] if text.strip() else kind)
    if "GuardOnDataDependent" in kind or "data-dependent" in text.lower() or ".item()" in text:
        return (
            f"{name} cannot be ported: {mode}its forward pass depends on the values in a tensor"
            f"{place}{code}. A compiled program has one path: compute both and choose with "
            f"torch.where, or decide by shapes and attributes."
        )
    if "specialized" in text or "Constraints violated" in text or "constraint" in text.lower():
        return (
            f"{name} cannot be ported: {mode}its forward pass fixes the size of the batch{place}"
            f"{code}. "
            f"Write x.size(0), or -1, where it names the size of the batch. torch.export says: "
            f"{said}"
        )
    return f"{name} cannot be traced{place}{code}: {kind}: {said}"


def _as_in_evaluation(graph: Any) -> None:
    """Takes back what batch norm and dropout as functions do when ``module.training`` is set."""
    for node in [one for one in graph.nodes if one.op == "call_function"]:
        name = str(node.target)
        if "dropout" in name:
            node.args = (*node.args[:2], False)
        elif "batch_norm" in name and node.args[3] is not None:
            node.args = (*node.args[:5], False, *node.args[6:])
        elif "add_" in name and "num_batches_tracked" in str(node.args[0]):
            graph.erase_node(node)


def _changes_a_part(program: Any, name: str) -> bool:
    """Whether code changes a tensor which is used under another name afterwards.

    Raises:
      InputError: That is an input or a buffer.
    """
    changes, dropped = False, None
    graph = program.graph
    base: dict[Any, Any] = {}
    outside = {node.name for node in graph.nodes if node.op == "placeholder"}
    inputs = set(program.graph_signature.user_inputs)
    order = {node: index for index, node in enumerate(graph.nodes)}

    def root(node: Any) -> Any:
        while node in base:
            node = base[node]
        return node

    for node in graph.nodes:
        if node.op != "call_function":
            continue
        operator = getattr(node.target, "_schema", None)
        short = str(node.target).removeprefix("aten.").partition(".")[0]
        first = node.args[0] if node.args else None
        if "dropout" in short and "torch.nn." not in str(innermost(node)):
            dropped = node
        if short in _VIEWS or "getitem" in str(node.target):
            base[node] = first
        elif operator is not None and short.endswith("_") and not short.startswith("_"):
            if short in ("detach_", "requires_grad_"):
                base[node] = first
                continue
            target = root(first)
            kin = [one for one in order if root(one) is target and one is not first]
            late = [u for one in kin for u in one.users if order[u] > order[node]]
            if first is not target:
                late += [u for u in target.users if order[u] > order[node]]
            late = [user for user in late if user is not node]
            changes = changes or bool(late)
            if target.name in outside:
                what = "its input" if target.name in inputs else "a buffer"
                raise InputError(
                    f"{name} cannot be ported: it changes {what} in place ({short}) at "
                    f"{where(node) or 'an unknown line'}, and JAX's arrays do not change. Write "
                    f"the operation out of place, for example x = x + y in place of x += y, or "
                    f"with inplace=False."
                )
            base[node] = first
    if changes and dropped is not None:  # which the trace loses where writes become functions
        raise InputError(
            f"{name} cannot be ported: it writes into a part of a tensor, and calls dropout as a "
            f"function at {where(dropped) or 'an unknown line'}. Use a module of torch.nn for one, "
            f"or write the other out of place, with torch.cat for example."
        )
    return changes


def innermost(node: Any) -> Any:
    """The class of the module whose code a node comes from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][1] if stack else ""
