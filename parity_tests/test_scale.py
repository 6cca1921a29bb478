"""Several devices and processes: the same run as on one device, or as PyTorch's DDP."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from flax_resblock.errors import InputError
from flax_resblock.training import cluster, data_mesh
from flax_resblock.training.data import Stream
from flax_resblock.training.devices import Placement
from parity_tests import preemption, scale
from parity_tests.support import REPOSITORY

LIMIT, DDP_LIMIT = 1e-12, 1e-10


def environment(devices, **more):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **more}


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def together(commands, devices=1):
    """Runs commands side by side until all have ended."""
    options = {
        "env": environment(devices),
        "cwd": REPOSITORY,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    processes = [subprocess.Popen(command, **options) for command in commands]
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:]


def scaled(out, devices, *flags, processes=1):
    command = [sys.executable, "-m", "parity_tests.scale", str(out), *flags]
    port = free_port()
    cluster_flags = f"--coordinator localhost:{port} --num-processes {processes} --process-id"
    joined = [[*cluster_flags.split(), str(number)] for number in range(processes)]
    together([[*command, *(more if processes > 1 else [])] for more in joined], devices)
    return dict(np.load(out))


def worst(ours, theirs):
    """The largest relative difference of a tensor."""
    assert ours.keys() == theirs.keys()
    floating = [key for key in theirs if theirs[key].dtype.kind == "f"]
    assert all(
        np.array_equal(ours[key], theirs[key])
        for key in theirs
        if key not in floating and key != "devices"
    )
    return max(
        np.linalg.norm(ours[key] - theirs[key]) / np.linalg.norm(theirs[key]) for key in floating
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return scaled(tmp_path_factory.mktemp("alone") / "one.npz", 1)


@pytest.mark.slow
def test_eight_devices_take_the_steps_of_one_and_evaluate_every_image_once(alone, tmp_path):
    eight = scaled(tmp_path / "eight.npz", 8)
    assert eight["devices"] == 8
    assert len(eight["logits"]) == 101
    assert worst(eight, alone) <= LIMIT
    # the control: other statistics are another run
    replica = scaled(tmp_path / "replica.npz", 8, "--batch-norm", "replica")
    assert worst(replica, alone) >= 1e6 * LIMIT


@pytest.mark.slow
def test_two_processes_of_two_devices_take_the_steps_of_one_process(alone, tmp_path):
    assert worst(scaled(tmp_path / "two.npz", 2, processes=2), alone) <= LIMIT


@pytest.mark.slow
def test_pieces_of_mixed_batches_do_not_depend_on_devices_or_processes(alone, tmp_path):
    flags = ("--accumulate", "2", "--mixup", "0.4")
    whole = scaled(tmp_path / "whole.npz", 1, *flags)
    assert worst(scaled(tmp_path / "two.npz", 2, *flags, processes=2), whole) <= LIMIT
    assert worst({"losses": whole["losses"]}, {"losses": alone["losses"]}) >= 1e6 * LIMIT


@pytest.mark.slow
def test_replicas_are_pytorchs_distributed_data_parallel(tmp_path, monkeypatch):
    """Every device normalises its share; running statistics are those of the first, as in DDP."""
    import jax

    from flax_resblock import to_torch
    from flax_resblock.training import fit

    wide = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        model, (train, _) = scale.start_model(), scale.images()
        config = scale.CONFIG
        batches = [
            batch
            for batch, _ in zip(
                Stream(train, 32, seed=config.seed, augmentation=config.augmentation).from_step(0),
                range(20),
                strict=False,
            )
        ]
        content = {
            "model": {key: torch.from_numpy(value) for key, value in to_torch(model).items()},
            "images": torch.stack(
                [
                    torch.from_numpy(batch.images.transpose(0, 3, 1, 2).astype(np.float64))
                    for batch in batches
                ]
            ),
            "labels": torch.stack(
                [torch.from_numpy(batch.labels.astype(np.int64)) for batch in batches]
            ),
        }
        torch.save(content, tmp_path / "in.pt")
        port = free_port()
        files = [str(tmp_path / name) for name in ("in.pt", "out.pt")]
        command = [sys.executable, "-m", "parity_tests.ddp", *files, str(port)]
        together([[*command, str(rank), "2"] for rank in range(2)])
        there = torch.load(tmp_path / "out.pt", weights_only=True)
        theirs = {key: value.numpy() for key, value in there["model"].items()} | {
            "losses": there["losses"].numpy()
        }

        def ours(batch_norm):
            model = scale.start_model()
            history = fit(
                model,
                train,
                scale.replace(config, batch_norm=batch_norm),
                mesh=data_mesh(2),
                progress=False,
            )
            return to_torch(model) | {"losses": np.array([step.loss for step in history.steps])}

        assert worst(ours("replica"), theirs) <= DDP_LIMIT
        assert worst(ours("global"), theirs) >= 1e6 * DDP_LIMIT
    finally:
        jax.config.update("jax_enable_x64", wide)


FLAGS = "--epochs 4 --batch-size 64 --save-every 7 --resume auto --seed 5"


def joined(out, flags=FLAGS):
    """A run of two processes of two devices each."""
    port = free_port()
    command = [sys.executable, "-m", "flax_resblock", "train", "--out", str(out), *flags.split()]
    command += ["--coordinator", f"localhost:{port}", "--num-processes", "2"]
    return [
        subprocess.Popen(
            [*command, "--process-id", str(number)],
            env=environment(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]


def begun(processes, out, lines):
    while len(lines_of(out)) < lines:
        assert all(process.poll() is None for process in processes), [
            process.communicate() for process in processes
        ]
        time.sleep(0.05)


def lines_of(out):
    metrics = out / "metrics.jsonl"
    return metrics.read_text().splitlines() if metrics.exists() else []


def finished(processes):
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error[-3000:]


@pytest.mark.slow
def test_when_one_process_dies_the_others_end_and_the_restarted_run_ends_the_same(tmp_path):
    finished(joined(tmp_path / "whole"))
    for victim in (1, 0):
        out = tmp_path / f"killed{victim}"
        processes = joined(out)
        begun(processes, out, 20)
        processes[victim].kill()
        died = time.monotonic()
        survivor = processes[1 - victim]
        _, error = survivor.communicate(timeout=60)
        assert time.monotonic() - died <= 15
        assert survivor.returncode == cluster.PEER_LOST, error[-3000:]
        assert (
            f"flax-resblock: process {victim} of 2 is gone; process {1 - victim} cannot go on "
            f"without it. Start all of them again" in error
        )
        finished(joined(out))
        found = preemption.differences(preemption.state(out), preemption.state(tmp_path / "whole"))
        assert found == []


@pytest.mark.slow
def test_one_process_that_is_asked_to_stop_stops_all_at_the_same_step(tmp_path):
    out = tmp_path / "out"
    processes = joined(out, "--epochs 300 --batch-size 64")
    begun(processes, out, 5)
    processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], said
    step = int(re.search(r"stopped after step (\d+); \S+ is written", said[0])[1])
    assert len(lines_of(out)) == step
    assert preemption.state(out)[2][-1]["step"] == step - 1


def test_what_the_devices_cannot_share_is_refused():
    with pytest.raises(
        InputError,
        match=r"batch_size=30 cannot be shared equally by 4 devices\. Take 28 or 32, or fewer",
    ):
        Placement(data_mesh(4)).check(30)
    with pytest.raises(
        InputError,
        match=r"batch_size=40 in 4 pieces cannot be shared equally by 4 devices\. Take 32 or 48",
    ):
        Placement(data_mesh(4)).check(40, 4)
    with pytest.raises(
        InputError, match=r"devices=99 must be from 1 to \d+, the cpu devices that jax has here"
    ):
        data_mesh(99)


@pytest.mark.parametrize(
    ("variables", "kind"),
    [
        ({}, None),
        # a shell inside an allocation, not a task
        ({"SLURM_JOB_ID": "3", "SLURM_NTASKS": "8"}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that is no part of an indexed job
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, "Kubernetes"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, "TPU pod"),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "t-0"}, "TPU multislice"),
        ({"JAX_COORDINATOR_ADDRESS": "t-0:80"}, "JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_clusters_are_recognised(variables, kind):
    assert cluster.detected({"TPU_SKIP_MDS_QUERY": "1", **variables}) == kind


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((None, 2, 0), "needs `coordinator=HOST:PORT`"),
        (("host:1", None, 0), "needs `num_processes=...` and `process_id=...` too"),
        (("host:1", 2, 2), "`process_id=2` must be from 0 to `num_processes=2` less one"),
        (("host", 2, 0), "must be HOST:PORT of process 0"),
    ],
)
def test_half_a_cluster_is_refused(given, words):
    with pytest.raises(InputError, match=re.escape(words)):
        cluster.Cluster(*given).check()
