"""What a training step costs on a GPU: launches, traffic, memory, and no look at a value.

No GPU is needed: tensors of the CPU take a GPU's course, and the launches are noted in place of
being made. Nothing on that course depends on a value. `python -m tests.model.test_budgets` prints
the table of docs/cuda.md.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from syncnorm import RenormSchedule, SyncBatchNorm, SyncBatchRenorm, prepare_ddp
from syncnorm.comm import exchange
from syncnorm.maths import kernels
from syncnorm.testing import RankPool
from tests.as_device import as_device
from tests.covering import covering
from tests.unit.budgets import Log, size_of

pytest.importorskip("triton", reason="needs Triton")

CASES: dict[str, list[Any]] = {
    "is_renorm": [False, True],
    "dtype": [torch.float32, torch.bfloat16],
    "how": ["contiguous", "channels_last", "crop"],
    "masked": [False, True],
}
# For each mode launches of a layer, and bytes read and written in those of x, forward and backward.
# Sums that several programs share take two launches. Besides: the layers' common message, and under
# "lagged" the copy of all averages and the look at who waits.
BUDGETS = {
    "batch": ((4, 3), (3, 5)),
    "none": ((4, 3), (3, 5)),
    "running": ((4, 3), (3, 5)),
    "lagged": ((6, 3), (3, 5)),
}
# Packed with its identity, sent, and its identity compared.
MESSAGE = ["add_identity", "allreduce_", "compare_identity"]
WITHOUT_TRITON = ["new_full", "cat", "allreduce_", "remainder", "ne", "masked_fill_"]
# Of an H100.
PROCESSORS = 132
PAGE = Path(__file__).parents[2] / "docs" / "cuda.md"


class Cost(NamedTuple):
    launches: list[str]
    """Kernels and operators, those of messages left out."""
    messages: list[str]
    """The operators of messages."""
    traffic: float
    """Bytes read and written, in those of x."""
    largest: float
    """The largest tensor made besides the result, likewise."""
    looks: int
    """Values that were asked for as a list."""


class _Counter:
    """Counts the launches of a block, by the kernels of Triton and by operators."""

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self._log = Log("cpu")
        self._bytes = 0
        self._messages: list[str] = []
        self._looks = 0
        self._stack = ExitStack()

    def __enter__(self) -> _Counter:
        from syncnorm.maths.kernels.triton import launch

        sum_, start_sum, tolist = exchange.sum_, exchange.start_sum, Tensor.tolist

        def look(t: Tensor) -> Any:
            self._looks += 1
            return tolist(t)

        for each in (
            mock.patch.object(launch, "_launch", self._launch),
            mock.patch.object(launch, "_processors", return_value=PROCESSORS),
            mock.patch.object(Tensor, "tolist", look),
            mock.patch.object(exchange, "sum_", lambda *a: self._message(sum_, *a)),
            mock.patch.object(exchange, "start_sum", lambda *a: self._message(start_sum, *a)),
            self._log,
        ):
            self._stack.enter_context(each)
        return self

    def __exit__(self, *args: Any) -> None:
        self._stack.close()

    def _launch(
        self, kernel: Any, programs: int, of: Any, tensors: Any, numbers: Any, warps: int = 4
    ) -> None:
        self._log.names.append(kernel.__name__)
        self._bytes += sum(size_of(t) for t in tensors if t is not None)

    def _message(self, send: Any, *args: Any) -> Any:
        before = len(self._log.names)
        result = send(*args)
        self._messages += self._log.names[before:]
        del self._log.names[before:]
        return result

    def cost(self) -> Cost:
        assert "_local_scalar_dense" not in self._log.names, "a value was looked at"
        return Cost(
            self._log.names,
            self._messages,
            (self._bytes + self._log.bytes) / self._x.nbytes,
            self._log.largest / self._x.nbytes,
            self._looks,
        )


def _costs(
    sync: str,
    is_renorm: bool,
    dtype: torch.dtype,
    how: str,
    masked: bool,
    count: int,
    name: str = "triton",
) -> tuple[Cost, Cost]:
    """The costs of a second step of a model of `count` layers, forward and backward."""
    layers = [
        SyncBatchRenorm(64, schedule=RenormSchedule(), sync=sync)
        if is_renorm
        else SyncBatchNorm(64, sync=sync)
        for _ in range(count)
    ]
    model = prepare_ddp(_Body(layers))
    x, mask = _inputs(dtype, how, masked)
    if sync == "lagged":
        # Not in its first steps, in which it waits.
        for layer in layers:
            layer.lagged_waits.zero_()
            layer.lagged_updates.fill_(1)
    with as_device(name):
        for _ in range(2):
            xs = [x.detach().requires_grad_() for _ in layers]
            gs = [torch.zeros_like(x) for _ in layers]
            model.zero_grad()
            with _Counter(x) as forward:
                ys = model(xs, mask)
            with _Counter(x) as backward:
                torch.autograd.backward(ys, gs)
    return forward.cost(), backward.cost()


def _inputs(dtype: torch.dtype, how: str, masked: bool) -> tuple[Tensor, Tensor | None]:
    """An input and its mask."""
    x = torch.zeros(32, 64, 56, 56, dtype=dtype)
    if how == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif how == "crop":
        x = torch.zeros(32, 64, 58, 58, dtype=dtype)[:, :, 1:-1, 1:-1]
    return x.requires_grad_(), torch.ones(32, 1, 56, 56) if masked else None


class _Body(nn.Module):
    """Layers side by side."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, xs: list[Tensor], mask: Tensor | None) -> list[Tensor]:
        return [layer(x, mask) for layer, x in zip(self.layers, xs, strict=True)]


@pytest.mark.parametrize(
    *covering(
        ("sync", "is_renorm", "masked"),
        sync=list(BUDGETS),
        **CASES,
    ),
    ids=str,
)
def test_a_layer_is_at_the_floor(pool, sync, is_renorm, dtype, how, masked):
    """By the difference of a model of three layers and one of a single layer."""
    one, three = (
        pool(2).run(_costs, sync, is_renorm, dtype, how, masked, count)[0] for count in (1, 3)
    )
    of_mask = 4 / (64 * dtype.itemsize)
    for small, large, most, floor in zip(one, three, *BUDGETS[sync], strict=True):
        names = Counter(large.launches) - Counter(small.launches)
        assert names.total() <= 2 * most, names
        assert (large.traffic - small.traffic) / 2 <= floor + 0.1 + of_mask
        # The output and the gradient of the input; none besides.
        assert max(small.largest, large.largest) <= 1
        if sync in ("batch", "none"):
            assert Counter(small.launches).total() <= most
    # Who waits, once a step for all layers.
    assert [cost.looks for cost in (*one, *three)] == [sync == "lagged", 0] * 2
    if sync == "batch":
        assert one[0].messages == one[1].messages == MESSAGE


@pytest.mark.parametrize("name", ["triton", "composed"])
@pytest.mark.parametrize(
    *covering(
        ("is_renorm", "masked"),
        **CASES,
    ),
    ids=str,
)
def test_a_meta_tensor_takes_the_course_of_a_devices(pool, is_renorm, dtype, how, masked, name):
    """So that anybody can log what a model of his own would launch. No worker is asked."""
    expected = pool(1).run(_costs, "batch", is_renorm, dtype, how, masked, 1, name)[0]
    with torch.device("meta"):
        layer = SyncBatchRenorm(64, schedule=RenormSchedule()) if is_renorm else SyncBatchNorm(64)
        x, mask = _inputs(dtype, how, masked)
    with mock.patch.object(kernels, "_preferred", return_value=getattr(kernels, name)):
        for _ in range(2):
            x.grad = layer.weight.grad = layer.bias.grad = None
            with Log() as forward:
                y = layer(x, mask)
            g = torch.empty_like(x)
            with Log() as backward:
                y.backward(g)
    for log, cost in zip((forward, backward), expected, strict=True):
        assert log.names == cost.launches
        assert log.traffic(x) == pytest.approx(cost.traffic)


def test_the_pages_block_lists_the_launches(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    exec(block, {})
    first, *_ = lines = capsys.readouterr().out.splitlines()
    assert first in block
    names = [line.split(".")[1] for line in lines]
    forward = ["moments", "add_moments", "normalize", "update_running"]
    assert names == [*forward, "backward_sums", "add_gradients", "backward_input"]


@pytest.mark.parametrize(
    ("dtype", "traffic"), [(torch.float32, (5.2, 7.2)), (torch.bfloat16, (4.3, 9.3))], ids=str
)
@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
@pytest.mark.parametrize("is_renorm", [False, True], ids=["norm", "renorm"])
def test_a_layer_without_triton(pool, is_renorm, dtype, how, traffic):
    args = "batch", is_renorm, dtype, how, False, 1, "composed"
    costs = pool(2).run(_costs, *args)[0]
    launches = {
        torch.float32: (70, 18) if is_renorm else (29, 14),
        torch.bfloat16: (66, 19) if is_renorm else (25, 15),
    }[dtype]
    for cost, most, number in zip(costs, traffic, launches, strict=True):
        assert cost.messages == WITHOUT_TRITON
        assert cost.traffic <= most
        assert len(cost.launches) <= number


def main() -> None:
    """Print the costs of a layer in each mode, at (32, 64, 56, 56), channels last."""
    ranks = RankPool(2, timeout_seconds=600.0)
    print("| layer | launches forward | backward | traffic forward | backward |")
    print("|---|---|---|---|---|")
    kinds = itertools.product(BUDGETS, (False, True), (False, True), [torch.bfloat16], ["triton"])
    without = itertools.product(
        ["batch"], (False, True), (False,), (torch.float32, torch.bfloat16), ["composed"]
    )
    for sync, is_renorm, masked, dtype, own in itertools.chain(kinds, without):
        args = sync, is_renorm, dtype, "channels_last", masked
        one, three = (ranks.run(_costs, *args, count, own)[0] for count in (1, 3))
        pairs = list(zip(one, three, strict=True))
        launches = [(len(b.launches) - len(a.launches)) / 2 for a, b in pairs]
        traffic = [(b.traffic - a.traffic) / 2 for a, b in pairs]
        name = f'{"SyncBatchRenorm" if is_renorm else "SyncBatchNorm"}, sync="{sync}"'
        name += ", a mask" * masked
        if own == "composed":
            name += f", without Triton, {str(dtype).removeprefix('torch.')}"
        figures = f"{launches[0]:g} | {launches[1]:g} | {traffic[0]:.2f} | {traffic[1]:.2f}"
        print(f"| {name} | {figures} |")
    ranks.close()


if __name__ == "__main__":
    main()
