"""A training run stays the same in both frameworks; another optimizer, decay or rate does not."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from flax_resblock import BlockConfig, ResNetConfig
from flax_resblock.config import architecture
from flax_resblock.parity.api import verify_pair
from flax_resblock.parity.comparison import Plan, compare_pair
from flax_resblock.parity.inputs import adversarial_images
from flax_resblock.parity.oracle import TRAJECTORY_LIMIT
from flax_resblock.parity.reference import ReferencePair
from flax_resblock.parity.trajectory import Recipe
from flax_resblock.runs.optimizers import adamw, bias_correction
from parity_tests.support import fast_only

NETWORK = ResNetConfig(
    depths=(1, 1), widths=(6, 10), stem="cifar", stem_width=6, shortcut="zero_pad", num_classes=5
)
BLOCK = BlockConfig(in_channels=5, out_channels=8, stride=2)


def trained(config, steps, **plan):
    images = adversarial_images(config, batch=4, height=11, width=8, seed=2)
    comparison = compare_pair(
        ReferencePair.random(config, 1), images, Plan(train=False, steps=steps, **plan)
    )
    return [m for m in comparison.measurements if m.step is not None]


@pytest.mark.parametrize(
    ("config", "optimizer"),
    [
        pytest.param(NETWORK, "sgd", marks=pytest.mark.slow),
        pytest.param(NETWORK, "adamw", marks=pytest.mark.slow),
        (BLOCK, "sgd"),
    ],
    ids=["sgd-network", "adamw-network", "sgd-block"],
)
def test_every_step_is_the_same(config, optimizer):
    rows = trained(config, 8, optimizers=(optimizer,), precisions=("float64", "float32"))
    assert all(m.verdict.passed for m in rows)
    assert {m.step for m in rows} == set(range(1, 9))
    assert {m.quantity for m in rows} == {
        f"{optimizer}: {what}"
        for what in ("loss", "parameters", "running statistics", "eval logits")
    }
    assert max(m.verdict.error for m in rows if m.precision == "float64") < TRAJECTORY_LIMIT


WRONG = {
    "no Nesterov": (
        "sgd",
        lambda r: optax.chain(
            optax.add_decayed_weights(r.weight_decay),
            optax.sgd(r.learning_rate, momentum=r.momentum),
        ),
    ),
    "another momentum": ("sgd", lambda r: replace(r, momentum=0.899).of_optax()),
    "no weight decay": ("sgd", lambda r: replace(r, weight_decay=0.0).of_optax()),
    "decoupled decay": (
        "sgd",
        lambda r: optax.chain(
            optax.trace(r.momentum, nesterov=True),
            optax.add_decayed_weights(r.weight_decay),
            optax.scale(-r.learning_rate),
        ),
    ),
    "coupled decay": (
        "adamw",
        lambda r: optax.chain(
            optax.add_decayed_weights(r.weight_decay), optax.adam(r.learning_rate)
        ),
    ),
    "no bias correction": (
        "adamw",
        lambda r: optax.chain(optax.scale_by_rms(0.999), optax.scale(-r.learning_rate)),
    ),
    "another rate": (
        "adamw",
        lambda r: replace(r, learning_rate=r.learning_rate * 1.001).of_optax(),
    ),
}


@pytest.mark.parametrize(
    "fault",
    fast_only(["another momentum", "coupled decay"], WRONG),
)
def test_another_optimizer_fails_by_a_hundred_times_the_limit(fault, monkeypatch):
    name, make = WRONG[fault]
    original = Recipe.of_optax

    def wrong(self):
        monkeypatch.setattr(Recipe, "of_optax", original)
        return make(self)

    monkeypatch.setattr(Recipe, "of_optax", wrong)
    rows = trained(BLOCK, 3, optimizers=(name,), precisions=("float64",))
    assert max(m.verdict.excess for m in rows) > 100


@pytest.mark.slow
def test_a_rate_of_ones_own_is_used():
    rows = trained(BLOCK, 2, optimizers=("sgd",), precisions=("float64",), learning_rate=1e-4)
    assert all(m.verdict.passed for m in rows)


@pytest.mark.slow
def test_chaotic_training_is_called_chaotic():
    config = ResNetConfig(
        block="bottleneck", depths=(3, 3), widths=(4, 6), stem="cifar", stem_width=6, num_classes=5
    )
    images = adversarial_images(config, batch=3, height=6, width=5, seed=2)
    plan = Plan(train=False, steps=9, optimizers=("sgd",), precisions=("float64",))
    assert verify_pair(ReferencePair.random(config, 1), images, plan).passed
    found = verify_pair(ReferencePair.random(config, 1), images, replace(plan, learning_rate=10.0))
    assert not found.passed
    assert found.diagnosis == ()
    assert "training is chaotic" in " ".join(found.notes)


@pytest.mark.parametrize("count", [1, 2, 10, 1000, 100_000])
@pytest.mark.parametrize("decay", [0.9, 0.999, 0.0])
def test_bias_correction_is_exact_in_float32(count, decay):
    truth = 1 - np.float64(decay) ** count
    assert float(bias_correction(decay, jnp.asarray(count), jnp.float32)) == pytest.approx(
        truth, rel=3e-7
    )


def test_optax_loses_digits_in_the_bias_correction_and_this_adamw_does_not():
    """One parameter, one step, against torch in float64."""
    start, gradient = np.array([0.3, -1.7], np.float32), np.array([0.02, -3.0], np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(start.astype(np.float64)))
    parameter.grad = torch.from_numpy(gradient.astype(np.float64))
    torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.01).step()
    moved = parameter.detach().numpy() - start

    def error(optimizer):
        updates, _ = optimizer.update(
            jnp.asarray(gradient), optimizer.init(jnp.asarray(start)), jnp.asarray(start)
        )
        return float(np.max(np.abs(np.asarray(updates, np.float64) / moved - 1)))

    assert error(adamw(0.1, weight_decay=0.01)) < 5e-7
    assert error(optax.adamw(0.1, weight_decay=0.01)) > 1e-6


def test_the_state_of_adamw_is_optaxs():
    params = {"a": jnp.ones((2, 3)), "b": jnp.zeros(4)}
    ours, theirs = (
        jax.tree.structure(make(1e-3, weight_decay=0.01).init(params)[0])
        for make in (adamw, optax.adamw)
    )
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "optimizer", "steps"), [("resnet18", "sgd", 10), ("resnet50", "adamw", 3)]
)
def test_whole_networks_are_trained_alike(name, optimizer, steps):
    """The claim of docs/verification.md, which has the command for twenty steps of both."""
    images = adversarial_images(architecture(name), batch=4)
    plan = Plan(train=False, steps=steps, optimizers=(optimizer,), precisions=("float64",))
    comparison = compare_pair(ReferencePair.random(architecture(name)), images, plan)
    assert all(m.verdict.passed for m in comparison.measurements)
    assert {m.step for m in comparison.measurements if m.step} == set(range(1, steps + 1))
