"""Exchanges of DistributedDataParallel within `join`: noticed by the workers that have data,
matched by the others.

DDP's own join takes every forward for one reduction of the gradients. Here a reduction is announced
when it begins: several forwards may share one, and a forward may have none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

GRADIENTS, SYNC, BUFFERS = 2, 4, 8
"""Properties of a forward: with gradients, outside of no_sync, DDP broadcasts buffers before it."""


class Reductions:
    """The exchanges of one DDP model.

    Args:
        ddp: the model.
        begin: called when a reduction of its gradients begins, in the backward pass.
        share: the number of all workers over the number of those that have data.
    """

    def __init__(
        self, ddp: DistributedDataParallel, begin: Callable[[], None], share: Callable[[], float]
    ) -> None:
        assert ddp.process_group is not None
        self._ddp, self._group = ddp, ddp.process_group
        self._begin = begin
        self._share = share
        self._is_armed = False
        """True if DDP reduces the gradients in the next backward pass."""
        self._is_quiet = False
        """True if there was a forward within no_sync since the last reduction."""
        self._has_own = False
        """True if the gradients hold a part that the other workers do not have yet."""
        self._task = -1
        self._factor = 0.0
        self._left: set[int] = set()
        self._under_way: list[Any] = []
        self._handles = [
            self._watch(i, p) for i, p in enumerate(ddp.parameters()) if p.is_floating_point()
        ]

    @property
    def is_known_late(self) -> bool:
        """True if workers may come to the first gradient of a reduction at different places: some
        leave parts out.
        """
        return self._ddp.find_unused_parameters and not self._ddp.static_graph

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.say_absent(False)

    def look(self) -> int:
        """The properties of the forward that now begins."""
        gradients = GRADIENTS if torch.is_grad_enabled() else 0
        sync = SYNC if self._ddp.require_backward_grad_sync else 0
        return gradients + sync + (BUFFERS if self._ddp._check_sync_bufs_pre_fwd() else 0)

    def forward(self, what: int) -> None:
        """A forward begins on this worker."""
        if what & GRADIENTS:
            self._is_armed |= bool(what & SYNC)
            self._is_quiet |= not what & SYNC

    def say_absent(self, has_absent: bool) -> None:
        """Have DDP take buffers from a worker that has data, or from rank 0 as usual."""
        self._ddp._join_config = self._ddp._join_config._replace(enable=has_absent)

    def match_forward(self, what: int) -> None:
        """Take part in what DDP exchanges in a forward of the others."""
        self.wait()
        if what & GRADIENTS:
            self._ddp.reducer._rebuild_buckets()
        self._ddp.require_forward_param_sync = bool(what & BUFFERS)
        self._ddp._check_and_sync_module_buffers()
        self._ddp._check_global_requires_backward_grad_sync(is_joined_rank=True)
        self._ddp.require_forward_param_sync = what & (GRADIENTS | SYNC) == GRADIENTS | SYNC

    def match_reduction(self) -> None:
        """Begin to take part in a reduction of the others: with zeros, or what this worker had not
        yet given.
        """
        self.wait()
        reducer = self._ddp.reducer
        for bucket in reducer._get_zeros_like_grad_buckets():
            if self._has_own:
                self._fill(bucket)
            self._under_way.append((reducer._run_comm_hook(bucket), bucket))
        self._has_own = self._is_quiet = self._is_armed = False
        if self.is_known_late:
            # It holds what was used some time before.
            used = reducer._get_local_used_map().zero_()
            self._under_way.append((self._group.allreduce(used), used))
        reducer._push_all_rebuilt_params()

    def wait(self) -> None:
        """For the reduction that this worker takes part in."""
        for work, _ in self._under_way:
            work.wait()
        self._under_way.clear()

    def hand_over(self, is_giver: bool) -> None:
        """Give all workers the parameters of one, and the buffers that DDP broadcasts."""
        self._ddp.join_hook().post_hook(is_giver)

    def _fill(self, bucket: Any) -> None:
        # A hook of the user's divides by the number of workers itself.
        divisor = 1 if self._ddp._comm_hooks else self._group.size()
        for view, parameter in zip(bucket.gradients(), bucket.parameters(), strict=True):
            if parameter.grad is not None:
                view.copy_(parameter.grad).div_(divisor)

    def _watch(self, number: int, parameter: Tensor) -> Any:
        def arrive(grad: Tensor) -> Tensor | None:
            task = torch._C._current_graph_task_id()
            if task != self._task:
                self._task = task
                self._start_backward()
            if number not in self._left:
                return None
            self._left.discard(number)
            return None if parameter.grad is None else grad + parameter.grad * self._factor

        requires_grad = parameter.requires_grad
        # A network that is frozen for now (the critic of a GAN) takes a hook all the same.
        handle = parameter.requires_grad_().register_hook(arrive)
        parameter.requires_grad_(requires_grad)
        return handle

    def _start_backward(self) -> None:
        """The first gradient of a backward pass is there, not yet added to what was accumulated."""
        if self._is_armed:
            # What earlier reductions have left is the same on all workers that have data. DDP sums
            # it over these, and divides by the number of all.
            self._factor = 0.0 if self._has_own else self._share() - 1.0
            self._left = set(range(len(self._handles))) if self._factor else set()
            self._is_armed = self._is_quiet = self._has_own = False
            self._begin()
        elif self._is_quiet:
            self._has_own = True
