"""Reads the graph of one module into the body of a class."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from flax_resblock.errors import InputError
from flax_resblock.port import axes
from flax_resblock.port.axes import Order, Shape
from flax_resblock.port.layers import Layer, layer_of
from flax_resblock.port.parts import (
    Body,
    ContainerPart,
    LayerPart,
    ModulePart,
    ParameterPart,
    Part,
)  # fmt: skip
from flax_resblock.port.placing import Values
from flax_resblock.port.tracing import Traced, number_of, shape_of
from flax_resblock.port.tying import tie
from flax_resblock.port.values import Code, Constant, Value
from flax_resblock.port.writing import write

PASSES = LayerPart(Layer("nn.identity"), "")
"""In the place of a module that holds nothing and is not called with those beside it."""


class Reader:
    """Reads the modules of a traced network, each once."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.name = type(traced.live).__name__
        self.bodies: dict[str, Body] = {}
        self.inputs: dict[str, Sequence[tuple[Shape, Order]]] = {}

    def live(self, path: str) -> torch.nn.Module:
        """The user's module."""
        return self.traced.live.get_submodule(without_call(path))

    def layer(self, module: torch.nn.Module, path: str) -> Layer | None:
        """The layer that a module is; see :func:`flax_resblock.port.layers.layer_of`."""
        try:
            return layer_of(module)
        except InputError as error:
            raise InputError(f"{self.name} cannot be ported: in module {path}, {error}") from error

    def graph(self, path: str) -> Any:
        """What the module does."""
        return getattr(self.traced.graphs.get_submodule(path), "graph", None)

    def body(self, path: str, inputs: Sequence[tuple[Shape, Order]]) -> Body:
        """The body of the module at ``path``, called with tensors of these shapes and orders."""
        base = without_call(path)
        body = BodyReader(self, path, inputs).read()
        known = self.bodies.setdefault(base, body)
        self.inputs.setdefault(base, inputs)
        if (known.lines, known.constants) != (body.lines, body.constants):
            raise InputError(
                f"{self.name} cannot be ported: {base} is called more than once, and what it "
                f"does depends on the call (on the shape of its input, for example). Use a module "
                f"of its own for every call that differs."
            )
        return known


def without_call(path: str) -> str:
    """``"a.b"`` for ``"a.b@1"``, which is the second call of that module."""
    return ".".join(part.partition("@")[0] for part in path.split("."))


def is_container(module: torch.nn.Module) -> bool:
    """Whether a module only holds others: in the emitted code it has no class."""
    return isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict)) or (
        type(module) is torch.nn.Sequential
    )


def children_of(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The modules that a module holds; one that has two names is there twice."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def is_parameters(module: torch.nn.Module) -> bool:
    """Whether a module is a list or dictionary of parameters."""
    return isinstance(module, (torch.nn.ParameterList, torch.nn.ParameterDict))


def identifier(name: str) -> str:
    """A name that Python accepts."""
    name = name if name.isidentifier() else "".join(c if c.isalnum() else "_" for c in f"_{name}")
    return f"{name}_" if keyword.iskeyword(name) else name


class BodyReader(Values):
    """Reads one module.

    Args:
      reader: Of the network.
      path: Of the module.
      inputs: Shape and order of each tensor that it is called with.
      skipped: Children that are treated as if they returned their input.
    """

    def __init__(
        self,
        reader: Reader,
        path: str,
        inputs: Sequence[tuple[Shape, Order]],
        skipped: frozenset[str] = frozenset(),
    ) -> None:
        self.live = reader.live(path)
        kind = type(self.live).__name__
        super().__init__(reader.name, f"module {path} ({kind})" if path else "its forward pass")
        self.reader, self.path, self.skipped = reader, path, skipped
        self.body = Body(without_call(path), type(self.live))
        self.graph = reader.graph(path)
        self._arguments(inputs)

    def read(self) -> Body:
        """Reads every node."""
        from flax_resblock.port.operators import apply_operator

        self.body.parts = self._own_parts()
        outputs: list[Value] = []
        for node in self.graph.nodes:
            self.node = node
            if node.op == "get_attr" and not isinstance(_held(self.graph, node), GraphModule):
                self.env[node] = self._attribute(str(node.target))
            elif node.op == "call_module":
                self.env[node] = self._call(node)
            elif node.op == "call_function":
                self.env[node] = apply_operator(self, node)
            elif node.op == "output":
                outputs = self._outputs(node.args[0])
        for value, part in self.parameters.items():
            part.order = part.order or value.order
        write(self.body, self.values, outputs)
        children = [identifier(name) for name, _ in children_of(self.live)]
        self.body.parts = dict(
            sorted(
                self.body.parts.items(),
                key=lambda pair: children.index(pair[0]) if pair[0] in children else len(children),
            )
        )
        self.body.sequence = self._sequence()
        if self.path == "" and self.body.sequence is not None:
            layers = ContainerPart("List", dict(self.body.sequence.items))
            self.body.parts = {"layers": layers}
        if self.path == "":
            tie(self.live, self.body)
        return self.body

    def inside(self, name: str) -> str:
        """The name in the network of what has this name in the module."""
        return f"{self.body.path}.{name}".strip(".")

    def _outputs(self, result: Any) -> list[Value]:
        flat = list(_leaves(result))
        self.body.is_tuple = isinstance(result, (tuple, list)) and self.path != ""
        self.body.result = ", ".join("{}" for _ in flat)
        outputs = [self.settled(self.value(one)) for one in flat]
        if self.path == "":
            self.body.result = _result(self.reader.traced.out_spec)
            outputs = [self.bring(one, axes.channels_last(len(one.shape))) for one in outputs]
        self.body.outputs = [(one.shape, one.order) for one in outputs]
        return outputs

    # Arguments

    def _arguments(self, inputs: Sequence[tuple[Shape, Order]]) -> None:
        names = _argument_names(self.live)
        tensors = tensor_inputs(self.graph)
        self.body.list_input = len(tensors) > 1 and len(names) == 1
        for node in self.graph.nodes:
            if node.op == "placeholder" and node not in tensors:
                value = node.meta.get("val")
                known = value is None or isinstance(value, int | float | str)
                self.env[node] = value if known else number_of(value)
        for place in list_order(self.graph) if self.body.list_input else range(len(tensors)):
            shape, order = inputs[place]
            if self.body.list_input:
                name = f"{names[0]}[{len(self.listed)}]"
            else:
                name = names[place] if place < len(names) else f"{names[-1]}{place}"
                self.body.arguments.append(name)
            plain = not self.body.list_input
            value = Value(Code(name), shape, order, name, name=name, plain=plain)
            self.env[tensors[place]] = value
            self.listed.append(value)
            self.body.input_shapes.append(value.sizes)
        if self.body.list_input:
            self.body.arguments = [names[0]]

    # Parts

    def _own_parts(self) -> dict[str, Part]:
        """The attributes that are layers or hold layers; what is called is added by its call."""
        parts: dict[str, Any] = {}
        for name, child in children_of(self.live):
            part = None if name in self.skipped else self._part(child, self.inside(name))
            if _is_kept(part):
                parts[identifier(name)] = part
        return parts

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

    def _sequence(self) -> ContainerPart | None:
        """The modules of a Sequential that does nothing but call them in a row, else None."""
        forward = getattr(type(self.live), "forward", None)
        if (
            forward is not torch.nn.Sequential.forward
            or self.body.is_tuple
            or not len(self.graph.nodes)
        ):
            return None
        previous, found = None, []
        for node in self.graph.nodes:
            if node in tensor_inputs(self.graph) and previous is None:
                previous = node
            elif node.op == "call_module":
                if [one for one in node.args if _is_tensor(one)] != [previous]:
                    return None
                previous = node
                found.append(str(node.target))
            elif node.op != "output" and _is_tensor(node):
                return None
        names = [name for name, _ in children_of(self.live)]
        moved = any("jnp." in line or ".reshape(" in line for line in self.body.lines)
        if found != names or moved or any(line.startswith("for ") for line in self.body.lines[:0]):
            return None
        items = {}
        for name, child in children_of(self.live):
            items[name] = (
                self.body.parts.get(identifier(name))
                or self._part(child, self.inside(name))
                or PASSES
            )
        return ContainerPart("Sequential", items)

    # Calls of children

    def _call(self, node: Any) -> Any:
        target = without_call(str(node.target))
        path = f"{self.path}.{node.target}".strip(".")
        child = self.reader.live(path)
        arguments = [self.value(one) for one in node.args if isinstance(self.number(one), Value)]
        if target.partition(".")[0] in self.skipped:
            return arguments[0]
        layer = None if is_container(child) else self.reader.layer(child, self.inside(target))
        if layer is not None:
            if layer.stateful:
                self._holder(target.split(".")[:-1])
            return self.apply(layer, target, arguments[0], shape_of(node))
        arguments = [self.settled(one) for one in arguments]
        body = self.reader.body(path, [(one.shape, one.order) for one in arguments])
        self._hold(target, child, body)
        holes: list[Value] = arguments
        text = ", ".join("{}" for _ in holes)
        if body.list_input:
            holes = [arguments[place] for place in list_order(self.reader.graph(path))]
            text = f"[{text}]"
            if holes == self.listed and self.body.list_input:
                text, holes = self.body.arguments[0], []
        text = f"{self.accessor(target)}({text})"
        hint = _hint(target)
        if not body.is_tuple:
            (_, order) = body.outputs[0]
            return self.new(text, holes, shape_of(node), order, hint=hint)
        whole = self.new(text, holes, (), (), hint=hint)
        whole.items = [
            self.new(f"{{3}}[{place}]", (whole,), shape, order, hint=f"{hint}{place}")
            for place, (shape, order) in enumerate(body.outputs)
        ]
        return whole if len(whole.items) > 1 else whole.items[0]

    def apply(self, layer: Layer, target: str, x: Value, shape: Shape) -> Value:
        """What a layer makes of a value.

        Args:
          layer: Of ``flax_resblock.nn``.
          target: Where it is in this module, for a layer with parameters.
          x: Its input.
          shape: Of its output, as PyTorch has it.
        """
        rank = len(x.shape)
        x = self.settled(x)
        if layer.inputs == "channels_last":
            x = self.bring(x, axes.channels_last(rank))
        elif layer.inputs == "last_axis" and x.order[-1] != rank - 1:
            x = self.bring(x, axes.torch_order(rank))
        order = x.order if len(shape) == rank else axes.channels_last(len(shape))
        if layer.call == "nn.identity":
            return x
        if layer.stateful:
            text = f"{self.accessor(target)}({{}})"
            return self.new(text, (x,), shape, order, hint=_hint(target))
        text, holes = layer_call(layer)
        return self.new(text, (x, *holes), shape, order, hint=layer.call.rpartition(".")[2])

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
                sequence, owner = part.body.sequence, inside
                holder = part.body.parts if sequence is None else sequence.items
                continue
            if not isinstance(part, ContainerPart):
                held = {
                    name: self._part(child, f"{self.inside(inside)}.{name}")
                    for name, child in children_of(module)
                }
                kept = {key: one for key, one in held.items() if one is not None and _is_kept(one)}
                part = ContainerPart("Dict", kept)
                holder[key] = part
            holder = part.items
        return holder, owner

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

    # Parameters

    def _attribute(self, target: str) -> Any:
        *steps, name = target.split(".")
        try:
            owner = self.live.get_submodule(".".join(steps))
        except AttributeError:
            owner = self.live
        parameters = dict(owner.named_parameters(recurse=False))
        tensor = parameters.get(name, dict(owner.named_buffers(recurse=False)).get(name))
        if tensor is None or name in owner._non_persistent_buffers_set:
            graphs: Any = self.reader.traced.graphs.get_submodule(self.path)
            if tensor is None and target in self.reader.traced.constants:
                tensor = self.reader.traced.constants[target]
            if tensor is None:
                tensor = graphs.get_submodule(".".join(steps)).__getattr__(name)
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
            part = ParameterPart(own, shape, None, name in parameters, _initial(tensor))
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
                initial = _initial(tensor)
                told = (f"{steps[0]}.{name}", tuple(tensor.shape), None, True, initial)
                listed.items[name] = ParameterPart(*told)
        return listed

    def _literal(self, tensor: torch.Tensor) -> Any:
        if tensor.ndim == 0:
            return tensor.item()
        if tensor.dtype == torch.int64 and tensor.numel() <= 64:
            code = Code(f"jnp.array({tensor.tolist()!r})")
            return Value(code, tuple(tensor.shape), axes.torch_order(tensor.ndim), "indices")
        if not tensor.dtype.is_floating_point:
            raise self.refusal(f"it uses a constant of {tensor.dtype}, which is not supported")
        shape, small = tuple(tensor.shape), tensor
        for axis in range(tensor.ndim):
            first = small.narrow(axis, 0, 1)
            small = first if bool((small == first).all()) else small
        if small.numel() > 64:
            raise self.refusal(
                f"it uses a constant of {tensor.numel():,} numbers that is neither a parameter nor "
                f"a persistent buffer. Register it with register_buffer"
            )
        text = f"jnp.array({small.tolist()!r}, {self.dtype})"
        text = text if small.shape == tensor.shape else f"jnp.broadcast_to({text}, {shape})"
        return Value(Code(text), shape, axes.torch_order(len(shape)), "constant")

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


def _held(graph: Any, node: Any) -> Any:
    """What an attribute of a graph is: a tensor, or a graph that an operator calls."""
    owner = graph.owning_module
    for step in str(node.target).split("."):
        owner = getattr(owner, step, None)
    return owner


def _is_kept(part: Part | None) -> bool:
    """Whether a part is an attribute: it is a layer with parameters, or holds some."""
    return part is not None and not (isinstance(part, LayerPart) and not part.layer.stateful)


def _initial(tensor: torch.Tensor) -> str:
    """Code of a value as the tensor has it now: a constant, or random numbers as large."""
    if not tensor.dtype.is_floating_point:
        return "jnp.zeros({}, int)"
    flat = tensor.detach().flatten().double()
    if bool((flat == flat[0]).all()):
        value = float(flat[0])
        return {0.0: "jnp.zeros({})", 1.0: "jnp.ones({})"}.get(value, f"jnp.full({{}}, {value:g})")
    return f"{float(flat.std()):.2g} * jax.random.normal(rngs.params(), {{}})"


def _leaves(result: Any) -> Any:
    if isinstance(result, (tuple, list)):
        for one in result:
            yield from _leaves(one)
    elif isinstance(result, dict):
        for one in result.values():
            yield from _leaves(one)
    else:
        yield result


def _result(spec: Any) -> str:
    """What the network returns, with a hole for every tensor."""
    if spec.is_leaf():
        return "{}"
    inner = [_result(child) for child in spec.children()]
    if spec.type in (tuple, list):
        ends = "[]" if spec.type is list else "()"
        return ends[0] + ", ".join(inner) + ("," if len(inner) == 1 else "") + ends[1]
    names = [str(key) for key in spec.context] if isinstance(spec.context, (list, tuple)) else []
    if len(names) != len(inner):
        names = list(getattr(spec.context, "_fields", ())) or [str(i) for i in range(len(inner))]
    pairs = (f'"{name}": {value}' for name, value in zip(names, inner, strict=True))
    return "{{" + ", ".join(pairs) + "}}"


def _is_tensor(node: Any) -> bool:
    return isinstance(node, torch.fx.Node) and hasattr(node.meta.get("val"), "shape")


def tensor_inputs(graph: Any) -> list[Any]:
    """The inputs of a graph that are tensors."""
    return [node for node in graph.nodes if node.op == "placeholder" and _is_tensor(node)]


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


def _argument_names(module: torch.nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [identifier(one.name) for one in parameters if one.kind in kinds]
    return ["x"] if names in ([], ["input"]) else names


def _hint(target: str) -> str:
    """The name of a variable for what a module returns."""
    *rest, last = target.split(".")
    return identifier("_".join([*rest[-1:], last]) if last.isdigit() else last)
