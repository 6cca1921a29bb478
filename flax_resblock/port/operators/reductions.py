"""Operators that combine numbers along axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax_resblock.port import axes
from flax_resblock.port.axes import Shape
from flax_resblock.port.operator_names import name_of
from flax_resblock.port.operators.elementwise import binary, together
from flax_resblock.port.operators.rules import RULES, along, rule, several
from flax_resblock.port.placing import Values
from flax_resblock.port.sizes import number_of, shape_of
from flax_resblock.port.values import PRODUCT, Constant, Value


@rule("mean", "sum", "amax", "amin", "var", "std", "prod")
def _reduce(b: Values, node: Any, x: Any, dims: Any = None, *rest: Any, **named: Any) -> Value:
    name = name_of(node)
    value = b.settled(b.value(x))
    keepdim = named.get("keepdim", False)
    correction = named.get("correction", 1)
    if name in ("mean", "sum", "amax", "amin", "prod"):
        keepdim = rest[0] if rest else keepdim
    elif isinstance(dims, bool):
        raise b.refusal(f"{name} in this form is not supported; name its axes")
    elif rest:
        correction, keepdim = int(bool(rest[0])), (rest[1] if len(rest) > 1 else keepdim)
    corrected = correction if name in ("var", "std") else None
    return _reduced(b, value, name, dims, keepdim, shape_of(node), corrected)


def _reduced(
    b: Values, value: Value, name: str, dims: Any, keep: bool, shape: Shape, correction: Any
) -> Value:
    rank = len(value.shape)
    dims = [dims] if isinstance(dims, int) else dims
    dims = [dim % rank for dim in dims] if dims else list(range(rank))
    places = sorted(value.order.index(dim) for dim in dims)
    axis = tuple(places) if len(places) != 1 else along(b, value, dims[0])
    call = f"nn.{name}" if name in ("amax", "amin") else f"jnp.{name}"
    text = f"{call}({{}}, axis={axis}" if len(dims) < rank else f"{call}({{}}"
    text += f", ddof={correction}" if correction else ""
    text += ", keepdims=True)" if keep else ")"
    order = value.order if keep else axes.without(value.order, dims)
    return b.new(text, (value,), shape, order, hint=name)


@rule("max", "min")
def _extreme(b: Values, node: Any, x: Any, *rest: Any, **named: Any) -> Any:
    name = "amax" if ".max" in str(node.target) else "amin"
    if rest and isinstance(b.number(rest[0]), Value):
        return RULES["maximum" if name == "amax" else "minimum"](b, node, x, rest[0])
    value = b.settled(b.value(x))
    if not rest:
        return b.new(f"nn.{name}({{}})", (value,), (), (), hint=name)
    dim, *more = rest
    keep = more[0] if more else named.get("keepdim", False)
    dim %= len(value.shape)
    call = "nn.maximum_along" if name == "amax" else "nn.minimum_along"
    text = f"{call}({{}}, axis={along(b, value, dim)}" + (", keepdims=True)" if keep else ")")
    order = value.order if keep else axes.without(value.order, [dim])
    shape = tuple(number_of(size) for size in node.meta["val"][0].shape)
    return several(b, [b.new(text, (value,), shape, order, hint=name), None])


@rule("var_mean", "std_mean")
def _moments(b: Values, node: Any, x: Any, *rest: Any, **named: Any) -> Value:
    spread = name_of(node).partition("_")[0]
    value = b.settled(b.value(x))
    keep = named.get("keepdim", False)
    if rest and isinstance(rest[0], bool):
        raise b.refusal(f"{name_of(node)} in this form is not supported; name its axes")
    dims, *more = rest or (None,)
    correction = named.get("correction", 1)
    if more:
        correction, keep = int(bool(more[0])), more[1] if len(more) > 1 else keep
    shape = tuple(number_of(size) for size in node.meta["val"][0].shape)
    both = [
        _reduced(b, value, call, dims, keep, shape, correction if call == spread else None)
        for call in (spread, "mean")
    ]
    return several(b, both)


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


@rule("linalg_norm")
def _norm_of_either(
    b: Values, node: Any, x: Any, power: Any = None, dims: Any = None, keep: bool = False, **_: Any
) -> Value:
    vectors = isinstance(dims, int) or (dims is not None and len(dims) == 1)
    if power is not None and not vectors:
        raise b.refusal("torch.linalg.norm with an order and without one axis is not supported")
    return _norm(b, node, x, 2 if power is None else power, dims, keep)


@rule("cosine_similarity")
def _cosine(b: Values, node: Any, left: Any, right: Any, dim: int = 1, eps: float = 1e-8) -> Value:
    operands, shape, order = together(b, (b.value(left), b.value(right)))
    dim %= len(shape)
    axis = order.index(dim) - len(shape)
    text = "nn.cosine_similarity({}, {}" + (f", axis={axis}" if axis != -1 else "")
    text += f", eps={eps!r})" if eps != 1e-8 else ")"
    return b.new(text, operands, shape_of(node), axes.without(order, [dim]), hint="cosine")


@rule("pairwise_distance")
def _distance(
    b: Values, node: Any, left: Any, right: Any, power: float = 2.0, eps: float = 1e-6,
    keepdim: bool = False,
) -> Value:  # fmt: skip
    if power not in (1, 2):
        raise b.refusal(f"a distance of order {power} is not supported")
    apart = binary(b, node, "-", b.value(left), b.value(right), "difference")
    apart = binary(b, node, "+", apart, eps, "difference")
    return _norm(b, node, apart, int(power), [-1], keepdim)


@rule("softmax", "log_softmax", "cumsum")
def _along(b: Values, node: Any, x: Any, dim: int, *_: Any, **__: Any) -> Value:
    name = name_of(node)
    value = b.settled(b.value(x))
    call = "jnp.cumsum" if name == "cumsum" else f"nn.{name}"
    text = f"{call}({{}}, axis={along(b, value, dim)})"
    return b.new(text, (value,), value.shape, value.order, hint=name)


@rule("logsumexp")
def _logsumexp(b: Values, node: Any, x: Any, dims: Any, keep: bool = False) -> Value:
    value = b.settled(b.value(x))
    dims = [dim % len(value.shape) for dim in ([dims] if isinstance(dims, int) else dims)]
    places = tuple(sorted(value.order.index(dim) for dim in dims))
    text = f"jax.nn.logsumexp({{}}, axis={places}" + (", keepdims=True)" if keep else ")")
    order = value.order if keep else axes.without(value.order, dims)
    return b.new(text, (value,), shape_of(node), order, hint="logsumexp")


@rule("glu")
def _glu(b: Values, node: Any, x: Any, dim: int = -1) -> Value:
    value = b.settled(b.value(x))
    text = f"nn.glu({{}}, axis={along(b, value, dim)})"
    return b.new(text, (value,), shape_of(node), value.order, hint="glu")


@rule("matmul", "bmm", "mm")
def _matmul(b: Values, node: Any, left: Any, right: Any) -> Value:
    operands = [b.value(one) for one in (left, right)]
    operands = [b.bring(one, axes.torch_order(len(one.shape))) for one in operands]
    shape = shape_of(node)
    return b.new(
        "{2} @ {3}", operands, shape, axes.torch_order(len(shape)), binding=PRODUCT, hint="product"
    )


@rule("addmm", "baddbmm")
def _addmm(
    b: Values, node: Any, x: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1
) -> Value:
    product = _matmul(b, node, left, right)
    product = product if alpha == 1 else binary(b, node, "*", product, alpha, "product")
    added = b.value(x) if beta == 1 else binary(b, node, "*", b.value(x), beta, "product")
    return binary(b, node, "+", added, product, "total")


@rule("einsum")
def _einsum(b: Values, node: Any, equation: str, tensors: Sequence[Any], **_: Any) -> Value:
    values = [b.settled(b.value(one)) for one in tensors]
    inputs, _arrow, output = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if "." in equation:
        raise b.refusal("einsum with an ellipsis is not supported; name all axes")
    if not _arrow:
        output = "".join(sorted(one for one in set(inputs) - {","} if inputs.count(one) == 1))
    order = axes.channels_last(len(output))
    for value in values:
        b.bring(value, value.order)
    ours = [
        "".join(names[axis] for axis in value.order)
        for names, value in zip(letters, values, strict=True)
    ]
    result = "".join(output[axis] for axis in order)
    text = f'jnp.einsum("{",".join(ours)}->{result}", {", ".join("{}" for _ in values)})'
    return b.new(text, values, shape_of(node), order, hint="product")


@rule("scaled_dot_product_attention")
def _attention(
    b: Values, node: Any, query: Any, key: Any, value: Any, mask: Any = None, rate: float = 0.0,
    causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Value:  # fmt: skip
    if mask is not None or rate or causal or enable_gqa:
        raise b.refusal("attention with a mask or dropout is not supported")
    values = [b.value(one) for one in (query, key, value)]
    order = axes.torch_order(len(values[0].shape))
    values = [b.bring(one, order) for one in values]
    text = "nn.scaled_dot_product_attention({}, {}, {}" + (", scale={})" if scale else ")")
    holes = [*values, Constant(scale, "scale")] if scale else values
    return b.new(text, holes, shape_of(node), order, hint="attended")
