"""Runs a user's own PyTorch module and compares it with the Flax network built from it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flax_resblock.checkpoint.unwrap import unwrap
from flax_resblock.config import Config, ResNetConfig, name_of
from flax_resblock.convert.opening import OpenedCheckpoint
from flax_resblock.cpu.switch import compiler_options, for_cpu
from flax_resblock.errors import InputError, some, visible
from flax_resblock.nn.resnet import Model, ResNet, build
from flax_resblock.nn.variables import variable_at
from flax_resblock.parity.module_run import global_state_kept, inner, randomise, runnable
from flax_resblock.parity.oracle import FLOAT64_LIMIT, relative_l2, verdict_of
from flax_resblock.parity.taps import as_array

Size = tuple[int, int]
"""Height and width of images."""

SIZES: tuple[Size, ...] = ((32, 32), (64, 64), (224, 224))
"""Sizes of the images, in the order in which they are tried."""

BATCH = 2

CAUSES = (
    "another activation function, a pooling layer called in forward, another head (such as global "
    "max pooling or a final softmax), a missing shortcut, pre-activation order (norm and ReLU "
    "before the convolution), other padding"
)

WHY_RANDOM = "as its own (zero or not finite somewhere, for example) hide the difference"

Values = Mapping[Any, np.ndarray]
"""Flax arrays by attribute path."""


@dataclass(frozen=True)
class ForwardFigures:
    """How far a module and the Flax network built from it agree, with the module's own weights.

    Attributes:
      size: Of the images.
      float32: Relative L2 error of the Flax network against the module in float64.
      float64: Relative L2 difference of the two in float64; None for a module that does not run in
        it, or where nobody asked.
      elsewhere: Where the module runs on images of an odd size too and computes something else
        there, a sentence on that.
    """

    size: Size
    float32: float
    float64: float | None
    elsewhere: str = ""


def check_forward(
    module: Any,
    source: OpenedCheckpoint,
    values_of: Callable[[Mapping[str, Any]], Values],
    *,
    eps: float,
    sizes: Sequence[Size] = SIZES,
    wide: bool = False,
    odd: bool = False,
) -> ForwardFigures:
    """Raises InputError unless a module computes what the Flax network built from it computes.

    The module is run in evaluation mode and float32 on the CPU, on random images, first with its
    own weights and then with random ones, because a weight of zero hides everything that is
    multiplied by it. Its output is held to :func:`flax_resblock.parity.oracle.verdict_of`. The
    module itself is left as it was: a copy is run, or, where it cannot be copied, the module with
    copies of its tensors. Forward hooks are part of what a module computes, so they run too.

    Args:
      module: The ``nn.Module``.
      source: What its state dict was read as.
      values_of: Reads another state dict of the module in the same way, to Flax arrays by path.
      eps: Of the module's norms.
      sizes: Sizes of the images, in the order in which they are tried.
      wide: Compare in float64 too, with the limit 1e-12, and on images of an odd size.
      odd: Demand the same on images of an odd size, where pools and paddings of other kinds differ.
    Returns:
      What was measured with the module's own weights.
    Raises:
      InputError: The outputs differ, the module raises at every image size, or its output cannot
        be compared.
    """
    name = type(module).__name__
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"from_torch runs nn.Modules; pass the state_dict() of a {name}.")
    with global_state_kept(), runnable(inner(module)) as twin:
        place = _Place.of(twin, source)
        check = _Check(name, twin, place, source.config, eps, values_of, tuple(sizes), wide)
        with place.tapped(twin):
            size = check.find_size()
            figures = check.compare(size, own=True)
            if odd and check.runs(_odd(size)):
                check.compare(_odd(size), own=True)
            elif wide:
                figures = replace(figures, elsewhere=check.at_odd_size(size))
            randomise(twin)
            check.compare(size, own=False)
    return figures


@dataclass(frozen=True)
class _Place:
    """Where in a module the converted network is.

    Attributes:
      prefix: Of its tensors; only used where others were left out.
      left_out: Names of the modules whose tensors were left out.
      inputs: What these modules were given in the latest run.
    """

    prefix: str
    left_out: tuple[str, ...]
    inputs: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, module: torch.nn.Module, source: OpenedCheckpoint) -> _Place:
        """Finds the prefix as the state dict was read: wrappers first, then the backbone."""
        keys, is_key = {key: key for key in module.state_dict()}, lambda key: isinstance(key, str)
        stripped = unwrap(keys, is_tensor=is_key, source="the module").state
        name_of_array = {id(array): key for key, array in source.record.tensors.items()}
        own = [(key, name_of_array.get(id(array))) for key, array in source.tensors.items()]
        used = {key: stripped[name] for key, name in own if name is not None}
        prefixes = [name.removesuffix(key) for key, name in used.items() if name.endswith(key)]
        prefix = prefixes[0] if prefixes else ""
        left = [name for name in stripped.values() if name not in set(used.values())]
        return cls(prefix, tuple(dict.fromkeys(key.rpartition(".")[0] for key in left)))

    def subject(self, module: torch.nn.Module) -> torch.nn.Module:
        """What is run: the module, or the part of it that was converted."""
        return module.get_submodule(self.prefix.rstrip(".")) if self.left_out else module

    @contextmanager
    def tapped(self, module: torch.nn.Module) -> Iterator[None]:
        """Within it ``inputs`` receives what the modules whose tensors were left out are given."""

        def record(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
            self.inputs.extend(value for value in args if isinstance(value, torch.Tensor))

        parts = [module.get_submodule(name) for name in self.left_out if name]
        handles = [part.register_forward_pre_hook(record) for part in parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class _Check:
    name: str
    module: torch.nn.Module
    place: _Place
    config: Config
    eps: float
    values_of: Callable[[Mapping[str, Any]], Values]
    sizes: tuple[Size, ...]
    wide: bool

    def images(self, size: Size) -> np.ndarray:
        """Random images or feature maps, ``(N, H, W, C)``."""
        shape = (BATCH, *size, self.config.in_channels)
        return np.random.default_rng(0).standard_normal(shape).astype(np.float32)

    def find_size(self) -> Size:
        """The first size at which the module runs.

        A size that leaves a last feature map of a single pixel comes last, because global average
        and max pooling are the same there."""
        raised = {}
        sizes = sorted(self.sizes, key=lambda size: min(size) <= _total_stride(self.config))
        for size in sizes:
            try:
                self.torch_tensors(size, torch.float32)
                return size
            except Exception as error:
                raised[size] = f"{type(error).__name__}: {_first_line(error)}"
        shown = "; ".join(f"{_shown(size)} raises {reason}" for size, reason in raised.items())
        raise InputError(
            f"from_torch compares {self.name} with its Flax twin by running it, but its forward "
            f"pass cannot be run in float32 on the CPU: an input of {shown}. Fix forward, or pass "
            "the submodule that is the residual network."
        )

    def runs(self, size: Size) -> bool:
        """Whether the module takes images of this size."""
        try:
            self.torch_tensors(size, torch.float32)
        except Exception:  # whatever its forward pass raises
            return False
        return True

    def at_odd_size(self, size: Size) -> str:
        """A sentence on images of an odd size, if the module takes them and computes something else
        there, as one with a pool of fixed size does."""
        odd = _odd(size)
        if not self.runs(odd):
            return ""
        try:
            self.compare(odd, own=True)
        except InputError:
            return (
                f"made for images of {_shown(size)}: on {_shown(odd)} {self.name} computes "
                "something else than its Flax twin, as a network with a pool of fixed size does"
            )
        return ""

    def torch_tensors(self, size: Size, dtype: torch.dtype) -> list[torch.Tensor]:
        """Every tensor that a run leaves to be compared, in the order of preference."""
        self.place.inputs.clear()
        self.module.to(dtype)
        try:
            images = torch.from_numpy(np.moveaxis(self.images(size), -1, 1).copy())
            output = self.place.subject(self.module)(images.to(dtype))
        finally:
            self.module.to(torch.float32)
        return [*self.place.inputs, *_tensors(output)]

    def flax_outputs(self, size: Size, values: Values, dtype: Any) -> tuple[np.ndarray, ...]:
        """The network's output, and for one without a head its last feature map."""
        highest = jax.default_matmul_precision("highest")
        with jax.enable_x64(dtype == np.float64), jax.default_device(_cpu()), highest:
            model = build(self.config, rngs=None, eps=self.eps)
            paths = dict(nnx.to_flat_state(nnx.state(model)))
            for path in paths:
                of_value = jnp.int32 if path[-1] == "num_batches_tracked" else dtype
                variable_at(model, path).set_value(jnp.asarray(values[path], of_value))
            model.eval()
            graphdef, state = nnx.split(model)
            outputs = _compiled(for_cpu())(graphdef, state, jnp.asarray(self.images(size), dtype))
            return tuple(np.asarray(output) for output in outputs)

    def compare(self, size: Size, *, own: bool) -> ForwardFigures:
        """Raises InputError where the two differ with the weights that the module has now.

        Args:
          size: Of the images.
          own: Whether these are the module's own weights, not random ones.
        """
        tensors = self.torch_tensors(size, torch.float32)
        values = self.values_of(self.module.state_dict())
        twin = self.flax_outputs(size, values, np.float32)
        ours, which, index = self._counterpart(tensors, twin)
        if own and not np.isfinite(ours).all():
            # NaN spreads differently in the two frameworks; the random weights are finite
            return ForwardFigures(size, float("nan"), None)
        epsilon = float(np.finfo(np.float32).eps)
        flax = twin[which]
        truth: np.ndarray | None = None
        with suppress(Exception):  # a module that converts to float32 itself
            truth = _as_shape(self.torch_tensors(size, torch.float64)[index], flax.shape)
        narrow = float("inf") if truth is None else relative_l2(flax, truth)
        agrees = truth is not None and verdict_of(narrow, relative_l2(ours, truth), epsilon).passed
        if agrees and not self.wide:
            return ForwardFigures(size, narrow, None)
        # One rounding of PyTorch can be lucky, and not every module runs in float64: the Flax
        # network in float64 decides.
        exact = self.flax_outputs(size, values, np.float64)[which]
        difference = None if truth is None else relative_l2(truth, exact)
        if difference is not None and difference <= FLOAT64_LIMIT:
            return ForwardFigures(size, narrow, difference)
        narrow = relative_l2(flax, exact)
        if not (agrees or verdict_of(relative_l2(ours, exact), narrow, epsilon).passed):
            raise InputError(self._difference(size, ours, exact, own))
        if self.wide and difference is not None:
            raise InputError(
                f"{self.name} and its Flax twin agree in float32, but in float64 they differ by "
                f"{difference:.1e}, limit {FLOAT64_LIMIT:g}. Either they compute something "
                f"slightly different, such as another eps, or the forward pass of {self.name} "
                f"converts to float32, so that it cannot be compared in float64."
            )
        return ForwardFigures(size, narrow, None)

    def _counterpart(
        self, tensors: list[torch.Tensor], twin: tuple[np.ndarray, ...]
    ) -> tuple[np.ndarray, int, int]:
        """The tensor that corresponds to an output of the twin.

        Returns:
          The tensor in Flax's layout, the index of the twin's output, and that of the tensor.
        """
        subject = f"from_torch compares {self.name} with its Flax twin by running it, but it"
        for which, output in enumerate(twin):
            arrays = [_as_shape(tensor, output.shape) for tensor in tensors]
            found = [(array, i) for i, array in enumerate(arrays) if array is not None]
            if found and (len(found) == 1 or self.place.left_out):
                return found[0][0], which, found[0][1]
            if found:
                shape = list(tensors[found[0][1]].shape)
                raise InputError(
                    f"{subject} returns {len(found)} tensors of the same shape, {shape}, and it "
                    "is unclear which is the output. Wrap it in a module that returns the one you "
                    "mean."
                )
        shapes = some([str(list(tensor.shape)) for tensor in tensors]) or "no tensor at all"
        of_torch = [[shape[0], shape[-1], *shape[1:-1]] for shape in (y.shape for y in twin)]
        raise InputError(
            f"{subject} returns {shapes}, and {name_of(self.config)}, which the names and shapes "
            f"of its tensors fit, returns {' or '.join(map(str, of_torch))}. Pass the submodule "
            "that is the residual network, or wrap it in a module that returns the matching tensor."
        )

    def _difference(self, size: Size, ours: np.ndarray, exact: np.ndarray, own: bool) -> str:
        kind = "images" if isinstance(self.config, ResNetConfig) else "feature maps"
        weights = "its own weights" if own else f"random weights, {WHY_RANDOM}"
        return (
            f"{self.name} does not compute what its Flax twin computes. It was run in evaluation "
            f"mode, in float32, on {BATCH} random {kind} of {_shown(size)}, with {weights}: the "
            f"outputs differ by up to {_relative_max(ours, exact):.2g} of the largest value. The "
            f"names and shapes of its tensors fit {name_of(self.config)}, but its forward pass "
            f"computes something else. The usual causes: {CAUSES}. To find the first layer that "
            "differs, run `flax-resblock verify --torch FILE.py:NAME`, where NAME is the module's "
            "class or a function that returns the module."
        )


def _odd(size: Size) -> Size:
    return size[0] + 3, size[1] + 1


def _shown(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _relative_max(ours: np.ndarray, exact: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        return float(np.max(np.abs(ours - exact)) / np.max(np.abs(exact)))


def _total_stride(config: Config) -> int:
    """By how much the last feature map is smaller than the images."""
    if not isinstance(config, ResNetConfig):
        return config.stride
    strides = [block.stride for _, _, block in config.blocks()]
    return int(np.prod(strides)) * config.stem_reduction


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return visible(lines[0][:200].rstrip(".")) if lines else "no message"


def _tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor in a module's output; only the logits where it names them."""
    if isinstance(output, torch.Tensor):
        return [output]
    is_mapping = isinstance(output, Mapping)
    logits = output.get("logits") if is_mapping else getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return [logits]
    parts = output.values() if is_mapping else output if isinstance(output, tuple | list) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _as_shape(tensor: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray | None:
    """The tensor in Flax's layout; None where it does not have the shape.

    Pooled features may keep two axes of length one."""
    if tensor.ndim == 4 and len(shape) == 2 and tuple(tensor.shape[2:]) == (1, 1):
        tensor = tensor.flatten(1)
    array = as_array(tensor)
    return array if array.shape == shape else None


def _cpu() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names other platforms only
        return jax.local_devices()[0]


@functools.cache
def _compiled(cpu: bool) -> Callable[..., tuple[jax.Array, ...]]:
    """Runs a split model, compiled once per architecture; ``cpu`` tells the two lowerings apart."""
    del cpu

    def outputs(graphdef: Any, state: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        model: Model = nnx.merge(graphdef, state)
        if isinstance(model, ResNet) and model.head is None:
            *_, last = model.features(images).values()
            return jnp.mean(last, axis=(1, 2)), last
        return (model(images),)

    return jax.jit(outputs, static_argnums=0, compiler_options=compiler_options())
