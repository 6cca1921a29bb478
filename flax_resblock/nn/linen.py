"""The same networks for Linen users: ``{'params': ..., 'batch_stats': ...}`` in, logits out,
computed by the nnx blocks.

flax's own ``nnx.bridge.ToLinen`` would do, but it keys the blocks of a stage by integers, which
optax masks by name, path-based sharding rules and many checkpoint tools do not expect. Here every
key is a string: ``variables['params']['stage1']['0']['conv1']['kernel']``.

    model = linen.ResNet(architecture("resnet18"))
    variables = linen.variables(flax_resblock.load("resnet18.pth"))
    logits = model.apply(variables, images)
    logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import jax
from flax import linen, nnx
from flax.traverse_util import unflatten_dict

from flax_resblock.config import Config
from flax_resblock.nn.resnet import Model, build
from flax_resblock.nn.variables import variable_at

COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def variables(model: Model) -> dict[str, Any]:
    """The variables of an nnx model (say, a converted one) as Linen collections.

    Args:
      model: A model of this library.
    Returns:
      ``{'params': ..., 'batch_stats': ...}``, nested dicts of the model's own arrays with string
      keys.
    """

    def of(kind: type[nnx.Variable]) -> dict[str, Any]:
        flat = nnx.to_flat_state(nnx.state(model, kind))
        return unflatten_dict({tuple(map(str, path)): one[...] for path, one in flat})

    return {name: of(kind) for name, kind in COLLECTIONS.items()}


class ResNet(linen.Module):
    """A residual network, or a bare block, as a Linen module.

    Attributes:
      config: What to build, a :class:`~flax_resblock.ResNetConfig` or
        :class:`~flax_resblock.BlockConfig`.
      options: See :class:`flax_resblock.nn.blocks.LayerOptions`.
    """

    config: Config
    options: Mapping[str, Any] = linen.FrozenDict()

    @linen.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits ``(N, num_classes)`` of images ``(N, H, W, in_channels)``.

        Args:
          images: Normalised.
          train: Normalise with batch statistics; pass ``mutable=['batch_stats']`` to ``apply`` to
            get the running statistics back.
        """
        model = build(self.config, rngs=None, **self.options)
        fresh = None
        if self.is_initializing():
            rngs = nnx.Rngs(params=self.make_rng("params"))
            fresh = variables(build(self.config, rngs=rngs, **self.options))
        shapes = {
            name: dict(nnx.to_flat_state(nnx.state(model, kind)))
            for name, kind in COLLECTIONS.items()
        }
        stats: dict[str, linen.Variable] = {}
        for collection, flat in shapes.items():
            for name in dict.fromkeys(str(path[0]) for path in flat):
                variable = self.variable(
                    collection, name, lambda c=collection, n=name: fresh[c][n] if fresh else None
                )
                if collection == "batch_stats":
                    stats[name] = variable
                for path in flat:
                    if str(path[0]) == name:
                        tree: Any = variable.value
                        value = reduce(lambda tree, part: tree[str(part)], path[1:], tree)
                        variable_at(model, path).set_value(value)
        logits = model(images, use_running_average=not train)
        if train and not self.is_initializing() and self.is_mutable_collection("batch_stats"):
            for name, tree in variables(model)["batch_stats"].items():
                stats[name].value = tree
        return logits
