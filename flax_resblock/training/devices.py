"""Which devices share a run, and how arrays lie on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_resblock.errors import InputError

AXIS = "data"
"""The mesh axis that the images of a batch are spread over."""


def data_mesh(devices: int | Sequence[Any] | None = None) -> Mesh:
    """A mesh of one axis, over which every batch is spread and the model is copied.

    Args:
      devices: Which; a number takes the first that this process has; None takes all devices of all
        processes.
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
    """Where the arrays of a run lie: the state is copied to every device, the images are spread
    over them.

    Attributes:
      mesh: See :func:`data_mesh`; None leaves everything to jax, on its default device.
    """

    mesh: Mesh | None = None

    @property
    def devices(self) -> int:
        """Number of devices over all processes."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def shard(self) -> tuple[int, int]:
        """This process's number and how many there are: which part of each batch it reads."""
        return (0, 1) if self.mesh is None else (jax.process_index(), jax.process_count())

    @property
    def copied(self) -> NamedSharding | None:
        """Of arrays that every device has whole."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def check(self, batch_size: int, accumulate: int = 1) -> None:
        """Refuses a batch that the devices cannot share equally.

        Raises:
          InputError: It does not divide.
        """
        piece = batch_size // accumulate
        if piece % self.devices:
            lower, upper = (
                piece // self.devices * self.devices * accumulate,
                -(-piece // self.devices) * self.devices * accumulate,
            )
            near = f"{lower} or {upper}" if lower else f"{upper}"
            pieces = f" in {accumulate} pieces" if accumulate > 1 else ""
            raise InputError(
                f"batch_size={batch_size}{pieces} cannot be shared equally by {self.devices} "
                f"devices. Take {near}, or fewer devices."
            )

    def copies(self, tree: Any) -> Any:
        """Arrays of the host (the same in every process) on every device; new buffers, which a step
        may take.
        """
        sharding = self.copied
        if sharding is None:
            return jax.tree.map(lambda leaf: jax.numpy.array(leaf, copy=True), tree)
        return jax.tree.map(lambda leaf: _copied(np.asarray(leaf), sharding), tree)

    def spread(self, array: np.ndarray, *, axis: int = 0) -> Any:
        """This process's part of a batch, as part of one array over all devices.

        Args:
          array: The images of axis ``axis`` are this process's.
          axis: Which axis counts images.
        """
        if self.mesh is None:
            return array
        spec = PartitionSpec(*([None] * axis), AXIS)
        return jax.make_array_from_process_local_data(NamedSharding(self.mesh, spec), array)


def _copied(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(value.shape, sharding, lambda index: np.array(value[index]))


def on_host(tree: Any) -> Any:
    """Values that every device has, as numpy arrays of their own."""
    return jax.tree.map(
        lambda leaf: np.array(
            leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf, copy=True
        ),
        tree,
    )
