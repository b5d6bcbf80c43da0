"""The section `train` of a configuration: the optimisation."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from syncnorm.placement import no_whole_statistics
from syncnorm.train import optim
from syncnorm.train.config.section import Finite, Section, Whole, check_patterns


class _OpenSection(Section):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of what `name` names."""
        return dict(self.model_extra or {})


class OptimizerSection(_OpenSection):
    """An optimizer of torch.optim; every further key is an argument of it."""

    name: Annotated[str, AfterValidator(optim.check_optimizer_name)] = Field(
        default="SGD",
        description="a class of torch.optim; further keys of this section are its arguments",
        json_schema_extra={"enum": list(optim.OPTIMIZERS)},
    )

    @model_validator(mode="after")
    def _options_are_its_own(self) -> Self:
        optim.check_optimizer(self.name, self.options)
        return self


class ScheduleSection(_OpenSection):
    """The schedule of the learning rate; every further key is an argument of a class of torch's."""

    name: Annotated[str, AfterValidator(optim.check_schedule_name)] = Field(
        default="cosine",
        description="cosine, linear (both down to 0 at the end of the run), constant, or a class "
        "of torch.optim.lr_scheduler that steps once for each optimizer step; further keys are its "
        "arguments",
        json_schema_extra={"enum": [*optim.FACTORS, *optim.SCHEDULERS]},
    )
    warmup: Finite = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of all steps over which the learning rate first rises in a line",
    )

    @model_validator(mode="after")
    def _options_are_its_own(self) -> Self:
        optim.check_schedule(self.name, self.options)
        return self


class TrainSection(Section):
    """The optimisation. Nothing here depends on the number of workers."""

    epochs: Whole = Field(ge=1, description="passes over the training set")
    global_batch: Whole = Field(
        ge=1, description="samples per optimizer step, over all workers together"
    )
    norm_batch: Whole | None = Field(
        default=None,
        ge=1,
        description="samples per statistic of our layers, a divisor of global_batch; null: all",
    )
    lr: Finite = Field(gt=0, description="highest learning rate")
    optimizer: OptimizerSection = Field(
        default=OptimizerSection(), description="what makes a step of gradients"
    )
    schedule: ScheduleSection = Field(default=ScheduleSection(), description="of the learning rate")
    clip: Finite | None = Field(
        default=None, gt=0, description="largest norm of the whole gradient; null: any"
    )
    adaptive_clip: Finite | None = Field(
        default=None,
        gt=0,
        description="largest ratio of a unit's gradient norm to its weight norm, for networks "
        "without normalisation (0.01); the last linear layer is left out; null: any",
    )
    ema: Finite | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay of an average of the parameters, which is what is evaluated, with "
        "statistics of its own; null: none",
    )
    decay: Literal["weights", "all"] = Field(
        default="weights",
        description="what the optimizer's weight_decay acts on: weights alone, or biases and the "
        "normalisation's parameters, too",
    )
    rates: Annotated[
        dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]],
        AfterValidator(check_patterns),
    ] = Field(
        default={},
        description="factors of the learning rate for some parameters: from a regular expression, "
        "searched for in the parameter's name within the model, to a factor; the first that is "
        "found holds",
    )
    freeze: Annotated[list[str], AfterValidator(check_patterns)] = Field(
        default=[],
        description="modules and parameters that are not trained: regular expressions, searched "
        "for in their names; a module is frozen whole, and stays in evaluation mode",
    )
    recompute: Annotated[list[str], AfterValidator(check_patterns)] = Field(
        default=[],
        description="modules whose activations are not kept but computed again in the backward "
        "pass: regular expressions, searched for in the module's name; of modules within each "
        "other, the outermost",
    )
    channels_last: bool = Field(
        default=False, description="order images and weights of convolutions with channels last"
    )
    tf32: bool | None = Field(
        default=None,
        description="TF32 for products and convolutions of float32 on CUDA devices; null: as torch "
        "has it, for convolutions alone",
    )
    autocast: Literal["bfloat16", "float16"] | None = Field(
        default=None,
        description="type of convolutions and products; with float16 the loss is scaled, and a "
        "step that overflows is left out",
    )
    compile: bool = Field(default=False, description="torch.compile the model")
    evaluate_every: Whole | None = Field(
        default=None, ge=1, description="steps between evaluations; null: one after each epoch"
    )
    patience: Whole | None = Field(
        default=None,
        ge=1,
        description="evaluations on the validation set without a better one, after which the run "
        "is done; null: it goes through all epochs",
    )
    not_finite: Literal["stop", "skip"] = Field(
        default="stop",
        description="at a loss that is not finite: stop the run, or leave that step out",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="fixes the first weights and the order of the samples",
    )
    dtype: Literal["float32", "float64"] = Field(
        default="float32", description="of parameters, data and statistics"
    )

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Self:
        wrong = no_whole_statistics(self.global_batch, self.norm_batch or self.global_batch)
        if wrong:
            raise ValueError(f"norm_batch {wrong}")
        if self.autocast is not None and self.dtype != "float32":
            raise ValueError(
                f"autocast must be null with dtype {self.dtype}, got {self.autocast!r}"
            )
        if self.recompute and self.compile:
            raise ValueError(
                f"recompute must be empty with compile true, got {self.recompute}. torch fails to "
                "compile exchanges within what is recomputed."
            )
        return self

    @model_validator(mode="after")
    def _schedule_fits_optimizer(self) -> Self:
        optimizer, schedule = self.optimizer, self.schedule
        optim.check_together(optimizer.name, optimizer.options, schedule.name, schedule.options)
        return self
