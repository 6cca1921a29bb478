"""Models compiled for inference alone, ahead of time for a few batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_resblock.cpu.compiling import give_memory_back, options_for
from flax_resblock.cpu.switch import compiler_options, conv_lowering, for_cpu
from flax_resblock.errors import InputError
from flax_resblock.export.fold import fold_batch_norm
from flax_resblock.nn.conv import Conv
from flax_resblock.nn.resnet import Model

if TYPE_CHECKING:
    from flax_resblock.cpu.inference import CpuNetwork

_Forward = Callable[[list[jax.Array], jax.Array], jax.Array]
_Compiled = Callable[[jax.Array], jax.Array]


class _Plain:
    """A network as XLA compiles it, for any dtype and device."""

    def __init__(
        self, forward: _Forward, arrays: list[jax.Array], options: Mapping[str, Any]
    ) -> None:
        self._forward, self._arrays = jax.jit(forward, compiler_options=dict(options)), arrays

    def compiled(self, images: jax.ShapeDtypeStruct) -> _Compiled:
        """The network for images of this shape."""
        compiled = self._forward.lower(self._arrays, images).compile()
        return lambda images: compiled(self._arrays, images)


def _network(model: Model, example: jax.ShapeDtypeStruct, quick: bool) -> _Plain | CpuNetwork:
    folded = fold_batch_norm(model)
    folded.eval()
    graphdef, state = nnx.split(folded)
    arrays, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, state))

    def forward(arrays: list[jax.Array], images: jax.Array) -> jax.Array:
        network = nnx.merge(graphdef, jax.tree.unflatten(structure, arrays))
        with conv_lowering("xla") if quick else nullcontext():
            return network(images, use_running_average=True)

    single = all(value.dtype == jnp.float32 for value in (example, *arrays))
    if quick:
        with conv_lowering("xla"):
            return _Plain(forward, arrays, options_for(None, light=single))
    convs = (node for _, node in nnx.iter_modules(folded) if isinstance(node, Conv))
    if single and all(for_cpu(conv.conv_lowering) for conv in convs):
        from flax_resblock.cpu.inference import CpuNetwork

        return CpuNetwork(forward, arrays)
    return _Plain(forward, arrays, compiler_options())


class CompiledInference:
    """What :func:`compile_inference` returns.

    Attributes:
      batch_sizes: The batch sizes that it compiles for, each when it is first needed. Other batches
        are filled up or cut into these.
      config: The model's configuration.
      example: Shape and dtype of the images.
      quick: Whether its programs are those that compile soonest.
    """

    def __init__(self, model: Model, example: jax.ShapeDtypeStruct, *, quick: bool) -> None:
        self.config = model.config
        self.example = example
        self.quick = quick
        largest = example.shape[0]
        powers = (1 << power for power in range(largest.bit_length()))
        self.batch_sizes = (*(size for size in powers if size < largest), largest)
        self._network = _network(model, example, quick)
        give_memory_back()
        self._compiled: dict[int, _Compiled] = {}
        self._for(largest)

    def _for(self, size: int) -> _Compiled:
        if size not in self._compiled:
            shape = (size, *self.example.shape[1:])
            images = jax.ShapeDtypeStruct(shape, self.example.dtype)
            self._compiled[size] = self._network.compiled(images)
            give_memory_back()
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
                f"this model was compiled for images (N, {height}, {width}, {channels}); these are "
                f"{tuple(images.shape)}. Resize them, or call compile_inference with an example of "
                "their size."
            )
        largest, count = self.batch_sizes[-1], images.shape[0]
        if count in self.batch_sizes:
            return self._for(count)(jnp.asarray(images, self.example.dtype))
        parts = []
        for start in range(0, count, largest):
            part = images[start : start + largest]
            size = next(size for size in self.batch_sizes if size >= len(part))
            empty = np.zeros((size - len(part), *part.shape[1:]), part.dtype)
            filled = np.concatenate([part, empty]) if len(empty) else part
            parts.append(self._for(size)(jnp.asarray(filled, self.example.dtype))[: len(part)])
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def compile_inference(model: Model, example: Any, *, quick: bool = False) -> CompiledInference:
    """Compiles a model for inference alone.

    Norms are folded into the convolutions (see :func:`flax_resblock.export.fold.fold_batch_norm`;
    ``docs/export.md`` says how that changes the last bits). On a CPU, convolutions of float32 are
    computed by oneDNN or by Winograd's products, whichever is faster, and their kernels are
    reordered once instead of at each call. The example's batch size is compiled at once. Batches of
    other sizes are filled up to the next power of two, or cut.

    Args:
      model: Used in evaluation mode, whatever its mode. It is copied: later changes to it have no
        effect, and you may delete it.
      example: Images ``(N, H, W, C)`` or a ``jax.ShapeDtypeStruct``; ``N`` is the largest batch
        that is computed at once.
      quick: On a CPU, answer as soon as possible, for a few dozen images: XLA's own convolutions,
        compiled with little optimisation. A call then takes about twice as long, the logits differ
        in the last bits, and unlike the faster programs these are stored in jax's cache.
    Raises:
      InputError: The example is not a batch of images for this model, or a norm cannot be folded.
    Example:
      >>> predict = compile_inference(model, images[:32])
      >>> logits = predict(images)
    """
    shape = tuple(example.shape)
    if len(shape) != 4 or shape[-1] != model.config.in_channels or 0 in shape:
        raise InputError(
            f"the example must be at least one image, (N, H, W, {model.config.in_channels}); its "
            f"shape is {shape}."
        )
    dtype = jax.dtypes.canonicalize_dtype(example.dtype)
    return CompiledInference(model, jax.ShapeDtypeStruct(shape, dtype), quick=quick)
