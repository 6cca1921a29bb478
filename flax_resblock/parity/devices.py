"""Devices by name, and the settings under which both frameworks compute exactly and repeatably.

This module imports torch only in the functions that need it, so that :func:`jax_device` works on a
TPU host without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
from jax.extend.backend import backends

from flax_resblock.cpu.switch import Lowering, conv_lowering
from flax_resblock.errors import InputError, first_line, optional, some

if TYPE_CHECKING:
    import torch

JaxDevice: TypeAlias = "jax.Device"  # pyright: ignore[reportInvalidTypeForm]  # jax declares its class of devices as a variable

EXTRAS = {"gpu": "cuda", "cuda": "cuda", "tpu": "tpu"}
"""Extra of this package that brings jax's support of a kind of device."""

ACCELERATORS = ("cuda", "mps", "xpu")
"""Kinds of torch's devices in common use; ``cuda`` stands for ROCm too."""


def _jax_devices() -> list[JaxDevice]:
    """The devices of every backend that starts, the preferred one first; none where no backend
    starts."""
    try:
        found = [device for client in backends().values() for device in client.devices()]
        preferred = jax.devices()[0].platform
    except RuntimeError:
        return []
    return sorted(found, key=lambda device: device.platform != preferred)


def device_name(device: JaxDevice) -> str:
    """``cpu:0``, ``gpu:0 (NVIDIA H100 80GB HBM3)``."""
    name = f"{device.platform}:{device.id}"
    return name if device.platform == "cpu" else f"{name} ({device.device_kind})"


def jax_device(kind: str | None) -> JaxDevice:
    """The first device of a kind.

    Args:
      kind: ``"cpu"``, ``"gpu"``, ``"cuda"``, ``"rocm"``, ``"tpu"`` ...; None: jax's default device.
    Raises:
      InputError: There is none; the message lists those there are and what to install.
    """
    try:
        return jax.devices(kind)[0]
    except RuntimeError as error:
        there = some([device_name(device) for device in _jax_devices()], 8)
        there = there or "none, as no backend starts"
        asked = "its default device" if kind is None else f"a device of the kind {kind!r}"
        platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        limited = ""
        if platforms:
            limited = f" JAX_PLATFORMS={platforms} limits jax to these; unset it or add the kind."
        extra = EXTRAS.get(kind or "")
        install = " Kinds are cpu, gpu (cuda, rocm) and tpu."
        if extra:
            install = f" Install its support: pip install 'flax-resblock[{extra}]'."
        raise InputError(
            f"jax was asked for {asked}, which is not there ({first_line(error)}). Devices of jax: "
            f"{there}.{limited}{install}"
        ) from error


def torch_device(name: str | None) -> torch.device:
    """A device of torch.

    Args:
      name: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``, ``"xpu"`` ...; None: the CPU.
    Raises:
      InputError: No such device; the message lists those there are and what to install.
      MissingDependencyError: torch is not installed.
    """
    asked = f"torch was asked for the device {name or 'cpu'!r}"
    torch = optional("torch", f"{asked} and is not installed: pip install 'flax-resblock[torch]'.")
    there = [torch.device("cpu")]
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is not None:
        count = torch.accelerator.device_count()
        there += [torch.device(kind.type, index) for index in range(count)]
    try:
        device = torch.device(name or "cpu")
    except RuntimeError:
        device = None  # not even a name that torch knows
    names = [(known.type, known.index or 0) for known in there]
    if device is None or (device.type, device.index or 0) not in names:
        here = f"Devices of torch: {some([str(known) for known in there], 8)}."
        if device is None or device.type not in ACCELERATORS:
            advice = (
                f"Names are cpu, {', '.join(ACCELERATORS)}, and such as cuda:1 for a further one."
            )
        elif device.type in {known.type for known in there}:
            advice = "Choose one of these."
        else:
            advice = (
                f"A build of torch for {device.type} and its driver are needed; see "
                f"https://pytorch.org/get-started."
            )
        raise InputError(f"{asked}, which is not there. {here} {advice}")
    return device


def accelerator() -> JaxDevice | None:
    """The first device of jax that is no CPU; None where there is none or no backend starts."""
    return next((device for device in _jax_devices() if device.platform != "cpu"), None)


WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def torch_products(value: str) -> Iterator[None]:
    """``fp32_precision = value``, which is ``"ieee"`` or ``"tf32"``, for every operation of torch.

    Only this API: mixed with the older ``allow_tf32`` it makes torch raise. The common setting
    comes first, and only those that do not follow it are touched, because one that inherits cannot
    be told from one that was set, nor be made to inherit again."""
    import torch

    backends: Any = torch.backends
    # Parents before children. ``torch.backends.mkldnn.fp32_precision = x`` changes the common
    # setting (torch 2.13), which is put right last.
    settings: tuple[Any, ...] = (backends, backends.cudnn, backends.mkldnn, backends.cuda.matmul)
    settings += (backends.cudnn.conv, backends.cudnn.rnn)
    settings += (backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn)
    before: list[tuple[Any, str]] = []
    try:
        for setting in settings:
            if setting.fp32_precision != value:
                before.append((setting, setting.fp32_precision))
                setting.fp32_precision = value
        yield
    finally:
        for setting, old in reversed(before):
            setting.fp32_precision = old


@contextmanager
def _torch_deterministic() -> Iterator[None]:
    """The same kernels in every run, where torch has such kernels; cuBLAS needs a workspace of
    fixed size for that. An operation that has none warns instead of failing, because a comparison
    does not need it: on CUDA these are the gradients of common layers, such as reflection
    padding."""
    import torch

    before, benchmark = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    workspace = os.environ.get(WORKSPACE)
    try:
        os.environ.setdefault(WORKSPACE, ":4096:8")
        torch.backends.cudnn.benchmark = False
        # the mode alone; use_deterministic_algorithms imports torch's compiler, which takes seconds
        torch.set_deterministic_debug_mode("warn")
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop(WORKSPACE, None)


@contextmanager
def strict(lowering: Lowering = "xla") -> Iterator[None]:
    """Within it both frameworks compute float32 as float32, and in the same way each time where
    they can; every setting is what it was afterwards.

    jax: ``default_matmul_precision("highest")``, which convolutions and products without a
    precision of their own follow, and convolutions in XLA's own form, unless ``lowering`` selects
    another. torch: no TF32 and no bfloat16 in cuBLAS, cuDNN and oneDNN, no benchmarking,
    deterministic algorithms (an operation that has none warns)."""
    with (
        torch_products("ieee"),
        _torch_deterministic(),
        jax.default_matmul_precision("highest"),
        conv_lowering(lowering),
    ):
        yield


XLA_FLAG = "--xla_gpu_deterministic_ops=true"
"""Of XLA for GPUs; the other compilers accept and ignore it."""


def make_xla_deterministic() -> None:
    """Adds :data:`XLA_FLAG` to ``XLA_FLAGS``. Works until jax starts its first backend. A value
    that you have set yourself is kept."""
    flags = os.environ.get("XLA_FLAGS", "")
    if XLA_FLAG.split("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {XLA_FLAG}".strip()


def settings_in_force() -> dict[str, str]:
    """What :func:`strict` sets, read back within it; and the flag of
    XLA."""
    import torch

    backends: Any = torch.backends
    with strict():
        return {
            "jax default_matmul_precision": str(jax.config.jax_default_matmul_precision),  # pyright: ignore[reportAttributeAccessIssue]
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
            "torch fp32_precision": backends.fp32_precision,
            "torch cudnn.conv": backends.cudnn.conv.fp32_precision,
            "torch cuda.matmul": backends.cuda.matmul.fp32_precision,
            "torch mkldnn.conv": backends.mkldnn.conv.fp32_precision,
            "torch deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
            "torch cudnn.benchmark": str(backends.cudnn.benchmark),
            WORKSPACE: os.environ.get(WORKSPACE, ""),
        }


def settings_sentence() -> str:
    """``"set on both sides: jax default_matmul_precision highest, ..."``."""
    values = (f"{name} {value}" for name, value in settings_in_force().items() if value)
    return f"set on both sides: {', '.join(values)}"
