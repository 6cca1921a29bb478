"""Operators that act on every number by itself, and those that broadcast."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from flax_resblock.convert.codecs import AS_IS
from flax_resblock.port import axes
from flax_resblock.port.axes import Shape
from flax_resblock.port.layer import Inputs, Layer, celu_options
from flax_resblock.port.operator_names import name_of
from flax_resblock.port.operators.rules import RULES, Rule, rule, word
from flax_resblock.port.placing import Values
from flax_resblock.port.sizes import follows
from flax_resblock.port.values import ANY, ATOM, PRODUCT, SUM, Constant, Value


def _unary(text: str, binding: int = ATOM) -> Rule:
    def apply(b: Values, node: Any, x: Any, *_: Any, **__: Any) -> Value:
        value = b.value(x)
        made = b.new(text, (value,), value.shape, value.order, binding=binding, hint=word(text))
        made.expanded = value.expanded
        return made

    return apply


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
    "erfc": "jax.lax.erfc({})",
    "sin": "jnp.sin({})",
    "cos": "jnp.cos({})",
    "tan": "jnp.tan({})",
    "atan": "jnp.arctan({})",
    "sinh": "jnp.sinh({})",
    "cosh": "jnp.cosh({})",
    "exp2": "jnp.exp2({})",
    "log2": "jnp.log2({})",
    "log10": "jnp.log10({})",
    "round": "jnp.round({})",
    "trunc": "jnp.trunc({})",
    "floor": "jnp.floor({})",
    "ceil": "jnp.ceil({})",
    "square": "jnp.square({})",
    "sign": "jnp.sign({})",
    "log1p": "jnp.log1p({})",
    "expm1": "jnp.expm1({})",
    "logical_not": "~{3}",
    "bitwise_not": "~{3}",
    "reciprocal": "1 / {3}",
    "neg": "-{3}",
}.items():
    RULES[_name] = _unary(_text, PRODUCT if _text[0] in "1-~" else ATOM)


def _with_numbers(call: str, defaults: dict[str, Any]) -> Rule:
    """A function of one tensor and numbers; those with their default are left out."""

    def apply(b: Values, node: Any, x: Any, *numbers: Any, **named: Any) -> Value:
        given = {**dict(zip(defaults, numbers, strict=False)), **named}
        shown = {k: v for k, v in given.items() if k in defaults and v != defaults[k]}
        value = b.settled(b.value(x))
        text = "".join(f", {name}={{}}" for name in shown)
        holes = [Constant(number, name) for name, number in shown.items()]
        return b.new(f"nn.{call}({{}}{text})", (value, *holes), value.shape, value.order, hint=call)

    return apply


RULES["leaky_relu"] = _with_numbers("leaky_relu", {"slope": 0.01})
RULES["hardtanh"] = _with_numbers("hardtanh", {"min_value": -1.0, "max_value": 1.0})
RULES["softplus"] = _with_numbers("softplus", {"beta": 1, "threshold": 20})
RULES["hardshrink"] = _with_numbers("hardshrink", {"lambd": 0.5})
RULES["softshrink"] = _with_numbers("softshrink", {"lambd": 0.5})


@rule("celu")
def _celu(b: Values, node: Any, x: Any, alpha: Any = 1.0) -> Value:
    options = celu_options(alpha, "celu_" in str(node.target))
    return _with_numbers("celu", {"alpha": 1.0, "inplace": False})(b, node, x, **options)


@rule("elu")
def _elu(b: Values, node: Any, x: Any, alpha: Any = 1, scale: Any = 1, inner: Any = 1) -> Value:
    if scale != 1 or inner != 1:
        raise b.refusal("elu with a scale of its own is not supported")
    return _with_numbers("elu", {"alpha": 1.0})(b, node, x, alpha)


@rule("gelu")
def _gelu(b: Values, node: Any, x: Any, approximate: str = "none") -> Value:
    value = b.settled(b.value(x))
    text = "nn.gelu({}, approximate=True)" if approximate == "tanh" else "nn.gelu({})"
    return b.new(text, (value,), value.shape, value.order, hint="gelu")


@rule("prelu")
def _prelu(b: Any, node: Any, x: Any, weight: Any) -> Value:
    value, name = b.settled(b.value(x)), b.own(weight)
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
    value = b.settled(b.value(x))
    if any(isinstance(b.number(limit), Value) for limit in (low, high)):
        raise b.refusal("clamp with tensors as limits is not supported; use torch.maximum")
    holes: list[Any] = [value, *(Constant(one, "limit") for one in (low, high) if one is not None)]
    text = "nn.clamp({}" + (", min={}" if low is not None else "")
    text += (", max={}" if high is not None else "") + ")"
    return b.new(text, holes, value.shape, value.order, hint="clamp")


_SIGNS = {"add": "+", "sub": "-", "rsub": "-", "mul": "*", "div": "/"}


@rule(*_SIGNS)
def _arithmetic(
    b: Values, node: Any, left: Any, right: Any, *, alpha: Any = 1, rounding_mode: Any = None
) -> Any:
    if rounding_mode == "floor":
        return RULES["floor_divide"](b, node, left, right)
    name = name_of(node)
    left, right = b.number(left), b.number(right)
    if name == "rsub":
        left, right = right, left
    sign = _SIGNS[name]
    hint = {"+": "total", "-": "difference", "*": "product", "/": "quotient"}[sign]
    if alpha != 1:
        right = binary(b, node, "*", right, alpha, "product")
    made = binary(b, node, sign, left, right, hint)
    return made if rounding_mode is None else RULES["trunc"](b, node, made)


def binary(b: Values, node: Any, sign: str, left: Any, right: Any, hint: str) -> Any:
    numbers = [one for one in (left, right) if not isinstance(one, Value)]
    if len(numbers) == 2:
        return {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}[
            sign
        ](*numbers)
    if sign == "+" and numbers == [0] and not follows(numbers[0]):  # where Python's sum begins
        return b.settled(b.value(right if left in numbers else left))
    least = SUM if sign in "+-" else PRODUCT
    after = least + 1 if sign in "-/" or isinstance(right, Value) or follows(right) else least
    operands, shape, order = together(b, (left, right))
    text = f"{{{least}}} {sign} {{{after}}}"
    return b.new(text, operands, shape, order, binding=least, hint=hint)


def together(b: Values, operands: Sequence[Any]) -> tuple[list[Any], Shape, axes.Order]:
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
    fitted: list[Any] = [
        b.for_broadcast(one, order) if isinstance(one, Value) else Constant(one, "factor")
        for one in operands
    ]
    ranks = [len(one.shape) for one in fitted if isinstance(one, Value)]
    if max(ranks) < rank:
        first = next(place for place, one in enumerate(fitted) if isinstance(one, Value))
        fitted[first] = b.with_leading_ones(fitted[first], rank)
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
    product = binary(b, node, "*", b.value(left), b.value(right), "product")
    if value != 1:
        product = binary(b, node, "*", product, value, "product")
    return binary(b, node, "+", b.value(x), product, "total")


@rule("pow")
def _pow(b: Values, node: Any, x: Any, exponent: Any) -> Value:
    value, power = b.number(x), b.number(exponent)
    if not isinstance(value, Value) or isinstance(power, Value):
        operands, shape, order = together(b, (value, power))
        return b.new("{3} ** {3}", operands, shape, order, binding=PRODUCT, hint="power")
    return b.new(
        "{3} ** {}", (value, Constant(power, "power")), value.shape, value.order,
        binding=PRODUCT, hint="power",
    )  # fmt: skip


def _of_two(call: str) -> Rule:
    def apply(b: Values, node: Any, left: Any, right: Any) -> Value:
        operands, shape, order = together(b, (b.number(left), b.number(right)))
        return b.new(f"{call}({{}}, {{}})", operands, shape, order, hint=word(call + "("))

    return apply


for _name in ("maximum", "minimum", "floor_divide", "remainder", "fmod"):
    RULES[_name] = _of_two(f"jnp.{_name}")

_COMPARISONS = {"gt": ">", "lt": "<", "ge": ">=", "le": "<=", "eq": "==", "ne": "!="}
_BOTH = {"logical_and": "&", "logical_or": "|", "bitwise_and": "&", "bitwise_or": "|"}


@rule(*_COMPARISONS, *_BOTH)
def _comparison(b: Values, node: Any, left: Any, right: Any) -> Value:
    sign = {**_COMPARISONS, **_BOTH}[name_of(node)]
    operands, shape, order = together(b, (b.number(left), b.number(right)))
    return b.new(f"{{1}} {sign} {{1}}", operands, shape, order, binding=ANY, hint="mask")


@rule("where")
def _where(b: Values, node: Any, condition: Any, yes: Any = None, no: Any = None) -> Value:
    if yes is None or no is None:
        raise b.refusal("torch.where with a condition alone gives indices, which depend on values")
    operands = (b.number(condition), b.number(yes), b.number(no))
    fitted, shape, order = together(b, operands)
    return b.new("jnp.where({}, {}, {})", fitted, shape, order, hint="chosen")


@rule("masked_fill")
def _masked_fill(b: Values, node: Any, x: Any, mask: Any, amount: Any) -> Value:
    fitted, shape, order = together(b, (b.number(mask), b.number(amount), b.value(x)))
    return b.new("jnp.where({}, {}, {})", fitted, shape, order, hint="filled")


@rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def _dropout(b: Any, node: Any, x: Any, rate: float, train: bool) -> Value:
    name = name_of(node)
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
    images = name == "feature_dropout"
    options = {"broadcast_dims": tuple(range(1, len(value.shape) - 1))} if images else {}
    inputs: Inputs = "channels_last" if images else "elementwise"
    layer = Layer("nn.Dropout", (rate,), options, {}, True, True, inputs)
    return b.apply(layer, b.synthesised(layer, "dropout", []), value, value.shape)
