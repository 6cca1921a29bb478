"""A model made ready for inference alone: norms folded, kernels transformed, compiled ahead of time for a few batch sizes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_resblock.conv import Conv, forms_of
from flax_resblock.errors import InputError
from flax_resblock.fold import fold_batch_norm
from flax_resblock.lowering import winograd
from flax_resblock.lowering.switch import compiler_options, for_cpu
from flax_resblock.resnet import Model

FEW_TILES, WIDE = 512, 256
"""Winograd's products of fewer rows than the first pay off only from as many channels as the second: each reads sixteen matrices for what nine would do."""


class TransformedConv(nnx.Module):
    """A convolution whose kernel Winograd's transform has already seen, for a CPU.

    Attributes:
      conv: The convolution as it was, for images so small that the transform does not pay.
      transformed: ``nnx.List`` of sixteen ``nnx.Param``, each ``(C, O)``.

    Args:
      conv: 3x3, of stride 1, padded by one pixel; becomes a part of this.
    """

    def __init__(self, conv: Conv) -> None:
        self.conv = conv
        conv.conv_lowering = "xla"  # where it is still called, the images are small
        kernels = jax.jit(winograd.transform_kernel)(conv.kernel[...])
        self.transformed = nnx.List([nnx.Param(kernel) for row in kernels for kernel in row])

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, H, W, O)``."""
        tiles = x.shape[0] * -(-x.shape[1] // 2) * -(-x.shape[2] // 2)
        if tiles < FEW_TILES and min(self.conv.kernel.shape[2:]) < WIDE:
            return self.conv(x)
        kernels = [kernel[...] for kernel in self.transformed]
        y = winograd.convolve_transformed(x, [kernels[4 * row : 4 * row + 4] for row in range(4)], self.conv.precision)
        return y if self.conv.bias is None else y + self.conv.bias[...]


def _transform(module: Any) -> None:
    """Replaces, in place and for a CPU alone, what :class:`TransformedConv` is for."""
    for _, node in list(nnx.iter_modules(module)):
        for name, conv in vars(node).items():
            if isinstance(conv, Conv) and for_cpu(conv.conv_lowering) and conv.dtype in (None, conv.kernel.dtype):
                image = jax.ShapeDtypeStruct((1, 4, 4, conv.in_channels), conv.kernel.dtype)
                options = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}
                forms = forms_of(image, conv.kernel, **options)
                if forms is not None and forms.convolution == "winograd":
                    setattr(node, name, TransformedConv(conv))


class CompiledInference:
    """What :func:`compile_inference` returns.

    Attributes:
      batch_sizes: Those that it compiles for, each when it is first needed; others are filled up or cut into these.
      config: The model's.
    """

    def __init__(self, model: Model, example: jax.ShapeDtypeStruct) -> None:
        self.config = model.config
        self.example = example
        largest = example.shape[0]
        self.batch_sizes = (*(size for size in (1 << power for power in range(largest.bit_length())) if size < largest), largest)
        folded = fold_batch_norm(model)
        folded.eval()
        _transform(folded)
        graphdef, state = nnx.split(folded)
        self._arrays, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, state))

        def forward(arrays: list[jax.Array], images: jax.Array) -> jax.Array:
            return nnx.merge(graphdef, jax.tree.unflatten(structure, arrays))(images, use_running_average=True)

        self._jitted = jax.jit(forward, compiler_options=compiler_options())
        self._compiled: dict[int, Any] = {}
        self._for(largest)

    def _for(self, size: int) -> Any:
        if size not in self._compiled:
            images = jax.ShapeDtypeStruct((size, *self.example.shape[1:]), self.example.dtype)
            self._compiled[size] = self._jitted.lower(self._arrays, images).compile()
        return self._compiled[size]

    def __call__(self, images: Any) -> jax.Array:
        """Logits, or pooled features, of any number of images.

        Args:
          images: ``(N, H, W, C)``, normalised; all but ``N`` as in the example.
        Returns:
          ``(N, num_classes)``. The last bits of an image's logits depend on the batch size that it was compiled for.
        Raises:
          InputError: Images of another size or number of channels, or none.
        """
        if images.ndim != 4 or images.shape[1:] != self.example.shape[1:] or len(images) == 0:
            height, width, channels = self.example.shape[1:]
            raise InputError(
                f"this model was compiled for images (N, {height}, {width}, {channels}); these are {tuple(images.shape)}. "
                "Resize them, or call compile_inference with an example of their size."
            )
        largest, count = self.batch_sizes[-1], images.shape[0]
        if count in self.batch_sizes:
            return self._for(count)(self._arrays, jnp.asarray(images, self.example.dtype))
        parts = []
        for start in range(0, count, largest):
            part = images[start : start + largest]
            size = next(size for size in self.batch_sizes if size >= len(part))
            filled = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)]) if size > len(part) else part
            parts.append(self._for(size)(self._arrays, jnp.asarray(filled, self.example.dtype))[: len(part)])
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def compile_inference(model: Model, example: Any) -> CompiledInference:
    """A function for inference alone, as fast as this machine's compiler makes it.

    Norms are folded into the convolutions (see :func:`flax_resblock.fold.fold_batch_norm` and ``docs/export.md`` for what that does to the last bits). On a
    CPU the kernels of Winograd convolutions are transformed now and not at each call. The example's batch size is compiled at once; other sizes are filled up
    to the next power of two, or cut.

    Args:
      model: Evaluated in evaluation mode, whatever its mode; does not change, and later changes to it are not seen.
      example: Images ``(N, H, W, C)`` or a ``jax.ShapeDtypeStruct``; ``N`` is the largest batch that is computed at once.
    Raises:
      InputError: The example is no batch of images for this model, or a norm cannot be folded.
    Example:
      >>> predict = compile_inference(model, images[:32])
      >>> logits = predict(images)
    """
    shape = tuple(example.shape)
    if len(shape) != 4 or shape[-1] != model.config.in_channels or 0 in shape:
        raise InputError(f"the example must be images (N, H, W, {model.config.in_channels}), at least one; it is {shape}.")
    return CompiledInference(model, jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(example.dtype)))
