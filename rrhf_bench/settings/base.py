"""Define the base class of all tables of an experiment file. Free of torch, so that `plan` answers at once."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator

from rrhf_bench.errors import nearest

# TOML has lists only; strict mode would refuse them for a tuple.
Names = Annotated[tuple[str, ...], Field(strict=False)]
# A switch that is no part of any key while it is off, such as whether code that comes with a model may run.
Switch = Annotated[bool, Field(exclude_if=lambda on: not on)]


class Settings(BaseModel):
    """A table of the experiment file: no unknown keys, no silent conversions, no change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)

    table: ClassVar[str] = ""  # which of several tables that a key may hold, for the message on an unknown key

    @model_validator(mode="wrap")
    @classmethod
    def _explain_unknown_keys(cls, value: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Name the keys that the table has: pydantic's own error does not say them."""
        try:
            return validate(value)
        except ValidationError as error:
            faults: list[Any] = error.errors()
            for fault in faults:
                if fault["type"] == "extra_forbidden":  # of this table: one within it has explained its own
                    key, keys = fault["loc"][-1], cls.model_fields
                    words = f"unknown key{cls.table}; allowed are {', '.join(keys)}{nearest(key, keys)}"
                    fault |= {"type": "value_error", "ctx": {"error": ValueError(words)}}
            raise ValidationError.from_exception_data(cls.__name__, faults) from None
