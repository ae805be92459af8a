"""The table of rows: where each row starts and what it trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rrhf_bench.evaluation.grid import Missing
from rrhf_bench.pipeline.results import Trial
from rrhf_bench.report.table import DECODING_WORDS, Field, Table, Value, build_table
from rrhf_bench.report.tables import samples_as
from rrhf_bench.report.view import View, changed
from rrhf_bench.settings.candidates import Beams, Candidates, DiverseBeams, Draw
from rrhf_bench.settings.experiment import Experiment
from rrhf_bench.settings.methods import MethodSettings, candidates_of


def rows_table(view: View) -> Table:
    """Return what each row is: its initial policy, its candidates, and its settings other than the defaults."""

    def of_method(value: Callable[[MethodSettings], Value]) -> Callable[[str], Value]:
        return lambda row: value(view.methods[row]) if row in view.methods else given

    given = Missing("an initial policy is not trained here")
    untrained = Missing("it is not trained on candidates")
    fields: Sequence[Field[str]] = (
        Field("row", lambda row: row),
        Field("method", lambda row: view.kind(row) if row in view.methods else "initial policy"),
        Field("starts from", lambda r: view.initial(r) if r in view.methods else source_words(view.experiment, r)),
        Field("samples as", lambda row: samples_as(view, row) if row in view.methods else given),
        Field("candidates", of_method(lambda settings: _sources_words(candidates_of(settings)) or untrained)),
        Field("k", of_method(lambda settings: view.experiment.responses(settings) or untrained), 0),
        Field("settings beside the defaults", of_method(_changed_words)),
    )
    notes = ("Samples as: the paper's name for where the candidates come from. k: candidates a prompt.",)
    return build_table("rows", "The rows", fields, view.rows, notes, view.records.arena)


def _changed_words(settings: MethodSettings) -> str:
    return ", ".join(f"{key} {plain_words(value)}" for key, value in changed(settings).items()) or "none"


def tuning_table(view: View) -> Table:
    """Return the tuning trials of each tuned row with their rewards on the dev prompts."""
    decoding = DECODING_WORDS[view.experiment.evaluation.decoding[0]]
    world: Field[tuple[str, Trial]] = Field("world", lambda line: line[1].world or 0, 0)
    fields: Sequence[Field[tuple[str, Trial]]] = (
        Field("row", lambda line: line[0]),
        *((world,) if view.experiment.several_worlds else ()),
        Field("trial", lambda line: ", ".join(f"{k} {plain_words(value)}" for k, value in line[1].changed.items())),
        Field(f"dev proxy reward ({decoding})", lambda line: _reward(line[1]), 3),
        Field("picked", lambda line: "yes" if line[1].picked else "no"),
    )
    lines = [(row, trial) for row, trials in view.records.tuned.items() for trial in trials]
    notes = (
        "Each trial trains the row with the first seed. The trial with the highest mean proxy reward on the dev "
        "prompts at the end of training is the row, and the other seeds train with its settings. No evaluation prompt "
        "is used.",
    )
    return build_table("tuning", "Tuning trials", fields, lines, notes, view.records.arena, group=0)


def _reward(trial: Trial) -> Value:
    return Missing("the trial diverged") if trial.reward is None else trial.reward


def source_words(experiment: Experiment, initial: str) -> str:
    """Return where an initial policy comes from."""
    policy = experiment.policies.get(initial, experiment.policy)
    if policy.trained_by is not None:
        return f"what the row {policy.trained_by} trained, first seed"
    return policy.source


def _sources_words(settings: Candidates | None) -> str:
    """Return where a row's candidates come from, such as "model (beam search, 4 beams), chosen, rejected"."""
    if settings is None:
        return ""
    words = [f"model ({candidates_words(settings)})" if name == "model" else name for name in settings.sources]
    words += ["rewards permuted within each prompt: a control"] if settings.permute_rewards else []
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
