"""What must fit together before a run begins."""

from __future__ import annotations

from flax import nnx

from flax_resblock.errors import InputError, some
from flax_resblock.nn.resnet import Model, ResNet
from flax_resblock.runs.run import Run
from flax_resblock.runs.schedules import OneCycleLR
from flax_resblock.training.config import TrainConfig
from flax_resblock.training.data import DataSource
from flax_resblock.training.evaluation import with_head
from flax_resblock.training.pace import Pace


def check_model(model: Model, dataset: DataSource, config: TrainConfig) -> ResNet:
    """Returns the network; raises InputError unless it fits the images and the configuration."""
    network = with_head(model)
    if network.config != config.model:
        raise InputError(
            f"the model is {network.config}, but config.model is {config.model}. Use "
            f"replace(config, model=model.config)."
        )
    channels, classes = network.config.in_channels, network.config.num_classes or 0
    if channels != dataset.shape[-1] or classes < dataset.num_classes:
        raise InputError(
            f"the model takes {channels} channels and knows {classes} classes; {dataset.name} has "
            f"images of {dataset.shape[-1]} channels in {dataset.num_classes} classes."
        )
    return network


def check_run(run: Run, network: ResNet, pace: Pace, end: int) -> None:
    """Raises InputError unless the run fits the network and can be continued until step ``end``."""
    theirs = {path for group in run.optimizer.groups for path in group.paths}
    ours = set(dict(nnx.to_flat_state(nnx.state(network, nnx.Param))))
    if theirs != ours:
        only = sorted(".".join(map(str, path)) for path in theirs ^ ours)
        raise InputError(
            f"the run's optimizer is another model's: {some(only)} "
            f"{'is' if len(only) == 1 else 'are'} only on one side."
        )
    steps = pace.steps
    length = f"its {end} steps" if end % steps else f"its {end // steps} epochs of {steps} steps"
    if not 0 <= pace.start < end:
        raise InputError(
            f"the run is over: it is at step {pace.start}, and {length} end at {end}. Take more "
            f"epochs to go on."
        )
    schedule = run.schedule and run.schedule.schedule
    last = schedule.length if isinstance(schedule, OneCycleLR) else None
    if last is not None and pace.position(end - 1) > last:
        raise InputError(
            f"the one-cycle schedule of this run ends at its step {last}, but {length} would take "
            f"it to {pace.position(end - 1)}. Take fewer epochs."
        )
