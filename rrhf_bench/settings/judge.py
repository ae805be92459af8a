"""Which judge rates candidates, and how patiently it is asked. Free of torch."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator

from rrhf_bench.settings.base import Settings


class JudgeSettings(Settings):
    """An OpenAI-compatible chat endpoint. The key itself is never a setting: only the name of its variable is.

    ``structured`` is how the form of the answer is forced: "json_schema" as OpenAI does it, "regex" as vLLM does it
    (``structured_outputs``; small models fill a schema with blanks), "none" by asking alone.
    """

    # A secret put into the wrong field must not come back in the message about it.
    model_config = ConfigDict(hide_input_in_errors=True)

    base_url: str  # as the openai client has it: up to and including /v1
    model: Annotated[str, Field(min_length=1)]
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None  # none: no key is sent
    structured: Literal["regex", "json_schema", "none"] = "json_schema"
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    max_tokens: Annotated[int, Field(ge=16)] = 1024  # of one answer, some 40 a response
    attempts: Annotated[int, Field(ge=1, le=100)] = 3  # answers asked for before an unreadable prompt is dropped
    seed: int = 0  # of the order in which responses are shown, and of the jitter
    concurrency: Annotated[int, Field(ge=1, le=256)] = 4
    timeout: Annotated[float, Field(gt=0.0)] = 120.0  # seconds for one answer
    retries: Annotated[int, Field(ge=0, le=100)] = 5  # of a request that met no server, a busy or a failing one
    backoff: Annotated[float, Field(ge=0.0)] = 1.0  # seconds before the first retry; doubles with each
    max_backoff: Annotated[float, Field(ge=0.0)] = 60.0

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # of a port that is no number; its message may hold a secret
            usable = False
        if not usable:
            raise ValueError("is not a URL; expected http(s)://host[:port]/v1")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("holds more than scheme, host and path; give a key through api_key_env")
        return value
