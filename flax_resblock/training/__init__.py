"""The training program, in JAX alone: configuration, data, schedule, optimizer, devices, step and
loop. Never imports torch.
"""

from flax_resblock.training.config import TrainConfig
from flax_resblock.training.devices import data_mesh
from flax_resblock.training.errors import Stopped, TrainingError
from flax_resblock.training.evaluation import Evaluation, evaluate
from flax_resblock.training.loop import fit, new_model
from flax_resblock.training.presets import PRESETS
from flax_resblock.training.reports import History, Judged, Step

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
