"""Labelled pictures: where they come from, how they are split, decoded and brought to the model."""

from vitrail.data.loader import Batch, TrainLoader, eval_batches
from vitrail.data.samples import BadFiles, Data, DataError, ImageDataset
from vitrail.data.sources import open_data

__all__ = ["BadFiles", "Batch", "Data", "DataError", "ImageDataset", "TrainLoader", "eval_batches", "open_data"]
