"""The code that an ATen operator becomes.

Source: https://docs.pytorch.org/docs/stable/torch.compiler_ir.html
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from flax_resblock.convert.codecs import AS_IS, OIHW_HWIO, OIW_WIO, TRANSPOSED
from flax_resblock.port import axes
from flax_resblock.port.axes import Shape
from flax_resblock.port.layers import Layer
from flax_resblock.port.placing import Values
from flax_resblock.port.tracing import shape_of, size_of
from flax_resblock.port.values import ATOM, PRODUCT, SUM, Constant, Value

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
"""By the name of the operator without its overload: ``"max_pool2d"``."""

END = 1 << 62
"""Larger than any size: slices without an end have it."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule, called with the reader, the node and the operator's arguments."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def apply_operator(reader: Any, node: Any) -> Any:
    """What a node computes, as code.

    Args:
      reader: :class:`flax_resblock.port.body.BodyReader`.
      node: With ``op == "call_function"``.
    Raises:
      InputError: There is no rule for the operator.
    """
    if node.target is operator.getitem:
        return _item(reader, *node.args)
    if isinstance(node.meta.get("val"), int | float | bool) or hasattr(
        node.meta.get("val"), "node"
    ):
        return size_of(node.meta["val"])  # arithmetic with sizes
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    if name.endswith("_") and not name.startswith("_"):
        name = name[:-1]
    if name not in RULES:
        raise reader.refusal(
            f"the operator {node.target} is not supported. Write it with operators that the "
            f"documentation lists (docs/port.md), or send us the line"
        )
    return RULES[name](reader, node, *node.args, **node.kwargs)


def _item(b: Any, sequence: Any, index: int) -> Any:
    found = b.number(sequence)
    return found.items[index] if isinstance(found, Value) else found[index]


# Elementwise


def _unary(text: str, binding: int = ATOM) -> Rule:
    def apply(b: Values, node: Any, x: Any, *_: Any, **__: Any) -> Value:
        value = b.value(x)
        made = b.new(text, (value,), value.shape, value.order, binding=binding, hint=_word(text))
        made.expanded = value.expanded
        return made

    return apply


def _word(text: str) -> str:
    return text.partition("(")[0].rpartition(".")[2] or "x"


for _name, _text in {
    "relu": "nn.relu({})",
    "relu6": "nn.relu6({})",
    "silu": "nn.silu({})",
    "sigmoid": "nn.sigmoid({})",
    "log_sigmoid": "nn.log_sigmoid({})",
    "tanh": "nn.tanh({})",
    "hardswish": "nn.hardswish({})",
    "hardsigmoid": "nn.hardsigmoid({})",
    "mish": "nn.mish({})",
    "selu": "nn.selu({})",
    "softsign": "nn.softsign({})",
    "exp": "jnp.exp({})",
    "log": "jnp.log({})",
    "sqrt": "jnp.sqrt({})",
    "rsqrt": "jax.lax.rsqrt({})",
    "abs": "jnp.abs({})",
    "erf": "jax.lax.erf({})",
    "sin": "jnp.sin({})",
    "cos": "jnp.cos({})",
    "floor": "jnp.floor({})",
    "ceil": "jnp.ceil({})",
    "square": "jnp.square({})",
    "reciprocal": "1 / {3}",
    "neg": "-{3}",
}.items():
    RULES[_name] = _unary(_text, PRODUCT if _text[0] in "1-" else ATOM)


def _with_numbers(call: str, defaults: dict[str, Any]) -> Rule:
    """A function of one tensor and numbers; those with their default are left out."""

    def apply(b: Values, node: Any, x: Any, *numbers: Any, **named: Any) -> Value:
        given = {**dict(zip(defaults, numbers, strict=False)), **named}
        shown = {k: v for k, v in given.items() if k in defaults and v != defaults[k]}
        value = b.value(x)
        text = "".join(f", {name}={{}}" for name in shown)
        holes = [Constant(number, name) for name, number in shown.items()]
        return b.new(f"nn.{call}({{}}{text})", (value, *holes), value.shape, value.order, hint=call)

    return apply


RULES["leaky_relu"] = _with_numbers("leaky_relu", {"slope": 0.01})
RULES["hardtanh"] = _with_numbers("hardtanh", {"min_value": -1.0, "max_value": 1.0})
RULES["softplus"] = _with_numbers("softplus", {"beta": 1, "threshold": 20})
RULES["celu"] = _with_numbers("celu", {"alpha": 1.0})
RULES["hardshrink"] = _with_numbers("hardshrink", {"lambd": 0.5})
RULES["softshrink"] = _with_numbers("softshrink", {"lambd": 0.5})


@rule("elu")
def _elu(b: Values, node: Any, x: Any, alpha: Any = 1, scale: Any = 1, inner: Any = 1) -> Value:
    if scale != 1 or inner != 1:
        raise b.refusal("elu with a scale of its own is not supported")
    return _with_numbers("elu", {"alpha": 1.0})(b, node, x, alpha)


@rule("gelu")
def _gelu(b: Values, node: Any, x: Any, approximate: str = "none") -> Value:
    value = b.value(x)
    text = "nn.gelu({}, approximate=True)" if approximate == "tanh" else "nn.gelu({})"
    return b.new(text, (value,), value.shape, value.order, hint="gelu")


@rule("prelu")
def _prelu(b: Any, node: Any, x: Any, weight: Any) -> Value:
    value, name = b.value(x), b.own(weight)
    slope = b.value(weight)
    if name is not None:
        layer = Layer(
            "nn.PReLU", (slope.shape[0],), {}, {name: ("weight", AS_IS)}, True,
            inputs="elementwise" if slope.shape == (1,) else "channels_last",
        )  # fmt: skip
        return b.apply(layer, b.synthesised(layer, "prelu", [name]), value, value.shape)
    value = b.bring(value, axes.channels_last(len(value.shape)))
    return b.new("nn.prelu({}, {})", (value, slope), value.shape, value.order, hint="prelu")


@rule("clamp", "clamp_min", "clamp_max", "hardclamp")
def _clamp(b: Values, node: Any, x: Any, low: Any = None, high: Any = None, **named: Any) -> Value:
    low, high = named.get("min", low), named.get("max", high)
    if "clamp_max" in str(node.target):
        low, high = None, low if high is None else high
    value = b.value(x)
    holes: list[Any] = [value, *(Constant(one, "limit") for one in (low, high) if one is not None)]
    text = "nn.clamp({}" + (", min={}" if low is not None else "")
    text += (", max={}" if high is not None else "") + ")"
    return b.new(text, holes, value.shape, value.order, hint="clamp")


_SIGNS = {"add": "+", "sub": "-", "rsub": "-", "mul": "*", "div": "/", "true_divide": "/"}


@rule(*_SIGNS)
def _arithmetic(
    b: Values, node: Any, left: Any, right: Any, *, alpha: Any = 1, rounding_mode: Any = None
) -> Any:
    if rounding_mode is not None:
        raise b.refusal(f"division with rounding_mode={rounding_mode!r} is not supported")
    name = str(node.target).removeprefix("aten.").partition(".")[0].rstrip("_")
    left, right = b.number(left), b.number(right)
    if name == "rsub":
        left, right = right, left
    sign = _SIGNS[name]
    hint = {"+": "total", "-": "difference", "*": "product", "/": "quotient"}[sign]
    if alpha != 1:
        right = _binary(b, node, "*", right, alpha, "product")
    return _binary(b, node, sign, left, right, hint)


def _binary(b: Values, node: Any, sign: str, left: Any, right: Any, hint: str) -> Any:
    numbers = [one for one in (left, right) if not isinstance(one, Value)]
    if len(numbers) == 2:
        return {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}[
            sign
        ](*numbers)
    least = SUM if sign in "+-" else PRODUCT
    after = least + 1 if sign in "-/" or isinstance(right, Value) else least
    operands, shape, order = _together(b, (left, right))
    text = f"{{{least}}} {sign} {{{after}}}"
    made = b.new(text, operands, shape, order, binding=least, hint=hint)
    return made


def _together(b: Values, operands: Sequence[Any]) -> tuple[list[Any], Shape, axes.Order]:
    """Operands that jax broadcasts as PyTorch does, with the result's shape and order."""
    tensors = [one for one in operands if isinstance(one, Value)]

    def size(value: Value) -> tuple[int, int]:
        return len(value.shape), math.prod(value.shape)

    undecided = {one for one, part in b.parameters.items() if part.order is None}
    leader = max(tensors, key=lambda one: (one not in undecided, *size(one)))
    rank = max(len(one.shape) for one in tensors)
    order = leader.order if len(leader.shape) == rank else axes.channels_last(rank)
    shape = [1] * rank
    for one in tensors:
        for place, length in enumerate(reversed(one.shape), 1):
            shape[-place] = length if length != 1 else shape[-place]
    expanded = [one.expanded for one in tensors if one.expanded is not None]
    fitted = [
        b.for_broadcast(one, order) if isinstance(one, Value) else Constant(one, "factor")
        for one in operands
    ]
    full = _broadcast([tuple(shape), *expanded]) if expanded else tuple(shape)
    result_order = order if len(full) == rank else axes.channels_last(len(full))
    if full != tuple(shape):
        # only broadcasting to be made up for later makes the result larger
        fitted = [
            b.for_broadcast(b.settled(one), order) if isinstance(one, Value) else fit
            for one, fit in zip(operands, fitted, strict=True)
        ]
    return fitted, full, result_order


def _broadcast(shapes: Sequence[Shape]) -> Shape:
    rank = max(map(len, shapes))
    result = [1] * rank
    for shape in shapes:
        for place, length in enumerate(reversed(shape), 1):
            result[-place] = length if length != 1 else result[-place]
    return tuple(result)


@rule("addcmul")
def _addcmul(b: Values, node: Any, x: Any, left: Any, right: Any, *, value: Any = 1) -> Value:
    product = _binary(b, node, "*", b.value(left), b.value(right), "product")
    if value != 1:
        product = _binary(b, node, "*", product, value, "product")
    return _binary(b, node, "+", b.value(x), product, "total")


@rule("pow")
def _pow(b: Values, node: Any, x: Any, exponent: Any) -> Value:
    value, power = b.number(x), b.number(exponent)
    if not isinstance(value, Value) or isinstance(power, Value):
        raise b.refusal("a power with a tensor as exponent is not supported")
    return b.new(
        "{3} ** {}", (value, Constant(power, "power")), value.shape, value.order,
        binding=PRODUCT, hint="power",
    )  # fmt: skip


def _of_two(call: str) -> Rule:
    def apply(b: Values, node: Any, left: Any, right: Any) -> Value:
        operands, shape, order = _together(b, (b.number(left), b.number(right)))
        return b.new(f"{call}({{}}, {{}})", operands, shape, order, hint=_word(call + "("))

    return apply


RULES["maximum"], RULES["minimum"] = _of_two("nn.maximum"), _of_two("nn.minimum")


@rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def _dropout(b: Any, node: Any, x: Any, rate: float, train: bool) -> Value:
    name = str(node.target).removeprefix("aten.").partition(".")[0].rstrip("_")
    value = b.value(x)
    if train:
        raise b.refusal(
            f"{name} is on in evaluation mode too, so that the output is random. Pass "
            f"training=self.training"
        )
    if rate == 0:
        return value
    if name not in ("dropout", "feature_dropout"):
        raise b.refusal(f"{name} as a function is not supported; use the module of torch.nn")
    options = {} if name == "dropout" else {"broadcast_dims": tuple(range(1, len(value.shape) - 1))}
    layer = Layer("nn.Dropout", (rate,), options, {}, True, True, "elementwise" if name == "dropout" else "channels_last")  # fmt: skip
    return b.apply(layer, b.synthesised(layer, "dropout", []), value, value.shape)


# Axes


@rule("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten")
@rule("squeeze", "unsqueeze", "squeeze_dim")
def _reshape(b: Values, node: Any, x: Any, *_: Any, **__: Any) -> Value:
    return b.reshaped(b.value(x), shape_of(node))


@rule("contiguous", "clone", "detach", "alias", "lift_fresh_copy", "to", "_to_copy", "type_as")
@rule("float", "requires_grad")
def _same(b: Values, node: Any, x: Any, *_: Any, **__: Any) -> Any:
    found = b.number(x)
    if "detach" in str(node.target) and isinstance(found, Value):
        return b.new(
            "jax.lax.stop_gradient({})", (found,), found.shape, found.order, hint=found.hint
        )
    source = getattr(x, "meta", {}).get("val")
    if isinstance(found, Value) and source is not None and source.dtype != node.meta["val"].dtype:
        raise b.refusal(f"it casts to {node.meta['val'].dtype}, which fixes a precision")
    return found


@rule("_assert_tensor_metadata")
def _nothing(b: Values, node: Any, *_: Any, **__: Any) -> None:
    return None


@rule("permute")
def _permute(b: Values, node: Any, x: Any, dims: Sequence[int]) -> Value:
    value = b.value(x)
    return b.transposed(value, [dim % len(value.shape) for dim in dims])


@rule("transpose", "t", "swapaxes")
def _transpose(b: Values, node: Any, x: Any, first: int = 0, second: int = 1) -> Value:
    value = b.value(x)
    dims = list(range(len(value.shape)))
    first, second = first % len(dims), second % len(dims)
    dims[first], dims[second] = dims[second], dims[first]
    return b.transposed(value, dims)


@rule("expand", "expand_as", "broadcast_to")
def _expand(b: Values, node: Any, x: Any, *_: Any, **__: Any) -> Value:
    value, shape = b.value(x), shape_of(node)
    if shape == value.shape:
        return value
    made = b.relabelled_plain(value)
    made.expanded = shape
    return made


def _axis(b: Values, value: Value, dim: Any) -> int:
    """Our axis for PyTorch's, counted from the end where it is the last."""
    place = value.order.index(int(b.number(dim)) % len(value.shape))
    return -1 if place == len(value.shape) - 1 else place


@rule("cat", "concat", "concatenate")
def _cat(b: Any, node: Any, tensors: Sequence[Any], dim: int = 0) -> Value:
    values = [b.settled(b.value(one)) for one in tensors]
    if len(values) == 1:
        return values[0]
    order = values[0].order
    values = [b.bring(one, order) for one in values]
    axis = _axis(b, values[0], dim)
    if values == b.listed and b.body.list_input:
        text, holes = f"jnp.concatenate({b.body.arguments[0]}, axis={axis})", ()
    else:
        text = f"jnp.concatenate([{', '.join('{}' for _ in values)}], axis={axis})"
        holes = tuple(values)
    return b.new(text, holes, shape_of(node), order, hint="joined")


@rule("stack")
def _stack(b: Values, node: Any, tensors: Sequence[Any], dim: int = 0) -> Value:
    values = [b.settled(b.value(one)) for one in tensors]
    order = values[0].order
    values = [b.bring(one, order) for one in values]
    place, after = axes.place_of_new(order, dim % (len(order) + 1))
    text = f"jnp.stack([{', '.join('{}' for _ in values)}], axis={place})"
    return b.new(text, values, shape_of(node), after, hint="stacked")


def _pieces(b: Values, node: Any, value: Value, dim: Any, text: str, holes: Sequence[Any]) -> Value:
    """Several tensors that one is split into."""
    whole = b.new(text, (value, *holes), (), (), hint="parts")
    shapes = [tuple(size_of(size) for size in one.shape) for one in node.meta["val"]]
    whole.items = [
        b.new(f"{{3}}[{place}]", (whole,), shape, value.order, hint=f"part{place}")
        for place, shape in enumerate(shapes)
    ]
    return whole


@rule("chunk", "split", "split_with_sizes")
def _split(b: Values, node: Any, x: Any, size: Any, dim: int = 0) -> Value:
    value = b.settled(b.value(x))
    lengths = [size_of(one.shape[dim]) for one in node.meta["val"]]
    axis = _axis(b, value, dim)
    if len(set(lengths)) == 1:
        return _pieces(b, node, value, dim, f"jnp.split({{}}, {len(lengths)}, axis={axis})", ())
    ends = tuple(sum(lengths[: place + 1]) for place in range(len(lengths) - 1))
    holes = (Constant(list(ends), "ends"),)
    return _pieces(b, node, value, dim, f"jnp.split({{}}, {{}}, axis={axis})", holes)


@rule("unbind")
def _unbind(b: Values, node: Any, x: Any, dim: int = 0) -> Value:
    value = b.settled(b.value(x))
    whole = b.new("{}", (value,), (), (), hint="parts")
    whole.items = [
        _selected(b, value, dim % len(value.shape), i) for i in range(len(node.meta["val"]))
    ]
    return whole


@rule("select")
def _select(b: Values, node: Any, x: Any, dim: int, index: int) -> Value:
    value = b.settled(b.value(x))
    return _selected(b, value, dim % len(value.shape), b.number(index))


def _selected(b: Values, value: Value, dim: int, index: Any) -> Value:
    text = _indexed(value.order.index(dim), len(value.shape), "{}")
    shape = value.shape[:dim] + value.shape[dim + 1 :]
    order = axes.without(value.order, [dim])
    return b.new(f"{{3}}[{text}]", (value, Constant(index, "index")), shape, order, hint=value.hint)


def _indexed(place: int, rank: int, index: str) -> str:
    behind = rank - 1 - place
    if behind < place:
        return ", ".join(["...", index, *[":"] * behind])
    return ", ".join([*[":"] * place, index])


@rule("slice")
def _slice(
    b: Values, node: Any, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Value:
    value = b.settled(b.value(x))
    start, end = b.number(start), b.number(end)
    length = value.shape[dim % len(value.shape)]
    start = start or 0
    whole_end = end is None or end >= min(length, END)
    if start == 0 and whole_end and step == 1:
        return value
    first = "{}" if start else ""
    holes: list[Any] = [Constant(start, "start")] if start else []
    text = first + ":" + ("" if whole_end else "{}") + (f":{step}" if step != 1 else "")
    holes += [] if whole_end else [Constant(end, "end")]
    index = _indexed(value.order.index(dim % len(value.shape)), len(value.shape), text)
    return b.new(f"{{3}}[{index}]", (value, *holes), shape_of(node), value.order, hint=value.hint)


@rule("flip", "roll")
def _flip(b: Values, node: Any, x: Any, *numbers: Any) -> Value:
    value = b.settled(b.value(x))
    name = "flip" if "flip" in str(node.target) else "roll"
    dims = tuple(_axis(b, value, dim) for dim in numbers[-1])
    text = f"jnp.{name}({{}}, {'' if name == 'flip' else '{}, '}axis={dims!r})"
    holes = () if name == "flip" else (Constant(tuple(numbers[0]), "shifts"),)
    return b.new(text, (value, *holes), value.shape, value.order, hint=name)


# Reductions


@rule("mean", "sum", "amax", "amin", "var", "std", "prod")
def _reduce(b: Values, node: Any, x: Any, dims: Any = None, *rest: Any, **named: Any) -> Value:
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    value = b.settled(b.value(x))
    rank = len(value.shape)
    keepdim = named.get("keepdim", False)
    correction = named.get("correction", 1)
    if name in ("mean", "sum", "amax", "amin", "prod"):
        keepdim = rest[0] if rest else keepdim
    elif isinstance(dims, bool):
        raise b.refusal(f"{name} in this form is not supported; name its axes")
    elif rest:
        correction, keepdim = int(bool(rest[0])), (rest[1] if len(rest) > 1 else keepdim)
    dims = [dims] if isinstance(dims, int) else dims
    dims = [dim % rank for dim in dims] if dims else list(range(rank))
    places = tuple(sorted(value.order.index(dim) for dim in dims))
    axis: Any = places if len(places) > 1 else places[0]
    axis = -1 if axis == rank - 1 else axis
    call = {"amax": "jnp.max", "amin": "jnp.min"}.get(name, f"jnp.{name}")
    text = f"{call}({{}}, axis={axis}" if len(dims) < rank else f"{call}({{}}"
    text += f", ddof={correction}" if name in ("var", "std") and correction else ""
    text += ", keepdims=True)" if keepdim else ")"
    order = value.order if keepdim else axes.without(value.order, dims)
    return b.new(text, (value,), shape_of(node), order, hint=name)


@rule("max", "min")
def _extreme(b: Values, node: Any, x: Any, *rest: Any, **named: Any) -> Any:
    name = "amax" if ".max" in str(node.target) else "amin"
    if rest and isinstance(b.number(rest[0]), Value):
        return RULES["maximum" if name == "amax" else "minimum"](b, node, x, rest[0])
    if not rest:
        value = b.settled(b.value(x))
        return b.new(f"jnp.{name[1:]}({{}})", (value,), (), (), hint=name)
    raise b.refusal(
        f"torch.{name[1:]} with an axis gives indices too; write torch.{name}(x, dim, keepdim)"
    )


@rule("linalg_vector_norm", "norm")
def _norm(
    b: Values, node: Any, x: Any, power: Any = 2, dims: Any = None, keep: bool = False
) -> Value:
    value = b.settled(b.value(x))
    if power not in (1, 2):
        raise b.refusal(f"a norm of order {power} is not supported")
    dims = [dims] if isinstance(dims, int) else dims
    dims = [dim % len(value.shape) for dim in dims] if dims else list(range(len(value.shape)))
    places = tuple(sorted(value.order.index(dim) for dim in dims))
    order = value.order if keep else axes.without(value.order, dims)
    text = f"nn.vector_norm({{}}, axis={places}, order={power}" + (
        ", keepdims=True)" if keep else ")"
    )
    return b.new(text, (value,), shape_of(node), order, hint="norm")


@rule("softmax", "log_softmax", "cumsum")
def _along(b: Values, node: Any, x: Any, dim: int, *_: Any, **__: Any) -> Value:
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    value = b.settled(b.value(x))
    call = "jnp.cumsum" if name == "cumsum" else f"nn.{name}"
    text = f"{call}({{}}, axis={_axis(b, value, dim)})"
    return b.new(text, (value,), value.shape, value.order, hint=name)


@rule("glu")
def _glu(b: Values, node: Any, x: Any, dim: int = -1) -> Value:
    value = b.settled(b.value(x))
    text = f"nn.glu({{}}, axis={_axis(b, value, dim)})"
    return b.new(text, (value,), shape_of(node), value.order, hint="glu")


@rule("matmul", "bmm", "mm")
def _matmul(b: Values, node: Any, left: Any, right: Any) -> Value:
    operands = [b.value(one) for one in (left, right)]
    operands = [b.bring(one, axes.torch_order(len(one.shape))) for one in operands]
    shape = shape_of(node)
    return b.new(
        "{2} @ {3}", operands, shape, axes.torch_order(len(shape)), binding=PRODUCT, hint="product"
    )


# Layers as functions


@rule("conv1d", "conv2d")
def _conv(
    b: Any, node: Any, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Value:  # fmt: skip
    kernel, value = b.value(weight), b.value(x)
    rank = len(kernel.shape)
    codec = OIHW_HWIO if rank == 4 else OIW_WIO
    sizes = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    options = {
        name: plain_size(size)
        for name, size in sizes.items()
        if plain_size(size) != (0 if name == "padding" else 1)
    }
    name, offset = b.own(weight), None if bias is None else b.own(bias)
    if name is not None and (bias is None) == (offset is None):
        out, per_group, *window = kernel.shape
        places = {name: ("kernel", codec), **({offset: ("bias", AS_IS)} if offset else {})}
        options |= {"use_bias": True} if offset else {}
        layer = Layer(
            "nn.Conv" if rank == 4 else "nn.Conv1d",
            (per_group * groups, out, plain_size(window)), options, places, True,
            inputs="channels_last",
        )  # fmt: skip
        target = b.synthesised(layer, "conv", list(places))
        return b.apply(layer, target, value, shape_of(node))
    value = b.bring(value, axes.channels_last(rank))
    holes = [value, b.bring(kernel, codec.axes)]
    text = "nn.convolve({}, {}"
    if bias is not None:
        text += ", {}"
        holes.append(b.value(bias))
    text += "".join(f", {one}={{}}" for one in options) + ")"
    holes += [Constant(size, one) for one, size in options.items()]
    return b.new(text, holes, shape_of(node), axes.channels_last(rank), hint="conv")


@rule("linear")
def _linear(b: Any, node: Any, x: Any, weight: Any, bias: Any = None) -> Value:
    kernel, value = b.value(weight), b.value(x)
    name, offset = b.own(weight), None if bias is None else b.own(bias)
    if name is not None and (bias is None) == (offset is None):
        places = {name: ("kernel", TRANSPOSED), **({offset: ("bias", AS_IS)} if offset else {})}
        options = {} if offset else {"use_bias": False}
        layer = Layer("nn.Linear", kernel.shape[::-1], options, places, True, inputs="last_axis")
        return b.apply(layer, b.synthesised(layer, "linear", list(places)), value, shape_of(node))
    if value.order[-1] != len(value.shape) - 1:
        value = b.bring(value, axes.torch_order(len(value.shape)))
    product = b.new(
        "{2} @ {3}", (value, b.bring(kernel, (1, 0))), shape_of(node), value.order,
        binding=PRODUCT, hint="linear",
    )  # fmt: skip
    return product if bias is None else _binary(b, node, "+", product, b.value(bias), "linear")


@rule("batch_norm")
def _batch_norm(
    b: Any, node: Any, x: Any, weight: Any, bias: Any, mean: Any, var: Any, train: bool,
    momentum: float, eps: float, _: bool = False,
) -> Value:  # fmt: skip
    value = b.bring(b.value(x), axes.channels_last(len(b.value(x).shape)))
    told = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    ours = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    names = {kind: b.own(node) for kind, node in told.items() if node is not None}
    if not train and mean is not None and names and None not in names.values():
        places = {names[kind]: (ours[kind], AS_IS) for kind in names}
        counter = names["running_mean"].replace("running_mean", "num_batches_tracked")
        if counter in dict(b.live.named_buffers(recurse=False)):
            places[counter] = ("num_batches_tracked", AS_IS)
        channels = b.value(mean).shape[0]
        options: dict[str, Any] = {} if eps == 1e-5 else {"eps": eps}
        if getattr(b.live, "momentum", momentum) != 0.1:
            options["momentum"] = getattr(b.live, "momentum", momentum)
        if weight is None:
            options["affine"] = False
        layer = Layer("nn.BatchNorm", (channels,), options, places, True, inputs="channels_last")
        target = b.synthesised(layer, "norm", list(places))
        return b.apply(layer, target, value, value.shape)
    if train and mean is None:
        call, holes = "nn.batch_norm_by_batch", [weight, bias]
    elif not train:
        call, holes = "nn.batch_norm", [mean, var, weight, bias]
    else:
        raise b.refusal("a batch norm that updates its statistics in evaluation mode")
    texts = ["None" if one is None else "{}" for one in holes]
    values = [b.value(one) for one in holes if one is not None]
    text = f"{call}({{}}, {', '.join(texts)}, eps={{}})"
    eps_hole = Constant(eps, "eps")
    return b.new(text, (value, *values, eps_hole), value.shape, value.order, hint="norm")


@rule("group_norm", "layer_norm", "instance_norm")
def _other_norm(b: Any, node: Any, x: Any, *arguments: Any) -> Value:
    kind = str(node.target).removeprefix("aten.").partition(".")[0]
    value = b.value(x)
    rank = len(value.shape)
    if kind == "group_norm":
        groups, weight, bias, eps = (
            (*arguments, None, None, 1e-5)[:4] if len(arguments) < 4 else arguments[:4]
        )
        first: tuple[Any, ...] = (groups, value.shape[1])
        call = "GroupNorm"
    elif kind == "layer_norm":
        shape, weight, bias, eps = (*arguments, *(None, None, 1e-5)[len(arguments) - 1 :])[:4]
        first = (plain_size(shape) if len(shape) == 1 else tuple(shape),)
        call = "LayerNorm"
        if len(shape) > 1:
            raise b.refusal("layer norm over several axes is not supported")
    else:
        weight, bias, mean, _var, by_batch, _momentum, eps, _ = arguments
        if not by_batch or mean is not None:
            raise b.refusal("an instance norm with running statistics as a function")
        first, call = (value.shape[1],), "InstanceNorm"
    default = 1e-5
    options = {} if eps == default else {"eps": eps}
    names = [b.own(one) for one in (weight, bias) if one is not None]
    if None in names:
        raise b.refusal(f"{kind} with computed scale or shift is not supported")
    if weight is None and call != "InstanceNorm":
        options["affine"] = False
    elif weight is not None and call == "InstanceNorm":
        options["affine"] = True
    places = {name: (ours, AS_IS) for name, ours in zip(names, ("scale", "bias"), strict=False)}
    inputs: Any = "last_axis" if kind == "layer_norm" else "channels_last"
    layer = Layer(f"nn.{call}", first, options, places, bool(places), inputs=inputs)
    if places:
        return b.apply(layer, b.synthesised(layer, "norm", names), value, value.shape)
    if inputs == "channels_last":
        value = b.bring(value, axes.channels_last(rank))
    call = {"GroupNorm": f"nn.group_norm({{}}, {first[0]}", "LayerNorm": "nn.layer_norm({}"}.get(
        call, "nn.instance_norm({}"
    )
    return b.new(
        f"{call}, eps={{}})", (value, Constant(eps, "eps")), value.shape, value.order, hint="norm"
    )


def plain_size(size: Any) -> Any:
    """``[3, 3]`` as 3."""
    if isinstance(size, (tuple, list)):
        return size[0] if len(set(size)) == 1 else tuple(size)
    return size


def _pool(call: str, names: Sequence[str], defaults: Sequence[Any]) -> Rule:
    def apply(b: Values, node: Any, x: Any, window: Any, *rest: Any, **named: Any) -> Value:
        value = b.value(x)
        value = b.bring(value, axes.channels_last(len(value.shape)))
        given = {**dict(zip(names, rest, strict=False)), **named}
        window = plain_size(window)
        shown = {}
        for name, default in zip(names, defaults, strict=True):
            size = plain_size(given.get(name, default))
            size = None if name == "stride" and size in ((), [], window) else size
            if size != default:
                shown[name] = size
        text = f"nn.{call}({{}}, {{}}" + "".join(f", {name}={{}}" for name in shown) + ")"
        holes = [value, Constant(window, "window")]
        holes += [Constant(size, name) for name, size in shown.items()]
        return b.new(text, holes, shape_of(node), value.order, hint="pooled")

    return apply


for _rank in ("1d", "2d"):
    RULES[f"max_pool{_rank}"] = _pool(
        "max_pool", ("stride", "padding", "dilation", "ceil_mode"), (None, 0, 1, False)
    )
    RULES[f"avg_pool{_rank}"] = _pool(
        "avg_pool",
        ("stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
        (None, 0, False, True, None),
    )
    RULES[f"adaptive_avg_pool{_rank}"] = _pool("adaptive_avg_pool", (), ())


@rule("adaptive_max_pool2d", "adaptive_max_pool1d")
def _adaptive_max(b: Values, node: Any, x: Any, size: Any) -> Value:
    value = b.value(x)
    value = b.bring(value, axes.channels_last(len(value.shape)))
    shape = tuple(size_of(one) for one in node.meta["val"][0].shape)
    holes = (value, Constant(plain_size(size), "size"))
    whole = b.new("{}", (value,), (), ())
    whole.items = [
        b.new("nn.adaptive_max_pool({}, {})", holes, shape, value.order, hint="pooled"), None
    ]  # fmt: skip
    return whole


@rule("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "zero_pad2d")
@rule("reflection_pad1d", "replication_pad1d")
def _pad(b: Values, node: Any, x: Any, widths: Any, *rest: Any, **named: Any) -> Value:
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    value = b.settled(b.value(x))
    rank = len(value.shape)
    mode, amount = "constant", None
    if name == "pad":
        mode = rest[0] if rest else named.get("mode", "constant")
        amount = rest[1] if len(rest) > 1 else named.get("value")
    elif name == "constant_pad_nd":
        amount = rest[0] if rest else named.get("value")
    elif name != "zero_pad2d":
        mode = "reflect" if "reflection" in name else "replicate"
    widths = [b.number(width) for width in widths]
    by_axis = {
        rank - 1 - place: tuple(widths[2 * place : 2 * place + 2])
        for place in range(len(widths) // 2)
    }
    if all(width == (0, 0) for width in by_axis.values()):
        return value
    ours = tuple(by_axis.get(axis, (0, 0)) for axis in value.order)
    text, holes = "nn.pad({}, {}", [value, Constant(ours, "widths")]
    if mode != "constant":
        text += f", mode={mode!r}"
    elif amount:
        text += ", value={}"
        holes.append(Constant(amount, "value"))
    return b.new(text + ")", holes, shape_of(node), value.order, hint="padded")


@rule("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest1d")
@rule(
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "_upsample_nearest_exact2d",
    "upsample_linear1d",
)
def _upsample(b: Values, node: Any, x: Any, size: Any, *rest: Any) -> Value:
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    value = b.value(x)
    value = b.bring(value, axes.channels_last(len(value.shape)))
    mode = next(
        one for one in ("nearest_exact", "nearest", "bilinear", "bicubic", "linear") if one in name
    )
    align = "nearest" not in mode and bool(rest[0])
    scales = rest[-1] if rest and isinstance(rest[-1], (list, tuple)) else None
    if size is not None or scales is None:
        spatial = tuple(value.shape[2:])
        target = tuple(shape_of(node)[2:])
        same = all(new % old == 0 for new, old in zip(target, spatial, strict=True))
        factors = {new // old for new, old in zip(target, spatial, strict=True)} if same else set()
        del factors
        text, holes = "size={}", [Constant(target, "size")]
    else:
        text, holes = "scale_factor={}", [Constant(plain_size(scales), "scale_factor")]
    text = f"nn.interpolate({{}}, {text}, mode={mode.replace('_', '-')!r}"
    text += ", align_corners=True" if align else ""
    text += ", antialias=True)" if name.endswith("_aa") else ")"
    return b.new(text, (value, *holes), shape_of(node), value.order, hint="resized")


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def _shuffle(b: Values, node: Any, x: Any, factor: int) -> Value:
    name = str(node.target).removeprefix("aten.").partition(".")[0].removeprefix("native_")
    value = b.value(x)
    value = b.bring(value, axes.channels_last(len(value.shape)))
    holes = (value, Constant(factor, "factor"))
    return b.new(f"nn.{name}({{}}, {{}})", holes, shape_of(node), value.order, hint="shuffled")
