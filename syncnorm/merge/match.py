"""Git Re-Basin's weight matching: the order of channels in which two networks' weights agree."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from syncnorm.errors import InputError
from syncnorm.merge.channels import Channels, Place, channels
from syncnorm.merge.interpolate import bare, check_alike

Orders = list[Tensor]
"""The channel of `b` that takes each place, for each set of channels."""


@torch.no_grad()
def match_weights(a: nn.Module, b: nn.Module) -> nn.Module:
    """Put the channels of `b` in the order in which its weights agree best with those of `a`.

        maximise <theta_a, pi(theta_b)> over pi

    `pi` permutes each set of channels in all tensors where it appears. The network computes what it
    did. Sets are gone through one after the other: with the others held, the best order is a linear
    assignment problem. This goes on in random order until none gets better.

    Networks may be made of convolutions, linear layers, normalisation layers, activations, pools,
    flattening and sums; a sum makes its terms' channels one set, as in residual networks. Buffers
    such as running statistics are permuted, too. Linear layers are taken to get (N, C): nothing in
    a network tells a batch norm over tokens, (N, L, D), from one over as many features.

    *Collectives*: none. Where `a` and `b` are equal on all workers, so is the result.

    Args:
        a: stays as it is.
        b: of the same architecture; stays as it is.

    Returns:
        A copy of `b`, permuted.

    Raises:
        InputError: the networks differ in architecture, cannot be traced, hold something that is
            not understood, weights are not finite, or scipy is not installed.

    References:
        Ainsworth et al., Git Re-Basin, arXiv:2209.04836, section 3.2 and algorithm 1. Deviations:
        the first sweep goes from the input to the output and leaves out the tensors whose other
        channels are not in order yet, where the paper begins with the order that `b` happens to
        have; and an order is taken only if the objective grows, so that a set that is on both axes
        of one tensor cannot go in circles.
    """
    a, b = bare(a), bare(b)
    check_alike(a, b)
    sets = channels(b)
    return permute(b, sets, _orders(dict(a.named_parameters()), dict(b.named_parameters()), sets))


@torch.no_grad()
def permute(model: nn.Module, sets: list[Channels], orders: Orders) -> nn.Module:
    """Copy a network with its channels in other orders."""
    permuted = copy.deepcopy(model)
    tensors = dict(permuted.named_parameters()) | dict(permuted.named_buffers())
    for each, order in zip(sets, orders, strict=True):
        for place in each.places:
            tensor = tensors[place.tensor]
            tensor.copy_(_reordered(tensor, place, order))
    return permuted


def _orders(a: dict[str, Tensor], b: dict[str, Tensor], sets: list[Channels]) -> Orders:
    """Find the orders by coordinate descent."""
    matching = _Matching(a, b, sets)
    for number in range(len(sets)):
        matching.improve(number, is_first=True)
    # The same order on all workers.
    generator = torch.Generator().manual_seed(0)
    is_moving = True
    while is_moving:
        is_moving = False
        for number in torch.randperm(len(sets), generator=generator).tolist():
            is_moving |= matching.improve(number)
    return matching.orders


class _Matching:
    """Orders that get better one set of channels at a time."""

    def __init__(self, a: dict[str, Tensor], b: dict[str, Tensor], sets: list[Channels]) -> None:
        self.sets = sets
        self.orders = [torch.arange(each.size, device="cpu") for each in sets]
        self.is_done = [False] * len(sets)
        names = {place.tensor for each in sets for place in each.places}
        self.a = {name: each.double() for name, each in a.items() if name in names}
        self.b = {name: b[name].double() for name in self.a}
        for network, weights in (("a", self.a), ("b", self.b)):
            for name, each in weights.items():
                if not each.isfinite().all():
                    raise InputError(
                        f"`{network}` must have finite weights, got NaN or infinity in {name!r}. Take "
                        "an earlier checkpoint."
                    )
        self.on: dict[str, list[tuple[int, Place]]] = {name: [] for name in self.a}
        for number, each in enumerate(sets):
            for place in each.places:
                if place.tensor in self.on:  # a parameter
                    self.on[place.tensor].append((number, place))

    def improve(self, number: int, is_first: bool = False) -> bool:
        """Find the best order of a set while the others are held; True if it is better.

        Args:
            number: of the set.
            is_first: leave out what depends on sets that have no order yet, and take what is best.
        """
        size = self.sets[number].size
        similarity = self.orders[number].new_zeros((size, size), dtype=torch.float64)
        for place in self.sets[number].places:
            if place.tensor not in self.on:
                continue
            others = [on for on in self.on[place.tensor] if on[1] != place]
            if is_first and not all(self.is_done[other] for other, _ in others):
                continue
            rest = self.b[place.tensor]
            for other, where in others:
                rest = _reordered(rest, where, self.orders[other])
            similarity += (
                _rows(self.a[place.tensor], place, size) @ _rows(rest, place, size).T
            ).cpu()
        self.is_done[number] = True
        order = _assignment(similarity)
        if is_first:
            self.orders[number] = order
            return True
        before, old = self.agreement(number), self.orders[number]
        self.orders[number] = order
        if self.agreement(number) > before + 1e-12 * abs(before):
            return True
        self.orders[number] = old
        return False

    def agreement(self, number: int) -> float:
        """The inner product of all tensors in which a set appears."""
        total = 0.0
        # In one order: sums of other orders differ in their last bits.
        for name in dict.fromkeys(place.tensor for place in self.sets[number].places):
            if name not in self.on:
                continue
            moved = self.b[name]
            for other, place in self.on[name]:
                moved = _reordered(moved, place, self.orders[other])
            total += (self.a[name] * moved).sum().item()
        return total


def _assignment(similarity: Tensor) -> Tensor:
    """The column for each row with which the sum is largest, each column once."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise InputError(
            "`match_weights` needs scipy. Install it with: pip install 'syncnorm[merge]'"
        ) from None
    _, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
    return torch.from_numpy(columns).long()


def _reordered(tensor: Tensor, place: Place, order: Tensor) -> Tensor:
    """Reorder one axis of a tensor by blocks."""
    block = torch.arange(place.block, device="cpu")
    index = (order[:, None] * place.block + block).flatten()
    return tensor.index_select(place.axis, index.to(tensor.device))


def _rows(tensor: Tensor, place: Place, size: int) -> Tensor:
    """A row of all numbers for each channel, (size, rest)."""
    return tensor.movedim(place.axis, 0).reshape(size, -1)
