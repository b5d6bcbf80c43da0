"""What a classifier makes of a test set at the end: a confusion matrix, and a few samples."""

import base64
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from syncnorm.model.modes import evaluating
from syncnorm.placement import shard
from syncnorm.train.buffers import SharedBuffers
from syncnorm.train.data.batches import ReadFailure
from syncnorm.train.data.feed import Feed
from syncnorm.train.report.predictions import MOST_CLASSES, MOST_PAIRS, SHOWN_RIGHT, SHOWN_WRONG
from syncnorm.train.setup import Setup
from syncnorm.train.task.supervised import Classify, pair_of
from syncnorm.train.waiting import from_all

# So that its time does not grow with the set, nor the record with classes and images.
_MOST_SAMPLES, _MOST_AT_ONCE = 8192, 64
_MOST_PIXELS = 32


@torch.no_grad()
def collect_predictions(
    setup: Setup, feed: Feed, split: str, alive: Callable[[], object]
) -> dict[str, Any] | None:
    """Compare predictions with classes, over up to 8192 samples, the first of the split.

    *Collectives*: one gathering, and those of shared buffers; every worker must call.

    Returns:
        `confusion`, the rows of the matrix by true class, for up to 32 classes; for more `confused`,
        the most frequent mistakes as (class, prediction, count); and `samples`, more of those that
        are wrong than of others. None for other tasks, or where samples cannot be read.
    """
    if not isinstance(setup.task, Classify):
        return None
    workers = setup.workers
    mine = shard(min(feed.sizes[split], _MOST_SAMPLES), workers.rank, workers.world_size)
    indices = torch.arange(mine.start, mine.stop, device=feed.index_device)
    found = _judge(setup, feed, split, indices, alive)
    # As after any evaluation: the forwards may have changed some.
    SharedBuffers(setup.evaluated_model).broadcast(are_alike=False)
    everyone: list[Any] = from_all(found)
    if any(each is None for each in everyone):
        return None
    pairs: Counter[tuple[int, int]] = Counter()
    for counts, _, _ in everyone:
        pairs.update(counts)
    wrong = [one for _, shown, _ in everyone for one in shown if one["class"] != one["predicted"]]
    right = [one for _, shown, _ in everyone for one in shown if one["class"] == one["predicted"]]
    classes = max(size for _, _, size in everyone)
    return {
        "split": split,
        "count": sum(pairs.values()),
        **_describe_confusion(pairs, classes),
        "samples": wrong[:SHOWN_WRONG] + right[:SHOWN_RIGHT],
    }


def _judge(
    setup: Setup, feed: Feed, split: str, indices: Tensor, alive: Callable[[], object]
) -> Any:
    """Predict this worker's samples: how often which for which, some samples, the classes."""
    counts: Counter[tuple[int, int]] = Counter()
    shown: list[dict[str, Any]] = []
    left, classes = {True: SHOWN_RIGHT, False: SHOWN_WRONG}, 0
    model, task = setup.evaluated_model, setup.task
    assert isinstance(task, Classify)
    with evaluating(model), setup.autocast():
        for batch in feed.batches(split, indices.split(_MOST_AT_ONCE) if len(indices) else ()):
            if isinstance(batch, ReadFailure):
                return None
            alive()
            inputs, targets = pair_of(batch)
            shares = task.read(task.outputs(model, inputs, targets))  # (N, K)
            sureness, predicted = (each.tolist() for each in shares.max(1))
            true = (targets if targets.ndim == 1 else targets.argmax(1)).tolist()
            counts.update(zip(true, predicted, strict=True))
            classes = shares.shape[1]
            for index, pair in enumerate(zip(true, predicted, strict=True)):
                is_right = pair[0] == pair[1]
                if left[is_right]:
                    left[is_right] -= 1
                    shown.append(_sample(inputs, index, *pair, sureness[index]))
    return counts, shown, classes


def _sample(inputs: Any, index: int, true: int, predicted: int, sure: float) -> dict[str, Any]:
    sample = {"class": true, "predicted": predicted, "share": round(sure, 4)}
    image = _image(inputs[index]) if isinstance(inputs, Tensor) else None
    return sample if image is None else {**sample, "image": image}


def _describe_confusion(pairs: Counter[tuple[int, int]], classes: int) -> dict[str, Any]:
    if classes <= MOST_CLASSES:
        rows = range(classes)
        return {"confusion": [[pairs[true, found] for found in rows] for true in rows]}
    wrong = Counter({pair: count for pair, count in pairs.items() if pair[0] != pair[1]})
    return {"confused": [[*pair, count] for pair, count in wrong.most_common(MOST_PAIRS)]}


def _image(pixels: Tensor) -> str | None:
    """Encode an image (C, H, W) of 1 or 3 channels as a small PNG, from its darkest to brightest."""
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or not pixels.numel():
        return None
    pixels = pixels.float().cpu()
    if max(pixels.shape[1:]) > _MOST_PIXELS:
        scale = _MOST_PIXELS / max(pixels.shape[1:])
        height, width = (max(1, round(scale * side)) for side in pixels.shape[1:])
        pixels = F.adaptive_avg_pool2d(pixels[None], (height, width))[0]
    low, high = pixels.aminmax()
    bytes_ = ((pixels - low) / (high - low).clamp(min=1e-12) * 255).nan_to_num().byte()
    return f"data:image/png;base64,{base64.b64encode(_png(bytes_)).decode()}"


def _png(pixels: Tensor) -> bytes:
    """Encode (C, H, W) of bytes, grey or colours, as PNG."""
    channels, height, width = pixels.shape
    rows = pixels.permute(1, 2, 0).reshape(height, -1).numpy()  # (H, W * C)
    data = b"".join(b"\0" + row.tobytes() for row in rows)  # each row unfiltered
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(data, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
