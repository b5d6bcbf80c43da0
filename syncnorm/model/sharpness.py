"""Sharpness-aware minimisation round any optimizer, by default of normalisation parameters only."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from syncnorm.errors import InputError
from syncnorm.model.frozen import frozen_statistics
from syncnorm.model.modes import kept
from syncnorm.model.norm_parameters import norm_parameters


class SAM:
    """Steps along the gradient that a model has a little uphill of where it is.

        g = gradient of the loss at w
        e = rho g / ||g||            for the parameters that are perturbed, 0 for the others
        w <- w + step of the optimizer by the gradient at w + e

    *Statistics*: running statistics follow the forward at w; that at w + e is made within
    `frozen_statistics`.

    *Collectives*: those of the two forwards and backwards, none of its own. The norm is that of the
    gradients as the closure leaves them: DistributedDataParallel has averaged them, so all workers
    perturb alike.

    It has no state: schedulers, checkpoints and `join` take the optimizer itself. A norm that is 0
    or not finite perturbs nothing.

    Args:
        optimizer: any that steps without a closure.
        model: the one that is trained, also wrapped by DistributedDataParallel.
        rho: the length of e, >= 0.
        parameters: those to perturb; None: those of normalisation layers (see `norm_parameters`).
            `model.parameters()` is the original method.

    Raises:
        InputError: an argument breaks its rule.

    Example:
        >>> from syncnorm import SyncBatchNorm
        >>> model, x = nn.Sequential(nn.Linear(3, 2), SyncBatchNorm(2)), torch.randn(8, 3)
        >>> sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.05)
        >>> def closure():
        ...     loss = model(x).square().sum()
        ...     loss.backward()
        ...     return loss
        >>> loss = sam.step(closure)

    References:
        Mueller et al., Normalization Layers Are All That Sharpness-Aware Minimization Needs,
        arXiv:2306.04226 (SAM-ON; the norm is over the perturbed parameters); Foret et al.,
        arXiv:2010.01412, equation 2. Deviation: no small number is added to the norm.
    """

    model: nn.Module
    optimizer: Optimizer
    rho: float
    parameters: list[nn.Parameter]

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        rho: float = 0.05,
        parameters: Iterable[nn.Parameter] | None = None,
    ) -> None:
        if not 0 <= rho < math.inf:
            raise InputError(f"`rho` must be finite and >= 0, got {rho}. It is a length.")
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise InputError(
                f"`optimizer` must step without a closure, got {type(optimizer).__name__}, which "
                "would evaluate the loss in places of its own. Use it without SAM."
            )
        chosen = norm_parameters(model).values() if parameters is None else parameters
        self.optimizer, self.model, self.rho = optimizer, model, rho
        # A parameter that several layers share once: it moves once.
        self.parameters = [*dict.fromkeys(chosen)]
        if not self.parameters:
            raise InputError(
                "`parameters` must hold a parameter to perturb, got none. Without normalisation "
                "layers that learn give model.parameters()."
            )

    def step(self, closure: Callable[[], Tensor], scaler: GradScaler | None = None) -> Tensor:
        """Take one step; gradients are cleared before each call of the closure, and at the end.

        Args:
            closure: makes the whole gradient of a step by forwards and backwards, and returns the
                loss. It is called twice and must do the same both times, such as go over all
                micro-batches (in `accumulate`).
            scaler: the one by which the closure scales its loss; it then takes the step.
                `scaler.update()` is the caller's.

        Returns:
            What the closure returned at w.

        Raises:
            InputError: there are gradients of before, or the closure leaves none to perturb by.
        """
        if any(p.grad is not None for p in self._all()):
            raise InputError(
                "`closure` must make the whole gradient of a step, got gradients that were there "
                "before. Accumulate within the closure, or call model.zero_grad() before: the optimizer may "
                "not have all parameters."
            )
        with torch.enable_grad():
            loss = closure()
        with frozen_statistics(self.model), self._perturbed(), torch.enable_grad():
            self._clear()
            closure()
        self.optimizer.step() if scaler is None else scaler.step(self.optimizer)
        self._clear()
        return loss

    @contextmanager
    def _perturbed(self) -> Iterator[None]:
        """Be at w + e within the block, then at w to the bit."""
        moved = {p: p.grad for p in self.parameters if p.grad is not None}
        if not moved:
            raise InputError(
                "`closure` must call backward, got no gradient of a parameter to perturb. Give "
                "parameters that have a part in the loss."
            )
        norm = get_total_norm([*moved.values()])
        factor = torch.where(norm.isfinite() & (norm > 0), self.rho / norm, 0.0)
        with kept({parameter: parameter for parameter in moved}):
            with torch.no_grad():
                for parameter, gradient in moved.items():
                    # Not multiplied where nothing moves: 0 times infinity.
                    parameter.add_(torch.where(factor > 0, gradient * factor, 0.0))
            yield

    def _all(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def _clear(self) -> None:
        for parameter in self._all():
            parameter.grad = None
