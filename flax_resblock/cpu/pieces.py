"""Runs a traced function in pieces, of which equal ones are compiled once.

XLA compiles a network as a whole, layer by layer, however often a layer recurs. A program that runs
a few times takes longer to compile than to run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from flax_resblock.cpu.compiling import LEVEL, piece_options
from flax_resblock.cpu.plain import plainly

_BOUNDARIES = ("conv_general_dilated", "dot_general")
"""Each of these is a piece of its own, and so is what lies between two of them."""

_FUNCTIONS = ("jit", "pjit")
"""Operations that call another traced function; their names in newer and older jax."""

_DERIVATIVES = ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd")
"""Parameters of a function with a derivative of its own that do not change its value."""

_LITTLE = 2**21, 2**24
"""Products, and numbers between products, that LLVM's loops compute in less time without its
optimisations than these take."""

_KERNELS = "ynn_fusion"
"""In the text of a program whose convolution is one of the kernels that come with XLA."""


class _Variable:
    """Stands for a value; a function inside that is called twice has the same variables twice."""

    def __init__(self, aval: Any) -> None:
        self.aval = aval


class _Flat(NamedTuple):
    """A traced function.

    Attributes:
      operations: In their order.
      inputs, outputs: Variables; literals may be among the outputs.
      constants: The values of other variables.
    """

    operations: list[Any]
    inputs: list[Any]
    outputs: list[Any]
    constants: dict[Any, Any]


class _Piece(NamedTuple):
    """Some operations that follow each other.

    Attributes:
      inputs, outputs: The variables that they take, and those of their results that are used later.
      dead: Inputs that nothing uses later.
    """

    operations: list[Any]
    inputs: list[Any]
    outputs: list[Any]
    dead: list[Any]


class InPieces:
    """A function for arguments of certain shapes. It is traced here and compiled in threads of its
    own, so that the caller can do something else until it is run.

    Args:
      function: Of arrays, and trees of them, to a tree of arrays; traceable by ``jax.jit``.
      arguments: Arrays or shapes, as those that it will be called with.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        traced, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        self._tree = jax.tree.structure(shapes)
        self._flat = _flat(traced)
        pieces = _pieces_of(self._flat)
        keys = [_key(one.operations, one.inputs, one.outputs) for one in pieces]
        runs = Counter(keys)
        programs: dict[Any, Future[Any]] = {}
        self._steps: list[tuple[_Piece, Future[Any]]] = []
        threads = ThreadPoolExecutor(2)
        for piece, key in zip(pieces, keys, strict=True):
            if key not in programs and _only_moves(piece.operations):
                programs[key] = Future()
                programs[key].set_result(partial(_moved, piece.operations[0]))
            elif key not in programs:
                lowered = jax.jit(_function(piece)).lower(*map(_shape_of, piece.inputs))
                programs[key] = threads.submit(_compiled, lowered, piece.operations, runs[key])
            self._steps.append((piece, programs[key]))
        threads.shutdown(wait=False)

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns; the arguments have the shapes that it was compiled for."""
        values = self._flat.constants | dict(
            zip(self._flat.inputs, jax.tree.leaves(arguments), strict=True)
        )
        for piece, program in self._steps:
            results = program.result()(*(values[one] for one in piece.inputs))
            values.update(zip(piece.outputs, results, strict=True))
            for one in piece.dead:
                del values[one]
        return jax.tree.unflatten(self._tree, [_read(values, one) for one in self._flat.outputs])


def _flat(traced: ClosedJaxpr) -> _Flat:
    """A traced function without functions inside it."""
    constants: dict[Any, Any] = {}
    operations: list[Any] = []

    def inlined(closed: ClosedJaxpr, inputs: Sequence[Any]) -> list[Any]:
        of = dict(zip(closed.jaxpr.invars, inputs, strict=True))
        for variable, constant in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            of[variable] = _Variable(variable.aval)
            constants[of[variable]] = constant
        for one in closed.jaxpr.eqns:
            taken = [atom if isinstance(atom, Literal) else of[atom] for atom in one.invars]
            if one.primitive.name in _FUNCTIONS:
                of |= zip(one.outvars, inlined(one.params["jaxpr"], taken), strict=True)
                continue
            made = [_Variable(variable.aval) for variable in one.outvars]
            of |= zip(one.outvars, made, strict=True)
            operations.append(one.replace(invars=taken, outvars=made))
        outputs = closed.jaxpr.outvars
        return [atom if isinstance(atom, Literal) else of[atom] for atom in outputs]

    inputs = [_Variable(variable.aval) for variable in traced.jaxpr.invars]
    outputs = inlined(traced, inputs)
    return _Flat(operations, inputs, outputs, constants)


def _pieces_of(flat: _Flat) -> list[_Piece]:
    groups: list[list[Any]] = [[]]
    for one in flat.operations:
        if one.primitive.name in _BOUNDARIES:
            groups += [*plainly(one), []]
        else:
            groups[-1].append(one)
    groups = [group for group in groups if group]
    last: dict[Any, int] = {}  # the number of the last group that uses a variable
    for number, group in enumerate(groups):
        last |= {one: number for operation in group for one in _variables(operation.invars)}
    last |= {one: len(groups) for one in _variables(flat.outputs)}
    pieces = []
    for number, group in enumerate(groups):
        made = dict.fromkeys(one for operation in group for one in operation.outvars)
        used = dict.fromkeys(one for each in group for one in _variables(each.invars))
        inputs = [one for one in used if one not in made]
        outputs = [one for one in made if last.get(one, -1) > number]
        dead = [one for one in inputs if last[one] == number]
        pieces.append(_Piece(group, inputs, outputs, dead))
    return pieces


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [one for one in atoms if not isinstance(one, Literal)]


def _shape_of(variable: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


def _read(values: dict[Any, Any], atom: Any) -> Any:
    return atom.val if isinstance(atom, Literal) else values[atom]


def results_of(eqn: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """What an operation of a traced function gives for these operands."""
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return results if eqn.primitive.multiple_results else [results]


def _key(operations: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
    """Equal for operations that compute the same from inputs of the same shapes and dtypes."""
    numbers: dict[Any, int] = {}

    def atom(one: Any) -> Any:
        if isinstance(one, Literal):
            return np.asarray(one.val).tobytes(), str(one.aval)
        return numbers.setdefault(one, len(numbers)), str(one.aval)

    def parameter(value: Any) -> Any:
        if isinstance(value, ClosedJaxpr):
            inner = value.jaxpr
            bound = (*inner.constvars, *inner.invars)
            return _key(inner.eqns, bound, inner.outvars), tuple(map(id, value.consts))
        if isinstance(value, float | np.generic):  # 0.0 equals -0.0
            return np.asarray(value).tobytes(), type(value)
        try:
            hash(value)
        except TypeError:
            return id(value)
        return value

    rows = [tuple(map(atom, inputs))]
    for one in operations:
        named = [(name, parameter(of)) for name, of in one.params.items()]
        kept = frozenset(row for row in named if row[0] not in _DERIVATIVES)
        of_inputs, results = (tuple(map(atom, atoms)) for atoms in (one.invars, one.outvars))
        rows.append((one.primitive.name, kept, of_inputs, results))
    return (*rows, tuple(map(atom, outputs)))


def _function(piece: _Piece) -> Callable[..., list[Any]]:
    def run(*inputs: Any) -> list[Any]:
        values = dict(zip(piece.inputs, inputs, strict=True))
        for one in piece.operations:
            results = results_of(one, [_read(values, atom) for atom in one.invars])
            values.update(zip(one.outvars, results, strict=True))
        return [values[one] for one in piece.outputs]

    return run


def _only_moves(operations: Sequence[Any]) -> bool:
    """Whether NumPy does the same: a program for it takes 20 ms."""
    one, *others = operations
    if others or any(isinstance(atom, Literal) for atom in one.invars[:1]):
        return False
    return one.primitive.name in ("rev", "pad")


def _moved(operation: Any, x: Any, *filling: Any) -> list[np.ndarray]:
    """What the operation returns: all else that it does is in its parameters."""
    x, params = np.asarray(x), operation.params
    if operation.primitive.name == "rev":
        return [np.flip(x, params["dimensions"])]
    fill = _read(dict(zip(operation.invars[1:], filling, strict=False)), operation.invars[1])
    made = np.full(operation.outvars[0].aval.shape, fill, x.dtype)
    places = []
    for axis, (low, _, between) in enumerate(params["padding_config"]):
        place = low + (between + 1) * np.arange(x.shape[axis])
        kept = (place >= 0) & (place < made.shape[axis])
        x, places = x.compress(kept, axis), [*places, place[kept]]
    made[np.ix_(*places)] = x
    return [made]


def _compiled(lowered: Any, operations: Sequence[Any], runs: int) -> Any:
    """The program; without LLVM's optimisations where LLVM's loops compute little in all runs."""
    options = dict(piece_options())
    if LEVEL not in options:
        return lowered.compile(options)
    simple = {**options, LEVEL: 0}
    between = [one for one in operations if one.primitive.name not in _BOUNDARIES]
    products, numbers = _LITTLE
    if runs * sum(map(_size, between)) < numbers:
        program = lowered.compile(simple)
        if sum(map(_products, operations)) < products or _KERNELS in program.as_text():
            return program
    return lowered.compile(options)


def _size(operation: Any) -> int:
    """How many numbers it computes; in a loop, each time."""
    if operation.primitive.name == "scan":
        inside = operation.params["jaxpr"].jaxpr.eqns
        return operation.params["length"] * sum(map(_size, inside))
    return sum(math.prod(one.aval.shape) for one in operation.outvars)


def _products(operation: Any) -> int:
    """How many multiplications a convolution is, each of which may be one of LLVM's loop."""
    if operation.primitive.name != "conv_general_dilated":
        return 0
    kernel = operation.invars[1].aval.shape
    outer = kernel[operation.params["dimension_numbers"].rhs_spec[0]]
    return _size(operation) * math.prod(kernel) // outer
