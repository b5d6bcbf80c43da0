"""Data sets of files in common formats: the built-in sources that `data.name` may name.

Each is a function of a folder and of options, `data.options`, that returns `Splits`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from syncnorm.train.data.sources.arrays import npy, npz
from syncnorm.train.data.sources.folder import folder
from syncnorm.train.data.sources.huggingface import hf
from syncnorm.train.data.sources.masks import masks
from syncnorm.train.data.sources.options import check_names
from syncnorm.train.data.sources.table import csv
from syncnorm.train.data.splits import Splits

SOURCES: dict[str, Callable[..., Splits]] = {
    "folder": folder,
    "masks": masks,
    "npz": npz,
    "npy": npy,
    "csv": csv,
    "hf": hf,
}


def check_source_options(name: str, options: Mapping[str, Any]) -> None:
    """Check that a source takes options of these names, without looking at a file.

    Raises:
        ValueError: it does not, or needs another.
    """
    check_names(SOURCES[name], name, options)
