"""The attributes that the code of a module uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flax_resblock.port import axes
from flax_resblock.port.graphs import calls_in_a_row
from flax_resblock.port.layers import Layer, layer_of
from flax_resblock.port.modules import (
    children_of,
    identifier,
    is_container,
    is_parameters,
)
from flax_resblock.port.parts import (
    Body,
    ContainerPart,
    LayerPart,
    ModulePart,
    ParameterPart,
    Part,
    parts_of,
)  # fmt: skip
from flax_resblock.port.placing import Values
from flax_resblock.port.tracing import Traced
from flax_resblock.port.values import Code, Constant, Value

PASSES = LayerPart(Layer("nn.identity"), "")
"""In the place of a module that holds nothing and is not called with those beside it."""


class Parts(Values):
    """The attributes of one module: layers, modules that hold others, and tensors of its own."""

    live: torch.nn.Module
    body: Body
    reader: Any
    traced: Traced
    graph: Any
    skipped: frozenset[str]
    path: str

    def inside(self, name: str) -> str:
        """The name in the network of what has this name in the module."""
        return f"{self.body.path}.{name}".strip(".")

    def _own_parts(self) -> dict[str, Part]:
        """The attributes that are layers or hold layers; what is called is added by its call."""
        parts: dict[str, Any] = {}
        for name, child in children_of(self.live):
            part = None if name in self.skipped else self._part(child, self.inside(name))
            if is_kept(part):
                parts[identifier(name)] = part
        return parts

    def _sequence(self) -> ContainerPart | None:
        """The modules of a Sequential that does nothing but call them in a row, else None."""
        forward = getattr(type(self.live), "forward", None)
        if (
            forward is not torch.nn.Sequential.forward
            or self.body.is_tuple
            or not len(self.graph.nodes)
        ):
            return None
        items: dict[str, Part] = {}
        called = []
        for name, child in children_of(self.live):
            part = self.body.parts.get(identifier(name)) or self._part(child, self.inside(name))
            items[name] = part or PASSES
            if not (isinstance(part, LayerPart) and part.layer.call == "nn.identity"):
                called.append(name)  # a trace does not show calls that do nothing
        moved = any("jnp." in line or ".reshape(" in line for line in self.body.lines)
        if calls_in_a_row(self.graph) != called or moved:
            return None
        return ContainerPart("Sequential", items)

    def _part(self, module: torch.nn.Module, inside: str) -> Part | None:
        if is_container(module):
            kind = "Dict" if isinstance(module, torch.nn.ModuleDict) else "List"
            kind = "Sequential" if isinstance(module, torch.nn.Sequential) else kind
            items = {
                name: self._part(child, f"{inside}.{name}") or PASSES
                for name, child in children_of(module)
            }
            return ContainerPart(kind, items) if items else None
        layer = self.reader.layer(module, inside)
        return None if layer is None else LayerPart(layer, f"{inside}.")

    def _holder(self, steps: Sequence[str]) -> tuple[dict[str, Part], str]:
        """What holds the parts of a module, and the module of a class that this belongs to.

        A module that is never called, of which parts are, becomes a dictionary.
        """
        holder, module, owner = self.body.parts, self.live, ""
        for place, step in enumerate(steps):
            inside = ".".join(steps[: place + 1])
            module = module.get_submodule(step)
            key = step if step in holder else identifier(step)
            part = holder.get(key)
            if isinstance(part, ModulePart):
                holder, owner = parts_of(part.body), inside
                continue
            if not isinstance(part, ContainerPart):
                held = {
                    name: self._part(child, f"{self.inside(inside)}.{name}")
                    for name, child in children_of(module)
                }
                kept = {key: one for key, one in held.items() if one is not None and is_kept(one)}
                part = ContainerPart("Dict", kept)
                holder[key] = part
            holder = part.items
        return holder, owner

    def _hold(self, target: str, child: torch.nn.Module, body: Body) -> None:
        """Keeps a module that was called among the parts."""
        *steps, last = target.split(".")
        holder, _ = self._holder(steps)
        last = last if steps and last in holder else identifier(last)
        part = body.sequence if type(child) is torch.nn.Sequential else None
        parts = holder.get(last)
        if isinstance(parts, ContainerPart) and not is_container(child):
            if body.sequence is not None:
                raise self.refusal(f"it calls {target} as a whole, and parts of it by themselves")
            body.parts = {**parts.items, **body.parts}
        holder[last] = ModulePart(body) if part is None else part

    def accessor(self, target: str) -> str:
        """``self.layers[1]`` for ``layers.1``."""
        text, module = "self", self.live
        for place, step in enumerate(target.split(".")):
            names = [name for name, _ in children_of(module)]
            if place and isinstance(module, torch.nn.ModuleDict):
                text += f"[{step!r}]"
            elif place and is_container(module):
                text += f"[{names.index(step)}]"
            else:
                text += f".{identifier(step)}"
            module = module.get_submodule(step) if step in names else module
        return text

    def _attribute(self, target: str) -> Any:
        *steps, name = target.split(".")
        try:
            owner = self.live.get_submodule(".".join(steps))
        except AttributeError:
            owner = self.live
        parameters = dict(owner.named_parameters(recurse=False))
        tensor = parameters.get(name, dict(owner.named_buffers(recurse=False)).get(name))
        if tensor is None or name in owner._non_persistent_buffers_set:
            graphs: Any = self.traced.graphs.get_submodule(self.path)
            if tensor is None and target in self.traced.constants:
                tensor = self.traced.constants[target]
            if tensor is None:
                tensor = getattr(graphs.get_submodule(".".join(steps)), name)
            return self._literal(tensor)
        shape = tuple(tensor.shape)
        layer = layer_of(owner) if steps and not is_container(owner) else None
        if layer is not None and name in layer.tensors:
            ours, codec = layer.tensors[name]
            code = Code(f"{self.accessor('.'.join(steps))}.{ours}[...]")
            return Value(code, shape, codec.axes or axes.torch_order(len(shape)), name)
        listed = self._listed(steps) if steps else None
        holder: Any
        holder, other = (listed.items, "") if listed else self._holder(steps)
        place = name if listed else identifier(name)
        part = holder.get(place)
        if not isinstance(part, ParameterPart):
            own = target.removeprefix(f"{other}." if other else "")
            part = ParameterPart(own, shape, None, name in parameters, initial(tensor))
            holder[place] = part
        order = part.order or axes.torch_order(len(shape))
        text = f"self.{identifier(name)}"
        if steps and not listed:
            text = f"{self.accessor('.'.join(steps))}.{identifier(name)}"
        elif steps:
            key = repr(name) if isinstance(owner, torch.nn.ParameterDict) else name
            text = f"{self.accessor('.'.join(steps))}[{key}]"
        value = Value(Code(f"{text}[...]"), shape, order, identifier(".".join([*steps[-1:], name])))
        self.parameters[value] = part
        return value

    def _listed(self, steps: Sequence[str]) -> ContainerPart | None:
        """The list of parameters at a place; None if there is none."""
        owner = self.live.get_submodule(".".join(steps))
        if len(steps) > 1 or not is_parameters(owner):
            return None
        kind = "Dict" if isinstance(owner, torch.nn.ParameterDict) else "List"
        listed = self.body.parts.setdefault(identifier(steps[0]), ContainerPart(kind, {}))
        if not isinstance(listed, ContainerPart):
            return None
        for name, tensor in owner.named_parameters():
            if name not in listed.items:
                told = (f"{steps[0]}.{name}", tuple(tensor.shape), None, True, initial(tensor))
                listed.items[name] = ParameterPart(*told)
        return listed

    def _literal(self, tensor: torch.Tensor) -> Any:
        if tensor.ndim == 0:
            return tensor.item()
        if tensor.dtype == torch.int64 and (text := _array_of(tensor, "")):
            code = Code(text)
            return Value(code, tuple(tensor.shape), axes.torch_order(tensor.ndim), "indices")
        if not tensor.dtype.is_floating_point:
            raise self.refusal(f"it uses a constant of {tensor.dtype}, which is not supported")
        shape, small = tuple(tensor.shape), tensor
        for axis in range(tensor.ndim):
            first = small.narrow(axis, 0, 1)
            small = first if bool((small == first).all()) else small
        text = _array_of(small, self.dtype)
        if not text:
            raise self.refusal(
                f"it uses a constant of {tensor.numel():,} numbers that is neither a parameter nor "
                f"a persistent buffer. Register it with register_buffer"
            )
        order = axes.torch_order(len(shape))
        if small.shape == tensor.shape:
            return Value(Code(text), shape, order, "constant")
        size = Constant(shape, "shape")
        return self.new(f"jnp.broadcast_to({text}, {{}})", [size], shape, order, hint="constant")

    def own(self, node: Any) -> str | None:
        """The name of a parameter or buffer of this module that nothing else has used yet."""
        if node is None:
            return None
        part = self.parameters.get(self.number(node))
        if part is None or len(node.users) != 1 or part.order is not None or "." in part.name:
            return None
        return part.name

    def synthesised(self, layer: Layer, hint: str, names: Sequence[str]) -> str:
        """Puts a layer in the place of tensors that the forward pass used by itself.

        Returns:
          The name of the layer.
        """
        for name in names:
            self.body.parts.pop(identifier(name), None)
        taken = {*self.body.parts, *(identifier(name) for name, _ in children_of(self.live))}
        name, number = hint, 1
        while name in taken:
            number += 1
            name = f"{hint}{number}"
        self.body.parts[name] = LayerPart(layer, f"{self.body.path}." if self.body.path else "")
        return name


def _array_of(tensor: torch.Tensor, dtype: str) -> str:
    """Code of a constant with at least one axis; empty if it has too many numbers to be written.

    Args:
      dtype: Code for that of the array; empty for jax's own.
    """
    numbers = tensor.flatten().tolist()
    start, step = numbers[0], numbers[-1] - numbers[-2] if len(numbers) > 1 else 0
    if step and numbers == [start + k * step for k in range(len(numbers))] and len(numbers) > 8:
        limits = [start, start + len(numbers) * step, step]
        if all(one == int(one) for one in limits):
            limits = [limits[1]] if limits[::2] == [0, 1] else limits
            text = ", ".join(str(int(one)) for one in limits)
            text = f"jnp.arange({text}{f', dtype={dtype}' if dtype else ''})"
            return text if tensor.ndim == 1 else f"{text}.reshape({tuple(tensor.shape)})"
    rest = f", {dtype}" if dtype else ""
    return f"jnp.array({tensor.tolist()!r}{rest})" if len(numbers) <= 64 else ""


def is_kept(part: Part | None) -> bool:
    """Whether a part is an attribute: it is a layer with parameters, or holds some."""
    return part is not None and not (isinstance(part, LayerPart) and not part.layer.stateful)


def initial(tensor: torch.Tensor) -> str:
    """Code of a value as the tensor has it now: a constant, or random numbers as large."""
    if not tensor.dtype.is_floating_point:
        return "jnp.zeros({}, int)"
    flat = tensor.detach().flatten().double()
    if bool((flat == flat[0]).all()):
        value = float(flat[0])
        return {0.0: "jnp.zeros({})", 1.0: "jnp.ones({})"}.get(value, f"jnp.full({{}}, {value:g})")
    return f"{float(flat.std()):.2g} * jax.random.normal(rngs.params(), {{}})"
