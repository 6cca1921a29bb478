"""Runs of several processes: how they find each other, and what happens when one of them dies.

jax is imported late, because connecting must come before anything else that it does.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from flax_resblock.errors import InputError, first_line, reason

PEER_LOST = 3
"""Exit status of a process whose peer died."""
_HEARTBEAT = 10
"""Seconds without an answer after which a process counts as dead."""
_CHIPS = ("/dev/accel*", "/dev/vfio/[0-9]*")
"""Device files of TPU chips."""
_MAYBE_ALONE = "Cloud TPU VM"
"""A host with chips, perhaps one of several; jax asks its metadata server."""
_DONE = b"."
"""Sent by a process that ends normally."""
_KEY = "flax_resblock/watch"
_PATIENCE = 300
"""Seconds that processes wait for each other to start."""
_INTRODUCTION = 30
"""Seconds that they then wait for the connections between them."""


def _several(name: str) -> Any:
    return lambda env: (count := env.get(name, "1")).isdigit() and int(count) > 1


_SIGNS: Mapping[str, Any] = {
    "JAX_COORDINATOR_ADDRESS": lambda env: "JAX_COORDINATOR_ADDRESS" in env,
    "Slurm": _several("SLURM_STEP_NUM_TASKS"),
    "Open MPI": _several("OMPI_COMM_WORLD_SIZE"),
    "Kubernetes": lambda env: {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(env),
    "TPU pod": lambda env: (
        "," in env.get("TPU_WORKER_HOSTNAMES", env.get("TPU_PROCESS_ADDRESSES", ""))
    ),
    "TPU multislice": lambda env: "MEGASCALE_COORDINATOR_ADDRESS" in env,
}
"""The environment variables by which a cluster is recognised; jax reads the rest itself."""


def detected(environment: Mapping[str, str] | None = None) -> str | None:
    """The kind of cluster that started this process; None for a single process."""
    environment = os.environ if environment is None else environment
    found = next((name for name, present in _SIGNS.items() if present(environment)), None)
    chips = importlib.util.find_spec("libtpu") is not None and any(map(glob.glob, _CHIPS))
    if found is None and chips and environment.get("TPU_SKIP_MDS_QUERY") is None:
        return _MAYBE_ALONE
    return found


@dataclass(frozen=True)
class Cluster:
    """How the processes of a run find each other. On TPU pods, Slurm, Open MPI and Kubernetes they
    do so by themselves.

    Attributes:
      coordinator: HOST:PORT of process 0.
      num_processes: Number of processes, with a coordinator.
      process_id: Number of this process, from 0, with a coordinator.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def check(self) -> None:
        """Raises InputError if only some of the three are given, or one is out of its range."""
        given = (self.coordinator, self.num_processes, self.process_id)
        if self.coordinator is None and given != (None, None, None):
            raise InputError(
                "`num_processes=...` and `process_id=...` belong to a run of several processes, "
                "which needs `coordinator=HOST:PORT` of process 0 too."
            )
        if self.coordinator is not None and detected() is None:
            if self.num_processes is None or self.process_id is None:
                raise InputError(
                    f"`coordinator={self.coordinator}` needs `num_processes=...` and "
                    f"`process_id=...` too; nothing in the environment tells them."
                )
            if not 0 <= self.process_id < self.num_processes:
                raise InputError(
                    f"`process_id={self.process_id}` must be from 0 to "
                    f"`num_processes={self.num_processes}` less one."
                )
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
            raise InputError(f"`coordinator={self.coordinator}` must be HOST:PORT of process 0.")


def connect(cluster: Cluster) -> bool:
    """Connects the processes of a run. Call it before anything else that uses jax.

    Args:
      cluster: How they find each other; without a coordinator the environment decides.
    Returns:
      Whether there are several.
    Raises:
      InputError: They did not find each other.
    """
    import jax

    cluster.check()
    kind = detected() if cluster.coordinator is None else "`coordinator=...`"
    if kind is None:
        return False
    try:
        place = cluster.coordinator, cluster.num_processes, cluster.process_id
        jax.distributed.initialize(
            *place, initialization_timeout=_PATIENCE, heartbeat_timeout_seconds=_HEARTBEAT
        )
        jax.devices()  # every process takes part in this
    except Exception as error:  # jax, gRPC and the detection of clusters raise all kinds
        if kind == _MAYBE_ALONE and not jax.distributed.is_initialized():
            return False
        raise InputError(
            f"the processes of this run ({kind}) did not find each other ({first_line(error)}). "
            "Check that `coordinator=...` names process 0, that as many processes as "
            "`num_processes=...` says were started, each with its own `process_id=...`, and that "
            "the port is open."
        ) from error
    if jax.process_count() > 1:
        _watch()
    return jax.process_count() > 1


def lost(who: str) -> NoReturn:
    """Ends this process at once; to shut jax down in order would wait for the lost process."""
    import jax

    number, count = jax.process_index(), jax.process_count()
    print(
        f"flax-resblock: {who} of {count} is gone; process {number} cannot go on without it. Start "
        "all of them again with `flax-resblock train --resume auto`: the run goes on from its last "
        "checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(PEER_LOST)


_connections: list[socket.socket] = []


def leave() -> None:
    """Tells the other processes that this one ends normally."""
    for connection in _connections:
        with suppress(OSError):
            connection.sendall(_DONE)


def _watch() -> None:
    """Connects every process to process 0, so that the others notice at once when one dies: its
    connection closes. Behind a firewall, jax's heartbeats notice it later.
    """
    import jax
    from jax._src.distributed import global_state  # jax's key-value store has no public name

    client: Any = global_state.client
    try:
        if jax.process_index() == 0:
            host = (global_state.coordinator_address or "localhost").rpartition(":")[0].strip("[]")
            with socket.create_server(("", 0)) as listener:
                client.key_value_set(_KEY, f"{host}:{listener.getsockname()[1]}")
                listener.settimeout(_INTRODUCTION)
                for _ in range(1, jax.process_count()):
                    connection, _ = listener.accept()
                    _observe(connection, f"process {int.from_bytes(connection.recv(4), 'big')}")
        else:
            host, _, port = client.blocking_key_value_get(_KEY, _PATIENCE * 1000).rpartition(":")
            connection = socket.create_connection((host, int(port)), timeout=_INTRODUCTION)
            connection.sendall(jax.process_index().to_bytes(4, "big"))
            _observe(connection, "process 0")
    except OSError as error:
        print(
            f"flax-resblock: process {jax.process_index()} cannot watch the others "
            f"({reason(error)}); if one dies, this is noticed within {_HEARTBEAT} s.",
            file=sys.stderr,
        )


def _observe(connection: socket.socket, who: str) -> None:
    _connections.append(connection)
    connection.settimeout(None)

    def wait() -> None:
        try:
            last = connection.recv(1)
        except OSError:
            last = b""
        if last != _DONE:
            lost(who)

    threading.Thread(target=wait, name=f"watch {who}", daemon=True).start()
