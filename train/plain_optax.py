"""Trains a residual network with a plain optax loop, without this library's trainer.

    python train/plain_optax.py --epochs 10

Needs: pip install 'flax-resblock[train]'
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import flax_resblock
from flax_resblock import ResNet, ResNetConfig
from flax_resblock.training.data import batches, digits, steps_per_epoch


def loss_fn(model: ResNet, images: jax.Array, labels: jax.Array) -> jax.Array:
    logits = model(images)  # in training mode this also updates the running statistics
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def train_step(
    model: ResNet, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> jax.Array:
    loss, gradients = nnx.value_and_grad(loss_fn)(model, images, labels)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def predict(model: ResNet, images: jax.Array) -> jax.Array:
    return model(images, use_running_average=True).argmax(axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a residual network with optax.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="digits.pth", help="a .pth file that PyTorch loads")
    args = parser.parse_args()

    train, test = digits()
    config = ResNetConfig(
        depths=(1, 1, 1),
        widths=(16, 32, 64),
        stem="cifar",
        stem_width=16,
        in_channels=1,
        num_classes=10,
    )
    model = ResNet(config, rngs=nnx.Rngs(args.seed))
    steps = args.epochs * steps_per_epoch(train, args.batch_size)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, warmup_steps=steps // 10, decay_steps=steps
    )
    tx = optax.chain(
        # like PyTorch's SGD, but only kernels decay: not the scales and biases of batch norms
        optax.add_decayed_weights(5e-4, mask=lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p)),
        optax.sgd(schedule, momentum=0.9, nesterov=True),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    test_images = jnp.asarray(test.normalised())
    for epoch in range(args.epochs):
        losses = [
            train_step(model, optimizer, jnp.asarray(batch.images), jnp.asarray(batch.labels))
            for batch in batches(train, args.batch_size, seed=args.seed, epoch=epoch)
        ]
        loss = np.mean(jax.device_get(losses))
        accuracy = np.mean(np.asarray(predict(model, test_images)) == test.labels)
        print(f"epoch {epoch + 1}: loss {loss:.4f}, test accuracy {accuracy:.2%}")

    flax_resblock.save(model, args.out, force=True)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
