"""Runs a PyTorch module and what it was ported to side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flax_resblock.checkpoint.torch_file import state_to_numpy
from flax_resblock.config import Path
from flax_resblock.cpu.switch import conv_lowering
from flax_resblock.errors import InputError
from flax_resblock.nn.stochastic import StochasticDepth
from flax_resblock.nn.variables import flat_arrays
from flax_resblock.parity.module_run import randomise
from flax_resblock.parity.oracle import TRAJECTORY_LIMIT, verdict_of
from flax_resblock.parity.pair import PRECISIONS, Precision
from flax_resblock.parity.taps import Trace, as_tensor, trace_flax, trace_torch
from flax_resblock.port.network import PortedNetwork, filled

BATCH = 3

QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Options of a compiler that is run more often than what it makes."""

STEPS, RATE = 5, 1e-3

FLOOR = 1e-2
"""Gradients are compared relative to themselves, or to this share of the largest of their kind:
that of a bias in front of a norm is zero but for rounding."""


@dataclass(frozen=True)
class Proof:
    """What was measured.

    Attributes:
      figures: The largest error and its place, by precision and quantity.
      fixed_size: Why the network is right for one size of images only; empty if it is for others.
      notes: What was not compared.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    fixed_size: str = ""
    notes: list[str] = field(default_factory=list)


def prove(
    module: torch.nn.Module,
    ported: PortedNetwork,
    slots: Mapping[str, Path],
    *,
    exact: bool,
) -> Proof:
    """Compares a module with what it was ported to, with the module's weights made random.

    A weight of zero hides everything that is multiplied by it, so the weights of the user's own
    are not enough. Random layers are switched off.

    Args:
      module: In evaluation mode and float32; changed.
      ported: Its source and table.
      slots: Paths of the layers in the Flax model, by their names in PyTorch.
      exact: Train for some steps as well.
    Raises:
      InputError: They differ.
    """
    run = _Runs(module, ported, slots)
    images = _images(channels_of(module), ported.image_size)
    proof = Proof()
    precision = PRECISIONS["float64" if run.is_wide(images) else "float32"]
    if precision.name == "float32":
        proof.notes.append("your module does not compute in float64; it was compared in float32")
    run.compare(proof, images, precision, train=False)
    run.compare(proof, images, precision, train=True)
    if exact:
        run.compare_steps(proof, images, precision)
    why = run.compare_in_float32(proof, images)
    return Proof(proof.figures, why, proof.notes)


def channels_of(module: torch.nn.Module) -> int:
    """Channels of the images that a module takes: those of its first convolution."""
    for part in module.modules():
        if isinstance(part, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            return part.in_channels
    return 3


def _images(channels: int, size: tuple[int, int]) -> np.ndarray:
    """Random images ``(N, H, W, C)`` whose channels have different means."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((BATCH, *size, channels))
    return images + np.linspace(-1, 2, channels)


class _Flat(nnx.Module):
    """The network with everything that it returns in one array, in PyTorch's order."""

    def __init__(self, net: Any, count: int | None = None) -> None:
        self.net, self.count = net, count

    def __call__(self, x: jax.Array) -> jax.Array:
        parts = list(leaves(self.net(x)))[: self.count]
        return jnp.concatenate(
            [jnp.moveaxis(one, -1, 1).reshape(one.shape[0], -1) for one in parts], axis=-1
        )


class _FlatTorch(torch.nn.Module):
    """The module with everything that it returns in one tensor."""

    def __init__(self, net: torch.nn.Module, count: int | None = None) -> None:
        super().__init__()
        self.net, self.count, self.found = net, count, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [one for one in leaves(self.net(x)) if isinstance(one, torch.Tensor)]
        self.found = len(parts)
        return torch.cat([one.flatten(1) for one in parts[: self.count]], dim=-1)


def leaves(result: Any) -> Iterator[Any]:
    """The arrays of a result, in order."""
    if isinstance(result, Mapping):
        result = list(result.values())
    if isinstance(result, tuple | list):
        for one in result:
            yield from leaves(one)
    elif result is not None:
        yield result


class _Runs:
    """The module and the ported network, with the same random weights."""

    def __init__(
        self, module: torch.nn.Module, ported: PortedNetwork, slots: Mapping[str, Path]
    ) -> None:
        self.module, self.ported = module, ported
        _switch_off(module)
        randomise(module)
        self.torch_slots = {name: f"net.{name}" for name in slots}
        self.flax_slots = {name: ("net", *path) for name, path in slots.items()}
        self.count = self._outputs(ported.image_size)

    def torch(self, images: np.ndarray, precision: Precision, **options: Any) -> Trace:
        """What the module computes."""
        flat = _FlatTorch(self._cast(precision), self.count)
        with _no_functional_dropout(), torch.enable_grad():
            return trace_torch(flat, images, self.torch_slots, precision=precision, **options)

    def flax(self, images: np.ndarray, precision: Precision, **options: Any) -> Trace:
        """What the ported network computes, compiled in a hurry, as it runs once."""
        with precision.on_jax(None):
            flat = _Flat(self._filled(precision), self.count)
        options |= {"precision": precision, "options": QUICKLY}
        with conv_lowering("xla"):
            return trace_flax(flat, images, self.flax_slots, **options)

    def _filled(self, precision: Precision) -> nnx.Module:
        state = state_to_numpy(self._cast(precision).state_dict())
        model = filled(self.ported.network, self.ported.table.to_flax(state))
        for _, part in nnx.iter_modules(model):
            if isinstance(part, nnx.Dropout | StochasticDepth):
                part.rate = 0.0
        return model

    def _cast(self, precision: Precision) -> torch.nn.Module:
        dtype = torch.float64 if precision.name == "float64" else torch.float32
        return copy.deepcopy(self.module).to(dtype)

    def compare(
        self, proof: Proof, images: np.ndarray, precision: Precision, *, train: bool
    ) -> None:
        """Compares outputs and activations; in training mode statistics and gradients too."""
        if train and not self._trains(images, proof):
            return
        single = precision.name == "float32"
        options: dict[str, Any] = {"train": train}
        exact = PRECISIONS["float64"]
        truth = self.torch(images, exact, **options)
        if train:
            rng = np.random.default_rng(1)
            options["cotangent"] = rng.standard_normal(truth.output.shape)
            truth = self.torch(images, exact, **options)
        theirs = self.torch(images, precision, **options) if single else truth
        ours = self.flax(images, precision, **options)
        mode = "training" if train else "evaluation"
        for quantity, rows in self._rows(truth, theirs, ours, train).items():
            worst, place = 0.0, ""
            largest = max(float(np.linalg.norm(row[1])) for row in rows)
            floor = FLOOR * largest if quantity == "gradients" else 0.0
            for name, true, torch_value, value in rows:
                error, own = _error(value, true, floor), _error(torch_value, true, floor)
                verdict = verdict_of(error, own, precision.epsilon)
                if not verdict.passed:
                    raise InputError(self._difference(mode, quantity, name, error, verdict.limit))
                if error >= worst:
                    worst, place = error, name
            proof.figures[f"{precision.name} {mode} {quantity}"] = {
                "error": worst, "place": place, "tensors": len(rows),
            }  # fmt: skip

    def _rows(self, truth: Trace, theirs: Trace, ours: Trace, train: bool) -> dict[str, list[Any]]:
        shared = [name for name in truth.activations if name in ours.activations]
        rows: dict[str, list[Any]] = {
            "output": [("output", truth.output, theirs.output, ours.output)],
            "activations": [
                (name, truth.activations[name], theirs.activations[name], ours.activations[name])
                for name in shared
            ],
        }
        rows |= {"running statistics": [], "gradients": []}
        for one in self.ported.table.tensors:
            key, path = f"net.{one.key}", ("net", *(one.path or ()))
            of_both = (
                ("running statistics", truth.statistics, theirs.statistics, ours.statistics),
                ("gradients", truth.gradients, theirs.gradients, ours.gradients),
            )
            for quantity, true, torch_values, values in of_both:
                if key in true and path in values and true[key].dtype.kind == "f":
                    value = one.codec.to_torch(values[path])
                    rows[quantity].append((one.key, true[key], torch_values[key], value))
        if not train:
            del rows["running statistics"]
        if truth.input_gradient is not None:
            values = truth.input_gradient, theirs.input_gradient, ours.input_gradient
            rows["gradient of the input"] = [("images", *values)]
        return {quantity: one for quantity, one in rows.items() if one}

    def _outputs(self, size: tuple[int, int]) -> int:
        """How many tensors the module returns in evaluation mode."""
        flat = _FlatTorch(self.module)
        with torch.no_grad():
            flat(as_tensor(_images(channels_of(self.module), size), PRECISIONS["float32"]))
        return flat.found

    def _trains(self, images: np.ndarray, proof: Proof) -> bool:
        """Whether the module runs in training mode, and what it returns there."""
        flat = _FlatTorch(copy.deepcopy(self.module).train())
        try:
            with torch.no_grad(), _no_functional_dropout():
                flat(as_tensor(images, PRECISIONS["float32"]))
        except Exception as error:  # whatever the user's code raises
            said = str(error).strip().splitlines()
            note = f"training mode was not compared: the module raises there ({said[:1]})"
            proof.notes.append(note)
            return False
        if flat.found != self.count:
            note = (
                f"in training mode the module returns {flat.found} tensors instead of "
                f"{self.count}; the ported network returns those of evaluation mode"
            )
            if note not in proof.notes:
                proof.notes.append(note)
        return True

    def _difference(self, mode: str, quantity: str, name: str, error: float, limit: float) -> str:
        what = f"{quantity} of {name}" if name not in ("output", "images") else f"the {quantity}"
        because = (
            " Its forward pass does something else when module.training is set, which is not "
            "ported; only batch norm and dropout may differ."
            if mode == "training"
            else " Please report it with the module's code; nothing was written."
        )
        return (
            f"{self.ported.origin} cannot be ported: in {mode} mode {what} differs by {error:.1e} "
            f"(relative), the limit is {limit:.1e}.{because}"
        )

    def is_wide(self, images: np.ndarray) -> bool:
        """Whether the module computes in float64: a cast in its code may keep it from that."""
        flat = _FlatTorch(self._cast(PRECISIONS["float64"]))
        try:
            with torch.no_grad():
                return flat(as_tensor(images, PRECISIONS["float64"])).dtype == torch.float64
        except Exception:  # whatever the user's code raises
            return False

    def compare_in_float32(self, proof: Proof, images: np.ndarray) -> str:
        """Compares in evaluation mode and float32, with images of another size if there is one
        that the module takes.

        Returns:
          Why the network is right for images of one size only; empty if it is for others.
        """
        channels, (height, width) = channels_of(self.module), self.ported.image_size
        for other in ((height + 33, width + 32), (height + 32, width + 64)):
            others = _images(channels, other)
            try:
                self.torch(others, PRECISIONS["float32"])
            except Exception:  # the module does not take this size
                continue
            try:
                self.compare(proof, others, PRECISIONS["float32"], train=False)
                return ""
            except InputError:
                why = f"its code has numbers that follow from the size, and differs at {other}"
            except Exception as error:  # of jax: shapes that do not fit
                why = f"the written code raises {type(error).__name__} at {other}"
            break
        else:
            why = "the module takes no other size that was tried"
        self.compare(proof, images, PRECISIONS["float32"], train=False)
        return why

    def compare_steps(self, proof: Proof, images: np.ndarray, precision: Precision) -> None:
        """Compares weights and statistics after some steps of SGD with momentum."""
        rng = np.random.default_rng(2)
        batches = [images + 0.1 * rng.standard_normal(images.shape) for _ in range(STEPS)]
        module = _FlatTorch(self._cast(precision), self.count).train()
        with _no_functional_dropout(), torch.enable_grad():
            targets = rng.standard_normal(tuple(module(as_tensor(images, precision)).shape))
            module = _FlatTorch(self._cast(precision), self.count).train()
            optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=0.9)
            for batch in batches:
                optimizer.zero_grad()
                goal = torch.from_numpy(targets)
                torch.mean((module(as_tensor(batch, precision)) - goal) ** 2).backward()
                optimizer.step()
        state = {name.removeprefix("net."): value for name, value in module.state_dict().items()}
        truth = self.ported.table.to_flax(state_to_numpy(state))
        with precision.on_jax(None), conv_lowering("xla"):
            model = _Flat(self._filled(precision), self.count)
            model.train()
            arrays = _trained(model, batches, targets, precision)
        limit = TRAJECTORY_LIMIT if precision.name == "float64" else 1e-2
        largest = max(float(np.linalg.norm(value)) for value in truth.values())
        errors = {
            ".".join(map(str, path)): _error(arrays["net", *path], value, FLOOR * largest)
            for path, value in truth.items()
            if value.dtype.kind == "f"
        }
        place = max(errors, key=lambda name: errors[name])
        quantity = f"weights after {STEPS} steps"
        if not errors[place] <= limit:
            raise InputError(self._difference("training", quantity, place, errors[place], limit))
        proof.figures[f"{precision.name} {quantity} of SGD"] = {
            "error": errors[place], "place": place, "tensors": len(errors),
        }  # fmt: skip


def _trained(
    model: nnx.Module, batches: Sequence[np.ndarray], targets: np.ndarray, precision: Precision
) -> dict[Any, np.ndarray]:
    """Every array of a model after a step of SGD with momentum for each batch."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def step(params: Any, rest: Any, momentum: Any, images: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            module: Any = nnx.merge(graphdef, params, rest, copy=True)
            value = jnp.mean((module(images) - targets) ** 2)
            return value, nnx.state(module, nnx.Not(nnx.Param))

        gradients, rest = jax.grad(loss, has_aux=True)(params)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradients)
        return jax.tree.map(lambda p, m: p - RATE * m, params, momentum), rest, momentum

    momentum = jax.tree.map(jnp.zeros_like, params)
    compiled = jax.jit(step, compiler_options=QUICKLY)
    for batch in batches:
        params, rest, momentum = compiled(
            params, rest, momentum, jnp.asarray(batch, precision.storage)
        )
    return flat_arrays(nnx.merge(graphdef, params, rest))


def _error(value: Any, truth: Any, floor: float = 0.0) -> float:
    value, truth = np.asarray(value, np.float64), np.asarray(truth, np.float64)
    if value.shape != truth.shape or not np.isfinite(value).all():
        return float("inf") if not np.array_equal(value, truth, equal_nan=True) else 0.0
    distance = float(np.linalg.norm(value - truth))
    scale = max(float(np.linalg.norm(truth)), floor)
    return 0.0 if distance == 0 else distance / scale if scale else float("inf")


def _switch_off(module: torch.nn.Module) -> None:
    """Sets the rates of random layers to zero."""
    for part in module.modules():
        kind = type(part).__name__
        for name in ("p", "drop_prob", "rate"):
            value = getattr(part, name, None)
            random = "Drop" in kind or "StochasticDepth" in kind
            if random and isinstance(value, float):
                setattr(part, name, 0.0)


@contextmanager
def _no_functional_dropout() -> Iterator[None]:
    """Within it ``F.dropout`` and its kin return their input."""
    functional = torch.nn.functional
    names = (
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_alpha_dropout",
    )
    before = {name: getattr(functional, name) for name in names}
    for name in names:
        setattr(functional, name, lambda input, *_, **__: input)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(functional, name, function)
