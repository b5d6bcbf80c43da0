"""The schema of a training configuration: what every key means and which values it takes.

`syncnorm.train.config_file` reads files and overrides into it. A section is frozen and refuses keys that it
does not know, so a `Config` that exists is a `Config` that is right.
"""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from syncnorm import RenormSchedule
from syncnorm.train.data import DATASETS
from syncnorm.train.models import MODELS
from syncnorm.train.nearest import nearest

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    """A group of keys. Strict: "3" is no integer, and neither is true."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _known_model(name: str) -> str:
    return _one_of(name, list(MODELS))


def _known_dataset(name: str) -> str:
    return _one_of(name, list(DATASETS))


def _one_of(name: str, known: list[str]) -> str:
    if name not in known:
        raise ValueError(f"must be one of {', '.join(known)}, got {name!r}. The nearest is {nearest(name, known)!r}.")
    return name


class ModelSection(Section):
    """The network."""

    name: Annotated[str, AfterValidator(_known_model)] = Field(
        description="a network of syncnorm.train.models; its input channels and classes follow the data"
    )


class DataSection(Section):
    """What it learns from."""

    name: Annotated[str, AfterValidator(_known_dataset)] = Field(description="a data set of syncnorm.train.data")


class RenormSection(Section):
    """Batch renormalisation's bounds and their schedule."""

    r_max: Finite = Field(default=3.0, ge=1, description="final bound of the scale's correction")
    d_max: Finite = Field(default=5.0, ge=0, description="final bound of the mean's correction, in deviations")
    warmup_steps: int | None = Field(
        default=None, description="steps of plain batch normalisation; null, all three: the paper's, scaled to the run"
    )
    r_steps: int | None = Field(default=None, description="step at which r_max is reached")
    d_steps: int | None = Field(default=None, description="step at which d_max is reached")
    running_average: Literal["std", "var"] = Field(
        default="std", description="std averages the standard deviation, as in the paper; var the unbiased variance"
    )

    @model_validator(mode="after")
    def _makes_a_schedule(self) -> Self:
        given = [step is not None for step in (self.warmup_steps, self.r_steps, self.d_steps)]
        if any(given) and not all(given):
            raise ValueError("warmup_steps, r_steps and d_steps must be given together, got some of them")
        self.schedule(1)
        return self

    def schedule(self, total_steps: int) -> RenormSchedule:
        """The schedule for a run of so many steps."""
        if self.warmup_steps is None or self.r_steps is None or self.d_steps is None:
            return RenormSchedule(self.r_max, self.d_max).scaled(total_steps)
        return RenormSchedule(self.r_max, self.d_max, self.warmup_steps, self.r_steps, self.d_steps)


class NormSection(Section):
    """The normalisation layers: which, and over which samples they take their statistics."""

    name: Literal["sync_batch_norm", "sync_batch_renorm", "batch_norm"] = Field(
        default="sync_batch_norm", description="ours, or torch's own with each worker's local statistics"
    )
    sync: Literal["batch", "running", "lagged", "none"] = Field(
        default="batch",
        description="what our layers pool over all workers: each batch, the running statistics, averages that are "
        "one step old, or nothing",
    )
    momentum: Finite | None = Field(
        default=None, ge=0, le=1, description="weight of a new batch in the running statistics; null: the layer's own"
    )
    eps: Finite = Field(default=1e-5, gt=0, description="added to the variance")
    renorm: RenormSection = Field(default=RenormSection(), description="sync_batch_renorm only")

    @model_validator(mode="after")
    def _keys_have_a_use(self) -> Self:
        if self.name == "batch_norm" and self.sync != "none" and "sync" in self.model_fields_set:
            raise ValueError(
                f"sync must be none with name batch_norm, got {self.sync!r}. Use name sync_batch_norm to pool."
            )
        if self.name != "sync_batch_renorm" and self.renorm != RenormSection():
            raise ValueError(f"renorm must be left out with name {self.name}. It belongs to name sync_batch_renorm.")
        return self


class TrainSection(Section):
    """The optimisation. Nothing here depends on the number of workers."""

    epochs: int = Field(ge=1, description="passes over the training set")
    global_batch: int = Field(ge=1, description="samples per optimizer step, over all workers together")
    lr: Finite = Field(gt=0, description="highest learning rate of SGD; a half cosine takes it to 0")
    warmup: Finite = Field(
        default=0.0, ge=0, lt=1, description="share of all steps over which the learning rate first rises"
    )
    momentum: Finite = Field(default=0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: Finite = Field(default=0.0, ge=0, description="L2 penalty of SGD on all parameters")
    seed: int = Field(default=0, ge=0, lt=2**63, description="fixes the first weights and the order of the samples")
    dtype: Literal["float32", "float64"] = Field(default="float32", description="of parameters, data and statistics")


class LaunchSection(Section):
    """Where it is computed. Under torchrun its own flags decide the number of workers."""

    workers: int = Field(default=1, ge=1, le=256, description="processes that `syncnorm train` starts on this machine")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: CUDA if there is a device for each local worker, else the CPU"
    )


class Config(Section):
    """A training run."""

    model: ModelSection = Field(description="the network")
    data: DataSection = Field(description="what it learns from")
    norm: NormSection = Field(default=NormSection(), description="the normalisation layers")
    train: TrainSection = Field(description="the optimisation")
    launch: LaunchSection = Field(default=LaunchSection(), description="where it is computed")
    run_dir: str = Field(default="runs", min_length=1, description="folder in which each run gets a folder of its own")
