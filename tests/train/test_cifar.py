"""CIFAR-10's two formats, whole, damaged and hostile."""

import io
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from syncnorm.errors import ConfigError
from syncnorm.train.data.builtin import cifar10
from syncnorm.train.data.cifar import read_binary, read_python

NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def some_pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def binary(pixels: np.ndarray, labels: list[int]) -> bytes:
    return b"".join(
        bytes([label]) + row.tobytes() for row, label in zip(pixels, labels, strict=True)
    )


def pickled(pixels: object, labels: object, protocol: int = 2) -> bytes:
    return pickle.dumps({b"batch_label": b"a batch", b"labels": labels, b"data": pixels}, protocol)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_set(folder: Path, version: str, count: int = 2) -> None:
    """Write six files of `count` images each; file k has labels k, k + 1, ..."""
    for number, name in enumerate(NAMES):
        pixels, labels = some_pixels(count, number), [(number + row) % 10 for row in range(count)]
        if version == "bin":
            write(folder / f"{name}.bin", binary(pixels, labels))
        else:
            write(folder / name, pickled(pixels, labels))


def test_binary_files(tmp_path):
    pixels = some_pixels(3)
    images, labels = read_binary(write(tmp_path / "a.bin", binary(pixels, [3, 0, 9])))
    assert labels.tolist() == [3, 0, 9]
    assert images.dtype == torch.uint8
    # Red comes first, and rows before columns.
    assert images[1, 0, 0, 1] == pixels[1, 1]
    assert images[1, 0, 1, 0] == pixels[1, 32]
    assert images[1, 1, 0, 0] == pixels[1, 1024]
    assert torch.equal(images.reshape(3, -1), torch.from_numpy(pixels))


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"", "0 and 0 bytes"),
        (bytes(3072), "0 and 3072 bytes"),
        (bytes(2 * 3073 + 1), "2 and 1 bytes"),
    ],
    ids=["empty", "cut short", "one byte more"],
)
def test_binary_files_of_another_length(tmp_path, content, got):
    path = write(tmp_path / "a.bin", content)
    with pytest.raises(
        ConfigError, match=rf"^{path}: must hold whole records of 3073 bytes, got {got}\."
    ):
        read_binary(path)


@pytest.mark.parametrize("read", [read_binary, read_python])
def test_files_that_cannot_be_read(tmp_path, read):
    with pytest.raises(ConfigError, match=f"^{tmp_path}: cannot be read: Is a directory$"):
        read(tmp_path)
    with pytest.raises(ConfigError, match=r"absent: cannot be read: No such file or directory$"):
        read(tmp_path / "absent")
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(2**28 + 1)  # takes no room on the disk
    with pytest.raises(
        ConfigError, match=f"^{path}: must hold at most 268435456 bytes, got 268435457$"
    ):
        read(path)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_python_files_of_this_python(tmp_path, protocol):
    pixels = some_pixels(3)
    images, labels = read_python(write(tmp_path / "a", pickled(pixels, [3, 0, 9], protocol)))
    assert torch.equal(images, torch.from_numpy(pixels).reshape(3, 3, 32, 32))
    assert labels.tolist() == [3, 0, 9]


def test_python_files_with_columns_first(tmp_path):
    pixels = some_pixels(3)
    content = pickled(np.asfortranarray(pixels), [3, 0, 9])
    assert content != pickled(pixels, [3, 0, 9])
    images, _ = read_python(write(tmp_path / "a", content))
    assert torch.equal(images, torch.from_numpy(pixels).reshape(3, 3, 32, 32))


def test_python_files_with_text_as_keys(tmp_path):
    pixels = some_pixels(1)
    images, labels = read_python(
        write(tmp_path / "a", pickle.dumps({"data": pixels, "labels": [7]}, 2))
    )
    assert torch.equal(images.flatten(), torch.from_numpy(pixels).flatten())
    assert labels.tolist() == [7]


def python_2(pixels: np.ndarray, label: int) -> bytes:
    """A file as Python 2 and its numpy wrote it: keys, type names and pixels as byte strings."""
    raw = pixels.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x01(cnumpy\nndarray\nq\x02K\x00\x85U\x01btq\x03Rq\x04"
        b"(K\x01K"
        + bytes([len(pixels)])
        + b"M\x00\x0c\x86cnumpy\ndtype\nq\x05U\x02u1K\x00K\x01\x87q\x06Rq\x07"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x08b\x89T"
        + struct.pack("<I", len(raw))
        + raw
    )
    return (
        b"\x80\x02}q\x00(U\x04data" + array + b"tq\x09bU\x06labels]q\x0aK" + bytes([label]) + b"au."
    )


def test_python_files_of_python_2(tmp_path):
    pixels = some_pixels(1)
    images, labels = read_python(write(tmp_path / "a", python_2(pixels, 6)))
    assert torch.equal(images.flatten(), torch.from_numpy(pixels).flatten())
    assert labels.tolist() == [6]


def test_python_files_without_images(tmp_path):
    path = write(tmp_path / "a", python_2(some_pixels(0), 6))
    with pytest.raises(ConfigError, match=f"^{path}: data must be .*, got another array"):
        read_python(path)


class Hostile:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("place", ["data", "labels", "key", "whole"])
def test_a_hostile_pickle_runs_nothing(tmp_path, place, protocol):
    sign = tmp_path / "sign"
    evil = Hostile(os.mkdir, str(sign))
    content = {
        "data": pickled(evil, [1], protocol),
        "labels": pickled(some_pixels(1), evil, protocol),
        "key": pickle.dumps({evil: 1}, protocol),
        "whole": pickle.dumps(evil, protocol),
    }[place]
    path = write(tmp_path / "a", content)
    name = f"{os.mkdir.__module__}.mkdir"
    with pytest.raises(
        ConfigError, match=rf"^{path}: must name nothing but numpy's arrays, got '{name}'\."
    ):
        read_python(path)
    assert not sign.exists()
    # The same bytes do harm to a reader that believes them.
    pickle.loads(content)  # noqa: S301 (written above)
    assert sign.is_dir()


@pytest.mark.parametrize(
    ("module_name", "global_name"),
    [
        ("builtins", "eval"),
        ("__builtin__", "eval"),
        ("numpy", "load"),
        ("numpy", "ndarray.__class__"),
        ("numpy.core.multiarray", "scalar"),
        ("_codecs", "decode"),
        ("copyreg", "_reconstructor"),
        ("syncnorm.train.data.cifar", "_Unpickler"),
    ],
)
def test_any_other_name_is_refused(tmp_path, module_name, global_name):
    name = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module_name, global_name)]
    path = write(tmp_path / "a", b"\x80\x04" + b"".join(name) + b"\x93.")
    with pytest.raises(
        ConfigError, match=rf"^{path}: must name nothing .*, got '{module_name}\.{global_name}'\."
    ):
        read_python(path)


ENCODE = b"c_codecs\nencode\n"
DTYPE = b"cnumpy\ndtype\n"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            ARRAY + b"cnumpy\nndarray\n(J\xff\xff\xff\x7ftU\x01b\x87R.",
            "must hold a dict with data and labels, got _Array",
        ),
        (ENCODE + b"(Vspam\nVzip\ntR.", "must hold a dict with data and labels, got _Encoded"),
        (DTYPE + b"}U\x0b__setstate__Nsb.", "must be a whole pickle, got .*Error: "),
        (DTYPE + b"N}U\x04argsU\x01xs\x86b.", "must be a whole pickle, got .*Error: "),
        (
            b"Nr\xff\xff\xff\xff.",
            "must be a whole pickle, got ValueError: object number 4294967295 where at most 1",
        ),
        (
            b"Np99999999999\n.",
            "must be a whole pickle, got ValueError: object number 99999999999 where at most 1",
        ),
        (
            b"T\xff\xff\xff\x7fabc.",
            "must be a whole pickle, got ValueError: expected 2147483647 bytes",
        ),
        (b"P1\n.", "must be a whole pickle, got UnpicklingError: "),
        (b"(" * 1000 + b".", "must be a whole pickle, got UnpicklingError: "),
        (b"K\x01K\x020.", "must hold a dict with data and labels, got int"),
    ],
    ids=[
        *("vast array", "codec", "state of a name", "attributes of a name", "vast number"),
        *("vaster number", "vast string", "persistent", "marks", "number"),
    ],
)
def test_permitted_names_and_plain_opcodes_do_no_harm_either(tmp_path, content, message):
    path = write(tmp_path / "a", content)
    with pytest.raises(ConfigError, match=f"^{path}: {message}"):
        read_python(path)


WHOLE = pickled(some_pixels(2), [1, 2])


@pytest.mark.parametrize("length", [0, 1, 2, 10, 50, 200, 1000, len(WHOLE) - 1])
def test_a_pickle_cut_short(tmp_path, length):
    path = write(tmp_path / "a", WHOLE[:length])
    with pytest.raises(
        ConfigError,
        match=rf"^{path}: must be a whole pickle, got .*Error: .*\. Fetch the file again\.",
    ):
        read_python(path)


@pytest.mark.parametrize("position", range(0, 400, 7))
def test_a_pickle_with_a_wrong_byte_reads_or_is_refused(tmp_path, position):
    content = bytearray(WHOLE)
    content[position] ^= 0x15
    path = write(tmp_path / "a", bytes(content))
    try:
        outcome = str(len(read_python(path)[0]))
    except ConfigError as error:
        outcome = str(error)
    assert outcome.startswith((f"{path}: ", "2"))


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (
            some_pixels(2).astype(np.int16),
            [1, 2],
            r"data must be an array \(N, 3072\) of unsigned bytes, got another",
        ),
        (some_pixels(2).view(np.int8), [1, 2], "data must be .*, got another array"),
        (some_pixels(2)[:, :-1], [1, 2], "data must be .*, got another array"),
        (some_pixels(2).reshape(-1), [1, 2], "data must be .*, got another array"),
        ([1, 2], [1, 2], "data must be .*, got list"),
        (None, [1, 2], "data must be .*, got NoneType"),
        (some_pixels(2), None, "labels must be a list of integers, got NoneType"),
        (some_pixels(2), [1, 2.0], "labels must be a list of integers, got list"),
        (some_pixels(2), [1, 2**63], "labels must be a list of integers, got list"),
        (some_pixels(2), [1], "must hold as many labels as images, 2, got 1"),
    ],
    ids=[
        "type",
        "sign",
        "width",
        "dimensions",
        "a list",
        "no data",
        "no labels",
        "a float",
        "too large",
        "one too few",
    ],
)
def test_a_pickle_of_something_else(tmp_path, pixels, labels, message):
    path = write(tmp_path / "a", pickled(pixels, labels))
    with pytest.raises(ConfigError, match=f"^{path}: {message}"):
        read_python(path)


@pytest.mark.parametrize(
    "shape", [b"J\xff\xff\xff\x7fM\x00\x0c\x86", b"K\x02M\x00\x0d\x86", b"K\x00M\x00\x0c\x86"]
)
def test_an_array_of_another_shape_than_its_bytes(tmp_path, shape):
    content = WHOLE.replace(b"K\x02M\x00\x0c\x86", shape)
    assert content != WHOLE
    path = write(tmp_path / "a", content)
    with pytest.raises(ConfigError, match=f"^{path}: data must be .*, got another array"):
        read_python(path)


@pytest.mark.parametrize(
    ("folder", "version"),
    [(".", "bin"), ("cifar-10-batches-bin", "bin"), (".", "py"), ("cifar-10-batches-py", "py")],
)
def test_the_data_set_is_found_and_read(tmp_path, folder, version):
    write_set(tmp_path / folder, version)
    data = cifar10(tmp_path)
    pixels = np.concatenate([some_pixels(2, number) for number in range(5)])
    assert torch.equal(data.train.images, torch.from_numpy(pixels).reshape(10, 3, 32, 32))
    assert data.train.labels.tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert torch.equal(data.test.images, torch.from_numpy(some_pixels(2, 5)).reshape(2, 3, 32, 32))
    assert data.test.labels.tolist() == [5, 6]
    assert data.num_classes == 10
    channels = pixels.reshape(10, 3, 1024).astype(np.float64)
    assert data.mean.tolist() == pytest.approx(channels.mean((0, 2)).tolist(), rel=1e-14)
    assert data.std.tolist() == pytest.approx(channels.std((0, 2)).tolist(), rel=1e-12)


WANTED = (
    "`data.root` must be a folder that holds data_batch_1 to data_batch_5 and test_batch, "
    r"all with .bin \(the binary version\) or all without \(for Python\), got "
)
ORIGIN = r"They are in the archives of the CIFAR-10 page of the University of Toronto\."


def test_a_root_without_the_files(tmp_path):
    with pytest.raises(ConfigError, match=rf"^{WANTED}null\. {ORIGIN}$"):
        cifar10(None)
    with pytest.raises(
        ConfigError, match=rf"^{WANTED}'{tmp_path}', which holds none of them\. {ORIGIN}$"
    ):
        cifar10(tmp_path)
    write_set(tmp_path / "cifar-10-batches-py", "py")
    (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
    with pytest.raises(
        ConfigError,
        match=rf"^{WANTED}'{tmp_path}', which lacks cifar-10-batches-py/test_batch\. {ORIGIN}$",
    ):
        cifar10(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data_batch_3.bin", binary(some_pixels(2), [9, 10])),
        ("data_batch_3", pickled(some_pixels(2), [9, 10])),
        ("data_batch_3", pickled(some_pixels(2), [9, -1])),
    ],
    ids=["binary", "python", "negative"],
)
def test_labels_out_of_range(tmp_path, name, content):
    write_set(tmp_path, "bin" if name.endswith(".bin") else "py")
    path = write(tmp_path / name, content)
    got = "-1" if content == pickled(some_pixels(2), [9, -1]) else "10"
    with pytest.raises(
        ConfigError, match=rf"^{path}: labels must be from 0 to 9, got {got} for sample 1$"
    ):
        cifar10(tmp_path)


def test_the_python_2_bytes_are_what_numpy_reads_too():
    pixels = some_pixels(1)
    content = pickle.load(io.BytesIO(python_2(pixels, 6)), encoding="bytes")  # noqa: S301 (written above)
    assert np.array_equal(content[b"data"], pixels)
    assert content[b"labels"] == [6]
