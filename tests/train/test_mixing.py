"""Mixup and CutMix: the papers' equations, and what a sample's change may depend on."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.nn.functional import one_hot

from syncnorm.errors import ConfigError
from syncnorm.train.config.schema import AugmentSection
from syncnorm.train.data.augment import augment, draw
from syncnorm.train.data.augmented import Augmented
from syncnorm.train.data.batches import ReadFailure
from syncnorm.train.data.mixing import draw_beta, mix, partners
from syncnorm.train.data.seeded import Seeded

from .samples import Given, Labelled

MANY = torch.arange(20_000)
CLASSES = 4
MIXUP, CUTMIX = AugmentSection(mixup=0.4), AugmentSection(cutmix=1.0)
BOTH = AugmentSection(mixup=0.4, cutmix=1.0)
EVERYTHING = AugmentSection(crop=1, flip=True, cutout=2, mixup=0.4, cutmix=1.0)
OPTIONS = [MIXUP, CUTMIX, BOTH]


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 3.0, 100.0])
def test_lambda_is_of_the_beta_distribution(alpha):
    numbers = draw_beta(MANY, alpha, "mixup", 0, 1)
    assert ((numbers >= 0) & (numbers <= 1)).all()
    # 1.95 / sqrt(n): a chance of one in a thousand, were it not for the fixed seed.
    distance = stats.kstest(numbers.numpy(), stats.beta(alpha, alpha).cdf).statistic
    assert distance < 1.95 / math.sqrt(len(MANY))
    other = stats.kstest(numbers.numpy(), stats.beta(1.2 * alpha, 1.2 * alpha).cdf).statistic
    assert other > distance
    assert abs(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]) < 0.03


def test_partners_are_any_of_the_training_set():
    counts = partners(MANY, 20, 0, 1).bincount(minlength=20)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    assert not torch.equal(partners(MANY, 20, 0, 1), partners(MANY, 20, 0, 2))


def some(count: int, start: int = 0) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(start)
    images = torch.randn(count, 2, 6, 9, generator=generator, dtype=torch.float64)
    targets = one_hot(torch.arange(count) % CLASSES, CLASSES).double()
    return images, targets, (images.flip(0) + 1, targets.flip(0))


def naive(images, targets, others, index: int, place: int, options: AugmentSection):
    """One sample by the papers' equations, pixel by pixel; seed 3, epoch 8."""
    number = torch.tensor([index])
    other, other_target = others[0][place], others[1][place]
    image, target = images[place].clone(), targets[place]
    is_cut = options.cutmix > 0
    if options.mixup and options.cutmix:
        is_cut = bool(draw(number, 2, "mix kind", 3, 8))
    if not is_cut:
        share = draw_beta(number, options.mixup, "mixup", 3, 8).item()
        return share * image + (1 - share) * other, share * target + (1 - share) * other_target
    ratio = math.sqrt(1 - draw_beta(number, options.cutmix, "cutmix", 3, 8).item())
    _, height, width = image.shape
    box_height, box_width = int(height * ratio), int(width * ratio)
    top = int(draw(number, height, "cutmix row", 3, 8)) - box_height // 2
    left = int(draw(number, width, "cutmix column", 3, 8)) - box_width // 2
    covered = 0
    for y in range(max(top, 0), min(top + box_height, height)):
        for x in range(max(left, 0), min(left + box_width, width)):
            image[:, y, x] = other[:, y, x]
            covered += 1
    share = (height * width - covered) / (height * width)
    return image, share * target + (1 - share) * other_target


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_papers_equations(options):
    images, targets, others = some(40)
    indices = torch.arange(100, 140)
    mixed, probabilities = mix((images, targets), others, indices, options, 3, 8)
    expected = [
        naive(images, targets, others, int(i), place, options) for place, i in enumerate(indices)
    ]
    assert torch.equal(mixed, torch.stack([image for image, _ in expected]))
    assert torch.equal(probabilities, torch.stack([target for _, target in expected]))
    assert torch.allclose(probabilities.sum(1), torch.ones(40, dtype=torch.float64))
    assert not torch.equal(mixed, images)


@given(order=st.permutations(range(12)), cuts=st.lists(st.integers(0, 12), max_size=4))
def test_a_sample_is_mixed_the_same_way_in_whatever_batch_and_order(order, cuts):
    images, targets, others = some(12)
    whole = mix((images, targets), others, torch.arange(12), BOTH, 0, 1)
    edges = [0, *sorted(cuts), 12]
    parts = [
        torch.tensor(order[start:stop], dtype=torch.int64)
        for start, stop in itertools.pairwise(edges)
    ]
    pieces = [
        mix((images[p], targets[p]), (others[0][p], others[1][p]), p, BOTH, 0, 1) for p in parts
    ]
    for number in range(2):
        joined = torch.cat([piece[number] for piece in pieces])
        assert torch.equal(joined, whole[number][torch.tensor(order)])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_sample_is_mixed_the_same_way_on_a_cuda_device(options):
    images, targets, others = some(40)
    on_device = [tensor.cuda() for tensor in (images, targets, *others)]
    expected = mix((images, targets), others, torch.arange(40), options, 0, 1)
    mixed = mix(
        (on_device[0], on_device[1]), (on_device[2], on_device[3]), torch.arange(40), options, 0, 1
    )
    assert all(tensor.is_cuda for tensor in mixed)
    assert all(torch.equal(got.cpu(), wanted) for got, wanted in zip(mixed, expected, strict=True))


def test_mixup_takes_inputs_of_any_shape():
    rows, targets = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    others = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0]])
    mixed, probabilities = mix((rows, targets), others, torch.tensor([5]), MIXUP, 0, 1)
    share = probabilities[0, 0]
    assert torch.allclose(mixed, torch.stack([1 - share, 1 + share])[None])


@pytest.mark.parametrize("options", [AugmentSection(crop=2, flip=True, cutout=3), EVERYTHING])
def test_samples_read_one_by_one_change_as_those_in_memory(options):
    data, indices = Labelled(num_classes=CLASSES), torch.arange(12)
    augmented = Augmented(Seeded(data, 5), options, 5, CLASSES)
    images, targets = zip(*(augmented[index, 2] for index in range(12)), strict=True)

    def changed(numbers: Tensor) -> tuple[Tensor, Tensor]:
        labels = one_hot(data.labels[numbers], CLASSES).float()
        return augment(data.images[numbers], numbers, options, 5, 2), labels

    expected = changed(indices)
    if options.mixup:
        others = changed(partners(indices, 12, 5, 2))
        expected = mix(expected, others, indices, options, 5, 2)
        assert torch.equal(torch.stack(targets), expected[1])
    else:
        assert list(targets) == data.labels.tolist()
    assert torch.equal(torch.stack(images), expected[0])


def test_an_evaluation_changes_nothing():
    data = Labelled()
    image, label = Augmented(Seeded(data, 0), EVERYTHING, 0, CLASSES)[3, 0]
    assert torch.equal(image, data.images[3])
    assert label == 3


def test_probabilities_are_mixed_too():
    given = Given((torch.zeros(2), torch.tensor([0.25, 0.75])), (torch.zeros(2), 0))
    _, target = Augmented(Seeded(given, 0), MIXUP, 0, 2)[0, 1]
    assert target.sum() == 1
    assert target[0] >= 0.25


@pytest.mark.parametrize(
    ("sample", "options", "named"),
    [
        (torch.zeros(2, 3, 3), MIXUP, "got torch.float32 (2, 3, 3)"),
        ({"x": 1}, MIXUP, "got dict"),
        ((torch.zeros(2, 3, 3, dtype=torch.uint8), 0), MIXUP, "got (torch.uint8 (2, 3, 3), int)"),
        ((torch.zeros(5), 0), CUTMIX, "got (torch.float32 (5,), int)"),
        (
            (torch.zeros(2, 3, 3), torch.zeros(3, 3)),
            AugmentSection(flip=True),
            "got (torch.float32 (2, 3, 3), torch.float32 (3, 3))",
        ),
        ((torch.zeros(2), 4), MIXUP, "a class from 0 to 3, or 4 probabilities, got 4"),
        ((torch.zeros(2), 0.5), MIXUP, "got 0.5"),
    ],
)
def test_a_sample_that_cannot_be_changed_is_named(sample, options, named):
    failed = Augmented(Seeded(Given(sample, sample), 0), options, 0, CLASSES)[1, 1]
    assert isinstance(failed, ReadFailure)
    assert "sample 1 of train failed: data.augment" in failed.message
    assert named in failed.message


def test_inputs_of_different_shapes_cannot_be_mixed():
    given = Given((torch.zeros(2), 0), (torch.zeros(3), 0))
    data = Augmented(Seeded(given, 0), MIXUP, 0, CLASSES)
    failures = [data[index, epoch] for index in (0, 1) for epoch in range(1, 9)]
    messages = [failed.message for failed in failures if isinstance(failed, ReadFailure)]
    assert any("inputs of one shape, got (2,) and (3,) of sample 1" in text for text in messages)


def test_mixing_needs_the_number_of_classes():
    with pytest.raises(ConfigError, match="num_classes"):
        Augmented(Seeded(Labelled(), 0), MIXUP, 0, None)
