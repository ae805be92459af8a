"""Groups of candidates from several sources, and responses that come from a file."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rrhf_bench import registry
from rrhf_bench.errors import DataError
from rrhf_bench.jsonl import read_jsonl, write_jsonl
from rrhf_bench.pipeline.candidates import assemble, pair_candidates, permute_rewards
from rrhf_bench.pipeline.services import Services
from rrhf_bench.pipeline.stage_context import Job
from rrhf_bench.pipeline.stages import BODIES, train_inputs
from rrhf_bench.records import Candidates, Preference, Prompt, Response
from rrhf_bench.settings.experiment import RuntimeSettings
from rrhf_bench.settings.reading import parse_method

PROMPTS = [Prompt(f"\n\nHuman: Question {i}?\n\nAssistant:") for i in range(3)]
PAIRS = [Preference(prompt, f" Good {i}.", f" Bad {i}.") for i, prompt in enumerate(PROMPTS)]


def group(i: int, *texts: str, source: str = "model") -> Candidates:
    return Candidates(PROMPTS[i], tuple(Response(text, source, "eos", score=float(i)) for text in texts))


def said(groups: list[Candidates]) -> dict[str, list[tuple[str, str]]]:
    """(source, text) of each response, by prompt."""
    return {row.prompt.text: [(r.source, r.text) for r in row.responses] for row in groups}


# Groups


def test_responses_stand_in_the_order_of_the_sources_and_carry_their_names() -> None:
    sampled = {
        "model": [group(0, " a", " b"), group(1, " c"), group(2, " d")],
        "raw": [group(i, " r") for i in range(3)],
    }
    found = assemble(["rejected", "raw", "model", "chosen"], sampled, pair_candidates(PAIRS))
    assert said(found)[PROMPTS[0].text] == [
        ("rejected", " Bad 0."),
        ("raw", " r"),
        ("model", " a"),
        ("model", " b"),
        ("chosen", " Good 0."),
    ]
    assert [row.prompt for row in found] == PROMPTS
    # All but the name is kept, and what was given is not changed.
    assert (found[1].responses[1].score, found[1].responses[1].finish) == (1.0, "eos")
    assert {r.source for rows in sampled.values() for row in rows for r in row.responses} == {"model"}


def test_a_source_without_responses_for_a_prompt_adds_none() -> None:
    sampled = {"file": [group(2, " x", " y"), group(0, " z")]}  # in another order, and none for prompt 1
    pairs = pair_candidates(PAIRS)
    with_chosen = said(assemble(["file", "chosen"], sampled, pairs))
    assert with_chosen == {
        PROMPTS[0].text: [("file", " z"), ("chosen", " Good 0.")],
        PROMPTS[1].text: [("chosen", " Good 1.")],
        PROMPTS[2].text: [("file", " x"), ("file", " y"), ("chosen", " Good 2.")],
    }
    assert [row.prompt for row in assemble(["file"], sampled, pairs)] == [PROMPTS[0], PROMPTS[2]]
    assert assemble(["nothing"], {}, pairs) == []


def test_prompts_are_those_of_the_pairs() -> None:
    other = Candidates(Prompt("\n\nHuman: Another?\n\nAssistant:"), (Response(" n", "model"),))
    assert said(assemble(["model"], {"model": [group(0, " a"), other]}, pair_candidates(PAIRS[:1]))) == {
        PROMPTS[0].text: [("model", " a")]
    }


def test_sources_that_are_not_asked_for_add_nothing() -> None:
    sampled = {"model": [group(i, " a") for i in range(3)]}
    assert assemble(["chosen", "rejected"], sampled, pair_candidates(PAIRS)) == pair_candidates(PAIRS)


# Permuted rewards


def scored_groups(count: int) -> list[Candidates]:
    """Groups of four replies with scores 0, 1, 2, 2, each of a prompt of its own."""
    replies = tuple(Response(f" {k}", "model", "eos", score=float(min(k, 2))) for k in range(4))
    return [Candidates(Prompt(f"\n\nHuman: {i}?\n\nAssistant:"), replies) for i in range(count)]


def test_scores_are_permuted_within_each_prompt_by_seed_and_prompt_and_all_else_stays() -> None:
    groups = scored_groups(5000)
    permuted = permute_rewards(groups, 0)
    assert all(sorted(row.scores) == [0.0, 1.0, 2.0, 2.0] for row in permuted)
    unscored = [[replace(r, score=None) for r in row.responses] for row in permuted]
    assert unscored == [[replace(r, score=None) for r in row.responses] for row in groups]
    # Each of the four scores comes first in a quarter of the prompts; 2 counts twice. Three standard errors
    # of 0.0117 = sqrt(0.6875 / 5000).
    assert sum(row.scores[0] for row in permuted) / 5000 == pytest.approx(1.25, abs=0.035)
    assert permute_rewards(groups[50:60], 0) == permuted[50:60]  # whatever else is permuted
    assert permute_rewards(groups, 1) != permuted


@pytest.mark.parametrize("kind", ["rrhf", "dpo", "raft"])  # all candidates; the best and the worst; the best
@pytest.mark.parametrize("judged", [False, True])
def test_every_method_trains_on_permuted_rewards(tmp_path: Path, kind: str, judged: bool) -> None:
    groups = scored_groups(20)
    of = {"prompts": "train.jsonl", "judged" if judged else "scores model": "candidates.jsonl"}
    of |= {} if judged else {"pair scores": "candidates.jsonl"}
    records: dict[str, list[Any]] = {"prompts": [Preference(row.prompt, " good", " bad") for row in groups]}
    for role, name in of.items():
        (tmp_path / role).mkdir()
        write_jsonl(tmp_path / role / name, records.get(role, groups))
    job = Job("train", {"seed": 3}, {role: tmp_path / role for role in of}, tmp_path, None, "", lambda *_: None)  # type: ignore[arg-type]
    settings = parse_method(kind, ["candidates.sources=['model']"])
    plain = train_inputs(job, settings)
    control = train_inputs(job, parse_method(kind, ["candidates.sources=['model']", "candidates.permute_rewards=true"]))
    assert [row.scores for row in plain.candidates] == [row.scores for row in groups]
    assert control.candidates == permute_rewards(plain.candidates, 3)
    method = registry.build(settings)
    assert method.examples(control) != method.examples(plain)


# The stage that reads a file


@pytest.fixture
def read(tmp_path: Path):
    """Run the stage on a file of rows: what it wrote."""
    (tmp_path / "prompts").mkdir()
    (tmp_path / "out").mkdir()
    write_jsonl(tmp_path / "prompts" / "train.jsonl", PAIRS)
    path = tmp_path / "responses.jsonl"

    def read(rows: list[Any], *, scored: bool = False) -> tuple[list[Candidates], dict[str, int]]:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"path": str(path), "name": "mine", "scored": scored, "content": "unread"}
        inputs = {"prompts": tmp_path / "prompts"}
        services = Services(RuntimeSettings(device="cpu"))
        BODIES["file"](Job("file", settings, inputs, tmp_path / "out", services, "transformers", lambda *_: None))
        candidates = read_jsonl(tmp_path / "out" / "candidates.jsonl", Candidates)
        return candidates, json.loads((tmp_path / "out" / "counts.json").read_text())

    return read


def test_a_file_gives_its_responses_to_the_training_prompts(read) -> None:
    rows = [
        {"query": PROMPTS[2].text, "responses": [" Two."]},
        {"query": "Question 0?", "responses": [" Zero.", " Nil."]},  # a bare question becomes a transcript
        {"query": "Nobody asked?", "responses": [" No."]},
        {"query": PROMPTS[2].text, "responses": [" Deux."]},
    ]
    candidates, counts = read(rows)
    assert said(candidates) == {
        PROMPTS[2].text: [("mine", " Two."), ("mine", " Deux.")],
        PROMPTS[0].text: [("mine", " Zero."), ("mine", " Nil.")],
    }
    assert all(response.score is None for row in candidates for response in row.responses)
    assert (counts["queries"], counts["prompts_without_responses"], counts["prompt_rewritten"]) == (4, 1, 2)


def test_the_scores_of_a_file_are_read_where_they_are_used(read) -> None:
    rows = [{"query": PROMPTS[1].text, "responses": [" a", " b"], "scores": [0.5, -2.0], "sources": ["x", "y"]}]
    (row,), _ = read(rows, scored=True)
    assert [(r.text, r.source, r.score) for r in row.responses] == [(" a", "mine", 0.5), (" b", "mine", -2.0)]
    (row,), _ = read(rows)
    assert [r.score for r in row.responses] == [None, None]
    with pytest.raises(DataError, match=r"responses\.jsonl.*scores"):
        read([{"query": PROMPTS[1].text, "responses": [" a"]}], scored=True)


def test_a_file_for_other_prompts_is_refused(read, tmp_path: Path) -> None:
    rows = [{"query": f"Other {i}?", "responses": [" a"]} for i in range(2)]
    expected = (
        f"{tmp_path / 'responses.jsonl'}: none of its 2 queries is a training prompt; expected the data set's prompts, "
        "as a transcript that ends with 'Assistant:'"
    )
    with pytest.raises(DataError, match=f"^{re.escape(expected)}$"):
        read(rows)
    assert not (tmp_path / "out" / "candidates.jsonl").exists()
