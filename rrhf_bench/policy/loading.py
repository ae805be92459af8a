"""Models and tokenizers of transformers, from the hub or a folder: what goes wrong there, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rrhf_bench.errors import DataError, is_out_of_memory


def load_causal_lm(
    source: str,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    pad_token: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """(tokenizer, model) from a hub id or a folder, or a DataError that names the source and the reason.

    ``pad_token`` names a token of the vocabulary for a tokenizer that has none. For a policy any will do, EOS included:
    padding is masked and every EOS that is scored was put there by hand. A pickle is read only if it holds nothing but
    tensors; ``trust_remote_code``: run code that comes with the model.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(source, revision, pad_token, trust_remote_code)
    with load_faults(source, "a causal language model"):
        model = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code, weights_only=True
        )
    return tokenizer, model


def load_tokenizer(source: str, revision: str | None, pad_token: str | None, trust_remote_code: bool = False) -> Any:
    """A tokenizer from a hub id or a folder, with ``pad_token`` where one is named. Raises DataError naming it."""
    from transformers import AutoTokenizer

    with load_faults(source, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise DataError(f"{source}: pad_token {pad_token!r} is not in the tokenizer's vocabulary; name one that is")
        tokenizer.pad_token = pad_token
    return tokenizer


@contextmanager
def load_faults(source: str, what: str) -> Iterator[None]:
    """What transformers raises for a source that it cannot load, as one line; its bars are silenced, and its own report
    of missing weights, because every caller checks them."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # a missing, foreign or damaged file each fails in the way of its own reader
        if is_out_of_memory(error):
            raise
        reason = load_reason(error)
        if "trust_remote_code" in str(error):
            raise DataError(
                f"{source}: comes with code of its own, which is not run; read it, and if you trust it set "
                "trust_remote_code = true in the model's table"
            ) from error
        raise DataError(f"{source}: cannot be loaded as {what} ({reason})") from error
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def load_reason(error: Exception) -> str:
    """Why a file could not be read, in one line. torch's advice about a pickle that is more than tensors is to run it;
    ours is not."""
    if "weights only load failed" in str(error).lower():
        return "its weights are a pickle of more than tensors, which may run code and is not read; expected safetensors"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
