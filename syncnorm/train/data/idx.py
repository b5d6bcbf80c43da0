"""Files of the idx format, in which MNIST and its relatives come, plain or compressed with gzip.

    bytes 0-3        0, 0, the type of a value (8: unsigned byte), the number of dimensions
    next 4 * ndim    the sizes, big-endian, first dimension first
    the rest         the values, last dimension fastest

A file is read piece by piece, no further than its header allows, so a header with sizes too large
and a gzip stream that expands without end are both refused before they take memory.
"""

import gzip
import io
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from syncnorm.errors import ConfigError

_UNSIGNED_BYTE = 8
_MOST_VALUES = 2**30  # 23 times the training images of MNIST
_PIECE = 2**20


def read_idx(path: Path, ndim: int) -> Tensor:
    """Read one file of unsigned bytes.

    Args:
        path: the file; compressed if its name ends in .gz.
        ndim: the number of dimensions that it must have.

    Returns:
        Its values as uint8, in the file's shape.

    Raises:
        ConfigError: it cannot be read, or is not exactly such a file.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            sizes = _read_header(file, path, ndim)
            count = math.prod(sizes)
            values = _read(file, count + 1)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    if len(values) != count:
        got = "more" if len(values) > count else f"{len(values)}"
        raise ConfigError(
            f"{path}: must hold {count} bytes after its header, which says {sizes}, got {got}. "
            "Fetch the file again."
        )
    return torch.frombuffer(values, dtype=torch.uint8).reshape(sizes)


def _read_header(file: io.BufferedIOBase, path: Path, ndim: int) -> tuple[int, ...]:
    magic = bytes([0, 0, _UNSIGNED_BYTE, ndim])
    got = bytes(_read(file, len(magic)))
    if got != magic:
        raise ConfigError(
            f"{path}: must begin with {magic.hex(' ')} (idx, unsigned bytes, dimensions: {ndim}), "
            f"got {got.hex(' ') or 'an empty file'}"
        )
    header = _read(file, 4 * ndim)
    if len(header) < 4 * ndim:
        raise ConfigError(
            f"{path}: must hold a header of {4 + 4 * ndim} bytes, got {4 + len(header)}. Fetch the "
            "file again."
        )
    sizes = struct.unpack(f">{ndim}I", header)
    if not 0 < math.prod(sizes) <= _MOST_VALUES:
        raise ConfigError(
            f"{path}: must hold between 1 and {_MOST_VALUES} values, got a header that says {sizes}"
        )
    return sizes


def _read(file: io.BufferedIOBase, count: int) -> bytearray:
    """Read `count` bytes, or fewer at the end; takes memory only for bytes that have been read."""
    data = bytearray()
    while len(data) < count and (piece := file.read(min(_PIECE, count - len(data)))):
        data += piece
    return data
