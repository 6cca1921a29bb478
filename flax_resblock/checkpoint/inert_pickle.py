"""What makes it safe to give a stranger's pickle to :class:`pickle.Unpickler`.

A restricted ``find_class`` keeps foreign code from being imported, and no more than that. The C
unpickler still reserves memory for a memo of four billion places, hashes tuples that share their
items until the end of time (or nest until its own stack overflows), and lets a pickle set
attributes of whatever it can reach. :func:`check_pickle` therefore walks the instructions first,
with :mod:`pickletools`, and keeps a sketch of every value that would be on the stack: what makes
it, how deep it nests and how long hashing it would take. It makes no values.
"""

from __future__ import annotations

import io
import pickletools
import sys
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from flax_resblock.checkpoint.limits import Limits
from flax_resblock.errors import CheckpointError, damaged

PLAIN_OPCODES = (
    {"PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2"}
    | {"BINFLOAT", "LONG1", "SHORT_BINSTRING", "BINUNICODE", "EMPTY_LIST", "APPEND", "APPENDS"}
    | {"EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
    | {"BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE", "BUILD"}
)
"""Instructions of protocol 2 for containers, numbers and text, and calls of what is named."""

_LONGEST_KEY = 17
"""Values that hashing a key may visit: a tuple of sixteen, or fewer that nest."""
_UNHASHABLE = _LONGEST_KEY + 1
_MOST_TAKEN = ("list", "dict", "tuple")


class RefusedError(Exception):
    """Says why a pickle is refused, as the end of a sentence that begins with its source."""


@contextmanager
def one_error(source: str, kind: str) -> Iterator[None]:
    """Turns whatever a pickle raises into a CheckpointError that says what kind it should be of."""
    words = f"{source} is no {kind}, or a damaged one: its pickle cannot be read"
    with damaged(words, "Copy or download it again."), refused(source):
        yield


@contextmanager
def refused(source: object) -> Iterator[None]:
    """Turns a RefusedError into a CheckpointError that begins with its source."""
    try:
        yield
    except RefusedError as error:
        raise CheckpointError(f"{source} {error}") from error


@dataclass(frozen=True)
class PickleRules:
    """The instructions and states that one kind of pickle needs.

    Attributes:
      opcodes: Names of its instructions, as :mod:`pickletools` has them.
      stateful: Full names of the callables whose results may be given a state (``BUILD``).
      foreign_state: Names whose results only another reader gives a state; see
        :attr:`CheckedPickle.foreign`. A name matches when it begins with one of them.
      fillable: Names of the callables whose results are dictionaries.
      hashable: Names of the callables whose results are as quick to hash as their arguments.
      most_opcodes: How many instructions it may have.
      refusal: Ends the message about an instruction that is not among ``opcodes``.
      refusals: What ends the message about the state of a function whose name begins so.
    """

    opcodes: Set[str]
    stateful: Set[str]
    foreign_state: tuple[str, ...] = ()
    fillable: Set[str] = frozenset()
    hashable: Set[str] = frozenset()
    most_opcodes: int = sys.maxsize
    refusal: str = "It is damaged, or made to do harm; nothing was run."
    refusals: Mapping[str, str] = field(default_factory=dict)


@dataclass
class CheckedPickle:
    """What :func:`check_pickle` found: the offset of the first byte behind the pickle, and what it
    does that is allowed but left to its own reader (None for nothing)."""

    end: int
    foreign: str | None = None


class _Sketch(NamedTuple):
    """What is known of a value before it is made: its ``kind`` (a ``"result"`` is of a call, a
    ``"reference"`` by a persistent id), how deep it nests, how many values hashing it visits
    (``_UNHASHABLE`` for more than a key may have), and the name of a global, or of what was called;
    or the text of a short string, of which a name may be made."""

    kind: str
    depth: int = 0
    weight: int = _UNHASHABLE
    name: str = ""


_MARK, _SCALAR = _Sketch("mark"), _Sketch("scalar", weight=1)
_EMPTY = {"EMPTY_LIST": _Sketch("list"), "EMPTY_DICT": _Sketch("dict")}
_EMPTY["EMPTY_TUPLE"] = _Sketch("tuple", weight=1)
_PUTS, _GETS = ("BINPUT", "LONG_BINPUT", "MEMOIZE"), ("BINGET", "LONG_BINGET")
_WITHOUT_VALUE = ("PROTO", "FRAME")
_SCALARS = (
    {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1"}
    | {"SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES"}
    | {"SHORT_BINUNICODE", "BINUNICODE", "BINBYTES8", "BYTEARRAY8"}
)
_LONGEST_NAME = 512


@dataclass
class _Walk:
    rules: PickleRules
    limits: Limits
    source: str
    stack: list[_Sketch] = field(default_factory=list)
    memo: dict[int, _Sketch] = field(default_factory=dict)
    foreign: str | None = None

    def taken(self, opcode: pickletools.OpcodeInfo) -> tuple[list[_Sketch], list[_Sketch]]:
        """What an instruction takes off the stack: below the last mark, and above it."""
        above: list[_Sketch] = []
        count = len(opcode.stack_before)
        if pickletools.markobject in opcode.stack_before:
            count = opcode.stack_before.index(pickletools.markobject)
            mark = len(self.stack) - 1
            while mark >= 0 and self.stack[mark] is not _MARK:
                mark -= 1
            if mark < 0:
                raise ValueError("it has no mark where it needs one")
            above = self.stack[mark + 1 :]
            del self.stack[mark:]
        if not count:
            return [], above
        below = self.stack[-count:]
        if len(below) < count or _MARK in below:
            raise ValueError("it takes a value from an empty stack")
        del self.stack[-count:]
        return below, above

    def nested(self, depth: int) -> int:
        if depth > self.limits.max_nesting:
            self.limits.check(self.source, "max_nesting", depth, "levels of nesting")
        return depth

    def filled(self, container: _Sketch, items: list[_Sketch]) -> _Sketch:
        depth = 1 + max((item.depth for item in items), default=-1)
        if depth <= container.depth:
            return container
        return container._replace(depth=self.nested(depth))

    def check_key(self, key: _Sketch) -> None:
        if key.weight <= _LONGEST_KEY:
            return
        if key.kind in _MOST_TAKEN:
            raise RefusedError(
                f"has a {key.kind} as a key, which no checkpoint needs. It is damaged, or made to "
                f"do harm."
            )
        self.foreign = self.foreign or "a key that is no text or number"

    def with_state(self, target: _Sketch, state: _Sketch) -> _Sketch:
        if target.kind != "result" or target.name not in self.rules.stateful:
            if target.kind != "result" or not target.name.startswith(self.rules.foreign_state):
                known = self.rules.refusals.items()
                words = [words for start, words in known if target.name.startswith(start)]
                raise RefusedError(
                    f"gives a state to a {target.name or target.kind}. "
                    f"{words[0] if words else self.rules.refusal}"
                )
            self.foreign = self.foreign or f"the state of what {target.name} gives"
        return self.filled(target, [state])

    def called(self, function: _Sketch, arguments: _Sketch) -> _Sketch:
        if function.kind != "global":
            raise RefusedError(
                f"calls a {function.kind}, which is no function. {self.rules.refusal}"
            )
        weight = arguments.weight if function.name in self.rules.hashable else _UNHASHABLE
        depth = self.nested(1 + arguments.depth)
        return _Sketch("result", depth, weight, function.name)

    def made(self, name: str, argument: object, below: list[_Sketch], above: list[_Sketch]):
        """The sketch of what an instruction pushes."""
        if name == "GLOBAL":
            return _Sketch("global", name=str(argument).replace(" ", ".", 1))
        if name == "STACK_GLOBAL":
            return _Sketch("global", name=".".join(part.name for part in below))
        if name in ("REDUCE", "NEWOBJ"):
            return self.called(*below)
        if name == "BINPERSID":
            return _Sketch("reference", below[0].depth)
        if name == "BUILD":
            return self.with_state(*below)
        if name.startswith("TUPLE"):
            items = below + above
            weight = min(_UNHASHABLE, 1 + sum(item.weight for item in items))
            return self.filled(_Sketch("tuple", weight=weight), items)
        container, *items = below + above
        if name.startswith("APPEND"):
            if container.kind != "list":
                raise ValueError("it appends to what is no list")
        else:
            fillable = container.kind == "result" and container.name in self.rules.fillable
            if container.kind != "dict" and not fillable:
                raise ValueError("it sets items of what is no dictionary")
            for key in items[::2]:
                self.check_key(key)
        return self.filled(container, items)


def check_pickle(
    data: bytes, rules: PickleRules, limits: Limits, source: str, start: int = 0
) -> CheckedPickle:
    """Walks the instructions of the pickle that begins at ``start`` without following any.

    Raises:
      RefusedError: An instruction, call, state or key that no such pickle needs.
      CheckpointError: It nests deeper than the limit.
      ValueError: It is damaged; also other exceptions that :mod:`pickletools` raises at damage.
    """
    walk = _Walk(rules, limits, source)
    stack, memo = walk.stack, walk.memo
    stream = io.BytesIO(data)
    stream.seek(start)
    place = start
    for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
        name, place = opcode.name, position or 0
        if count >= rules.most_opcodes:
            raise RefusedError(f"has more than {count:,} instructions. {rules.refusal}")
        if name not in rules.opcodes:
            raise RefusedError(f"asks for the instruction {name}. {rules.refusal}")
        if name in _SCALARS:
            short = isinstance(argument, str) and len(argument) <= _LONGEST_NAME
            stack.append(_SCALAR._replace(name=argument) if short else _SCALAR)
        elif name in _PUTS:
            number = len(memo) if argument is None else int(argument)
            if number > len(data):
                raise RefusedError(f"keeps a value as number {number:,}. {rules.refusal}")
            if not stack or stack[-1] is _MARK:
                raise ValueError("it keeps a value from an empty stack")
            memo[number] = stack[-1]
        elif name in _GETS:
            stack.append(memo[int(argument or 0)])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _EMPTY:
            stack.append(_EMPTY[name])
        elif name not in _WITHOUT_VALUE:
            below, above = walk.taken(opcode)
            if name != "STOP":
                stack.append(walk.made(name, argument, below, above))
    return CheckedPickle(place + 1, walk.foreign)
