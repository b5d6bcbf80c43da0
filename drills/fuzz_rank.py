"""One worker of the fuzz drill: makes the calls, and compares each with the oracle.

Every worker knows everybody's data from the seed, so it computes the oracle itself, and nothing is
sent for the sake of the comparison but one gather at the end of a sequence. What is wrong is
written down and the sequence goes on: a worker that stopped alone would leave the others waiting.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from drills.fuzz_calls import WORKERS, Call, Calls
from syncnorm import (
    RenormSchedule,
    SyncBatchNorm,
    SyncBatchRenorm,
    accumulate,
    frozen_statistics,
    reference,
)
from syncnorm.comm import exchange
from syncnorm.errors import SingleValueWarning
from syncnorm.module import SyncNorm
from syncnorm.testing import assert_close

CHANNELS = 3
EPS = 1e-5
R_MAX, D_MAX, WARMUP, R_STEPS, D_STEPS = 2.0, 1.0, 2, 8, 6

Plant = Callable[[], contextlib.AbstractContextManager[Any]]


def play(sequences: Sequence[Calls], plant: Plant = contextlib.nullcontext) -> list[list[str]]:
    """Play the sequences on one worker; returns the problems of each.

    `plant` puts a defect into the package.
    """
    with plant(), warnings.catch_warnings():
        warnings.simplefilter("ignore", SingleValueWarning)
        return [Player(sequence).run() for sequence in sequences]


class Part(NamedTuple):
    """A worker's share of a batch."""

    x: Tensor
    cotangent: Tensor
    mask: Tensor | None


def make_part(sequence: Calls, index: int, rank: int) -> Part:
    call = sequence.calls[index]
    while index > 0 and sequence.calls[index].is_again:
        index -= 1
    g = torch.Generator().manual_seed((sequence.seed * 1000 + index) * WORKERS + rank)
    shape = (call.sizes[rank], CHANNELS, *((2, 2) if call.layout != "rows" else ()))
    dtype = getattr(torch, call.dtype)
    # On a grid, so that a few values never lie so close that the variance is a rounding error;
    # workers differ in mean.
    x = ((torch.randn(shape, generator=g, dtype=torch.float64) * 2 + rank) * 16).round() / 16
    cotangent = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    weights = torch.randint(0, 3, (shape[0], 1, *shape[2:]), generator=g)
    mask = {"none": None, "weights": weights.float(), "bool": weights > 0, "zero": weights * 0.0}[
        call.masks[rank]
    ]
    x = x.to(dtype)
    return Part(
        x.to(memory_format=torch.channels_last) if call.layout == "channels_last" else x,
        cotangent,
        mask,
    )


def make_layer(sequence: Calls) -> SyncNorm:
    options: dict[str, Any] = {
        "eps": EPS, "momentum": sequence.momentum, "affine": sequence.affine, "dtype": getattr(torch, sequence.dtype),
    }  # fmt: skip
    if sequence.kind == "norm":
        layer = SyncBatchNorm(CHANNELS, **options)
    else:
        schedule = RenormSchedule(R_MAX, D_MAX, WARMUP, R_STEPS, D_STEPS)
        layer = SyncBatchRenorm(
            CHANNELS, schedule=schedule, running_average=sequence.running_average, **options
        )  # fmt: skip
    g = torch.Generator().manual_seed(sequence.seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.rand(CHANNELS, generator=g) + 0.5)
    return layer


class Oracle:
    """The layer in one process on the whole batch, in float64."""

    def __init__(self, sequence: Calls, layer: SyncNorm) -> None:
        self.sequence = sequence
        self.running = reference.RunningStatistics.initial(CHANNELS)
        self.weight, self.bias = (
            None if p is None else p.detach().double().clone().requires_grad_()
            for p in (layer.weight, layer.bias)
        )
        self.block: list[tuple[Tensor, Tensor]] | None = None

    def __call__(self, call: Call, x: Tensor, mask: Tensor) -> Tensor:
        if call.mode == "eval":
            return reference.batch_norm_inference(x, self.weight, self.bias, self.running, EPS)
        if call.mode == "frozen" or self.block is not None:
            if call.mode != "frozen" and self.block is not None:
                self.block.append((_rows(x.detach()), _rows(mask)))
            return self._train(x, mask, self.weight, self.bias, dataclasses.replace(self.running))
        return self._train(x, mask, self.weight, self.bias, self.running)

    def end_block(self) -> None:
        """Update once by all that the block has seen, as one batch."""
        if self.block:
            rows, weights = (torch.cat(each) for each in zip(*self.block, strict=True))
            self._train(rows, weights, None, None, self.running)
        self.block = None

    def _train(
        self,
        x: Tensor,
        mask: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: reference.RunningStatistics,
    ) -> Tensor:
        how: dict[str, Any] = {
            "mask": mask,
            "eps": EPS,
            "momentum": self.sequence.momentum,
            "running": running,
        }
        if self.sequence.kind == "norm":
            return reference.batch_norm(x, weight, bias, **how)
        step = running.num_batches_tracked
        how["r_max"] = 1 + (R_MAX - 1) * min(1.0, max(0.0, (step - WARMUP) / (R_STEPS - WARMUP)))
        how["d_max"] = D_MAX * min(1.0, max(0.0, (step - WARMUP) / (D_STEPS - WARMUP)))
        return reference.batch_renorm(
            x, weight, bias, running_average=self.sequence.running_average, **how
        )

    def scale_of_errors(
        self, call: Call, x: Tensor, mask: Tensor, cotangent: Tensor
    ) -> tuple[float, float]:
        """The growth of rounding errors: |x| / std, and the largest term of the input's gradient.

        These may cancel: of two values per channel the gradient is next to nothing.
        """
        n, mean, var = reference.moments(x.detach(), mask)
        is_local = call.mode == "eval"
        invstd = ((self.running.var if is_local else var) + EPS).rsqrt() * (is_local or n > 1)
        scale = invstd if self.weight is None else invstd * self.weight.detach().abs()
        terms = torch.full((CHANNELS,), _largest(cotangent), dtype=torch.float64)
        if not is_local and n > 1:
            # weight * invstd * (g - w * (mean g + xhat * mean g xhat)); what does not count may be
            # far off, and its g is in both means all the same. An xhat is a difference of |x| /
            # std: where it is below 1 its error is not.
            g, xhat = (
                _rows(cotangent).abs(),
                ((_rows(x.detach()) - mean).abs() * invstd).clamp(min=1.0),
            )
            counted = (xhat * (_rows(mask) > 0)).amax(0)
            terms += float(mask.max()) * (g.sum(0) + counted * (g * xhat).sum(0)) / n
            scale = scale * (R_MAX if self.sequence.kind == "renorm" else 1.0)
        return _largest(x) * float(invstd.max()), float((scale * terms).max())


def _rows(t: Tensor) -> Tensor:
    """(N, C, *S) as (N * S, C)."""
    return t.movedim(1, -1).reshape(-1, t.shape[1])


class Pending(NamedTuple):
    """A forward that awaits its backward pass, of the layer and of the oracle."""

    what: str
    call: Call
    own: Part
    x: Tensor
    y: Tensor
    whole: Tensor
    expected: Tensor
    cotangent: Tensor
    terms: float
    condition: float
    dtype: torch.dtype


class Record(NamedTuple):
    """Values of one call that are compared over the workers when the sequence ends."""

    what: str
    values: Tensor
    """The buffers, then this worker's gradients of weight and bias."""
    gradients: Tensor
    """The oracle's, which the sum over workers should equal."""
    terms: float
    dtype: torch.dtype


class Player:
    """One sequence on one worker."""

    def __init__(self, sequence: Calls) -> None:
        self.sequence = sequence
        self.rank = dist.get_rank()
        self.layer = make_layer(sequence)
        self.oracle = Oracle(sequence, self.layer)
        self.block = contextlib.ExitStack()
        self.pending: list[Pending] = []
        self.records: list[Record] = []
        self.problems: list[str] = []
        self.what = ""
        self.state_dtype = torch.float64 if sequence.dtype == "float64" else torch.float32
        """The precision of the buffers, and of all that depends on them."""
        self.terms = 0.0
        self.is_coarse = False
        """True once gradients of weight and bias come from `F.batch_norm` in bfloat16, which sums
        them in that type.
        """

    def run(self) -> list[str]:
        for index, call in enumerate(self.sequence.calls):
            self.what = f"call {index}"
            self._enter_or_leave_block(call.in_block)
            if call.zero_grad:
                self._zero_grad()
            self._forward(index, call)
            if call.copied:
                self._copy()
            self._record()
        self.what = "the end"
        self._enter_or_leave_block(False)
        self._backward(self.pending)
        self._record()
        self._compare_records()
        return [f"rank {self.rank}, {problem}" for problem in self.problems]

    def _enter_or_leave_block(self, is_in: bool) -> None:
        if is_in and self.oracle.block is None:
            self.block.enter_context(accumulate(self.layer))
            self.oracle.block = []
        elif not is_in and self.oracle.block is not None:
            self.block.close()
            self.oracle.end_block()

    def _zero_grad(self) -> None:
        self.layer.zero_grad()
        self.terms, self.is_coarse = 0.0, False
        for p in (self.oracle.weight, self.oracle.bias):
            if p is not None:
                p.grad = None

    def _forward(self, index: int, call: Call) -> None:
        parts = [make_part(self.sequence, index, rank) for rank in range(WORKERS)]
        own = parts[self.rank]
        x = own.x.detach().requires_grad_(call.needs_grad[self.rank])
        freeze = (
            frozen_statistics(self.layer) if call.mode == "frozen" else contextlib.nullcontext()
        )
        self.layer.train(call.mode != "eval")
        with exchange.record() as sent, freeze:
            y = self._call(call, x, own.mask)
        self._check_sent(sent, Counter() if call.mode == "eval" else Counter([_MOMENTS]))
        if call.mode != "eval" and x.dtype != torch.float64:
            self.state_dtype = torch.float32
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else self.state_dtype
        if y.dtype != x.dtype or (call.mode != "eval" and x.numel() and y.stride() != x.stride()):
            self.problems.append(
                f"{self.what}: y is {y.dtype} with strides {y.stride()}, x {x.dtype}, {x.stride()}"
            )
        whole = torch.cat([part.x.double() for part in parts]).requires_grad_()
        mask = torch.cat([_weights(part) for part in parts])
        cotangent = torch.cat([part.cotangent.double() for part in parts])
        ratio, terms = self.oracle.scale_of_errors(call, whole, mask, cotangent)
        # The tolerances hold for |x| / std <= 100. A value counted twice, alone, has a "std" of
        # sqrt(eps) = 0.003.
        condition = max(1.0, ratio / 100)
        expected = self.oracle(call, whole, mask)
        self._check_rounded(
            "y", y, self._slice(call, expected), dtype, max(1.0, _largest(expected)) * condition
        )
        pending = Pending(
            self.what,
            call,
            own,
            x,
            y,
            whole,
            expected,
            cotangent,
            terms * condition,
            condition,
            dtype,
        )
        if (
            call.mode == "eval"
        ):  # alone and at once: torch forbids that its running statistics move in between
            self._backward([pending])
        else:
            self.pending.append(pending)
        if call.backward == "together":
            self._backward(self.pending)
        while call.backward == "one by one" and self.pending:
            self._backward([self.pending.pop()])

    def _call(self, call: Call, x: Tensor, mask: Tensor | None) -> Tensor:
        if call.checkpoint == "no":
            return self.layer(x, mask)

        def forward(x: Tensor) -> Tensor:
            self.layer.train()  # a repetition comes when the layer may be in evaluation mode again
            return self.layer(x, mask)

        result = checkpoint(forward, x, use_reentrant=call.checkpoint == "reentrant")
        assert isinstance(result, Tensor)
        return result

    def _backward(self, pending: list[Pending]) -> None:
        """Make one backward pass of all pending forwards."""
        todo, pending[:] = list(pending), []
        expected = Counter[tuple[str, int]]()
        for each in todo:
            expected.update([_GRADIENTS] * (each.call.mode != "eval"))
        with exchange.record() as sent:
            live = [each for each in todo if each.y.requires_grad]
            if live:
                torch.autograd.backward([e.y for e in live], [e.own.cotangent for e in live])
        self._check_sent(sent, expected)
        if todo:
            torch.autograd.backward([e.expected for e in todo], [e.cotangent for e in todo])
        for each in todo:
            self._check_gradient(each)
            self.terms += float(_rows(each.cotangent).abs().sum(0).max()) * each.condition
            self.is_coarse |= each.call.mode == "eval" and each.dtype == torch.bfloat16

    def _check_gradient(self, done: Pending) -> None:
        if not done.x.requires_grad:
            return
        what = f"gradient of the input of {done.what}"
        if done.x.grad is None or done.whole.grad is None:
            self.problems.append(f"{self.what}: {what}: there is none")
            return
        self._check_rounded(
            what, done.x.grad, self._slice(done.call, done.whole.grad), done.dtype, done.terms
        )

    def _copy(self) -> None:
        """Go on with a copy. It is not part of a block that the layer is in."""
        self._backward(self.pending)
        copied = copy.deepcopy(self.layer)
        self.block.close()
        self.oracle.block = None
        self.layer = copied
        self._zero_grad()

    def _record(self) -> None:
        buffers = [b.detach().double().flatten() for b in self.layer.buffers()]
        running = self.oracle.running
        expected = (running.mean, running.var, torch.tensor([float(running.num_batches_tracked)]))
        for name, got, wanted in zip(
            ("running_mean", "running_var", "counter"), buffers, expected, strict=True
        ):
            self._check(name, got, wanted.double(), self.state_dtype)
        zeros = torch.zeros(CHANNELS, dtype=torch.float64)
        own, oracle = (
            torch.cat(
                [
                    zeros if p is None or p.grad is None else p.grad.double()
                    for p in (each.weight, each.bias)
                ]
            )
            for each in (self.layer, self.oracle)
        )
        dtype = torch.bfloat16 if self.is_coarse else self.state_dtype
        self.records.append(
            Record(self.what, torch.cat([*buffers, own]), oracle, self.terms, dtype)
        )

    def _compare_records(self) -> None:
        own = torch.stack([record.values for record in self.records])
        everybody = [torch.empty_like(own) for _ in range(WORKERS)]
        dist.all_gather(everybody, own)
        count = 2 * CHANNELS + 1
        totals = torch.stack(everybody).sum(0)
        for index, record in enumerate(self.records):
            self.what = record.what
            if not torch.equal(own[index, :count], everybody[0][index, :count]):
                self.problems.append(f"{self.what}: buffers differ between ranks")
            self._check(
                "parameter gradients",
                totals[index, count:],
                record.gradients,
                record.dtype,
                record.terms,
            )

    def _check_sent(
        self, sent: Sequence[exchange.Exchange], expected: Counter[tuple[str, int]]
    ) -> None:
        got = Counter((e.kind, e.numel) for e in sent)
        if got != expected:
            self.problems.append(f"{self.what}: sent {dict(got)}, expected {dict(expected)}")

    def _check(
        self, name: str, got: Tensor, expected: Tensor, dtype: torch.dtype, terms: float = 0.0
    ) -> None:
        """Compare with a tolerance that is relative to `terms`, if larger than the expected values.

        These are the size of what the values are sums of, or of the whole tensor that they are cut
        from.
        """
        size = max(0.01, float(expected.detach().abs().max())) if expected.numel() else 1.0
        try:
            assert_close(got, expected, dtype, f"{self.what}: {name}", max(1.0, terms / size))
        except AssertionError as error:
            self.problems.append(str(error))

    def _check_rounded(
        self, name: str, got: Tensor, expected: Tensor, dtype: torch.dtype, terms: float
    ) -> None:
        """Compare as `_check`; bfloat16 was computed in float32 and then rounded once."""
        if dtype == torch.bfloat16 and got.shape == expected.shape:
            expected = expected.detach()
            error = got.detach().double() - expected
            rounding = torch.minimum(error.abs(), expected.abs() * 2**-8)
            got, dtype = (expected + error.sign() * (error.abs() - rounding)), torch.float32
        self._check(name, got, expected, dtype, terms)

    def _slice(self, call: Call, whole: Tensor) -> Tensor:
        return whole.split(list(call.sizes))[self.rank]


_MOMENTS = ("moments", 2 * CHANNELS + 2)
_GRADIENTS = ("gradients", 2 * CHANNELS + 2)


def _largest(t: Tensor) -> float:
    return float(t.detach().abs().max()) if t.numel() else 0.0


def _weights(part: Part) -> Tensor:
    return (
        torch.ones_like(part.x[:, :1], dtype=torch.float64)
        if part.mask is None
        else part.mask.double()
    )
