"""Define the base class of all tables of an experiment file. Free of torch, so that `plan` answers at once."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# TOML has lists only; strict mode would refuse them for a tuple.
Names = Annotated[tuple[str, ...], Field(strict=False)]


class Settings(BaseModel):
    """A table of the experiment file: no unknown keys, no silent conversions, no change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)
