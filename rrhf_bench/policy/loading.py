"""Models and tokenizers of transformers, read from the hub or a folder and written to a folder.

Whatever is wrong with a source becomes a DataError of one line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rrhf_bench.errors import DataError, is_out_of_memory


def load_causal_lm(
    source: str,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    pad_token: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Return (tokenizer, model) of a hub id or a folder.

    ``pad_token`` names a token of the vocabulary as the tokenizer's pad token. A policy needs none. A reward model that
    is trained from the policy does. ``trust_remote_code`` allows code that comes with the model to run. A pickle is
    read only if it holds nothing but tensors.

    Raises DataError with the source and the reason, also if a weight of the model is not in its files.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(source, revision, pad_token, trust_remote_code)
    loaded = load_model(AutoModelForCausalLM, "a causal language model", source, dtype, revision, trust_remote_code)
    if loaded.untrained:
        renamed = f"; its files hold {loaded.unread[0]!r} instead" if loaded.unread else ""
        raise DataError(
            f"{source}: holds no {loaded.untrained[0]}, which would be random ({len(loaded.untrained)} weights are "
            f"missing{renamed}); expected a causal language model with all its weights (a reward model or a bare "
            "backbone has no LM head)"
        )
    return tokenizer, loaded.model


class Loaded(NamedTuple):
    model: Any
    untrained: Sequence[str]  # names of weights that the files do not hold, or hold in another shape
    unread: Sequence[str]  # names of weights of the files that the model does not have


def load_model(
    model_class: Any, what: str, source: str, dtype: torch.dtype, revision: str | None, trust_remote_code: bool
) -> Loaded:
    """Return a model of one of transformers' auto classes, with the names of the weights that did not fit.

    If the source is an adapter of peft, its base model is loaded and the adapter is added to the weights.
    """
    adapter, weights = _adapter_config(source, revision), {}
    place = (source, revision) if adapter is None else (adapter.base_model_name_or_path, adapter.revision)
    with load_faults(source, what):
        if adapter is not None:
            from peft import load_peft_weights

            weights = load_peft_weights(source, device="cpu", revision=revision)
        # The number of labels of a classifier's head, which no configuration of an adapter has.
        heads = [w.shape[0] for name, w in weights.items() if w.dim() == 2 and _brings(adapter, name)]
        labels = {"num_labels": min(heads)} if heads and adapter.task_type == "SEQ_CLS" else {}
        model, info = model_class.from_pretrained(
            place[0],
            revision=place[1],
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            weights_only=True,
            output_loading_info=True,
            **labels,
        )
        untrained = sorted((*info["missing_keys"], *(str(name) for name, *_ in info["mismatched_keys"])))
        if adapter is None:
            return Loaded(model, untrained, sorted(info["unexpected_keys"]))
        from peft import get_peft_model, set_peft_model_state_dict

        adapted = get_peft_model(model, adapter)
        result = set_peft_model_state_dict(adapted, weights)
        if any(_brings(adapter, name) for name in weights):
            untrained = [name for name in untrained if not _brings(adapter, name)]
        untrained += [name for name in result.missing_keys if "lora_" in name]
        merged = adapted.merge_and_unload().requires_grad_(True)  # peft froze the base's weights
        return Loaded(merged, untrained, list(result.unexpected_keys))


def _brings(adapter: Any, name: str) -> bool:
    """Return True for the name of a weight that an adapter brings whole, such as those of a classifier's head."""
    return not set(adapter.modules_to_save or ()).isdisjoint(name.split("."))


def _adapter_config(source: str, revision: str | None) -> Any:
    """Return the configuration of an adapter of peft, or None if the source is a model of its own.

    Raises DataError for an adapter that does not name its base.
    """
    from peft import PeftConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    with load_faults(source, "a model"):
        if find_adapter_config_file(source, revision=revision) is None:
            return None
        config = PeftConfig.from_pretrained(source, revision=revision)
    if not config.base_model_name_or_path:
        raise DataError(f"{source}: is an adapter whose adapter_config.json names no base model; name one there")
    return config


def architecture_of(source: str, revision: str | None) -> tuple[str, str | None]:
    """Return (hub id or folder, revision) of a model's configuration; of an adapter, those of its base."""
    adapter = _adapter_config(source, revision)
    return (source, revision) if adapter is None else (adapter.base_model_name_or_path, adapter.revision)


def load_tokenizer(source: str, revision: str | None, pad_token: str | None, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a hub id or a folder, with ``pad_token`` if one is named.

    An adapter's folder without a tokenizer has that of its base. Raises DataError with the source and the reason.
    """
    from transformers import AutoTokenizer

    place = (source, revision)
    if Path(source).is_dir() and not (Path(source) / "tokenizer_config.json").is_file():
        place = architecture_of(source, revision)
    with load_faults(source, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(place[0], revision=place[1], trust_remote_code=trust_remote_code)
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise DataError(f"{source}: pad_token {pad_token!r} is not in the tokenizer's vocabulary; name one that is")
        tokenizer.pad_token = pad_token
    return tokenizer


def end_ids_of(model: Any) -> tuple[int, ...]:
    """Return the ids by which a model's generation configuration ends a text; those beyond its vocabulary are left out,
    because no model can sample them."""
    ends = model.generation_config.eos_token_id
    vocabulary = range(model.config.get_text_config().vocab_size)
    return tuple(i for i in (ends if isinstance(ends, list) else [ends]) if i in vocabulary)


def save_causal_lm(folder: Path, model: Any, tokenizer: Any, state: Mapping[str, Tensor]) -> None:
    """Write a transformers folder: weights of a state as safetensors, configurations, tokenizer.

    The generation configuration is written as it was read. transformers refuses to write one that it accepted, such as
    Vicuna's, which has a temperature but no ``do_sample``.
    """
    from transformers import GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=dict(state), safe_serialization=True)
    finally:
        model.generation_config = own
    own.to_json_file(folder / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(folder)


def require_savable(source: str, model: Any, tokenizer: Any) -> None:
    """Raise DataError if transformers cannot write what it read, so that no training is lost.

    Everything but the weights is written, into a temporary folder.
    """
    with TemporaryDirectory() as folder:
        try:
            save_causal_lm(Path(folder), model, tokenizer, {})
        except Exception as error:  # each faulty file fails in its own way
            raise DataError(
                f"{source}: a model trained from it could not be saved ({load_reason(error)}); mend its configuration"
            ) from error


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
