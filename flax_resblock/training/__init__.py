"""The training library, in JAX alone: configuration, data, step, loop, devices, what a run leaves.

Names are imported on first use, so that a program that needs only a part of it does not wait for
jax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flax_resblock._lazy import lazily

if TYPE_CHECKING:
    from flax_resblock.training.config import TrainConfig
    from flax_resblock.training.devices import data_mesh
    from flax_resblock.training.errors import Stopped, TrainingError
    from flax_resblock.training.evaluation import Evaluation, evaluate
    from flax_resblock.training.loop import fit, new_model
    from flax_resblock.training.presets import PRESETS
    from flax_resblock.training.reports import EvaluationReport, History, StepReport

__all__ = [
    "PRESETS",
    "Evaluation",
    "EvaluationReport",
    "History",
    "StepReport",
    "Stopped",
    "TrainConfig",
    "TrainingError",
    "data_mesh",
    "evaluate",
    "fit",
    "new_model",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "config": "TrainConfig",
        "devices": "data_mesh",
        "errors": "Stopped TrainingError",
        "evaluation": "Evaluation evaluate",
        "loop": "fit new_model",
        "presets": "PRESETS",
        "reports": "EvaluationReport History StepReport",
    },
)
