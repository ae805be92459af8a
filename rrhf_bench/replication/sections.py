"""The sections that a report has beside the RRHF paper. A run without an RRHF row has none of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rrhf_bench.replication import published
from rrhf_bench.replication.counterparts import replicates, with_parts, writes_reviews
from rrhf_bench.replication.departures import departures_table
from rrhf_bench.replication.eq7 import learner_sentences
from rrhf_bench.replication.figures import loss_and_reward, published_quality
from rrhf_bench.replication.rankings import published_ranking
from rrhf_bench.replication.variants import variant_sentences, variants_table
from rrhf_bench.report.section import Part, Section, Sentence
from rrhf_bench.report.table import Table
from rrhf_bench.report.view import View


def _section(title: str, parts: Callable[[View], Sequence[Part | None]]) -> Section:
    """Return a section of the runs that have an RRHF row, without the parts that the run has nothing for."""
    return Section(title, lambda view: [part for part in parts(view) if part] if replicates(view) else [])


def _amend(view: View, table: Table) -> Table:
    """Return one of the report's own tables with the words of the paper."""
    if not replicates(view):
        return table
    if table.name == "claims":
        return replace(table, title="The paper's claims")
    return with_parts(view, table) if table.name == "rows" else table


def _variants(view: View) -> list[Part | None]:
    table = variants_table(view)
    if table is None:
        return []
    about = (
        "The released code counts a reply's length after it has overwritten the marks that say where the reply is, so "
        "that it trains another objective than the paper prints. These rows differ in nothing else."
    )
    return [*map(Sentence, (about, *variant_sentences(view))), table]


def _results(view: View) -> list[Part | None]:
    scales = (
        "The paper's numbers are of 7B models on IMDB under a sentiment classifier."
        if writes_reviews(view)
        else "The paper's numbers are of LLaMA and Alpaca 7B on HH under Dahoas/gptj-rm-static."
    )
    comparable = "Unless policy, data and reward model are those, values do not compare; the order of methods may."
    return [Sentence(f"{scales} {comparable}"), published.main_results(view), published.reviews(view)]


def _quality(view: View) -> list[Part | None]:
    if not view.rewarded:
        return []
    sentences = map(Sentence, learner_sentences(view))
    return [
        published.sampling_quality(view),
        published.best_of_n_learning(view),
        *sentences,
        None if writes_reviews(view) else published_quality(),
    ]


SECTIONS: tuple[Section, ...] = (
    Section("A published ranking", published_ranking),
    _section("What the bug changed", _variants),
    replace(_section("Beside the published numbers", _results), amend=_amend),
    _section("The ranking term", lambda view: [published.rank_ablation(view)]),
    _section("Samples a query", lambda view: [published.samples_a_query(view)]),
    _section("Loss and reward beside the paper", lambda view: [loss_and_reward(view)]),
    _section("Sampling quality beside the paper", _quality),
    _section("p_i as a reward model", lambda view: [published.accuracies(view)]),
    _section("Departures from the paper", lambda view: [departures_table(view)]),
)
