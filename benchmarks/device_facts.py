"""Parts of the device check that compare no networks: the machine, what precision it delivers,
repeatability, conversion, memory, and the tests."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import torch
from device_parity import Row, Setting
from flax import nnx

from flax_resblock import from_torch, to_torch
from flax_resblock.checkpoint.torch_file import from_numpy
from flax_resblock.config import Config, architecture
from flax_resblock.convert import StateMap
from flax_resblock.parity.devices import make_xla_deterministic, settings_in_force, strict
from flax_resblock.parity.inputs import adversarial_images, more_batches
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.precision import measure_precision
from flax_resblock.parity.reference import ReferencePair, torch_reference
from flax_resblock.parity.trajectory import RECIPES, Trajectory, moderate

REPOSITORY = Path(__file__).resolve().parents[1]


def machine(setting: Setting) -> Iterator[Row]:
    """The machine and the versions; a result belongs to these and to no others."""
    jax_side, torch_side = setting.places.jax, setting.places.torch
    assert jax_side is not None
    facts = {
        "jax device": f"{jax_side.platform}: {jax_side.device_kind}",
        "torch device": str(torch_side),
        "processor": f"{os.cpu_count()} cores of {_processor()}",
        "python": sys.version.split()[0],
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "source": _source_digest(),
    }
    if torch_side.type == "cuda":
        facts["torch device"] = torch.cuda.get_device_name(torch_side)
        facts["cuDNN of torch"] = str(torch.backends.cudnn.version())
    if setting.kind == "gpu":
        facts["driver"] = _driver()
    names = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "flax", "optax")
    for name in (*names, "orbax-checkpoint", "numpy", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        try:
            facts[name] = version(name)
        except ModuleNotFoundError:
            continue
    for name, value in facts.items():
        yield Row("machine", name, value)
    for name, value in settings_in_force().items():
        yield Row("settings", name, value or "not set")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "an unknown processor"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "an unknown processor"


def _driver() -> str:
    query = "--query-gpu=name,driver_version,memory.total"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        return subprocess.check_output(command, text=True, timeout=60).strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"


def _source_digest() -> str:
    digest = hashlib.sha256()
    for folder in ("flax_resblock", "torch_ref", "benchmarks"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def precision(setting: Setting) -> Iterator[Row]:
    """What each side really delivers in every precision, and without any setting."""
    sides = {"flax": setting.places.jax, "torch": setting.places.torch}
    for side, device in sides.items():
        assert device is not None
        for name in setting.precisions:
            with strict():
                found = measure_precision(side, device, name)  # pyright: ignore[reportArgumentType]
            for one in found:
                figure = f"{one.mantissa_bits} mantissa bits kept, {one.expected_bits} needed"
                enough = one.mantissa_bits >= one.expected_bits
                yield Row(f"{one.side} on {one.device}", f"{name} {one.operation}", figure, enough)
        for one in measure_precision(side, device, "float32"):  # pyright: ignore[reportArgumentType]
            figure = f"{one.mantissa_bits} mantissa bits kept"
            check = f"float32 {one.operation}, as the framework starts"
            yield Row(f"{one.side} on {one.device}", check, figure)


_REPEATED = {"cpu": "resnet20", "gpu": "resnet18", "tpu": "resnet18"}


def _run_digest(kind: str, side: Any, name: str) -> str:
    """SHA-256 of all that three training steps compute."""
    make_xla_deterministic()
    setting, config = Setting(kind), architecture(_REPEATED[kind])
    pair, images = ReferencePair.random(config), adversarial_images(config, batch=8)
    target = np.random.default_rng(0).standard_normal((8, config.num_classes or 1))
    digest = hashlib.sha256()
    with strict(setting.lowering):
        part = moderate(Trajectory(RECIPES["sgd"], more_batches(images, 3, 0), target), pair)
        precision = PRECISIONS[name]
        with precision.on_torch():
            for tensors in part.run(side, pair, precision, images, setting.places):
                for key in sorted(tensors):
                    digest.update(np.ascontiguousarray(tensors[key]).tobytes())
    return digest.hexdigest()[:16]


def repeatability(setting: Setting) -> Iterator[Row]:
    """The same training run in two processes gives the same bits. PyTorch's own is reported beside
    it."""
    names = ("float32",) if setting.kind == "cpu" else ("float32", "bfloat16")
    spawn = multiprocessing.get_context("spawn")
    options: dict[str, Any] = {"mp_context": spawn, "max_tasks_per_child": 1}
    with ProcessPoolExecutor(1 if setting.kind == "tpu" else 2, **options) as pool:
        runs = [(side, name) for side in ("flax", "torch") for name in names]
        pending = [[pool.submit(_run_digest, setting.kind, *run) for _ in range(2)] for run in runs]
        for (side, name), futures in zip(runs, pending, strict=True):
            first, second = (future.result() for future in futures)
            same = first == second
            figure = f"both runs {first}" if same else f"{first} and {second}"
            passed = same if side == "flax" else None
            check = "three training steps in two processes"
            yield Row(f"{_REPEATED[setting.kind]}, {name}, {side}", check, figure, passed)


def conversion(setting: Setting) -> Iterator[Row]:
    """Weights of random bits, NaN with payloads among them, to the device and back."""
    names = ("resnet20",) if setting.quick else ("resnet18", "resnet50")
    rng, device = np.random.default_rng(0), setting.places.jax
    for name in names:
        config = architecture(name)
        for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
            state = _random_bits(config, np.dtype(dtype), rng)
            with jax.default_device(device):
                model = from_torch(state, architecture=config)
            variables = jax.tree.leaves(nnx.state(model))
            places = {one for leaf in variables for one in leaf.devices()}
            back = to_torch(model)
            on_device = {k: from_numpy(v).to(setting.places.torch) for k, v in state.items()}
            again = to_torch(from_torch(on_device, architecture=config))
            wrong = [
                key
                for key, value in state.items()
                if not value.tobytes() == back[key].tobytes() == again[key].tobytes()
            ]
            figure = f"{len(state)} tensors on {', '.join(map(str, places))}, {len(wrong)} changed"
            passed = places == {device} and not wrong
            check = f"{np.dtype(dtype)} bits there and back"
            yield Row(name, check, figure, passed, {"changed": wrong[:30]})


def _random_bits(
    config: Config, dtype: np.dtype, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    state = {}
    for entry in StateMap(config, "torchvision").entries:
        size = int(np.prod(entry.torch_shape)) * dtype.itemsize
        value = np.frombuffer(rng.bytes(size), dtype).reshape(entry.torch_shape)
        state[entry.torch_key] = np.array(7, np.int64) if entry.role == "counter" else value
    return state


def memory(setting: Setting) -> Iterator[Row]:
    """The peak of both frameworks in a training step of resnet50 at 224."""
    os.environ.pop("XLA_FLAGS", None)  # as a program for training runs it
    config, batch = architecture("resnet50"), 64
    images = adversarial_images(config, batch=batch, height=224, width=224).astype(np.float32)
    for name in ("bfloat16", "float32"):  # ascending, as jax's peak is that of the process
        peaks = {"flax": _peak_of_jax(config, images, name, setting.places.jax)}
        if setting.places.torch.type == "cuda":
            peaks["torch"] = _peak_of_torch(config, images, name, setting.places.torch)
        for side, peak in peaks.items():
            subject = f"resnet50 at 224, batch {batch}, {name}"
            yield Row(subject, f"peak of {side}", f"{peak / 2**30:.2f} GiB")


def _peak_of_jax(config: Config, images: np.ndarray, name: str, device: Any) -> int:
    optimizer = optax.sgd(1e-3, momentum=0.9)

    def loss(params: Any, rest: Any, x: Any) -> Any:
        network: Any = nnx.merge(graphdef, params, rest, copy=True)
        value = -jnp.mean(jax.nn.log_softmax(network(x).astype(jnp.float32))[:, 7])
        return value, nnx.state(network, nnx.Not(nnx.Param))

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params: Any, rest: Any, state: Any, x: Any) -> Any:
        (_, rest), gradient = jax.value_and_grad(loss, has_aux=True)(params, rest, x)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), rest, state

    with jax.default_device(device):
        model: Any = ReferencePair.random(config).flax(PRECISIONS[name])
        model.train()
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        del model
        state, x = optimizer.init(params), jnp.asarray(images)
        for _ in range(3):
            params, rest, state = step(params, rest, state, x)
        jax.block_until_ready(params)
    return device.memory_stats()["peak_bytes_in_use"]


def _peak_of_torch(config: Config, images: np.ndarray, name: str, device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    module = torch_reference(config).train().to(device)
    module = module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(module.parameters(), 1e-3, momentum=0.9)
    x = torch.from_numpy(np.moveaxis(images, -1, 1)).to(device)
    for _ in range(3):
        optimizer.zero_grad()
        with PRECISIONS[name].of_torch(device):
            logits = module(x)
        (-torch.log_softmax(logits.float(), -1)[:, 7].mean()).backward()
        optimizer.step()
    return torch.cuda.max_memory_allocated(device)


def tests(setting: Setting) -> Iterator[Row]:
    """The tests marked ``accelerator``."""
    folder = REPOSITORY / "parity_tests"
    files = [p for p in sorted(folder.glob("test_*.py")) if "mark.accelerator" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "accelerator", "-p", "no:cacheprovider"]
    environment = os.environ | {"FLAX_RESBLOCK_ACCELERATOR": "1", "XLA_FLAGS": ""}
    run = subprocess.run(
        [*command, *map(str, files)],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(run.stdout, flush=True)
    last = run.stdout.strip().splitlines()[-1:] or ["no output"]
    passed = run.returncode == 0 and " passed" in last[0]  # torch can be without the device
    yield Row("parity_tests", "marker accelerator", last[0], passed, {"output": run.stdout[-8000:]})
