"""Random changes to training images, drawn for each sample from (seed, epoch, sample) alone.

The number for sample i of a stream is element i of a splitmix64 sequence (Steele, Lea and Flood
2014, "Fast splittable pseudorandom number generators", section 5) whose start is a hash of the
stream, seed and epoch:

    z = start + (i + 1) * 0x9e3779b97f4a7c15                                       all modulo 2**64
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9,  z = (z ^ z >> 27) * 0x94d049bb133111eb,  z ^ z >> 31

No state passes from one sample to the next, so the change of a sample does not depend on its batch,
order, shard, dtype or device.
"""

import hashlib
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from syncnorm.train.config.schema import AugmentSection


def augment(
    images: Tensor, indices: Tensor, options: "AugmentSection", seed: int, epoch: int
) -> Tensor:
    """Crop, mirror and cut out, in this order, as far as the options say.

    Args:
        images: (N, C, H, W), standardised, so that 0 is the mean.
        indices: (N,), int64, the samples' numbers in the training set.
        options: `crop`, `flip` and `cutout`.
        seed: the run's.
        epoch: the epoch; each has other changes.

    Returns:
        The changed images, or `images` itself if nothing is asked for.
    """
    indices = indices.to(images.device)
    height, width = images.shape[2:]
    if options.crop or options.flip:
        # Of each output pixel, the row (N, H) and the column (N, W) of the input that it shows.
        rows, columns = _coordinates(height, indices), _coordinates(width, indices)
        if options.flip:
            is_mirrored = draw(indices, 2, "flip", seed, epoch).bool()  # (N,)
            columns = torch.where(is_mirrored[:, None], columns.flip(1), columns)
        if options.crop:
            offsets = 2 * options.crop + 1
            rows = rows + draw(indices, offsets, "crop row", seed, epoch)[:, None]
            columns = columns + draw(indices, offsets, "crop column", seed, epoch)[:, None]
            images = F.pad(images, [options.crop] * 4)
        images = _gather(images, rows, columns)
    if options.cutout:
        row_centres = draw(indices, height, "cutout row", seed, epoch)
        column_centres = draw(indices, width, "cutout column", seed, epoch)
        rows = _covered(height, row_centres, options.cutout)  # (N, H), bool
        columns = _covered(width, column_centres, options.cutout)  # (N, W), bool
        # Their product (N, 1, H, W) is the square, in all channels.
        images = images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
    return images


def draw(indices: Tensor, below: int, stream: str, seed: int, epoch: int) -> Tensor:
    """Draw a uniform integer from 0 to `below` - 1 for each index.

    Args:
        indices: int64, any shape.
        below: at most 2**31; probabilities differ by up to `below` / 2**32 of their value.
        stream: name of the purpose; streams are independent of each other.
        seed: of the run.
        epoch: of the run.
    """
    digest = hashlib.sha256(f"{stream}/{seed}/{epoch}".encode()).digest()
    start = int.from_bytes(digest[:8], "big", signed=True)
    return (_shift_right(splitmix64(start, indices), 32) * below) >> 32


def splitmix64(start: int, indices: Tensor) -> Tensor:
    """Compute elements `indices` of the sequence from `start`: 64 random bits each, in an int64."""
    # Signed products wrap round to the same bits as unsigned ones.
    z = start + (indices + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits


def _shift_right(z: Tensor, count: int) -> Tensor:
    # torch copies the sign into the bits that come in.
    return (z >> count) & (2 ** (64 - count) - 1)


def _coordinates(size: int, indices: Tensor) -> Tensor:
    # (N, size): 0, 1, ... for each sample
    return torch.arange(size, device=indices.device).expand(len(indices), size)


def _gather(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute out[n, c, y, x] = images[n, c, rows[n, y], columns[n, x]]."""
    samples = torch.arange(images.shape[0], device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return images[samples, channels, rows[:, None, :, None], columns[:, None, None, :]]


def _covered(size: int, centres: Tensor, side: int) -> Tensor:
    """Mark the coordinates within `side` pixels round each centre: (N,) -> (N, size), bool."""
    first = (centres - side // 2)[:, None]
    coordinates = _coordinates(size, centres)
    return (coordinates >= first) & (coordinates < first + side)
