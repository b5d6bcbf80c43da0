"""The kernels that go over a tensor, in Triton's language. `geometry` says what the sizes mean.

A program goes through `per` tiles of one group of channels. Of a tile that is added a thread loads
64 bytes before it uses any (but for masks), and several programs of a multiprocessor keep the
memory busy. Copies to shared memory while the last tile is added would cost nearly twice the
instructions: by its data sheet an H200 has time for 14 while it reads a value in bfloat16.

Float32 sums are short: 32 values of a lane, then the lanes of a tile; from there on all is float64,
added in a fixed order. Coefficients are made in float64 and rounded once.
"""

# The language of the kernels is not Python: numbers are given for constexpr, and functions return
# tensors.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from syncnorm.maths.kernels.triton.channels import (
    INTEGERS,
    correction,
    float64_of,
    reciprocal,
    schedule_bound,
    statistic,
    store_gradients,
)
from syncnorm.maths.kernels.triton.tiles import (
    PLANES,
    ROWS,
    RUNS,
    add_vectors,
    by_channel,
    by_lane,
    cell,
    fold,
    following,
    kept,
    largest,
    offsets,
    place,
    program,
    quotient,
    values_before,
    weights,
)

# Vectors of 16 bytes that a thread has of a tile, of one tensor, and of each of two.
OF_ONE: tl.constexpr = tl.constexpr(4)
OF_TWO: tl.constexpr = tl.constexpr(2)
# Values of a lane that are added in the type of the arithmetic, those of vectors first.
SHORT: tl.constexpr = tl.constexpr(32)
# 2^17 times a distance, added to a float32 number and taken away again, leaves multiples of a 64th
# of the distance.
COARSE: tl.constexpr = tl.constexpr(131072.0)
# Where the bounds of r and d come from.
NO_BOUNDS: tl.constexpr = tl.constexpr(0)
GIVEN: tl.constexpr = tl.constexpr(1)

_INTEGERS = [
    *INTEGERS, "groups", "per", "tiles", "blocks", "outer", "limit", "length", "e1", "e2", "e3",
    *(t + s for t in "xywg" for s in "0123gl"),
]  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def moments(
    x, w, sums, parts, count, channels, splits,
    groups, per, tiles, blocks, outer, limit, length, e1, e2, e3,
    x0, x1, x2, x3, xg, xl, w0, w1, w2, w3, wg, wl,
    FORM: tl.constexpr, OUTER: tl.constexpr, UNIT: tl.constexpr,
    BN: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr,
    XF: tl.constexpr, WF: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    """Raw sums of a split into `parts`, or of all into `sums` where there is one split."""
    F: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    group, split, begin, end = program(groups, per, tiles, WIDE)
    # About a pivot near the mean, so that a large mean costs no digits of the variance: the mean of
    # the first rows, or of the first tile of which something counts.
    if w is None:
        # One vector of each thread is enough.
        FEW: tl.constexpr = (BN + OF_ONE - 1) // OF_ONE
        row, block = place(begin, blocks, FORM, BN)
        few, some, counts = cell(row, block, group, outer, limit, FORM, UNIT, FEW, BJ)
        near = offsets(few, some, group, length, e1, e2, e3, x0, x1, x2, x3, xg, xl,
                        FORM, OUTER, UNIT, BC, XF)  # fmt: skip
        v = tl.load(x + near, counts, other=0).to(F)
        there = tl.minimum(outer - row, FEW)
        if FORM == PLANES:
            there *= tl.minimum(limit * UNIT - block * BJ, BJ)
        pivot = quotient(fold(v, FORM), there.to(F))
    else:
        v = tl.zeros([BN, BJ], F)
        pivot = fold(v, FORM)
        weight = tl.sum(tl.sum(v, 1), 0)
        c = tl.zeros([BN, 1 if FORM == ROWS else BJ], F)
        t = begin
        row, block = place(begin, blocks, FORM, BN)
        while (t < end) & (weight == 0):
            o, lane, ok = cell(row, block, group, outer, limit, FORM, UNIT, BN, BJ)
            row, block = following(row, block, blocks, FORM, BN)
            at = offsets(o, lane, group, length, e1, e2, e3, x0, x1, x2, x3, xg, xl,
                          FORM, OUTER, UNIT, BC, XF)  # fmt: skip
            v = tl.load(x + at, ok, other=0).to(F)
            c, _ = weights(w, o, lane, ok, outer, length, e1, e2, e3, w0, w1, w2, w3, wl, F,
                            FORM, OUTER, UNIT, WF)  # fmt: skip
            pivot = fold(c * v, FORM)
            weight = tl.sum(tl.sum(c, 1), 0)
            t += 1
        if FORM == RUNS:
            # The weights were counted for each channel of the run.
            pivot = by_channel(pivot, length, FORM, BC, BJ) * BC
            pivot = tl.sum(by_lane(pivot, length, FORM, BC, BJ), 0)
        pivot = quotient(pivot, weight)
        counts = c != 0
    # With few digits, by the distance of the values: a mean of three integers has all digits, and
    # what is left of integers without it would be rounded, their own mean inexact.
    far = largest(tl.where(counts, v - pivot[None, :], 0.0), FORM) * COARSE
    coarse = ((pivot + far) - far).to(x.dtype.element_ty).to(F)
    pivot = tl.where(tl.abs(coarse) < float("inf"), coarse, pivot)
    pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0).to(x.dtype.element_ty).to(F)
    p = kept(pivot).to(tl.float64)
    first = tl.zeros_like(pivot).to(tl.float64)
    second = first
    if w is None:
        number = (
            values_before(end, blocks, outer, limit, FORM, UNIT, BN, BJ)
            - values_before(begin, blocks, outer, limit, FORM, UNIT, BN, BJ)
        ).to(tl.float64)
    elif FORM == RUNS:
        number = first
    else:
        number = tl.zeros([1], tl.float64)
    # What is not there is read as the pivot, and adds nothing.
    centre = pivot[None, :]
    other = centre.to(x.dtype.element_ty)
    VECTORS: tl.constexpr = OF_ONE if w is None else OF_TWO
    nothing = add_vectors(tl.zeros([BN, BJ], F), FORM, VECTORS)
    no_weight = tl.zeros([BN, 1 if FORM == ROWS else BJ], F)
    wrong = tl.zeros([BN, 1 if FORM == ROWS else BJ], tl.int32)
    row, block = place(begin, blocks, FORM, BN)
    for start in range(begin, end, SHORT // VECTORS):
        s1 = nothing
        s2 = nothing
        s0 = no_weight
        for _ in range(start, tl.minimum(start + SHORT // VECTORS, end)):
            o, lane, ok = cell(row, block, group, outer, limit, FORM, UNIT, BN, BJ)
            row, block = following(row, block, blocks, FORM, BN)
            at = offsets(o, lane, group, length, e1, e2, e3, x0, x1, x2, x3, xg, xl,
                          FORM, OUTER, UNIT, BC, XF)  # fmt: skip
            b = tl.load(x + at, ok, other=other).to(F) - centre
            wb = b
            if w is not None:
                c, is_wrong = weights(w, o, lane, ok, outer, length, e1, e2, e3,
                                       w0, w1, w2, w3, wl, F, FORM, OUTER, UNIT, WF)  # fmt: skip
                wb = c * b
                s0 += c
                wrong |= is_wrong.to(tl.int32)
            s1 += add_vectors(wb, FORM, VECTORS)
            s2 += add_vectors(wb * b, FORM, VECTORS)
        first += fold(s1, FORM).to(tl.float64)
        second += fold(s2, FORM).to(tl.float64)
        if w is not None:
            number += fold(s0, FORM).to(tl.float64)
    # In this order: the sum of squares is changed by the sum about the pivot.
    second += p * (2.0 * first + number * p)
    first += number * p
    channel = group * BC + tl.arange(0, BC)
    inside = channel < channels
    first = by_channel(first, length, FORM, BC, BJ)
    second = by_channel(second, length, FORM, BC, BJ)
    if IS_WHOLE:
        tl.store(sums + channel, first, inside)
        tl.store(sums + channels + channel, second, inside)
    else:
        # (2, splits, C), then the weights and faults of each split.
        tl.store(parts + split * channels + channel, first, inside)
        tl.store(parts + (splits + split) * channels + channel, second, inside)
    if w is None:
        if IS_WHOLE and group == 0:
            tl.store(sums + 2 * channels, count.to(tl.float64))
    elif group == 0:
        if FORM == RUNS:
            total = tl.sum(tl.where(tl.arange(0, BJ) < length, number, 0.0), 0)
        else:
            total = tl.sum(number, 0)
        has_fault = tl.max(tl.max(wrong, 1), 0)
        if IS_WHOLE:
            tl.store(sums + 2 * channels, tl.where(has_fault != 0, float("nan"), total))
        else:
            tl.store(parts + 2 * splits * channels + split, total)
            tl.store(parts + (2 * channels + 1) * splits + split, has_fault.to(tl.float64))


@triton.jit(do_not_specialize=_INTEGERS)
def normalize(
    x, y, batch, rows, weight, bias, running_mean, running_var, r_max, d_max, step,
    eps, r_end, d_end, warmup, r_steps, d_steps, channels,
    groups, per, tiles, blocks, outer, limit, length, e1, e2, e3,
    x0, x1, x2, x3, xg, xl, y0, y1, y2, y3, yg, yl,
    FORM: tl.constexpr, OUTER: tl.constexpr, UNIT: tl.constexpr,
    BN: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr,
    XF: tl.constexpr, YF: tl.constexpr, IS_RAW: tl.constexpr, BOUNDS: tl.constexpr,
):  # fmt: skip
    """(x - mean) * weight * r * invstd + bias + weight * d, and the rows of the statistic."""
    F: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    group, split, begin, end = program(groups, per, tiles, WIDE)
    channel = group * BC + tl.arange(0, BC)
    inside = channel < channels
    n = tl.load(batch + 2 * channels)
    mean, m2 = statistic(batch, n, channel, channels, inside, IS_RAW)
    var = m2 * reciprocal(n)
    # No value counts, or a single one: the output is the bias.
    invstd = tl.where(m2 == 0, tl.where(n <= 1, 0.0, 1.0), 1.0)
    invstd = tl.where(invstd == 0, 0.0, 1.0 / tl.sqrt(var + float64_of(eps)))
    scale = tl.zeros([BC], tl.float64) + 1.0
    if weight is not None:
        scale = tl.load(weight + channel, inside, other=0.0).to(tl.float64)
    shift = tl.zeros([BC], tl.float64)
    if bias is not None:
        shift = tl.load(bias + channel, inside, other=0.0).to(tl.float64)
    if BOUNDS != NO_BOUNDS:
        if BOUNDS == GIVEN:
            r_most = tl.load(r_max)
            d_most = tl.load(d_max)
        else:
            now = tl.load(step).to(tl.int64)
            r_most = schedule_bound(now, 1.0, float64_of(r_end), warmup, r_steps)
            d_most = schedule_bound(now, 0.0, float64_of(d_end), warmup, d_steps)
        before = tl.load(running_mean + channel, inside, other=0.0).to(tl.float64)
        spread = tl.load(running_var + channel, inside, other=1.0).to(tl.float64)
        r, d = correction(mean, var, n, before, spread, float64_of(eps), r_most, d_most)
        shift += scale * d
        scale = scale * r
        if split == 0:
            more = rows + 3 * channels + channel
            tl.store(more, r, inside)
            tl.store(more + channels, d, inside)
            tl.store(more + 2 * channels, before, inside)
            tl.store(more + 3 * channels, spread, inside)
            tl.store(more + 4 * channels, r_most + tl.zeros_like(r), inside)
            tl.store(more + 5 * channels, d_most + tl.zeros_like(r), inside)
    if split == 0:
        tl.store(rows + channel, mean, inside)
        tl.store(rows + channels + channel, m2, inside)
        tl.store(rows + 2 * channels + channel, invstd, inside)
    scale = scale * invstd
    centre = mean.to(F)
    # What the rounding of the mean leaves.
    shift += (centre.to(tl.float64) - mean) * scale
    centre = by_lane(centre, length, FORM, BC, BJ)
    factor = by_lane(scale.to(F), length, FORM, BC, BJ)
    term = by_lane(shift.to(F), length, FORM, BC, BJ)
    row, block = place(begin, blocks, FORM, BN)
    for _ in range(begin, end):
        o, lane, ok = cell(row, block, group, outer, limit, FORM, UNIT, BN, BJ)
        row, block = following(row, block, blocks, FORM, BN)
        at = offsets(o, lane, group, length, e1, e2, e3, x0, x1, x2, x3, xg, xl,
                      FORM, OUTER, UNIT, BC, XF)  # fmt: skip
        to = offsets(o, lane, group, length, e1, e2, e3, y0, y1, y2, y3, yg, yl,
                      FORM, OUTER, UNIT, BC, YF)  # fmt: skip
        v = tl.load(x + at, ok, other=0).to(F)
        tl.store(y + to, ((v - centre) * factor + term).to(y.dtype.element_ty), ok)


@triton.jit(do_not_specialize=_INTEGERS)
def backward_sums(
    g, x, rows, local, dweight, dbias, parts, channels, splits,
    groups, per, tiles, blocks, outer, limit, length, e1, e2, e3,
    x0, x1, x2, x3, xg, xl, g0, g1, g2, g3, gg, gl,
    FORM: tl.constexpr, OUTER: tl.constexpr, UNIT: tl.constexpr,
    BN: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr,
    XF: tl.constexpr, GF: tl.constexpr, IS_WHOLE: tl.constexpr, BOUNDS: tl.constexpr,
):  # fmt: skip
    """Sum g and sum g xhat of a split into `parts`, or of all where there is one split."""
    F: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    group, split, begin, end = program(groups, per, tiles, WIDE)
    channel = group * BC + tl.arange(0, BC)
    inside = channel < channels
    mean = tl.load(rows + channel, inside, other=0.0)
    rounded = mean.to(F)
    centre = by_lane(rounded, length, FORM, BC, BJ)
    s = tl.zeros([1 if FORM == PLANES else BJ], tl.float64)
    q = s
    nothing = add_vectors(tl.zeros([BN, BJ], F), FORM, OF_TWO)
    row, block = place(begin, blocks, FORM, BN)
    for start in range(begin, end, SHORT // OF_TWO):
        s1 = nothing
        s2 = nothing
        for _ in range(start, tl.minimum(start + SHORT // OF_TWO, end)):
            o, lane, ok = cell(row, block, group, outer, limit, FORM, UNIT, BN, BJ)
            row, block = following(row, block, blocks, FORM, BN)
            at = offsets(o, lane, group, length, e1, e2, e3, x0, x1, x2, x3, xg, xl,
                          FORM, OUTER, UNIT, BC, XF)  # fmt: skip
            of = offsets(o, lane, group, length, e1, e2, e3, g0, g1, g2, g3, gg, gl,
                          FORM, OUTER, UNIT, BC, GF)  # fmt: skip
            v = tl.load(x + at, ok, other=0).to(F)
            dy = tl.load(g + of, ok, other=0).to(F)
            s1 += add_vectors(dy, FORM, OF_TWO)
            s2 += add_vectors(dy * (v - centre), FORM, OF_TWO)
        s += fold(s1, FORM).to(tl.float64)
        q += fold(s2, FORM).to(tl.float64)
    s = by_channel(s, length, FORM, BC, BJ)
    q = by_channel(q, length, FORM, BC, BJ)
    # About the mean itself, not its rounding.
    q = (q + (rounded.to(tl.float64) - mean) * s) * tl.load(
        rows + 2 * channels + channel, inside, other=0.0
    )
    if IS_WHOLE:
        store_gradients(s, q, rows, local, dweight, dbias, channel, channels, inside, BOUNDS)
    else:
        tl.store(parts + split * channels + channel, s, inside)
        tl.store(parts + (splits + split) * channels + channel, q, inside)


@triton.jit(do_not_specialize=_INTEGERS)
def backward_input(
    g, x, dx, w, rows, weight, totals, n, channels,
    groups, per, tiles, blocks, outer, limit, length, e1, e2, e3,
    x0, x1, x2, x3, xg, xl, g0, g1, g2, g3, gg, gl, y0, y1, y2, y3, yg, yl,
    w0, w1, w2, w3, wg, wl,
    FORM: tl.constexpr, OUTER: tl.constexpr, UNIT: tl.constexpr,
    BN: tl.constexpr, BJ: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr,
    XF: tl.constexpr, GF: tl.constexpr, YF: tl.constexpr, WF: tl.constexpr, BOUNDS: tl.constexpr,
):  # fmt: skip
    """weight * r * invstd * (g - w * (A + xhat * B))."""
    F: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    group, _split, begin, end = program(groups, per, tiles, WIDE)
    channel = group * BC + tl.arange(0, BC)
    inside = channel < channels
    mean = tl.load(rows + channel, inside, other=0.0)
    invstd = tl.load(rows + 2 * channels + channel, inside, other=0.0)
    scale = invstd
    if weight is not None:
        scale = tl.load(weight + channel, inside, other=0.0).to(tl.float64)
        if BOUNDS:
            scale = scale * tl.load(rows + 3 * channels + channel, inside, other=0.0)
        scale = scale * invstd
    elif BOUNDS:
        scale = tl.load(rows + 3 * channels + channel, inside, other=0.0) * invstd
    a = tl.load(totals + channel, inside, other=0.0)
    b = tl.load(totals + channels + channel, inside, other=0.0)
    if n is not None:
        inverse = reciprocal(tl.load(n))
        a = a * inverse
        b = b * inverse
    b = b * invstd
    centre = mean.to(F)
    a += (centre.to(tl.float64) - mean) * b
    centre = by_lane(centre, length, FORM, BC, BJ)
    factor = by_lane(scale.to(F), length, FORM, BC, BJ)
    constant = by_lane(a.to(F), length, FORM, BC, BJ)
    slope = by_lane(b.to(F), length, FORM, BC, BJ)
    row, block = place(begin, blocks, FORM, BN)
    for _ in range(begin, end):
        o, lane, ok = cell(row, block, group, outer, limit, FORM, UNIT, BN, BJ)
        row, block = following(row, block, blocks, FORM, BN)
        at = offsets(o, lane, group, length, e1, e2, e3, x0, x1, x2, x3, xg, xl,
                      FORM, OUTER, UNIT, BC, XF)  # fmt: skip
        of = offsets(o, lane, group, length, e1, e2, e3, g0, g1, g2, g3, gg, gl,
                      FORM, OUTER, UNIT, BC, GF)  # fmt: skip
        to = offsets(o, lane, group, length, e1, e2, e3, y0, y1, y2, y3, yg, yl,
                      FORM, OUTER, UNIT, BC, YF)  # fmt: skip
        v = tl.load(x + at, ok, other=0).to(F)
        dy = tl.load(g + of, ok, other=0).to(F)
        through = constant + slope * (v - centre)
        if w is not None:
            c, _ = weights(w, o, lane, ok, outer, length, e1, e2, e3, w0, w1, w2, w3, wl, F,
                            FORM, OUTER, UNIT, WF)  # fmt: skip
            through = through * c
        tl.store(dx + to, (factor * (dy - through)).to(dx.dtype.element_ty), ok)
