"""Writes the forward pass of a class: which values get a name, and which."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from flax_resblock.port.parts import Body
from flax_resblock.port.values import Code, Value, Writer, needed_values, source

INLINE = 60
"""Characters of the longest expression that is written inside another one."""
LONG = 3
"""Lists each of which holds one value more than the one before, for one list that grows."""
DEPTH = 4
"""Calls that are written inside one another."""

_LIST = re.compile(r"\[\{\d?\}(?:, \{\d?\})+\]")
_ITEM = re.compile(r"self\.(\w+)\[(\d+)\]\(\{\}\)")


def write(
    body: Body,
    values: Sequence[Value],
    outputs: Sequence[Value],
    in_training: Sequence[Value] = (),
) -> None:
    """Fills in the lines of ``__call__``.

    Args:
      body: Changed in place.
      values: In the order in which they are computed.
      outputs: What is returned.
      in_training: What is returned in training mode, if that is something else. What only one mode
        needs is computed in that mode alone.
    """
    outputs, in_training = ([source(one) for one in each] for each in (outputs, in_training))
    evaluated, trained = _reached(outputs), _reached(in_training or outputs)

    def branch(value: Value) -> int:
        """0 for what both modes need, 1 for evaluation mode, 2 for training mode."""
        several = [value, *(value.items or ())]
        if any(one in evaluated for one in several):
            return 0 if any(one in trained for one in several) else 1
        return 2

    order, added = _growing_lists(sorted(_needed(values, [*outputs, *in_training]), key=branch))
    loops = _loops(order, body)
    order = [value for value in order if value not in loops or loops[value]]
    last_use: dict[Value, int] = {}
    alone = [each[0] for each in (outputs, in_training) if len(each) == 1]
    named = [
        one
        for one in order
        if _needs_name(one, returned=one in alone) or one in loops or one in added
    ]
    place_of = {value: place for place, value in enumerate(named)}
    start, middle = (sum(branch(value) <= last for value in named) for last in (0, 1))

    def roots(code: Code) -> list[Value]:
        found: list[Value] = []
        for value in needed_values(code):
            if value.name is not None or value in place_of:
                found.append(value)
            else:
                found += roots(value.code)
        return found

    for place, value in enumerate(named):
        for one in roots(value.code):
            last_use[one] = place
    for end, several in ((middle, outputs), (len(named), in_training)):
        for one in several:
            kept = [one] if one in place_of or one.name is not None else roots(one.code)
            last_use.update({root: max(end, last_use.get(root, 0)) for root in kept})
    taken = {*body.arguments}
    writer = Writer()
    spare: dict[Value, str | None] = {}

    def assign(place: int, value: Value) -> None:
        operands = [one for one in roots(value.code) if last_use[one] == place and one.plain]
        text = writer.text(value.code) if value not in loops else ""
        if value in added:
            body.lines.append(f"{added[value].name}.append({text})")
            return
        names = [spare.get(one, one.name) for one in operands]
        again = next((one for one in names if one in (*body.arguments, value.hint)), None)
        if value.items is not None:  # a variable holds arrays or a list of them, not both
            spare[value], again = again, None
        value.name = again or _unique(value.hint, taken)
        taken.add(value.name or "")
        value.plain = True
        if value in loops:
            attribute, start = loops[value] or ("", value)
            if start.name != value.name:
                body.lines.append(f"{value.name} = {start.name or writer.text(start.code)}")
            body.lines.append(f"for {_singular(attribute)} in self.{attribute}:")
            body.lines.append(f"    {value.name} = {_singular(attribute)}({value.name})")
        else:
            body.lines.append(f"{value.name} = {text}")

    def returned(result: str, several: Sequence[Value]) -> str:
        return "return " + result.format(*(writer.text(Code("{}", (one,))) for one in several))

    for place, value in enumerate(named[:start]):
        assign(place, value)
    if in_training:
        before = len(body.lines)
        for place, value in enumerate(named[start:middle], start):
            assign(place, value)
        body.lines.append(returned(body.result, outputs))
        branch_lines = [f"    {line}" for line in body.lines[before:]]
        body.lines[before:] = ["if self.deterministic:", *branch_lines]
        for place, value in enumerate(named[middle:], middle):
            assign(place, value)
        body.lines.append(returned(body.training_result, in_training))
    else:
        body.lines.append(returned(body.result, outputs))
    body.constants = writer.constants


def _reached(outputs: Sequence[Value]) -> set[Value]:
    """The values that these depend on, and they themselves."""
    found, stack = set(), list(outputs)
    while stack:
        value = stack.pop()
        if value not in found:
            found.add(value)
            stack += needed_values(value.code)
    return found


def _needed(values: Sequence[Value], outputs: Sequence[Value]) -> list[Value]:
    """The values that the outputs depend on, in order, with their uses counted."""
    wanted = _reached(outputs)
    for one in [*outputs, *(one for value in wanted for one in needed_values(value.code))]:
        one.uses += 1
    return [value for value in values if value in wanted]


def _needs_name(value: Value, *, returned: bool) -> bool:
    """Whether a value is assigned to a variable instead of being written where it is used.

    Args:
      value: Its ``depth`` and ``assigned`` are set.
      returned: Whether it is all that is returned.
    """
    if value.name is not None or (returned and value.uses == 1):
        return False
    value.depth = 1 + max((one.depth for one in needed_values(value.code)), default=0)
    length = len(Writer().text(value.code))
    if value.uses > 1 or length > INLINE or value.depth > DEPTH:
        value.depth, value.assigned = 0, True
        return True
    return False


def _growing_lists(order: Sequence[Value]) -> tuple[list[Value], dict[Value, Value]]:
    """Finds values each of which is computed from a list of those before it, as in a dense block.

    Returns:
      The values with those lists among them, and the list that each such value is added to.
    """
    rows: list[tuple[tuple[Value, ...], list[Value]]] = []
    following: dict[tuple[Value, ...], list[Value]] = {}
    place: dict[Value, tuple[re.Match[str], int]] = {}
    for value in order:
        match = _LIST.search(value.code.text)
        if match is None:
            continue
        place[value] = match, value.code.text[: match.start()].count("{")
        first, count = place[value][1], match[0].count("{")
        items = tuple(map(source, value.code.holes[first : first + count]))
        if items not in following:
            rows.append((items, []))
            following[items] = rows[-1][1]
        row = following.pop(items)
        row.append(value)
        following[*items, value] = row
    order, added = list(order), {}
    for items, row in rows:
        alone = all(one.uses == len(row) - k for k, one in enumerate(row[:-1], 1))
        if len(row) < LONG or not alone:
            continue
        text = ", ".join("{}" for _ in items)
        whole = Value(Code(f"[{text}]", items), (), (), "features", items=list(row), uses=len(row))
        for value in row:
            match, first = place[value]
            text = value.code.text[: match.start()] + "{}" + value.code.text[match.end() :]
            holes = list(value.code.holes)
            holes[first : first + match[0].count("{")] = [whole]
            value.code = Code(text, tuple(holes), value.code.binding)
        for one in items:
            one.uses -= len(row) - 1
        order.insert(order.index(row[0]), whole)
        added |= dict.fromkeys(row[:-1], whole)
    return order, added


def _loops(order: Sequence[Value], body: Body) -> dict:
    """Chains of calls through a whole list: the last of them, with the list and the input.

    Those in between are there too, with None.
    """
    found: dict = {}
    chains: dict[str, list[Value]] = {}
    for value in order:
        match = _ITEM.fullmatch(value.code.text)
        if match is None:
            continue
        chain = chains.setdefault(match[1], [])
        if int(match[2]) == len(chain) and (not chain or value.code.holes == (chain[-1],)):
            chain.append(value)
        else:
            chain.append(value)
            chains[match[1]] = [*chain, value]  # not in a row
    for attribute, chain in chains.items():
        part = body.parts.get(attribute)
        items = getattr(part, "items", {})
        row = len(chain) == len(items) > 1 and all(
            later.code.holes == (earlier,) and earlier.uses == 1
            for earlier, later in pairwise(chain)
        )
        if row:
            found.update(dict.fromkeys(chain[:-1]))
            start = chain[0].code.holes[0]
            found[chain[-1]] = (attribute, start)
            chain[-1].code = Code("{}", (start,))
    return found


def _unique(hint: str, taken: set[str]) -> str:
    name, number = hint, 1
    while name in taken:
        number += 1
        name = f"{hint}{number}"
    return name


def _singular(attribute: str) -> str:
    """``layer`` for ``layers``."""
    return attribute[:-1] if attribute.endswith("s") and len(attribute) > 2 else f"each_{attribute}"
