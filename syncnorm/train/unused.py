"""Parameters without a part in the loss of a step, which are left as they are.

DistributedDataParallel sums when each parameter has a gradient, on each worker. Where some may get
none it can look for them (`find_unused_parameters`): in each step it goes through autograd's graph,
marks each parameter and sends one more message. Here a worker looks after the backward pass which
gradients that has left as they were, and the workers' notes say whether there are any.
"""

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from syncnorm import undocumented
from syncnorm.comm import exchange, groups
from syncnorm.errors import ConfigError, join_first


class Gradients:
    """The gradients that DistributedDataParallel sums, some of which may be missing.

    *Collectives*: where it is made, a sum of all gradients and a broadcast of their arrangement;
    every worker must make it.

    Args:
        ddp: not called yet.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        ignored = undocumented.ignored_by_ddp(ddp.module)
        self._parameters = [
            p
            for name, p in ddp.module.named_parameters()
            if p.requires_grad and name not in ignored
        ]
        # Neither DDP nor the optimizer knows these.
        self._frozen = {n: p for n, p in ddp.module.named_parameters() if not p.requires_grad}
        self._before: list[tuple[Tensor | None, int]] = []
        self._unused: list[int] = []
        # DDP refuses zeros for a gradient that is to be sparse.
        if not any(getattr(module, "sparse", False) for module in ddp.module.modules()):
            undocumented.arrange_buckets(ddp, self._parameters)

    def begin(self) -> None:
        """Note the gradients before the backward pass in which DDP sums them.

        Raises:
            ConfigError: a parameter that was frozen when the run began is not any more.
        """
        if thawed := [name for name, p in self._frozen.items() if p.requires_grad]:
            raise ConfigError(
                "`model` must have all parameters that are ever trained as ones that require a "
                f"gradient when it is made, got some that do so later: {join_first(thawed, 3)}. "
                "To train them later, freeze them in a callback's `on_start`."
            )
        self._before = [(p.grad, _version(p.grad)) for p in self._parameters]

    def complete(self) -> bool:
        """Give zeros for the gradients that the backward pass has not come to: then DDP sums.

        Returns:
            True if this worker has not used some parameter in any forward of the step.
        """
        missing = [
            number
            for number, (p, before) in enumerate(zip(self._parameters, self._before, strict=True))
            if (grad := p.grad) is before[0] and _version(grad) == before[1]
        ]
        self._unused = [number for number in missing if self._before[number][0] is None]
        for number in missing:
            parameter = self._parameters[number]
            requires_grad = parameter.requires_grad  # it may have been frozen since
            torch.autograd.backward(parameter.requires_grad_(), torch.zeros_like(parameter))
            parameter.requires_grad_(requires_grad)
        return bool(self._unused)

    def drop_unused(self) -> None:
        """Take away the gradients of parameters that no worker has used.

        *Collectives*: one sum; every worker must call.
        """
        used = torch.ones(len(self._parameters), dtype=torch.float64)
        used[self._unused] = 0
        used = used.to(self._parameters[0].device)
        users = exchange.sum_(used, groups.statistics_group(), "used parameters").tolist()
        for parameter, number in zip(self._parameters, users, strict=True):
            if not number:
                parameter.grad = None


def _version(grad: Tensor | None) -> int:
    return -1 if grad is None else grad._version
