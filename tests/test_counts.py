"""Test what is counted of a row's candidates, the size that its settings state, and keys that are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.records import Candidates
from rrhf_bench.registry import build, find, resolve
from rrhf_bench.settings.methods import OfflineSettings
from rrhf_bench.training.method import TrainInputs
from rrhf_bench.training.offline import FixedExamples
from rrhf_bench.training.reference import ResponseLogprobs
from tests.test_training import CANDIDATES, context


def settings_of(kind: str, **keys: Any) -> OfflineSettings:
    """Return the settings of a kind. Losses of pairs train on those of candidates."""
    of_pairs: dict[str, Any] = {"candidates": {"sources": ["model"]}} if kind in ("simpo", "kto", "coh") else {}
    settings = resolve(find(kind).settings).model_validate({**of_pairs, **keys})
    assert isinstance(settings, OfflineSettings)
    return settings


def counts_of(
    settings: OfflineSettings, groups: Sequence[Candidates], policy: TransformersPolicy, folder: Path
) -> Mapping[str, int]:
    inputs = TrainInputs(candidates=groups, reference=ResponseLogprobs({}))
    return FixedExamples(build(settings), settings, policy, inputs, context(folder)).counts


@pytest.mark.parametrize(
    ("kind", "keys"),
    [("rrhf", {}), ("raft", {}), ("bonbon", {}), ("simpo", {}), ("kto", {}), ("coh", {}), ("coh", {"mix": "all"})],
)
def test_ties_and_unused_prompts_are_those_of_the_candidates(
    policy: TransformersPolicy, tmp_path: Path, kind: str, keys: dict[str, Any]
) -> None:
    """Two rewards tie in each group, and all rewards of the first three groups."""
    equal = [
        replace(group, responses=tuple(replace(response, score=0.5) for response in group.responses))
        for group in CANDIDATES[:3]
    ]
    counts = counts_of(settings_of(kind, **keys), [*equal, *CANDIDATES[3:]], policy, tmp_path)
    assert (counts["groups_with_ties"], counts["groups_all_equal"]) == (8, 3)
    assert counts.get("prompts_without_example", 0) == (0 if kind in ("rrhf", "raft") else 3)


@pytest.mark.parametrize("kind", ["simpo", "kto", "coh"])
def test_a_reply_that_is_cut_counts_once(policy: TransformersPolicy, tmp_path: Path, kind: str) -> None:
    """KTO's examples hold the replies to a neighbour's prompt too; Chain of Hindsight uses a reply in several forms."""
    groups = [
        replace(group, responses=(replace(group.responses[0], text=" word" * 60), *group.responses[1:]))
        for group in CANDIDATES
    ]
    longest = max(len(policy.tokenization.prompt_ids(group.prompt)) for group in groups)
    keys: dict[str, Any] = {"mix": "all", "forms": ["good", "good-bad"]} if kind == "coh" else {}
    room = 60 if kind == "coh" else 20  # beyond the prompt: the markers, and the rejected reply behind the chosen one
    settings = settings_of(kind, max_length=longest + room, **keys)
    assert counts_of(settings, groups, policy, tmp_path)["responses_truncated"] == 8


def test_a_budget_counts_the_examples_that_a_method_makes() -> None:
    """Chain of Hindsight makes 1, 1, 2 and 2 examples of a pair in turn; RAFT trains on one reply, BoNBoN on two."""
    assert (
        settings_of("coh", epochs=1, batch_prompts=4)
        .budget(12, 6)
        .endswith("18 examples, 1 epochs of 4 examples a step = 5 steps")
    )
    assert settings_of("raft").budget(12, 6).startswith("12 prompts x 1 responses")
    assert settings_of("bonbon").budget(12, 6).startswith("12 prompts x 2 responses")
    assert settings_of("rrhf").budget(12, 6).startswith("12 prompts x 6 responses")


@pytest.mark.parametrize(
    ("kind", "keys", "named"),
    [
        ("coh", {"repeat_prompt": True, "forms": ["good"]}, "repeat_prompt"),
        ("rrhf", {"margin": 0.1, "rank_weight": 0.0}, "margin"),
        ("bonbon", {"candidates": {"sources": ["model", "other"]}}, "n: none"),
    ],
)
def test_a_key_that_is_not_read_or_cannot_be_known_is_refused(kind: str, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        settings_of(kind, **keys)
    assert settings_of("bonbon", n=9, candidates={"sources": ["model", "other"]})
