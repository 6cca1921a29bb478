"""The same steps in ``torch.nn.parallel.DistributedDataParallel`` over gloo: each process takes its
share of every batch, and process 0 writes down the end.

python -m parity_tests.ddp IN.pt OUT.pt PORT RANK WORLD"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict

import torch
import torch.nn.functional as F

from parity_tests import scale
from torch_ref import ResNet, training


def main() -> None:
    source, out, port = sys.argv[1:4]
    rank, world = map(int, sys.argv[4:6])
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    given = torch.load(source, weights_only=True)
    config = scale.CONFIG
    plain = ResNet(**asdict(config.model)).double()
    plain.load_state_dict(given["model"])
    model = torch.nn.parallel.DistributedDataParallel(plain)
    optimizer = training.sgd(
        plain,
        config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )
    scheduler = training.warmup_cosine(
        optimizer,
        warmup_steps=config.warmup(1),
        total_steps=config.end(1),
        warmup_factor=config.warmup_factor,
    )
    losses = []
    for images, labels in zip(given["images"], given["labels"], strict=True):
        share = slice(rank * len(labels) // world, (rank + 1) * len(labels) // world)
        loss = F.cross_entropy(model(images[share]), labels[share])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean / world)
    if rank == 0:
        torch.save({"model": plain.state_dict(), "losses": torch.stack(losses)}, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
