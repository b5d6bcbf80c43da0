"""The two formats of CIFAR-10's files.

Binary: records of 3,073 bytes, a label and then the 32x32 pixels of red, of green and of blue, row
by row. Python: a pickled dict of `data`, an array (N, 3072) of unsigned bytes laid out as above,
and `labels`, a list.

A pickle is a program that may call anything it names. Here it may name only what such a file needs,
and even those names stand for placeholders: nothing that a file names is ever run.
"""

import io
import pickle
import pickletools
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from syncnorm.errors import ConfigError, in_one_line

SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_MOST_BYTES = 2**28  # 8 times a file of CIFAR-10


def read_binary(path: Path) -> tuple[Tensor, Tensor]:
    """Read one file of the binary format.

    Returns:
        Images (N, 3, 32, 32), uint8, and labels (N,), int64.

    Raises:
        ConfigError: it cannot be read, or is not a whole number of records.
    """
    content = _read(path)
    count, rest = divmod(len(content), 1 + _PIXELS)
    if rest or not count:
        raise ConfigError(
            f"{path}: must hold whole records of {1 + _PIXELS} bytes, got {count} and {rest} "
            "bytes. Fetch the file again."
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(count, 1 + _PIXELS)
    return records[:, 1:].reshape(count, *SHAPE), records[:, 0].long()


def read_python(path: Path) -> tuple[Tensor, Tensor]:
    """Read one file of the Python format, without running anything that it names.

    Returns:
        Images (N, 3, 32, 32), uint8, and labels (N,), int64.

    Raises:
        ConfigError: it cannot be read, names what such a file does not need, or does not hold
            images and labels.
    """
    content = _unpickle(_read(path), path)
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: must hold a dict with data and labels, got {type(content).__name__}"
        )
    # Python 2 wrote the keys as bytes.
    fields = {
        key if isinstance(key, str) else _bytes(key).decode("latin1"): value
        for key, value in content.items()
    }
    images, labels = _images(fields.get("data"), path), _labels(fields.get("labels"), path)
    if len(images) != len(labels):
        raise ConfigError(
            f"{path}: must hold as many labels as images, {len(images)}, got {len(labels)}"
        )
    return images, labels


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise ConfigError(f"{path}: must hold at most {_MOST_BYTES} bytes, got {size}")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


class _Placeholder:
    """Placeholder for an object: the arguments of its call, and the state set afterwards."""

    def __init__(self, *args: object) -> None:
        self.args = args
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Array(_Placeholder):
    """State: version, shape, dtype, whether columns come first, data."""


class _Dtype(_Placeholder):
    """Arguments: name, ..."""


class _Encoded(_Placeholder):
    """Arguments: text, encoding. Python 3 writes bytes for Python 2 in this way."""


_PERMITTED: dict[tuple[str, str], type[_Placeholder]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Placeholder,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _Encoded,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self.path = path

    def find_class(self, module_name: str, global_name: str, /) -> type[_Placeholder]:
        """Find the placeholder of a permitted name, and refuse every other."""
        if (module_name, global_name) not in _PERMITTED:
            # Names in a file may be long, and hold anything.
            name = f"{module_name}.{global_name}"[:200]
            raise ConfigError(
                f"{self.path}: must name nothing but numpy's arrays, got {name!r}. Do not trust "
                "this file."
            )
        return _PERMITTED[module_name, global_name]


def _unpickle(content: bytes, path: Path) -> object:
    try:
        _check_memo(content)
        return _Unpickler(content, path).load()
    except ConfigError:
        raise
    # A damaged pickle may raise anything.
    except Exception as error:
        reason = in_one_line(error)[:200]
        raise ConfigError(
            f"{path}: must be a whole pickle, got {reason}. Fetch the file again."
        ) from None


def _check_memo(content: bytes) -> None:
    # The unpickler's memo is an array as long as the highest number in use, so a few bytes could
    # demand 64 GiB.
    for position, (opcode, number, _) in enumerate(pickletools.genops(content)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (
            not isinstance(number, int) or number > position
        ):
            raise ValueError(f"object number {number} where at most {position} have been made")


def _images(value: object, path: Path) -> Tensor:
    match value:
        case _Array(
            state=(
                _,
                (int(count), int(width)),
                _Dtype(args=("u1" | b"u1", *_)),
                bool(columns_first),
                data,
            )
        ):
            raw = _bytes(data)
            if count > 0 and width == _PIXELS and len(raw) == count * _PIXELS:
                values = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
                pixels = values.reshape(_PIXELS, count).T if columns_first else values
                return pixels.reshape(count, *SHAPE)
    got = "another array" if isinstance(value, _Array) else type(value).__name__
    raise ConfigError(f"{path}: data must be an array (N, {_PIXELS}) of unsigned bytes, got {got}")


def _bytes(value: object) -> bytes:
    """Decode bytes as either Python wrote them; none for anything else."""
    match value:
        case bytes():
            return value
        case _Encoded(args=(str(text), "latin1" | b"latin1")):
            with suppress(UnicodeEncodeError):
                return text.encode("latin1")
    return b""


def _labels(value: object, path: Path) -> Tensor:
    if not isinstance(value, list) or not all(
        type(label) is int and label.bit_length() < 64 for label in value
    ):
        raise ConfigError(f"{path}: labels must be a list of integers, got {type(value).__name__}")
    return torch.tensor(value, dtype=torch.int64)
