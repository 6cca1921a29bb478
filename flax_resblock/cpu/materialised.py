"""Values that a CPU computes once and keeps in memory, instead of again wherever they are used.

XLA fuses cheap operations into everything that uses their result. On a CPU this is slower if there
are many users, such as the sixteen matrices of a Winograd convolution, or if the fused loop is no
longer vectorised. ``lax.optimization_barrier`` does not prevent it with jaxlib 0.10, which removes
the barrier before fusion. A call that may not be inlined does, with 0.10 and 0.12.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


@jax.jit
def _same(x: jax.Array) -> jax.Array:
    return lax.optimization_barrier(x)  # jax would forward the argument itself


def _on_cpu(x: jax.Array) -> jax.Array:
    with set_xla_metadata(inlineable="false"):
        return _same(x)


# a call that is not inlined has its operand in memory and returns the same memory
_materialised = Primitive("resblock_materialised")
_materialised.def_impl(lambda x: x)
_materialised.def_abstract_eval(lambda x: x)
ad.primitive_jvps[_materialised] = lambda values, tangents: (_materialised.bind(*values), *tangents)
batching.primitive_batchers[_materialised] = lambda values, axes: (
    _materialised.bind(*values),
    *axes,
)
mlir.register_lowering(_materialised, mlir.lower_fun(lambda x: x, multiple_results=False))
mlir.register_lowering(
    _materialised, mlir.lower_fun(_on_cpu, multiple_results=False), platform="cpu"
)


def materialised(x: jax.Array) -> Any:
    """Returns ``x``, which a program compiled for a CPU holds in memory at this point. On other
    platforms this adds nothing to the program. Derivatives are not affected.
    """
    return _materialised.bind(x)


@jax.custom_jvp
def kept(x: jax.Array) -> Any:
    """Returns ``x``, materialised where derivatives are taken: the backward pass uses it again."""
    return x


@kept.defjvp
def _(values: tuple[jax.Array], tangents: tuple[Any]) -> tuple[Any, Any]:
    return materialised(*values), *tangents
