"""The sums of a layer's least squares, and the numbers that they are of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncnorm import checks
from syncnorm.errors import InputError
from syncnorm.model.sample import call, uncompiled

# Numbers of unfolded input that are there at once: 128 MiB.
_ROOM = 1 << 24


class Sums(NamedTuple):
    """What a layer's least squares need, in one message."""

    gram: Tensor
    """sum_i Xhat_i Xhat_i^T, (d, d)."""
    cross: Tensor
    """sum_i Y_i Xhat_i^T, (C, d)."""
    columns: Tensor
    """The numbers of columns of each Xhat_i, (networks,)."""

    @classmethod
    def views(cls, message: Tensor, outputs: int, d: int) -> Sums:
        """The parts of a message of d^2 + outputs d numbers, and one for each network."""
        gram, cross, columns = message.split(
            [d * d, outputs * d, message.numel() - d * d - outputs * d]
        )
        return cls(gram.view(d, d), cross.view(outputs, d), columns)

    def solve(self, average: Tensor, ridge: float) -> Tensor:
        """The weight (C, d) that fits best; the average where the matrix cannot be inverted."""
        rho = ridge * self.gram.diagonal().mean()
        matrix = self.gram + rho * torch.eye(len(self.gram)).to(self.gram)
        root, has_failed = torch.linalg.cholesky_ex(matrix)
        pivots = root.diagonal().square()
        least = torch.finfo(torch.float64).eps * len(matrix) * matrix.diagonal().max()
        if has_failed or pivots.min() <= least:
            return average
        return torch.cholesky_solve((self.cross + rho * average).T, root).T


def with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Weight and bias as one matrix (C, d), in float64."""
    columns = weight.double().flatten(1)
    return columns if bias is None else torch.cat([columns, bias.double()[:, None]], 1)


def add(sums: Sums, layer: Any, x: Tensor, y: Tensor, network: int) -> None:
    """Add a batch: x comes to the merged layer, y leaves that of a network of this number."""
    outputs, d = sums.cross.shape
    per_sample = d * max(1, y[:1].numel() // outputs)
    for few_x, few_y in zip(
        x.split(max(1, _ROOM // per_sample)), y.split(max(1, _ROOM // per_sample)), strict=True
    ):
        rows = _unfolded(layer, few_x).double()
        if layer.bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        moved = few_y if isinstance(layer, nn.Linear) else few_y.movedim(1, -1)
        targets = moved.reshape(-1, outputs).double()
        sums.gram.addmm_(rows.T, rows)
        sums.cross.addmm_(targets.T, rows)
        sums.columns[network] += len(rows)


def _unfolded(layer: Any, x: Tensor) -> Tensor:
    """The inputs of a layer that are multiplied by its weight, a row for each product (rows, d)."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, layer.in_features)
    spatial = x.ndim - 2
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = F.pad(x, _padding(layer), mode)
    for axis, (kernel, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        windows = windows.unfold(axis, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
    # (N, C, *places, *kernel) -> (N, *places, C, *kernel)
    windows = windows.movedim(1, 1 + spatial)
    return windows.reshape(-1, layer.weight[0].numel())


def _padding(layer: Any) -> list[int]:
    """Before and after each axis, the last one first, as `F.pad` takes it."""
    widths: list[int] = []
    for axis in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
            widths += [total // 2, total - total // 2]
        else:
            widths += [0, 0] if layer.padding == "valid" else [layer.padding[axis]] * 2
    return widths


class _Reached(Exception):
    """Ends a forward where it has come to what was wanted."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def arriving(model: nn.Module, name: str, batch: Any) -> Tensor:
    """What comes to a layer."""

    def stop(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        raise _Reached(checks.input_of(args, kwargs))

    layer = model.get_submodule(name)
    return _until(model, layer.register_forward_pre_hook(stop, with_kwargs=True), batch)


def leaving(model: nn.Module, name: str, batch: Any) -> Tensor:
    """What a layer computes."""

    def stop(_: nn.Module, args: Any, output: Tensor) -> None:
        raise _Reached(output)

    return _until(model, model.get_submodule(name).register_forward_hook(stop), batch)


def _until(model: nn.Module, hook: Any, batch: Any) -> Tensor:
    try:
        with uncompiled():
            call(model, batch, "batches")
    except _Reached as reached:
        return reached.value
    finally:
        hook.remove()
    raise InputError("`batches` must go through all layers in the forward that torch.fx traces")
