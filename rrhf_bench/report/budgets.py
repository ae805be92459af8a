"""The budget of each row: what it sampled, had scored, read, trained and tried, counted from the records."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rrhf_bench.evaluation.grid import Missing
from rrhf_bench.pipeline.results import Cost
from rrhf_bench.pipeline.stage_graph import OWN_REPLIES
from rrhf_bench.report.table import Cell, Field, Table, Value, build_table
from rrhf_bench.report.view import View
from rrhf_bench.settings.methods import PairSettings, candidates_of


def budgets_table(view: View) -> Table:
    """Return what each row of a method spends in all of its rounds, and what the trials of a tuned row spent."""

    def in_trials(value: Callable[[Cost], int]) -> Callable[[str], Value]:
        def read(row: str) -> Value:
            if row not in view.records.tuned:
                return 0
            cost = view.records.trials.get(row)
            return Missing("the cost of the trials was not recorded") if cost is None else value(cost)

        return read

    fields: Sequence[Field[str]] = (
        Field("row", lambda row: row),
        Field("sampled replies", lambda row: spent(view, row, "sampled_replies"), 0),
        Field("reward calls", lambda row: spent(view, row, "reward_calls"), 0),
        Field("labelled replies", lambda row: labelled_replies(view, row), 0),
        Field("optimiser steps", lambda row: spent(view, row, "steps"), 0),
        Field("rounds", lambda row: _rounds(view, row), 0),
        Field("tuning trials", lambda row: _trials(view, row), 0),
        Field("sampled replies, trials", in_trials(lambda cost: cost.sampled_replies), 0),
        Field("reward calls, trials", in_trials(lambda cost: cost.reward_calls), 0),
        Field("optimiser steps, trials", in_trials(lambda cost: cost.steps), 0),
    )
    notes = (
        f"For training, mean over {view.repetition}s, all rounds together: a round trains the initial policy anew on "
        "samples of the model that the round before trained. The rows whose models a row samples are included. "
        "Sampling and scoring that rows share are counted for each of them. Reward calls: replies that the reward "
        "model scored.",
        "Labelled replies: replies of the data set that the row reads, whether it trains on their labels, on their "
        "text or on their scores. Replies that the reward model was trained on are not counted.",
        "Trials: of all tuning trials of the row together, the picked one included, with the first seed.",
        "A row that trains nothing spends at inference alone, which is not counted here.",
    )
    return build_table("budgets", "What each row was given", fields, view.methods, notes, view.records.arena)


def spent(view: View, row: str, name: str) -> Cell:
    """Return the mean over seeds, or over worlds, of a cost that training causes: none for what trains nothing."""
    if row not in view.trained:
        return Cell(0)
    found = mean_cost(view, row, name)
    return Cell.of(Missing("no cost of this row was recorded") if found is None else found)


def mean_cost(view: View, row: str, name: str) -> float | None:
    """Return the mean over seeds, or over worlds, of a cost, or None if it was not recorded."""
    if name == "models":
        return float(len(view.methods[row].models_in_memory())) if row in view.methods else None
    found = [getattr(cost, name) for (other, _), cost in view.records.costs.items() if other == row]
    return math.fsum(found) / len(found) if found and None not in found else None


def labelled_prompts(view: View, row: str) -> int:
    """Return the number of prompts of which a row trains on the data set's own replies."""
    return view.experiment.data.train_prompts if own_replies(view, row) else 0


def labelled_replies(view: View, row: str) -> int:
    """Return the number of the data set's own replies that a row reads."""
    return view.experiment.data.train_prompts * own_replies(view, row)


def own_replies(view: View, row: str) -> int:
    """Return how many of the data set's own replies to a prompt a row reads: two for a loss of pairs."""
    if row not in view.trained or view.method(row).family != "offline":
        return 0
    settings = view.methods[row]
    candidates = candidates_of(settings)
    if candidates is None:
        return 2 if isinstance(settings, PairSettings) else 1
    return len({*candidates.sources}.intersection(OWN_REPLIES))


def _trials(view: View, row: str) -> int:
    """Return the number of tuning trials of a row, which each of several worlds has for itself."""
    trials = view.records.tuned.get(row, ())
    return sum(trial.world == trials[0].world for trial in trials)


def _rounds(view: View, row: str) -> int:
    candidates = candidates_of(view.methods[row])
    return 0 if row not in view.trained else 1 if candidates is None else candidates.rounds
