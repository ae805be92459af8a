"""The table of rows: where each row starts and what it trains on."""

from __future__ import annotations

from rrhf_bench.report.table import DECODING_WORDS, Cell, Column, Missing, Table
from rrhf_bench.report.tables import samples_as
from rrhf_bench.report.view import View, changed
from rrhf_bench.settings.candidates import Beams, Candidates, DiverseBeams, Draw
from rrhf_bench.settings.experiment import Experiment
from rrhf_bench.settings.methods import candidates_of


def rows_table(view: View) -> Table:
    """Return what each row is: its initial policy, its candidates, and its settings other than the defaults."""
    columns = (
        Column("row"),
        Column("method"),
        Column("starts from"),
        Column("samples as"),
        Column("candidates"),
        Column("k", 0),
        Column("settings beside the defaults"),
    )
    rows = []
    for row in view.rows:
        settings = view.methods.get(row)
        kind = Cell(view.kind(row)) if settings else Cell("initial policy")
        if settings is None:
            none = Cell.of(Missing("an initial policy is not trained here"))
            rows.append((Cell(row), kind, Cell(source_words(view.experiment, row)), *[none] * 4))
            continue
        how = candidates_of(settings)
        k = None if how is None else view.experiment.responses(settings)
        words = ", ".join(f"{key} {plain_words(value)}" for key, value in changed(settings).items())
        untrained = Missing("it is not trained on candidates")
        sources = Cell.of(untrained if how is None else _sources_words(how))
        counted = Cell.of(untrained if k is None else k)
        rows.append(
            (
                Cell(row),
                kind,
                Cell(view.initial(row)),
                samples_as(view, row),
                sources,
                counted,
                Cell(words or "none"),
            )
        )
    notes = ("Samples as: the paper's name for where the candidates come from. k: candidates a prompt.",)
    return Table("rows", "The rows", columns, tuple(rows), notes, view.records.arena)


def tuning_table(view: View) -> Table:
    """Return the tuning trials of each tuned row with their rewards on the dev prompts."""
    decoding = DECODING_WORDS[view.experiment.evaluation.decoding[0]]
    columns = (Column("row"), Column("trial"), Column(f"dev proxy reward ({decoding})", 3), Column("picked"))
    rows = []
    for row, trials in view.records.tuned.items():
        for trial in trials:
            words = ", ".join(f"{key} {plain_words(value)}" for key, value in trial.changed.items())
            reward = Cell.of(Missing("the trial diverged") if trial.reward is None else trial.reward)
            rows.append((Cell(row), Cell(words), reward, Cell("yes" if trial.picked else "no")))
    notes = (
        "Each trial trains the row with the first seed. The trial with the highest mean proxy reward on the dev "
        "prompts at the end of training is the row, and the other seeds train with its settings. No evaluation prompt "
        "is used.",
    )
    return Table("tuning", "Tuning trials", columns, tuple(rows), notes, view.records.arena, group=0)


def source_words(experiment: Experiment, initial: str) -> str:
    """Return where an initial policy comes from."""
    policy = experiment.policies.get(initial, experiment.policy)
    if policy.trained_by is not None:
        return f"what the row {policy.trained_by} trained, first seed"
    return policy.source


def _sources_words(settings: Candidates) -> str:
    """Return where a row's candidates come from, such as "model (beam search, 4 beams), chosen, rejected"."""
    words = (f"model ({candidates_words(settings)})" if name == "model" else name for name in settings.sources)
    return ", ".join(words)


def candidates_words(settings: Candidates) -> str:
    """Return how the samples of "model" come about."""
    if isinstance(settings, Beams):
        return f"beam search, {settings.beams} beams"
    if isinstance(settings, DiverseBeams):
        return search_words(settings.beams, settings.groups, settings.diversity_penalty)
    assert isinstance(settings, Draw)
    words = f"sampling, temperature {plain_words(settings.temperature)}, top-p {plain_words(settings.top_p)}"
    return f"{words}, top-k {settings.top_k}" if settings.top_k else words


def search_words(beams: int | None, groups: int | None, penalty: float | None) -> str:
    """Return the sizes of a diverse beam search."""
    return f"diverse beam search, {beams} beams in {groups} groups, penalty {plain_words(penalty)}"


def plain_words(value: object) -> str:
    """Return a setting as a table shows it."""
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
