"""Files as JAX programs write them: valid ones, and what changes them with knowledge of them."""

from __future__ import annotations

import importlib.util
import io
import pickle
import random
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
from flax import serialization

from parity_tests.fuzz import pickles
from parity_tests.fuzz.mutations import in_zip, npy, one_of, some_bytes, some_json
from parity_tests.fuzz.samples import Files, flax_state, written

HAS_H5 = importlib.util.find_spec("h5py") is not None
STATISTICS = ("mean", "var", "num_batches_tracked")


def variables() -> dict[str, Any]:
    """Linen's, of the block of the other samples."""
    tree: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name, value in flax_state().items():
        module, _, leaf = name.rpartition(".")
        node = tree["batch_stats" if leaf in STATISTICS else "params"]
        for part in module.split("."):
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


def paths() -> dict[str, np.ndarray]:
    """The same by paths, in collections."""
    return {
        f"{'batch_stats' if name.rpartition('.')[2] in STATISTICS else 'params'}/"
        f"{name.replace('.', '/')}": value
        for name, value in flax_state().items()
    }


def _npz() -> bytes:
    buffer = io.BytesIO()
    content: dict[str, Any] = paths()
    np.savez(buffer, **content)
    return buffer.getvalue()


def _h5() -> bytes:
    import h5py  # pyright: ignore[reportMissingImports]

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        for name, value in paths().items():
            file.create_dataset(name, data=value)
    return buffer.getvalue()


def _state(files: Files, rng: random.Random) -> Files:
    """A training state in msgpack with something else in it, or in its arrays."""
    ((name, data),) = files.items()
    if rng.random() < 0.4:
        return {name: some_bytes(data, rng)}
    tree: Any = {**variables(), "opt_state": {"0": {"count": 3}}, "step": 5}

    def packed(value: Any) -> Any:
        array = np.asarray(value)
        shape: Any = list(array.shape)
        parts = [shape, array.dtype.name, array.tobytes()]
        if rng.random() < 0.1:
            place = rng.randrange(3)
            parts[place] = some_json(parts[place], rng) if place < 2 else parts[2][:-1]
        return msgpack.ExtType(rng.choice((1, 1, 1, 1, 1, 1, 1, 2, 3, 9)), msgpack.packb(parts))

    if rng.random() < 0.5:
        tree = some_json(tree, rng)
    try:
        return {name: msgpack.packb(tree, default=packed)}
    except (ValueError, OverflowError, TypeError, RecursionError):  # it has no place for that
        return files


def jax_samples() -> dict[str, Files]:
    """Files by category."""
    plain: Any = variables()
    found = {
        "msgpack": {"net.msgpack": serialization.msgpack_serialize(plain)},
        "msgpack with digests": written("net.msgpack"),
        "npz of weights": {"net.npz": _npz()},
        "pickle": {"net.pkl": pickle.dumps(variables(), protocol=4)},
    }
    return found | ({"h5": {"net.h5": _h5()}} if HAS_H5 else {})


JAX_MUTATIONS: dict[str, Callable[[Files, random.Random], Files]] = {
    "msgpack": _state,
    "msgpack with digests": one_of(some_bytes),
    "npz of weights": one_of(lambda data, rng: in_zip(data, rng, npy, ".npy")),
    "pickle": one_of(
        lambda data, rng: some_bytes(data, rng) if rng.random() < 0.5 else pickles.mutate(data, rng)
    ),
}
if HAS_H5:
    JAX_MUTATIONS["h5"] = one_of(some_bytes)


def reference(name: str, data: bytes) -> dict[str, np.ndarray] | None:
    """The arrays of a file by its format's own reader; None for a pickle, which is not run."""
    if name.endswith(".msgpack"):
        return _flat(serialization.msgpack_restore(data))
    if name.endswith(".npz"):
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {key.replace("/", "."): arrays[key] for key in arrays.files}
    if name.endswith(".h5"):
        import h5py  # pyright: ignore[reportMissingImports]

        # by key, as visititems() gives up where the cache of a damaged file has two minds
        with h5py.File(io.BytesIO(data), "r") as file:
            return _flat_h5(file)
    return None


def _flat(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        named = [(str(key).replace("/", "."), value) for key, value in items]
        parts = [_flat(value, f"{prefix}.{key}" if prefix else key) for key, value in named]
        return {name: value for part in parts for name, value in part.items()}
    return {prefix: np.asarray(tree)} if isinstance(tree, np.ndarray | np.generic) else {}


def _flat_h5(group: Any, prefix: str = "") -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for key, item in group.items():
        name = f"{prefix}.{key}" if prefix else key
        found |= _flat_h5(item, name) if hasattr(item, "items") else {name: item[()]}
    return found
