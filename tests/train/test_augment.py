"""Random changes to images: each against a loop over samples, and what they may depend on."""

import hashlib
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from syncnorm.train.config.schema import AugmentSection
from syncnorm.train.data.augment import augment, draw, splitmix64

EVERYTHING = AugmentSection(crop=2, flip=True, cutout=3)
OPTIONS = [
    AugmentSection(crop=1),
    AugmentSection(crop=9),
    AugmentSection(flip=True),
    AugmentSection(cutout=1),
    AugmentSection(cutout=4),
    AugmentSection(cutout=50),
    EVERYTHING,
]


def some_images(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 2, 5, 7, generator=generator, dtype=torch.float64).to(dtype)


def naive_draw(index: int, below: int, stream: str, seed: int, epoch: int) -> int:
    """splitmix64 in Python's own integers."""
    z = int.from_bytes(hashlib.sha256(f"{stream}/{seed}/{epoch}".encode()).digest()[:8], "big")
    z = (z + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return ((z ^ (z >> 31)) >> 32) * below >> 32


def naive(image: Tensor, index: int, options: AugmentSection, seed: int, epoch: int) -> Tensor:
    """One sample, pixel by pixel."""
    height, width = image.shape[1:]

    def number(below: int, stream: str) -> int:
        return naive_draw(index, below, stream, seed, epoch)

    if options.crop:
        down = number(2 * options.crop + 1, "crop row") - options.crop
        right = number(2 * options.crop + 1, "crop column") - options.crop
        cropped = torch.zeros_like(image)
        for y in range(height):
            for x in range(width):
                if 0 <= y + down < height and 0 <= x + right < width:
                    cropped[:, y, x] = image[:, y + down, x + right]
        image = cropped
    if options.flip and number(2, "flip"):
        image = torch.stack([image[:, :, width - 1 - x] for x in range(width)], dim=2)
    if options.cutout:
        image = image.clone()
        top = number(height, "cutout row") - options.cutout // 2
        left = number(width, "cutout column") - options.cutout // 2
        for y in range(top, top + options.cutout):
            for x in range(left, left + options.cutout):
                if 0 <= y < height and 0 <= x < width:
                    image[:, y, x] = 0
    return image


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_a_loop_over_samples(options):
    images = some_images(60)
    indices = torch.cat([torch.arange(57), torch.tensor([59_999, 2**31, 2**53 + 1])])
    expected = [
        naive(image, int(index), options, 3, 8)
        for image, index in zip(images, indices, strict=True)
    ]
    changed = augment(images, indices, options, 3, 8)
    assert torch.equal(changed, torch.stack(expected))
    assert not torch.equal(changed, images)


def test_the_sequence_is_that_of_splitmix64():
    # The first numbers that the authors' C code gives from 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    expected.append(16408922859458223821)
    assert [number % 2**64 for number in splitmix64(1234567, torch.arange(5)).tolist()] == expected


@given(order=st.permutations(range(12)), cuts=st.lists(st.integers(0, 12), max_size=4))
def test_a_sample_changes_the_same_way_in_whatever_batch_and_order(order, cuts):
    images, indices = some_images(12), torch.arange(100, 112)
    whole = augment(images, indices, EVERYTHING, 0, 1)
    edges = [0, *sorted(cuts), 12]
    parts = [
        torch.tensor(order[start:stop], dtype=torch.int64)
        for start, stop in itertools.pairwise(edges)
    ]
    pieces = [augment(images[part], indices[part], EVERYTHING, 0, 1) for part in parts]
    assert torch.equal(torch.cat(pieces), whole[torch.tensor(order)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_sample_changes_the_same_way_in_whatever_dtype_and_layout(options, dtype):
    images, indices = some_images(40, dtype), torch.arange(40)
    changed = augment(images, indices, options, 0, 1)
    assert changed.dtype == dtype
    assert torch.equal(changed.double(), augment(images.double(), indices, options, 0, 1))
    assert torch.equal(
        changed, augment(images.to(memory_format=torch.channels_last), indices, options, 0, 1)
    )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_sample_changes_the_same_way_on_a_cuda_device(options):
    images, indices = some_images(40), torch.arange(40)
    changed = augment(images.cuda(), indices, options, 0, 1)
    assert changed.is_cuda
    assert torch.equal(changed.cpu(), augment(images, indices, options, 0, 1))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_other_seeds_epochs_and_samples_bring_other_changes(options):
    image = some_images(1).expand(40, -1, -1, -1)
    indices = torch.arange(40)
    changed = [
        augment(image, numbers, options, seed, epoch)
        for numbers, seed, epoch in [
            (indices, 0, 1),
            (indices, 1, 0),
            (indices, 0, 2),
            (indices + 40, 0, 1),
        ]
    ]
    if options.cutout == 50:  # covers the whole image wherever it is centred
        assert not any(images.any() for images in changed)
        return
    for position, images in enumerate(changed):
        assert not any(torch.equal(images, others) for others in changed[position + 1 :])
        assert not torch.equal(images[0].expand_as(images), images)


def test_nothing_is_drawn_from_torchs_own_generator():
    images, indices = some_images(8), torch.arange(8)
    state = torch.get_rng_state()
    first = augment(images, indices, EVERYTHING, 0, 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(torch.initial_seed() + 1)
    assert torch.equal(first, augment(images, indices, EVERYTHING, 0, 1))


def test_nothing_asked_for_changes_nothing():
    images = some_images(4)
    assert augment(images, torch.arange(4), AugmentSection(), 0, 1) is images


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_given_images_stay_as_they_are(options):
    images = some_images(40)
    before = images.clone()
    assert augment(images, torch.arange(40), options, 0, 1) is not images
    assert torch.equal(images, before)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_empty_batch(options):
    assert augment(some_images(0), torch.arange(0), options, 0, 1).shape == (0, 2, 5, 7)


def is_uniform(values: Tensor, below: int) -> bool:
    """Test uniformity by chi-square: within 5 standard deviations of its mean."""
    counts = values.bincount(minlength=below).double()
    assert len(counts) == below
    expected = len(values) / below
    chi_square = ((counts - expected).square() / expected).sum().item()
    return abs(chi_square - (below - 1)) < 5 * math.sqrt(2 * (below - 1))


MANY = torch.arange(60_000)


@pytest.mark.parametrize("below", [2, 9, 32, 129])
@pytest.mark.parametrize(
    "stream", ["crop row", "crop column", "flip", "cutout row", "cutout column"]
)
@pytest.mark.parametrize(("seed", "epoch"), [(0, 1), (0, 2), (2**62, 300)])
def test_draws_are_uniform(below, stream, seed, epoch):
    assert is_uniform(draw(MANY, below, stream, seed, epoch), below)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("crop row", 0, 1), ("crop column", 0, 1)),
        (("flip", 0, 1), ("crop column", 0, 1)),
        (("cutout row", 0, 1), ("cutout column", 0, 1)),
        (("crop row", 0, 1), ("cutout row", 0, 1)),
        (("crop row", 0, 1), ("crop row", 0, 2)),
        (("crop row", 0, 1), ("crop row", 1, 1)),
        (("crop row", 0, 1), ("crop row", 1, 0)),
    ],
    ids=str,
)
def test_draws_are_independent_of_each_other(one, other):
    assert is_uniform(9 * draw(MANY, 9, *one) + draw(MANY, 9, *other), 81)


def test_neighbouring_samples_are_independent():
    numbers = draw(MANY, 9, "crop row", 0, 1)
    assert is_uniform(9 * numbers[:-1] + numbers[1:], 81)


def test_the_measure_of_uniformity_can_fail():
    numbers = draw(MANY, 9, "crop row", 0, 1)
    assert not is_uniform(MANY % 81, 81)  # more even than chance allows
    assert not is_uniform(torch.where(MANY % 30 == 0, 4, numbers), 9)  # 3 % more of one value
    assert not is_uniform(9 * numbers + numbers, 81)


def test_half_of_the_images_are_mirrored():
    image = torch.tensor([0.0, 1.0]).expand(60_000, 1, 1, 2)
    mirrored = augment(image, MANY, AugmentSection(flip=True), 0, 1)[:, 0, 0, 0].long()
    assert is_uniform(mirrored, 2)


def test_a_crop_moves_the_image_by_each_offset_equally_often():
    image = torch.zeros(1, 1, 5, 5)
    image[:, :, 2, 2] = 1
    moved = augment(image.expand(60_000, -1, -1, -1), MANY, AugmentSection(crop=2), 0, 1)
    assert torch.equal(moved.flatten(1).sum(1), torch.ones(60_000))
    assert is_uniform(moved.flatten(1).argmax(1), 25)
