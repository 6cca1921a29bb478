"""Continues a PyTorch training run in JAX, and writes it back for PyTorch.

    python train/continue_run.py run.pth --data digits --epochs 20 --batch-size 64 --out on.pth

``run.pth`` is a training checkpoint with weights, optimizer and schedule, as a plain loop,
torchvision, timm or Lightning write it. ``on.pth`` holds ``model``, ``optimizer`` and
``lr_scheduler`` for ``load_state_dict``. Needs: pip install 'flax-resblock[torch,train]'
"""

from __future__ import annotations

import argparse

import flax_resblock
from flax_resblock.training import StepReport, TrainConfig, fit
from flax_resblock.training.data import open_data


def main() -> None:
    parser = argparse.ArgumentParser(description="Continue a PyTorch training run in JAX.")
    parser.add_argument("checkpoint", help="training checkpoint of PyTorch or of this library")
    parser.add_argument("--data", required=True, help="see flax_resblock.training.data.open_data")
    parser.add_argument(
        "--epochs", type=int, default=20, help="of the whole run, in both frameworks"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the images")
    parser.add_argument("--out", default="continued.pth")
    args = parser.parse_args()

    model, run = flax_resblock.load_run(args.checkpoint)
    if not isinstance(model, flax_resblock.ResNet):
        raise SystemExit(f"{args.checkpoint} is a bare block, not a network.")
    for entry in run.found:
        print(f"{entry.status}: {entry.name}, {entry.use}")

    train, test = open_data(args.data)
    config = TrainConfig(
        model=model.config,
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        warmup_epochs=0.0,  # the run brings its own schedule
    )

    def log(step: StepReport) -> None:
        if step.step % 100 == 0:
            print(f"step {step.step}: loss {step.loss:.4f}, rate {step.learning_rate:.4g}")

    history = fit(model, train, config, test=test, run=run, on_step=log, progress=False)
    print(f"step {history.steps[-1].step}: test accuracy {history.test_accuracy[-1]:.2%}")
    flax_resblock.save(model, args.out, run=history.run, force=True)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
