"""The samples that a run's model takes, as they are before they are standardised."""

from typing import ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

from syncnorm.errors import InputError


class Table(BaseModel):
    """How the rows of a table are read.

    Args:
        columns: their names, in the order of the channels.
        delimiter: between two values.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    columns: tuple[str, ...]
    delimiter: str


class Inputs(BaseModel):
    """Raw inputs of a model.

    Args:
        shape: of a sample, its channels first.
        dtype: that a sample is stored in, such as `uint8`.
        mean: of each channel, in the units that samples are stored in; None: the data set prepares
            its samples itself, and they enter as it gives them.
        std: as above.
        table: of which a sample is a row; None: of none.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    shape: tuple[int, ...]
    dtype: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    table: Table | None = None

    @field_validator("dtype")
    @classmethod
    def _is_a_dtype(cls, name: str) -> str:
        if not isinstance(getattr(torch, name, None), torch.dtype):
            raise ValueError(f"must be a dtype of torch, got {name!r}")
        return name

    @model_validator(mode="after")
    def _has_a_figure_for_each_channel(self) -> Self:
        for values in (self.mean, self.std):
            if (values is None) != (self.mean is None):
                raise ValueError("mean and std must come together")
            if values is not None and (not self.shape or len(values) != self.shape[0]):
                raise ValueError(f"mean and std must have a value for each channel of {self.shape}")
        return self

    @property
    def is_floating_point(self) -> bool:
        """True if a sample is stored in floating point."""
        return getattr(torch, self.dtype).is_floating_point

    @property
    def are_images(self) -> bool:
        """True if a sample is an image of 8 bits, grey or in colour."""
        return len(self.shape) == 3 and self.shape[0] in (1, 3) and self.dtype == "uint8"

    def distance(self, sample: Tensor) -> float:
        """How far the means of a sample's channels are from those of training, at most.

        Args:
            sample: raw; `mean` is not None.

        Returns:
            In standard deviations of a value.
        """
        mean, std = (torch.tensor(each, dtype=torch.float64) for each in (self.mean, self.std))
        return float(((sample.flatten(1).double().mean(1) - mean).abs() / std).max())

    def describe(self) -> str:
        """Describe a batch of them in a few words."""
        return f"(N, {', '.join(map(str, self.shape))}) of {self.dtype}"


class Signature(BaseModel):
    """The inputs and outputs of a run's model, as far as its data set says.

    Args:
        inputs: None where a sample is something else than one tensor and its target.
        in_channels: of the inputs; None if it is not known.
        num_classes: of the targets; None if it is not known.
        classes: their names.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    inputs: Inputs | None = None
    in_channels: int | None = Field(default=None, ge=1)
    num_classes: int | None = Field(default=None, ge=1)
    classes: tuple[str, ...] | None = None

    def name(self, number: int) -> str | None:
        """Name a class; None if it has no name."""
        return None if self.classes is None or number >= len(self.classes) else self.classes[number]


def exact_type(raw: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """Choose the type in which the mean is taken off raw inputs: float64 where float32 would round.

    Of a date in seconds float32 would lose the digits that differ.

    Args:
        raw: of the inputs.
        dtype: of the run.
    """
    is_long = raw == torch.float64 or (not raw.is_floating_point and raw.itemsize > 2)
    return torch.float64 if is_long else dtype


class Standardise(nn.Module):
    """Makes of raw inputs what the model was trained on.

    Args:
        inputs: of the model.
        dtype: of the run.
    """

    mean: Tensor
    std: Tensor
    dtype: torch.dtype
    inputs: Inputs

    def __init__(self, inputs: Inputs, dtype: torch.dtype) -> None:
        super().__init__()
        self.inputs, self.dtype = inputs, dtype
        exact = exact_type(getattr(torch, inputs.dtype), dtype)
        rest = (1,) * (len(inputs.shape) - 1)
        for name in ("mean", "std"):
            values = getattr(inputs, name)
            value = None if values is None else torch.tensor(values, dtype=torch.float64)
            value = None if value is None else value.to(exact).reshape(-1, *rest)  # (C, 1, ...)
            self.register_buffer(name, value, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Standardise inputs (N, C, *S); without figures only the dtype changes.

        Raises:
            InputError: they have other channels or dimensions, or a dtype that they cannot have.
        """
        wanted = self.inputs
        if x.ndim != len(wanted.shape) + 1 or x.shape[1:2] != wanted.shape[:1]:
            raise InputError(f"`input` must be {wanted.describe()}, got shape {tuple(x.shape)}")
        if self.mean is not None:
            return ((x.to(self.mean.dtype) - self.mean) / self.std).to(self.dtype)
        if x.is_floating_point() != wanted.is_floating_point:
            raise InputError(
                f"`input` must be {wanted.describe()}, as the data set prepares it, got {x.dtype}"
            )
        return x.to(self.dtype) if x.is_floating_point() else x
