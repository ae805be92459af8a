"""Check that a reward model gets its input as in training. Every load runs the checks; ``doctor`` shows the results.

A model with another input still gives numbers. Eight lopsided texts reveal nine faults: an EOS too many or too few, a
doubled BOS, a pad token that is also the EOS, truncation or padding on the wrong side, a coarser dtype, several labels,
an untrained head, and scores that depend on the rest of the batch. Held-out pairs reveal that the other setting of EOS
orders pairs better, or that truncation removes the replies.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rrhf_bench.errors import DataError, is_out_of_memory
from rrhf_bench.records import Preference, Prompt
from rrhf_bench.rewards.input_contract import (
    CONTRACT_FILE,
    KNOWN_LAYOUTS,
    Dtype,
    Record,
    RecordedText,
    RewardContract,
    length_batches,
    length_limit,
    minimum,
)
from rrhf_bench.rewards.reward import require_finite

# The largest difference between two computations of one score that differ only in batch, kernels or machine: a share of
# the largest score, or of 1 if all are smaller. Measured on Llamas and GPT-2s of 2 to 12 layers, one text alone
# against eight: 1e-6, 3e-3 and 3e-2 at most; half precision against float32: 2e-2 and 6e-2. Deeper models lose more.
ROUNDING: dict[Dtype, float] = {"float32": 1e-4, "float16": 4e-2, "bfloat16": 2e-1}

MAX_P_VALUE = 0.01  # of a difference between two settings on held-out pairs that counts as real


# Lopsided on purpose, without ids and scores yet. The last is always cut: a text that fills a context of thousands of
# tokens takes too long.
PROBES = tuple(
    RecordedText(Prompt(f"\n\nHuman: {question}\n\nAssistant:"), response, (), 0.0, *max_length)
    for question, response, *max_length in (
        ("How do I bake bread?", " First, mix the flour, the water and the salt. Then let it rest for an hour."),
        ("What is a glacier?", ""),
        ("What is a glacier?", " A slow river of ice."),
        ("Is 17 a prime number?", " Yes"),
        ("Hi!\n\nAssistant: Hello.\n\nHuman: Tell me a joke.", " No.  "),
        ("Wie heißt „Brot“ auf Japanisch?", " „Brot“ heißt パン (pan) — gern geschehen! 🙂"),
        ("Count to forty.", " " + ", ".join(map(str, range(1, 41))) + "."),
        ("Describe the sea. " * 3, " It is wide and deep and blue, and it is never quite still.", 16),
    )
)


@dataclass(frozen=True)
class Check:
    """One result. ``ok`` is None if nothing can pass or fail; a result that is not ok says how to repair it."""

    name: str
    ok: bool | None
    found: str


class CheckedModel(ABC):
    """The base of both layouts of a reward model: encoding, scoring and checks of the input.

    ``truncated`` counts the texts cut so far; ``checks`` holds the results of ``verify``.
    """

    checks: tuple[Check, ...]
    label: str | None = None

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        contract: RewardContract,
        *,
        pad_id: int,
        identity: str,
        where: str,
        batch_size: int,
        pools_itself: bool = False,
    ) -> None:
        """``pools_itself``: the model's class decides where the score is read."""
        if contract.padding_side == "left" and not pools_itself:
            raise DataError(
                f'{where}: found padding_side = "left", but its score is read at the length of its row; set "right" in '
                f"{CONTRACT_FILE}, or remove the key"
            )
        self.pools_itself = pools_itself
        self.tokenizer = tokenizer
        self.contract = contract
        self.pad_id = pad_id
        self.identity = identity
        self.where = where
        self.batch_size = batch_size
        self.truncated = 0
        self.max_length = length_limit(contract.max_length, config)
        self.eos_id: int | None = contract.eos_id(tokenizer, where) if contract.append_eos else tokenizer.eos_token_id

    @abstractmethod
    def score_batch(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Return the (B,) scores of rows of ids, in one pass and in this order."""

    @abstractmethod
    def named_weights(self) -> Iterable[tuple[str, Tensor]]: ...

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> NDArray[np.float64]:
        """Return the (N,) scores as computed, a score that is not finite included; add to ``truncated``."""
        rows: list[list[int]] = []
        for prompt, response in zip(prompts, responses, strict=True):
            ids, cut = self.contract.encode(prompt, response, self.tokenizer, self.max_length)
            rows.append(ids)
            self.truncated += cut
        score_N = np.empty(len(rows))
        for batch in length_batches(rows, self.batch_size):
            score_N[batch] = self.score_batch([rows[i] for i in batch])
        return score_N

    def encode(self, prompt: Prompt, response: str, max_length: int | None = None) -> list[int]:
        """Return the ids that this text is scored as, cut to ``max_length`` or to the model's own smaller limit."""
        return self.contract.encode(prompt, response, self.tokenizer, minimum(max_length, self.max_length))[0]

    def under(self, contract: RewardContract) -> Self:
        """Return the same weights under another contract, without checks."""
        other = copy.copy(self)
        other.contract = contract
        other.eos_id = contract.eos_id(self.tokenizer, self.where) if contract.append_eos else self.eos_id
        return other


def verify(model: CheckedModel) -> tuple[Check, ...]:
    """Return the results of all checks. Raises DataError with the repair for a fault that changes scores."""
    record = model.contract.record
    texts = PROBES if record is None else record.texts
    rows = _rows(model, texts)
    if record is not None:
        _replay_ids(model, record, rows)
    whole = [row for text, row in zip(texts, rows, strict=True) if text.max_length is None]
    ends = (_check_eos(model, whole), _check_bos(model, whole))
    _check_weights(model)
    score_N = _score_together(model, texts, rows)
    _check_head(model, rows, score_N)
    apart = _check_alone(model, rows, score_N)
    padding = _check_padding(model, rows)
    replayed, dtype = _replay_scores(model, record, score_N)
    side = model.contract.padding_side if model.pools_itself else "right, behind the position of the score"
    limit = "the text's own length" if model.max_length is None else f"{model.max_length} tokens"
    return (
        *ends,
        padding,
        Check("truncation side", None, f"{model.contract.truncation_side}, at {limit}"),
        Check("padding side", True, f"{side}; it changes no score"),
        dtype,
        Check("labels", True, "one" if model.label is None else f"{model.label!r} of several, its probability"),
        Check("head", True, "all of its weights are stored; it tells texts apart"),
        Check("batch and order", True, f"alone, together and backwards at most {apart:.1e} apart"),
        replayed,
    )


def record_of(model: CheckedModel) -> Record:
    """Return the eight texts with the ids and scores that the model gives them now; later loads replay them."""
    texts = (
        replace(probe, ids=tuple(row), score=float(model.score_batch([row])[0]))
        for probe, row in zip(PROBES, _rows(model, PROBES), strict=True)
    )
    return Record(tuple(texts), model.contract.dtype, model.label)


def bound(dtype: Dtype, score_N: NDArray[np.float64]) -> float:
    """Return the largest difference that rounding explains."""
    return ROUNDING[dtype] * max(1.0, float(np.abs(score_N).max()))


def _rows(model: CheckedModel, texts: Iterable[RecordedText]) -> list[list[int]]:
    return [model.encode(text.prompt, text.response, text.max_length) for text in texts]


# Checks of the ids


def _replay_ids(model: CheckedModel, record: Record, rows: Sequence[Sequence[int]]) -> None:
    names = model.tokenizer.convert_ids_to_tokens
    for i, (text, row) in enumerate(zip(record.texts, rows, strict=True), 1):
        if (found := list(row)) == (expected := list(text.ids)):
            continue
        place = next(j for j, (a, b) in enumerate(zip_longest(found, expected)) if a != b)
        shown, wanted = (names(ids[place : place + 3]) or "the end" for ids in (found, expected))
        raise DataError(
            f"{model.where}: recorded text {i} has other tokens than in training: at token {place} found {shown}, "
            f"expected {wanted}; restore {CONTRACT_FILE}, tokenizer and chat template, or train it again"
        )


def _token(model: CheckedModel, id_: int) -> str:
    return str(model.tokenizer.convert_ids_to_tokens(id_))


def _check_bos(model: CheckedModel, rows: Sequence[Sequence[int]]) -> Check:
    leading = {model.tokenizer.bos_token_id, model.tokenizer.cls_token_id} - {None}
    first = rows[0][0]
    if first not in leading:
        return Check("BOS", None, "none")
    if all(len(row) > 1 and row[0] == row[1] for row in rows):
        raise DataError(
            f"{model.where}: every text starts with its BOS {_token(model, first)} twice; remove one from the chat "
            "template or from tokenizer.json, or set add_bos_token = false"
        )
    return Check("BOS", True, f"one {_token(model, first)}")


def _check_eos(model: CheckedModel, rows: Sequence[Sequence[int]]) -> Check:
    contract, eos_id = model.contract, model.eos_id
    ok, basis = (True, _basis(model)) if _basis(model) else (None, "by its contract")
    end = max(rows, key=len)[-4:]  # of the longest reply: the turn before an empty one may have its own EOS
    if eos_id is None or eos_id not in end:
        return Check("EOS", ok, f"none at the end, {basis}")
    token = _token(model, eos_id)
    if contract.append_eos and eos_id in end[:-1]:  # a chat template may end its turn with EOS and a line break
        raise DataError(
            f"{model.where}: its EOS {token} stands twice at the end; set append_eos = false in {CONTRACT_FILE}"
        )
    written = "" if contract.append_eos else " (the template or the tokenizer writes it)"
    return Check("EOS", ok, f"one {token} at the end{written}, {basis}")


def _basis(model: CheckedModel) -> str:
    """Return how it is known that the ids are those of training, or "" if it is not known."""
    if model.contract.record is not None:
        return "as recorded when it was trained"
    known = KNOWN_LAYOUTS.get(model.where)
    same = known is not None and replace(known.contract, dtype=model.contract.dtype) == model.contract
    return "as known of this model" if same else ""


# Checks of the scores


def _check_weights(model: CheckedModel) -> None:
    dtype = model.contract.dtype
    bits = torch.finfo(getattr(torch, dtype)).bits
    for name, weight in model.named_weights():
        found = str(weight.dtype).removeprefix("torch.")
        if weight.is_floating_point() and found != dtype and torch.finfo(weight.dtype).bits <= bits:
            raise DataError(
                f"{model.where}: holds {name} in {found}, its contract says dtype {dtype}; load it in {dtype}, or set "
                f'reward_model.dtype = "{found}"'
            )


def _score_together(
    model: CheckedModel, texts: Sequence[RecordedText], rows: Sequence[Sequence[int]]
) -> NDArray[np.float64]:
    try:
        score_N = model.score_batch(rows)
    except (ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, DataError) or is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{model.where}: cannot score a batch of texts ({reason}); choose another, or name another pad token than "
            f"{_token(model, model.pad_id)} with reward_model.pad_token"
        ) from error
    return require_finite(score_N, [text.prompt for text in texts], model.where)


def _check_head(model: CheckedModel, rows: Sequence[Sequence[int]], score_N: NDArray[np.float64]) -> None:
    if len(set(map(tuple, rows))) == 1:
        raise DataError(
            f"{model.where}: eight different texts become one, {rows[0][:8]}; raise max_length ({model.max_length}) in "
            f"{CONTRACT_FILE}, or mend its tokenizer"
        )
    if np.ptp(score_N) == 0:
        raise DataError(
            f"{model.where}: gives every text the score {score_N[0]:g}, like an untrained head; train it, or choose "
            "another"
        )


def _check_alone(model: CheckedModel, rows: Sequence[Sequence[int]], score_N: NDArray[np.float64]) -> float:
    """Return the largest difference between scores of a text alone, among the others, and in reverse order."""
    alone_N = np.concatenate([model.score_batch([row]) for row in rows])
    reverse_N = model.score_batch(rows[::-1])[::-1]
    limit = bound(model.contract.dtype, score_N)
    apart_N = np.maximum(np.abs(alone_N - score_N), np.abs(reverse_N - score_N))
    i = int(apart_N.argmax())
    if apart_N[i] > limit:
        repair = "remove what normalises, routes or drops out across a batch"
        if model.pools_itself:
            other = "left" if model.contract.padding_side == "right" else "right"
            repair += f', or set "padding_side": "{other}" in {CONTRACT_FILE}'
        raise DataError(
            f"{model.where}: scores a text {alone_N[i]:.6g} alone, {score_N[i]:.6g} among {len(rows) - 1} others and "
            f"{reverse_N[i]:.6g} in reverse order (rounding explains {limit:.1g}), so padding, batch size or order "
            f"decides; {repair}"
        )
    return float(apart_N[i])


def _check_padding(model: CheckedModel, rows: Sequence[Sequence[int]]) -> Check:
    """Check that an EOS that is also the pad token is read, and not passed over as padding."""
    pad = _token(model, model.pad_id)
    if model.eos_id is None or model.pad_id != model.eos_id:
        return Check("padding and EOS", True, f"{pad} is not the EOS")
    ends = [row for row in rows if row[-1] == model.eos_id and len(row) > 2]
    if not model.pools_itself:
        found = f"both are {pad}; the score is read at the length of its row, so the EOS counts"
        unsure = bool(ends) and not _basis(model)
        if unsure:
            found += f"; if its class read the token before it in training, set append_eos = false in {CONTRACT_FILE}"
        return Check("padding and EOS", False if unsure else None, found)
    if model.contract.append_eos and ends:
        score_N, without_N, shorter_N = (model.score_batch([row[: len(row) - cut] for row in ends]) for cut in range(3))
        of_eos, of_token = np.abs(score_N - without_N).max(), np.abs(without_N - shorter_N).max()
        if of_eos < 1e-3 * of_token:  # rounding, compared with the effect of one token of the reply
            raise DataError(
                f"{model.where}: reads its EOS as padding: both are {pad}; name another pad token with "
                f"reward_model.pad_token, or, if it was trained so, set append_eos = false in {CONTRACT_FILE}"
            )
    return Check("padding and EOS", None, f"both are {pad}; the EOS counts")


def _replay_scores(model: CheckedModel, record: Record | None, score_N: NDArray[np.float64]) -> tuple[Check, Check]:
    """Return the checks of the recorded scores and of the dtype."""
    dtype = model.contract.dtype
    known = KNOWN_LAYOUTS.get(model.where)
    trained = record.dtype if record else known.contract.dtype if known else dtype
    coarser = torch.finfo(getattr(torch, dtype)).eps > torch.finfo(getattr(torch, trained)).eps
    repair = f'set reward_model.dtype = "{trained}" (--reward-dtype {trained})'
    of_dtype = Check("dtype", True if record or known else None, dtype)
    if coarser:
        of_dtype = Check("dtype", False, f"{dtype}, but its scores are known in {trained}; {repair}")
    if record is None:
        return Check("recorded texts", None, "none"), of_dtype
    if record.label != model.label:
        return Check("recorded texts", True, f"ids equal; scores are of {record.label!r}, not compared"), of_dtype
    recorded_N = np.array([text.score for text in record.texts])
    apart_N = np.abs(score_N - recorded_N)
    limit = max(bound(dtype, recorded_N), bound(record.dtype, recorded_N))
    i = int(apart_N.argmax())
    if apart_N[i] > limit:
        cause = f"it is loaded in {dtype}; {repair}" if coarser else "restore the folder, or train it again"
        raise DataError(
            f"{model.where}: scores text {i + 1} of {CONTRACT_FILE} {score_N[i]:.6g}, which was {recorded_N[i]:.6g} "
            f"after training (rounding explains {limit:.1g}), though its ids are the same: {cause}"
        )
    found = f"{len(record.texts)} replayed: ids equal, scores at most {apart_N[i]:.1e} apart"
    return Check("recorded texts", True, found), of_dtype


# Checks on held-out pairs


def check_pairs(model: CheckedModel, pairs: Sequence[Preference]) -> tuple[Check, ...]:
    """Check that the model orders labelled pairs better than chance, and that truncation leaves their replies.

    If it is not known how the model was trained, the other setting of EOS is compared (one-sided sign test,
    MAX_P_VALUE).
    """
    pairs = [pair for pair in pairs if pair.rejected is not None]
    if not pairs:
        return ()
    right_N = _order(model.under(model.contract), pairs)
    mean, error = float(right_N.mean()), float(right_N.std() / np.sqrt(len(pairs)))
    found = f"{mean:.3f} of {len(pairs)} ordered as labelled (a tie counts one half)"
    chance = mean + 2 * error < 0.6 and len(pairs) >= 20
    if chance:
        found += "; no better than chance: check source, template and label"
    checks = [Check("held-out pairs", False if chance else None, found)]
    if not _basis(model):
        checks += _check_other_eos(model, pairs, right_N)
    return (*checks, *_check_truncation(model, pairs))


def _order(model: CheckedModel, pairs: Sequence[Preference]) -> NDArray[np.float64]:
    """Return (N,): 1 if the chosen reply scores above the rejected one, 0 if below, one half for a tie."""
    prompts = 2 * [pair.prompt for pair in pairs]
    both = [*(pair.chosen for pair in pairs), *(pair.rejected or "" for pair in pairs)]
    chosen_N, rejected_N = np.split(require_finite(model.score(prompts, both), prompts, model.where), 2)
    return (chosen_N > rejected_N) + 0.5 * (chosen_N == rejected_N)


def _check_other_eos(model: CheckedModel, pairs: Sequence[Preference], right_N: NDArray[np.float64]) -> Iterator[Check]:
    from scipy.stats import binomtest

    now = model.contract.append_eos
    first = (pairs[0].prompt, pairs[0].chosen)
    try:
        other = model.under(replace(model.contract, append_eos=not now, position="last"))
        if other.encode(*first) == model.encode(*first):
            return  # the tokenizer or the template writes it, whatever the contract says
        other_N = _order(other, pairs)
    except DataError:  # there is no EOS to append
        return
    better, worse = int((other_N > right_N).sum()), int((other_N < right_N).sum())
    p_value = binomtest(better, better + worse, alternative="greater").pvalue if better + worse else 1.0
    with_, without = (right_N, other_N) if now else (other_N, right_N)
    found = f"{with_.mean():.3f} of {len(pairs)} ordered as labelled with an EOS, {without.mean():.3f} without"
    if p_value < MAX_P_VALUE:
        found += f" (p = {p_value:.1g}); set append_eos = {str(not now).lower()} in {CONTRACT_FILE}"
    yield Check("EOS on held-out pairs", bool(p_value >= MAX_P_VALUE), found)


def _check_truncation(model: CheckedModel, pairs: Sequence[Preference]) -> Iterator[Check]:
    """Warn of pairs whose two texts become one by truncation, so that their replies are lost."""
    lost = [
        pair.chosen != pair.rejected
        and model.encode(pair.prompt, pair.chosen) == model.encode(pair.prompt, pair.rejected or "")
        for pair in pairs
    ]
    if any(lost):
        repair = 'set truncation_side = "left"' if model.contract.truncation_side == "right" else "raise max_length"
        found = f"cuts {sum(lost)} of {len(pairs)} pairs to one text, replies gone; {repair} in {CONTRACT_FILE}"
        yield Check("truncation of held-out pairs", False, found)
