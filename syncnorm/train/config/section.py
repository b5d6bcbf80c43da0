"""What the sections of a configuration are made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Finite = Annotated[float, Field(allow_inf_nan=False)]
# More of anything is a slip of the pen; Python would take it, torch and float would not.
Whole = Annotated[int, Field(le=1_000_000_000)]


class Section(BaseModel):
    """A group of keys. Strict: "3" is no integer, and neither is true."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
