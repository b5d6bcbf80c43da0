"""Two dense views of an (N, C, *S) tensor, and its cache-sized blocks.

`rows`: (N * prod(S), C) where channels vary fastest (channels last, plain (N, C), a transposed (N,
L, C)). `planes`: (N, C, prod(S)) where the tensor is contiguous. Anything else is copied into
`planes` first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# A block's operands should stay in the second-level cache, and long float32 sums lose digits;
# smaller blocks cost more calls. Chosen by benchmarks/layer_cpu.py.
BLOCK_ELEMENTS = 131_072
BLOCK_ROWS = 4_096
# Longer runs of one channel are summed in pieces of this length.
PLANE = 4_096


def is_rows(x: Tensor) -> bool:
    """True if channels vary fastest, so that a (rows, C) view exists."""
    if x.shape[1] == 1:
        return False
    if x.ndim == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.stride(1) == 1 and x.movedim(1, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """x itself if one of the two views exists, else a contiguous copy."""
    return x if x.is_contiguous() or is_rows(x) else x.contiguous()


def flat(x: Tensor) -> Tensor:
    """The (rows, C) or (N, C, L) view of x, of a contiguous copy where x is not dense."""
    if is_rows(x):
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    return x.contiguous().reshape(x.shape[0], x.shape[1], -1)


def like(t: Tensor, x: Tensor) -> Tensor:
    """t (the shape of x) in the memory layout of the dense tensor x; copied only if it differs."""
    if is_rows(x):
        return t if is_rows(t) else torch.empty_like(x, dtype=t.dtype).copy_(t)
    return t.contiguous()


def view(t: Tensor, *, rows: bool) -> Tensor:
    """The (rows, C) or (N, C, L) view of a dense tensor; a mask has one channel."""
    if rows:
        return t.movedim(1, -1).reshape(-1, t.shape[1])
    return t.reshape(t.shape[0], t.shape[1], -1)


class Cut(NamedTuple):
    """A cut of dense views of one shape into contiguous blocks.

    A block is a whole number of rows or samples, or some channels of one sample, or (k, 1, PLANE)
    pieces of one channel of one sample.
    """

    step: int
    """Rows or samples in a block."""
    group: int
    """Channels in a block."""
    channels: int
    lengths: list[int] | None
    """Cuts along one channel; None: not cut."""

    @classmethod
    def of(cls, v: Tensor) -> Cut:
        """The cut of a (rows, C) or (N, C, L) view."""
        channels = v.shape[1]
        if v.ndim == 2:
            return cls(
                max(1, min(BLOCK_ROWS, BLOCK_ELEMENTS // channels)), channels, channels, None
            )
        length = v.shape[2]
        if channels * length <= BLOCK_ELEMENTS:
            return cls(BLOCK_ELEMENTS // (channels * length), channels, channels, None)
        if length <= 8 * PLANE:
            return cls(1, BLOCK_ELEMENTS // length, channels, None)
        lengths = [BLOCK_ELEMENTS] * (length // BLOCK_ELEMENTS)
        rest = length % BLOCK_ELEMENTS
        lengths += [n for n in (rest - rest % PLANE, rest % PLANE) if n]
        return cls(1, 1, channels, lengths)

    def blocks(self, v: Tensor) -> list[Tensor]:
        """The blocks of a view of this shape, or of its mask, which has one channel."""
        if v.shape[0] <= self.step and self.group == self.channels and self.lengths is None:
            return [v]
        parts = list(v.split(self.step))
        if self.group < self.channels:
            groups = -(-self.channels // self.group)
            is_mask = v.shape[1] == 1
            parts = [
                p for s in parts for p in ([s] * groups if is_mask else s.split(self.group, dim=1))
            ]
        if self.lengths is not None:
            parts = [_fold(p) for c in parts for p in c.split(self.lengths, dim=2)]
        return parts

    def coefficients(self, c: Tensor, blocks: int) -> list[Tensor]:
        """The (C,) coefficients that belong to each of so many blocks."""
        if self.group == self.channels and self.lengths is None:
            return [c] * blocks
        parts = [p for p in c.split(self.group) for _ in self.lengths or [0]]
        return parts * (blocks // len(parts))

    def columns(self, cs: list[Tensor], blocks: int) -> Iterable[Sequence[Tensor]]:
        """The coefficients of each of so many blocks, out of several (C,) ones."""
        if blocks == 1:
            return [cs]
        return zip(*(self.coefficients(c, blocks) for c in cs), strict=True)

    def total(self, sums: list[Tensor]) -> Tensor:
        """Sums of the blocks, added up per channel in float64: shape (C,)."""
        if len(sums) == 1:
            return sums[0].double()
        pieces = len(self.lengths) if self.lengths is not None else 1
        # (blocks of rows or samples, C, pieces of a channel)
        return torch.cat(sums).view(-1, self.channels, pieces).sum((0, 2), dtype=torch.float64)


def _fold(block: Tensor) -> Tensor:
    """(1, 1, L) as (L / PLANE, 1, PLANE), so that its sums are taken in two levels."""
    return block.reshape(-1, 1, PLANE) if block.shape[2] % PLANE == 0 else block
