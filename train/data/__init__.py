"""Datasets, and the order in which a run sees them."""

from train.data.augment import Augmentation
from train.data.dataset import Dataset, Source, Splits
from train.data.digits import digits
from train.data.folder import FolderDataset
from train.data.opening import open_data
from train.data.pipeline import Batch, batches, epoch_order, steps_per_epoch
from train.data.stream import EvaluationBatch, Stream, evaluation_batches

__all__ = [
    "Augmentation",
    "Batch",
    "Dataset",
    "EvaluationBatch",
    "FolderDataset",
    "Source",
    "Splits",
    "Stream",
    "batches",
    "digits",
    "epoch_order",
    "evaluation_batches",
    "open_data",
    "steps_per_epoch",
]
