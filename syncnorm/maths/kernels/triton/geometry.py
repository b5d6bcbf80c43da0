"""The cut of an (N, C, *S) tensor into tiles for the programs of a kernel, whatever its strides.

A tile is (outer, lanes). The lanes follow what is contiguous in x:

    planes  along the positions of one channel                   (N, C, L) with long planes
    runs    along several channels and all of their positions    (N, C, L) with short planes
    rows    along the channels                                   channels last, plain (N, C)

`outer` counts everything else. Dimensions that follow each other in all tensors are one; up to four
remain, whose strides the kernel is given.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

PLANES, RUNS, ROWS = 0, 1, 2

_WARPS = 4
# Bytes that lanes should have side by side.
_RUN_BYTES = 256
_RUN_ELEMENTS = 1024
_RUN_CHANNELS = 32
_VECTOR_BYTES = 16
_MOST_DIMENSIONS = 4

Strides = tuple[int, ...]


class Work(NamedTuple):
    """How a kernel likes to be cut."""

    tile: int
    """Elements of a tile for 4 warps, at most."""
    tile_bytes: int
    """Bytes of such a tile of one tensor, at most."""
    programs: tuple[int, int, int]
    """Programs of planes, runs and rows that a multiprocessor is to have at once."""
    least: int
    """Elements of a program, where its channels have so many."""


# A thread has four vectors of 16 bytes of a tile.
SUMS_OF_ONE = Work(tile=4096, tile_bytes=8192, programs=(6, 4, 5), least=12288)
SUMS_OF_TWO = Work(tile=2048, tile_bytes=4096, programs=(6, 4, 5), least=12288)
SUMS_OF_MASKED = Work(tile=2048, tile_bytes=4096, programs=(4, 2, 5), least=12288)
ELEMENTWISE = Work(tile=2048, tile_bytes=8192, programs=(8, 8, 8), least=4096)


class Plan(NamedTuple):
    """What a kernel is launched with."""

    programs: int
    splits: int
    """Programs that share the channels of a group."""
    sizes: tuple[int, ...]
    """groups, per, tiles, blocks, outer, limit, length, e1, e2, e3 of the kernels."""
    strides: tuple[Strides, ...]
    """Strides of each tensor: four of the outer dimensions, of a group, of a lane."""
    shape: tuple[int, ...]
    """FORM, OUTER, UNIT, BN, BJ, BC, WIDE of the kernels."""
    flat: tuple[bool, ...]
    """True for each tensor whose lanes are contiguous: its strides are in UNITs."""
    warps: int


class _Dims(NamedTuple):
    sizes: tuple[int, ...]
    strides: tuple[Strides, ...]
    """Strides of each tensor, by dimension."""


def _collapse(shape: Strides, strides: tuple[Strides, ...]) -> _Dims:
    """All dimensions but the channels, slowest first in the first tensor, joined where possible."""
    dims = [i for i, size in enumerate(shape) if i != 1 and size > 1]
    dims.sort(key=lambda i: -strides[0][i])
    sizes: list[int] = []
    joined: list[list[int]] = []
    for i in dims:
        steps = [s[i] for s in strides]
        if sizes and all(last == step * shape[i] for last, step in zip(joined[-1], steps)):
            sizes[-1] *= shape[i]
            joined[-1] = steps
        else:
            sizes.append(shape[i])
            joined.append(steps)
    return _Dims(tuple(sizes), tuple(zip(*joined)) if joined else ((),) * len(strides))


def _power(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def _lanes(length: int, least: int, most: int) -> int:
    """The widest block that wastes no more than 1/16 of its lanes, or else the least."""
    widest = min(most, _power(length))
    best, waste = widest, math.inf
    lanes = widest
    while lanes >= min(least, widest):
        idle = -(-length // lanes) * lanes / length - 1
        if idle <= 1 / 16:
            return lanes
        if idle < waste:
            best, waste = lanes, idle
        lanes //= 2
    return best


def _run_channels(channels: int, length: int, itemsize: int) -> int:
    """Channels of a run: as few as fill the lanes and keep the runs aligned."""
    count = 1
    while (
        count < _RUN_CHANNELS
        and channels % (2 * count) == 0
        and 2 * count * length <= _RUN_ELEMENTS
        and (
            count * length * itemsize < _RUN_BYTES or count * length * itemsize % _VECTOR_BYTES != 0
        )
    ):
        count *= 2
    size = length * itemsize
    return 1 if size >= _RUN_BYTES and count * size % _VECTOR_BYTES != 0 else count


def _splits(groups: int, programs: int, most: int) -> int:
    """Programs for each group of channels: such that the last wave of programs is nearly full."""
    least = max(1, programs // groups)

    def fullness(splits: int) -> float:
        return groups * splits / (-(-groups * splits // programs) * programs)

    return max(1, min(max(range(least, least + 4), key=fullness), most))


@functools.lru_cache(maxsize=4096)
def plan(
    shape: Strides,
    strides: tuple[Strides, ...],
    mask: Strides | None,
    itemsize: int,
    work: Work,
    processors: int,
) -> Plan | None:
    """The cut for tensors of one shape; None if more than four dimensions remain.

    Args:
        shape: (N, C, *S), with no 0.
        strides: of each tensor, x first.
        mask: the strides of a mask (N, 1, *S), or None.
        itemsize: of x.
        work: how the kernel likes it.
        processors: multiprocessors of the device.
    """
    channels = shape[1]
    given = strides if mask is None else (*strides, mask)
    sizes, steps = _collapse(shape, given)
    if len(sizes) > _MOST_DIMENSIONS:
        return None
    across = [s[1] for s in strides]
    inner = steps[0][-1] if sizes else 0
    is_rows = channels > 1 and (not sizes or (inner != 1 and across[0] < inner))
    length = 1
    if not is_rows and sizes:
        length, sizes = sizes[-1], sizes[:-1]
        along, steps = [s[-1] for s in steps], [s[:-1] for s in steps]
    else:
        along = [1] * len(given)
    outer = math.prod(sizes)
    tile = min(work.tile, work.tile_bytes // itemsize)
    of_run = 1
    if not is_rows and outer > 1 and along[0] == 1 and across[0] == length:
        of_run = _run_channels(channels, length, itemsize)
    if is_rows:
        along = [*across, *along[len(across) :]]
        form, bj = ROWS, _lanes(channels, 32, _RUN_BYTES // itemsize)
        bc, blocks = bj, 1
        flat = [c == 1 for c in across]
    elif of_run > 1:
        form, bc, bj, blocks = RUNS, of_run, _power(of_run * length), 1
        flat = [a == 1 and c == length for a, c in zip(along, across)]
    else:
        form, bc = PLANES, 1
        bj = _lanes(length, max(64, tile // _power(outer)), tile)
        blocks = -(-length // bj)
        flat = [a == 1 for a in along[: len(strides)]]
    if mask is not None:
        flat.append(form == PLANES and along[-1] == 1)
    bn = max(1, min(tile // bj, _power(outer)))
    limit = {PLANES: length, RUNS: bc * length, ROWS: channels}[form]
    # A stride from one group of channels to the next; that of a mask is nothing.
    group = [
        (limit if form == RUNS else bc * c) if is_flat else c for is_flat, c in zip(flat, across)
    ]
    group += [0] * (len(given) - len(strides))
    moves = [limit]
    for is_flat, g, s in zip(flat, group, steps):
        moves += [g, *s] if is_flat else []
    # A kernel computes stride // unit * unit, in 32 bits where stride // unit has so few.
    unit = 1 if max(moves) >= 2**31 else math.gcd(_VECTOR_BYTES, *moves)
    units = [unit if is_flat else 1 for is_flat in flat]
    tiles = -(-outer // bn) * blocks
    groups = -(-channels // bc)
    programs = work.programs[form] * processors
    per = -(-tiles // _splits(groups, programs, tiles * bn * bj // work.least))
    splits = -(-tiles // per)
    farthest = max(
        math.prod(shape), *(sum(step * (n - 1) for step, n in zip(s, shape)) for s in given)
    )
    padded = (1,) * (4 - len(sizes)) + tuple(sizes)
    return Plan(
        programs=groups * splits,
        splits=splits,
        sizes=(groups, per, tiles, blocks, outer, limit // unit, length, *padded[1:]),
        strides=tuple(
            ((0,) * (4 - len(s)) + tuple(i // u for i in s)) + (g // u, a)
            for s, g, a, u in zip(steps, group, along, units)
        ),
        shape=(form, max(1, len(sizes)), unit, bn, bj, bc, farthest >= 2**31),
        flat=tuple(flat),
        warps=max(1, min(_WARPS, bn * bj * _WARPS // tile)),
    )
