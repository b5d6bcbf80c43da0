"""Files of the idx format, whole and damaged, and the data sets that consist of them."""

import gzip
import os
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch

from syncnorm.errors import ConfigError
from syncnorm.train.data.builtin import DATASETS, fashion_mnist, mnist
from syncnorm.train.data.idx import read_idx

NAMES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]


def idx(values: torch.Tensor) -> bytes:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    return header + bytes(values.flatten().tolist())


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def some_images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 4, 5), generator=torch.Generator().manual_seed(count)).to(
        torch.uint8
    )


def write_set(folder: Path, ending: str = "", count: int = 6) -> None:
    """Write a data set of `count` images to train and 3 to test; label i % 10."""
    for name, values in zip(
        NAMES,
        [some_images(count), torch.arange(count) % 10, some_images(3), torch.arange(3)],
        strict=True,
    ):
        write(folder / f"{name}{ending}", idx(values))


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("shape", [(7,), (3, 4, 5), (1, 1, 1)], ids=str)
def test_values_come_back(tmp_path, shape, ending):
    values = torch.randint(0, 256, shape).to(torch.uint8)
    read = read_idx(write(tmp_path / f"a{ending}", idx(values)), len(shape))
    assert read.dtype == torch.uint8
    assert torch.equal(read, values)


WHOLE = idx(some_images(2))


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"",
            r"must begin with 00 00 08 03 \(idx, unsigned bytes, dimensions: 3\), got an empty "
            r"file",
        ),
        (WHOLE[:3], r"must begin with 00 00 08 03 .*, got 00 00 08$"),
        (b"\0\1" + WHOLE[2:], r"must begin with 00 00 08 03 .*, got 00 01 08 03"),
        (b"\0\0\x0d" + WHOLE[3:], r"must begin with 00 00 08 03 .*, got 00 00 0d 03"),
        (idx(torch.arange(4)), r"must begin with 00 00 08 03 .*, got 00 00 08 01"),
        (WHOLE[:13], r"must hold a header of 16 bytes, got 13"),
        (WHOLE[:16], r"must hold 40 bytes after its header, which says \(2, 4, 5\), got 0\."),
        (WHOLE[:-1], r"must hold 40 bytes after its header, which says \(2, 4, 5\), got 39\."),
        (WHOLE + b"\0", r"must hold 40 bytes after its header, which says \(2, 4, 5\), got more\."),
        (
            idx(torch.zeros(0, 4, 5)),
            r"must hold between 1 and 1073741824 values, got a header that says \(0, 4, 5\)",
        ),
        (
            struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1) + bytes(40),
            r"must hold between 1 and 1073741824 values, got a header that says \(4294967295, "
            r"4294967295, 4294967295\)",
        ),
    ],
    ids=str,
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, content, message, ending):
    path = write(tmp_path / f"a{ending}", content)
    with pytest.raises(ConfigError, match=f"^{path}: {message}"):
        read_idx(path, 3)


def test_a_compressed_file_cut_short(tmp_path):
    path = write(tmp_path / "a.gz", WHOLE)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        ConfigError, match=rf"^{path}: cannot be read: Compressed file ended before"
    ):
        read_idx(path, 3)


def test_a_compressed_file_that_cannot_be_expanded(tmp_path):
    path = write(tmp_path / "a.gz", WHOLE)
    content = bytearray(path.read_bytes())
    content[10] |= 6  # the first block's type: 3, which does not exist
    path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=rf"^{path}: cannot be read: Error -3 .* invalid block type"
    ):
        read_idx(path, 3)


def test_a_wrong_checksum(tmp_path):
    path = write(tmp_path / "a.gz", WHOLE)
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # the first byte of the checksum
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^{path}: cannot be read: CRC check failed"):
        read_idx(path, 3)


def test_bytes_after_the_compressed_stream(tmp_path):
    path = write(tmp_path / "a.gz", WHOLE)
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(ConfigError, match=rf"^{path}: cannot be read: Not a gzipped file"):
        read_idx(path, 3)


def test_names_that_lie_about_compression(tmp_path):
    (tmp_path / "plain.gz").write_bytes(WHOLE)
    with pytest.raises(
        ConfigError, match=r"plain.gz: cannot be read: Not a gzipped file \(b'\\x00\\x00'\)"
    ):
        read_idx(tmp_path / "plain.gz", 3)
    (tmp_path / "compressed").write_bytes(gzip.compress(WHOLE))
    with pytest.raises(
        ConfigError, match=r"compressed: must begin with 00 00 08 03 .*, got 1f 8b 08 00"
    ):
        read_idx(tmp_path / "compressed", 3)


def test_a_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(ConfigError, match=f"^{tmp_path}: cannot be read: Is a directory$"):
        read_idx(tmp_path, 3)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (struct.pack(">HBB3I", 0, 8, 3, 2**10, 2**10, 2**10) + bytes(40), "got 40"),
        (WHOLE + bytes(2**27), "got more"),
    ],
    ids=["a header that promises 1 GiB", "a stream that expands to 128 MiB"],
)
def test_memory_is_taken_only_for_what_came_and_is_wanted(tmp_path, content, got):
    path = write(tmp_path / "a.gz", content)
    assert path.stat().st_size < 2**18
    del content
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match=got):
            read_idx(path, 3)
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "."),
        ("mnist", "mnist"),
        ("mnist", "mnist/raw"),
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "."),
        ("fashion_mnist", "fashion_mnist"),
        ("fashion_mnist", "fashion_mnist/raw"),
        ("fashion_mnist", "fashion-mnist"),
        ("fashion_mnist", "FashionMNIST/raw"),
    ],
)
def test_a_data_set_is_found_and_read(tmp_path, name, folder, ending):
    write_set(tmp_path / folder, ending)
    data = DATASETS[name](tmp_path)
    assert data.train.images.dtype == torch.uint8
    assert torch.equal(data.train.images, some_images(6)[:, None])
    assert torch.equal(data.test.images, some_images(3)[:, None])
    assert torch.equal(data.train.labels, torch.arange(6))
    assert torch.equal(data.test.labels, torch.arange(3))
    assert data.num_classes == 10
    assert data.mean.item() == pytest.approx(some_images(6).double().mean().item(), rel=1e-14)
    assert data.std.item() == pytest.approx(
        some_images(6).double().std(correction=0).item(), rel=1e-12
    )


def test_each_set_is_taken_from_its_own_folder(tmp_path):
    for folder, count in [(".", 5), ("mnist", 6), ("mnist/raw", 7), ("fashion_mnist", 8)]:
        write_set(tmp_path / folder, count=count)
    assert len(mnist(tmp_path).train) == 7
    assert len(fashion_mnist(tmp_path).train) == 8


def test_files_may_be_compressed_one_by_one(tmp_path):
    write_set(tmp_path)
    (tmp_path / NAMES[2]).unlink()
    write(tmp_path / f"{NAMES[2]}.gz", idx(some_images(3)))
    assert len(mnist(tmp_path).test) == 3


WANTED = "`data.root` must be a folder that holds " + ", ".join(NAMES) + ", plain or with .gz, got "
ORIGINS = {
    "mnist": r"They are the files of Yann LeCun's MNIST database\.",
    "fashion_mnist": "Debian's package dataset-fashion-mnist installs them under "
    r"/usr/share/datasets/fashion-mnist\.",
}


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_a_root_without_the_files(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"^{WANTED}null\. {ORIGINS[name]}$"):
        DATASETS[name](None)
    with pytest.raises(
        ConfigError, match=rf"^{WANTED}'{tmp_path}', which holds none of them\. {ORIGINS[name]}$"
    ):
        DATASETS[name](tmp_path)
    absent = tmp_path / "absent"
    with pytest.raises(
        ConfigError, match=rf"^{WANTED}'{absent}', which is not a folder\. {ORIGINS[name]}$"
    ):
        DATASETS[name](absent)
    long = tmp_path / ("x" * 300)
    with pytest.raises(
        ConfigError, match=rf"^{WANTED}'{long}.*': File name too long\. {ORIGINS[name]}$"
    ):
        DATASETS[name](long)
    write_set(tmp_path / name)
    for missing in NAMES[1:3]:
        (tmp_path / name / missing).unlink()
    with pytest.raises(
        ConfigError, match=rf"got '{tmp_path}', which lacks {name}/{NAMES[1]}, {name}/{NAMES[2]}\. "
    ):
        DATASETS[name](tmp_path)


def test_too_few_labels(tmp_path):
    write_set(tmp_path)
    path = write(tmp_path / NAMES[1], idx(torch.arange(5)))
    with pytest.raises(
        ConfigError, match=rf"^{path}: must hold 6 labels, one for each image .*{NAMES[0]}, got 5$"
    ):
        mnist(tmp_path)


def test_labels_out_of_range(tmp_path):
    write_set(tmp_path)
    path = write(tmp_path / NAMES[3], idx(torch.tensor([9, 10, 255])))
    with pytest.raises(
        ConfigError, match=rf"^{path}: labels must be from 0 to 9, got 10 for sample 1$"
    ):
        mnist(tmp_path)


def test_images_of_two_sizes(tmp_path):
    write_set(tmp_path)
    write(tmp_path / NAMES[2], idx(some_images(3)[:, :, :4]))
    with pytest.raises(ConfigError, match=r"test set: .* shape \(1, 4, 5\), got \(1, 4, 4\)"):
        mnist(tmp_path)


def test_fashion_mnist_itself():
    debian = Path("/usr/share/datasets/fashion-mnist")
    root = os.environ.get("SYNCNORM_DATA")
    if root is None and not debian.is_dir():
        pytest.skip(f"Fashion-MNIST is in neither {debian} nor a folder that SYNCNORM_DATA names")
    data = fashion_mnist(Path(root) if root else debian)
    assert data.train.images.shape == (60_000, 1, 28, 28)
    assert data.test.images.shape == (10_000, 1, 28, 28)
    assert data.train.labels.bincount().tolist() == [6000] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    assert data.mean.tolist() == pytest.approx([72.94], abs=0.005)
    assert data.std.tolist() == pytest.approx([90.02], abs=0.005)
