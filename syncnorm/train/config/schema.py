"""The schema of a training configuration: the meaning and the values of every key.

`syncnorm.train.config.file` reads files and overrides into it. A section is frozen and refuses
unknown keys, so every `Config` is right, as far as that can be seen without data.

`model`, `task`, `data`, `norm` and `train` fix the mathematics of a run; the other sections fix where it is
computed and what is recorded, and may change when a run is resumed.
"""

import reprlib
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from syncnorm.family import METHODS
from syncnorm.train.config.norm import NormSection
from syncnorm.train.config.section import (
    REFERENCE,
    Finite,
    LocalPath,
    Options,
    PathOrUrl,
    RunName,
    RunTag,
    Section,
    Whole,
    check_name_or_reference,
    name_or_reference_schema,
)
from syncnorm.train.config.train import TrainSection
from syncnorm.train.data.builtin import DATASETS
from syncnorm.train.data.sources import SOURCES, check_source_options
from syncnorm.train.models import MODELS
from syncnorm.train.packages import PACKAGED
from syncnorm.train.task.builtin import TASKS, make_builtin

# The services that figures can go to, by `syncnorm.train.loggers`.
LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")

# The sections that fix a run's result.
MATHEMATICS = ("model", "task", "data", "norm", "train")
# Of `data`, what has no part in it.
WHEREABOUTS = ("root", "loader")


def _known_model(name: str) -> str:
    return name if PACKAGED.fullmatch(name) else check_name_or_reference(name, list(MODELS))


def _known_dataset(name: str) -> str:
    return check_name_or_reference(name, [*DATASETS, *SOURCES])


def _known_logger(name: str) -> str:
    return check_name_or_reference(name, LOGGERS)


def _known_task(name: str) -> str:
    return check_name_or_reference(name, list(TASKS))


class ModelSection(Section):
    """The network."""

    name: Annotated[str, AfterValidator(_known_model)] = Field(
        description="a network of syncnorm.train.models; torchvision:NAME, timm:NAME, "
        "transformers:CLASS or transformers:FOLDER; or package.module:callable, which is called "
        "with `options` and those of in_channels, num_classes and norm_layer that it takes, and "
        "whose package must be allowed on the command line",
        json_schema_extra=name_or_reference_schema(MODELS, PACKAGED.pattern),
    )
    options: Options = Field(default={}, description="further arguments of a network not built in")
    weights: LocalPath | None = Field(
        default=None,
        description="what a new run begins with: a file (.safetensors, .pt, .pth, .bin, .ckpt), a "
        "folder of Hugging Face's, a checkpoint's or a run's; null: drawn from train.seed",
    )
    partial: bool = Field(
        default=False,
        description="load of `weights` what fits by name and shape, and list the rest; false: all "
        "must fit",
    )

    @model_validator(mode="after")
    def _options_have_a_taker(self) -> Self:
        if self.partial and self.weights is None:
            raise ValueError("partial must be false without weights")
        return _check_taker(self)


class TaskSection(Section):
    """The loss and the metrics."""

    name: Annotated[str, AfterValidator(_known_task)] = Field(
        default="classify",
        description="a task of syncnorm.train.task, or package.module:callable, which is called "
        "with `options` and returns an object with loss(model, batch) and metrics(model, batch); "
        "its package must be allowed on the command line",
        json_schema_extra=name_or_reference_schema(TASKS),
    )
    loss: str | None = Field(
        default=None,
        description="a loss class of torch.nn that suits the task; null: the task's own",
    )
    options: Options = Field(
        default={}, description="arguments of the loss, or of a callable that is the task"
    )
    metrics: dict[str, Options] = Field(
        default={},
        description="metrics of torchmetrics that add up, besides: by the class's name, its "
        "arguments; needs the extra metrics",
    )
    best: str | None = Field(
        default=None,
        description="metric that decides, with a leading - if the lowest is best; null: the task's",
    )

    @model_validator(mode="after")
    def _options_are_its_own(self) -> Self:
        if not REFERENCE.fullmatch(self.name):
            make_builtin(self.name, self.loss, self.options)
        elif self.loss is not None:
            raise ValueError(f"loss must be null with name {self.name}, got {self.loss!r}")
        if self.metrics and (REFERENCE.fullmatch(self.name) or self.name == "own_loss"):
            raise ValueError(f"metrics must be left out with name {self.name}: it measures itself")
        return self


class AugmentSection(Section):
    """Changes to training images, drawn for each sample from (seed, epoch, sample) alone."""

    crop: int = Field(
        default=0,
        ge=0,
        le=64,
        description="pixels of zero padding around the image, before a random crop",
    )
    flip: bool = Field(default=False, description="mirror every second image, left to right")
    cutout: int = Field(
        default=0, ge=0, le=512, description="side of a square set to 0 at a random place"
    )
    mixup: Finite = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="alpha of mixup's Beta(alpha, alpha): an image and its class are mixed with "
        "those of another; 0: none",
    )
    cutmix: Finite = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="alpha of CutMix's Beta(alpha, alpha): a box of an image is another's, and its "
        "class by area; with mixup, too, each image has one of them; 0: none",
    )

    @property
    def changes_something(self) -> bool:
        """True if anything is asked for."""
        return bool(self.crop or self.flip or self.cutout or self.mixup or self.cutmix)


class LoaderSection(Section):
    """The loading of samples that do not lie in memory."""

    workers: int = Field(
        default=0,
        ge=0,
        le=64,
        description="processes of each worker that load samples ahead; 0: it loads them itself",
    )
    prefetch: Whole = Field(
        default=2, ge=1, le=1000, description="batches that each of them loads ahead"
    )


class DataSection(Section):
    """The data set."""

    name: Annotated[str, AfterValidator(_known_dataset)] = Field(
        description="a data set of syncnorm.train.data.builtin, a format of "
        "syncnorm.train.data.sources, or package.module:callable, which "
        "is called with root and `options` and returns a syncnorm.train.data.datasets.Dataset or a "
        "syncnorm.train.data.splits.Splits; its package must be allowed on the command line",
        json_schema_extra=name_or_reference_schema([*DATASETS, *SOURCES]),
    )
    root: LocalPath | None = Field(
        default=None, description="folder that holds the data set's files"
    )
    augment: AugmentSection = Field(
        default=AugmentSection(), description="random changes to training images"
    )
    validation: Finite = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the training set that is set apart for validation, where the data "
        "set has no validation set of its own; always the same samples",
    )
    regime: Literal["iid", "label_groups", "sharded_labels", "drift"] = Field(
        default="iid",
        description="order of the training samples: iid, any; label_groups, each part of a step "
        "holds part_labels labels, equally often; sharded_labels, each part of a step has labels "
        "of its own for good; drift, labels arrive and leave in their order in each epoch",
    )
    parts: Whole | None = Field(
        default=None,
        ge=1,
        description="parts of a step for label_groups and sharded_labels, neighbouring samples, "
        "as many in each, such as the number of workers with statistics of their own; a divisor "
        "of train.global_batch; null: as many as there are statistics in a step",
    )
    part_labels: Whole | None = Field(
        default=None,
        ge=1,
        description="labels in each part of a step, with label_groups; a divisor of the part's "
        "number of samples",
    )
    loader: LoaderSection = Field(
        default=LoaderSection(), description="loading of samples that do not lie in memory"
    )
    options: Options = Field(
        default={}, description="further arguments of a callable or of a format"
    )

    @model_validator(mode="after")
    def _regime_has_its_keys(self) -> Self:
        if self.parts is not None and self.regime in ("iid", "drift"):
            raise ValueError(f"parts must be null with regime {self.regime}, got {self.parts}")
        if (self.regime == "label_groups") != (self.part_labels is not None):
            wanted = "a number" if self.regime == "label_groups" else "null"
            raise ValueError(
                f"part_labels must be {wanted} with regime {self.regime}, got {self.part_labels}"
            )
        return self

    @model_validator(mode="after")
    def _options_have_a_taker(self) -> Self:
        if self.name in SOURCES:
            check_source_options(self.name, self.options)
            return self
        return _check_taker(self)


def _check_taker(section: Any) -> Any:
    is_built_in = not (REFERENCE.fullmatch(section.name) or PACKAGED.fullmatch(section.name))
    if section.options and is_built_in:
        takers = "torchvision:NAME and the like" if section.name in MODELS else ", ".join(SOURCES)
        raise ValueError(
            f"options must be left out with name {section.name}. They belong to {takers}, and to "
            "package.module:callable."
        )
    return section


class CheckpointSection(Section):
    """The checkpoints that a run can go on from."""

    every: Whole | None = Field(
        default=None, ge=1, description="steps between checkpoints; null: one after each epoch"
    )
    keep: Whole = Field(default=3, ge=1, description="how many of the newest are kept")
    minutes: Finite | None = Field(
        default=None, gt=0, description="minutes after which there is another one besides"
    )
    best: bool | None = Field(
        default=None,
        description="also keep the one that is best on the validation set, by the task's metric; "
        "null: if there is a validation set",
    )


class FollowSection(Section):
    """The record of a run while it trains."""

    every: Whole = Field(
        default=50,
        ge=1,
        description="steps between records of speed and of the normalisation layers",
    )
    layers: bool = Field(default=True, description="record each normalisation layer's statistics")
    loggers: dict[Annotated[str, AfterValidator(_known_logger)], Options] = Field(
        default={},
        description="services that get the figures too, each with its options: "
        f"{', '.join(LOGGERS)}, or package.module:Class, whose package must be allowed on the "
        "command line",
    )
    profile: Whole | None = Field(
        default=None,
        ge=1,
        description="step of this run from which torch.profiler records 5 steps; null: never",
    )


def _pair(value: list[Any]) -> list[Any]:
    if len(value) != 2:
        raise ValueError(f"must be a number or a pair [fewest, most], got {reprlib.repr(value)}")
    return value


# With the tags pydantic does not report a wrong number as a wrong range, too.
WorkerCount = Annotated[int, Field(ge=1, le=256), Tag("(number)")]
WorkerRange = Annotated[
    list[Annotated[int, Field(ge=1, le=256)]],
    Field(min_length=2, max_length=2),
    BeforeValidator(_pair),
    Tag("(range)"),
]


def _number_or_range(value: Any) -> str:
    return "(range)" if isinstance(value, list) else "(number)"


class LaunchSection(Section):
    """The processes of a run. Under torchrun its own flags decide the number of workers."""

    workers: Annotated[WorkerCount | WorkerRange, Discriminator(_number_or_range)] = Field(
        default=1,
        description="processes that `syncnorm train` starts on this machine, or a Ray job on its "
        "cluster; a pair [fewest, most]: on a cluster as many as there is room for, on one machine "
        "the most",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="auto: CUDA if there is a device for each local worker, else the CPU",
    )
    micro_batch: Whole | None = Field(
        default=None,
        ge=1,
        description="most samples in one forward of a worker; its share of a step takes several if "
        "need be; null: any",
    )
    memory_gib: Finite | None = Field(
        default=None,
        gt=0,
        description="memory that a worker may use, in GiB; null: its share of what is free",
    )
    timeout_seconds: Finite | None = Field(
        default=None,
        ge=1,
        le=604_800,
        description="a worker that makes no progress for so long is stuck, and ends the attempt; "
        "null: 60, or 1800 with train.compile, whose first steps compile",
    )
    restarts: int = Field(
        default=3,
        ge=0,
        le=1000,
        description="how often workers of this machine that were killed are started again",
    )

    @property
    def patience_seconds(self) -> float:
        """Time to wait for what does not compile."""
        return self.timeout_seconds or 60.0

    @property
    def fewest_workers(self) -> int:
        """The least number of workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """The number of workers where there is room."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @model_validator(mode="after")
    def _range_is_ordered(self) -> Self:
        if self.fewest_workers > self.most_workers:
            raise ValueError(f"workers must be [fewest, most], got {self.workers}")
        return self


class Config(Section):
    """A training run."""

    model: ModelSection = Field(description="the network")
    task: TaskSection = Field(default=TaskSection(), description="what is learned")
    data: DataSection = Field(description="what it learns from")
    norm: NormSection = Field(default=NormSection(), description="the normalisation layers")
    train: TrainSection = Field(description="the optimisation")
    checkpoint: CheckpointSection = Field(
        default=CheckpointSection(), description="what is kept to go on from"
    )
    follow: FollowSection = Field(
        default=FollowSection(), description="what is written down while it trains"
    )
    launch: LaunchSection = Field(default=LaunchSection(), description="where it is computed")
    run_dir: PathOrUrl = Field(
        default="runs",
        description="folder in which each run gets a folder of its own; or its address in a store, "
        "such as s3://bucket/runs, to which the folder in runs is copied; needs the extra storage",
    )
    name: RunName | None = Field(
        default=None,
        description="begins the name of the run's folder; null: the configuration's name",
    )
    tags: list[RunTag] = Field(default=[], description="words to find the run by")

    @property
    def norm_batch(self) -> int:
        """Samples per statistic."""
        return self.train.norm_batch or self.train.global_batch

    @property
    def timeout_seconds(self) -> float:
        """Time without progress after which a worker is stuck."""
        is_long = self.train.compile and self.launch.timeout_seconds is None
        return 1800.0 if is_long else self.launch.patience_seconds

    @property
    def parts(self) -> int:
        """Parts of a step, for regimes that have some."""
        return self.data.parts or self.train.global_batch // self.norm_batch

    @property
    def is_grouped(self) -> bool:
        """True if a step has several statistics of each layer."""
        return self.norm_batch < self.train.global_batch

    def mathematics(self) -> dict[str, Any]:
        """The sections that fix a run's result; a run can be resumed with others changed."""
        return self.model_dump(include=set(MATHEMATICS), exclude={"data": {*WHEREABOUTS}})

    @model_validator(mode="after")
    def _parts_are_whole(self) -> Self:
        regime, parts, batch = self.data.regime, self.parts, self.train.global_batch
        if batch % parts:
            raise ValueError(
                f"`data.parts` must be a divisor of train.global_batch = {batch}, got {parts}"
            )
        if regime == "sharded_labels" and parts == 1:
            raise ValueError(
                "`data.parts` must be at least 2 with data.regime sharded_labels, got "
                f"{self.data.parts} with 1 statistic in a step. It is the number of shards."
            )
        labels = self.data.part_labels
        if labels is not None and (batch // parts) % labels:
            raise ValueError(
                f"`data.part_labels` must be a divisor of the {batch // parts} samples in a part "
                f"of a step, got {labels}"
            )
        return self

    @model_validator(mode="after")
    def _statistics_are_pooled(self) -> Self:
        if self.train.norm_batch is not None and not self.norm.mode.pools_each_batch():
            raise ValueError(
                f"`train.norm_batch` must be null with norm.sync {self.norm.sync}, got "
                f"{self.train.norm_batch}. Only sync batch takes statistics over a number of "
                "samples that the configuration fixes."
            )
        methods = self.norm.names & METHODS.keys()
        if self.is_grouped and methods:
            raise ValueError(
                f"`train.norm_batch` must be null with {', '.join(sorted(methods))}, got "
                f"{self.train.norm_batch}. A method of the family has one statistic a step."
            )
        return self


# What may be another when a run goes on. `train.epochs` may grow besides.
CHANGEABLE = (
    *(name for name in Config.model_fields if name not in MATHEMATICS),
    *(f"data.{name}" for name in WHEREABOUTS),
)
