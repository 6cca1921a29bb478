"""Datasets, and the order in which a run sees them."""

from flax_resblock.training.data.augment import Augmentation
from flax_resblock.training.data.dataset import Dataset, DataSource, Splits
from flax_resblock.training.data.digits import digits
from flax_resblock.training.data.folder import FolderDataset
from flax_resblock.training.data.opening import open_data
from flax_resblock.training.data.pipeline import Batch, batches, epoch_order, steps_per_epoch
from flax_resblock.training.data.stream import EvaluationBatch, Stream, evaluation_batches

__all__ = [
    "Augmentation",
    "Batch",
    "DataSource",
    "Dataset",
    "EvaluationBatch",
    "FolderDataset",
    "Splits",
    "Stream",
    "batches",
    "digits",
    "epoch_order",
    "evaluation_batches",
    "open_data",
    "steps_per_epoch",
]
