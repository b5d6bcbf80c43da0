"""Batches of any shape: made, emptied, moved to a device; and what cannot be a batch."""

import collections
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from syncnorm.train.data.batches import Collate, ReadFailure, as_tensors, empty_like, to_device

CPU = torch.device("cpu")


class Pair(NamedTuple):
    inputs: Tensor
    targets: Tensor


@dataclass
class Boxes:
    boxes: list[Tensor]
    scale: Tensor


class Movable:
    """An object that moves itself, and is no container."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def to(self, device: torch.device) -> "Movable":
        return Movable(str(device))


def one_sample() -> dict[str, Any]:
    return {
        "pair": Pair(torch.ones(1, 3), torch.tensor([7])),
        "several": (torch.ones(1, 2), torch.ones(1)),
        "ragged": [torch.ones(5, 4)],
        "names": ("a.png",),
        "boxes": Boxes([torch.ones(2, 4)], torch.tensor(0.5)),
        "kind": "train",
    }


def test_a_batch_of_one_sample_becomes_one_of_none():
    empty = empty_like(one_sample())
    assert isinstance(empty["pair"], Pair)
    assert [tensor.shape for tensor in empty["pair"]] == [(0, 3), (0,)]
    assert [tensor.shape for tensor in empty["several"]] == [(0, 2), (0,)]
    assert empty["ragged"] == []
    assert empty["names"] == ()
    assert empty["boxes"].boxes == []
    assert empty["boxes"].scale == 0.5  # of the batch, not of a sample
    assert empty["kind"] == "train"


def test_floating_tensors_take_the_dtype_and_others_keep_theirs():
    moved = to_device(one_sample(), CPU, torch.float64)
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].inputs.dtype == torch.float64
    assert moved["pair"].targets.dtype == torch.int64
    assert moved["ragged"][0].dtype == moved["boxes"].boxes[0].dtype == torch.float64
    assert moved["names"] == ("a.png",)


def test_every_container_is_moved():
    batch = collections.OrderedDict(a=torch.ones(1), b=[(torch.ones(2), Movable())])
    with_default = collections.defaultdict(list, a=torch.ones(1))
    moved = to_device([batch, with_default], torch.device("meta"), torch.float32)
    assert moved[0]["a"].is_meta
    assert moved[0]["b"][0][0].is_meta
    assert moved[0]["b"][0][1].device == "meta"
    assert moved[1]["a"].is_meta
    assert moved[1]["not there"] == []
    assert not batch["a"].is_meta


def test_arrays_become_tensors():
    own = Collate(lambda samples: {"x": np.stack(samples), "n": len(samples)})
    batch = own([np.zeros(3, "f4"), np.ones(3, "f4")])
    assert torch.equal(batch["x"], torch.tensor([[0.0] * 3, [1.0] * 3]))
    assert batch["n"] == 2
    assert isinstance(Collate()([np.zeros(2)]), Tensor)
    assert as_tensors("text") == "text"


def message(samples: list[Any], collate: Any = None) -> str:
    failed = Collate(collate)(samples)
    assert isinstance(failed, ReadFailure)
    assert failed.message.startswith("`data.name` must give samples that make a batch: ")
    return failed.message


def test_samples_of_different_shapes_are_named():
    text = message([(torch.ones(3, 4), 0), (torch.ones(3, 4), 1), (torch.ones(2, 4), 1)])
    assert "Sample 0 of the batch has the shapes [(3, 4)], sample 2 [(2, 4)]" in text
    assert "Splits(..., collate=...)" in text


def test_an_image_of_pillows_is_told_what_to_become():
    image = pytest.importorskip("PIL.Image").new("RGB", (2, 2))
    assert "An image of PIL must become a tensor in your data set" in message([(image, 0)])


def test_other_samples_need_a_collate():
    assert "A collate of yours, Splits(..., collate=...), takes" in message([None, None])


def test_an_error_in_the_users_collate_is_named():
    def collate(samples: Any) -> Any:
        return samples[5]

    assert message([1, 2], collate).endswith("IndexError: list index out of range.")


def test_a_sample_that_failed_fails_the_batch():
    assert Collate()([1, ReadFailure("sample 3 failed"), 2]) == ReadFailure("sample 3 failed")
