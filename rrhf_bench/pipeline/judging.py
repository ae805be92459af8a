"""Candidates rated by a judge, all responses to a prompt beside each other (2304.05302, Wombat). Free of torch."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rrhf_bench.errors import DataError, StoreError
from rrhf_bench.jsonl import read_jsonl, write_jsonl
from rrhf_bench.pipeline.candidates import assemble, pair_candidates
from rrhf_bench.pipeline.store import content_key
from rrhf_bench.records import Candidates
from rrhf_bench.rewards.judge import EndpointJudge, Judge, JudgeResult, endpoint_identity
from rrhf_bench.rewards.toy_judge import ToyJudge
from rrhf_bench.settings.experiment import JudgeTable

if TYPE_CHECKING:
    from rrhf_bench.pipeline.stage_context import Job

SAMPLED = "candidates "  # + the name of a source: the role of its samples among a stage's inputs
JOURNALS = "journals"  # a folder beside the artifacts of a store


def judge_identity(table: JudgeTable) -> str:
    """What decides the ratings, for keys: of an endpoint not where it listens, nor how patiently it is asked."""
    return ToyJudge.identity if table.endpoint is None else endpoint_identity(table.endpoint)


def build_judge(table: JudgeTable, journal: Path, progress: Callable[[int, int], None] | None = None) -> Judge:
    """The judge of a table; an endpoint's verdicts are kept in ``journal``. Raises ConfigError for an unusable key."""
    return ToyJudge() if table.endpoint is None else EndpointJudge(table.endpoint, journal, progress=progress)


def judge_candidates(
    table: JudgeTable,
    groups: Sequence[Candidates],
    journals: Path,
    progress: Callable[[int, int], None] | None = None,
) -> JudgeResult:
    """Groups with the sums of the judge's ratings as scores; those that it could not rate left out and counted.

    The verdicts of an endpoint go to a journal of its own in ``journals`` as they come, and none is asked for again.
    Processes that ask the same judge take turns, so that it never has more than ``concurrency`` requests before it.
    Raises StageError where the judge cannot be reached, DataError where no answer could be read, ConfigError where its
    key cannot be used, StoreError where the journal cannot be written.
    """
    journal = journals / f"{content_key(judge_identity(table))[:32]}.jsonl"
    judge = build_judge(table, journal, progress)
    with nullcontext() if table.endpoint is None else _turn(journal):
        return judge.judge(groups)


def judge(job: Job) -> None:
    """The training candidates of a row, rated: candidates.jsonl, ratings.jsonl (on all four axes), counts.json."""
    s = job.settings
    sampled = {
        role.removeprefix(SAMPLED): read_jsonl(folder / "candidates.jsonl", Candidates)
        for role, folder in job.inputs.items()
        if role.startswith(SAMPLED)
    }
    pairs = pair_candidates(job.pairs("train"))
    groups = assemble(s["sources"], sampled, pairs)
    if not groups:
        raise DataError(f"none of {len(pairs)} prompts has a response from {', '.join(s['sources'])}; add a source")
    # Beside the artifacts: a stage that fails leaves none, and what the judge has said must outlive it.
    journals = job.out.parent / JOURNALS
    result = judge_candidates(JudgeTable.model_validate(s["judge"]), groups, journals, job.progress)
    write_jsonl(job.out / "candidates.jsonl", result.candidates)
    rated = zip(result.candidates, result.ratings, strict=True)
    write_jsonl(job.out / "ratings.jsonl", ({"prompt": group.prompt, "ratings": given} for group, given in rated))
    job.write_json("counts.json", {**result.counts, "without_responses": len(pairs) - len(groups)})


@contextmanager
def _turn(journal: Path) -> Iterator[None]:
    """Alone with a journal; the lock goes with the process, however that ends."""
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        file = journal.with_suffix(".lock").open("w")
    except OSError as error:
        raise StoreError(f"{journal}: cannot be written ({error.strerror}); choose another --runs DIR") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
