"""The order of an epoch's samples by regime: which labels meet in a step, and in a part of it.

Let o be the order of (seed, epoch), `syncnorm.placement.epoch_order`, and let a step have B samples
in P parts, which are its neighbouring samples: B/P each, in the last step of an epoch, of r samples,
nearly r/P. Each order has every sample of the training set once, and the labels' numbers of
samples need not be equal.

    iid             o itself.
    label_groups    A part holds k labels, B/(P k) samples of each. Each label's samples, by o, are
                    cut into blocks of B/(P k). A part takes the first k blocks of different labels,
                    a block's place being that of its first sample in o. What is left once fewer
                    than k labels have a block comes last, by o. (Ioffe 2017, arXiv:1702.03275,
                    takes 16 labels, 2 samples of each.)
    sharded_labels  Part p of every step is taken, by o, from shard p of the training set. Shards
                    are cut from the samples in order of their labels, then of their numbers, so a
                    shard has few labels, and the same ones for good. They have as many samples as
                    their part has in an epoch. (McMahan et al. 2017, arXiv:1602.05629, cut shards
                    so, and give two to each worker.)
    drift           Labels arrive and leave in their order: of C labels the samples of number c are
                    spread over that half of an epoch which begins at c/(C - 1) of the first half.
                    A sample's key is c/(C - 1) + (its place in o)/N, and the smallest comes first.

Parts are parts of the step, not workers: an order depends on (seed, epoch), the labels and the
configuration alone. P workers have one part each; of fewer, if their number is a divisor of P, each
has several, and of a multiple of P workers several share one.
"""

from heapq import heapify, heappop, heappush

import torch
from torch import Tensor

from syncnorm.errors import ConfigError
from syncnorm.placement import epoch_order, shard, size
from syncnorm.train.config.schema import Config
from syncnorm.train.data.feed import TRAIN, Feed


def training_order(config: Config, feed: Feed, epoch: int) -> Tensor:
    """Order the training set for an epoch: (N,), int64, on the CPU. Alike on all workers."""
    order = epoch_order(feed.sizes[TRAIN], config.train.seed, epoch)
    labels, batch, parts = feed.labels, config.train.global_batch, config.parts
    if config.data.regime == "iid":
        return order
    assert labels is not None
    if config.data.regime == "drift":
        return drifting(order, labels)
    if config.data.regime == "sharded_labels":
        return sharded(order, labels, batch, parts)
    assert config.data.part_labels is not None
    return grouped(order, labels, batch // parts, config.data.part_labels)


def check_regime(config: Config, feed: Feed) -> None:
    """Check that the training set has the labels that its regime needs.

    Raises:
        ConfigError: labels are not known, or are too few; on all workers.
    """
    regime, wanted = config.data.regime, config.data.part_labels or 1
    if regime == "iid":
        return
    if feed.labels is None:
        raise ConfigError(
            f"`data.regime` must be iid where labels are not known before samples are read, got "
            f"{regime}. A data set of yours gives them as Splits(..., labels=...), whole numbers, "
            "one for each training sample."
        )
    count = len(feed.labels.unique())
    if wanted > count:
        raise ConfigError(
            f"`data.part_labels` must be at most the number of labels in the training set, {count}, "
            f"got {wanted}"
        )


def grouped(order: Tensor, labels: Tensor, group: int, group_labels: int) -> Tensor:
    """Order samples so that each `group` of them holds `group_labels` labels, equally often.

    Args:
        order: (N,), a permutation.
        labels: (N,), of sample 0 to N - 1.
        group: samples in a group, a multiple of `group_labels`.
        group_labels: labels in a group.
    """
    length = group // group_labels
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    of_labels = [order[labels[order] == label] for label in labels.unique()]
    blocks = [mine[: len(mine) // length * length].view(-1, length) for mine in of_labels]
    # Of each label its blocks, the first one last, to be taken from the end.
    left = [list(zip(places[some[:, 0]].tolist(), some.tolist()))[::-1] for some in blocks]
    heads = [(some[-1][0], label) for label, some in enumerate(left) if some]
    heapify(heads)
    taken: list[int] = []
    while len(heads) >= group_labels:
        chosen = [heappop(heads)[1] for _ in range(group_labels)]
        for label in chosen:
            taken += left[label].pop()[1]
            if left[label]:
                heappush(heads, (left[label][-1][0], label))
    is_left = torch.ones(len(order), dtype=torch.bool)
    first = torch.tensor(taken, dtype=order.dtype)
    is_left[first] = False
    return torch.cat([first, order[is_left[order]]])


def sharded(order: Tensor, labels: Tensor, batch: int, parts: int) -> Tensor:
    """Order samples so that each part of a step of `batch` is from its own shard, by labels.

    Args:
        order: (N,), a permutation.
        labels: (N,), of sample 0 to N - 1.
        batch: samples in a step, a multiple of `parts`.
        parts: of a step.
    """
    (steps, rest), part_size = divmod(len(order), batch), batch // parts
    last = [size(shard(rest, part, parts)) for part in range(parts)]
    sizes = torch.tensor([steps * part_size + each for each in last])
    owner = torch.empty_like(order)
    owner[labels.argsort(stable=True)] = torch.arange(parts).repeat_interleave(sizes)
    mine = [order[owner[order] == part] for part in range(parts)]
    whole = [some[: steps * part_size].view(steps, part_size) for some in mine]
    ends = [some[steps * part_size :] for some in mine]
    return torch.cat([torch.cat(whole, 1).flatten(), *ends])


def drifting(order: Tensor, labels: Tensor) -> Tensor:
    """Order samples so that labels arrive one after the other, each over half of the whole.

    Args:
        order: (N,), a permutation.
        labels: (N,), of sample 0 to N - 1.
    """
    kinds, number = labels.unique(return_inverse=True)
    arrival = number.double() / max(1, len(kinds) - 1)
    places = torch.arange(len(order), dtype=torch.float64)
    return order[(arrival[order] + places / len(order)).argsort(stable=True)]
