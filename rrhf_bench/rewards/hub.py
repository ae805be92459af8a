"""Reward models with a sequence-classification head, from the hub or a folder.

Shape letters: N rows, B rows of one batch, L tokens padded, D hidden, K labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rrhf_bench.data.dialogue import TemplateKind
from rrhf_bench.errors import DataError
from rrhf_bench.policy.loading import load_model, load_tokenizer
from rrhf_bench.rewards.checks import CheckedModel, verify
from rrhf_bench.rewards.input_contract import (
    CONTRACT_FILE,
    KNOWN_LAYOUTS,
    Dtype,
    Layout,
    RewardContract,
    minimum,
)

WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "chat_template*", "*.model")


class ClassifierReward(CheckedModel):
    """A ``*ForSequenceClassification`` model as a RewardModel: the score of a model with one label, or the probability
    in [0, 1] of one label among several (softmax).

    For a causal model the score is read at the position of the contract, counted from the row's own length. Its class
    would look for the last token that is not the padding token, which passes over the appended EOS where padding and
    EOS are one token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        contract: RewardContract,
        *,
        identity: str,
        where: str = "reward model",
        label: str | None = None,
        batch_size: int = 16,
    ) -> None:
        """Raises DataError for labels of which none is the reward, a tokenizer without a pad token or the contract's
        EOS, a class that does not score as it is read here, and whatever ``checks.verify`` refuses."""
        self._label = _label_index(model.config, label, where)
        if tokenizer.pad_token_id is None:
            raise DataError(
                f"{where}: the tokenizer has no pad token; name one of its tokens with reward_model.pad_token "
                "(--reward-pad-token; any will do, EOS included)"
            )
        super().__init__(
            model.config,
            tokenizer,
            contract,
            pad_id=tokenizer.pad_token_id,
            identity=identity,
            where=where,
            batch_size=batch_size,
            pools_itself=getattr(model, "score", None) is None,
        )
        self.model = model.eval()
        self.label = label
        if self.pools_itself:
            if contract.position != "last":
                raise DataError(f"{where}: {type(model).__name__} pools by itself; expected position 'last'")
            self.max_length = minimum(self.max_length, tokenizer.model_max_length, position_limit(model))
        else:
            self._check_class()
        self.checks = verify(self)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        template: TemplateKind = "hh",
        label: str | None = None,
        contract: RewardContract | None = None,
        revision: str | None = None,
        dtype: Dtype | None = None,
        pad_token: str | None = None,
        device: str = "cpu",
        batch_size: int = 16,
        trust_remote_code: bool = False,
    ) -> ClassifierReward:
        """Load a hub id or a folder.

        Without ``contract``, the contract is the one stored in the folder, else the one known of this model, else the
        template's default; a record in the folder is replayed in any case. ``label`` is the label whose probability is
        the reward. ``trust_remote_code`` allows code that comes with the model to run.

        Raises DataError if the source cannot be loaded, has no trained head, or cannot be used (see ``__init__``).
        """
        from transformers import AutoModelForSequenceClassification

        where = str(source)
        folder = contract_folder(where, revision)
        contract = contract_of(folder, where, "classifier", contract) or RewardContract.default(template)
        contract = contract if dtype is None else replace(contract, dtype=dtype)
        tokenizer = load_tokenizer(where, revision, pad_token, trust_remote_code)
        loaded = load_model(
            AutoModelForSequenceClassification,
            "a sequence classifier",
            where,
            getattr(torch, contract.dtype),
            revision,
            trust_remote_code,
        )
        model = loaded.model
        if loaded.untrained:
            raise DataError(
                f"{where}: holds no trained {loaded.untrained[0]}, which would be random; expected a trained reward "
                "model (train one from this language model, or choose another)"
            )
        commit = getattr(model.config, "_commit_hash", None)
        others = () if label is None else (f"label {label}",)
        identity = identity_of("classifier", where, commit, contract, *others)
        return cls(
            model.to(device), tokenizer, contract, identity=identity, where=where, label=label, batch_size=batch_size
        )

    @torch.no_grad()
    def score_batch(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Return the (B,) scores of rows of ids, in one pass and in this order."""
        if self.pools_itself:  # and masks its padding
            ids_BL, mask_BL = pad(rows, self.pad_id, self.model.device, self.contract.padding_side)
            logit_BK = self.model(input_ids=ids_BL, attention_mask=mask_BL).logits
        else:
            ids_BL, mask_BL = pad(rows, self.pad_id, self.model.device)
            index = [self.contract.index(row, self.eos_id) for row in rows]
            logit_BK = pooled_logits(self.model, ids_BL, mask_BL, index)
        if self._label is None:
            return logit_BK[:, 0].double().cpu().numpy()
        # float32 would round every confident probability to 1: ties
        return logit_BK.double().softmax(dim=1)[:, self._label].cpu().numpy()

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        return self.model.named_parameters()

    @torch.no_grad()
    def _check_class(self) -> None:
        """Compare the class's own score with ours on one short row without padding. Raises DataError if they differ."""
        pad_id = self.model.config.get_text_config().pad_token_id
        row = [i for i in range(5) if i not in (pad_id, self.pad_id)]
        ids_BL, mask_BL = pad([row], 0, self.model.device)
        theirs = self.model(input_ids=ids_BL, attention_mask=mask_BL).logits
        own = pooled_logits(self.model, ids_BL, mask_BL, [len(row) - 1])
        if not torch.allclose(own.float(), theirs.float(), rtol=1e-2, atol=1e-3, equal_nan=True):
            raise DataError(
                f"{self.where}: {type(self.model).__name__} does not score the last hidden state; expected a class "
                "whose head is a linear layer on it"
            )


def contract_folder(source: str, revision: str | None) -> Path:
    """Return the folder that may hold the contract: of a hub id its snapshot, into which the contract is fetched."""
    from transformers.utils import cached_file

    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(cached_file(source, CONTRACT_FILE, revision=revision) or source).parent
    except (OSError, ValueError):  # no such file, no network, or no such model, which loading its tokenizer names
        return Path(source)


def contract_of(folder: Path, where: str, layout: Layout, stated: RewardContract | None) -> RewardContract | None:
    """Return the stated contract with the record of the folder, else the one stored there, else the one known of
    this hub id, else None. Raises DataError for a hub id that is known to be of another layout."""
    known = KNOWN_LAYOUTS.get(where)
    if known is not None and known.layout != layout:
        raise DataError(f'{where}: is of another layout; set reward_model.layout = "{known.layout}" (--layout)')
    stored = RewardContract.read(folder)
    if stated is not None and stored is not None:
        return replace(stated, record=stored.record)
    return stated or stored or (None if known is None else known.contract)


def _label_index(config: Any, label: str | None, where: str) -> int | None:
    """Return the index of the label that is the reward, or None for a model with one label."""
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if len(names) == 1:
        if label is not None:
            raise DataError(f"{where}: has 1 label, so its score is the reward; remove the label {label!r}")
        return None
    shown = f"has {len(names)} labels ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
    if label is None:
        raise DataError(f"{where}: {shown}; name the one whose probability is the reward: reward_model.label, --label")
    if names.count(label) != 1:
        raise DataError(f"{where}: {shown}; found the label {label!r}; expected one of them")
    if config.problem_type in ("multi_label_classification", "regression"):
        what = "numbers of a regression" if config.problem_type == "regression" else "several of which may hold at once"
        raise DataError(f"{where}: {shown}, {what}; expected labels that exclude one another")
    return names.index(label)


def pooled_logits(model: Any, ids_BL: Tensor, mask_BL: Tensor, index: Sequence[int]) -> Tensor:
    """Return the (B, labels) logits of the hidden states at ``index``; the head sees only these rows."""
    hidden_BLD = model.base_model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).last_hidden_state
    return model.score(hidden_BLD[torch.arange(len(index)), torch.tensor(index)])


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str, side: Literal["right", "left"] = "right"
) -> tuple[Tensor, Tensor]:
    """Return (ids, attention mask), each (B, L), padded on one side."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids_BL = pad_sequence(ids, batch_first=True, padding_value=pad_id, padding_side=side)
    mask_BL = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side=side)
    return ids_BL.to(device), mask_BL.to(device)


def position_limit(model: Any) -> int | None:
    """Return how many tokens a model like RoBERTa, which counts positions from its padding index on, has positions for,
    or None for a model of another kind."""
    positions: Any = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding_index = getattr(positions, "padding_idx", None)
    return None if padding_index is None else positions.num_embeddings - padding_index - 1


def identity_of(layout: str, source: str, commit: str | None, contract: RewardContract, *others: str) -> str:
    """Return what decides the scores: the hub's commit or the contents of the folder, and the contract."""
    folder = Path(source)
    if folder.is_dir():
        digest = hashlib.sha256()
        files = {path for pattern in (*WEIGHTS, "config.json", *TOKENIZER) for path in folder.glob(pattern)}
        for path in sorted(files, key=lambda path: path.name):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        name = f"sha256:{digest.hexdigest()}"
    else:
        name = f"{source}@{commit}"
    return " ".join((layout, name, *others, repr(contract)))
