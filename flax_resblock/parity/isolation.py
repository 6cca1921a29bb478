"""Runs a model with every slot cut out of its surroundings: each is fed, and hands on, what the
reference says, while its own result is kept.

A *slot's* error is then its own, and so is that of a *connection*, what lies between the slots: a
ReLU, an addition, a flattening. Cotangents are random and belong to one slot each, so the gradients
are cut apart in the same way."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flax_resblock.config import Path
from flax_resblock.cpu.compiling import options_for
from flax_resblock.parity.devices import JaxDevice
from flax_resblock.parity.pair import Precision
from flax_resblock.parity.taps import (
    Trace,
    arrays_by_path,
    as_array,
    as_tensor,
    gradient_of,
    hooked,
    host_tree,
    split_model,
)

Isolation = dict[str, dict[Any, np.ndarray]]
"""``forward``: each slot's own output; ``connection``: what would have been fed to it, and
``output``; ``statistics``; and where asked for, ``parameter gradient``, ``input gradient`` (through
the slot) and ``connection gradient`` (from the slots that follow)."""


def cotangent_of(kind: str, name: str, shape: Iterable[int]) -> np.ndarray:
    """What flows back into a slot's own output (``kind="own"``) or out of what arrives at it
    (``"incoming"``): random, and the same on every side."""
    rng = np.random.default_rng(zlib.crc32(f"{kind} {name}".encode()))
    return rng.standard_normal(tuple(shape))


def isolate_flax(
    model: nnx.Module,
    images: np.ndarray,
    slots: Mapping[str, Path],
    precision: Precision,
    device: JaxDevice | None,
    *,
    reference: Trace,
    train: bool,
    gradients: bool,
) -> Isolation:
    """The Flax side; ``reference.inputs`` and ``reference.activations`` hold every slot of
    ``slots``."""
    with precision.on_jax(device):
        graphdef, params, rest = split_model(model, train)
        by_path = {path: name for name, path in slots.items()}
        dtype = precision.compute or precision.storage
        inputs = reference.inputs
        fed = {name: jnp.asarray(inputs[name], dtype) for name in slots if name in inputs}
        handed_on = {name: jnp.asarray(reference.activations[name], dtype) for name in slots}

        def run(params: Any, into: dict[str, Any], out_of: dict[str, Any], images: Any) -> Any:
            module = nnx.merge(graphdef, params, rest, copy=True)
            own: dict[str, Any] = {}
            incoming: dict[str, Any] = {}

            def exchanged(kept: dict[str, Any], given: dict[str, Any]) -> Callable[..., Any]:
                """Keeps a slot's value and hands on the one that is given for it."""

                def exchange(path: Path, value: Any) -> Any:
                    name = by_path.get(path)
                    if name not in given:
                        return value
                    kept[name] = value
                    return given[name]

                return exchange

            with hooked(module, exchanged(incoming, into), exchanged(own, out_of)):
                incoming["output"] = module(images)  # pyright: ignore[reportCallIssue]
            return own, incoming, nnx.state(module, nnx.BatchStat)

        x = jnp.asarray(images, precision.storage)
        if not gradients:
            compiled = jax.jit(run, compiler_options=options_for(device))
            own, incoming, statistics = compiled(params, fed, handed_on, x)
            return _isolation(host_tree(own), host_tree(incoming), arrays_by_path(statistics))
        shapes = jax.eval_shape(run, params, fed, handed_on, x)
        weights = [
            {n: jnp.asarray(cotangent_of(kind, n, one.shape), one.dtype) for n, one in part.items()}
            for kind, part in zip(_KINDS, shapes, strict=False)
        ]

        def loss(params: Any, into: Any, out_of: Any, x: Any, weights: Any) -> Any:
            own, incoming, statistics = run(params, into, out_of, x)
            total = sum(
                jnp.sum((value * weight[name]).astype(x.dtype))
                for part, weight in zip((own, incoming), weights, strict=True)
                for name, value in part.items()
            )
            return total, (own, incoming, statistics)

        gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
        compiled = jax.jit(gradient, compiler_options=options_for(device))
        found, (own, incoming, statistics) = compiled(params, fed, handed_on, x, weights)
        values = host_tree(own), host_tree(incoming), arrays_by_path(statistics)
        of_params, of_inputs, of_outputs = arrays_by_path(found[0]), *map(host_tree, found[1:])
        return _isolation(*values, of_params, of_inputs, of_outputs)


_KINDS = ("own", "incoming")
_QUANTITIES = ("forward", "connection", "statistics")
_QUANTITIES += ("parameter gradient", "input gradient", "connection gradient")


def _isolation(*found: dict[Any, np.ndarray]) -> Isolation:
    return dict(zip(_QUANTITIES, (*found, {}, {}, {}), strict=False))


def isolate_torch(
    module: torch.nn.Module,
    images: np.ndarray,
    slots: Mapping[str, str],
    precision: Precision,
    device: torch.device,
    *,
    reference: Trace,
    train: bool,
    gradients: bool,
) -> Isolation:
    """The PyTorch side of the same."""
    module = copy.deepcopy(module).to(device).train(train)
    own: dict[str, torch.Tensor] = {}
    incoming: dict[str, torch.Tensor] = {}
    into: dict[str, torch.Tensor] = {}
    out_of: dict[str, torch.Tensor] = {}

    def leaf(array: np.ndarray) -> torch.Tensor:
        tensor = as_tensor(array, precision, device)
        tensor = tensor if precision.compute is None else tensor.bfloat16()
        return tensor.requires_grad_(gradients)

    def on_input(name: str, _: Any, args: Any) -> Any:
        incoming[name] = args[0].clone()
        into[name] = leaf(reference.inputs[name])
        return (into[name].clone(), *args[1:])  # a clone, as an in-place operation may follow

    def on_output(name: str, _: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        own[name] = output.clone()
        out_of[name] = leaf(reference.activations[name])
        return out_of[name].clone()

    modules = dict(module.named_modules())
    for name, place in slots.items():
        if name in reference.activations:
            modules[place].register_forward_hook(partial(on_output, name))
        if name in reference.inputs:
            modules[place].register_forward_pre_hook(partial(on_input, name))
    with torch.set_grad_enabled(gradients):
        with precision.of_torch(device):
            incoming["output"] = module(as_tensor(images, precision, device))
        if gradients:
            terms = []
            for kind, part in zip(_KINDS, (own, incoming), strict=True):
                for name, value in part.items():
                    cotangent = cotangent_of(kind, name, as_array(value).shape)
                    weight = as_tensor(cotangent, precision, device).to(value.dtype)
                    widest = torch.promote_types(value.dtype, torch.float32)
                    terms.append((value * weight).to(widest).sum())
            torch.stack(terms).sum().backward()

    def arrays(tensors: Mapping[str, torch.Tensor]) -> dict[Any, np.ndarray]:
        return {name: as_array(value) for name, value in tensors.items()}

    statistics = {name: value.detach().cpu().numpy() for name, value in module.named_buffers()}
    found: list[dict[Any, np.ndarray]] = [arrays(own), arrays(incoming), statistics]
    if gradients:
        found.append(
            {n: gradient_of(value).cpu().numpy() for n, value in module.named_parameters()}
        )
        found += [arrays({n: gradient_of(v) for n, v in fed.items()}) for fed in (into, out_of)]
    return _isolation(*found)
