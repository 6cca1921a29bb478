"""The training program, in JAX alone: configuration, data, schedule, optimizer, step and loop. Never imports torch."""

from train.config import PRESETS, TrainConfig
from train.errors import Stopped, TrainingError
from train.loop import Evaluation, History, Step, evaluate, fit, new_model

__all__ = ["PRESETS", "Evaluation", "History", "Step", "Stopped", "TrainConfig", "TrainingError", "evaluate", "fit", "new_model"]
