"""Rate candidates by a judge, which sees all responses to a prompt together (2304.05302, Wombat). Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rrhf_bench.pipeline.locks import exclusive_lock
from rrhf_bench.pipeline.store import content_key
from rrhf_bench.records import Candidates
from rrhf_bench.rewards.judge import EndpointJudge, JudgeResult, endpoint_identity
from rrhf_bench.rewards.toy_judge import ToyJudge
from rrhf_bench.settings.experiment import JudgeTable

JOURNALS = "journals"  # a folder beside the artifacts of a store


def judge_identity(table: JudgeTable) -> str:
    """Return what decides the ratings, for keys. The URL and the retries of an endpoint do not."""
    return ToyJudge.identity if table.endpoint is None else endpoint_identity(table.endpoint)


def judge_candidates(
    table: JudgeTable,
    groups: Sequence[Candidates],
    journals: Path,
    progress: Callable[[int, int], None] | None = None,
) -> JudgeResult:
    """Return groups with the sums of the judge's ratings as scores; unrated groups are left out and counted.

    The verdicts of an endpoint go to a journal of its own in ``journals`` as they come, and are never requested again.
    One process at a time uses a journal, so that the endpoint has at most ``concurrency`` requests. Raises StageError
    if the judge cannot be reached, DataError if no answer could be read, ConfigError if its key cannot be used, and
    StoreError if the journal cannot be written.
    """
    if table.endpoint is None:
        return ToyJudge().judge(groups)
    journal = journals / f"{content_key(judge_identity(table))[:32]}.jsonl"
    judge = EndpointJudge(table.endpoint, journal, progress=progress)
    with exclusive_lock(journal.with_suffix(".lock"), journal, lambda _: None):
        return judge.judge(groups)
