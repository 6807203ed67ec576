"""Image sources and loaders; needs Pillow (the extra `train`)."""

from ijepa_fast.data.folder import ImageFolder, find_split
from ijepa_fast.data.loader import BadFilesError, Batch, EvalLoader, TrainLoader
from ijepa_fast.data.mixture import Mixture
from ijepa_fast.data.prefetch import DevicePrefetcher
from ijepa_fast.data.source import Source
from ijepa_fast.data.workers import LoaderError, StopRequested

__all__ = [
    "BadFilesError",
    "Batch",
    "DevicePrefetcher",
    "EvalLoader",
    "ImageFolder",
    "LoaderError",
    "Mixture",
    "Source",
    "StopRequested",
    "TrainLoader",
    "find_split",
]
