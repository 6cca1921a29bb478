"""Set-up before jax starts: a CPU backend with four simulated devices, unless another platform is asked for."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()

import torch

torch.set_num_threads(1)  # small tensors gain nothing from a second thread, and pytest-xdist already uses every core
