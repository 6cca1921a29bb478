"""Trains on all devices of all hosts.

    python train/all_devices.py --batch-size 1024

On a TPU pod, with Slurm or Open MPI, start the same command on every host. The result does not
depend on the number of devices: batch statistics are those of the whole batch.
Needs: pip install 'flax-resblock[train]'
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import flax_resblock
from flax_resblock.training import PRESETS, cluster, data_mesh, fit, new_model
from flax_resblock.training.data import open_data
from flax_resblock.training.run_folder import RunFolder


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on all devices of all hosts.")
    parser.add_argument("--preset", choices=PRESETS, default="digits-resnet8")
    parser.add_argument("--data", help="data of the preset by default")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=64, help="over all devices")
    parser.add_argument("--out", type=Path, default=Path("runs/all_devices"))
    args = parser.parse_args()

    cluster.connect(cluster.Cluster())  # before anything else that uses jax
    import jax

    first = jax.process_index() == 0
    mesh = data_mesh()
    if first:
        print(f"{mesh.size} devices in {jax.process_count()} processes")

    preset = PRESETS[args.preset]
    config = replace(
        preset,
        data=args.data or preset.data,
        epochs=args.epochs,
        batch_size=args.batch_size,
        warmup_epochs=min(preset.warmup_epochs, args.epochs / 2),
    )
    train, test = open_data(config.data)
    model = new_model(config)
    # The first process writes metrics and checkpoints; "flax-resblock train --resume auto" and
    # flax_resblock.load_run continue from them.
    with RunFolder(args.out, config) as folder:
        history = fit(
            model,
            train,
            config,
            test=test,
            mesh=mesh,
            on_step=folder.record if first else None,
            on_evaluation=folder.evaluated if first else None,
            saver=folder if first else None,
            progress=first,
        )
    if first:
        print(f"test accuracy {history.test_accuracy[-1]:.2%}")
        flax_resblock.save(model, args.out / "model.safetensors", force=True)
        print(f"wrote {args.out}")
    cluster.leave()


if __name__ == "__main__":
    main()
