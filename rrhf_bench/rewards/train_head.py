"""Train a reward model on pairs of replies: a linear head on the initial policy's body.

Shape letters: B pairs, N rows (the texts of a batch), L tokens padded, K outputs of the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rrhf_bench.data.dialogue import TemplateKind
from rrhf_bench.errors import DataError, StageError
from rrhf_bench.policy.loading import architecture_of, load_causal_lm, load_faults, load_tokenizer
from rrhf_bench.records import Preference, Prompt
from rrhf_bench.rewards.checks import record_of
from rrhf_bench.rewards.hub import ClassifierReward, pad, pooled_logits
from rrhf_bench.rewards.input_contract import RewardContract, length_limit
from rrhf_bench.rewards.pair_losses import OBJECTIVES, prompt_weights
from rrhf_bench.schedule import batch_order, lr_factor
from rrhf_bench.seeding import generator, torch_seed
from rrhf_bench.settings.reward import RewardTrainingSettings

CURVE_POINTS = 20

Log = Callable[[Mapping[str, float]], None]


@dataclass(frozen=True)
class RewardTraining:
    """The outcome of training. In the first epoch accuracies are of unseen pairs; a tie counts one half."""

    steps: int
    loss: float  # mean over the last tenth of the steps
    accuracy_curve: tuple[tuple[int, float], ...]  # (steps done, accuracy of the pairs since the point before)
    counts: Mapping[
        str, int
    ]  # pairs, truncated (texts cut on the left); ties, ties_dropped and margins if there are any


def train_head(
    initial: str | Path,
    preferences: Sequence[Preference],
    settings: RewardTrainingSettings,
    folder: Path,
    *,
    seed: int,
    template: TemplateKind = "hh",
    pad_token: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    log: Log | None = None,
    trust_remote_code: bool = False,
) -> RewardTraining:
    """Train a linear head and the body below it in float32, and save them to ``folder`` for ``ClassifierReward``.

    The head starts at zero: every pair is a tie at first, and the run depends on the seed only through the order of
    the pairs. ``reward_contract.json`` holds the contract and eight texts with their ids and scores, which every load
    replays. ``log`` gets one line a step (``loss``, ``rewards/accuracies``, ``rewards/margins``, ``lr``). Raises
    DataError for an initial model that cannot carry such a head and for no pairs, StageError for a loss that is not
    finite.
    """
    objective = OBJECTIVES[settings.objective]
    labels = objective.labels
    preferences, counts = usable_pairs(preferences, settings)
    if not preferences:
        raise DataError("reward model: found no pairs to train on; expected at least one")
    where = str(initial)
    tokenizer = load_tokenizer(where, revision, pad_token, trust_remote_code)
    if tokenizer.pad_token_id is None:
        raise DataError(f"{where}: the tokenizer has no pad token; name one of its tokens with pad_token")
    model = _model(where, revision, labels, trust_remote_code).to(device)
    model.config.pad_token_id = tokenizer.pad_token_id
    contract = RewardContract(
        template=template,
        append_eos=template != "chat",
        max_length=length_limit(settings.max_length, model.config),
    )

    assert all(pair.rejected is not None for pair in preferences), "a reward model is trained on pairs"
    encoded = [
        [
            contract.encode(pair.prompt, reply or "", tokenizer, contract.max_length)
            for reply in (pair.chosen, pair.rejected)
        ]
        for pair in preferences
    ]
    pairs = [[ids for ids, _ in pair] for pair in encoded]
    truncated = sum(cut for pair in encoded for _, cut in pair)

    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    groups, size = _groups(preferences, settings)
    total = count_steps(preferences, settings)
    warmup = math.ceil(settings.warmup * total)
    losses: list[float] = []
    right = np.zeros(total)  # decided pairs ranked right at each step
    sizes = np.zeros(total)
    lengths = [max(len(ids) for i in group for ids in pairs[i]) for group in groups]
    batches = (
        batch
        for epoch in range(settings.epochs)
        for batch in batch_order(lengths, size, generator(seed, "reward model", epoch))
    )
    for step, batch in enumerate(batches):
        lr = settings.lr * lr_factor(step, total, warmup=warmup, schedule="linear")
        for group in optimiser.param_groups:
            group["lr"] = lr
        chosen = [i for g in batch for i in groups[g]]
        rows = [pairs[i][0] for i in chosen] + [pairs[i][1] for i in chosen]
        texts = rows if settings.batch_prompts is None else list(map(list, dict.fromkeys(map(tuple, rows))))
        ids_NL, mask_NL = pad(texts, tokenizer.pad_token_id, device)
        logit_NK = pooled_logits(model, ids_NL, mask_NL, [len(row) - 1 for row in texts])
        score_N = logit_NK[:, 0] if labels is None else logit_NK[:, 1] - logit_NK[:, 0]
        if texts is not rows:  # each reply was read once, however many pairs it is in
            place = {tuple(text): n for n, text in enumerate(texts)}
            score_N = score_N[[place[tuple(row)] for row in rows]]
        chosen_B, rejected_B = score_N.chunk(2)
        batch_pairs = [preferences[i] for i in chosen]
        value = objective.loss(chosen_B, rejected_B, **_options(batch_pairs, settings, score_N))
        if not torch.isfinite(value):
            raise StageError(f"reward model: the loss at step {step + 1} of {total} is {value.item()}; lower its lr")
        optimiser.zero_grad()
        value.backward()
        optimiser.step()

        margin_B = (chosen_B - rejected_B).detach()
        decided_B = torch.tensor([not pair.tie for pair in batch_pairs], device=margin_B.device)
        sizes[step] = decided_B.sum().item()
        right[step] = (decided_B * ((margin_B > 0).double() + 0.5 * (margin_B == 0))).sum().item()
        losses.append(value.item())
        if log is not None:
            line = {"loss": losses[-1], "rewards/accuracies": right[step] / max(1.0, sizes[step]), "lr": lr}
            log({"step": step + 1, **line, "rewards/margins": margin_B.mean().item()})

    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trained = ClassifierReward(model, tokenizer, contract, identity="", where=where, label=labels and labels[1])
    replace(contract, record=record_of(trained)).write(folder)
    ends = [round(total * (i + 1) / min(CURVE_POINTS, total)) for i in range(min(CURVE_POINTS, total))]
    curve = tuple(
        (end, float(right[start:end].sum() / sizes[start:end].sum()))
        for start, end in zip([0, *ends], ends, strict=False)
        if sizes[start:end].any()
    )
    last = losses[-max(1, total // 10) :]
    return RewardTraining(total, sum(last) / len(last), curve, {**counts, "truncated": truncated})


def usable_pairs(
    preferences: Sequence[Preference], settings: RewardTrainingSettings
) -> tuple[Sequence[Preference], dict[str, int]]:
    """Return (the pairs that training reads, counts): the first ``settings.pairs`` of those given.

    A classifier has no ties; ``ties = "drop"`` leaves them out.
    """
    preferences = preferences[: settings.pairs]
    drops = settings.ties == "drop" or settings.objective == "classification"
    used = [pair for pair in preferences if not (drops and pair.tie)]
    ties = sum(pair.tie is True for pair in preferences)
    margins = sum(pair.margin is not None for pair in used) if settings.margin_scale else 0
    found = {"ties_dropped" if drops else "ties": ties, "margins": margins}
    return used, {"pairs": len(used), **{name: count for name, count in found.items() if count}}


def count_steps(preferences: Sequence[Preference], settings: RewardTrainingSettings) -> int:
    """Return the optimiser steps of a training run."""
    groups, size = _groups(usable_pairs(preferences, settings)[0], settings)
    return settings.epochs * math.ceil(len(groups) / size)


def _groups(preferences: Sequence[Preference], settings: RewardTrainingSettings) -> tuple[list[list[int]], int]:
    """Return (indices of the pairs that stay in one batch, how many such groups a batch has)."""
    if settings.batch_prompts is None:
        return [[i] for i in range(len(preferences))], settings.batch_pairs
    groups: dict[Prompt, list[int]] = {}
    for i, pair in enumerate(preferences):
        groups.setdefault(pair.prompt, []).append(i)
    return list(groups.values()), settings.batch_prompts


def _options(pairs: Sequence[Preference], settings: RewardTrainingSettings, like: torch.Tensor) -> dict[str, Any]:
    """Return the keyword arguments of the loss of a batch; none for plain pairs under the default settings."""
    if settings.objective == "classification":
        return {}
    options: dict[str, Any] = {"centring": settings.centring} if settings.centring else {}
    if settings.margin_scale and any(pair.margin for pair in pairs):
        options["margin_B"] = like.new_tensor([settings.margin_scale * (pair.margin or 0.0) for pair in pairs])
    if any(pair.tie for pair in pairs):
        options["tie_B"] = torch.tensor([pair.tie is True for pair in pairs], device=like.device)
    if settings.ties == "rao-kupper":
        options["tie_threshold"] = settings.tie_threshold
    if settings.batch_prompts is not None:
        number = {prompt: n for n, prompt in enumerate(dict.fromkeys(pair.prompt for pair in pairs))}
        options["weight_B"] = prompt_weights(torch.tensor([number[p.prompt] for p in pairs])).to(like)
    return options


def _model(where: str, revision: str | None, labels: tuple[str, str] | None, trust_remote_code: bool) -> Any:
    """Return a model with a linear head of zeros. Of an adapter it is the base, with the adapter added to its body."""
    from transformers import AutoModelForSequenceClassification

    base = architecture_of(where, revision)
    head: dict[str, Any] = {"num_labels": 1}
    if labels is not None:
        head = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    with load_faults(where, "a sequence classifier"), torch_seed("reward head"):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            base[0],
            revision=base[1],
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
            weights_only=True,
            **head,
        )
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("score."))
    if missing or not isinstance(getattr(model, "score", None), torch.nn.Linear):
        found = f"{missing[0]} missing" if missing else f"a {type(model).__name__} without a linear score head"
        raise DataError(f"{where}: found {found}; expected a causal language model to put a reward head on")
    if base != (where, revision):
        _, adapted = load_causal_lm(where, dtype=torch.float32, revision=revision, trust_remote_code=trust_remote_code)
        with load_faults(where, "the body of its base"):
            model.base_model.load_state_dict(adapted.base_model.state_dict())
    torch.nn.init.zeros_(model.score.weight)
    return model.eval()  # no dropout: runs are the same to the last bit, as for every policy here
