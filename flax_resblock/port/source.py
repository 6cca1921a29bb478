"""Prints the classes of a network as Python."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_resblock.port.arguments import (
    EmittedClass,
    Written,
    argument_names,
    default_of,
)  # fmt: skip
from flax_resblock.port.axes import Order, Shape
from flax_resblock.port.parts import (
    ContainerPart,
    LayerPart,
    ModulePart,
    ParameterPart,
    Part,
)
from flax_resblock.port.values import BATCH

_CONSTANT = re.compile(r"\x01(\d+)\x02")
_LEAF = re.compile(r"\{\}|\bNone\b")


def source_of(
    classes: Sequence[EmittedClass], title: str, fixed_sizes: Sequence[tuple[int, ...]] = ()
) -> str:
    """The file.

    Args:
      classes: Each behind those that it uses.
      title: The first line of its docstring.
      fixed_sizes: The only size of each input that the network is right for; empty: any.
    """
    text = "\n\n".join(
        _class(one, last=one is classes[-1], sizes=fixed_sizes if one is classes[-1] else ())
        for one in classes
    )
    lines = [f'"""{title}"""', "", "from __future__ import annotations", ""]
    if "Callable[" in text:
        lines += ["from collections.abc import Callable"]
    if "partial(" in text:
        lines += ["from functools import partial"]
    lines += ([""] if lines[-1] else []) + ["import jax"]
    if "jnp." in text:
        lines += ["import jax.numpy as jnp"]
    lines += ["from flax import nnx", "", "from flax_resblock import nn", "", ""]
    return formatted("\n".join(lines) + text + "\n")


def formatted(text: str) -> str:
    """As ruff formats it; as it is where there is no ruff."""
    beside = shutil.which("ruff", path=str(Path(sys.executable).parent)) or shutil.which("ruff")
    if beside is None:
        return text
    command = [beside, "format", "--quiet", "--line-length", "100", "--isolated", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else text


def in_docstring(text: str) -> str:
    """Text from outside, such as a path, without what ends or escapes a docstring."""
    return text.replace("\\", "/").replace('"', "'")


def _class(made: EmittedClass, *, last: bool, sizes: Sequence[tuple[int, ...]]) -> str:
    body = made.main
    kept = _kept(made)
    arguments = ", ".join(
        f"{name}: {_type(values)}"
        + (f" = {made.defaults[name]!r}" if name in made.defaults else "")
        for name, values in made.arguments.items()
    )
    arguments = f"self, {arguments}, *, rngs: nnx.Rngs" if arguments else "self, *, rngs: nnx.Rngs"
    parent = "nn.Sequential" if body.sequence is not None else "nnx.Module"
    lines = [f"class {made.name}({parent}):", f'    """{_summary(made, last)}"""', ""]
    if body.sequence is not None:
        items = ", ".join(_items(made, body.sequence, ()))
        lines += [f"    def __init__({arguments}) -> None:", f"        super().__init__({items})"]
        return "\n".join(lines) + "\n"
    inner = [f"self.{name} = {name}" for name in kept]
    if body.training_result:
        inner.insert(0, "self.deterministic = False  # set by eval(), cleared by train()")
    for name, part in body.parts.items():
        built = _built(made, part, (name,))
        if name in made.conditions:
            built += f" if {made.conditions[name]} else nn.identity"
        inner.append(f"self.{name} = {built}")
    inner += [f"{target} = {value}" for target, value in body.ties]
    if inner:
        lines += [f"    def __init__({arguments}) -> None:"]
        lines += [f"        {line}" for line in inner] + [""]
    elif last:  # the network is created with rngs
        lines += ["    def __init__(self, *, rngs: nnx.Rngs | None = None) -> None:"]
        lines += ['        """Has no parameters."""', ""]
    kind = "list[jax.Array]" if body.list_input else "jax.Array"
    parameters = ", ".join(f"{name}: {kind}" for name in body.arguments)
    results = dict.fromkeys(map(_returned, filter(None, (body.result, body.training_result))))
    lines += [f"    def __call__(self, {parameters}) -> {' | '.join(results)}:"]
    lines += [f'        """{_shapes(made)}"""']

    for name, size in zip(body.arguments, sizes, strict=False):
        found, shown = f"{name}.shape[1:{1 + len(size)}]", "x".join(map(str, size))
        what = "images" if len(size) == 2 else "signals"
        if size:
            lines += [f"        if {found} != {size}:"]
            text = f"ported for {what} of {shown}, not {{{found}}}"
            lines += [f'            raise ValueError(f"{text}")']

    def constant(match: re.Match[str]) -> str:
        slot = (match[0], body.constants[int(match[1])].hint)
        name = made.names.get(slot)
        return f"self.{name}" if name else repr(made.literal(slot))

    lines += [f"        {_CONSTANT.sub(constant, line)}" for line in body.lines]
    return "\n".join(lines) + "\n"


def _summary(made: EmittedClass, last: bool) -> str:
    cls = made.main.cls
    if last:
        return f"``{cls.__qualname__}`` of ``{cls.__module__}``, with channels last."
    return f"``{cls.__qualname__}`` of ``{cls.__module__}``."


def _type(values: Sequence[Any]) -> str:
    kinds = []
    for value in values:
        kind = "float" if isinstance(value, float) else type(value).__name__
        if isinstance(value, Written):
            kind = "Callable[[jax.Array], jax.Array]"
        if isinstance(value, tuple):
            kind = f"tuple[{', '.join(_type([one]) for one in value)}]"
        kind = "None" if value is None else kind
        if kind not in kinds:
            kinds.append(kind)
    if set(kinds) == {"int", "float"}:
        kinds = ["float"]
    return " | ".join(sorted(kinds, key=lambda kind: kind == "None"))


def _returned(result: str) -> str:
    """The type of a result with a hole for every tensor."""
    kinds = ["None" if one == "None" else "jax.Array" for one in _LEAF.findall(result)]
    if result.startswith("{{"):
        return f"dict[str, {' | '.join(dict.fromkeys(kinds))}]"
    return kinds[0] if result == "{}" else f"tuple[{', '.join(kinds)}]"


def _shapes(made: EmittedClass) -> str:
    """``(N, H, W, in_channels)`` to ``(N, H, W, out_channels)``."""
    count = len(made.main.input_shapes)
    if made.main.list_input:
        return "Takes a list of arrays."
    seen: list[dict[tuple[int, ...], None]] = [{}, {}]
    inputs = [
        _shape(made, [body.input_shapes[i] for body in made.bodies], seen) for i in range(count)
    ]

    def shown(*outputs: Sequence[tuple[Shape, Order]]) -> str:
        """The shapes of what each instance returns."""
        return ", ".join(
            _shape(made, [tuple(shape[axis] for axis in order) for shape, order in one], seen)
            for one in zip(*outputs, strict=True)
        )

    text = f"{', '.join(inputs)} to {shown(*(body.outputs for body in made.bodies))}"
    if made.main.training_result and made.main.training_outputs != made.main.outputs:
        text += f"; in training mode to {shown(made.main.training_outputs)}"
    return f"{text[0].upper()}{text[1:]}."


def _shape(
    made: EmittedClass,
    shapes: Sequence[tuple[int, ...]],
    seen: Sequence[dict[tuple[int, ...], None]],
) -> str:
    """``(N, H', W', out_channels)``: each height and width that differs has a mark more.

    Args:
      shapes: Of one array in each instance.
      seen: The heights, and the widths, of the arrays before; changed.
    """
    if len({len(shape) for shape in shapes}) > 1:
        return "an array"
    sizes = []
    for axis, values in enumerate(zip(*shapes, strict=True)):
        if values[0] % BATCH == 0:
            sizes.append("N" if values[0] == BATCH else f"{values[0] // BATCH} N")
        elif len(shapes[0]) == 4 and axis in (1, 2) and {*values} != {1}:
            known = seen[axis - 1]
            known.setdefault(values)
            sizes.append("HW"[axis - 1] + "'" * list(known).index(values))
        elif len(set(values)) == 1:
            sizes.append(str(values[0]))
        else:
            same = [name for name, known in made.arguments.items() if tuple(known) == values]
            sizes.append(same[0] if same else "C")
    return f"``({', '.join(sizes)})``"


# Constructors


def _kept(made: EmittedClass) -> list[str]:
    """The numbers that the forward pass asks for, and the constructor takes."""
    if made.main.sequence is not None:
        return []
    return sorted({name for slot, name in made.names.items() if "\x01" in str(slot[0])})


def _number(made: EmittedClass, slot: tuple[Any, ...]) -> str:
    return made.names.get(slot) or repr(made.literal(slot))


def _built(made: EmittedClass, part: Part, path: tuple[Any, ...]) -> str:
    """The expression that builds a part."""
    if isinstance(part, LayerPart):
        return _layer(made, part, path)
    if isinstance(part, ParameterPart):
        return _parameter(made, part, path)
    if isinstance(part, ModulePart):
        emitted: EmittedClass = part.body.group
        texts = []
        for name in emitted.arguments:
            slot = (*path, name)
            text = _number(made, slot)
            if name in emitted.defaults:
                if slot not in made.names and made.literal(slot) == emitted.defaults[name]:
                    continue
                text = f"{name}={text}"
            texts.append(text)
        main = emitted.main
        made_of = main.sequence, main.parts, main.ties, _kept(emitted)
        return f"{emitted.name}({', '.join([*texts, 'rngs=rngs'] if any(made_of) else texts)})"
    items = _items(made, part, path)
    if part.kind == "Sequential":
        return f"nn.Sequential({', '.join(items)})"
    if part.kind == "Dict":
        pairs = ", ".join(f"{key!r}: {text}" for key, text in zip(part.items, items, strict=True))
        return f"nnx.Dict({{{pairs}}})"
    if len(items) == 1 and items[0].startswith("*["):
        return f"nnx.List({items[0][1:]})"
    return f"nnx.List([{', '.join(items)}])"


def _items(made: EmittedClass, part: ContainerPart, path: tuple[Any, ...]) -> list[str]:
    texts = [_built(made, item, (*path, key)) for key, item in part.items.items()]
    if part.kind == "Dict":
        return texts
    rows: list[tuple[str, int]] = []
    for text in texts:
        if rows and rows[-1][0] == text:
            rows[-1] = (text, rows[-1][1] + 1)
        else:
            rows.append((text, 1))
    return [
        one
        for text, count in rows
        for one in ([f"*[{text} for _ in range({count})]"] if count > 2 else [text] * count)
    ]


def _layer(made: EmittedClass, part: LayerPart, path: tuple[Any, ...]) -> str:
    layer = part.layer
    if not layer.stateful:
        return _number(made, (*path, "function"))
    names = argument_names(layer.call)
    first = names[: len(layer.positional)]
    texts = [_number(made, (*path, name)) for name in first]
    options = dict.fromkeys(
        str(slot[-1])
        for one in made.slots
        for slot in one
        if slot[:-1] == path and slot[-1] not in first
    )
    for name in options:
        slot = (*path, name)
        if slot in made.names or made.literal(slot) != default_of(layer.call, name):
            texts.append(f"{name}={_number(made, slot)}")
    return f"{layer.call}({', '.join([*texts, 'rngs=rngs'])})"


def _parameter(made: EmittedClass, part: ParameterPart, path: tuple[Any, ...]) -> str:
    sizes = [_number(made, (*path, place)) for place in range(len(part.shape))]
    shape = f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"
    kind = "nnx.Param" if part.trained else "nnx.BatchStat"
    return f"{kind}({part.initial.format(shape)})"
