"""Operators that combine numbers along axes."""

from __future__ import annotations

from typing import Any

from flax_resblock.port import axes
from flax_resblock.port.operators.rules import RULES, along, name_of, rule
from flax_resblock.port.placing import Values
from flax_resblock.port.tracing import shape_of
from flax_resblock.port.values import PRODUCT, Value


@rule("mean", "sum", "amax", "amin", "var", "std", "prod")
def _reduce(b: Values, node: Any, x: Any, dims: Any = None, *rest: Any, **named: Any) -> Value:
    name = name_of(node)
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
    name = name_of(node)
    value = b.settled(b.value(x))
    call = "jnp.cumsum" if name == "cumsum" else f"nn.{name}"
    text = f"{call}({{}}, axis={along(b, value, dim)})"
    return b.new(text, (value,), value.shape, value.order, hint=name)


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
