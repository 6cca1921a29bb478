"""The programs that benchmarks/first_use.py times, as texts."""

from __future__ import annotations

from dataclasses import dataclass

PROCESS = """
import json, os, sys, time
import numpy as np
network, size, batch = {network!r}, {size}, {batch}
{prepare}
usage = None
start, before = time.perf_counter(), sum(os.times()[:4])
time.sleep({delay})
{work}
seconds, busy = time.perf_counter() - start, sum(os.times()[:4]) - before
# of this program alone: ru_maxrss begins with the peak of the process that started it
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
peak = int(peak) if usage is None else usage.ru_maxrss
print(json.dumps({{"s": seconds, "processor s": busy, "MB": peak / 1024}}))
"""
_JAX = """
import jax, jax.numpy as jnp, flax_resblock
from flax import nnx
images = np.random.default_rng(0).standard_normal((batch, size, size, 3)).astype(np.float32)
"""
_TORCH = """
import dataclasses, torch, torch_ref
from flax_resblock.config import architecture
images = torch.randn(batch, 3, size, size)
build = lambda: torch_ref.ResNet(**dataclasses.asdict(architecture(network)))
"""
_MODEL = "model = flax_resblock.load(network + '.pth')\n"
_OWN_PREDICTION = "np.asarray(flax_resblock.compile_inference(model, images)(images))"
_QUICK_PREDICTION = "np.asarray(flax_resblock.compile_inference(model, images, quick=True)(images))"
_PLAIN_PREDICTION = """
graphdef, state = nnx.split(model)
with flax_resblock.conv_lowering("xla"):
    np.asarray(jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, images))
"""
_STEP = """
model.train()
graphdef, params, rest = nnx.split(model, nnx.Param, ...)
def loss(params, rest, x):
    network = nnx.merge(graphdef, params, rest, copy=True)
    return -jnp.mean(jax.nn.log_softmax(network(x))[:, 1]), nnx.state(network, nnx.Not(nnx.Param))
def step(params, rest, x):
    (value, rest), slope = jax.value_and_grad(loss, has_aux=True)(params, rest, x)
    return value, jax.tree.map(lambda p, g: p - 1e-3 * g, params, slope), rest
with flax_resblock.conv_lowering({lowering!r}):
    options = dict(flax_resblock.compiler_options())
    jax.block_until_ready(jax.jit(step, compiler_options=options)(params, rest, images))
"""
_OWN_STEP, _PLAIN_STEP = _STEP.format(lowering="auto"), _STEP.format(lowering="xla")
_CHANNELS_LAST = """
module = build().eval().to(memory_format=torch.channels_last)
images = images.to(memory_format=torch.channels_last)
"""
_TORCH_FORWARD = "with torch.inference_mode(): module(images)"
_COMMAND = """
import shutil, subprocess
shutil.rmtree("run", ignore_errors=True)  # train replaces none
command = [sys.executable, "-m", "flax_resblock", *{arguments!r}]
"""
_WAITING = """
process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
assert status == 0, command
"""


@dataclass(frozen=True)
class Side:
    """One side of a comparison: code that runs before the clock, and code that is timed."""

    prepare: str
    work: str

    @classmethod
    def command(cls, *arguments: str) -> Side:
        """The whole of a command of ``flax-resblock``."""
        return cls(_COMMAND.format(arguments=arguments), _WAITING)


JAX_CREATES = Side(
    _JAX, "jax.block_until_ready(nnx.state(flax_resblock.create(network, rngs=nnx.Rngs(0))))"
)
PREDICTION = Side(_JAX + _MODEL, _OWN_PREDICTION), Side(_JAX + _MODEL, _PLAIN_PREDICTION)
QUICK = Side(_JAX + _MODEL, _QUICK_PREDICTION), PREDICTION[1]
STEP = Side(_JAX + _MODEL, _OWN_STEP), Side(_JAX + _MODEL, _PLAIN_STEP)
TORCH_CREATES = Side(_TORCH, "build()")
TORCH_PREDICTS = Side(_TORCH + _CHANNELS_LAST, _TORCH_FORWARD)
