"""The reference training loop in plain PyTorch: SGD, warm-up and cosine, label smoothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR


class Step(NamedTuple):
    """One optimizer step: number from 0, mean loss and accuracy before it, learning rate."""

    step: int
    loss: float
    accuracy: float
    learning_rate: float


class Evaluation(NamedTuple):
    """Accuracy in [0, 1], predictions ``(N,)`` int64, logits ``(N, num_classes)``."""

    accuracy: float
    predictions: Tensor
    logits: Tensor


def sgd(
    model: nn.Module,
    learning_rate: float,
    *,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    nesterov: bool = True,
) -> SGD:
    """SGD with two param groups: weights of convolutions and linear layers decay; biases and
    everything of a batch norm do not.

    Args:
      model: Its parameters are split over the groups, each in the order of ``model.parameters()``.
      learning_rate: Peak learning rate.
      momentum, nesterov: Without dampening. Nesterov needs a momentum above 0.
      weight_decay: Of the first group.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    decayed = {layer.weight for layer in layers}
    decay = [parameter for parameter in model.parameters() if parameter in decayed]
    others = [parameter for parameter in model.parameters() if parameter not in decayed]
    groups = [
        {"params": decay, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return SGD(groups, lr=learning_rate, momentum=momentum, nesterov=nesterov)


def warmup_cosine(
    optimizer: Optimizer, *, warmup_steps: int, total_steps: int, warmup_factor: float = 0.1
) -> LRScheduler:
    """A linear warm-up from ``warmup_factor * lr`` to ``lr``, then half a cosine that reaches 0
    after ``total_steps``. Step it after each batch.

    Args:
      optimizer: Its ``lr`` is the peak.
      warmup_steps: Steps of the warm-up; 0: none.
      total_steps: Steps of the whole run, more than ``warmup_steps``.
      warmup_factor: In (0, 1].
    """
    if warmup_steps == 0:
        return CosineAnnealingLR(optimizer, T_max=total_steps)
    warmup = LinearLR(optimizer, start_factor=warmup_factor, total_iters=warmup_steps)
    cosine = CosineAnnealingLR(optimizer, T_max=total_steps - warmup_steps)
    return SequentialLR(optimizer, [warmup, cosine], milestones=[warmup_steps])


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    *,
    label_smoothing: float = 0.0,
    first_step: int = 0,
    on_step: Callable[[Step], None] | None = None,
) -> list[Step]:
    """Takes one optimizer step for each batch.

    Args:
      model: Put into training mode and changed in place.
      batches: Images ``(N, C, H, W)`` in the model's dtype and labels ``(N,)`` int64; one epoch, or
        as many as wanted.
      optimizer: See :func:`sgd`.
      scheduler: Stepped after every batch; see :func:`warmup_cosine`.
      label_smoothing: In [0, 1); see ``torch.nn.CrossEntropyLoss``.
      first_step: Number that the first step is reported with.
      on_step: Called after each step, when the model holds the new weights.
    Returns:
      What was reported, in order.
    """
    model.train()
    steps = []
    for number, (images, labels) in enumerate(batches, start=first_step):
        learning_rate = optimizer.param_groups[0]["lr"]
        logits = model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        accuracy = (logits.detach().argmax(dim=1) == labels).double().mean()
        steps.append(Step(number, loss.item(), accuracy.item(), float(learning_rate)))
        if on_step is not None:
            on_step(steps[-1])
    return steps


@torch.no_grad()
def evaluate(
    model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 512
) -> Evaluation:
    """Classifies every image once, in evaluation mode; the model's mode is restored afterwards.

    Args:
      model: Returns logits ``(N, num_classes)``.
      images: ``(N, C, H, W)`` in the model's dtype, at least one.
      labels: ``(N,)``, int64.
      batch_size: Images at a time.
    """
    was_training = model.training
    model.eval()
    logits = torch.cat([model(batch) for batch in images.split(batch_size)])
    model.train(was_training)
    predictions = logits.argmax(dim=1)
    return Evaluation((predictions == labels).double().mean().item(), predictions, logits)


def save_checkpoint(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    *,
    epoch: int,
    step: int,
    args: Mapping[str, Any] | None = None,
) -> None:
    """Writes a training checkpoint as torchvision's reference scripts do.

    Args:
      path: File to write; replaced if it exists.
      model, optimizer, scheduler: Their state dicts become ``"model"``, ``"optimizer"``,
        ``"lr_scheduler"`` (None without a scheduler).
      epoch: Number, from 0, of the last epoch that was completed; a run that goes on starts with
        ``epoch + 1``, as those scripts do.
      step: Optimizer steps done.
      args: The run's settings, plain values only, so that ``torch.load(weights_only=True)`` reads
        the file.
    """
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": None if scheduler is None else scheduler.state_dict(),
        "epoch": epoch,
        "step": step,
        "args": dict(args or {}),
    }
    torch.save(checkpoint, path)
