"""Labelled pictures: where they come from, how they are split, decoded and brought to the model."""

from vitrail.data.check import CopyGroup, DataCheck, check_data
from vitrail.data.loader import Batch, TrainLoader, eval_batches
from vitrail.data.pack import PackResult, pack_data
from vitrail.data.samples import BadFiles, Data, DataError, ImageDataset
from vitrail.data.sources import open_data
from vitrail.data.stats import DataStats, data_stats

__all__ = [
    "BadFiles",
    "Batch",
    "CopyGroup",
    "Data",
    "DataCheck",
    "DataError",
    "DataStats",
    "ImageDataset",
    "PackResult",
    "TrainLoader",
    "check_data",
    "data_stats",
    "eval_batches",
    "open_data",
    "pack_data",
]
