"""Whether a reward model is fed as it was trained. Checked when one is loaded; ``doctor`` shows what was found.

A model that is fed otherwise still gives numbers. Nine faults are looked for, on eight lopsided texts: an EOS too many
or too few, a doubled BOS, a pad token that is taken for the EOS, truncation on the other side, padding on the other
side, a coarser dtype, several labels, a head that nobody trained, and scores that depend on the rest of the batch.
What the eight texts cannot tell is measured on held-out pairs: whether another setting orders them better.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rrhf_bench.errors import DataError, is_out_of_memory
from rrhf_bench.records import Preference, Prompt
from rrhf_bench.rewards.input_contract import CONTRACT_FILE, KNOWN_LAYOUTS, Dtype, Record, RecordedText, RewardContract
from rrhf_bench.rewards.reward import require_finite

# How far two computations of one score may be apart that differ in nothing but batch, kernels or machine: a share of
# the largest score, or of 1 where all are smaller. Measured on Llamas and GPT-2s of 2 to 12 layers, one text alone
# against eight: 1e-6, 3e-3 and 3e-2 at most; half precision against float32: 2e-2 and 6e-2. Deeper models lose more.
ROUNDING: dict[Dtype, float] = {"float32": 1e-4, "float16": 4e-2, "bfloat16": 2e-1}

CERTAIN = 0.01  # a difference between two settings on held-out pairs that chance makes less often is real


class Probe(NamedTuple):
    prompt: Prompt
    response: str
    max_length: int | None = None


def _human(text: str) -> Prompt:
    return Prompt(f"\n\nHuman: {text}\n\nAssistant:")


# Lopsided on purpose: an empty reply, one of another alphabet, trailing blanks, several turns, all lengths. The last is
# cut wherever it is read, since a text that fills a context of thousands of tokens is none to check with.
PROBES = (
    Probe(
        _human("How do I bake bread?"), " First, mix the flour, the water and the salt. Then let it rest for an hour."
    ),
    Probe(_human("What is a glacier?"), ""),
    Probe(_human("What is a glacier?"), " A slow river of ice."),
    Probe(_human("Is 17 a prime number?"), " Yes"),
    Probe(_human("Hi!\n\nAssistant: Hello.\n\nHuman: Tell me a joke."), " No.  "),
    Probe(_human("Wie heißt „Brot“ auf Japanisch?"), " „Brot“ heißt パン (pan) — gern geschehen! 🙂"),
    Probe(_human("Count to forty."), " " + ", ".join(map(str, range(1, 41))) + "."),
    Probe(
        _human("Describe the sea. " * 3), " It is wide and deep and blue, and it is never quite still.", max_length=16
    ),
)


@dataclass(frozen=True)
class Check:
    """``ok``: None where there is nothing to pass or fail. One that is not ok is a warning, and says how to mend it."""

    name: str
    ok: bool | None
    found: str


class Fed(Protocol):
    """What a reward model of either layout shows of its inside."""

    contract: RewardContract
    tokenizer: Any
    where: str
    pad_id: int
    max_length: int | None
    pools_itself: bool  # its class decides where the score is read

    @property
    def label(self) -> str | None: ...

    @property
    def eos_id(self) -> int | None: ...

    def named_weights(self) -> Iterable[tuple[str, Tensor]]: ...

    def encode(self, prompt: Prompt, response: str, max_length: int | None = None) -> list[int]: ...

    def score_batch(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """(N,) scores of one pass, the rows as they come."""
        ...

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> NDArray[np.float64]: ...

    def under(self, contract: RewardContract) -> Self:
        """The same weights under another contract, which nobody checks."""
        ...


def verify(model: Fed) -> tuple[Check, ...]:
    """What was found where all is well, or nearly so.

    Raises DataError, which says what differs and how to mend it, for a fault that changes scores beyond rounding.
    """
    record = model.contract.record
    texts: Sequence[Probe | RecordedText] = PROBES if record is None else record.texts
    rows = _rows(model, texts)
    if record is not None:
        _replay_ids(model, record, rows)
    whole = [row for text, row in zip(texts, rows, strict=True) if text.max_length is None]
    ends = (_end(model, whole), _start(model, whole))
    _weights(model)
    score_N = _together(model, texts, rows)
    _head(model, rows, score_N)
    apart = _one_by_one(model, rows, score_N)
    padding = _padding(model, rows)
    replayed, dtype = _replay_scores(model, record, score_N)
    side = model.contract.padding_side if model.pools_itself else "right, behind the place that is read"
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


def record_of(model: Fed) -> Record:
    """The eight texts as a model is fed them now, and its scores: what ``verify`` holds it to from then on."""
    rows = _rows(model, PROBES)
    score_N = [float(model.score_batch([row])[0]) for row in rows]
    texts = (
        RecordedText(probe.prompt, probe.response, tuple(row), score, probe.max_length)
        for probe, row, score in zip(PROBES, rows, score_N, strict=True)
    )
    return Record(tuple(texts), model.contract.dtype, model.label)


def bound(dtype: Dtype, score_N: NDArray[np.float64]) -> float:
    """The largest difference that rounding explains."""
    return ROUNDING[dtype] * max(1.0, float(np.abs(score_N).max()))


def _rows(model: Fed, texts: Iterable[Probe | RecordedText]) -> list[list[int]]:
    return [model.encode(text.prompt, text.response, text.max_length) for text in texts]


# What the ids show


def _replay_ids(model: Fed, record: Record, rows: Sequence[Sequence[int]]) -> None:
    wanted = [list(text.ids) for text in record.texts]
    if wanted == list(rows):
        return
    for name, contract in _others(model.contract):
        try:
            same = _rows(model.under(contract), record.texts) == wanted
        except DataError:  # a setting that this tokenizer cannot serve
            continue
        if same:
            raise DataError(
                f"{model.where}: its recorded texts are tokenised otherwise with {name} = "
                f"{_shown(model.contract, name)} than when it was trained; expected {name} = "
                f"{_shown(contract, name)}: set it in {CONTRACT_FILE}"
            )
    i = next(i for i, row in enumerate(rows) if list(row) != wanted[i])
    found, expected = list(rows[i]), wanted[i]
    leading = {model.tokenizer.bos_token_id, model.tokenizer.cls_token_id} - {None}
    if found and found[0] in leading and _pair(found) and not _pair(expected):
        fault = f"its BOS {_token(model, found[0])} stands twice at the start, and was there once"
    elif found and found[0] in leading and expected[0] != found[0]:
        fault = f"a BOS {_token(model, found[0])} stands at the start that was not there"
    elif expected[0] in leading and found[:1] != expected[:1]:
        fault = f"the BOS {_token(model, expected[0])} is missing at the start"
    elif model.eos_id is not None and found[-1:] == [model.eos_id] != expected[-1:]:
        fault = f"an EOS {_token(model, model.eos_id)} stands at the end that was not there"
    elif model.eos_id is not None and found[-1:] != [model.eos_id] == expected[-1:]:
        fault = f"the EOS {_token(model, model.eos_id)} is missing at the end"
    else:
        place = next((j for j, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected))
        fault = f"they part at token {place} of text {i + 1}: found {found[place : place + 3]}, "
        fault += f"expected {expected[place : place + 3]}"
    raise DataError(
        f"{model.where}: its recorded texts are tokenised otherwise than when it was trained: {fault}; restore "
        f"tokenizer.json, tokenizer_config.json and the chat template that it was trained with, or train it again"
    )


def _others(contract: RewardContract) -> Iterator[tuple[str, RewardContract]]:
    """(what is different, contract) for every contract that differs from this one in one setting of the text."""
    choices: dict[str, tuple[Any, ...]] = {
        "append_eos": (True, False),
        "truncation_side": ("left", "right"),
        "strip_response": (True, False),
        "join": ("", " "),
        "template": ("hh", "chat", "raw"),
        "eos_token": (None,),
    }
    for name, values in choices.items():
        for value in values:
            if value != getattr(contract, name):
                changes: dict[str, Any] = {name: value, "position": "last"}  # the other position wants a certain EOS
                yield name, replace(contract, **changes)


def _shown(contract: RewardContract, name: str) -> str:
    value = getattr(contract, name)
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else "none"


def _token(model: Fed, id_: int) -> str:
    return str(model.tokenizer.convert_ids_to_tokens(id_))


def _pair(row: Sequence[int]) -> bool:
    return len(row) > 1 and row[0] == row[1]


def _start(model: Fed, rows: Sequence[Sequence[int]]) -> Check:
    tokenizer, chat = model.tokenizer, model.contract.template == "chat"
    leading = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    first = rows[0][0]
    if first not in leading:
        plain = tokenizer("a")["input_ids"]
        missed = chat and len(plain) > 1 and plain[0] in leading
        what = "none: the chat template writes none, though the tokenizer puts one before plain text"
        return Check("BOS", None, what if missed else "none")
    if all(map(_pair, rows)):
        who = "the chat template writes it twice" if chat else "the tokenizer adds it twice"
        raise DataError(
            f"{model.where}: every text starts with its BOS {_token(model, first)} twice: {who}; take one out of "
            + ("chat_template" if chat else "the post-processor in tokenizer.json, or set add_bos_token = false")
        )
    return Check("BOS", True, f"one {_token(model, first)}")


def _end(model: Fed, rows: Sequence[Sequence[int]]) -> Check:
    contract, eos_id, basis = model.contract, model.eos_id, _basis(model)
    end = max(rows, key=len)[-4:]  # of the longest reply: the turn before an empty one may have its own EOS
    if eos_id is None or eos_id not in end:
        return Check("EOS", True if basis else None, f"none at the end, {basis or 'by its contract'}")
    token = _token(model, eos_id)
    if contract.append_eos and eos_id in end[:-1]:  # a chat template may end its turn with EOS and a line break
        raise DataError(
            f"{model.where}: its EOS {token} stands twice at the end: the text ends its turn with it already; set "
            f"append_eos = false in {CONTRACT_FILE}"
        )
    written = "" if contract.append_eos else " (the template or the tokenizer writes it)"
    return Check("EOS", True if basis else None, f"one {token} at the end{written}, {basis or 'by its contract'}")


def _basis(model: Fed) -> str:
    """How it is known that the ids are those of training; empty where nobody knows."""
    contract = model.contract
    if contract.record is not None:
        return "as recorded when it was trained"
    known = KNOWN_LAYOUTS.get(model.where)
    if known is not None and replace(known.contract, dtype=contract.dtype) == contract:
        return "as known of this model"
    return ""


# What the scores show


def _weights(model: Fed) -> None:
    wanted = getattr(torch, model.contract.dtype)
    for name, weight in model.named_weights():
        finer = weight.is_floating_point() and torch.finfo(weight.dtype).bits > torch.finfo(wanted).bits
        if weight.is_floating_point() and weight.dtype != wanted and not finer:
            found = str(weight.dtype).removeprefix("torch.")
            raise DataError(
                f"{model.where}: holds {name} in {found}, its contract says dtype {model.contract.dtype}; load it in "
                f'{model.contract.dtype}, or set reward_model.dtype = "{found}"'
            )


def _together(model: Fed, texts: Sequence[Probe | RecordedText], rows: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    try:
        score_N = model.score_batch(rows)
    except (ValueError, IndexError, RuntimeError) as error:
        if isinstance(error, DataError) or is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        mend = "choose another"
        if model.pad_id == model.eos_id:
            mend = f"its pad token is its EOS {_token(model, model.pad_id)}: name another with reward_model.pad_token"
        raise DataError(f"{model.where}: cannot score a batch of texts ({reason}); {mend}") from error
    return require_finite(score_N, [text.prompt for text in texts], model.where)


def _head(model: Fed, rows: Sequence[Sequence[int]], score_N: NDArray[np.float64]) -> None:
    if len(set(map(tuple, rows))) == 1:
        raise DataError(
            f"{model.where}: eight different texts become one, {rows[0][:8]}; raise max_length ({model.max_length}) in "
            f"{CONTRACT_FILE}, or give it its own tokenizer"
        )
    if np.ptp(score_N) == 0:
        raise DataError(
            f"{model.where}: gives every text the score {score_N[0]:g}, as a head does that was never trained; "
            "expected a trained reward model (train one, or choose another)"
        )


def _one_by_one(model: Fed, rows: Sequence[Sequence[int]], score_N: NDArray[np.float64]) -> float:
    """The largest difference between scores of a text alone, among the others, and with those in reverse order."""
    alone_N = np.concatenate([model.score_batch([row]) for row in rows])
    reverse_N = model.score_batch(rows[::-1])[::-1]
    limit = bound(model.contract.dtype, score_N)
    apart = max(float(np.abs(alone_N - score_N).max()), float(np.abs(reverse_N - score_N).max()))
    if apart <= limit:
        return apart
    i = int(np.argmax(np.abs(alone_N - score_N)))
    level = [row[-min(map(len, rows)) :] for row in rows]  # of one length: nothing is padded
    apart_N = np.abs(model.score_batch(level) - np.concatenate([model.score_batch([row]) for row in level]))
    seen = f"{model.where}: scores a text {alone_N[i]:.6g} alone and {score_N[i]:.6g} among {len(rows) - 1} others"
    if apart_N.max() > limit or np.abs(alone_N - score_N).max() <= limit:
        raise DataError(
            f"{seen} (rounding explains {limit:.1g}), so that batch size and order decide; expected a class that reads "
            "every row by itself: take out what normalises, routes or drops out across a batch"
        )
    side, other = ("behind", "before") if model.contract.padding_side == "right" else ("before", "behind")
    name: Literal["left", "right"] = "left" if other == "before" else "right"
    mend = "expected a class that masks padding"
    if model.pools_itself:
        turned = model.under(replace(model.contract, padding_side=name))
        if np.abs(turned.score_batch(rows) - alone_N).max() <= limit:
            mend = (
                f'with padding {other} it, it does not; add "padding_side": "{name}" to {CONTRACT_FILE} in its folder'
            )
    raise DataError(f"{seen}, where it has padding {side} it (rounding explains {limit:.1g}); {mend}")


def _padding(model: Fed, rows: Sequence[Sequence[int]]) -> Check:
    """Whether an EOS that is also the padding is read, or passed over as padding."""
    pad = _token(model, model.pad_id)
    if model.eos_id is None or model.pad_id != model.eos_id:
        return Check("padding and EOS", True, f"{pad} is not the EOS")
    if not model.pools_itself:
        read = f"both are {pad}; the score is read at the length of its row, so the EOS counts"
        if _basis(model) or not any(row[-1] == model.eos_id for row in rows):
            return Check("padding and EOS", None, read)
        mend = f"set append_eos = false in {CONTRACT_FILE}"
        if not model.contract.append_eos:
            mend = "take the EOS off the end of its chat template"
        return Check(
            "padding and EOS",
            False,
            f"{read}; if the model was trained by its class's own pooling, its score was read one token before: {mend}",
        )
    ends = [row for row in rows if row[-1] == model.eos_id and len(row) > 2]
    if model.contract.append_eos and ends:
        score_N, without_N, shorter_N = (model.score_batch([row[: len(row) - cut] for row in ends]) for cut in range(3))
        of_eos, of_token = np.abs(score_N - without_N).max(), np.abs(without_N - shorter_N).max()
        if of_eos < 1e-3 * of_token:  # rounding, beside what one token of the reply decides
            raise DataError(
                f"{model.where}: takes its EOS for padding: both are {pad}, and with and without it a text has one "
                "score; name another pad token with reward_model.pad_token, or, where it was trained so, set "
                f"append_eos = false in {CONTRACT_FILE}"
            )
    return Check("padding and EOS", None, f"both are {pad}; the EOS counts")


def _replay_scores(model: Fed, record: Record | None, score_N: NDArray[np.float64]) -> tuple[Check, Check]:
    """(of the recorded scores, of the dtype)"""
    dtype = model.contract.dtype
    known = KNOWN_LAYOUTS.get(model.where)
    trained = record.dtype if record is not None else known.contract.dtype if known is not None else None
    coarser = trained is not None and torch.finfo(getattr(torch, dtype)).eps > torch.finfo(getattr(torch, trained)).eps
    mend = f'set reward_model.dtype = "{trained}" (--reward-dtype {trained})'
    if record is None:
        found = f"{dtype}; its scores are known in {trained}; {mend}" if coarser else dtype
        return Check("recorded texts", None, "none"), Check("dtype", not coarser if trained else None, found)
    if record.label != model.label:
        found = f"ids as recorded; the scores are those of {record.label!r}, not compared"
        return Check("recorded texts", True, found), Check("dtype", not coarser, dtype)
    recorded_N = np.array([text.score for text in record.texts])
    apart_N = np.abs(score_N - recorded_N)
    limit = max(bound(dtype, recorded_N), bound(record.dtype, recorded_N))
    i = int(apart_N.argmax())
    if apart_N[i] > limit:
        halves = [
            half
            for half in ("bfloat16", "float16")
            if all(torch.equal(w, w.to(getattr(torch, half)).to(w.dtype)) for _, w in model.named_weights())
        ]
        if coarser:
            fault = f"it is loaded in {dtype}, and was trained in {trained}; {mend}"
        elif halves:
            fault = f"its weights have been rounded to {halves[0]}; restore the folder, or train it again"
        else:
            fault = "its weights or its class have changed since; restore the folder, or train it again"
        raise DataError(
            f"{model.where}: scores text {i + 1} of {CONTRACT_FILE} {score_N[i]:.6g}, which was {recorded_N[i]:.6g} "
            f"when it was trained (rounding explains {limit:.1g}), though its ids are the same: {fault}"
        )
    found = f"{len(record.texts)} replayed: ids equal, scores at most {apart_N[i]:.1e} apart"
    replayed = Check("recorded texts", True, found)
    if not coarser:
        return replayed, Check("dtype", True, f"{dtype}, trained in {trained}")
    moved = sum(
        np.sign(score_N[a] - score_N[b]) != np.sign(recorded_N[a] - recorded_N[b])
        for a, b in combinations(range(len(score_N)), 2)
    )
    found = f"{dtype}, trained in {trained}: scores up to {apart_N[i]:.1e} apart, {moved} of "
    found += f"{len(score_N) * (len(score_N) - 1) // 2} pairs of its recorded texts tie or change places; {mend}"
    return replayed, Check("dtype", False, found)


# What held-out pairs show


def on_pairs(model: Fed, pairs: Sequence[Preference]) -> tuple[Check, ...]:
    """Whether the model orders labelled pairs that it was not trained on, whether it would with the other setting of
    EOS (where nobody knows how it was trained), and whether truncation leaves their replies.

    The two settings are compared pair by pair (sign test, one-sided): of two that differ by chance alone, one is called
    better once in a hundred times.
    """
    pairs = [pair for pair in pairs if pair.rejected is not None]
    if not pairs:
        return ()
    right_N = _right(model.under(model.contract), pairs)
    mean, error = float(right_N.mean()), float(right_N.std() / np.sqrt(len(pairs)))
    found = f"{mean:.3f} of {len(pairs)} ordered as labelled (a tie counts one half)"
    chance = mean + 2 * error < 0.6 and len(pairs) >= 20
    if chance:
        found += (
            "; no better than chance: a head that was never trained, or texts that it is fed otherwise than when it "
            "was; check source, template and label"
        )
    checks = [Check("held-out pairs", False if chance else None, found)]
    if not _basis(model):
        checks += _other_eos(model, pairs, right_N)
    return (*checks, *_cut(model, pairs))


def _right(model: Fed, pairs: Sequence[Preference]) -> NDArray[np.float64]:
    """Return (N,): 1 if the chosen reply scores above the rejected one, 0 if below, one half for a tie.

    Raises DataError if a score is not finite.
    """
    prompts = 2 * [pair.prompt for pair in pairs]
    both = [*(pair.chosen for pair in pairs), *(pair.rejected or "" for pair in pairs)]
    chosen_N, rejected_N = np.split(require_finite(model.score(prompts, both), prompts, model.where), 2)
    return (chosen_N > rejected_N) + 0.5 * (chosen_N == rejected_N)


def _other_eos(model: Fed, pairs: Sequence[Preference], right_N: NDArray[np.float64]) -> Iterator[Check]:
    from scipy.stats import binomtest

    now = model.contract.append_eos
    first = pairs[0]
    try:
        other = model.under(replace(model.contract, append_eos=not now, position="last"))
        same = other.encode(first.prompt, first.chosen) == model.encode(first.prompt, first.chosen)
        if same:  # the tokenizer or the template writes it, whatever the contract says
            return
        other_N = _right(other, pairs)
    except DataError:  # there is no EOS to append
        return
    better, worse = int((other_N > right_N).sum()), int((other_N < right_N).sum())
    chance = binomtest(better, better + worse, alternative="greater").pvalue if better + worse else 1.0
    with_, without = (right_N, other_N) if now else (other_N, right_N)
    found = (
        f"{with_.mean():.3f} of {len(pairs)} ordered as labelled with an EOS at the end, {without.mean():.3f} without"
    )
    if chance >= CERTAIN:
        yield Check("EOS on held-out pairs", True, found)
        return
    padding = " (its EOS is its padding, which its class passes over)" if now and model.pad_id == model.eos_id else ""
    found += (
        f": more than chance explains (p = {chance:.1g}), so it was trained otherwise than it is fed{padding}; set "
        f"append_eos = {str(not now).lower()} in {CONTRACT_FILE}"
    )
    yield Check("EOS on held-out pairs", False, found)


def _cut(model: Fed, pairs: Sequence[Preference]) -> Iterator[Check]:
    """Pairs whose two texts are one once they are cut: their replies are gone."""
    lost = [
        pair.chosen != pair.rejected
        and model.encode(pair.prompt, pair.chosen) == model.encode(pair.prompt, pair.rejected or "")
        for pair in pairs
    ]
    if any(lost):
        mend = 'set truncation_side = "left"' if model.contract.truncation_side == "right" else "raise max_length"
        found = f"cuts {sum(lost)} of {len(pairs)} pairs to one text, replies gone; {mend} in {CONTRACT_FILE}"
        yield Check("truncation of held-out pairs", False, found)
