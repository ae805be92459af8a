"""Reward models stored as a causal body with a bare linear ``v_head``: the layout of Dahoas/gptj-rm-static.

It is the reward model of the RRHF paper (arXiv 2304.05302) and of trlX's PPO on HH (examples/hh/ppo_hh.py): a GPT-J
body under ``transformer.``, ``v_head`` without a bias, the score read at the first EOS.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rrhf_bench.data.rows import hub_errors
from rrhf_bench.errors import DataError
from rrhf_bench.policy.loading import load_faults, load_reason, load_tokenizer
from rrhf_bench.rewards.checks import CheckedModel, verify
from rrhf_bench.rewards.hub import TOKENIZER, WEIGHTS, contract_of, identity_of, pad
from rrhf_bench.rewards.input_contract import KNOWN_LAYOUTS, Dtype, RewardContract

# The contract of the layout's one public model, for a folder without a contract.
DEFAULT = KNOWN_LAYOUTS["Dahoas/gptj-rm-static"]

# Beginnings of the names of files that a trainer leaves beside the weights, with the same suffixes.
TRAINER_FILES = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")

# Buffers that older versions of transformers stored with the weights; they are made anew from the configuration.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".attn.embed_positions")


class ValueHeadReward(CheckedModel):
    """A causal body and a ``v_head`` as a RewardModel.

    Padding is EOS, as in the original, and cannot matter: it stands behind the first EOS, where the score is read.
    """

    def __init__(
        self,
        body: Any,
        head_D: Tensor,
        tokenizer: Any,
        contract: RewardContract,
        *,
        identity: str,
        where: str = "reward model",
        batch_size: int = 16,
    ) -> None:
        """Raises DataError for whatever ``checks.verify`` refuses."""
        pad_id = contract.eos_id(tokenizer, where)
        super().__init__(
            body.config,
            tokenizer,
            contract,
            pad_id=pad_id,
            identity=identity,
            where=where,
            batch_size=batch_size,
        )
        self.eos_id = pad_id
        self.body = body.eval()
        self._head_D = head_D
        self.checks = verify(self)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        contract: RewardContract | None = None,
        revision: str | None = None,
        body: str | None = None,
        tokenizer: str | None = None,
        dtype: Dtype | None = None,
        device: str = "cpu",
        batch_size: int = 16,
        trust_remote_code: bool = False,
    ) -> ValueHeadReward:
        """Load a hub id or a folder; ``body`` names the configuration and ``tokenizer`` the tokenizer if the source
        holds only weights. By default they come from the folder, else from ``KNOWN_LAYOUTS``.

        Raises DataError for missing files, weights that do not fit the configuration, a missing ``v_head``, a contract
        that is not kept, and a body that comes with code of its own, unless ``trust_remote_code``.
        """
        from transformers import MODEL_MAPPING, AutoConfig

        where = str(source)
        known = KNOWN_LAYOUTS.get(where, DEFAULT)
        folder, commit = _fetch(where, revision or (known.revision if where in KNOWN_LAYOUTS else None))
        contract = contract_of(folder, where, "value-head", contract) or known.contract
        contract = contract if dtype is None else replace(contract, dtype=dtype)
        body_source = body or (str(folder) if (folder / "config.json").is_file() else known.body)
        holds_tokenizer = any(path for pattern in TOKENIZER for path in folder.glob(pattern))
        tokenizer_source = tokenizer or (str(folder) if holds_tokenizer else known.tokenizer)
        assert body_source is not None
        assert tokenizer_source is not None

        state = _weights(folder, where)
        head = state.pop("v_head.weight", None)
        if head is None or head.dim() != 2 or head.shape[0] != 1:
            found = "none" if head is None else f"one of shape {tuple(head.shape)}"
            raise DataError(f"{where}: v_head.weight: found {found}; expected shape (1, hidden size)")
        torch_dtype = getattr(torch, contract.dtype)
        with load_faults(body_source, "a model configuration"):
            config = AutoConfig.from_pretrained(body_source, trust_remote_code=trust_remote_code)
            if type(config) not in MODEL_MAPPING:
                raise DataError(
                    f"{body_source}: found a model of type {config.model_type!r}; expected a causal body of "
                    "transformers; put the config.json of the body beside the weights"
                )
        with load_faults(where, f"the body of {config.model_type}"):
            model, info = MODEL_MAPPING[type(config)].from_pretrained(
                None,
                config=config,
                state_dict={k.removeprefix("transformer."): w for k, w in state.items() if not k.endswith(BUFFERS)},
                dtype=torch_dtype,
                output_loading_info=True,
            )
        faults = sorted((*info["missing_keys"], *(str(key) for key, *_ in info["mismatched_keys"])))
        left = sorted(set(info["unexpected_keys"]))
        if faults or left or head.shape[1] != config.hidden_size:
            what = f"{faults[0]} is missing" if faults else f"{left[0]} is too many" if left else "v_head does not fit"
            raise DataError(
                f"{where}: the weights do not fit {body_source}'s {config.model_type} ({what}); put the config.json of "
                "their body beside them"
            )
        others = [
            f"{name} {value}"
            for name, value in (("body", body_source), ("tokenizer", tokenizer_source))
            if value != str(folder)
        ]
        return cls(
            model.to(device),
            head[0].to(device, torch_dtype),
            load_tokenizer(tokenizer_source, None, None, trust_remote_code),
            contract,
            identity=identity_of("value-head", where, commit, contract, *others),
            where=where,
            batch_size=batch_size,
        )

    @torch.no_grad()
    def score_batch(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Return the (B,) scores of rows of ids, in one pass and in this order."""
        ids_BL, mask_BL = pad(rows, self.pad_id, self.body.device)
        hidden_BLD = self.body(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).last_hidden_state
        index = torch.tensor([self.contract.index(row, self.eos_id) for row in rows])
        return (hidden_BLD[torch.arange(len(rows)), index] @ self._head_D).double().cpu().numpy()

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        yield "v_head.weight", self._head_D
        yield from self.body.named_parameters()


def _fetch(source: str, revision: str | None) -> tuple[Path, str | None]:
    """Return (folder, commit) of a hub id or a folder."""
    if Path(source).is_dir():
        return Path(source), None
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=[*WEIGHTS, *TOKENIZER, "*.json"]))
    except hub_errors() as error:
        raise DataError(f"{source}: is no folder and cannot be fetched from the hub ({load_reason(error)})") from error
    return folder, folder.name  # the cache names a snapshot's folder by its commit


def _weights(folder: Path, where: str) -> dict[str, Tensor]:
    """Return all tensors of the folder's weight files: safetensors if there are some, else torch files."""
    from safetensors.torch import load_file

    kinds = (sorted(p for p in folder.glob(kind) if not p.name.startswith(TRAINER_FILES)) for kind in WEIGHTS)
    files = next(filter(None, kinds), [])
    if not files:
        raise DataError(f"{where}: holds no weights; expected one of {', '.join(WEIGHTS)}")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                state |= load_file(file)
            else:
                state |= torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or foreign file fails in a different way each time
            raise DataError(f"{where}: {file.name} cannot be read as weights ({load_reason(error)})") from error
    return state
