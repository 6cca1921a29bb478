"""A model made ready for inference alone: norms folded, each convolution in its fastest form,
compiled ahead of time for a few batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_resblock.cpu import onednn, winograd
from flax_resblock.cpu.rewrite import Fused, evaluate, kernels
from flax_resblock.cpu.switch import compiler_options, conv_lowering, for_cpu
from flax_resblock.errors import InputError
from flax_resblock.export.fold import fold_batch_norm
from flax_resblock.nn.conv import Conv, convolve
from flax_resblock.nn.resnet import Model

Forward = Callable[[list[jax.Array], jax.Array], jax.Array]
Compiled = Callable[[jax.Array], jax.Array]

WINOGRAD_PAYS = {True: ((32, 512), (256, 256), (1024, 128)), False: ((512, 64), (0, 256))}
"""From how many tiles and channels on, with oneDNN as the other choice or without. With few tiles
the sixteen kernels, 16/9 of the plain one, are most of what is read; with few channels the
transforms are most of the work."""
WINOGRAD_BYTES = 32 << 20
"""The most that the sixteen matrices of an input may hold, with oneDNN as the other choice: beyond,
the C library gets their memory anew at each call.
"""


class _Plan(NamedTuple):
    """How a convolution is computed for one size of its input."""

    form: Literal["onednn", "winograd", "xla"]
    convolution: onednn.Convolution

    def prepared(self, kernel: jax.Array) -> Any:
        """The kernel as :meth:`__call__` wants it."""
        if self.form == "winograd":
            return jax.jit(winograd.transform_kernel)(kernel)
        return (
            jax.jit(onednn.reordered, static_argnums=1)(kernel, self.convolution.block)
            if self.convolution.block
            else kernel
        )

    def __call__(self, fused: Fused, kernel: Any) -> jax.Array:
        """The convolution with what follows it."""
        if self.form == "onednn":
            bias = None if fused.bias is None else fused.bias.reshape(-1)
            return self.convolution(fused.x, kernel, bias, fused.residual, fused.relu)
        y = (
            winograd.convolve_transformed(fused.x, kernel, None)
            if self.form == "winograd"
            else _by_xla(self.convolution, fused.x, kernel)
        )
        for value in (fused.bias, fused.residual):
            y = y if value is None else y + value
        return jnp.maximum(y, 0) if fused.relu else y


def _planned(of: onednn.Convolution, shape: tuple[int, ...], by_onednn: bool) -> _Plan:
    """What is fastest for an input ``(N, H, W, I)``."""
    tiles, channels = shape[0] * -(-shape[1] // 2) * -(-shape[2] // 2), min(of.kernel[2:])
    square = (
        of.kernel[:2] == (3, 3)
        and of.strides == of.padding == of.dilation == (1, 1)
        and of.groups == 1
    )
    fits = not by_onednn or 16 * tiles * shape[3] * 4 <= WINOGRAD_BYTES
    if (
        square
        and fits
        and any(tiles >= fewest and channels >= width for fewest, width in WINOGRAD_PAYS[by_onednn])
    ):
        return _Plan("winograd", of)
    return _Plan("onednn" if by_onednn else "xla", of)


def _by_xla(of: onednn.Convolution, x: jax.Array, kernel: jax.Array) -> jax.Array:
    if (
        of.kernel[:2] == (1, 1) and of.padding == (0, 0) and len(set(of.strides)) == 1
    ):  # a product is faster
        return convolve(
            x, kernel, stride=of.strides[0], padding=0, dilation=1, groups=of.groups, precision=None
        )
    return of.by_xla(x, kernel)


class _Plain:
    """A model as XLA compiles it, for any dtype and device."""

    def __init__(self, forward: Forward, arrays: list[jax.Array]) -> None:
        self._forward, self._arrays = jax.jit(forward, compiler_options=compiler_options()), arrays

    def compiled(self, images: jax.ShapeDtypeStruct) -> Compiled:
        """For images of this shape."""
        compiled = self._forward.lower(self._arrays, images).compile()
        return lambda images: compiled(self._arrays, images)


class _OnCpu:
    """A float32 model for a CPU: every convolution in the form that is fastest for its size,
    together with what follows it.
    """

    def __init__(self, forward: Forward, arrays: list[jax.Array]) -> None:
        self._forward, self._arrays = forward, arrays
        self._by_onednn = onednn.available()
        self._plans: dict[tuple[onednn.Convolution, tuple[int, ...]], _Plan] = {}
        self._prepared: dict[tuple[int, _Plan], Any] = {}

    def compiled(self, images: jax.ShapeDtypeStruct) -> Compiled:
        """For images of this shape."""
        with conv_lowering("xla"):
            network = jax.make_jaxpr(self._forward)(self._arrays, images)
        plans = {leaf: self._plan(*convolution) for leaf, convolution in kernels(network).items()}
        inputs = [
            self._kernel(leaf, plans[leaf]) if leaf in plans else array
            for leaf, array in enumerate(self._arrays)
        ]

        def compute(fused: Fused) -> jax.Array:
            if isinstance(fused.kernel, tuple):
                plan, kernel = fused.kernel
                return plan(fused, kernel)
            plan = _planned(fused.convolution, fused.x.shape, self._by_onednn)
            return plan(fused, plan.prepared(fused.kernel))

        def run(inputs: list[Any], images: jax.Array) -> jax.Array:
            known = [
                (plans[leaf], value) if leaf in plans else value
                for leaf, value in enumerate(inputs)
            ]
            return evaluate(network, [*known, images], compute)[0]

        with onednn.not_kept():
            compiled = (
                jax.jit(run, compiler_options=compiler_options()).lower(inputs, images).compile()
            )
        return lambda images: compiled(inputs, images)

    def _plan(self, of: onednn.Convolution, shape: tuple[int, ...]) -> _Plan:
        if (of, shape) not in self._plans:
            plan = _planned(of, shape, self._by_onednn)
            self._plans[of, shape] = (
                plan._replace(convolution=onednn.order_of(of, shape))
                if plan.form == "onednn"
                else plan
            )
        return self._plans[of, shape]

    def _kernel(self, leaf: int, plan: _Plan) -> Any:
        """Prepared; batch sizes with the same plan share it."""
        if (leaf, plan) not in self._prepared:
            self._prepared[leaf, plan] = plan.prepared(self._arrays[leaf])
        return self._prepared[leaf, plan]


class CompiledInference:
    """What :func:`compile_inference` returns.

    Attributes:
      batch_sizes: Those that it compiles for, each when it is first needed; others are filled up or
        cut into these.
      config: The model's.
    """

    def __init__(self, model: Model, example: jax.ShapeDtypeStruct) -> None:
        self.config = model.config
        self.example = example
        largest = example.shape[0]
        self.batch_sizes = (
            *(
                size
                for size in (1 << power for power in range(largest.bit_length()))
                if size < largest
            ),
            largest,
        )
        folded = fold_batch_norm(model)
        folded.eval()
        graphdef, state = nnx.split(folded)
        arrays, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, state))

        def forward(arrays: list[jax.Array], images: jax.Array) -> jax.Array:
            return nnx.merge(graphdef, jax.tree.unflatten(structure, arrays))(
                images, use_running_average=True
            )

        single = example.dtype == jnp.float32 and all(
            array.dtype == jnp.float32 for array in arrays
        )
        choose = all(
            for_cpu(node.conv_lowering)
            for _, node in nnx.iter_modules(folded)
            if isinstance(node, Conv)
        )
        self._network = (_OnCpu if single and choose else _Plain)(forward, arrays)
        self._compiled: dict[int, Compiled] = {}
        self._for(largest)

    def _for(self, size: int) -> Compiled:
        if size not in self._compiled:
            self._compiled[size] = self._network.compiled(
                jax.ShapeDtypeStruct((size, *self.example.shape[1:]), self.example.dtype)
            )
        return self._compiled[size]

    def __call__(self, images: Any) -> jax.Array:
        """Logits, or pooled features, of any number of images.

        Args:
          images: ``(N, H, W, C)``, normalised; all but ``N`` as in the example.
        Returns:
          ``(N, num_classes)``. The last bits of an image's logits depend on the batch size that it
          was compiled for.
        Raises:
          InputError: Images of another size or number of channels, or none.
        """
        if images.ndim != 4 or images.shape[1:] != self.example.shape[1:] or len(images) == 0:
            height, width, channels = self.example.shape[1:]
            raise InputError(
                f"this model was compiled for images (N, {height}, {width}, {channels}); these "
                f"are {tuple(images.shape)}. "
                "Resize them, or call compile_inference with an example of their size."
            )
        largest, count = self.batch_sizes[-1], images.shape[0]
        if count in self.batch_sizes:
            return self._for(count)(jnp.asarray(images, self.example.dtype))
        parts = []
        for start in range(0, count, largest):
            part = images[start : start + largest]
            size = next(size for size in self.batch_sizes if size >= len(part))
            filled = (
                np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)])
                if size > len(part)
                else part
            )
            parts.append(self._for(size)(jnp.asarray(filled, self.example.dtype))[: len(part)])
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def compile_inference(model: Model, example: Any) -> CompiledInference:
    """A function for inference alone, as fast as this machine's compiler makes it.

    Norms are folded into the convolutions (see :func:`flax_resblock.export.fold.fold_batch_norm`
    and ``docs/export.md`` for what that does to the last bits). On a CPU convolutions of float32
    are oneDNN's or Winograd's, whichever is faster, and their kernels are put in order now and not
    at each call. The example's batch size is compiled at once; other sizes are filled up to the
    next power of two, or cut.

    Args:
      model: Evaluated in evaluation mode, whatever its mode; does not change, and later changes to
        it are not seen.
      example: Images ``(N, H, W, C)`` or a ``jax.ShapeDtypeStruct``; ``N`` is the largest batch
        that is computed at once.
    Raises:
      InputError: The example is no batch of images for this model, or a norm cannot be folded.
    Example:
      >>> predict = compile_inference(model, images[:32])
      >>> logits = predict(images)
    """
    shape = tuple(example.shape)
    if len(shape) != 4 or shape[-1] != model.config.in_channels or 0 in shape:
        raise InputError(
            f"the example must be images (N, H, W, {model.config.in_channels}), at least one; "
            f"it is {shape}."
        )
    return CompiledInference(
        model, jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(example.dtype))
    )
