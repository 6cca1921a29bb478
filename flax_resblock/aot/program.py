"""The programs that are compiled: inference, and one training step, over the devices of a topology
that need not be present."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_resblock.aot.request import Request
from flax_resblock.config import ResNetConfig
from flax_resblock.cpu.switch import conv_lowering, traced_for
from flax_resblock.errors import InputError
from flax_resblock.nn.resnet import build

AXIS = "batch"
_RATE, _MOMENTUM = 0.1, 0.9


def _model(request: Request) -> nnx.Module:
    """The network without values; the slots that the request names have their own precision."""
    dtype = None if request.dtype == "float32" else jnp.dtype(request.dtype)
    model = build(request.config, rngs=None, dtype=dtype)
    chosen = dict(request.slot_precision)
    for path, module in nnx.iter_modules(model):
        precision = chosen.get(".".join(map(str, path)))
        if precision is not None:
            chosen_precision = None if precision == "default" else precision.upper()
            setattr(module, "precision", jax.lax.Precision(chosen_precision))  # noqa: B010
    return model


def _loss(outputs: jax.Array, target: jax.Array) -> jax.Array:
    """Cross-entropy if the target is labels ``(N,)``; else the mean of ``outputs * target``, whose
    gradient is ``target`` up to a factor."""
    outputs = outputs.astype(jnp.float32)
    if target.ndim == 1:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, target))
    return jnp.mean(outputs * target)


def _step(
    graphdef: Any,
    optimizer: Any,
    *,
    spread: Callable[[Any], Any] = lambda tree: tree,
    mean: Callable[[Any], Any] = lambda loss: loss,
) -> Callable[..., Any]:
    """``(params, stats, optimizer state, images, target) -> (params, stats, optimizer state,
    loss)``.

    Args:
      spread: Applied to the parameters before they meet the images.
      mean: Applied to the loss.
    """

    def step(params: Any, stats: Any, opt_state: Any, images: Any, target: Any) -> Any:
        def loss_of(params: Any) -> Any:
            model = nnx.merge(graphdef, spread(params), stats, copy=True)
            outputs = model(images)
            return mean(_loss(outputs, target)), nnx.state(model, nnx.BatchStat)

        (loss, new_stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), new_stats, opt_state, loss

    return step


def _per_replica(graphdef: Any, optimizer: Any, mesh: Mesh) -> Callable[..., Any]:
    """Each device normalises with its own share of the batch and keeps its own running statistics,
    which have a leading axis of devices.

    The loss is averaged inside the function that is differentiated, so that jax returns averaged
    gradients of replicated parameters. The parameters are marked as varying before they are used,
    so that the gradients are summed over the devices in the shape of the parameters. Without that,
    jax marks them after they are broadcast to the images and sums arrays of the activations' size.
    """
    varying = partial(jax.lax.pcast, axis_name=AXIS, to="varying")
    spread, mean = partial(jax.tree.map, varying), partial(jax.lax.pmean, axis_name=AXIS)
    step = _step(graphdef, optimizer, spread=spread, mean=mean)

    def local(params: Any, stats: Any, opt_state: Any, images: Any, target: Any) -> Any:
        params, new_stats, opt_state, loss = step(
            params, jax.tree.map(lambda leaf: leaf[0], stats), opt_state, images, target
        )
        return params, jax.tree.map(lambda leaf: leaf[None], new_stats), opt_state, loss

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P(AXIS), P(), P(AXIS), P(AXIS)),
        out_specs=(P(), P(AXIS), P(), P()),
    )


def lower(request: Request, devices: Sequence[Any]) -> Any:
    """The program of a request, lowered for these devices: ``jax.stages.Lowered``.

    Raises:
      InputError: The devices cannot share the batch equally, or an exported network is to run on
        more than one.
    """
    if request.batch % len(devices):
        raise InputError(
            f"a batch of {request.batch} cannot be shared equally by the {len(devices)} devices of "
            f"{request.target}{f' x {request.slices}' if request.slices > 1 else ''}; choose a "
            f"multiple of {len(devices)}."
        )
    if request.exported and len(devices) > 1:
        raise InputError(
            f"an exported network runs on one device; choose a target with one, such as "
            f"tpu:v5e:1x1 or cuda:h100, instead of {request.target}."
        )
    mesh = Mesh(np.array(devices), (AXIS,))
    # as on a host of that device; this one may have only a CPU
    platform = traced_for(request.parsed_target.platform)
    with jax.default_matmul_precision(request.precision), platform, conv_lowering("auto"):
        if request.exported:
            return _lower_exported(request, mesh)
        if request.what == "forward":
            return _lower_forward(request, mesh)
        return _lower_step(request, mesh)


def _spec(mesh: Mesh, spec: P, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, spec))


def _replicated(mesh: Mesh, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: _spec(mesh, P(), leaf.shape, leaf.dtype), tree)


def _images(request: Request, mesh: Mesh, channels: int) -> jax.ShapeDtypeStruct:
    shape = request.batch, request.height, request.width, channels
    return _spec(mesh, P(AXIS), shape, jnp.float32)


def _lower_forward(request: Request, mesh: Mesh) -> Any:
    graphdef, variables = nnx.split(_model(request))

    def forward(variables: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, variables)(images, use_running_average=True)

    images = _images(request, mesh, request.config.in_channels)
    return jax.jit(forward).lower(_replicated(mesh, variables), images)


def _lower_step(request: Request, mesh: Mesh) -> Any:
    graphdef, params, stats = nnx.split(_model(request), nnx.Param, nnx.BatchStat)
    optimizer = optax.sgd(_RATE, momentum=_MOMENTUM)
    opt_state = jax.eval_shape(optimizer.init, params)
    images = _images(request, mesh, request.config.in_channels)

    def forward(params: Any, stats: Any, images: Any) -> Any:
        return nnx.merge(graphdef, params, stats)(images, use_running_average=True)

    shape, dtype = jax.eval_shape(forward, params, stats, images).shape, jnp.float32
    if isinstance(request.config, ResNetConfig) and request.config.num_classes is not None:
        shape, dtype = shape[:1], jnp.int32
    target = _spec(mesh, P(AXIS), shape, dtype)
    if request.batch_norm == "replica":
        step = _per_replica(graphdef, optimizer, mesh)
        stats = jax.tree.map(
            lambda leaf: _spec(mesh, P(AXIS), (mesh.size, *leaf.shape), leaf.dtype), stats
        )
    else:
        step, stats = _step(graphdef, optimizer), _replicated(mesh, stats)
    return jax.jit(step, donate_argnums=(0, 1, 2)).lower(
        _replicated(mesh, params), stats, _replicated(mesh, opt_state), images, target
    )


def _lower_exported(request: Request, mesh: Mesh) -> Any:
    from flax_resblock.export.exported import open_exported

    exported = open_exported(request.subject)
    weights, images = exported.weights, _images(request, mesh, exported.channels)
    return jax.jit(exported.program.call).lower(_replicated(mesh, weights), images)
