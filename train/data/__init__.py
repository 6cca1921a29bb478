"""Datasets, and the order in which a run sees them."""

from train.data.dataset import Dataset, Splits
from train.data.digits import digits
from train.data.pipeline import Batch, batches, epoch_order, steps_per_epoch

__all__ = ["Batch", "Dataset", "Splits", "batches", "digits", "epoch_order", "steps_per_epoch"]
