"""What the kernels share: tiles of a tensor, their sums, and numbers of channels for their lanes.

In Triton's language. `geometry` says what the sizes and strides mean.
"""

# The language of the kernels is not Python: numbers are given for constexpr, and functions return
# tensors.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import triton
import triton.language as tl

PLANES: tl.constexpr = tl.constexpr(0)
RUNS: tl.constexpr = tl.constexpr(1)
ROWS: tl.constexpr = tl.constexpr(2)


@triton.jit
def program(groups, per, tiles, WIDE: tl.constexpr):
    """The group of channels, the split, the first tile and the one after the last."""
    i = tl.program_id(0)
    if WIDE:
        i = i.to(tl.int64)
    # Neighbours in memory are worked on at the same time.
    group = i % groups
    split = i // groups
    begin = split * per
    return group, split, begin, tl.minimum(begin + per, tiles)


@triton.jit
def place(t, blocks, FORM: tl.constexpr, BN: tl.constexpr):
    """The first row of a tile, and its block of lanes."""
    if FORM == PLANES:
        row = t // blocks * BN
        block = t % blocks
    else:
        row = t * BN
        block = t * 0
    return row, block


@triton.jit
def following(row, block, blocks, FORM: tl.constexpr, BN: tl.constexpr):
    """The place of the next tile, without a division."""
    if FORM == PLANES:
        block += 1
        row = tl.where(block == blocks, row + BN, row)
        block = tl.where(block == blocks, 0, block)
    else:
        row += BN
    return row, block


@triton.jit
def cell(
    row, block, group, outer, limit,
    FORM: tl.constexpr, UNIT: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """The outer indices (BN, 1) and lanes (1, BJ) of a tile, and where it is within the tensor."""
    # In as many bits as the group: a lane's stride may lead beyond 32 of them.
    o = row + tl.arange(0, BN)[:, None].to(group.dtype)
    lane = tl.arange(0, BJ)[None, :].to(group.dtype)
    end = limit * UNIT
    if FORM == ROWS:
        # The channels that are left: of the last group they may be fewer than its lanes.
        end -= group * BJ
    if FORM == PLANES:
        lane += block * BJ
    return o, lane, (o < outer) & (lane < end)


@triton.jit
def across(
    o, e1, e2, e3, s0, s1, s2, s3, OUTER: tl.constexpr, SCALE: tl.constexpr
):  # fmt: skip
    """The offsets of outer indices: those of the last OUTER of four dimensions."""
    if OUTER == 1:
        offset = o * (s3 * SCALE)
    elif OUTER == 2:
        offset = o // e3 * (s2 * SCALE) + o % e3 * (s3 * SCALE)
    else:
        q = o // e3
        offset = q % e2 * (s2 * SCALE) + o % e3 * (s3 * SCALE)
        if OUTER == 3:
            offset += q // e2 * (s1 * SCALE)
        else:
            q = q // e2
            offset += q // e1 * (s0 * SCALE) + q % e1 * (s1 * SCALE)
    return offset


@triton.jit
def offsets(
    o, lane, group, length, e1, e2, e3, s0, s1, s2, s3, sg, sl,
    FORM: tl.constexpr, OUTER: tl.constexpr, UNIT: tl.constexpr, BC: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """The offsets of a tile, (BN, BJ)."""
    if FLAT:
        offset = across(o, e1, e2, e3, s0, s1, s2, s3, OUTER, UNIT) + (group * (sg * UNIT) + lane)
    else:
        if FORM == RUNS:
            along = lane // length * sg + lane % length * sl
        else:
            along = lane * sl
        offset = across(o, e1, e2, e3, s0, s1, s2, s3, OUTER, 1) + (group * BC * sg + along)
    return offset


@triton.jit
def weights(
    w, o, lane, ok, outer, length, e1, e2, e3, s0, s1, s2, s3, sl, F: tl.constexpr,
    FORM: tl.constexpr, OUTER: tl.constexpr, UNIT: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """The weights of a tile, 0 for what is none, and where that is; (BN, 1) for rows."""
    if FORM == ROWS:
        inside = o < outer
        offset = across(o, e1, e2, e3, s0, s1, s2, s3, OUTER, 1)
    else:
        inside = ok
        offset = offsets(
            o, lane, 0, length, e1, e2, e3, s0, s1, s2, s3, 0, sl, FORM, OUTER, UNIT, 1, FLAT
        )
    given = tl.load(w + offset, inside, other=0)
    is_valid = (given >= 0) & (given < float("inf"))
    return tl.where(is_valid, given, 0).to(F), is_valid == 0


@triton.jit
def add_vectors(v, FORM: tl.constexpr, VECTORS: tl.constexpr):
    """A tile of which each thread has VECTORS vectors, with those added up, in the thread."""
    BN: tl.constexpr = v.shape[0]
    BJ: tl.constexpr = v.shape[1]
    DOWN: tl.constexpr = VECTORS if BN >= VECTORS else BN
    ALONG: tl.constexpr = VECTORS // DOWN
    v = tl.sum(tl.reshape(v, [DOWN, BN // DOWN, BJ]), 0)
    if FORM == PLANES and ALONG > 1 and BJ >= ALONG:
        v = tl.sum(tl.reshape(v, [BN // DOWN, ALONG, BJ // ALONG]), 1)
    return v


@triton.jit
def fold(acc, FORM: tl.constexpr):
    """The sum of a tile for each lane, (BJ,); for planes of the whole, (1,)."""
    if FORM == PLANES:
        total = tl.sum(tl.sum(acc, 1), 0, keep_dims=True)
    else:
        total = kept(tl.sum(acc, 0))
    return total


@triton.jit
def kept(v):
    """Numbers of lanes of which a thread keeps one: else it would have those of its 8 lanes."""
    if v.shape[0] > 1:
        v = tl.gather(v, tl.arange(0, v.shape[0]), 0)
    return v


@triton.jit
def largest(v, FORM: tl.constexpr):
    """The largest absolute value of a tile for each lane, (BJ,); for planes of the whole, (1,)."""
    if FORM == PLANES:
        most = tl.max(tl.max(tl.abs(v), 1), 0, keep_dims=True)
    else:
        most = tl.max(tl.abs(v), 0)
    return most


@triton.jit
def quotient(a, b):
    """a / b, rounded once. Of float32 a GPU's plain division is not, and integers lose their mean."""
    if a.dtype == tl.float32:
        q = tl.div_rn(a, b)
    else:
        q = a / b
    return q


@triton.jit
def by_channel(
    v, length, FORM: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr
):  # fmt: skip
    """Sums of lanes as sums of channels, (BC,)."""
    if FORM == RUNS:
        channel = tl.arange(0, BJ) // length
        each = tl.arange(0, BC)
        total = tl.zeros([BC], v.dtype)
        for c in range(BC):
            total = tl.where(each == c, tl.sum(tl.where(channel == c, v, 0.0), 0), total)
    else:
        total = v
    return total


@triton.jit
def by_lane(
    v, length, FORM: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr
):  # fmt: skip
    """Numbers of channels (BC,) for each lane, (1, BJ); (1, 1) for planes."""
    if FORM == RUNS:
        v = tl.gather(v, tl.minimum(tl.arange(0, BJ) // length, BC - 1), 0)
    elif FORM == ROWS and BC < 128:
        # They are computed once, too: else 16 threads would compute the same 8.
        v = kept(v)
    return v[None, :]


@triton.jit
def values_before(
    t, blocks, outer, limit,
    FORM: tl.constexpr, UNIT: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Number of values of a lane, or of a plane, in the tiles before one."""
    rows = tl.minimum(t // blocks * BN, outer)
    if FORM == PLANES:
        length = limit * UNIT
        more = tl.minimum((t // blocks + 1) * BN, outer) - rows
        rows = rows * length + more * tl.minimum(t % blocks * BJ, length)
    return rows
