"""The training program, in JAX alone: configuration, data, schedule, optimizer, devices, step and loop. Never imports torch."""

from train.config import TrainConfig
from train.devices import data_mesh
from train.errors import Stopped, TrainingError
from train.evaluation import Evaluation, evaluate
from train.loop import fit, new_model
from train.presets import PRESETS
from train.reports import History, Judged, Step

__all__ = [
    "PRESETS",
    "Evaluation",
    "History",
    "Judged",
    "Step",
    "Stopped",
    "TrainConfig",
    "TrainingError",
    "data_mesh",
    "evaluate",
    "fit",
    "new_model",
]
