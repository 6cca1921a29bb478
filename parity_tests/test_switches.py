"""What the verifier sets on both sides is set, is said, and is put back."""

from __future__ import annotations

import torch

from flax_resblock.parity.devices import (
    XLA_FLAG,
    make_xla_deterministic,
    settings_in_force,
    settings_sentence,
)


def test_every_switch_is_in_its_strict_position(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_some_flag=1")
    make_xla_deterministic()
    make_xla_deterministic()  # twice is once
    before = torch.backends.fp32_precision
    assert settings_in_force() == {
        "jax default_matmul_precision": "highest",
        "XLA_FLAGS": f"--xla_some_flag=1 {XLA_FLAG}",
        "torch fp32_precision": "ieee",
        "torch cudnn.conv": "ieee",
        "torch cuda.matmul": "ieee",
        "torch mkldnn.conv": "ieee",
        "torch deterministic algorithms": "True",
        "torch cudnn.benchmark": "False",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    assert torch.backends.fp32_precision == before
    assert not torch.are_deterministic_algorithms_enabled()
    assert "torch cudnn.conv ieee" in settings_sentence()


def test_a_choice_of_ones_own_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    make_xla_deterministic()
    assert settings_in_force()["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=false"
