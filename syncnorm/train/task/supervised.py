"""Tasks whose batches are pairs of inputs and targets: losses of torch.nn, with their metrics."""

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from syncnorm.errors import ConfigError
from syncnorm.train.config.section import name_hint
from syncnorm.train.task import Model, Share
from syncnorm.train.task.meters import Meters

# Torch's mean of the first is over the targets, whose classes count by weight; of a row's over rows
# of targets; of a class's margin over samples; of others over each element.
_PER_TARGET = ("CrossEntropyLoss", "NLLLoss")
_PER_ROW = ("MultiLabelSoftMarginLoss",)
_PER_SAMPLE = ("MultiMarginLoss",)
# How they take what a model gives; others take it as it is.
_BY_SOFTMAX = (*_PER_TARGET, *_PER_SAMPLE)
_BY_SIGMOID = ("BCEWithLogitsLoss", "MultiLabelSoftMarginLoss", "SoftMarginLoss")
_DISTANCES = ("HuberLoss", "L1Loss", "MSELoss", "SmoothL1Loss")
_GIVEN_BY_TASK = {"reduction", "reduce", "size_average", "self", "args", "kwargs"}


class Supervised:
    """A task of inputs and targets, by a loss of torch.nn.

    Args:
        loss: name of one of `losses`; None: the task's own.
        options: arguments of the loss but for `reduction`; lists become tensors.

    Raises:
        ValueError: the loss is not known, or refuses the options.
    """

    best = "-loss"
    default_loss = ""
    losses: ClassVar[tuple[str, ...]] = ()
    """Losses of torch.nn that suit the task."""
    ignored: ClassVar[int | None] = None
    """The class of targets that do not count, unless `ignore_index` names another; None: none."""
    classes: int | None = None
    """Number of classes of the data; None if it is not known."""
    meters: Meters | None = None
    """Metrics of torchmetrics, besides."""
    weights: Mapping[str, int] = MappingProxyType({})
    """The options that are lists, with the number of outputs that each has a weight for."""

    def __init__(self, loss: str | None = None, **options: Any) -> None:
        self.criterion: Any = make_criterion(
            self.default_loss if loss is None else loss, options, self.losses
        )
        listed = [name for name, given in options.items() if isinstance(given, list)]
        self.weights = {name: getattr(self.criterion, name).shape[-1] for name in listed}

    def loss(self, model: Model, batch: Any) -> tuple[Tensor, Tensor | int]:
        """Compute the sum of the losses of a batch and their count."""
        inputs, targets = pair_of(batch)
        outputs = self.outputs(model, inputs, targets)
        return self.total(outputs, targets), self.count(targets)

    def metrics(self, model: Model, batch: Any) -> dict[str, Share]:
        """Compute the loss, and what a subclass measures besides."""
        inputs, targets = pair_of(batch)
        outputs = self.outputs(model, inputs, targets)
        if self.meters is not None:
            self.meters.update(self.read(outputs), self.labels(targets))
        loss = self.total(outputs, targets), self.count(targets)
        return {**self.measure(outputs, targets), "loss": loss}

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the sum of the losses."""
        return self.criterion(outputs, targets)

    def read(self, outputs: Tensor) -> Tensor:
        """Make of outputs what the loss takes them for: probabilities, or values like targets."""
        outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
        name = type(self.criterion).__name__
        if name in _BY_SOFTMAX:
            return outputs.softmax(1)
        if name in _BY_SIGMOID:
            return outputs.sigmoid()
        is_logarithm = name == "PoissonNLLLoss" and self.criterion.log_input
        return outputs.exp() if is_logarithm else outputs

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Share]:
        """Compute the task's own metrics."""
        return {}

    def labels(self, targets: Tensor) -> Tensor:
        """Convert targets to what torchmetrics takes."""
        return targets

    def outputs(self, model: Model, inputs: Any, targets: Tensor) -> Tensor:
        """Call the model, and refuse outputs that the loss would misread or fail on."""
        outputs = self.fit(call(model, inputs), targets)
        self.check(outputs, targets)
        for name, number in self.weights.items():
            is_of_classes = type(self.criterion).__name__ in _BY_SOFTMAX
            wanted = outputs.shape[1 if is_of_classes else -1]
            # One weight for all is torch's to broadcast, but not over classes.
            if number != wanted and (is_of_classes or number != 1):
                raise ConfigError(
                    f"`task.options.{name}` must hold a number for each of {wanted} outputs, got "
                    f"{number}"
                )
        return outputs

    def fit(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Give outputs the shape that the loss takes."""
        return outputs

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse outputs whose shape is not that of the targets: torch would broadcast them."""
        if outputs.shape != targets.shape:
            raise ConfigError(
                f"`model.name` must give outputs in the shape of the targets {_shape(targets)}, "
                f"got {_shape(outputs)}. The loss compares them one by one."
            )
        if not targets.is_floating_point():
            raise ConfigError(
                f"`data.name` must give floating targets for task.loss "
                f"{type(self.criterion).__name__}, got whole numbers or bool"
            )

    def count(self, targets: Tensor) -> Tensor | int:
        """Count what torch's mean of the loss would be over."""
        name = type(self.criterion).__name__
        if name in _PER_SAMPLE:
            return len(targets)
        if name in _PER_ROW:
            return targets.shape[:-1].numel()
        if name not in _PER_TARGET:
            return targets.numel()
        if targets.is_floating_point():  # class probabilities (N, K, *S)
            return targets[:, 0].numel()
        weight, ignored = self.criterion.weight, self.criterion.ignore_index
        # Whole numbers count without a wait for the device.
        kept = targets != ignored
        if isinstance(weight, Tensor):
            weight = weight.to(targets.device)
            return weight[torch.where(kept, targets, 0)].where(kept, 0).double().sum()
        return kept.sum()


class Classify(Supervised):
    """One class for each sample: logits (N, K) against classes (N,) or probabilities (N, K).

    CrossEntropyLoss takes both targets, NLLLoss and MultiMarginLoss classes, others probabilities.
    Metric: accuracy. Samples of `ignore_index` count neither in it nor in the loss.
    """

    best = "accuracy"
    default_loss = "CrossEntropyLoss"
    losses: ClassVar[tuple[str, ...]] = (
        *_BY_SOFTMAX,
        "BCELoss",
        "BCEWithLogitsLoss",
        *_PER_ROW,
        *_DISTANCES,
    )
    ignored: ClassVar[int | None] = -100

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse what is not a row of logits for each sample."""
        is_mixed_up = (targets.ndim == 2) != targets.is_floating_point()
        if targets.ndim not in (1, 2) or is_mixed_up or targets.dtype == torch.bool:
            raise ConfigError(
                "`data.name` must give a class for each sample, (N,) of whole numbers, or class "
                f"probabilities (N, K), got {_shape(targets)} of {targets.dtype}. Save "
                "classes as integers; other targets need another task.name."
            )
        name = type(self.criterion).__name__
        if targets.ndim == 2 and getattr(self.criterion, "ignore_index", -1) >= 0:
            raise ConfigError(
                "`task.options.ignore_index` must be less than 0 for class probabilities, such as "
                f"data.augment.mixup and cutmix make, got {self.criterion.ignore_index}"
            )
        if name != "CrossEntropyLoss" and (targets.ndim == 1) != (name in _BY_SOFTMAX):
            wanted = "classes (N,)" if name in _BY_SOFTMAX else "class probabilities (N, K)"
            raise ConfigError(
                f"`data.name` must give {wanted} for task.loss {name}, got {_shape(targets)} of "
                f"{targets.dtype}"
            )
        # A pretrained head may have more classes.
        classes = targets.shape[1] if targets.ndim == 2 else self.classes or 1
        is_row = outputs.ndim == 2 and len(outputs) == len(targets)
        has_more = is_row and outputs.shape[1] > classes and targets.ndim == 2
        if not is_row or has_more or outputs.shape[1] < classes:
            raise ConfigError(
                f"`model.name` must give a tensor of logits (N, num_classes), got shape "
                f"{_shape(outputs)} for {len(targets)} samples of {classes} classes. Wrap a model "
                "that returns something else."
            )

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Share]:
        """Count the samples whose highest logit is that of their class, without those ignored."""
        classes = targets if targets.ndim == 1 else targets.argmax(1)
        right, ignored = outputs.argmax(1) == classes, getattr(self.criterion, "ignore_index", None)
        if ignored is None or targets.ndim > 1:
            return {"accuracy": (right.sum(), len(targets))}
        kept = classes != ignored
        return {"accuracy": (right[kept].sum(), kept.sum())}


class Segment(Supervised):
    """A class for each pixel: logits (N, K, *S) against classes (N, *S); 255 is none.

    Metrics: mean_iou, the mean over the classes of intersection / union, over the whole set; and
    accuracy, of pixels. Pixels of `ignore_index` count in neither.
    """

    best = "mean_iou"
    default_loss = "CrossEntropyLoss"
    losses: ClassVar[tuple[str, ...]] = _PER_TARGET
    ignored: ClassVar[int | None] = 255

    def __init__(self, loss: str | None = None, **options: Any) -> None:
        super().__init__(loss, **{"ignore_index": self.ignored, **options})

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse what is not a map of logits for each map of classes."""
        if targets.ndim < 2 or targets.is_floating_point():
            raise ConfigError(
                "`data.name` must give a class for each pixel, (N, *S) of whole numbers, got "
                f"shape {_shape(targets)} of {targets.dtype}"
            )
        if outputs.ndim != targets.ndim + 1 or outputs[:, 0].shape != targets.shape:
            raise ConfigError(
                "`model.name` must give logits (N, K, *S) for each pixel of targets "
                f"{_shape(targets)}, got shape {_shape(outputs)}"
            )
        if outputs.shape[1] < (self.classes or 1):
            raise ConfigError(
                f"`model.name` must give logits for {self.classes} classes, got shape "
                f"{_shape(outputs)}"
            )

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Share]:
        """Count the pixels of each class: found and right, found or right."""
        classes = outputs.shape[1]
        kept = targets != self.criterion.ignore_index
        found, right = outputs.argmax(1)[kept], targets[kept]
        hits = torch.bincount(right[found == right], minlength=classes)
        union = (
            torch.bincount(found, minlength=classes)
            + torch.bincount(right, minlength=classes)
            - hits
        )
        # Nobody can be right about a class that is ignored: it is none of the mean's.
        if 0 <= self.criterion.ignore_index < classes:
            union[self.criterion.ignore_index] = 0
        return {"mean_iou": (hits, union), "accuracy": (hits.sum(), kept.sum())}


class Multilabel(Supervised):
    """Any number of labels for each sample: logits (N, K) against 0 or 1, (N, K).

    BCELoss and distances such as MSELoss take probabilities in place of logits; SoftMarginLoss takes
    -1, too, for no label. Metrics: f1, over all labels together, found where the probability is above
    0.5; and exact_match, of samples whose labels are all right.
    """

    # MultiLabelMarginLoss compares a sample's outputs with each other alone: no threshold is theirs.
    best = "f1"
    default_loss = "BCEWithLogitsLoss"
    losses: ClassVar[tuple[str, ...]] = ("BCELoss", *_BY_SIGMOID, *_DISTANCES)

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the sum of the losses; SoftMarginLoss is given -1 and 1."""
        if isinstance(self.criterion, nn.SoftMarginLoss):
            targets = 2 * self.labels(targets).to(targets.dtype) - 1
        return self.criterion(outputs, targets)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse what is not a row of labels for each sample."""
        if targets.ndim < 2:
            raise ConfigError(
                f"`data.name` must give labels (N, K) for task.name multilabel, got "
                f"{_shape(targets)}"
            )
        super().check(outputs, targets)

    def labels(self, targets: Tensor) -> Tensor:
        """Round to 0 and 1."""
        return (targets > 0.5).long()

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Share]:
        """Count labels that are found, that are right, and that are both."""
        found, right = self.read(outputs) > 0.5, targets > 0.5
        both = (found & right).sum()
        matches = (found == right).flatten(1).all(1).sum()
        return {"f1": (2 * both, found.sum() + right.sum()), "exact_match": (matches, len(targets))}


class Regress(Supervised):
    """Numbers for each sample: outputs against targets of one shape, (N, *S).

    Outputs (N, 1) are taken as (N,) where the targets are. PoissonNLLLoss takes them for logarithms
    of values unless `log_input` is false, BCEWithLogitsLoss for logits. Metrics: mean_absolute_error,
    mean_squared_error, both of the values.
    """

    best = "-mean_squared_error"
    default_loss = "MSELoss"
    losses: ClassVar[tuple[str, ...]] = (
        *_DISTANCES,
        "BCELoss",
        "BCEWithLogitsLoss",
        "PoissonNLLLoss",
    )

    def fit(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Leave out a last dimension of 1 that the targets do not have."""
        has_more = outputs.ndim == targets.ndim + 1 and outputs.shape[-1] == 1
        return outputs[..., 0] if has_more else outputs

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, Share]:
        """Sum up how far the values are off."""
        off = (self.read(outputs) - targets).double()
        return {
            "mean_absolute_error": (off.abs().sum(), off.numel()),
            "mean_squared_error": (off.square().sum(), off.numel()),
        }


def make_criterion(name: str, options: Mapping[str, Any], losses: Sequence[str]) -> nn.Module:
    """Build a loss of torch.nn that adds up.

    Raises:
        ValueError: it is none of `losses`, or refuses the options.
    """
    if name not in losses:
        raise ValueError(
            f"loss must be one of {', '.join(sorted(losses))} for this task, got {name!r}."
            f"{name_hint(name, losses)}"
        )
    cls = getattr(nn, name)
    known = set(inspect.signature(cls.__init__).parameters) - _GIVEN_BY_TASK
    if not options.keys() <= known:
        raise ValueError(
            f"options must be arguments of {name}, {', '.join(sorted(known))}, got "
            f"{', '.join(sorted(options.keys() - known))}"
        )
    values = {
        key: _weights(key, value) if isinstance(value, list) else value
        for key, value in options.items()
    }
    try:
        criterion = cls(reduction="sum", **values).double()
        # Most values are looked at when the loss is computed.
        _compute_one(criterion)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"options must suit {name}: {error}") from None
    return criterion


def _weights(key: str, given: list[Any]) -> Tensor:
    try:
        values = torch.tensor(given, dtype=torch.float64)
    except (TypeError, ValueError):  # not of numbers, or ragged
        values = torch.full((1,), torch.nan)
    if not (values.isfinite().all() and (values >= 0).all() and values.any()):
        raise ValueError(
            f"options must hold numbers >= 0, not all 0, in a list such as {key}, got {given}"
        )
    return values


def _compute_one(criterion: nn.Module) -> None:
    """Compute the loss of one sample, with as many outputs as there are weights."""
    number = max((each.shape[-1] for each in criterion.buffers() if each.ndim), default=2)
    outputs = torch.full((1, number), 0.5, dtype=torch.float64)
    is_of_classes = type(criterion).__name__ in _BY_SOFTMAX
    criterion(outputs, torch.zeros(1, dtype=torch.int64) if is_of_classes else outputs)


def pair_of(batch: Any) -> tuple[Any, Tensor]:
    """Take a batch apart: a pair, or a mapping whose `labels` are the targets.

    Whole numbers are int64 afterwards: some of torch's losses take no others.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(batch, list | tuple) and len(batch) == 2:
        inputs, targets = batch
    elif isinstance(batch, Mapping) and "labels" in batch:
        inputs, targets = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    else:
        raise ConfigError(
            "`data.name` must give batches (inputs, targets), or mappings with labels, for this "
            f"task, got {type(batch).__name__}. A task of your own, task.name=package.module:"
            "callable, takes any batch."
        )
    if not isinstance(targets, Tensor):
        raise ConfigError(
            f"`data.name` must give targets as one tensor for this task, got a "
            f"{type(targets).__name__}"
        )
    if targets.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        targets = targets.long()
    return inputs, targets


def call(model: Model, inputs: Any) -> Tensor:
    """Call a model, and find the logits in what it returns: itself, or its `logits` or `out`.

    Args:
        model: called with the inputs; with a mapping's as keyword arguments.
        inputs: of a batch.

    Raises:
        ConfigError: there are none.
    """
    outputs = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    if isinstance(outputs, Tensor):
        return outputs
    for name in ("logits", "out"):
        found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if isinstance(found, Tensor):
            return found
    raise ConfigError(
        "`model.name` must give a model that returns a tensor, or logits in an object or a "
        f"mapping, got a {type(outputs).__name__}. A task of your own, "
        "task.name=package.module:callable, takes any outputs."
    )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
