"""The tables of the RRHF paper (arXiv 2304.05302), each with this run's rows beside the published ones.

A table is a list of fields (a column and what stands in it) over a list of lines (our row, or why there is none, and
the published row beside it). ``counterparts.py`` says which row stands beside which.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from rrhf_bench.evaluation import metrics
from rrhf_bench.evaluation.statistics import Estimate
from rrhf_bench.records import Decoding
from rrhf_bench.replication.counterparts import (
    BEST_OF_N,
    PPO,
    RRHF,
    SFT,
    as_printed,
    choices,
    counterpart,
    names_parts,
    part_of,
    writes_reviews,
)
from rrhf_bench.replication.eq7 import BestOfNLearner, best_of_n_learners, candidate_maximum, candidate_mean
from rrhf_bench.replication.paper import Table2Row, Table6Row, table2, table5, table6, table7, table8, table10
from rrhf_bench.report.comparisons import compare
from rrhf_bench.report.table import DECODING_WORDS, Cell, Column, Missing, Table, number
from rrhf_bench.report.tables import absent, accuracy, likelihood_cells, samples_as
from rrhf_bench.report.view import BASE, GIVEN, View
from rrhf_bench.settings.methods import candidates_of

REWARD_MODEL = "reward model"

_SCALES = (
    "The published numbers are of 7B models under Dahoas/gptj-rm-static and gpt2-medium; ours are of other models "
    "under another reward model. The two scales have no common zero or unit: compare the order of rows, never the "
    "values."
)
_UNPUBLISHED = Missing("the paper has no such row")
_NO_METHOD = Missing("the paper has no such method")
_UNDECODED = Missing("a reply of the data set is not decoded; its numbers are in the first column")

Value = Cell | Estimate | Missing | float | str


@dataclass(frozen=True)
class _Line:
    """One line of a table: a row of the run, or why there is none, and the published row beside it."""

    row: str | Missing
    published: Any = None  # a row of ``replication.paper``


@dataclass(frozen=True)
class _Field:
    """One column of a table and what stands in it."""

    name: str
    value: Callable[[Any], Value]  # of a line
    digits: int | None = None
    interval: bool = False


def _paper(
    name: str,
    attribute: str,
    digits: int | None = None,
    none: str = "not given in the paper",
    unpublished: Missing = _UNPUBLISHED,
) -> _Field:
    """Return the column of a number or word of the published row. ``none`` is the reason if the paper leaves it out."""

    def value(line: _Line) -> Value:
        if line.published is None:
            return unpublished
        found: Value | None = getattr(line.published, attribute)
        return Missing(none) if found in (None, "") else found

    return _Field(f"paper: {name}", value, digits)


def _ours(name: str, of: Callable[[str], Value], digits: int | None = None, *, interval: bool = False) -> _Field:
    """Return a column of the run's row."""
    return _Field(name, lambda line: line.row if isinstance(line.row, Missing) else of(line.row), digits, interval)


def _table(
    view: View, name: str, title: str, fields: Sequence[_Field], lines: Iterable[Any], notes: Sequence[str]
) -> Table:
    """Return the table, without the columns of the paper if no line has anything in them."""
    rows = [[_cell(field.value(line)) for field in fields] for line in lines]
    theirs = {f for f, field in enumerate(fields) if field.name.startswith("paper: ")}
    if not any(row[f].value is not None for row in rows for f in theirs):
        rows = [[cell for f, cell in enumerate(row) if f not in theirs] for row in rows]
        fields = [field for f, field in enumerate(fields) if f not in theirs]
    columns = tuple(Column(field.name, field.digits, field.interval) for field in fields)
    return Table(name, title, columns, tuple(map(tuple, rows)), tuple(notes), view.records.arena)


def _cell(value: Value) -> Cell:
    return value if isinstance(value, Cell) else Cell.of(value)


def _itself(row: str) -> str:
    return row


def _ppl(view: View, row: str, decoding: Decoding) -> Value:
    block = view.block(row, decoding)
    return absent(view, row, decoding) if block is None else likelihood_cells(view, block, row, decoding)[0]


def _reward(view: View, row: str, decoding: Decoding) -> Value:
    found = view.block(row, decoding) is not None
    return view.mean(row, decoding, "reward") if found else absent(view, row, decoding)


def _decoded(view: View, read: Callable[[View, str, Decoding], Value], row: str, decoding: Decoding) -> Value:
    """Return a number of the replies of a row. A reply of the data set has its number in the first column."""
    if row not in GIVEN:
        return read(view, row, decoding)
    return read(view, row, "given") if decoding == view.decodings[0] else _UNDECODED


def _ppls(view: View) -> list[_Field]:
    """Return the PPL under each decoding."""
    return [_ours(f"PPL, {DECODING_WORDS[d]}", partial(_decoded, view, _ppl, decoding=d), 2) for d in view.decodings]


def _rewards(view: View, digits: int = 2) -> list[_Field]:
    """Return the reward under each decoding."""
    return [
        _ours(f"reward, {DECODING_WORDS[d]}", partial(_decoded, view, _reward, decoding=d), digits, interval=True)
        for d in view.decodings
    ]


# --- Table 2 -------------------------------------------------------------------------------------------------------


def main_results(view: View) -> Table | None:
    """Return Table 2, our row beside each of its own."""
    if writes_reviews(view):
        return None
    versions = dict(_merged_versions())
    fields = (
        _paper("model", "rho"),
        _Field("setting", lambda line: line.published.setting),
        _Field("version", lambda line: versions[line.published]),
        _ours("this run", _itself),
        _paper("PPL", "ppl", 2),
        *_ppls(view),
        _paper("reward", "reward", 2),
        *_rewards(view),
        _Field("source", lambda line: line.published.source),
    )
    given = {"Good responses": "chosen", "Bad responses": "rejected"}
    lines = [_Line(given.get(p.rho) or counterpart(view, p.rho, p.setting), p) for p in versions]
    wanted = list(dict.fromkeys((p.rho, p.setting) for p in versions if p.rho not in given))
    own = "No initial policy of this run says in which part it is (part = ...): base stands beside Alpaca."
    notes = (_SCALES, *_runs_of_dp(view), *choices(view, wanted), *([] if names_parts(view) else [own]))
    return _table(view, "table2", "Table 2 of the RRHF paper", fields, lines, notes)


def _merged_versions() -> list[tuple[Table2Row, str]]:
    """Return the rows of v3, and those of v2 that differ, with the versions that print them.

    The numbers of v2 were read at first hand.
    """
    merged: dict[tuple[str, str, float | None, float], list[Table2Row]] = defaultdict(list)
    for published in (*table2("v3"), *table2("v2")):
        merged[published.rho, published.setting, published.ppl, published.reward].append(published)
    order = list(dict.fromkeys((row.rho, row.setting) for rows in merged.values() for row in rows))
    by_setting = sorted(merged.values(), key=lambda rows: order.index((rows[0].rho, rows[0].setting)))
    return [(rows[-1], ", ".join(sorted(row.version for row in rows))) for rows in by_setting]


def _runs_of_dp(view: View) -> list[str]:
    """Return how far apart single runs of DP are: the paper's three, and ours."""
    (published,) = (row for row in table2("v3") if (row.rho, row.setting) == ("Alpaca", "RRHF_DP"))
    runs = [float(found) for found in re.findall(r"-?\d+\.\d+", published.note)]
    ppo = next(row.reward for row in table2("v3") if (row.rho, row.setting) == ("Alpaca", "PPO"))
    words = (
        f"Run to run: v3 prints Alpaca RRHF_DP as the mean of {len(runs)} runs "
        f"({', '.join(f'{run:g}' for run in runs)}), which are {max(runs) - min(runs):.2f} apart; PPO's {ppo:g} lies "
        "within them."
    )
    row = counterpart(view, "Alpaca", "RRHF_DP")
    for decoding in view.decodings if isinstance(row, str) else ():
        assert isinstance(row, str)
        values = view.values(row, decoding, "reward")
        if not isinstance(values, Missing) and len(values) > 1:
            ours = [number(value, 3) for value in values.mean(axis=1).tolist()]
            words += f" The seeds of {row}, {DECODING_WORDS[decoding]}: {', '.join(ours)}."
    return [words]


# --- Table 5 -------------------------------------------------------------------------------------------------------


def accuracies(view: View) -> Table | None:
    """Return Table 5: the policy's length-normalised log-probability as a reward model."""
    if not view.pairs:
        return None

    def percent(row: str) -> Value:
        found = accuracy(view, row)
        if isinstance(found, Missing):
            return found
        return Cell(100 * found.value, 100 * found.low, 100 * found.high, found.n, found.seeds)

    def size(of: Callable[[Any], int], row: str) -> Value:
        found = accuracy(view, row)
        return found if isinstance(found, Missing) else of(view.pairs[row])

    untrained = Missing("it was not trained by a row of this run")
    fields = (
        _ours("scorer", _itself),
        _ours("starts from", lambda row: view.initial(row) if row in view.methods else untrained),
        _paper("scorer", "scorer"),
        _paper("accuracy, %", "accuracy_percent", 2),
        _ours("accuracy, %", percent, 1, interval=True),
        _ours("ties", partial(size, lambda block: metrics.pair_accuracy(block.items).ties), 0),
        _ours("pairs", partial(size, lambda block: len(block.prompts)), 0),
        _ours("seeds", partial(size, lambda block: len(block.seeds)), 0),
    )
    settings = {"": "none", "PPO": "PPO", "RRHF_DP": "RRHF_DP"}
    theirs = {}
    for published in table5():
        part, _, how = published.scorer.partition("-")
        row = counterpart(view, part, settings[how]) if how in settings else None
        if isinstance(row, str):
            theirs[row] = published
        elif published.scorer == "Dahoas/gptj-rm-static" and not writes_reviews(view):
            theirs[REWARD_MODEL] = published
    lines = [_Line(row, theirs.get(row)) for row in (REWARD_MODEL, *view.rows)]
    notes = (
        "Share of held-out pairs whose chosen reply scores higher: p_i is the log-probability of a reply divided by "
        "its own number of tokens. A tie counts one half; ties are counted over all seeds.",
        *(
            ["Published: Table 5 of arXiv 2304.05302v2 (unchanged in v3), other models on other pairs."]
            if theirs
            else []
        ),
        *choices(view, [("Alpaca", "PPO"), ("Alpaca", "RRHF_DP")]),
    )
    return _table(view, "table5", "Accuracy of p_i as a reward model (Table 5 of the RRHF paper)", fields, lines, notes)


# --- Table 6 and Eq. 7 ---------------------------------------------------------------------------------------------


def sampling_quality(view: View) -> Table:
    """Return Table 6: the test reward, and what the training candidates are worth."""

    @cache
    def counted(row: str) -> metrics.CandidateStatistics:
        return metrics.candidate_statistics(view.candidates[row].items)

    none = "the paper gives none: these candidates change while it trains"
    fields = (
        _Field("paper: row", lambda line: _name(line.published)),
        _ours("this run", _itself),
        _ours("starts from", view.initial),
        _ours("samples as", partial(samples_as, view)),
        _paper("PPL", "ppl", 2),
        *_ppls(view),
        _paper("reward", "test_reward", 2),
        *_rewards(view),
        _paper("mean", "train_mean", 2, none),
        _ours("mean", partial(candidate_mean, view), 2, interval=True),
        _paper("std", "train_std", 2, none),
        _ours("std", lambda row: counted(row).std, 2),
        _ours("std within prompt", lambda row: counted(row).within_std, 2),
        _paper("max", "train_max", 2, none),
        _ours("max", partial(candidate_maximum, view), 2, interval=True),
    )
    pairs = [(row, counterpart(view, row.rho, row.setting)) for row in table6()]
    beside = [_Line(row, published) for published, row in pairs if isinstance(row, str) and row in view.rewarded]
    taken = {line.row for line in beside}
    others = [_Line(row) for row in view.rewarded if row not in taken]
    alone = [_name(published) for published, row in pairs if _Line(row, published) not in beside]
    notes = [
        *([_SCALES] if beside else []),
        "PPL and reward: of the replies to the test prompts. Mean, std, max: of the rewards of the training "
        "candidates, the std over all of them pooled (as the paper's must be), max the mean over prompts of the best. "
        "The std within a prompt is not in the paper. IP-n: the candidates of its last round.",
        "OP-k: all candidates that were sampled while it trained, with their rewards before any KL penalty; the paper "
        "prints no candidates of these.",
        *choices(view, [(row.rho, row.setting) for row in table6()]),
        *([f"Published rows without a counterpart here: {', '.join(map(str, alone))}."] if alone and beside else []),
        *(["Published: Table 6 of arXiv 2304.05302v2, the same in v3."] if beside else []),
    ]
    return _table(view, "table6", "Sampling quality (Table 6 of the RRHF paper)", fields, [*beside, *others], notes)


def _name(published: Any) -> str | Missing:
    """Return a published row's initial policy and setting."""
    return _UNPUBLISHED if published is None else f"{published.rho} {published.setting}"


def best_of_n_learning(view: View) -> Table:
    """Return the table of whether a trained model is as good as the best of its candidates (Eq. 7)."""
    published: dict[str, Table6Row] = {}
    for theirs in table6():
        row = counterpart(view, theirs.rho, theirs.setting)
        if isinstance(row, str):
            published.setdefault(row, theirs)

    def theirs_of(learner: BestOfNLearner) -> tuple[Value, Value]:
        """Return (the share of the way from mean to maximum, maximum minus test reward) of the published row."""
        row = published.get(learner.row)
        if learner.decoding != "greedy":
            return (Missing("the paper's decoding is greedy"),) * 2
        if row is None or row.train_mean is None or row.train_max is None:
            return _UNPUBLISHED, _UNPUBLISHED
        short = row.train_max - row.test_reward
        return 1 - short / (row.train_max - row.train_mean), short

    def of_gap(attribute: str, learner: BestOfNLearner) -> Value:
        gap = learner.paired_gap
        if isinstance(gap, Missing):
            return gap
        found: float | None = getattr(gap, attribute)
        return Missing("no test") if found is None else found

    fields = (
        _Field("method", lambda learner: learner.row),
        _Field("samples as", lambda learner: samples_as(view, learner.row)),
        _Field("decoding", lambda learner: DECODING_WORDS[learner.decoding]),
        _Field("candidates: mean", lambda learner: learner.mean, 2),
        _Field("candidates: max", lambda learner: learner.maximum, 2, True),
        _Field("test reward", lambda learner: learner.test, 2, True),
        _Field("paper: way", lambda learner: theirs_of(learner)[0], 2),
        _Field("way from mean to max", lambda learner: learner.way, 2),
        _Field("paper: gap", lambda learner: theirs_of(learner)[1], 2),
        _Field("gap, unpaired", lambda learner: learner.gap, 2),
        _Field("gap, paired", lambda learner: learner.paired_gap, 2, True),
        _Field("p", partial(of_gap, "p"), 4),
        _Field("prompts", partial(of_gap, "n"), 0),
        _Field("seeds", partial(of_gap, "seeds"), 0),
    )
    theirs_words = "The paper's are worked out from the cells of its Table 6: greedy replies, another reward scale."
    notes = (
        "Eq. 7 of arXiv 2304.05302 says that the test reward comes to the mean over prompts of the candidates' "
        "maximum.",
        "Gap: maximum minus test reward. Unpaired: the maximum is of the training prompts. Paired: the same "
        "candidate policy was drawn on the evaluation prompts, and the model's reward is subtracted on each; above "
        "0 the model falls short.",
        *([theirs_words] if published else []),
    )
    return _table(view, "eq7", "Test reward against the best candidate", fields, best_of_n_learners(view), notes)


# --- Table 7 -------------------------------------------------------------------------------------------------------


def rank_ablation(view: View) -> Table | None:
    """Return Table 7: rows that differ in the weight of the ranking term alone, one of them without it."""
    weights = {
        row: weight for row in view.methods if (weight := getattr(view.methods[row], "rank_weight", None)) is not None
    }
    groups = [rows for rows in view.rows_differing_only_in("rank_weight") if any(weights[row] == 0 for row in rows)]
    if not groups:
        return None
    full = {row: next((r for r in rows if weights[r] == 1.0), None) for rows in groups for row in rows}
    pairs = [(row, against) for row, against in full.items() if against not in (None, row)]
    found = {(c.a, c.decoding): c.estimate for c in compare(view, pairs, ("reward",), primary=False)}

    def less_full(row: str, decoding: Decoding) -> Value:
        reason = "this is the full objective" if row == full[row] else "no row has weight 1, or no such replies"
        return found.get((row, decoding), Missing(reason))

    fields = [
        _Field("paper: row", lambda line: _name(line.published)),
        _ours("this run", _itself),
        _ours("samples as", partial(samples_as, view)),
        _ours("weight of ranking", weights.__getitem__, 0),
        _paper("PPL", "ppl", 2),
        *_ppls(view),
        _paper("reward", "reward", 2),
    ]
    for decoding, reward in zip(view.decodings, _rewards(view), strict=True):
        less = partial(less_full, decoding=decoding)
        fields += [reward, _ours(f"less full, {DECODING_WORDS[decoding]}", less, 2, interval=True)]

    def beside(row: str) -> Any:
        setting = {1.0: "BP", 0.0: "BP - L_rank"}.get(weights[row]) if view.sampling_policy(row) == "BP" else None
        return next((r for r in table7() if (r.setting, r.rho) == (setting, part_of(view, row))), None)

    ordered = [row for rows in groups for row in sorted(rows, key=lambda row: (row != full[row], weights[row]))]
    notes = (
        _SCALES,
        "Rows differ in the weight of the ranking term alone. Less full: paired difference to the row with weight 1 "
        "over the prompts and seeds that both have. These differences are exploratory; verdicts stand in the table of "
        "differences.",
        "The paper says of weights 10 and 100 that they did worse, without numbers. Published: Table 7 of arXiv "
        "2304.05302v2, the same in v3.",
    )
    title = "Without the ranking term (Table 7 of the RRHF paper)"
    return _table(view, "table7", title, fields, [_Line(row, beside(row)) for row in ordered], notes)


# --- Table 8 -------------------------------------------------------------------------------------------------------


def samples_a_query(view: View) -> Table:
    """Return Table 8: responses a query that a method trains on, and samples at inference, counted from the records."""
    names = {BEST_OF_N: "Best-of-n", SFT: "SFT", PPO: "PPO", RRHF: "RRHF"}
    published = {p.method: p for p in table8()}

    def beside(row: str) -> Any:
        how = candidates_of(view.methods[row])
        online = how is not None and how.refresh > 0
        return published.get("RRHF_OP" if online else names.get(view.kind(row), ""))

    fields = (
        _ours("method", _itself),
        _paper("method", "method", unpublished=_NO_METHOD),
        _paper("training", "training", unpublished=_NO_METHOD),
        _ours("trained on", lambda row: _samples(view, row)[0], 1),
        _ours("of these sampled", lambda row: _samples(view, row)[1], 1),
        _ours("sampled in all", lambda row: _samples(view, row)[2], 1),
        _paper("inference", "inference", unpublished=_NO_METHOD),
        _ours("inference", lambda row: view.reranked(row) or 1, 0),
    )
    left = [row for row in view.methods if row not in view.main_rows]
    notes = [
        "Trained on: responses to a query in each of its visits; of these sampled: not counting the data set's own. "
        "Sampled in all: while and before it trains, over the training queries and the seeds, rounds before the last "
        "included. Inference: replies that are sampled and scored for each that is given.",
        'Paper: Table 8 of arXiv 2304.05302v2, the same in v3, in its words; "fixed" says that the responses are made '
        "once, before training.",
        *([f"Rows that differ from one of these in nothing that counts here: {', '.join(left)}."] if left else []),
    ]
    lines = [_Line(row, beside(row)) for row in view.main_rows]
    return _table(view, "table8", "Samples a query (Table 8 of the RRHF paper)", fields, lines, notes)


def _samples(view: View, row: str) -> tuple[Value, Value, Value]:
    """Return how many responses a query a row trained on, how many of these it sampled, and how many in all."""
    settings = view.methods[row]
    how = candidates_of(settings)
    if row in view.candidates and how is not None:
        block = view.candidates[row]
        drawn = sum(r.source not in (*GIVEN, "reply") for c in block.items for r in c.responses)
        different = len({prompt.partition("/")[0] for prompt in block.prompts})
        in_all = drawn * how.rounds / different / len(block.seeds)
        return sum(len(c.responses) for c in block.items) / len(block.items), drawn / len(block.items), in_all
    if settings.family == "inference":
        return (Missing("it trains nothing"),) * 3
    if "sampler" not in settings.requires:
        return 1.0, 0.0, 0.0
    seeds = [seed for name, seed in view.records.training if name == row]
    rollouts = [view.records.counts.get(f"{row}, seed {seed}", {}).get("rollouts") for seed in seeds]
    known = [count for count in rollouts if count is not None]
    if not known:
        return (Missing("the run's records hold no count of its rollouts"),) * 3
    return 1.0, 1.0, math.fsum(known) / len(known) / view.experiment.data.train_prompts


# --- Table 10 ------------------------------------------------------------------------------------------------------


def reviews(view: View) -> Table | None:
    """Return Table 10, if the run writes film reviews."""
    if not writes_reviews(view):
        return None
    fields = (
        _paper("method", "method"),
        _Field("setting", lambda line: _UNPUBLISHED if line.published is None else line.published.setting or "none"),
        _ours("this run", _itself),
        _ours("samples as", partial(samples_as, view)),
        _paper("reward", "reward", 3),
        *_rewards(view, 3),
        _paper("PPL", "ppl", 2),
        *_ppls(view),
    )
    lines = [_Line(_review_row(view, p.method, p.setting), p) for p in table10()]
    taken = {line.row for line in lines}
    notes = (
        "Published: Table 10 of arXiv 2304.05302v2, the same in v3: IMDB, with the rewards of a sentiment "
        "classifier. Ours: a small model on generated reviews; compare the order of rows.",
        "The paper's PPL column does not compare its rows, and ours stands beside it only for completeness. The values "
        "of PPO and NLPO appear to be those of RL4LMs, which measures how probable reference texts are under the "
        "trained policy; RRHF's stay within 0.02 of each other even for the policy that has collapsed to one sentence, "
        "which no perplexity of its own texts would do. Ours is of each row's replies under the perplexity model.",
    )
    lines += [_Line(row) for row in view.rows if row not in taken]
    return _table(view, "table10", "Film reviews (Table 10 of the RRHF paper, IMDB)", fields, lines, notes)


def _review_row(view: View, method: str, setting: str) -> str | Missing:
    """Return our row beside a published one. All rows start from one model, as the paper's start from SFT."""
    rows = view.rows_from(BASE)
    printed = [row for row in rows if as_printed(view, row)]
    free = setting.startswith("w/o")
    if method == "SFT":
        return BASE
    if method == "PPO":
        found = [r for r in view.rows_from(BASE, PPO) if bool(getattr(view.methods[r], "kl_coefficient", 0.0)) != free]
    elif method == "RRHF":
        found = [row for row in printed if view.sampling_policy(row) == setting]
    elif method.startswith("RRHF-OP"):
        how = {row: candidates_of(view.methods[row]) for row in printed}
        found = [row for row, h in how.items() if h and h.refresh and bool(h.reward_kl) != free]
    else:
        return Missing(f"{method} is no method of this project; the published number only")
    return view.plain_row(found) or Missing(f"no row of this run is {method} {setting}")
