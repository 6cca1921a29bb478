"""What is compared: a PyTorch module and an nnx module, and the table that says which of their
tensors and layers are the same."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flax_resblock.checkpoint.torch_file import from_numpy, state_to_numpy
from flax_resblock.config import Branch, Path
from flax_resblock.convert.codecs import AS_IS, OIHW_HWIO, TRANSPOSED, Codec
from flax_resblock.convert.state_map import Entry
from flax_resblock.errors import InputError, some
from flax_resblock.nn.variables import variable_at
from flax_resblock.parity.devices import JaxDevice, torch_products

Side = Literal["flax", "torch"]
"""One of the two frameworks that are compared."""


@dataclass(frozen=True)
class Precision:
    """A floating format as both frameworks are made to use it.

    Attributes:
      name: ``"float64"``, ``"float32"``, ``"tf32"`` or ``"bfloat16"``.
      storage: numpy dtype of parameters, statistics and images.
      compute: jax dtype that layers compute in where it is not ``storage``: in bfloat16 parameters
        and statistics stay in float32, as mixed-precision training has them (``torch.autocast`` on
        one side, ``dtype=`` of the layers on the other).
      epsilon: Distance from 1 to the next number.
      products: ``"tf32"`` where the operands of convolutions and products are rounded to TF32,
        gradients included; ``"ieee"`` elsewhere.
    """

    name: str
    storage: Any
    compute: Any
    epsilon: float
    products: str = "ieee"

    def of_jax(self) -> AbstractContextManager[Any]:
        """Within it jax computes in this precision and no less."""
        return jax.enable_x64(True) if self.name == "float64" else nullcontext()

    @contextmanager
    def on_jax(self, device: JaxDevice | None) -> Iterator[None]:
        """Within it jax computes on a device (None: its default), in this precision and no less,
        products included."""
        products = "default" if self.products == "tf32" else "highest"
        with self.of_jax(), jax.default_device(device), jax.default_matmul_precision(products):
            yield

    def of_torch(self, device: torch.device) -> AbstractContextManager[Any]:
        """Within it torch computes in this precision and no less."""
        if self.compute is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def on_torch(self) -> AbstractContextManager[Any]:
        """Within it torch computes products in this precision, in gradients too; :meth:`of_torch`
        is for the forward pass alone, as autocast is meant to be used."""
        return torch_products("tf32") if self.products == "tf32" else nullcontext()


_PRECISIONS = (
    Precision("float64", np.float64, None, 2.0**-52),
    Precision("float32", np.float32, None, 2.0**-23),
    Precision("tf32", np.float32, None, 2.0**-10, "tf32"),
    Precision("bfloat16", np.float32, jnp.bfloat16, 2.0**-7),
)
PRECISIONS: Mapping[str, Precision] = MappingProxyType({one.name: one for one in _PRECISIONS})


def dotted(path: Path) -> str:
    """``"stage1.0.conv1"`` of ``("stage1", 0, "conv1")``."""
    return ".".join(map(str, path))


def parse_path(name: str) -> Path:
    """The inverse of :func:`dotted`: numbers are indices of lists."""
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


class Pair(ABC):
    """One model in both frameworks.

    Attributes:
      entries: One row per tensor: its Flax path, its PyTorch key, the codec between the memory
        layouts.
      gradient_floor: Gradients of parameters are compared relative to themselves, or to this share
        of the largest one: that of a bias in front of a norm is zero but for rounding.
    """

    title: str
    entries: Sequence[Entry]
    gradient_floor: float = 0.0

    @property
    @abstractmethod
    def flax_slots(self) -> Mapping[str, Path]:
        """Attribute path of every layer to compare, by slot name, in forward order."""

    @property
    @abstractmethod
    def torch_slots(self) -> Mapping[str, str]:
        """Module name of the same layers."""

    @property
    def branches(self) -> Mapping[str, Branch]:
        """The branch of a residual block that a slot belongs to, for those where it is known."""
        return {}

    def name_of(self, entry: Entry) -> str:
        """The name of a tensor: the slot that holds it, a slash and its own."""
        path = entry.flax_path
        return f"{dotted(path[:-1])}/{path[-1]}".removeprefix("/")

    def specification(self) -> Pair | None:
        """A pair whose PyTorch side is known to be right, where there is one: a diagnosis then says
        which side is wrong."""
        return None

    @abstractmethod
    def torch(self, precision: Precision) -> torch.nn.Module:
        """A PyTorch module of our own with its tensors in ``precision.storage``."""

    @abstractmethod
    def flax(self, precision: Precision) -> nnx.Module:
        """An nnx module of our own with its tensors in ``precision.storage``; call it within
        ``precision.of_jax()``."""


def suspects(specification: Pair | None) -> tuple[Side, ...]:
    """The sides that may be wrong; without a specification, PyTorch's is taken to be right."""
    return ("flax",) if specification is None else ("flax", "torch")


Rows = Mapping[str, Any]
_CODECS = {codec.name: codec for codec in (AS_IS, OIHW_HWIO, TRANSPOSED)}
_CODECS |= {"conv": OIHW_HWIO, "linear": TRANSPOSED}


def entries_of(table: Rows) -> tuple[Entry, ...]:
    """The entries that a mapping table means.

    Args:
      table: PyTorch key to Flax path, ``{"net.0.weight": "layers.0.kernel"}``, numbers being
        indices of lists; where the name leaves the memory layout open, to ``(path, codec)`` with a
        codec of :mod:`flax_resblock.convert.codecs` or its name ``"conv"`` (OIHW to HWIO),
        ``"linear"`` (transposed), ``"as is"``. Without one, a Flax tensor called ``kernel`` is
        transposed if it has two axes and goes from OIHW to HWIO if it has four.
    Raises:
      InputError: A codec that does not exist.
    """
    entries = []
    for key, row in table.items():
        path, codec = (row, None) if isinstance(row, str) else row
        if isinstance(codec, str) and codec not in _CODECS:
            raise InputError(
                f"state_map[{key!r}] names the codec {codec!r}; known: {', '.join(_CODECS)}, "
                f"or a Codec of flax_resblock.convert.codecs."
            )
        codec = _CODECS[codec] if isinstance(codec, str) else codec or _GUESS
        entries.append(Entry(parse_path(path), key, codec, _role(key), ()))
    return tuple(entries)


_GUESS = Codec("by the number of axes")


def _role(key: str) -> str:
    name = key.rpartition(".")[2]
    return {"num_batches_tracked": "counter", "running_var": "variance"}.get(name, "weight")


class ModulePair(Pair):
    """Any PyTorch module and any nnx module, with a table that maps their tensors; see
    :func:`flax_resblock.parity.compare`.

    Args:
      torch_module, flax_module: Each is called with one array. Neither is modified.
      slots: Further layers to compare, slot name to ``(torch module name, Flax path)``; those that
        hold tensors are found by themselves.
      copy_weights: Give the Flax side PyTorch's tensors first; without it the two are compared as
        they are.
    Raises:
      InputError: A row that names what is not there, tensors that no row names, or shapes that
        differ.
    """

    def __init__(
        self,
        torch_module: torch.nn.Module,
        flax_module: nnx.Module,
        table: Rows,
        *,
        slots: Mapping[str, tuple[str, str]] | None = None,
        copy_weights: bool,
    ) -> None:
        self.title = f"{type(torch_module).__name__} against {type(flax_module).__name__}"
        self._torch, self._flax = torch_module, flax_module
        state = state_to_numpy(torch_module.state_dict())
        flat = nnx.to_flat_state(nnx.state(flax_module, nnx.Any(nnx.Param, nnx.BatchStat)))
        variables: dict[Any, Any] = dict(flat)
        self.entries = _checked(entries_of(table), state, variables)
        self._values: dict[Any, np.ndarray] = {}
        if copy_weights:
            self._values = {e.flax_path: e.codec.to_flax(state[e.torch_key]) for e in self.entries}
        extra = {name: (place, parse_path(path)) for name, (place, path) in (slots or {}).items()}
        layers = [(e.torch_key, e.flax_path[:-1]) for e in self.entries if len(e.flax_path) > 1]
        found = {dotted(path): (key.rpartition(".")[0], path) for key, path in layers}
        self._slots = {**found, **extra}
        places = dict(torch_module.named_modules())
        for name, (place, _) in self._slots.items():
            if place not in places:
                raise InputError(
                    f"slot {name!r} is said to be the PyTorch module {place!r}, which does not "
                    f"exist. There are: {some(list(places)[1:])}."
                )

    @property
    def flax_slots(self) -> Mapping[str, Path]:
        """Attribute path of every layer that holds a tensor of the table, and of those given as
        ``slots``."""
        return {name: path for name, (_, path) in self._slots.items()}

    @property
    def torch_slots(self) -> Mapping[str, str]:
        """Module name of the same layers."""
        return {name: place for name, (place, _) in self._slots.items()}

    def torch(self, precision: Precision) -> torch.nn.Module:
        """A copy in ``precision.storage``."""
        return copy.deepcopy(self._torch).to(from_numpy(np.zeros((), precision.storage)).dtype)

    def flax(self, precision: Precision) -> nnx.Module:
        """A copy in ``precision.storage``; layers that have a ``dtype`` compute in
        ``precision.compute``."""
        model = nnx.clone(self._flax)
        state = nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))
        for path, variable in nnx.to_flat_state(state):
            value = np.asarray(self._values.get(path, variable[...]))
            dtype = precision.storage if jnp.issubdtype(value.dtype, jnp.floating) else None
            variable_at(model, path).set_value(jnp.asarray(value, dtype))
        for _, module in nnx.iter_modules(model):
            if hasattr(module, "dtype"):
                module.dtype = precision.compute  # pyright: ignore[reportAttributeAccessIssue]
        return model


def _checked(
    entries: tuple[Entry, ...], state: Mapping[str, np.ndarray], variables: Mapping[Path, Any]
) -> tuple[Entry, ...]:
    """The entries with their codecs and shapes filled in, once they are known to fit both sides."""
    keys, paths = {entry.torch_key for entry in entries}, [entry.flax_path for entry in entries]
    problems = [f"PyTorch has no tensor {key!r}" for key in keys - set(state)]
    problems += [f"Flax has no variable {dotted(p)!r}" for p in set(paths) - set(variables)]
    problems += [f"two rows lead to {dotted(p)!r}" for p in set(paths) if paths.count(p) > 1]
    of_torch = [key for key in state if key not in keys and _role(key) != "counter"]
    problems += [f"no row names PyTorch's {key!r}" for key in of_torch]
    of_flax = [p for p in variables if p not in paths and p[-1] != "num_batches_tracked"]
    problems += [f"no row names Flax's {dotted(path)!r}" for path in of_flax]
    if problems:
        raise InputError(
            f"state_map does not pair the two modules: {some(sorted(problems))}. Every tensor "
            f"of both sides needs a row."
        )
    filled = []
    for entry in entries:
        there, shape = state[entry.torch_key].shape, tuple(variables[entry.flax_path][...].shape)
        codec = entry.codec
        if codec is _GUESS:
            codec = AS_IS
            if entry.flax_path[-1] == "kernel":
                codec = {2: TRANSPOSED, 4: OIHW_HWIO}.get(len(there), AS_IS)
        if codec.flax_shape(there) != shape:
            raise InputError(
                f"state_map[{entry.torch_key!r}]: PyTorch's {list(there)} is "
                f"{codec.flax_shape(there)} under the codec {codec.name!r}, but Flax's "
                f"{dotted(entry.flax_path)} is {list(shape)}. Map it to another tensor or give "
                f"the codec as a pair (path, codec)."
            )
        filled.append(Entry(entry.flax_path, entry.torch_key, codec, entry.role, shape))
    return tuple(filled)
