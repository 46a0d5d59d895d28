"""Image collections: layouts, decoding, preparation, exploration."""

from __future__ import annotations

from dlspark._require import LAYOUTS
from dlspark.images.counts import rows_of
from dlspark.images.dataset import ImageDataset
from dlspark.images.decode import BITS, RESIZES, decode, scale
from dlspark.images.explore import explore
from dlspark.images.files import stamps
from dlspark.images.layouts import CsvLayout, KnownLayout, Layout, find_layout
from dlspark.images.prepare import prepare_images
from dlspark.images.progress import show_progress
from dlspark.images.read import READ_AT_ONCE, read_files
from dlspark.images.table import in_words, reasons_in_words

__all__ = [
    "BITS",
    "LAYOUTS",
    "READ_AT_ONCE",
    "RESIZES",
    "CsvLayout",
    "ImageDataset",
    "KnownLayout",
    "Layout",
    "decode",
    "explore",
    "find_layout",
    "in_words",
    "prepare_images",
    "read_files",
    "reasons_in_words",
    "rows_of",
    "scale",
    "show_progress",
    "stamps",
]
