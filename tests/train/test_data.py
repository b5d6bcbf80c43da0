"""Data sets in memory."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from syncnorm.errors import ConfigError
from syncnorm.placement import epoch_order
from syncnorm.train.config.file import load_config
from syncnorm.train.data.builtin import DATASETS, digits
from syncnorm.train.data.datasets import Split, make_dataset
from syncnorm.train.data.feed import TEST, MemoryFeed
from syncnorm.train.data.inputs import Standardise


def some_split(count: int, dtype: torch.dtype = torch.float64, channels: int = 2) -> Split:
    generator = torch.Generator().manual_seed(count)
    images = torch.rand(count, channels, 3, 4, generator=generator, dtype=torch.float64) * 200
    return Split(images.to(dtype), torch.arange(count) % 5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.float64], ids=str)
def test_images_stay_as_stored_and_are_standardised_on_demand(dtype):
    train, test = some_split(3000, dtype), some_split(20, dtype)
    data = make_dataset(train, test, num_classes=5)
    assert data.train.images.dtype == dtype
    assert data.mean.dtype == data.std.dtype == torch.float64
    reference = train.images.double()
    assert torch.allclose(data.mean, reference.mean((0, 2, 3)), rtol=1e-13)
    assert torch.allclose(data.std, reference.std((0, 2, 3), correction=0), rtol=1e-12)
    images = Standardise(data.inputs, torch.float64)(train.images)
    assert torch.allclose(images.mean((0, 2, 3)), torch.zeros(2, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(images.std((0, 2, 3), correction=0), torch.ones(2, dtype=torch.float64))
    # The test set is standardised by the training set's figures, not by its own.
    one = (test.images[7, 1, 2, 3].double() - reference[:, 1].mean()) / reference[:, 1].std(
        correction=0
    )
    assert Standardise(data.inputs, torch.float64)(test.images)[7, 1, 2, 3].item() == pytest.approx(
        one.item()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_standardising_a_part_gives_the_same_bits(dtype):
    data = make_dataset(some_split(50, torch.uint8), some_split(5, torch.uint8), num_classes=5)
    whole = Standardise(data.inputs, dtype)(data.train.images)
    assert whole.dtype == dtype
    assert torch.equal(Standardise(data.inputs, dtype)(data.train[10:20].images), whole[10:20])
    assert Standardise(data.inputs, dtype)(data.train[:0].images).shape == (0, 2, 3, 4)


def test_figures_of_whole_numbers_are_exact():
    train = some_split(3000, torch.uint8, channels=1)
    values = train.images.flatten().tolist()
    mean = Fraction(sum(values), len(values))
    variance = Fraction(sum(value * value for value in values), len(values)) - mean**2
    data = make_dataset(train, train, num_classes=5)
    assert data.mean.item() == float(mean)
    assert data.std.item() == pytest.approx(math.sqrt(variance), rel=4e-16)


def test_figures_of_whole_numbers_do_not_depend_on_the_order_of_addition():
    # The number of threads changes that order.
    train = some_split(3000, torch.uint8, channels=40)
    data = make_dataset(train, train, num_classes=5)
    other = make_dataset(train[epoch_order(3000, seed=0, epoch=1)], train, num_classes=5)
    assert torch.equal(other.mean, data.mean)
    assert torch.equal(other.std, data.std)


def test_a_constant_channel_becomes_0():
    images = torch.cat([some_split(10).images, torch.full((10, 1, 3, 4), 0.1)], dim=1)
    split = Split(images, torch.zeros(10, dtype=torch.int64))
    data = make_dataset(split, split, num_classes=1)
    assert data.std[2] == 1
    assert Standardise(data.inputs, torch.float64)(images)[:, 2].abs().max() < 1e-15


def wrong_labels(label: int) -> Split:
    split = some_split(4)
    return Split(split.images, torch.tensor([0, 1, label, label]))


def labelled(labels: Any) -> Split:
    return Split(some_split(4).images, labels)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            some_split(0),
            some_split(4),
            r"^training set: .* N >= 1, got \(0, 2, 3, 4\) and \(0,\)\. ",
        ),
        (some_split(4), some_split(0), r"^test set: .* N >= 1, got \(0, 2, 3, 4\) and \(0,\)\. "),
        (
            some_split(4),
            Split(torch.ones(4, 3), torch.arange(4)),
            r"^test set: .*, got \(4, 3\) and \(4,\)\. ",
        ),
        (
            Split(torch.ones(4, 1, 2, 2), torch.arange(3)),
            some_split(4),
            r"^training set: .* and \(3,\)\. ",
        ),
        # torch's cross entropy takes a class for each pixel, or a probability for each class, in silence.
        (
            labelled(torch.zeros(4, 3, 4, dtype=torch.int64)),
            some_split(4),
            r"got \(4, 2, 3, 4\) and \(4, 3, 4\)\. Other data ",
        ),
        (
            some_split(4),
            labelled(torch.rand(4, 5)),
            r"^test set: .* got \(4, 2, 3, 4\) and \(4, 5\)\. Other data ",
        ),
        (
            labelled(torch.rand(4)),
            some_split(4),
            r"^training set: labels must be whole numbers, got torch.float32\. ",
        ),
        (
            labelled(np.zeros(4)),
            some_split(4),
            r"^training set: must be a Split.* got Split\(Tensor, ndarray\)\. torch.from",
        ),
        (
            some_split(4),
            (torch.zeros(4), 3),
            r"^test set: must be a Split\(.*\) of two tensors, got tuple\(Tensor, int\)\. ",
        ),
        (
            None,
            some_split(4),
            r"^training set: must be a Split\(images, labels\) of two tensors, got NoneType\. ",
        ),
        (
            some_split(4),
            some_split(4, channels=1),
            r"^test set: .* shape \(2, 3, 4\), got \(1, 3, 4\)$",
        ),
        (
            wrong_labels(5),
            some_split(4),
            r"^training set: labels must be from 0 to 4, got 5 for sample 2$",
        ),
        (
            some_split(4),
            wrong_labels(-1),
            r"^test set: labels must be from 0 to 4, got -1 for sample 2$",
        ),
        (
            Split(torch.tensor([1.0, float("nan")]).reshape(2, 1, 1, 1), torch.arange(2)),
            Split(torch.ones(1, 1, 1, 1), torch.arange(1)),
            r"^training set: images must be finite, got mean \[nan\] and std \[nan\]$",
        ),
    ],
)
def test_splits_that_cannot_be_used(train, test, message):
    with pytest.raises(ConfigError, match=message):
        make_dataset(train, test, num_classes=5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.bool], ids=str)
def test_labels_are_classes_whatever_their_type(dtype):
    labels = torch.tensor([0, 1, 1, 0])
    data = make_dataset(labelled(labels.to(dtype)), labelled(labels), num_classes=2)
    assert data.train.labels.dtype == torch.int64
    assert torch.equal(data.train.labels, labels)


def test_moving_keeps_dtypes():
    data = make_dataset(some_split(4, torch.uint8), some_split(3, torch.uint8), num_classes=5)
    moved = data.to("meta")
    tensors = [
        moved.train.images,
        moved.train.labels,
        moved.test.images,
        moved.test.labels,
    ]
    assert all(tensor.is_meta for tensor in tensors)
    assert [tensor.dtype for tensor in tensors] == [torch.uint8, torch.int64] * 2
    assert moved.num_classes == 5


def test_part_of_a_split():
    split = some_split(9)
    assert len(split) == 9
    for index in (slice(2, 5), torch.tensor([8, 0])):
        assert torch.equal(split[index].images, split.images[index])
        assert torch.equal(split[index].labels, split.labels[index])


def test_digits():
    data = DATASETS["digits"](None)
    assert data.train.images.shape == (1437, 1, 8, 8)
    assert data.test.images.shape == (360, 1, 8, 8)
    assert data.train.images.unique().tolist() == list(range(17))
    assert data.num_classes == 10
    images = Standardise(data.inputs, torch.float64)(data.train.images)
    assert images.mean().item() == pytest.approx(0, abs=1e-12)
    assert images.std(correction=0).item() == pytest.approx(1)
    shares = [part.labels.bincount(minlength=10) / len(part) for part in (data.train, data.test)]
    assert torch.allclose(shares[0], shares[1], atol=3e-3)


def test_digits_say_that_they_take_no_folder(tmp_path, caplog):
    digits(None)
    assert not caplog.records
    digits(tmp_path)
    assert caplog.messages == ["data.root is not used: the digits come with the package"]


def test_digits_are_scikit_learns_and_split_by_its_rule(tmp_path):
    pixels, labels = load_digits(return_X_y=True)
    indices = train_test_split(
        np.arange(len(labels)), test_size=360, stratify=labels, random_state=0
    )
    data = digits(tmp_path)
    for split, expected in zip((data.train, data.test), indices, strict=True):
        assert split.images.dtype == torch.uint8
        assert np.array_equal(split.images.flatten(1).numpy(), pixels[expected])
        assert np.array_equal(split.labels.numpy(), labels[expected])


def test_names():
    assert list(DATASETS) == ["digits", "mnist", "fashion_mnist", "cifar10"]


def test_a_run_standardises_as_its_loaded_model_will():
    """Long numbers lose no digits that differ: dates in seconds, in a run of float32."""
    images = 1.7e9 + torch.rand(64, 1, 2, 2, dtype=torch.float64)
    split = Split(images, torch.arange(64) % 2)
    feed = MemoryFeed(make_dataset(split, split, 2), load_config("digits"), torch.device("cpu"))
    found, _ = feed.load(TEST, torch.arange(64))
    inputs = feed.signature.inputs
    assert inputs is not None
    assert torch.equal(found, Standardise(inputs, torch.float32)(images))
    expected = (images - images.mean()) / images.std(correction=0)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
