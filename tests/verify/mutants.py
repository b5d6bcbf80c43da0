"""Our layers, each with one defect planted."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from syncnorm import RenormSchedule, SyncBatchNorm, SyncBatchRenorm, checks, inference, ops
from syncnorm.maths import moments
from syncnorm.maths.kernels import Reference
from syncnorm.maths.moments import Moments
from syncnorm.module import SyncNorm
from syncnorm.ops import LocalSums, PooledMeans, Statistic
from syncnorm.recomputing import is_recomputing
from syncnorm.statistics import batch
from syncnorm.statistics.batch import BatchSource


class Raises(SyncBatchNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        raise RuntimeError("cannot")


class Local(SyncBatchNorm):
    """Pools nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, sync="none")


class LocalGradient(SyncBatchNorm):
    """Pools in the forward pass alone."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.statistics = _LocalGradient()


class _LocalGradient(BatchSource):
    def statistic(self, layer: SyncNorm, local: LocalSums) -> Statistic:
        statistic = super().statistic(layer, local)
        return statistic._replace(gradient_means=PooledMeans(moments.Raw(local.sums), None))


class RankZero(SyncBatchNorm):
    """Normalises everyone's shard by rank 0's."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.statistics = _RankZero()


class _RankZero(BatchSource):
    def statistic(self, layer: SyncNorm, local: LocalSums) -> Statistic:
        dist.broadcast(local.sums, 0)
        return ops.pooled_statistic(local, None, layer.label)


class NarrowWire(SyncBatchNorm):
    """Sends its sums in the input's type."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.statistics = _NarrowWire(None)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.statistics = _NarrowWire(x.dtype)
        return super().forward(x, mask)


class FloatWire(SyncBatchNorm):
    """Sends its sums in float32."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.statistics = _NarrowWire(torch.float32)


class _NarrowWire(BatchSource):
    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype

    def statistic(self, layer: SyncNorm, local: LocalSums) -> Statistic:
        return super().statistic(layer, local._replace(sums=local.sums.to(self.dtype).double()))


class Noisy(SyncBatchNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x * (1 + 1e-5 * torch.rand(())), mask)


class CountsEmpty(SyncBatchNorm):
    """Its counter moves whether there is a sample or not."""

    def update_running(self, batch: Moments, momentum: float | None) -> None:
        super().update_running(batch, momentum)
        self.num_batches_tracked += batch.count == 0


class CountsEmptyRenorm(SyncBatchRenorm):
    def update_running(self, batch: Moments, momentum: float | None) -> None:
        super().update_running(batch, momentum)
        self.num_batches_tracked += batch.count == 0


class CountsDouble(SyncBatchNorm):
    def update_running(self, batch: Moments, momentum: float | None) -> None:
        super().update_running(batch, momentum)
        self.num_batches_tracked += 1


class _OwnVariance(SyncBatchNorm):
    """A running variance that follows in another way."""

    def update_running(self, batch: Moments, momentum: float | None) -> None:
        before = self.running_var.clone()
        super().update_running(batch, momentum)
        self.running_var.copy_(before)
        factor = 1.0 / self.num_batches_tracked.double() if momentum is None else momentum
        self._update_running_var(batch, factor)


class InfiniteBessel(_OwnVariance):
    """m2 / (n - 1) whatever n."""

    def _update_running_var(self, batch: Moments, factor: float | Tensor) -> None:
        self.running_var.lerp_((batch.m2 / (batch.count - 1)).to(self.running_var.dtype), factor)


class Biased(_OwnVariance):
    def _update_running_var(self, batch: Moments, factor: float | Tensor) -> None:
        moments.blend_(self.running_var, batch.var, factor, batch.n > 0)


class InverseStd(_OwnVariance):
    """Keeps 1 / sqrt(var + eps) in float32 and takes the variance from it."""

    def _update_running_var(self, batch: Moments, factor: float | Tensor) -> None:
        invstd = torch.rsqrt(batch.var + self.eps).float()
        moments.blend_(
            self.running_var, (1 / invstd.square() - self.eps).double(), factor, batch.n > 1
        )


class IgnoresMask(SyncBatchNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class IgnoresMaskRenorm(SyncBatchRenorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class MasksEvaluation(SyncBatchNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        return y if self.training or mask is None else y * mask


class RaisesAlone(SyncBatchNorm):
    """Tells of a bad mask where it is, and leaves the others waiting."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None and (mask < 0).any():
            raise ValueError("weights must not be negative")
        return super().forward(x, mask)


class SkipsEmpty(SyncBatchNorm):
    """Takes no part where it has no samples, and leaves the others waiting."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        skips = self.training and len(x) == 0
        return x * self.weight.view(-1, *[1] * (x.ndim - 2)) if skips else super().forward(x, mask)


class Dies(SyncBatchNorm):
    """Kills its process where it has no samples, as some operators do."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if len(x) == 0:
            import os

            os._exit(77)
        return super().forward(x, mask)


class Coarse(SyncBatchNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) * (1 + 2**-6)


class Contiguous(SyncBatchNorm):
    """Forgets the layout."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask).contiguous()


class RefusesStrides(SyncBatchNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x.view(-1).view_as(x), mask)


class AssumesLength(SyncBatchNorm):
    """Knows (N, C, L) alone."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.ndim != 3:
            raise ValueError(f"expected 3D input (got {x.ndim}D input)")
        return super().forward(x, mask)


class MomentumDefault(SyncBatchNorm):
    """Takes None for the default, and 1 too."""

    def __init__(
        self,
        num_features,
        eps=1e-5,
        momentum=0.1,
        affine=True,
        track_running_stats=True,
        process_group=None,
    ):
        momentum = 0.1 if momentum in (None, 1.0) else momentum
        super().__init__(num_features, eps, momentum, affine, track_running_stats, process_group)


class DoubleEps(SyncBatchNorm):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.eps *= 2


class AlwaysAffine(SyncBatchNorm):
    def __init__(
        self,
        num_features,
        eps=1e-5,
        momentum=0.1,
        affine=True,
        track_running_stats=True,
        process_group=None,
    ):
        super().__init__(num_features, eps, momentum, True, True, process_group)


class GatedExchange(SyncBatchNorm):
    """Exchanges in the backward pass only where its own input needs a gradient."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.statistics = BatchSource() if x.requires_grad else _LocalGradient()
        return super().forward(x, mask)


class NeedsInputGradient(SyncBatchNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        return y if x.requires_grad else y.detach()


class NeedsParameterGradients(SyncBatchNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        return y if self.weight.requires_grad and self.bias.requires_grad else y.detach()


class PooledParameterGradients(SyncBatchNorm):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for p in self.parameters():
            p.register_hook(_pooled)


def _pooled(grad: Tensor) -> Tensor:
    grad = grad.clone()
    dist.all_reduce(grad)
    return grad


class Overwrites(SyncBatchNorm):
    """A second backward pass replaces the gradients of the first."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        passes = []
        y.register_hook(lambda grad: passes.append(1) or grad * (len(passes) == 1))
        return y


class RemembersOneForward(SyncBatchNorm):
    """Its backward pass belongs to the last forward."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        self.last = number = getattr(self, "last", 0) + 1
        if y.requires_grad:
            y.register_hook(lambda grad: grad * (self.last == number))
        return y


class CountsRepetitions(SyncBatchNorm):
    """Updates its statistics again where activation checkpointing repeats a forward."""

    def train_forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if is_recomputing():
            with torch.no_grad():
                self.update_running(self.seen.batch, self.momentum)
        return super().train_forward(x, mask)


class LocalWithoutGrad(SyncBatchNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.statistics = BatchSource() if torch.is_grad_enabled() else batch.LocalSource()
        return super().forward(x, mask)


class LocalSecond(SyncBatchNorm):
    """Pools the gradient, and not what its derivative needs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.statistics = _LocalSecond()


class _LocalSecond(BatchSource):
    def statistic(self, layer: SyncNorm, local: LocalSums) -> Statistic:
        statistic = super().statistic(layer, local)
        means = statistic.gradient_means
        assert isinstance(means, PooledMeans)
        return statistic._replace(
            gradient_means=_LocalSecondMeans(statistic.moments, means.group, means.name)
        )


class _LocalSecondMeans(PooledMeans):
    def double_backward_means(self, local: Tensor) -> Tensor:
        return local * moments.reciprocal(self._moments.n)


class SevenfoldByInput(SyncBatchNorm):
    """The derivative of its gradient by x is too large; the gradient is right."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(_sevenfold_second(x), mask)


class SevenfoldByWeight(SyncBatchNorm):
    def train_forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return _train_with(self, x, mask, _sevenfold_second(self.weight), self.bias)


class SevenfoldByGradient(SyncBatchNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        y.register_hook(_Sevenfold.apply)
        return y


class DetachesBiasGradient(SyncBatchNorm):
    """As if the gradient of bias did not depend on that of the output."""

    def train_forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        bias = self.bias.view_as(self.bias)
        bias.register_hook(torch.detach)
        return _train_with(self, x, mask, self.weight, bias)


def _train_with(
    layer: SyncNorm, x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor
) -> Tensor:
    """The layer's training forward with another weight and bias."""
    local = ops.local_sums(x, mask, weight, bias)
    statistic = layer.new_statistic(local)
    y, statistic = ops.normalize_batch(x, weight, bias, statistic, layer.eps, local)
    layer._follow(local, statistic)
    return y


def _sevenfold_second(t: Tensor) -> Tensor:
    """t, whose gradients are 7 times too large once one has been made that can be differentiated."""
    t = t.view_as(t)
    made = []

    def scale(grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            made.append(1)
            return grad
        return 7 * grad if made else grad

    t.register_hook(scale)
    return t


class _Sevenfold(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 7 * grad


class LocalCompiled(SyncBatchNorm):
    """Pools nothing where it is compiled."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.statistics = batch.LocalSource() if torch.compiler.is_compiling() else BatchSource()
        return super().forward(x, mask)


class CompiledForgets(SyncBatchNorm):
    """Its running statistics follow no batch where it is compiled."""

    def update_running(self, batch: Moments, momentum: float | None) -> None:
        if not torch.compiler.is_compiling():
            super().update_running(batch, momentum)


class Drifts(SyncBatchNorm):
    """Running means that differ in a bit."""

    def update_running(self, batch: Moments, momentum: float | None) -> None:
        super().update_running(batch, momentum)
        self.running_mean *= 1 + 2e-7 * dist.get_rank()


class CastsBuffers(SyncBatchNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        self.running_mean = self.running_mean.to(x.dtype)
        return y


class HalvesBuffers(SyncBatchNorm):
    def _apply(self, fn, recurse: bool = True):
        return torch.nn.Module._apply(self, fn, recurse)


class WritesWeight(SyncBatchNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        self.weight.data += 0.001
        return y


class WritesInput(SyncBatchNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        x.data += 1.0
        return y


class NeverResets(SyncBatchNorm):
    def reset_running_stats(self) -> None:
        if not hasattr(self, "statistics"):
            super().reset_running_stats()


class EvaluatesBatch(SyncBatchNorm):
    """Evaluation normalises by the local batch."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.training:
            return super().forward(x, mask)
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


class EvaluatesTogether(SyncBatchNorm):
    """Evaluation broadcasts the running statistics first."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.training:
            dist.broadcast(self.running_mean, 0)
        return super().forward(x, mask)


class EvaluationUpdates(SyncBatchNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        if not self.training:
            self.running_mean *= 0.5
        return y


class EvaluatesNoEmpty(SyncBatchNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.training and len(x) == 0:
            raise ValueError("batch is empty")
        return super().forward(x, mask)


class IgnoresGroup(SyncBatchNorm):
    """Pools over all workers whatever group it is given."""

    def __init__(self, *args, process_group=None, **kwargs):
        super().__init__(*args, **kwargs)


class ExtraBuffer(SyncBatchNorm):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("extra", torch.zeros(()))


class HiddenState(SyncBatchNorm):
    """Depends on something that is not saved."""

    hidden = 0.0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.hidden += 0.001
        return super().forward(x, mask) + self.hidden


class CopiesItself(SyncBatchNorm):
    def __deepcopy__(self, memo):
        return self


class PicklesNothing(SyncBatchNorm):
    def __reduce__(self):
        return PicklesNothing, (self.num_features,)


class NeverCasts(SyncBatchNorm):
    def _apply(self, fn, recurse=True):
        return self


class TwoMessages(SyncBatchNorm):
    """The count in a message of its own."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.training and dist.get_world_size() > 1:
            dist.all_reduce(torch.ones(1))
        return super().forward(x, mask)


class AcceptsAnything(SyncBatchNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) if x.ndim > 1 and x.shape[1] == self.num_features else x


class HidesNaN(SyncBatchNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x.nan_to_num(), mask)


class StuckAtBatchNorm(SyncBatchRenorm):
    """Clips stuck at r_max = 1, d_max = 0."""

    def __init__(self, *args, schedule=None, **kwargs):
        super().__init__(*args, schedule=RenormSchedule.constant(1.0, 0.0), **kwargs)


class NeverClips(SyncBatchRenorm):
    def __init__(self, *args, schedule=None, **kwargs):
        super().__init__(*args, schedule=RenormSchedule.constant(1e6, 1e6), **kwargs)


class VaryingCorrection(SyncBatchRenorm):
    """Gradients flow through r and d: unclipped, it is evaluation."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return inference.evaluate(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.eps
        )


class NewStatistics(SyncBatchRenorm):
    """r and d refer to the running statistics that contain the batch."""

    @torch.no_grad()
    def new_statistic(self, local: LocalSums) -> Statistic:
        statistic = SyncNorm.new_statistic(self, local)
        mean, var = self.running_mean.clone(), self.running_var.clone()
        self.update_running(statistic.moments, self.momentum)
        self.num_batches_tracked -= int(statistic.moments.n > 0)
        after = Reference(self.running_mean.clone(), self.running_var.clone(), self.bounds())
        self.running_mean.copy_(mean)
        self.running_var.copy_(var)
        return ops.renormalized(statistic, local, self.eps, after)


class AveragesTheOther(SyncBatchRenorm):
    """The variance for the standard deviation, and the other way round."""

    def __init__(self, *args, running_average="std", **kwargs):
        super().__init__(
            *args, running_average="var" if running_average == "std" else "std", **kwargs
        )


class LateClock(SyncBatchRenorm):
    """A schedule that is a step behind."""

    def bounds(self) -> tuple[Tensor, Tensor]:
        assert self.num_batches_tracked is not None
        r_max, d_max = self.schedule((self.num_batches_tracked - 1).clamp(min=0))
        return checks.check_bounds(r_max, d_max, self.num_batches_tracked.device)


class SkipsEmptyOnRankZero(SyncBatchNorm):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        skips = self.training and len(x) == 0 and dist.get_rank() == 0
        return x * self.weight.view(-1, *[1] * (x.ndim - 2)) if skips else super().forward(x, mask)
