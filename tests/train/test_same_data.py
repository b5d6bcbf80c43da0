"""The check that all workers have the same data."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from syncnorm.errors import ConfigError
from syncnorm.train.config.schema import Config
from syncnorm.train.data.feed import LoaderFeed
from syncnorm.train.data.same import check_same_data, warn_of_own_random_numbers
from syncnorm.train.data.splits import Splits
from syncnorm.train.workers import Workers
from tests.train.samples import Given, Noise
from tests.train.test_tasks import sections


def _rows(count: int, seed: int = 0) -> TensorDataset:
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, torch.arange(count) % 2)


class _Unseeded(Dataset[Tensor]):
    """Samples that are others whenever they are read."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([secrets.randbelow(2**20) for _ in range(4)]).double()


def _tagged(path: str, number: int) -> Dataset[Any]:
    return Given(*[{"names": [path] * 2, "boxes": (torch.ones(2, 4), number)}] * 3)


def _smooth(seed: int) -> Tensor:
    """A smooth image, standardised: its mean and its spread are those of any other one."""
    waves = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(seed))
    image = torch.nn.functional.interpolate(waves[None], 224, mode="bicubic")[0]
    return (image - image.mean()) / image.std()


def _decoded(rank: int) -> Tensor:
    """An image of 8 bits a channel, of which this machine has every tenth value one level off."""
    levels = (_smooth(0) * 40 + 128).round()
    levels.view(-1)[::10] += rank
    return levels / 255


def _last_bits(rank: int) -> Dataset[Any]:
    rows = _rows(20).tensors[0]
    return TensorDataset(rows * (1 + 1e-6 * rank), torch.full((20,), torch.inf))


SPLITS: dict[str, Callable[[int], Splits]] = {
    "the same": lambda rank: Splits(_rows(20), _rows(8), _rows(4), 2),
    "changes drawn at random": lambda rank: Splits(Noise(), Noise()),
    "others whenever they are read": lambda rank: Splits(_rows(20), _Unseeded()),
    "other last bits": lambda rank: Splits(_last_bits(rank)),
    "a sample that cannot be read": lambda rank: Splits(
        _rows(20), Given(*[OSError("gone") if rank else torch.ones(5)] * 3)
    ),
    "training sizes": lambda rank: Splits(_rows(20 + 4 * (rank == 2))),
    "test sizes": lambda rank: Splits(_rows(20), _rows(8 + rank)),
    "no validation set": lambda rank: Splits(_rows(20), validation=None if rank else _rows(4)),
    "classes": lambda rank: Splits(_rows(20), num_classes=2 + rank),
    "labels": lambda rank: Splits(_rows(20), labels=[0] * 18 + [rank, 1 - rank]),
    "rows": lambda rank: Splits(_rows(20, seed=rank)),
    "images": lambda rank: Splits(Given(*[_smooth(rank)] * 3)),
    "images as machines decode them": lambda rank: Splits(Given(*[_decoded(rank)] * 3)),
    "images of another size": lambda rank: Splits(Given(*[torch.ones(3, 4 + rank, 6 - rank)] * 3)),
    "values beside one that is not finite": lambda rank: Splits(
        Given(*[torch.tensor([torch.inf, torch.nan, 1.0 + rank, 2.0])] * 3)
    ),
    "which value is not finite": lambda rank: Splits(
        Given(*[torch.tensor([torch.inf, 1.0, 1.0]).roll(rank)] * 3)
    ),
    "what is trained on": lambda rank: Splits(_rows(20, seed=rank), unchanged=_rows(20)),
    "an integer beyond all floats": lambda rank: Splits(
        Given(*[{"id": 10**400, "x": torch.ones(5)}] * 3), collate=lambda samples: samples[0]
    ),
    "nothing in it": lambda rank: Splits(Given(*[torch.ones(0, 3)] * 3)),
    "the order of rows": lambda rank: Splits(
        _rows(20), TensorDataset(_rows(8)[:][0].roll(rank, 0))
    ),
    "other paths": lambda rank: Splits(_tagged(f"/mnt/{rank}/3.png", 3)),
    "numbers": lambda rank: Splits(_tagged("3.png", rank)),
}
FAULTS = {
    "training sizes": "got 20 training samples on rank 0 and 24 on rank 2. Each",
    "test sizes": "got 8 test samples on rank 0 and 9 on rank 1. Each",
    "no validation set": "got 4 validation samples on rank 0 and None on rank 1. Each",
    "classes": "got 2 classes on rank 0 and 3 on rank 1. Each",
    "labels": "got other training labels on rank 1 than on rank 0. Each",
    "rows": "got another sample 10 of the training set on rank 1 than on rank 0. Each",
    **dict.fromkeys(
        (
            "images",
            "images of another size",
            "values beside one that is not finite",
            "which value is not finite",
        ),
        "got another sample 1 of the training set on rank 1 than on rank 0. Each",
    ),
    "what is trained on": "got another sample 10 of the training set on rank 1 than on rank 0",
    "the order of rows": "got another sample 4 of the test set on rank 1 than on rank 0. Each",
    "numbers": "got another sample 1 of the training set on rank 1 than on rank 0. Each",
}


def _check(name: str) -> str | None:
    rank, device = dist.get_rank(), torch.device("cpu")
    config = Config(**sections("Perceptron", "rows", data={"loader": {"workers": 0}}))
    feed = LoaderFeed(SPLITS[name](rank), config, device)
    before = torch.get_rng_state()
    try:
        check_same_data(feed, Workers(rank, dist.get_world_size(), device))
    except ConfigError as error:
        return str(error)
    assert torch.equal(torch.get_rng_state(), before)
    return None


@pytest.mark.parametrize("name", SPLITS)
def test_workers_must_have_the_same_data(pool, name):
    found = pool(3).run(_check, name)
    assert len(set(found)) == 1, found
    if name not in FAULTS:
        assert found[0] is None
    else:
        assert found[0].startswith("`data.name` must give the same data on all workers, got")
        assert FAULTS[name] in found[0]


_HIDDEN = np.random.default_rng()


class _Hidden(_Unseeded):
    """Samples that draw from a generator in a global variable, of which each process has a copy."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(_HIDDEN.random(4))


def _quantised(samples: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        return torch.quantize_per_tensor(torch.stack(samples).float(), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("data", "collate", "workers", "is_told"),
    [
        (_Hidden(), None, 0, True),
        (_Hidden(), None, 2, True),
        (Noise(), None, 2, False),
        (Noise(), _quantised, 0, False),
    ],
    ids=["unseeded", "unseeded, loaders", "noise", "not compared"],
)
def test_a_sample_that_is_another_one_at_each_look_is_told(data, collate, workers, is_told, caplog):
    config = Config(**sections("Perceptron", "rows", data={"loader": {"workers": workers}}))
    feed = LoaderFeed(Splits(data, data, collate=collate), config, torch.device("cpu"))
    warn_of_own_random_numbers(feed)
    assert ("is another one each time that it is read" in caplog.text) == is_told
