"""The process that compiles: ``python -m flax_resblock.aot.child``. One request per line on stdin
up to an empty line, one outcome per line on stdout.

It ends when its stdin closes, even in the middle of a compilation, because its parent is gone then.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from flax_resblock.aot.hlo import read_hlo
from flax_resblock.aot.outcome import MemoryUse, Outcome, bytes_needed
from flax_resblock.aot.request import Request
from flax_resblock.aot.targets import GPUS, TPUS, Target
from flax_resblock.errors import InputError


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
        reason = str(error).strip().splitlines()[0][:300]
        raise InputError(
            f"the compiler for {target.platform} does not know {target}: {reason}. Usual "
            f"topologies are 1x1, 2x2, 4x4 and 2x2x1, 2x2x2."
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
        needed = bytes_needed(str(error))
        if needed is None:
            raise
        facts |= {"seconds": time.monotonic() - begun, "memory": None, "program": None}
        return Outcome(**facts, capacity=needed[1], needed=needed[0])
    facts["seconds"] = time.monotonic() - begun
    memory = MemoryUse.of(compiled.memory_analysis())
    text = compiled.as_text()
    if request.hlo:
        with open(request.hlo, "w", encoding="utf-8") as handle:
            handle.write(text)
    capacity = TPUS[target.chip].memory if target.platform == "tpu" else GPUS[target.chip].memory
    facts |= {"memory": memory, "needed": memory.total, "program": read_hlo(text)}
    return Outcome(**facts, capacity=capacity)


def _answers(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield {"outcome": compile_one(Request.from_json(line)).to_plain()}
        except InputError as error:
            yield {"input_error": str(error)}
        except Exception as error:  # of any class; the parent reports it
            yield {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Reads requests, compiles them and writes the outcomes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the compilers' own output goes to stderr
    lines = []
    for line in sys.stdin:
        if not line.strip():
            break
        lines.append(line)

    def end_with_stdin() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=end_with_stdin, daemon=True).start()
    for answer in _answers(iter(lines)):
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # without waiting for the compilers' threads


if __name__ == "__main__":
    main()
