"""Where private parts of JAX or XLA vanish, a CPU computes as plain XLA does, with a warning."""

import json

import pytest

from flax_resblock.cpu import onednn
from parity_tests.support import REPOSITORY, python

# Each takes one interface away, as a later JAX might.
LOSSES = {
    "jax.extend": "sys.modules['jax.extend.core'] = None",
    "jax.interpreters": "sys.modules['jax.interpreters'] = None; del jax.interpreters",
    "xla_metadata": "sys.modules['jax.experimental.xla_metadata'] = None",
    "a lowering rule": (
        "def refused(*args, **options): raise TypeError('rules are registered elsewhere')\n"
        "from jax.interpreters import mlir; mlir.register_lowering = refused"
    ),
    "XLA's option": "switch._OPTIONS = {'xla_cpu_renamed': '1'}",
}

PROGRAM = """
import json, sys, warnings
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
import flax_resblock
from flax_resblock.config import ResNetConfig
from flax_resblock.cpu import switch
from flax_resblock.nn.resnet import ResNet
from flax_resblock.training.pace import Rates
from flax_resblock.training.state import Leaves, split
from flax_resblock.training.step import make_train_step

assert not {f"flax_resblock.cpu.{name}" for name in ("forms", "primitives", "rewrite")} & set(
    sys.modules
)
LOSS

config = ResNetConfig(depths=(1,), widths=(64,), stem="imagenet", stem_width=64, num_classes=5)
images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)

def results():
    model = ResNet(config, rngs=nnx.Rngs(0))
    optimizer = optax.with_extra_args_support(optax.sgd(0.1))
    graphdef, state = split(model, optimizer)
    step, leaves = make_train_step(graphdef, optimizer), Leaves(state)
    labels = jnp.arange(4)
    loss = step.advance(leaves, jnp.asarray(images), labels, Rates(np.zeros(1, np.float32))).loss
    predict = flax_resblock.compile_inference(ResNet(config, rngs=nnx.Rngs(0)), images)
    return [np.asarray(each) for each in (loss, *leaves.arrays, predict(images))]

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = results()
    own = switch.for_cpu(), bool(flax_resblock.compiler_options())
    with flax_resblock.conv_lowering("xla"):
        plain = results()
lost = [str(each.message) for each in caught if "flax-resblock" in str(each.message)]
oneDNN = [str(each.message) for each in caught if "oneDNN" in str(each.message)]
same = all(np.array_equal(*pair) for pair in zip(found, plain, strict=True))
close = all(np.allclose(*pair, rtol=1e-3, atol=1e-4) for pair in zip(found, plain, strict=True))
print(json.dumps([lost, oneDNN, same, close, own]))
"""


def after(loss: str):
    code = PROGRAM.replace("LOSS", loss)
    done = python("-c", code, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.slow
def test_without_it_a_cpu_computes_as_plain_xla_does(name):
    lost, onednn_lost, same, _, own = after(LOSSES[name])
    assert len(lost) == 1
    assert "XLA's own operations" in lost[0]
    assert (onednn_lost, same, own) == ([], True, [False, False])


@pytest.mark.slow
def test_with_all_of_them_it_takes_its_own_forms_without_a_warning():
    """The control of the test above."""
    lost, onednn_lost, same, close, own = after("")
    assert (lost, onednn_lost, same, close, own) == ([], [], False, True, [True, True])


@pytest.mark.skipif(not onednn.available(), reason="this machine or this jaxlib has no oneDNN")
@pytest.mark.slow
def test_without_the_instruction_for_onednn_inference_takes_the_other_forms():
    loss = "from flax_resblock.cpu import onednn; onednn.TARGET = '__onednn$gone'"
    lost, onednn_lost, same, close, own = after(loss)
    assert len(onednn_lost) == 1
    assert (lost, same, close, own) == ([], False, True, [True, True])
