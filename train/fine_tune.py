"""Fine-tunes a network from a PyTorch file on new classes.

    python train/fine_tune.py resnet18.pth --data pictures --freeze stem stage1

``pictures`` has a folder per class in ``train/`` and ``val/``; see docs/training.md for other data.
Needs: pip install 'flax-resblock[torch,train]'
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from flax import nnx

import flax_resblock
from flax_resblock.training import TrainConfig, fit, new_model
from flax_resblock.training.data import Augmentation, open_data


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a network from a PyTorch file.")
    parser.add_argument("checkpoint", help=".pth, .safetensors or any other readable checkpoint")
    parser.add_argument("--data", required=True, help="see flax_resblock.training.data.open_data")
    parser.add_argument("--image-size", type=int, help="for image folders, 224 by default")
    parser.add_argument("--freeze", nargs="*", default=[], help="parts to keep: stem, stage1 ...")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--out", default="tuned.pth")
    args = parser.parse_args()

    pretrained = flax_resblock.load(args.checkpoint)
    if not isinstance(pretrained, flax_resblock.ResNet):
        raise SystemExit(f"{args.checkpoint} is a bare block, not a network.")
    train, test = open_data(args.data, image_size=args.image_size)
    print(f"{train.name}: {len(train)} images in {train.num_classes} classes")

    config = TrainConfig(
        model=replace(pretrained.config, num_classes=train.num_classes),
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_epochs=min(1.0, args.epochs / 2),
        freeze=tuple(args.freeze),
        augmentation=Augmentation(flip=args.data != "digits"),
    )
    # A new network with a head for the new classes gets every other value of the old one.
    model = new_model(config)
    nnx.update(model, nnx.state(pretrained, nnx.Not(nnx.PathContains("head"))))

    history = fit(model, train, config, test=test)
    for evaluation in history.evaluations:
        print(f"epoch {evaluation.epoch}: test accuracy {evaluation.accuracy:.2%}")
    flax_resblock.save(model, args.out, force=True)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
