"""The part of a layer that is per channel, in Triton's language; all in float64.

The rules are those of `maths.moments` and `maths.renorm`.
"""

# The language of the kernels is not Python: numbers are given for constexpr, and functions return
# tensors.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import triton
import triton.language as tl

# Integers that would otherwise be told apart as 1, as multiples of 16, and as others.
INTEGERS = [
    "channels", "count", "splits", "max_drift", "max_ratio", "rate", "eps", "momentum", "warmup",
    "r_end", "d_end", "r_steps", "d_steps", "identity", "size",
]  # fmt: skip


# `maths.precision.rounding` of a float64.
ROUNDING: tl.constexpr = tl.constexpr(2.0**-48)


@triton.jit
def float64_of(bits):
    """A float64 from its bits: Triton passes a Python number as a float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def rounded(v, like: tl.constexpr):
    """A float64 in a given type; in a half type by way of float32, as torch rounds it."""
    if like != tl.float64:
        v = v.to(tl.float32)
    return v.to(like)


@triton.jit
def reciprocal(n):
    """1 / n, and 0 where n = 0."""
    return tl.where(n == 0, 0.0, 1.0 / n)


@triton.jit
def statistic(batch, n, channel, channels, inside, IS_RAW: tl.constexpr):
    """Mean and m2 of some channels."""
    mean = tl.load(batch + channel, inside, other=0.0)
    m2 = tl.load(batch + channels + channel, inside, other=0.0)
    if IS_RAW:
        total = mean
        mean = total * reciprocal(n)
        rest = m2 - total * mean
        m2 = tl.where(rest <= tl.where(n <= 1, m2 * ROUNDING, 0.0), 0.0, rest)
    return mean, m2


@triton.jit
def schedule_bound(step, start, end, warmup, end_step):
    """The value of a ramp of `maths.renorm.RenormSchedule` at a step."""
    length = (end_step - warmup).to(tl.float64)
    progress = (step - warmup).to(tl.float64) / tl.where(length == 0, 1.0, length)
    progress = tl.minimum(tl.maximum(progress, 0.0), 1.0)
    ramp = tl.where(length == 0, start, tl.minimum(start + (end - start) * progress, end))
    return tl.where(step >= end_step, end, ramp)


@triton.jit
def clip(v, low, high):
    """v within bounds; NaN stays NaN."""
    v = tl.where(v < low, low, v)
    return tl.where(v > high, high, v)


@triton.jit
def correction(
    mean, var, n, centre, spread, eps, r_max, d_max
):  # fmt: skip
    """r and d of `maths.renorm.correction`, towards a mean and a variance."""
    sigma = tl.sqrt(spread + eps)
    r = clip(tl.sqrt(var + eps) / sigma, 1.0 / r_max, r_max)
    d = clip((mean - centre) / sigma, -d_max, d_max)
    return tl.where(n == 0, 1.0, r), tl.where(n == 0, 0.0, d)


@triton.jit
def splits_sum(
    parts, first, splits, step, inside, BS: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """The sum over the splits for BC numbers from `first` on, in a fixed order."""
    split = tl.arange(0, BS)[:, None]
    acc = tl.zeros([BS, BC], tl.float64)
    for start in range(0, splits, BS):
        at = (start + split) * step + first[None, :]
        acc += tl.load(parts + at, (start + split < splits) & inside[None, :], other=0.0)
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=INTEGERS)
def add_moments(
    parts, sums, count, channels, splits,
    IS_WEIGHTED: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = channel < channels
    squares = parts + splits * channels
    tl.store(sums + channel, splits_sum(parts, channel, splits, channels, inside, BS, BC), inside)
    total = splits_sum(squares, channel, splits, channels, inside, BS, BC)
    tl.store(sums + channels + channel, total, inside)
    if tl.program_id(0) == 0:
        if not IS_WEIGHTED:
            tl.store(sums + 2 * channels, count.to(tl.float64))
        else:
            only = tl.arange(0, 1)
            rest = parts + 2 * splits * channels
            n = splits_sum(rest, only, splits, 1, only == 0, BS, 1)
            wrong = splits_sum(rest + splits, only, splits, 1, only == 0, BS, 1)
            tl.store(sums + 2 * channels + only, tl.where(wrong > 0, float("nan"), n))


@triton.jit
def store_gradients(
    s, q, rows, local, dweight, dbias, channel, channels, inside, BOUNDS: tl.constexpr
):  # fmt: skip
    """Store sum g and sum g xhat, and the gradients of weight and bias."""
    tl.store(local + channel, s, inside)
    tl.store(local + channels + channel, q, inside)
    if dbias is not None:
        tl.store(dbias + channel, rounded(s, dbias.dtype.element_ty), inside)
    if dweight is not None:
        if BOUNDS:
            r = tl.load(rows + 3 * channels + channel, inside, other=0.0)
            d = tl.load(rows + 4 * channels + channel, inside, other=0.0)
            q = r * q + d * s
        tl.store(dweight + channel, rounded(q, dweight.dtype.element_ty), inside)


@triton.jit(do_not_specialize=INTEGERS)
def add_gradients(
    parts, rows, local, dweight, dbias, channels, splits,
    BOUNDS: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = channel < channels
    s = splits_sum(parts, channel, splits, channels, inside, BS, BC)
    q = splits_sum(parts + splits * channels, channel, splits, channels, inside, BS, BC)
    store_gradients(s, q, rows, local, dweight, dbias, channel, channels, inside, BOUNDS)


@triton.jit
def lerp(a, b, factor):
    """a + factor * (b - a), and b itself where the factor is 1."""
    return tl.where(factor < 0.5, a + factor * (b - a), b - (b - a) * (1.0 - factor))


@triton.jit(do_not_specialize=INTEGERS)
def update_running(
    running_mean, running_var, counter, batch, eps, momentum, channels,
    IS_RAW: tl.constexpr, IS_STD: tl.constexpr, IS_CUMULATIVE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Count the batch and have the running statistics follow it.

    The first program alone reads and writes the counter: a cumulative average, whose weight comes
    from the counter, has one program.
    """
    n = tl.load(batch + 2 * channels)
    factor = float64_of(momentum)
    if counter is not None:
        is_first = tl.program_id(0) == 0
        counted = tl.load(counter, is_first, other=0) + (n > 0).to(counter.dtype.element_ty)
        if IS_CUMULATIVE:
            factor = 1.0 / tl.maximum(counted.to(tl.float64), 1.0)
        # All threads have read it.
        tl.debug_barrier()
        tl.store(counter, counted, is_first)
    step = tl.num_programs(0) * BC
    for start in range(tl.program_id(0) * BC, channels, step):
        channel = start + tl.arange(0, BC)
        inside = channel < channels
        mean, m2 = statistic(batch, n, channel, channels, inside, IS_RAW)
        old = tl.load(running_mean + channel, inside, other=0.0)
        new = rounded(lerp(old.to(tl.float64), mean, factor), old.dtype)
        tl.store(running_mean + channel, tl.where(n > 0, new, old), inside)
        old = tl.load(running_var + channel, inside, other=0.0)
        wide = old.to(tl.float64)
        if IS_STD:
            sigma = tl.sqrt(wide + float64_of(eps))
            sigma += factor * (tl.sqrt(m2 * reciprocal(n) + float64_of(eps)) - sigma)
            var = sigma * sigma - float64_of(eps)
            var = tl.where(var < 0, 0.0, var)
        else:
            var = lerp(wide, m2 * reciprocal(n - 1.0), factor)
        tl.store(running_var + channel, tl.where(n > 1, rounded(var, old.dtype), old), inside)


@triton.jit
def is_finite(v):
    """True where v is neither infinite nor NaN."""
    return tl.abs(v) < float("inf")


@triton.jit(do_not_specialize=INTEGERS)
def follow_moments(
    batch, mean, var, updates, waits, eps, max_drift, max_ratio, rate, channels,
    IS_RAW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Move the averages of moments, and decide whether the layer waits; in one program.

    The rule is that of `maths.lagged.has_drifted`, without roots and logarithms.
    """
    n = tl.load(batch + 2 * channels)
    small = float64_of(eps)
    farthest, most = float64_of(max_drift) * float64_of(max_drift), float64_of(max_ratio)
    wrong = tl.zeros([BC], tl.int32)
    drifted = tl.zeros([BC], tl.int32)
    for start in range(0, channels, BC):
        channel = start + tl.arange(0, BC)
        inside = channel < channels
        new, m2 = statistic(batch, n, channel, channels, inside, IS_RAW)
        wrong |= tl.where(is_finite(new), tl.where(is_finite(m2), 0, 1), 1)
        old = tl.load(mean + channel, inside, other=0.0)
        before = tl.load(var + channel, inside, other=0.0) + small
        now = m2 * reciprocal(n) + small
        distance = new - old
        drifted |= (inside & (distance * distance > before * farthest)).to(tl.int32)
        drifted |= (inside & (now > before * most)).to(tl.int32)
        drifted |= (inside & (before > now * most)).to(tl.int32)
    has_fault = tl.max(wrong, 0)
    number = tl.load(updates)
    weight = tl.where(number == 0, 1.0, float64_of(rate))
    is_new = tl.where(n > 0, 1 - has_fault, 0)
    has_drifted = tl.where(number == 0, 1, tl.max(drifted, 0))
    waited = tl.load(waits).to(tl.int32)
    # All threads have read what is written below.
    tl.debug_barrier()
    tl.store(waits, tl.where(is_new != 0, has_drifted, waited | has_fault).to(tl.int64))
    tl.store(updates, number + is_new)
    for start in range(0, channels, BC):
        channel = start + tl.arange(0, BC)
        inside = channel < channels * is_new
        new, m2 = statistic(batch, n, channel, channels, inside, IS_RAW)
        old = tl.load(mean + channel, inside, other=0.0)
        tl.store(mean + channel, old + weight * (new - old), inside)
        spread = tl.load(var + channel, inside, other=0.0)
        tl.store(var + channel, spread + weight * (m2 * reciprocal(n) - spread), inside)


@triton.jit(do_not_specialize=INTEGERS)
def add_identity(message, wire, identity, count, size, B: tl.constexpr):
    """Copy `count` numbers of a message; behind them comes the identity, up to `size`."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    sent = tl.load(message + i, i < count, other=0.0)
    tl.store(wire + i, tl.where(i < count, sent, identity.to(tl.float64)), i < size)


@triton.jit(do_not_specialize=INTEGERS)
def compare_identity(wire, identity, count, size, B: tl.constexpr):
    """Write NaN over a sum whose last number is no multiple of the identity."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    last, one = tl.load(wire + size - 1), identity.to(tl.float64)
    # Whole numbers below 2^53: where the quotient is one this is 0, and elsewhere it is not.
    rest = last - tl.floor(last / one) * one
    tl.store(wire + i, float("nan"), i < tl.where(rest == 0, 0, count))


@triton.jit(do_not_specialize=INTEGERS)
def follow_gradients(sums, gradient, updates, rate, channels, BC: tl.constexpr):
    """Move the averages of gradient means; in one program."""
    count = 2 * channels
    n = tl.load(sums + count)
    wrong = tl.zeros([BC], tl.int32)
    for start in range(0, count, BC):
        i = start + tl.arange(0, BC)
        wrong |= tl.where(is_finite(tl.load(sums + i, i < count, other=0.0)), 0, 1)
    number = tl.load(updates)
    weight = tl.where(number == 0, 1.0, float64_of(rate))
    is_new = tl.where(n > 0, 1 - tl.max(wrong, 0), 0)
    tl.debug_barrier()
    tl.store(updates, number + is_new)
    for start in range(0, count, BC):
        i = start + tl.arange(0, BC)
        inside = i < count * is_new
        old = tl.load(gradient + i, inside, other=0.0)
        new = tl.load(sums + i, inside, other=0.0) * reciprocal(n)
        tl.store(gradient + i, old + weight * (new - old), inside)
