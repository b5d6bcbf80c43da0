"""The section `norm` of a configuration: the normalisation layers, and what they pool."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast, get_type_hints

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from syncnorm import RenormSchedule
from syncnorm.errors import InputError
from syncnorm.family import METHODS
from syncnorm.family.plain import BASELINES
from syncnorm.model.arguments import constructor_arguments
from syncnorm.statistics import MODES
from syncnorm.statistics.source import Mode
from syncnorm.train.config.section import Finite, Section, Whole, check_patterns, name_hint

if TYPE_CHECKING:
    NormName = str
else:
    _BATCH_NORMS = ("batch_norm", "sync_batch_norm", "sync_batch_renorm", "frozen")
    NormName = Literal[*_BATCH_NORMS, *METHODS, *BASELINES]
WeightName = Literal[
    "weight_norm", "spectral_norm", "centred", "standardized", "scaled_standardized"
]

# Arguments of a layer that are no options: other keys say them, or the network does.
_NO_OPTIONS = {"num_features", "affine", "sync", "process_group", "device", "dtype"}
# So many that any sensible number of groups divides them.
_CHANNELS = 960


class RenormSection(Section):
    """Batch renormalisation's bounds and their schedule."""

    r_max: Finite = Field(default=3.0, ge=1, description="final bound of the scale's correction")
    d_max: Finite = Field(
        default=5.0, ge=0, description="final bound of the mean's correction, in deviations"
    )
    warmup_steps: Whole | None = Field(
        default=None,
        ge=0,
        description="steps of plain batch normalisation; null, all three: the paper's, scaled to "
        "the run",
    )
    r_steps: Whole | None = Field(default=None, ge=0, description="step at which r_max is reached")
    d_steps: Whole | None = Field(default=None, ge=0, description="step at which d_max is reached")
    running_average: Literal["std", "var"] = Field(
        default="std",
        description="std averages the standard deviation, as in the paper; var the unbiased "
        "variance",
    )

    @model_validator(mode="after")
    def _makes_a_schedule(self) -> Self:
        given = [step is not None for step in (self.warmup_steps, self.r_steps, self.d_steps)]
        if any(given) and not all(given):
            raise ValueError(
                "warmup_steps, r_steps and d_steps must be given together, got some of them"
            )
        self.schedule(1)
        return self

    def schedule(self, total_steps: int) -> RenormSchedule:
        """Make the schedule for a run of `total_steps` steps."""
        if self.warmup_steps is None or self.r_steps is None or self.d_steps is None:
            return RenormSchedule(self.r_max, self.d_max).scaled(total_steps)
        return RenormSchedule(self.r_max, self.d_max, self.warmup_steps, self.r_steps, self.d_steps)


class NormSection(Section):
    """The normalisation layers: which, and over which samples they take their statistics."""

    name: NormName = Field(
        default="sync_batch_norm",
        description="sync_batch_norm and sync_batch_renorm are ours; batch_norm is torch's own, "
        "with the statistics of each worker's forward; frozen is a batch norm that only evaluates; "
        f"the next {len(METHODS)} are methods of syncnorm.family, and those from group_norm on, "
        "which has up to 32 groups, use no batch statistics",
    )
    rules: Annotated[dict[str, NormName], AfterValidator(check_patterns)] = Field(
        default={},
        description="other layers for some places: from a regular expression, searched for in the "
        "layer's name within the model, to a name as above; the first that is found holds",
    )
    sync: Literal["batch", "running", "lagged", "none"] = Field(
        default="batch",
        description="what our layers pool over all workers: each batch, the running statistics, "
        "averages that are one step old, or nothing",
    )
    momentum: Finite | None = Field(
        default=None,
        ge=0,
        le=1,
        description="weight of a new batch in the running statistics; null: the layer's own, 0.1, of renormalisation 0.01",
    )
    eps: Finite = Field(default=1e-5, gt=0, description="added to the variance")
    renorm: RenormSection = Field(default=RenormSection(), description="sync_batch_renorm only")
    options: dict[str, Any] = Field(
        default={}, description="arguments of the layer, where name is a method of syncnorm.family"
    )

    weights: WeightName | None = Field(
        default=None,
        description="what the weights of all convolutions are normalised by, besides; null: "
        "nothing",
    )

    @property
    def mode(self) -> type[Mode]:
        """The mode that `sync` names."""
        return MODES[self.sync]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that a layer of the family gets besides its options."""
        momentum = {} if self.momentum is None else {"momentum": self.momentum}
        return {"sync": self.sync, "eps": self.eps, **momentum}

    @property
    def names(self) -> set[str]:
        """Every kind of layer that may be made."""
        return {self.name, *self.rules.values()}

    @model_validator(mode="after")
    def _keys_have_a_use(self) -> Self:
        pooled = {"sync_batch_norm", "sync_batch_renorm", *METHODS}
        if not self.names & pooled:
            if self.mode.is_pooled and "sync" in self.model_fields_set:
                raise ValueError(
                    f"sync must be none with name {self.name}, got {self.sync!r}. Set norm.sync=none, "
                    "or take name sync_batch_norm to pool."
                )
            # So that the run's config.yaml has the value that holds, and can be read again.
            object.__setattr__(self, "sync", "none")
        self._fit_the_family()
        if "sync_batch_renorm" not in self.names and self.renorm != RenormSection():
            raise ValueError(
                f"renorm must be left out with name {self.name}. It belongs to name "
                "sync_batch_renorm."
            )
        return self

    def _fit_the_family(self) -> None:
        """Check the keys that mean something else, or nothing, to a method of the family."""
        methods = self.names & METHODS.keys()
        if methods and self.sync not in ("batch", "none"):
            raise ValueError(
                f"sync must be batch or none with {', '.join(sorted(methods))}, got {self.sync!r}"
            )
        if self.options and self.name not in METHODS:
            raise ValueError(
                f"options must be left out with name {self.name}, got {self.options}. They are "
                f"arguments of {', '.join(METHODS)}."
            )
        if self.name in METHODS and (wrong := self.options.keys() & _NO_OPTIONS):
            raise ValueError(
                f"options must leave out {', '.join(sorted(wrong))} with name {self.name}, got "
                f"{self.options}. norm.sync says what is pooled; the rest is the network's."
            )
        for name in sorted(methods):
            own = self.options if name == self.name else {}
            _check_arguments(name, own)
            try:
                METHODS[name](_CHANNELS, **own)
            except InputError as error:
                raise ValueError(
                    f"options must be arguments of {name}, got {own}: {error}"
                ) from None
            try:
                METHODS[name](_CHANNELS, **(self.arguments | own))
            except InputError as error:
                raise ValueError(
                    f"eps and momentum must be such as {name} takes, got {self.eps} and "
                    f"{self.momentum}: {error}"
                ) from None


def _check_arguments(name: str, options: dict[str, Any]) -> None:
    """Check that a method of the family has arguments of these names and types.

    Raises:
        ValueError: it has not.
    """
    types = {
        key: get_type_hints(cls.__init__)[key]
        for key, cls in constructor_arguments(cast("type", METHODS[name])).items()
        if key not in _NO_OPTIONS
    }
    for key, value in options.items():
        if key not in types:
            raise ValueError(
                f"options must be some of {', '.join(types)} with name {name}, got {key!r}."
                f"{name_hint(key, types)}"
            )
        try:
            TypeAdapter(types[key]).validate_python(value, strict=True)
        except ValidationError as error:
            rule = error.errors()[0]["msg"].replace("Input should", "must")
            raise ValueError(f"options.{key} {rule} with name {name}, got {value!r}") from None
