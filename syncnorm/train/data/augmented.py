"""`data.augment` for samples that are read one by one."""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from syncnorm.errors import ConfigError
from syncnorm.train.data.augment import augment
from syncnorm.train.data.batches import ReadFailure
from syncnorm.train.data.mixing import mix, partners
from syncnorm.train.data.seeded import Key, Seeded

if TYPE_CHECKING:
    from syncnorm.train.config.schema import AugmentSection


class Augmented(Dataset[Any]):
    """Seeded samples, cropped, mirrored, cut out and mixed as `data.augment` says.

    Each change has the same bits as that of the sample in memory. Samples read for epoch 0, which
    is an evaluation, stay as they are.

    Args:
        samples: pairs of a floating image (C, H, W) and its class, a whole number or probabilities
            (num_classes,). Mixup alone takes floating inputs of any shape.
        options: `data.augment`.
        seed: of the run.
        num_classes: number of classes, for mixup and cutmix.
    """

    def __init__(
        self, samples: Seeded, options: "AugmentSection", seed: int, num_classes: int | None
    ) -> None:
        if (options.mixup or options.cutmix) and num_classes is None:
            raise ConfigError(
                "`data.name` must say the number of classes for data.augment.mixup and "
                "data.augment.cutmix, Splits(..., num_classes=...), got none"
            )
        self._samples, self._options, self._seed = samples, options, seed
        self._num_classes = num_classes

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: Key) -> Any:
        index, epoch = key
        sample = self._samples[key]
        if not epoch or isinstance(sample, ReadFailure):
            return sample
        try:
            image, target = self._changed(sample, key)
            if not (self._options.mixup or self._options.cutmix):
                return image[0], target
            numbers = torch.tensor([index])
            partner = int(partners(numbers, len(self), self._seed, epoch))
            other = self._samples[partner, epoch]
            if isinstance(other, ReadFailure):
                return other
            other_image, other_target = self._changed(other, (partner, epoch))
            if other_image.shape != image.shape:
                raise ConfigError(
                    "data.augment.mixup and data.augment.cutmix need inputs of one shape, got "
                    f"{tuple(image.shape[1:])} and {tuple(other_image.shape[1:])} of sample "
                    f"{partner}"
                )
            mixed = mix(
                (image, self._probabilities(target, image.dtype)),
                (other_image, self._probabilities(other_target, image.dtype)),
                numbers,
                self._options,
                self._seed,
                epoch,
            )
            return mixed[0][0], mixed[1][0]
        except Exception as error:
            return self._samples.failure(index, error)

    def _changed(self, sample: Any, key: Key) -> tuple[Tensor, Any]:
        """Crop, mirror and cut out: an input (1, ...), and its target."""
        options, (index, epoch) = self._options, key
        is_pair = isinstance(sample, list | tuple) and len(sample) == 2
        image = sample[0] if is_pair else None
        if not isinstance(image, Tensor) or not image.is_floating_point():
            raise ConfigError(
                "data.augment takes pairs of a floating tensor and a class, got "
                f"{_describe(sample)}. Other samples are changed in the data set itself."
            )
        if not (options.crop or options.flip or options.cutout or options.cutmix):
            return image[None], sample[1]
        if image.ndim != 3 or torch.as_tensor(sample[1]).ndim > 1:
            raise ConfigError(
                "data.augment takes images (C, H, W) with a class each, got "
                f"{_describe(sample)}. Other samples are changed in the data set itself."
            )
        return augment(image[None], torch.tensor([index]), options, self._seed, epoch), sample[1]

    def _probabilities(self, target: Any, dtype: torch.dtype) -> Tensor:
        """Turn a class, or probabilities (K,), into probabilities (1, K)."""
        assert self._num_classes is not None
        target = torch.as_tensor(target)
        if target.is_floating_point() and target.shape == (self._num_classes,):
            return target.to(dtype)[None]
        if target.ndim or target.is_floating_point() or not 0 <= target < self._num_classes:
            raise ConfigError(
                f"data.augment.mixup and data.augment.cutmix need a class from 0 to "
                f"{self._num_classes - 1}, or {self._num_classes} probabilities, got "
                f"{target.tolist() if target.ndim < 2 else tuple(target.shape)}"
            )
        return F.one_hot(target.long(), self._num_classes).to(dtype)[None]


def _describe(sample: Any) -> str:
    if isinstance(sample, Tensor):
        return f"{sample.dtype} {tuple(sample.shape)}"
    if isinstance(sample, list | tuple):
        return f"({', '.join(_describe(member) for member in sample[:4])})"
    return type(sample).__name__
