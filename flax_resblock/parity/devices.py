"""Devices by the names that people type. Only :func:`torch_device` needs torch, so that a TPU host
without it can ask too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import jax
from jax.extend.backend import backends

from flax_resblock.errors import InputError, MissingDependencyError, some

if TYPE_CHECKING:
    import torch

JaxDevice: TypeAlias = "jax.Device"  # pyright: ignore[reportInvalidTypeForm]  # jax declares its class of devices as a variable

EXTRAS = {"gpu": "cuda", "cuda": "cuda", "tpu": "tpu"}
"""Extra of this package that brings jax's support of a kind of device."""

ACCELERATORS = ("cuda", "mps", "xpu")
"""Kinds of torch's devices that people have; ``cuda`` stands for ROCm too."""


def _jax_devices() -> list[JaxDevice]:
    """The devices of every backend that starts, the preferred one first; none where no backend
    starts.
    """
    try:
        found = [device for client in backends().values() for device in client.devices()]
        preferred = jax.devices()[0].platform
    except RuntimeError:
        return []
    return sorted(found, key=lambda device: device.platform != preferred)


def describe(device: JaxDevice) -> str:
    """``cpu:0``, ``gpu:0 (NVIDIA H100 80GB HBM3)``."""
    return f"{device.platform}:{device.id}" + (
        "" if device.platform == "cpu" else f" ({device.device_kind})"
    )


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
        there = (
            some([describe(device) for device in _jax_devices()], 8) or "none, as no backend starts"
        )
        asked = "its default device" if kind is None else f"a device of the kind {kind!r}"
        platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        limited = (
            f" JAX_PLATFORMS={platforms} limits jax to these; unset it or add the kind."
            if platforms
            else ""
        )
        extra = EXTRAS.get(kind or "")
        install = (
            f" Install its support: pip install 'flax-resblock[{extra}]'."
            if extra
            else " Kinds are cpu, gpu (cuda, rocm) and tpu."
        )
        reason = str(error).strip().splitlines()[0][:160].rstrip(".")
        raise InputError(
            f"jax was asked for {asked}, which is not there ({reason}). Devices of jax: "
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
    try:
        import torch
    except ImportError as error:
        raise MissingDependencyError(
            f"torch was asked for the device {name or 'cpu'!r} and is not installed: pip "
            f"install 'flax-resblock[torch]'."
        ) from error
    there = [torch.device("cpu")]
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is not None:
        there += [
            torch.device(kind.type, index) for index in range(torch.accelerator.device_count())
        ]
    try:
        device = torch.device(name or "cpu")
    except RuntimeError:
        device = None  # not even a name that torch knows
    if device is None or (device.type, device.index or 0) not in [
        (known.type, known.index or 0) for known in there
    ]:
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
        raise InputError(
            f"torch was asked for the device {name!r}, which is not there. {here} {advice}"
        )
    return device


def accelerator() -> JaxDevice | None:
    """The first device of jax that is no CPU; None where there is none or no backend starts."""
    return next((device for device in _jax_devices() if device.platform != "cpu"), None)
