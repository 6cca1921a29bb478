"""Reads the graph of one module into the body of a class."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from flax_resblock.errors import InputError
from flax_resblock.port import axes
from flax_resblock.port.attributes import Parts
from flax_resblock.port.axes import Order, Shape
from flax_resblock.port.graphs import (
    argument_names,
    called_at,
    held,
    hint_of,
    layer_call,
    leaves,
    list_order,
    result_of,
    tensor_inputs,
)
from flax_resblock.port.layers import Layer, layer_of
from flax_resblock.port.modes import differing, has_graph, shared_nodes
from flax_resblock.port.modules import children_of, identifier, is_container, without_call
from flax_resblock.port.operator_names import RESHAPES, name_of
from flax_resblock.port.parts import Body, ContainerPart
from flax_resblock.port.sizes import number_of, shape_of
from flax_resblock.port.tracing import Traced
from flax_resblock.port.tying import tie
from flax_resblock.port.values import Code, Constant, Value
from flax_resblock.port.writing import write


class Reader:
    """Reads the modules of a traced network, each once.

    Args:
      traced: In evaluation mode.
      training: In training mode, if it returns more there.
    """

    def __init__(self, traced: Traced, training: Traced | None = None) -> None:
        self.traced, self.training = traced, training
        self.name = type(traced.live).__name__
        self.differing = {*differing(traced, training)} if training is not None else set()
        self.bodies: dict[str, Body] = {}
        self.inputs: dict[str, Sequence[tuple[Shape, Order]]] = {}
        self.orders: dict[str, list[Order]] = {}
        self.constants: list[tuple[Any, Any]] = []

    def live(self, path: str) -> torch.nn.Module:
        """The user's module."""
        return self.traced.live.get_submodule(without_call(path))

    def layer(self, module: torch.nn.Module, path: str) -> Layer | None:
        """The layer that a module is; see :func:`flax_resblock.port.layers.layer_of`."""
        try:
            return self.traced.folded.applied(layer_of(module), path)
        except InputError as error:
            at = called_at(self.traced.graphs, path)
            raise InputError(
                f"{self.name} cannot be ported: in module {path}{at}, {error}"
            ) from error

    def numbers(self, steady: Collection[str]) -> set[Any]:
        """The numbers in the code of what was read, and those that its operators are given but for
        the sizes of reshapes; without those of operators whose numbers are ``steady``."""
        of_operators = [
            (node.args, node.kwargs)
            for part in self.traced.graphs.modules()
            for node in getattr(getattr(part, "graph", None), "nodes", ())
            if node.op == "call_function" and name_of(node) not in {*RESHAPES, *steady}
        ]
        values = [value for node, value in self.constants if name_of(node) not in steady]
        return {one for one in leaves([of_operators, values]) if isinstance(one, int | float)}

    def trace_of(self, path: str) -> Traced:
        """The trace that has a graph of the module."""
        if self.training is None or has_graph(self.traced, path):
            return self.traced
        return self.training

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


class BodyReader(Parts):
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
        place = f"module {path} ({kind})" if path else "its forward pass"
        super().__init__(reader.name, place)
        self.reader, self.path, self.skipped = reader, path, skipped
        self.body = Body(without_call(path), type(self.live))
        self.traced = reader.trace_of(path)
        self.graph: Any = getattr(self.traced.graphs.get_submodule(path), "graph", None)
        self._arguments(inputs)

    def read(self) -> Body:
        """Reads every node."""
        self.body.parts = self._own_parts()
        outputs, in_training = self._nodes(), []
        if self.reader.training is not None and self.path in self.reader.differing:
            in_training = self._training_nodes(self.reader.training)
        for value, part in self.parameters.items():
            part.order = part.order or value.order
        write(self.body, self.values, outputs, in_training)
        names = [name for name, _ in children_of(self.live)]
        names += [*self.live._parameters, *self.live._buffers]
        place = {identifier(name): index for index, name in enumerate(names)}
        self.body.parts = dict(
            sorted(self.body.parts.items(), key=lambda pair: place.get(pair[0], len(names)))
        )
        self.body.sequence = self._sequence()
        if self.path == "" and self.body.sequence is not None:
            layers = ContainerPart("List", dict(self.body.sequence.items))
            self.body.parts = {"layers": layers}
        if self.path == "":
            tie(self.live, self.body)
        return self.body

    def _training_nodes(self, training: Traced) -> list[Value]:
        """Reads what is done in training mode alone, and returns the outputs there."""
        body, result, outputs = self.body, self.body.result, self.body.outputs
        evaluated = [shape for shape, _ in outputs], body.is_tuple
        shared = shared_nodes(self.traced, training, self.path)
        self.env |= {node: self.env[one] for node, one in shared.items() if one in self.env}
        self.traced, self.graph = training, training.graphs.get_submodule(self.path).graph
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        found = self._nodes() if all(node in self.env for node in inputs) else []
        returned = [one.shape for one in found], body.is_tuple
        if not found or (self.path and returned != evaluated):
            raise self.refusal(
                "it takes or returns something else in training mode, as only the network itself "
                "may do"
            )
        if self.path:
            pairs = zip(found, outputs, strict=True)
            found = [self.bring(one, order) for one, (_, order) in pairs]
        body.training_outputs = outputs if self.path else body.outputs
        body.training_result, body.result, body.outputs = body.result, result, outputs
        return found

    def _nodes(self) -> list[Value]:
        """Reads the nodes of the graph that are not known yet, and returns the outputs."""
        from flax_resblock.port.operators import apply_operator

        for node in [one for one in self.graph.nodes if one not in self.env]:
            self.node = node
            if node.op == "get_attr" and not isinstance(held(self.graph, node), GraphModule):
                self.env[node] = self._attribute(str(node.target))
            elif node.op == "call_module":
                self.env[node] = self._call(node)
            elif node.op == "call_function":
                self.env[node] = apply_operator(self, node)
            elif node.op == "output":
                return self._outputs(node.args[0])
        return []

    def _outputs(self, result: Any) -> list[Value]:
        flat = list(leaves(result))
        self.body.is_tuple = isinstance(result, (tuple, list)) and self.path != ""
        texts = ["None" if one is None else "{}" for one in flat]
        flat = [one for one in flat if one is not None]
        self.body.result = ", ".join("{}" for _ in flat)
        if not flat:
            raise self.refusal("it returns no tensor")
        if not all(isinstance(self.number(one), Value) for one in flat):
            raise self.refusal("it returns a number beside its tensors; return tensors alone")
        outputs = [self.settled(self.value(one)) for one in flat]
        if self.path == "":
            self.body.result = result_of(self.traced.out_spec, iter(texts))
            outputs = [self.bring(one, axes.channels_last(len(one.shape))) for one in outputs]
        self.body.outputs = [(one.shape, one.order) for one in outputs]
        return outputs

    # Arguments

    def _arguments(self, inputs: Sequence[tuple[Shape, Order]]) -> None:
        names = argument_names(self.live)
        tensors = tensor_inputs(self.graph)
        self.body.list_input = len(tensors) > 1 and len(names) == 1
        for node in self.graph.nodes:
            if node.op == "placeholder" and node not in tensors:
                self.env[node] = number_of(node.meta.get("val"))
        for place in list_order(self.graph) if self.body.list_input else range(len(tensors)):
            shape, order = shape_of(tensors[place]), inputs[place][1]
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
        self.reader.orders.setdefault(body.path, []).extend(order for _, order in body.outputs)
        self._hold(target, child, body)
        holes: list[Value] = arguments
        text = ", ".join("{}" for _ in holes)
        if body.list_input:
            graph = self.reader.trace_of(path).graphs.get_submodule(path).graph
            holes = [arguments[place] for place in list_order(graph)]
            text = f"[{text}]"
            if holes == self.listed and self.body.list_input:
                text, holes = self.body.arguments[0], []
        text = f"{self.accessor(target)}({text})"
        hint = hint_of(target)
        if not body.is_tuple:
            return self.new(text, holes, shape_of(node), body.outputs[0][1], hint=hint)
        whole = self.new(text, holes, (), (), hint=hint)
        whole.items = [
            self.new(f"{{3}}[{place}]", (whole,), shape, order, hint=f"{hint}{place}")
            for place, (shape, order) in enumerate(body.outputs)
        ]
        return whole if len(whole.items) > 1 else whole.items[0]

    def new(self, text: str, holes: Sequence[Any], *rest: Any, **more: Any) -> Value:
        made = super().new(text, holes, *rest, **more)
        found = [one.value for one in made.code.holes if isinstance(one, Constant)]
        self.reader.constants += [(self.node, one) for one in found]
        return made

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
            self.reader.orders.setdefault(self.inside(target), []).append(order)
            text = f"{self.accessor(target)}({{}})"
            return self.new(text, (x,), shape, order, hint=hint_of(target))
        text, holes = layer_call(layer)  # whose numbers do not follow from sizes
        return super().new(text, (x, *holes), shape, order, hint=layer.call.rpartition(".")[2])
