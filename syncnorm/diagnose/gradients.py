"""The gradient by depth, effective learning rates, and the angle of weights and gradients."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm.diagnose.observe import listening, watched
from syncnorm.diagnose.problem import Problem, norm
from syncnorm.model.makers import Makers
from syncnorm.module import SyncNorm

_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd)


def measure_gradients(problem: Problem) -> dict[str, Any]:
    """Measure the gradient of each convolution and linear layer, in the order of construction.

        activation   = sqrt(sum over samples of ||d loss_i / d output||^2 / samples)
        gradient     = ||d loss / d W||            weight = ||W||
        update_ratio = lr gradient / weight        effective_lr = lr / weight^2
        cosine       = <W, d loss / d W> / (weight gradient)
        slope        = least-squares slope of log2(activation) by layer, towards the output

    d loss_i is the gradient of a sample's loss, in a loss that is a sum over samples. The cosine is
    0 for weights straight in front of batch norms alone, which do not see their length (but for
    eps): `is_invariant` says for which ones that should hold.

    *Collectives*: those of a gradient over all batches, and one sum of 3 numbers per layer; every
    worker must call.

    Returns:
        "norm" of the whole gradient, "loss", "slope", "ratio" of activation first to last, "layers".

    References:
        van Laarhoven, L2 Regularization versus Batch and Weight Normalization, arXiv:1706.05350,
        for the effective learning rate; Yang et al., A Mean Field Theory of Batch Normalization,
        arXiv:1902.08129, for gradients that grow with depth.
    """
    layers = {n: m for n, m in problem.model.named_modules() if isinstance(m, _WEIGHTED)}
    squares = {name: problem.zeros(3) for name in layers}
    outputs = _Outputs(problem, squares)
    with outputs.watching(layers):
        loss, gradient = problem.gradient(problem.everything, outputs.count)
    pooled = problem.sum(torch.cat([*squares.values(), problem.zeros(1)]), "activation gradients")
    scale = math.fsum(max(each.values(), default=0.0) for each in problem.counts)
    samples = float(problem.sizes.sum())
    found: dict[str, dict[str, Any]] = {}
    for (name, layer), (square, number, normalised) in zip(
        layers.items(), pooled[:-1].view(-1, 3).tolist(), strict=True
    ):
        # Each sample's loss has the weight 1 / count.
        activation = scale * math.sqrt(square / samples) if samples else 0.0
        found[name] = {"activation": activation, "is_invariant": 0 < number == normalised}
        found[name] |= _weight(problem, layer, gradient.get(f"{name}.weight"))
    logs = [math.log2(e["activation"]) for e in found.values() if e["activation"] > 0]
    return {
        "norm": norm(gradient),
        "loss": loss,
        "slope": slope(logs),
        "ratio": 2 ** (logs[0] - logs[-1]) if logs and abs(logs[0] - logs[-1]) < 1000 else None,
        "layers": found,
    }


def _weight(problem: Problem, layer: Any, gradient: Tensor | None) -> dict[str, float | None]:
    if gradient is None:
        return dict.fromkeys(("gradient", "weight", "update_ratio", "effective_lr", "cosine"))
    weight = layer.weight.detach().double().to(gradient.device)
    size, length = float(gradient.norm()), float(weight.norm())
    product = float((weight * gradient).sum())
    return {
        "gradient": size,
        "weight": length,
        "update_ratio": problem.lr * size / length if length else None,
        "effective_lr": problem.lr / length**2 if length else None,
        "cosine": product / (size * length) if size * length else None,
    }


class _Outputs:
    """The layers' outputs in each forward, and what makes use of them.

    Args:
        problem: see there.
        squares: by layer, (3,), added to: the squares of its outputs' gradients, and the numbers of
            its outputs, of all, and of those of which nothing but batch norms makes use.
    """

    def __init__(self, problem: Problem, squares: dict[str, Tensor]) -> None:
        self._problem, self._squares = problem, squares
        self._norms = watched(problem.model)
        self._makers: Makers[str] = Makers()
        self._made: dict[Any, str] = {}
        """The nodes of autograd's graph that made outputs, each with its layer."""
        self._by_norms: Counter[Any] = Counter()
        """How many norms were given the output of such a node."""
        self._views: dict[Any, Any] = {}
        """Of the nodes of views that were given to norms, the one that made the output."""

    @contextmanager
    def watching(self, layers: dict[str, Any]) -> Iterator[None]:
        """Watch the outputs of layers; `count` is to be called with each loss before its backward."""
        with ExitStack() as stack:
            stack.enter_context(listening(self._problem.model, self._before_norm))
            for name, layer in layers.items():
                handle = layer.register_forward_hook(
                    lambda m, a, y, name=name: self._after(name, y)
                )
                stack.callback(handle.remove)
            yield

    def count(self, loss: Tensor) -> None:
        """Count the outputs that a loss makes use of, and forget them."""
        for node, uses in _uses(loss, self._made, self._views).items():
            squares = self._squares[self._made[node]]
            squares[1] += 1
            squares[2] += uses <= self._by_norms[node]
        for each in (self._made, self._views, self._by_norms):
            each.clear()

    def _after(self, name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: self._add(name, gradient))
            self._makers.note(output, name)
            if len(output):
                self._made[output.grad_fn] = name

    def _add(self, name: str, gradient: Tensor) -> None:
        self._squares[name][0] += (gradient.double() / self._problem.scale).square().sum()

    def _before_norm(self, name: str, x: Tensor, weights: Tensor) -> None:
        if self._makers.maker_of(x) is not None and _is_by_batch(self._norms[name]) and len(x):
            node, path = x.grad_fn, []
            while node is not None and node not in self._made:  # a view
                path.append(node)
                node = next((each for each, _ in node.next_functions), None)
            self._views.update(dict.fromkeys(path, node))
            self._by_norms[node] += 1


def _uses(loss: Tensor, made: Collection[Any], views: Mapping[Any, Any]) -> Counter[Any]:
    """Count how often each of these nodes of autograd's graph is made use of, if it is.

    A use of a view is one of its source; the view itself is none.
    """
    uses: Counter[Any] = Counter()
    rest, seen = [loss.grad_fn], {loss.grad_fn}
    while rest:
        node: Any = rest.pop()
        for each, _ in node.next_functions:
            used = each if each in made else views.get(each)
            uses[used] += used is not None and node not in views
            if each is not None and each not in seen:
                seen.add(each)
                rest.append(each)
    return Counter({node: number for node, number in uses.items() if number})


def _is_by_batch(layer: nn.Module) -> bool:
    """True for batch norms in training; not for layers that normalise by averages."""
    is_lagged = isinstance(layer, SyncNorm) and not layer.sync_mode.normalizes_by_batch
    return isinstance(layer, _BatchNorm) and layer.training and not is_lagged


def slope(values: list[float]) -> float | None:
    """Fit a line through (0, v0), (1, v1), ...; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    centre, mean = (n - 1) / 2, math.fsum(values) / n
    above = math.fsum((i - centre) * (v - mean) for i, v in enumerate(values))
    return above / math.fsum((i - centre) ** 2 for i in range(n))
