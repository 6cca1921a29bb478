"""A contestant for the tests of the benchmark on a device, whose behaviour its task names:
``right`` computes, ``wrong`` takes another step, ``crash`` and ``hang`` do that, and ``tired``
fails in its turn."""

import sys
import time

from flax_resblock.bench.worker import Task, TimedProgram, serve


def program(task, alone):
    if task.how == "hang":
        time.sleep(60)
    if task.how == "crash":
        raise MemoryError("out of memory, at 3 GB")
    weights, rate = [1.0], 0.2 if task.how == "wrong" else 0.1
    count = []

    def run():
        count.append(1)
        if task.how == "tired" and len(count) > 7:
            raise MemoryError("tired")
        loss = weights[0] ** 2
        weights[0] -= rate * 2 * weights[0]
        time.sleep(0.01)
        return loss

    rows = [{"name": "loop_convert_fusion", "scope": "x", "seconds": 0.02, "count": 6}]
    rows += [{"name": "sm90_xmma_fprop", "scope": "y", "seconds": 0.03, "count": 3}]
    return TimedProgram(
        "NVIDIA H200", run, lambda: None, float, lambda: 7 << 20, lambda repeat: rows
    )


if __name__ == "__main__":
    serve(Task.of(sys.argv[1]), program)
