"""Data sets for the tests of loading, importable by a loader's process."""

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


class Slotted:
    """Its own slot is private; what is not there is not asked for, and may be costly."""

    __slots__ = ("__rng", "empty")

    def __init__(self) -> None:
        self.__rng = np.random.default_rng()

    def __getattr__(self, name: str) -> Any:
        raise OSError(f"{name} is read from a file that is not there")

    def draw(self) -> float:
        return self.__rng.random()


class Noise(Dataset[Any]):
    """Samples that draw from every global source of random numbers, and from some of their own."""

    def __init__(self, count: int = 12) -> None:
        self.count = count
        self.torch = torch.Generator()
        self.transforms = [random.Random(), {"of numpy": np.random.default_rng()}]
        self.old = np.random.RandomState()
        own = np.random.default_rng()
        self.change: Callable[[], float] = lambda: own.random()
        one, two = np.random.default_rng(), np.random.default_rng()

        def by_default(rng: np.random.Generator = one) -> float:
            return rng.random()

        def by_keyword(*, rng: np.random.Generator = two) -> float:
            return rng.random()

        self.others = [by_default, by_keyword, random.Random().random]
        self.slotted = deque([Slotted()])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        python, holder = self.transforms
        numbers = [
            torch.rand(()).item(),
            random.random(),
            np.random.rand(),
            torch.rand((), generator=self.torch).item(),
            python.random(),  # pyright: ignore
            holder["of numpy"].random(),  # pyright: ignore
            self.old.rand(),
            self.change(),
            *(draw() for draw in self.others),
            self.slotted[0].draw(),
        ]
        return torch.tensor([index, *numbers], dtype=torch.float64)


class Labelled(Dataset[Any]):
    """Random images (2, 5, 7) and their classes, always the same."""

    def __init__(self, count: int = 12, num_classes: int = 4) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 2, 5, 7, generator=generator)
        self.labels = torch.arange(count) % num_classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        return self.images[index], int(self.labels[index])


class Given(Dataset[Any]):
    """The given samples; an exception among them is raised."""

    def __init__(self, *samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        sample = self.samples[index]
        if isinstance(sample, Exception):
            raise sample
        return sample
