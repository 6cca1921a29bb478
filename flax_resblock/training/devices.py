"""The devices that share a run, and how arrays are placed on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_resblock.errors import InputError

AXIS = "data"
"""The mesh axis over which the images of a batch are spread."""


def data_mesh(devices: int | Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh with one axis, over which every batch is spread and the model is replicated.

    Args:
      devices: The devices. A number takes the first so many of this process; None takes all
        devices of all processes.
    Raises:
      InputError: More devices than there are.
    """
    if isinstance(devices, int):
        present = jax.local_devices() if jax.process_count() == 1 else jax.devices()
        if not 1 <= devices <= len(present):
            raise InputError(
                f"devices={devices} must be from 1 to {len(present)}, the "
                f"{jax.default_backend()} devices that jax has here."
            )
        if jax.process_count() > 1 and devices != len(present):
            raise InputError(
                f"devices={devices}: a run of {jax.process_count()} processes takes all of its "
                f"{len(present)} devices. Leave it out."
            )
        devices = present[:devices]
    chosen = sorted(
        jax.devices() if devices is None else devices,
        key=lambda device: (device.process_index, device.id),
    )  # rows of a batch follow the processes
    return Mesh(np.array(chosen), (AXIS,))


@dataclass(frozen=True)
class Placement:
    """How the arrays of a run are placed: every device has the whole state and a share of the
    images.

    Attributes:
      mesh: See :func:`data_mesh`; None uses jax's default device.
      default: That device, as the thread has it that makes the placement; other threads use it too.
    """

    mesh: Mesh | None = None
    default: Any = field(default_factory=lambda: jax.config.jax_default_device)  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def devices(self) -> int:
        """Number of devices over all processes."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def shard(self) -> tuple[int, int]:
        """Number of this process and of all processes; it reads that share of each batch."""
        return (0, 1) if self.mesh is None else (jax.process_index(), jax.process_count())

    @property
    def copied(self) -> NamedSharding | None:
        """The sharding of arrays that every device holds whole."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def check(self, batch_size: int, accumulate: int = 1) -> None:
        """Raises InputError unless the devices can share a batch equally."""
        piece = batch_size // accumulate
        if piece % self.devices:
            shared = piece - piece % self.devices
            lower, upper = shared * accumulate, (shared + self.devices) * accumulate
            near = f"{lower} or {upper}" if lower else f"{upper}"
            pieces = f" in {accumulate} pieces" if accumulate > 1 else ""
            raise InputError(
                f"batch_size={batch_size}{pieces} cannot be shared equally by {self.devices} "
                f"devices. Take {near}, or fewer devices."
            )

    def copies(self, tree: Any) -> Any:
        """Copies host arrays, the same in every process, to new buffers on every device."""
        sharding = self.copied
        if sharding is None:
            return jax.device_put(tree, may_alias=False)
        return jax.tree.map(lambda leaf: _copied(np.asarray(leaf), sharding), tree)

    def spread(self, array: np.ndarray, *, pieces: int = 1) -> jax.Array:
        """Puts this process's share of a batch on its devices, and makes one array of all shares.
        Does not wait for the copy to arrive.

        Args:
          array: One row per image.
          pieces: With more than one, the result gets a leading axis of so many pieces.
        """
        if pieces > 1:
            array = array.reshape(pieces, -1, *array.shape[1:])
        if self.mesh is None:
            with jax.default_device(self.default):
                return jax.device_put(array)
        spec = PartitionSpec(None, AXIS) if pieces > 1 else PartitionSpec(AXIS)
        return jax.make_array_from_process_local_data(NamedSharding(self.mesh, spec), array)

    def flag(self, value: bool) -> Any:
        """One int32 per device, from which every process can see whether any has set it."""
        return self.spread(np.full(self.devices // self.shard[1], value, np.int32))


def _copied(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(value.shape, sharding, lambda index: np.array(value[index]))


def on_host(tree: Any) -> Any:
    """Copies values that every device holds to numpy arrays."""
    return jax.tree.map(
        lambda x: np.array(x.addressable_data(0) if isinstance(x, jax.Array) else x), tree
    )
