"""Optimizers, clipping, accumulation, averages, decay: each against an independent statement."""

import copy
import dataclasses
import json

import jax
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

from flax_resblock import checkpoint, from_torch, load_run, save, to_torch, training
from flax_resblock.convert import NAMINGS, StateMap
from flax_resblock.errors import InputError
from flax_resblock.runs.optimizer_state import fresh_optimizer
from flax_resblock.runs.optimizers import optimizer_of
from flax_resblock.training import TrainConfig
from flax_resblock.training.config import with_settings
from flax_resblock.training.data import Stream
from flax_resblock.training.pace import schedule_of
from flax_resblock.training.run_folder import RunFolder
from flax_resblock.training.step import clipped
from parity_tests import scale
from parity_tests.support import fast_only, worst
from torch_ref import ResNet
from torch_ref import training as torch_training

LIMIT = 1e-10
"""Of trajectories in float64, as for moving runs."""


@pytest.fixture(autouse=True, scope="module")
def wide():
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def ended(**changes):
    """Weights at the end of twenty steps, and what the run reported."""
    model, (images, _) = scale.start_model(), scale.images()
    config = dataclasses.replace(scale.CONFIG, **changes)
    history = training.fit(model, images, config, progress=False)
    return to_torch(model), history


def in_torch(optimizer=None, accumulate=1, clip=None, average=0.0):
    """The same twenty steps as written in PyTorch; the weights and their averages."""
    config, (images, _) = scale.CONFIG, scale.images()
    model = ResNet(**dataclasses.asdict(config.model)).double()
    model.load_state_dict(
        {key: torch.from_numpy(value) for key, value in to_torch(scale.start_model()).items()}
    )
    optimizer = (
        optimizer(model)
        if optimizer
        else torch_training.sgd(model, config.learning_rate, weight_decay=config.weight_decay)
    )
    scheduler = torch_training.warmup_cosine(
        optimizer, warmup_steps=config.warmup(1), total_steps=20, warmup_factor=config.warmup_factor
    )
    averaged = copy.deepcopy(model.state_dict())
    stream = Stream(
        images, config.batch_size, seed=config.seed, augmentation=config.augmentation
    ).from_step(0)
    for batch, _ in zip(stream, range(20), strict=False):
        optimizer.zero_grad()
        x = torch.from_numpy(batch.images.transpose(0, 3, 1, 2).astype(np.float64))
        labels = torch.from_numpy(batch.labels.astype(np.int64))
        for part in range(accumulate):
            piece = slice(part * len(labels) // accumulate, (part + 1) * len(labels) // accumulate)
            (F.cross_entropy(model(x[piece]), labels[piece]) / accumulate).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            for key, value in model.state_dict().items():
                averaged[key] = (
                    average * averaged[key] + (1 - average) * value
                    if value.is_floating_point()
                    else value.clone()
                )
    return {key: value.numpy() for key, value in model.state_dict().items()}, {
        key: value.numpy() for key, value in averaged.items()
    }


def groups(model, decay, names):
    """Param groups of a person's own script: what is named decays."""
    kinds = {
        "kernel": lambda m: isinstance(m, torch.nn.Conv2d | torch.nn.Linear),
        "scale": lambda m: isinstance(m, torch.nn.BatchNorm2d),
    }
    decaying = {
        m.weight for m in model.modules() for name in names if name in kinds and kinds[name](m)
    }
    decaying |= {
        m.bias for m in model.modules() if "bias" in names and getattr(m, "bias", None) is not None
    }
    parts = [
        [p for p in model.parameters() if (p in decaying) == wanted] for wanted in (True, False)
    ]
    return [
        {"params": part, "weight_decay": d}
        for part, d in zip(parts, (decay, 0.0), strict=True)
        if part
    ]


RECIPES = {
    "AdamW": (
        {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)},
        {
            "optimizer": lambda m: torch.optim.AdamW(
                groups(m, 0.1, ("kernel",)), lr=0.01, betas=(0.8, 0.95)
            )
        },
    ),
    "Adam": (
        {"optimizer": "adam", "learning_rate": 0.01, "weight_decay": 0.1},
        {"optimizer": lambda m: torch.optim.Adam(groups(m, 0.1, ("kernel",)), lr=0.01)},
    ),
    "everything decays": (
        {"decay": ("kernel", "scale", "bias"), "weight_decay": 0.05},
        {
            "optimizer": lambda m: torch.optim.SGD(
                m.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.05
            )
        },
    ),
    "scales decay": (
        {"decay": ("scale",), "weight_decay": 0.05},
        {
            "optimizer": lambda m: torch.optim.SGD(
                groups(m, 0.05, ("scale",)), lr=0.05, momentum=0.9, nesterov=True
            )
        },
    ),
    "no Nesterov": (
        {"nesterov": False},
        {"optimizer": lambda m: torch_training.sgd(m, 0.05, nesterov=False)},
    ),
    "no momentum": (
        {"momentum": 0.0, "nesterov": False},
        {"optimizer": lambda m: torch_training.sgd(m, 0.05, momentum=0.0, nesterov=False)},
    ),
    "clipped gradients": ({"clip_norm": 0.7}, {"clip": 0.7}),
    "four pieces": ({"accumulate": 4}, {"accumulate": 4}),
    "four clipped pieces": ({"accumulate": 4, "clip_norm": 0.7}, {"accumulate": 4, "clip": 0.7}),
}


@pytest.fixture(scope="module")
def plain():
    return in_torch()[0]


@pytest.mark.parametrize("recipe", fast_only(["AdamW"], RECIPES))
def test_a_recipe_is_pytorchs(recipe, plain):
    ours, theirs = RECIPES[recipe]
    truth = in_torch(**theirs)[0]
    assert worst(ended(**ours)[0], truth) <= LIMIT
    assert worst(plain, truth) >= 1e6 * LIMIT  # the control: without it, it is another run


@pytest.mark.slow
def test_averages_are_those_of_weights_and_statistics_after_every_step(tmp_path):
    _, truth = in_torch(average=0.9)
    model, (images, test) = scale.start_model(), scale.images()
    config = dataclasses.replace(scale.CONFIG, ema=0.9)
    history = training.fit(model, images, config, test=test, progress=False)
    state_map = StateMap(config.model, NAMINGS["torchvision"])
    assert worst(state_map.to_torch(history.run.ema), truth) <= LIMIT
    assert worst(to_torch(model), truth) >= 1e6 * LIMIT
    averaged = from_torch(state_map.to_torch(history.run.ema))
    judged = history.evaluations[-1]
    found = training.evaluate(averaged, test.normalised(), test.labels)
    assert (judged.ema_accuracy, judged.ema_loss) == pytest.approx(
        (found.accuracy, found.loss), rel=1e-12
    )
    assert judged.ema_loss != pytest.approx(judged.loss, rel=1e-3)
    assert judged.best == (judged.ema_accuracy, judged.ema_loss)
    for name in ("run.safetensors", "run", "run.pth"):
        save(model, tmp_path / name, run=history.run)
        _, copied = load_run(tmp_path / name)
        assert copied.ema.keys() == history.run.ema.keys()
        assert all(
            copied.ema[path].tobytes() == value.tobytes() for path, value in history.run.ema.items()
        )


@pytest.mark.slow
def test_averages_alone_are_read_from_every_format(tmp_path):
    model, (images, _) = scale.start_model(), scale.images()
    history = training.fit(
        model, images, dataclasses.replace(scale.CONFIG, ema=0.9), progress=False
    )
    truth = StateMap(scale.CONFIG.model, NAMINGS["torchvision"]).to_torch(history.run.ema)
    from flax_resblock.convert.opening import open_checkpoint
    from flax_resblock.io import to_model

    for name in ("run.safetensors", "run", "run.pth"):
        save(model, tmp_path / name, run=history.run)
        found = to_torch(to_model(open_checkpoint(tmp_path / name, entry="model_ema")))
        assert all(found[key].tobytes() == value.tobytes() for key, value in truth.items())
    save(model, tmp_path / "none.safetensors", run=dataclasses.replace(history.run, ema={}))
    with pytest.raises(InputError, match="keeps no averaged weights"):
        open_checkpoint(tmp_path / "none.safetensors", entry="model_ema")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_lars_and_lamb_are_optaxs(kind):
    """Trust ratio and decay of the kernels alone, as the papers have it."""
    model = scale.start_model()
    graphdef, params, _ = nnx.split(model, nnx.Param, nnx.BatchStat)
    del graphdef
    mask = jax.tree_util.tree_map_with_path(
        lambda keys, _: (
            keys[-1].key == "kernel" if hasattr(keys[-1], "key") else "kernel" in str(keys)
        ),
        params,
    )
    adapted = lambda ratio: optax.masked(ratio, mask)  # noqa: E731
    if kind == "lars":
        options = {
            "lr": 0.3,
            "momentum": 0.8,
            "weight_decay": 1e-2,
            "nesterov": True,
            "trust_coefficient": 0.02,
        }
        theirs = optax.chain(
            optax.add_decayed_weights(1e-2, mask),
            adapted(optax.scale_by_trust_ratio(trust_coefficient=0.02)),
            optax.scale_by_learning_rate(0.3),
            optax.trace(0.8, nesterov=True),
        )
    else:
        options = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
        theirs = optax.chain(
            optax.scale_by_adam(0.8, 0.95, 1e-6),
            optax.add_decayed_weights(0.1, mask),
            adapted(optax.scale_by_trust_ratio()),
            optax.scale_by_learning_rate(0.01),
        )
    state_map = StateMap(scale.CONFIG.model, NAMINGS["torchvision"])
    ours = optimizer_of(fresh_optimizer(kind, state_map, **options))
    sgd = optimizer_of(fresh_optimizer("sgd", state_map, lr=0.3, momentum=0.8, nesterov=True))
    rng = np.random.default_rng(5)
    ends = []
    draws = [
        jax.tree.map(lambda leaf: np.asarray(rng.normal(0, 0.1, leaf.shape)), params)
        for _ in range(6)
    ]
    for optimizer in (ours, theirs, sgd):
        values, state = params, optimizer.init(params)
        for gradients in draws:
            updates, state = optimizer.update(gradients, state, values)
            values = optax.apply_updates(values, updates)
        ends.append(
            {str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(values))}
        )
    assert worst(ends[0], ends[1]) <= 1e-12
    assert worst(ends[2], ends[1]) >= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lars", "lamb"])
def test_a_run_with_lars_or_lamb_goes_on_from_a_file_but_not_in_pytorch(kind, tmp_path):
    changes = {
        "optimizer": kind,
        "learning_rate": 1.0 if kind == "lars" else 0.01,
        "nesterov": False,
        "steps": 8,
        "warmup_steps": 2,
    }
    whole, _ = ended(**changes)
    model, (images, _) = scale.start_model(), scale.images()
    config = dataclasses.replace(scale.CONFIG, **changes)
    with RunFolder(tmp_path / "out", config, every=3) as folder:
        training.fit(model, images, config, saver=folder, progress=False)
    model, run = load_run(tmp_path / "out" / "checkpoints" / "step-00000003")
    training.fit(model, images, config, run=run, progress=False)
    assert worst(to_torch(model), whole) == 0
    with pytest.raises(InputError, match=f"{kind} has no counterpart in torch.optim"):
        save(model, tmp_path / "run.pth", run=run)
    assert not (tmp_path / "run.pth").exists()


def test_gradients_are_shortened_as_torch_does():
    rng = np.random.default_rng(2)
    gradients = {"a": rng.normal(0, 3, (4, 5)), "b": rng.normal(0, 3, 7)}
    for limit in (0.5, 1e3):
        tensors = [
            torch.nn.Parameter(torch.zeros(value.shape, dtype=torch.float64))
            for value in gradients.values()
        ]
        for tensor, value in zip(tensors, gradients.values(), strict=True):
            tensor.grad = torch.from_numpy(value.copy())
        torch.nn.utils.clip_grad_norm_(tensors, limit)
        for found, tensor in zip(clipped(gradients, limit).values(), tensors, strict=True):
            np.testing.assert_allclose(found, tensor.grad.numpy(), rtol=1e-14)


def test_a_length_in_steps_ends_there_and_takes_the_schedule_with_it():
    _, history = ended(steps=13, warmup_steps=4)
    assert [step.step for step in history.steps] == list(range(13))
    assert history.run.steps == 13
    rates = [step.learning_rate for step in history.steps]
    assert rates[4] == max(rates) == 0.05
    config = dataclasses.replace(scale.CONFIG, steps=13, warmup_steps=4)
    assert rates == [schedule_of(config, 44).rate(step, {"lr": 0.05}) for step in range(13)]
    by_epochs = with_settings(config, {"epochs": 4})
    assert (by_epochs.steps, by_epochs.end(44)) == (None, 176)
    with pytest.raises(
        InputError, match="the warm-up of 132 steps is not below the 13 steps of the run"
    ):
        dataclasses.replace(scale.CONFIG, steps=13, warmup_steps=None, warmup_epochs=3.0).warmup(44)


def test_settings_of_another_version_are_refused_by_name():
    with pytest.raises(InputError, match="the settings flux are unknown to this version"):
        with_settings(TrainConfig(), {"flux": 1})


@pytest.mark.slow
def test_the_best_checkpoint_stays_and_is_linked(tmp_path):
    images, test = scale.images()
    config = dataclasses.replace(
        scale.CONFIG, steps=None, epochs=6, batch_size=240, warmup_steps=None, learning_rate=0.2
    )
    with RunFolder(tmp_path / "out", config, every=1, keep=1) as folder:
        hooks = {"on_step": folder.record, "on_evaluation": folder.evaluated, "saver": folder}
        model = scale.start_model()
        history = training.fit(model, images, config, test=test, progress=False, **hooks)
        folder.finish(1.0)
    best = max(history.evaluations, key=lambda judged: (judged.accuracy, -judged.loss))
    assert (tmp_path / "out" / "best").resolve().name == f"step-{best.step:08d}"
    left = {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()}
    assert left == {f"step-{best.step:08d}", f"step-{config.epochs * 5:08d}"}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["best_step"], summary["best_accuracy"]) == (best.step, best.accuracy)
    assert checkpoint.read(tmp_path / "out" / "best").metadata["config"]


@pytest.mark.slow
def test_nothing_is_compiled_again_after_the_first_step_on_several_devices():
    from flax_resblock.runs.optimizers import state_of
    from flax_resblock.training.devices import Placement, data_mesh
    from flax_resblock.training.pace import Pace, new_run
    from flax_resblock.training.state import split
    from flax_resblock.training.step import make_train_step

    config = dataclasses.replace(scale.CONFIG, accumulate=2, ema=0.9)
    placement, run = (
        Placement(data_mesh(4)),
        new_run(config, 44, StateMap(config.model, "torchvision")),
    )
    optimizer = optimizer_of(run.optimizer)
    graphdef, state = split(scale.start_model(), optimizer, placement=placement)
    state = state._replace(
        opt_state=placement.copies(state_of(run.optimizer, state.params)),
        ema=placement.copies((state.params, state.stats)),
    )
    step = make_train_step(
        graphdef, optimizer, accumulate=2, ema=0.9, replicas=True, mesh=placement.mesh
    )
    rng = np.random.default_rng(0)
    for number in range(3):
        images = rng.normal(size=(32, 8, 8, 1)).astype(np.float32)
        labels = rng.integers(0, 10, 32).astype(np.int32)
        state, _ = step(
            state,
            placement.spread(images, pieces=2),
            placement.spread(labels, pieces=2),
            Pace.of(run, 44).rates(number),
        )
    assert step.compilations == 1
    step(
        state,
        placement.spread(images[:16], pieces=2),
        placement.spread(labels[:16], pieces=2),
        Pace.of(run, 44).rates(3),
    )
    assert step.compilations == 2
