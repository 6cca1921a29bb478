"""Valid files of every kind that this library opens, small, and the same in every run."""

from __future__ import annotations

import functools
import gzip
import io
import json
import pickle
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from flax_resblock import checkpoint
from flax_resblock.checkpoint.torch_file import with_tensors
from flax_resblock.config import BlockConfig
from flax_resblock.convert import NAMINGS, StateMap
from flax_resblock.convert.metadata import metadata_of

CONFIG = BlockConfig(in_channels=4, out_channels=4)
"""A block: few tensors, so that thousands of files can be opened in a second or two."""

Files = dict[str, bytes]
"""Content by name, relative to a folder; the first is what is opened."""


@functools.cache
def state() -> dict[str, np.ndarray]:
    """A state dict of random weights with asymmetric statistics."""
    rng = np.random.default_rng(0)
    tensors = {}
    for entry in StateMap(CONFIG, NAMINGS["torchvision"]).entries:
        counter = entry.role == "counter"
        tensors[entry.torch_key] = (
            np.array(7, np.int64)
            if counter
            else rng.uniform(0.1, 2, entry.torch_shape).astype(np.float32)
        )
    return tensors


def training() -> dict[str, Any]:
    """A training checkpoint: weights, optimizer, schedule, counters."""
    module = torch.nn.Linear(1, 1)
    names = [
        key for key, value in state().items() if value.dtype == np.float32 and "running" not in key
    ]
    parameters = [torch.nn.Parameter(torch.from_numpy(np.array(state()[name]))) for name in names]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.02)
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, 0.1 * (number + 1))
    optimizer.step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    del module
    return {
        "model": with_tensors(state()),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 0,
        "step": 1,
    }


def saved(content: Any, *, legacy: bool = False) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def written(name: str, **arguments: Any) -> Files:
    """What this library writes, digests included."""
    with tempfile.TemporaryDirectory() as folder:
        naming = NAMINGS["flax" if name in ("net", "net.msgpack") else "torchvision"]
        tensors = dict(
            zip(
                [e.torch_key for e in StateMap(CONFIG, naming).entries],
                _arrays(naming),
                strict=True,
            )
        )
        checkpoint.write(
            Path(folder) / name,
            tensors,
            metadata=metadata_of(CONFIG, "torchvision", {"eps": 1e-5, "momentum": 0.1}),
            **arguments,
        )
        top = Path(folder) / name
        files = [top, *(path for path in sorted(Path(folder).rglob("*")) if path != top)]
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in files
            if path.is_file()
        }


def flax_state() -> dict[str, np.ndarray]:
    """The same under Flax's names and in its layout."""
    naming = NAMINGS["flax"]
    keys = [entry.torch_key for entry in StateMap(CONFIG, naming).entries]
    return dict(zip(keys, _arrays(naming), strict=True))


def _arrays(naming: Any) -> list[np.ndarray]:
    source = StateMap(CONFIG, NAMINGS["torchvision"])
    flat = source.to_flax(state())
    return [
        entry.codec.to_torch(flat[entry.flax_path]) for entry in StateMap(CONFIG, naming).entries
    ]


def _shards() -> Files:
    keys = list(state())
    parts = {"model-00001.safetensors": keys[::2], "model-00002.safetensors": keys[1::2]}
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {key: name for name, part in parts.items() for key in part},
    }
    shards = {
        name: safetensors.numpy.save({key: state()[key] for key in part})
        for name, part in parts.items()
    }
    return {"model.safetensors.index.json": json.dumps(index).encode(), **shards}


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


@functools.cache
def _images() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (20, 5, 4), dtype=np.uint8), np.arange(20, dtype=np.uint8) % 3


def _idx_files() -> Files:
    images, labels = _images()
    return {
        "train-images-idx3-ubyte": _idx(images),
        "train-labels-idx1-ubyte.gz": gzip.compress(_idx(labels), mtime=0),
        "t10k-images-idx3-ubyte.gz": gzip.compress(_idx(images[:6]), mtime=0),
        "t10k-labels-idx1-ubyte": _idx(labels[:6]),
    }


def _cifar_bin() -> Files:
    rng = np.random.default_rng(2)
    sizes = ((10, 1), (256, 3072))  # a label, and an image
    records = [
        np.concatenate([rng.integers(0, most, (2, n), dtype=np.uint8) for most, n in sizes], axis=1)
        for _ in range(6)
    ]
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    return {name: part.tobytes() for name, part in zip(names, records, strict=True)}


def _cifar_py() -> Files:
    rng = np.random.default_rng(3)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    files = {}
    for name in names:
        content = {
            b"data": rng.integers(0, 256, (2, 3072), dtype=np.uint8),
            b"labels": [int(n) for n in rng.integers(0, 10, 2)],
            b"batch_label": name.encode(),
        }
        files[name] = pickle.dumps(content, protocol=2)
    return files


def _npz() -> Files:
    images, labels = _images()
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        images=images[..., None],
        labels=labels.astype(np.int64),
        mean=np.array([0.4]),
        std=np.array([0.2]),
    )
    return {"data.npz": buffer.getvalue()}


def certificate() -> dict[str, Any]:
    """A parity.json of one output that is there and one that is not."""
    entry = {
        "output": {"sha256": "ab" * 32},
        "tensors": {"conv1.weight": "cd" * 32},
        "verification": {"passed": True},
    }
    return {
        "schema": 1,
        "kind": "flax-resblock certificate",
        "outputs": {"net.safetensors": entry, "absent": entry},
    }


@functools.cache
def samples() -> dict[str, Files]:
    """Files by category."""
    plain = safetensors.numpy.save(state(), metadata={"note": "x"})
    run = training()
    return {
        "pth zip": {"net.pth": saved(with_tensors(state()))},
        "pth legacy": {"net.pth": saved(with_tensors(state()), legacy=True)},
        "pth with sidecar": written("net.pth"),
        "optimizer": {"net.pth": saved(run)},
        "safetensors": {"net.safetensors": plain},
        "safetensors with digests": written("net.safetensors"),
        "shard index": _shards(),
        "orbax": written("net"),
        "idx": _idx_files(),
        "cifar binary": _cifar_bin(),
        "cifar pickle": _cifar_py(),
        "npz": _npz(),
        "config json": {
            "parity.json": json.dumps(certificate()).encode(),
            "net.safetensors": plain,
        },
    }
