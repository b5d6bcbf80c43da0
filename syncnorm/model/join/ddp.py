"""Exchanges of DistributedDataParallel within `join`: detected with data, matched without.

DDP's own join assumes one reduction of the gradients for each forward. Here a reduction is
announced when it begins: several forwards may share one, and a forward may have none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from syncnorm import undocumented

GRADIENTS, SYNC, BUFFERS = 2, 4, 8
"""Flags of a forward: with gradients, outside of no_sync, DDP broadcasts buffers before it."""


class Reductions:
    """The exchanges of one DDP model.

    Args:
        ddp: the model.
        begin: called when a reduction of its gradients begins, in the backward pass.
        share: returns the number of all workers over the number of those that have data.
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
        self._had_no_sync = False
        """True if there was a forward within no_sync since the last reduction."""
        self._has_unsynced = False
        """True if this worker's gradients hold a part that was not reduced yet."""
        self._task = -1
        """autograd's number of the latest backward pass."""
        self._factor = 0.0
        """Weight of the gradients accumulated before, added to each new one."""
        self._missing: set[int] = set()
        """Parameters whose gradients the backward pass has not reached yet."""
        self._in_flight: list[Any] = []
        self._handles = [
            self._hook(i, p) for i, p in enumerate(ddp.parameters()) if p.is_floating_point()
        ]

    @property
    def is_known_late(self) -> bool:
        """True if a reduction may begin at different points of the workers' backward passes.

        With unused parameters the first gradient need not be the same on all of them.
        """
        return self._ddp.find_unused_parameters and not self._ddp.static_graph

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.set_has_absent(False)

    def flags(self) -> int:
        """The flags of the forward that now begins."""
        gradients = GRADIENTS if torch.is_grad_enabled() else 0
        sync = SYNC if self._ddp.require_backward_grad_sync else 0
        return gradients + sync + (BUFFERS if self._ddp._check_sync_bufs_pre_fwd() else 0)

    def forward(self, flags: int) -> None:
        """Note that a forward with these flags begins on this worker."""
        if flags & GRADIENTS:
            self._is_armed |= bool(flags & SYNC)
            self._had_no_sync |= not flags & SYNC

    def set_has_absent(self, has_absent: bool) -> None:
        """Have DDP broadcast buffers from a worker that has data, or from rank 0 as usual."""
        self._ddp._join_config = self._ddp._join_config._replace(enable=has_absent)

    def learns_graph(self, flags: int) -> bool:
        """True if a forward with these flags begins the step in which DDP learns a static graph."""
        is_step = flags & (GRADIENTS | SYNC) == GRADIENTS | SYNC
        return is_step and undocumented.is_before_static_graph(self._ddp)

    def match_forward(self, flags: int) -> None:
        """Make the exchanges of DDP in a forward of the others."""
        self.wait()
        if flags & GRADIENTS:
            self._ddp.reducer._rebuild_buckets()
        self._ddp.require_forward_param_sync = bool(flags & BUFFERS)
        self._ddp._check_and_sync_module_buffers()
        self._ddp._check_global_requires_backward_grad_sync(is_joined_rank=True)
        self._ddp.require_forward_param_sync = flags & (GRADIENTS | SYNC) == GRADIENTS | SYNC

    def match_reduction(self) -> None:
        """Start a reduction of the others, with this worker's unreduced gradients or zeros."""
        self.wait()
        reducer = self._ddp.reducer
        for bucket in reducer._get_zeros_like_grad_buckets():
            if self._has_unsynced:
                self._fill(bucket)
            self._in_flight.append((reducer._run_comm_hook(bucket), bucket))
        self._has_unsynced = self._had_no_sync = self._is_armed = False
        if self.is_known_late:
            # It holds the parameters used in an earlier step.
            used = reducer._get_local_used_map().zero_()
            self._in_flight.append((self._group.allreduce(used), used))
        reducer._push_all_rebuilt_params()

    def wait(self) -> None:
        """Wait for the reduction that `match_reduction` started."""
        for work, _ in self._in_flight:
            work.wait()
        self._in_flight.clear()

    def hand_over(self, is_giver: bool) -> None:
        """Broadcast the giver's parameters, and the buffers that DDP broadcasts."""
        self._ddp.join_hook().post_hook(is_giver)

    def _fill(self, bucket: Any) -> None:
        # A communication hook of the user's divides by the number of workers itself.
        divisor = 1 if self._ddp._comm_hooks else self._group.size()
        for view, parameter in zip(bucket.gradients(), bucket.parameters(), strict=True):
            if parameter.grad is not None:
                view.copy_(parameter.grad).div_(divisor)

    def _hook(self, number: int, parameter: Tensor) -> Any:
        def arrive(grad: Tensor) -> Tensor | None:
            task = undocumented.backward_pass()
            if task != self._task:
                self._task = task
                self._start_backward()
            if number not in self._missing:
                return None
            self._missing.discard(number)
            return None if parameter.grad is None else grad + parameter.grad * self._factor

        requires_grad = parameter.requires_grad
        # A parameter that is frozen for now (the critic of a GAN) needs a hook, too.
        handle = parameter.requires_grad_().register_hook(arrive)
        parameter.requires_grad_(requires_grad)
        return handle

    def _start_backward(self) -> None:
        """Handle the first gradient of a backward pass, before it is accumulated."""
        if self._is_armed:
            # The gradients of earlier reductions are the same on all workers that have data. DDP
            # sums them over these workers, and divides by the number of all.
            self._factor = 0.0 if self._has_unsynced else self._share() - 1.0
            self._missing = set(range(len(self._handles))) if self._factor else set()
            self._is_armed = self._had_no_sync = self._has_unsynced = False
            self._begin()
        elif self._had_no_sync:
            self._has_unsynced = True
