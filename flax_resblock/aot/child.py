"""The process that compiles: ``python -m flax_resblock.aot.child DESCRIPTOR``. The file descriptor
is that of a connection: it receives a list of requests and sends an answer to each.

It ends when the connection does, even in the middle of a compilation, because its parent is gone
then.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flax_resblock.aot.hlo import read_hlo
from flax_resblock.aot.outcome import MemoryUse, Outcome, bytes_needed
from flax_resblock.aot.request import Request
from flax_resblock.aot.targets import CHIPS, GPUS, TPUS, Target
from flax_resblock.errors import InputError, first_line


def devices_of(target: Target, slices: int) -> list[Any]:
    """The devices of a topology.

    Raises:
      InputError: The compiler knows no such topology.
    """
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if target.platform == "tpu":
        name = f"{TPUS[target.chip].compiler_name}:{target.topology}"
        if set(target.topology.split("x")) == {"1"}:
            options["chips_per_host_bounds"] = (1, 1, 1)
        if slices > 1:
            options["num_slices"] = slices
    else:
        name, configuration = "", GPUS[target.chip].description()
        options = {"topology": f"1x1x{target.topology}", "target_config": configuration}
    try:
        found = topologies.get_topology_desc(
            platform=target.platform, topology_name=name, **options
        )
        return list(found.devices)
    except Exception as error:  # the compilers raise several classes, none of their own
        raise InputError(
            f"the compiler for {target.platform} does not know {target}: {first_line(error)}. "
            f"Usual topologies are 1x1, 2x2, 4x4 and 2x2x1, 2x2x2."
        ) from error


def compile_one(request: Request) -> Outcome:
    """Compiles one program.

    Raises:
      InputError: The request cannot be compiled whatever the compiler.
    """
    from flax_resblock.aot.program import lower

    target = request.parsed_target
    devices = devices_of(target, request.slices)
    lowered = lower(request, devices)
    begun = time.monotonic()
    facts: dict[str, Any] = {"devices": len(devices), "device_kind": devices[0].device_kind}
    try:
        compiled = lowered.compile()
    except Exception as error:  # jaxlib's own class is private
        sizes = bytes_needed(str(error))
        if sizes is None:
            raise
        seconds = time.monotonic() - begun
        (needed, capacity), memory, program = sizes, None, None
    else:
        seconds = time.monotonic() - begun
        text = compiled.as_text()
        if request.hlo:
            Path(request.hlo).write_text(text, encoding="utf-8")
        memory, program = MemoryUse.of(compiled.memory_analysis()), read_hlo(text)
        needed, capacity = memory.total, CHIPS[target.platform][target.chip].memory
    facts |= {"seconds": seconds, "capacity": capacity, "needed": needed}
    return Outcome(**facts, memory=memory, program=program)


def _answer(request: Request) -> Outcome | InputError | str:
    """The outcome; or what was wrong with the request, or what the compiler said."""
    try:
        return compile_one(request)
    except InputError as error:
        return InputError(str(error))
    except Exception as error:  # of any class; the parent reports it
        return f"{type(error).__name__}: {error}"


def main() -> None:
    """Receives requests, compiles them and sends the outcomes."""
    connection = Connection(int(sys.argv[1]))

    def end_with_parent() -> None:
        with suppress(EOFError, OSError):
            connection.recv()
        os._exit(1)

    requests = connection.recv()
    threading.Thread(target=end_with_parent, daemon=True).start()
    for request in requests:
        connection.send(_answer(request))
    os._exit(0)  # without waiting for the compilers' threads


if __name__ == "__main__":
    main()
