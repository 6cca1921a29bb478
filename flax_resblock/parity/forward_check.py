"""Runs a user's own PyTorch module and compares it with the Flax network built from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flax_resblock.config import Config, ResNetConfig, name_of
from flax_resblock.convert.opening import OpenedCheckpoint
from flax_resblock.cpu.switch import for_cpu
from flax_resblock.errors import InputError, raised, some
from flax_resblock.nn.resnet import build
from flax_resblock.nn.variables import variable_at
from flax_resblock.parity.forward_run import (
    NetworkPlace,
    Size,
    as_shape,
    by_use,
    compiled_outputs,
    cpu_device,
    odd_size,
    relative_max,
    shown_size,
    tensors_in,
)
from flax_resblock.parity.module_run import global_state_kept, inner, randomise, runnable
from flax_resblock.parity.oracle import FLOAT64_LIMIT, relative_l2, verdict_of

SIZES: tuple[Size, ...] = ((32, 32), (64, 64), (224, 224))
"""Sizes of the images, in the order in which they are tried."""

BATCH = 2

CAUSES = (
    "another activation function, a pooling layer called in forward, another head (such as one "
    "with a final softmax), layers in another order, other padding"
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
      source: What its state dict was read as.
      values_of: Reads another state dict of the module in the same way, to Flax arrays by path.
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
    with global_state_kept(), runnable(inner(module)) as copied:
        place = NetworkPlace.of(copied, source)
        check = _Check(name, copied, place, source.config, eps, values_of, tuple(sizes), wide)
        with place.tapped(copied):
            size = check.find_size()
            figures = check.compare(size, own=True)
            if odd and not check.refusal(odd_size(size)):
                check.compare(odd_size(size), own=True)
            elif wide:
                figures = replace(figures, elsewhere=check.at_odd_size(size))
            randomise(copied)
            check.compare(size, own=False)
    return figures


@dataclass(frozen=True)
class _Check:
    name: str
    module: torch.nn.Module
    place: NetworkPlace
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
        """The first size at which the module runs."""
        failed = []
        for size in by_use(self.config, self.sizes):
            problem = self.refusal(size)
            if not problem:
                return size
            failed.append(f"{shown_size(size)} raises {problem}")
        raise InputError(
            f"from_torch compares {self.name} with the Flax network by running it, but its forward "
            f"pass cannot be run in float32 on the CPU: an input of {'; '.join(failed)}. Fix "
            "forward, or pass the submodule that is the residual network."
        )

    def refusal(self, size: Size) -> str:
        """What the module raises for images of this size; empty if it takes them."""
        try:
            self.torch_tensors(size, torch.float32)
        except Exception as error:  # whatever its forward pass raises
            return raised(error)
        return ""

    def at_odd_size(self, size: Size) -> str:
        """A sentence on images of an odd size, if the module takes them and computes something else
        there, as one with a pool of fixed size does."""
        odd = odd_size(size)
        with suppress(InputError):
            if not self.refusal(odd):
                self.compare(odd, own=True)
            return ""
        return (
            f"made for images of {shown_size(size)}: on {shown_size(odd)} {self.name} computes "
            "something else than the Flax network, as a network with a pool of fixed size does"
        )

    def torch_tensors(self, size: Size, dtype: torch.dtype) -> list[torch.Tensor]:
        """Every tensor that a run leaves to be compared, in the order of preference."""
        self.place.inputs.clear()
        self.module.to(dtype)
        try:
            images = torch.from_numpy(np.moveaxis(self.images(size), -1, 1).copy())
            output = self.place.subject(self.module)(images.to(dtype))
        finally:
            self.module.to(torch.float32)
        return [*self.place.inputs, *tensors_in(output)]

    def flax_outputs(self, size: Size, values: Values, dtype: Any) -> tuple[np.ndarray, ...]:
        """The network's output, and for one without a head its last feature map."""
        highest = jax.default_matmul_precision("highest")
        with jax.enable_x64(dtype == np.float64), jax.default_device(cpu_device()), highest:
            model = build(self.config, rngs=None, eps=self.eps)
            paths = dict(nnx.to_flat_state(nnx.state(model)))
            for path in paths:
                of_value = jnp.int32 if path[-1] == "num_batches_tracked" else dtype
                variable_at(model, path).set_value(jnp.asarray(values[path], of_value))
            model.eval()
            graphdef, state = nnx.split(model)
            outputs = compiled_outputs(for_cpu())(
                graphdef, state, jnp.asarray(self.images(size), dtype)
            )
            return tuple(np.asarray(output) for output in outputs)

    def compare(self, size: Size, *, own: bool) -> ForwardFigures:
        """Raises InputError where the two differ with the weights that the module has now, which
        are its ``own`` or random ones."""
        tensors = self.torch_tensors(size, torch.float32)
        values = self.values_of(self.module.state_dict())
        outputs = self.flax_outputs(size, values, np.float32)
        ours, which, index = self._counterpart(tensors, outputs)
        if own and not np.isfinite(ours).all():
            # NaN spreads differently in the two frameworks; the random weights are finite
            return ForwardFigures(size, float("nan"), None)
        epsilon = float(np.finfo(np.float32).eps)
        flax = outputs[which]
        truth: np.ndarray | None = None
        with suppress(Exception):  # a module that converts to float32 itself
            truth = as_shape(self.torch_tensors(size, torch.float64)[index], flax.shape)
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
                f"{self.name} and the Flax network agree in float32, but in float64 they differ by "
                f"{difference:.1e}, limit {FLOAT64_LIMIT:g}. Either they compute something "
                f"slightly different, such as another eps, or the forward pass of {self.name} "
                f"converts to float32, so that it cannot be compared in float64."
            )
        return ForwardFigures(size, narrow, None)

    def _counterpart(
        self, tensors: list[torch.Tensor], outputs: tuple[np.ndarray, ...]
    ) -> tuple[np.ndarray, int, int]:
        """The tensor that corresponds to an output of the Flax network, in Flax's layout; the index
        of the output, and that of the tensor."""
        subject = f"from_torch compares {self.name} with the Flax network by running it, but it"
        for which, output in enumerate(outputs):
            arrays = [as_shape(tensor, output.shape) for tensor in tensors]
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
        of_torch = [[shape[0], shape[-1], *shape[1:-1]] for shape in (y.shape for y in outputs)]
        raise InputError(
            f"{subject} returns {shapes}, and {name_of(self.config)}, which the names and shapes "
            f"of its tensors fit, returns {' or '.join(map(str, of_torch))}. Pass the submodule "
            "that is the residual network, or wrap it in a module that returns the matching tensor."
        )

    def _difference(self, size: Size, ours: np.ndarray, exact: np.ndarray, own: bool) -> str:
        kind = "images" if isinstance(self.config, ResNetConfig) else "feature maps"
        weights = "its own weights" if own else f"random weights, {WHY_RANDOM}"
        return (
            f"{self.name} does not compute what the Flax network built from it computes. It was "
            f"run in evaluation mode, in float32, on {BATCH} random {kind} of {shown_size(size)}, "
            f"with {weights}: the outputs differ by up to {relative_max(ours, exact):.2g} of the "
            f"largest value. The names and shapes of its tensors fit {name_of(self.config)}, but "
            f"its forward pass computes something else. The usual causes: {CAUSES}. To find the "
            f"first layer that differs, run `flax-resblock verify --torch FILE.py:NAME`, where "
            f"NAME is the module's class or a function that returns the module."
        )
