"""The tables of the RRHF paper (arXiv 2304.05302), each with this run's rows beside the published ones.

A published row stands beside the run's row that starts from an initial policy in the same part (``[policy].part``) and
is trained in the same way. Nothing else makes them alike: models, data and reward model are others.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from rrhf_bench.evaluation import metrics
from rrhf_bench.evaluation.statistics import Estimate
from rrhf_bench.paper import Table2Row, Table6Row, table2, table5, table6, table7, table8, table10
from rrhf_bench.records import Decoding
from rrhf_bench.report.comparisons import (
    BestOfNLearner,
    Comparison,
    best_of_n_learners,
    candidate_maximum,
    candidate_mean,
    compare,
)
from rrhf_bench.report.table import Cell, Column, Missing, Table, number
from rrhf_bench.report.tables import absent, accuracy, likelihood_cells, samples_as
from rrhf_bench.report.view import BASE, DECODING_WORDS, GIVEN, Found, View
from rrhf_bench.training.rrhf_settings import RRHFSettings

REWARD_MODEL = "reward model"

_SCALES = (
    "The published numbers are of 7B models under Dahoas/gptj-rm-static and gpt2-medium; ours are of other models "
    "under another reward model. The two scales have no common zero or unit: compare the order of rows, never the "
    "values."
)
_UNPUBLISHED = Missing("the paper has no such row")
# The objective as the paper prints it: a row with another stands beside none of its rows.
_AS_PRINTED: Mapping[str, object] = {"variant": "paper", "rank_weight": 1.0, "sft_weight": 1.0, "margin": 0.0}


def published_tables(view: View) -> list[Table]:
    """Tables 2, 5, 6, 7, 8 and 10, and Eq. 7, of those that the run has something for."""
    made = (
        main_results(view),
        accuracies(view),
        sampling_quality(view),
        best_of_n_learning(view),
        rank_ablation(view),
        samples_a_query(view),
        reviews(view),
    )
    return [table for table in made if table is not None and table.rows]


# --- which row stands beside which ---------------------------------------------------------------------------------


def counterparts(view: View, part: str, setting: str) -> list[str]:
    """The rows that a published row can stand beside, in the file's order. ``setting`` as in Tables 2 and 6: "none",
    "PPO", "Best-of-4", or a sampling policy with or without "RRHF_"."""
    if setting == "none":
        return [policy for policy in view.policies if view.part(policy) == part]
    rows = [row for row in view.methods if view.part(row) == part]
    if setting == "PPO":
        return [row for row in rows if view.kind(row) == "ppo"]
    if setting.startswith("Best-of-"):
        n = int(setting.removeprefix("Best-of-"))
        return [row for row in rows if view.kind(row) == "best_of_n" and view.methods[row].n == n]
    name = setting.removeprefix("RRHF_")
    exact = [row for row in rows if _as_printed(view, row) and view.sampling_policy(row) == name]
    return exact or [row for row in rows if _as_printed(view, row) and _alike(view.sampling_policy(row), name)]


def counterpart(view: View, part: str, setting: str) -> str | Missing:
    """The plain one of ``counterparts``, or why there is none."""
    row = view.plain_row(counterparts(view, part, setting))
    if row is not None:
        return row
    starts = [policy for policy in view.policies if view.part(policy) == part]
    if not starts:
        return Missing(f"no initial policy of this run is in the part of {part}")
    what = {"PPO": "is trained by PPO"}.get(setting) or (
        f"is {setting.lower()}" if setting.startswith("Best-of-") else f"samples as {setting.removeprefix('RRHF_')}"
    )
    return Missing(f"no row of this run that starts from {' or '.join(starts)} {what}")


def _as_printed(view: View, row: str) -> bool:
    settings = view.methods[row]
    return (
        view.kind(row) == "rrhf"
        and settings.scored_by in (None, "reward model")
        and all(getattr(settings, key) == value for key, value in _AS_PRINTED.items())
    )


def _alike(found: str | None, name: str) -> bool:
    """IP-1 is DP; an OP-k stands for another where a run has another k."""

    def general(policy: str) -> str:
        return re.sub(r"OP-\d+", "OP-k", "DP" if policy == "IP-1" else policy)

    return found is not None and general(found) == general(name)


def _choices(view: View, wanted: Sequence[tuple[str, str]]) -> list[str]:
    """A footnote on the published rows that several rows of the run fit."""
    found: dict[str, list[str]] = defaultdict(list)
    for part, setting in wanted:
        rows = counterparts(view, part, setting)
        if len(rows) > 1:
            others = ", ".join(row for row in rows if row != view.plain_row(rows))
            found[f"{view.plain_row(rows)} rather than {others}"].append(f"{part} {setting}")
    if not found:
        return []
    words = "; ".join(f"{', '.join(settings)}: {choice}" for choice, settings in found.items())
    return [
        "Where several rows fit, the plain one is taken: the fewest settings that differ from their defaults, then the "
        f"first in the experiment file. {words}."
    ]


_Parts = tuple[str, str, tuple[Column, ...], tuple[tuple[Cell, ...], ...]]  # name, title, columns, rows


# --- cells that several tables share -------------------------------------------------------------------------------


def _ppl(view: View, row: str, decoding: Decoding) -> Cell:
    block = view.block(row, decoding)
    return Cell.of(absent(view, row, decoding)) if block is None else likelihood_cells(view, block, row, decoding)[0]


def _ppls(view: View, row: str) -> list[Cell]:
    """PPL under each decoding."""
    return [_ppl(view, row, decoding) for decoding in view.decodings]


def _rewards(view: View, row: str) -> list[Cell]:
    """Reward under each decoding."""
    return [_reward(view, row, decoding) for decoding in view.decodings]


def _ppl_columns(view: View) -> list[Column]:
    return [Column(f"PPL, {DECODING_WORDS[decoding]}", 2) for decoding in view.decodings]


def _reward_columns(view: View, digits: int = 2) -> list[Column]:
    return [Column(f"reward, {DECODING_WORDS[decoding]}", digits, interval=True) for decoding in view.decodings]


def _ours_alone(name: str, title: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> _Parts:
    """The parts of a table without the columns of the paper, where no row has anything in them."""
    theirs = [c for c, column in enumerate(columns) if column.name.startswith("paper: ")]
    if any(row[c].value is not None for row in rows for c in theirs):
        return name, title, tuple(columns), tuple(tuple(row) for row in rows)
    kept = [c for c in range(len(columns)) if c not in theirs]
    return name, title, tuple(columns[c] for c in kept), tuple(tuple(row[c] for c in kept) for row in rows)


def _reward(view: View, row: str, decoding: Decoding) -> Cell:
    return Cell.of(
        view.mean(row, decoding, "reward") if view.block(row, decoding) is not None else absent(view, row, decoding)
    )


def _optional(value: float | None, reason: Missing) -> Cell:
    return Cell.of(reason if value is None else value)


# --- Table 2 -------------------------------------------------------------------------------------------------------


def main_results(view: View) -> Table | None:
    """Table 2, our row beside each of its own."""
    if view.reviews:
        return None
    columns = (
        Column("paper: model"),
        Column("setting"),
        Column("version"),
        Column("this run"),
        Column("paper: PPL", 2),
        *_ppl_columns(view),
        Column("paper: reward", 2),
        *_reward_columns(view),
        Column("source"),
    )
    rows = []
    for published, versions in _merged_versions():
        row = _given(published.rho) or counterpart(view, published.rho, published.setting)
        ppl = _optional(published.ppl, Missing("not given in the paper"))
        none = [Cell.of(row)] * len(view.decodings) if isinstance(row, Missing) else []
        ppls = none if isinstance(row, Missing) else _our_ppls(view, row)
        rewards = none if isinstance(row, Missing) else _our_rewards(view, row)
        head = (Cell(published.rho), Cell(published.setting), Cell(versions), Cell.of(row))
        rows.append((*head, ppl, *ppls, Cell(published.reward), *rewards, Cell(published.source)))
    wanted = list(dict.fromkeys((p.rho, p.setting) for p, _ in _merged_versions() if not _given(p.rho)))
    named = any(policy.part for policy in (view.experiment.policy, *view.experiment.policies.values()))
    own = "No initial policy of this run says in which part it is (part = ...): base stands beside Alpaca."
    notes = (_SCALES, *_runs_of_dp(view), *_choices(view, wanted), *([] if named else [own]))
    return Table("table2", "Table 2 of the RRHF paper", columns, tuple(rows), notes, view.records.arena)


def _merged_versions() -> list[tuple[Table2Row, str]]:
    """The rows of v3, and those of v2 that differ, with the versions that print them; v2 was read at first hand."""
    merged: dict[tuple[str, str, float | None, float], list[Table2Row]] = defaultdict(list)
    for published in (*table2("v3"), *table2("v2")):
        merged[published.rho, published.setting, published.ppl, published.reward].append(published)
    order = list(dict.fromkeys((row.rho, row.setting) for rows in merged.values() for row in rows))
    by_setting = sorted(merged.values(), key=lambda rows: order.index((rows[0].rho, rows[0].setting)))
    return [(rows[-1], ", ".join(sorted(row.version for row in rows))) for rows in by_setting]


def _given(rho: str) -> str | None:
    return {"Good responses": "chosen", "Bad responses": "rejected"}.get(rho)


def _our_ppls(view: View, row: str) -> list[Cell]:
    if row not in GIVEN:
        return _ppls(view, row)
    return [_ppl(view, row, "given"), *[Cell.of(_UNDECODED)] * (len(view.decodings) - 1)]


def _our_rewards(view: View, row: str) -> list[Cell]:
    if row not in GIVEN:
        return _rewards(view, row)
    return [_reward(view, row, "given"), *[Cell.of(_UNDECODED)] * (len(view.decodings) - 1)]


_UNDECODED = Missing("a reply of the data set is not decoded; its numbers are in the first column")


def _runs_of_dp(view: View) -> list[str]:
    """How far apart single runs of DP are: the paper's three, and ours."""
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
    """Table 5: the policy's length-normalised log-probability as a reward model."""
    if not view.pairs:
        return None
    columns = (
        Column("scorer"),
        Column("starts from"),
        Column("paper: scorer"),
        Column("paper: accuracy, %", 2),
        Column("accuracy, %", 1, interval=True),
        Column("ties", 0),
        Column("pairs", 0),
        Column("seeds", 0),
    )
    published = {row.scorer: row.accuracy_percent for row in table5()}
    theirs = {REWARD_MODEL: "Dahoas/gptj-rm-static"} if not view.reviews else {}
    for scorer in published:
        part, _, how = scorer.partition("-")
        setting = {"": "none", "PPO": "PPO", "RRHF_DP": "RRHF_DP"}.get(how)
        row = counterpart(view, part, setting) if setting is not None else None
        if isinstance(row, str):
            theirs[row] = scorer
    rows = []
    for row in (REWARD_MODEL, *view.rows):
        block, found = view.pairs.get(row), accuracy(view, row)
        sizes: list[Cell] = [Cell.of(found)] * 3 if isinstance(found, Missing) else []
        if block is not None and not isinstance(found, Missing):
            ties = metrics.pair_accuracy(block.items).ties
            sizes = [Cell(ties), Cell(len(block.prompts)), Cell(len(block.seeds))]
        start = (
            Cell(view.initial(row))
            if row in view.methods
            else Cell.of(Missing("it was not trained by a row of this run"))
        )
        paper = [Cell(theirs[row]), Cell(published[theirs[row]])] if row in theirs else [Cell.of(_UNPUBLISHED)] * 2
        rows.append((Cell(row), start, *paper, _percent(found), *sizes))
    notes = (
        "Share of held-out pairs whose chosen reply scores higher: p_i is the log-probability of a reply divided by "
        "its own number of tokens. A tie counts one half; ties are counted over all seeds.",
        *(
            ["Published: Table 5 of arXiv 2304.05302v2 (unchanged in v3), other models on other pairs."]
            if theirs
            else []
        ),
        *_choices(view, [("Alpaca", "PPO"), ("Alpaca", "RRHF_DP")]),
    )
    title = "Accuracy of p_i as a reward model (Table 5 of the RRHF paper)"
    return Table(*_ours_alone("table5", title, columns, rows), notes, view.records.arena)


def _percent(found: Found) -> Cell:
    if isinstance(found, Missing):
        return Cell.of(found)
    return Cell(100 * found.value, 100 * found.low, 100 * found.high, found.n, found.seeds)


# --- Table 6 and Eq. 7 ---------------------------------------------------------------------------------------------


def sampling_quality(view: View) -> Table:
    """Table 6: the test reward, and what the training candidates are worth."""
    columns = (
        Column("paper: row"),
        Column("this run"),
        Column("starts from"),
        Column("samples as"),
        Column("paper: PPL", 2),
        *_ppl_columns(view),
        Column("paper: reward", 2),
        *_reward_columns(view),
        Column("paper: mean", 2),
        Column("mean", 2, interval=True),
        Column("paper: std", 2),
        Column("std", 2),
        Column("std within prompt", 2),
        Column("paper: max", 2),
        Column("max", 2, interval=True),
    )
    pairs = [(row, counterpart(view, row.rho, row.setting)) for row in table6()]
    beside = [(published, row) for published, row in pairs if isinstance(row, str) and row in view.rewarded]
    taken = {row for _, row in beside}
    rows = [_sampling_row(view, published, row) for published, row in beside]
    rows += [_sampling_row(view, None, row) for row in view.rewarded if row not in taken]
    alone = [f"{published.rho} {published.setting}" for published, row in pairs if (published, row) not in beside]
    notes = [
        *([_SCALES] if beside else []),
        "PPL and reward: of the replies to the test prompts. Mean, std, max: of the rewards of the training "
        "candidates, the std over all of them pooled (as the paper's must be), max the mean over prompts of the best. "
        "The std within a prompt is not in the paper. IP-n: the candidates of its last round.",
        "OP-k: all candidates that were sampled while it trained, with their rewards before any KL penalty; the paper "
        "prints no candidates of these.",
        *_choices(view, [(row.rho, row.setting) for row in table6()]),
        *([f"Published rows without a counterpart here: {', '.join(alone)}."] if alone and beside else []),
        *(["Published: Table 6 of arXiv 2304.05302v2, the same in v3."] if beside else []),
    ]
    title = "Sampling quality (Table 6 of the RRHF paper)"
    return Table(*_ours_alone("table6", title, columns, rows), tuple(notes), view.records.arena)


_ROUNDS = "IP-n: the candidates of its last round."
_ONLINE = (
    "OP-k: all candidates that were sampled while it trained, with their rewards before any KL penalty; the paper "
    "prints no candidates of these."
)


def _sampling_row(view: View, published: Table6Row | None, row: str) -> tuple[Cell, ...]:
    found = metrics.candidate_statistics(view.candidates[row].items)
    paper = [Cell.of(_UNPUBLISHED)] * 6
    if published is not None:
        none = Missing("the paper gives none: these candidates change while it trains")
        fixed = (published.train_mean, published.train_std, published.train_max)
        paper = [Cell(f"{published.rho} {published.setting}"), Cell(published.ppl), Cell(published.test_reward)]
        paper += [_optional(value, none) for value in fixed]
    name, ppl, reward, mean, std, maximum = paper
    return (
        name,
        Cell(row),
        Cell(view.initial(row)),
        samples_as(view, row),
        ppl,
        *_ppls(view, row),
        reward,
        *_rewards(view, row),
        mean,
        Cell.of(candidate_mean(view, row)),
        std,
        Cell(found.std),
        Cell(found.within_std),
        maximum,
        Cell.of(candidate_maximum(view, row)),
    )


def best_of_n_learning(view: View) -> Table:
    """Is a trained model as good as the best of its candidates? (Eq. 7)"""
    columns = (
        Column("method"),
        Column("samples as"),
        Column("decoding"),
        Column("candidates: mean", 2),
        Column("candidates: max", 2, interval=True),
        Column("test reward", 2, interval=True),
        Column("paper: way", 2),
        Column("way from mean to max", 2),
        Column("paper: gap", 2),
        Column("gap, unpaired", 2),
        Column("gap, paired", 2, interval=True),
        Column("p", 4),
        Column("prompts", 0),
        Column("seeds", 0),
    )
    published: dict[str, Table6Row] = {}
    for theirs in table6():
        row = counterpart(view, theirs.rho, theirs.setting)
        if isinstance(row, str):
            published.setdefault(row, theirs)
    rows = [_learner_row(view, learner, published.get(learner.row)) for learner in best_of_n_learners(view)]
    theirs_words = "The paper's are worked out from the cells of its Table 6: greedy replies, another reward scale."
    notes = (
        "Eq. 7 of arXiv 2304.05302 says that the test reward comes to the mean over prompts of the candidates' "
        "maximum.",
        "Gap: maximum minus test reward. Unpaired: the maximum is of the training prompts. Paired: the same "
        "candidate policy was drawn on the evaluation prompts, and the model's reward is subtracted on each; above "
        "0 the model falls short.",
        *([theirs_words] if published else []),
    )
    title = "Test reward against the best candidate"
    return Table(*_ours_alone("eq7", title, columns, rows), notes, view.records.arena)


def _learner_row(view: View, learner: BestOfNLearner, published: Table6Row | None) -> tuple[Cell, ...]:
    gap = learner.paired_gap
    sizes: tuple[Found | float, ...] = (gap, gap, gap)
    if isinstance(gap, Estimate):
        sizes = (gap.p if gap.p is not None else Missing("no test"), gap.n, gap.seeds)
    theirs: list[Cell] = [Cell.of(_UNPUBLISHED)] * 2
    if learner.decoding != "greedy":
        theirs = [Cell.of(Missing("the paper's decoding is greedy"))] * 2
    elif published is not None and published.train_mean is not None and published.train_max is not None:
        short = published.train_max - published.test_reward
        theirs = [Cell(1 - short / (published.train_max - published.train_mean)), Cell(short)]
    return (
        Cell(learner.row),
        samples_as(view, learner.row),
        Cell(DECODING_WORDS[learner.decoding]),
        *map(Cell.of, (learner.mean, learner.maximum, learner.test)),
        theirs[0],
        Cell.of(learner.way),
        theirs[1],
        *map(Cell.of, (learner.gap, gap, *sizes)),
    )


# --- Table 7 -------------------------------------------------------------------------------------------------------


def rank_ablation(view: View) -> Table | None:
    """Table 7: rows that differ in the weight of the ranking term alone, one of them without it."""
    groups = [rows for rows in view.alike("rank_weight") if any(_rank_weight(view, row) == 0 for row in rows)]
    columns = [
        Column("paper: row"),
        Column("this run"),
        Column("samples as"),
        Column("weight of ranking", 0),
        Column("paper: PPL", 2),
        *_ppl_columns(view),
        Column("paper: reward", 2),
    ]
    for decoding, column in zip(view.decodings, _reward_columns(view), strict=True):
        words = DECODING_WORDS[decoding]
        columns += [column, Column(f"less full, {words}", 2, interval=True)]
    rows = []
    for group in groups:
        weights = {row: _rank_weight(view, row) for row in group}
        full = next((row for row, weight in weights.items() if weight == 1.0), None)
        ordered = sorted(group, key=lambda row: (row != full, weights[row]))
        pairs = [(row, full) for row in ordered if row != full and full is not None]
        found = {(c.a, c.decoding): c for c in compare(view, pairs, ("reward",), primary=False)}
        rows += [_ablation_row(view, row, weights[row], full, found) for row in ordered]
    notes = (
        _SCALES,
        "Rows differ in the weight of the ranking term alone. Less full: paired difference to the row with weight 1 "
        "over the prompts and seeds that both have. These differences are exploratory; verdicts stand in the table of "
        "differences.",
        "The paper says of weights 10 and 100 that they did worse, without numbers. Published: Table 7 of arXiv "
        "2304.05302v2, the same in v3.",
    )
    if not groups:
        return None
    title = "Without the ranking term (Table 7 of the RRHF paper)"
    return Table(*_ours_alone("table7", title, columns, rows), notes, view.records.arena)


def _rank_weight(view: View, row: str) -> float:
    settings = view.methods[row]
    assert isinstance(settings, RRHFSettings)
    return settings.rank_weight


def _ablation_row(
    view: View, row: str, weight: float, full: str | None, found: Mapping[tuple[str, Decoding], Comparison]
) -> tuple[Cell, ...]:
    setting = {1.0: "BP", 0.0: "BP - L_rank"}.get(weight)
    published = next((r for r in table7() if r.setting == setting and r.rho == view.part(row)), None)
    if view.sampling_policy(row) != "BP":
        published = None
    paper = Cell.of(_UNPUBLISHED) if published is None else Cell(f"{published.rho} {published.setting}")
    ppls, rewards = _ppls(view, row), _rewards(view, row)
    cells = [paper, Cell(row), samples_as(view, row), Cell(weight)]
    cells += [Cell.of(_UNPUBLISHED) if published is None else Cell(published.ppl), *ppls]
    cells += [Cell.of(_UNPUBLISHED) if published is None else Cell(published.reward)]
    for reward, decoding in zip(rewards, view.decodings, strict=True):
        c = found.get((row, decoding))
        reason = Missing("this is the full objective" if row == full else "no row has weight 1, or no such replies")
        cells += [reward, Cell.of(reason if c is None else c.estimate)]
    return tuple(cells)


# --- Table 8 -------------------------------------------------------------------------------------------------------


def samples_a_query(view: View) -> Table | None:
    """Table 8: responses a query that a method trains on, and samples at inference, counted from the records."""
    columns = (
        Column("method"),
        Column("paper: method"),
        Column("paper: training"),
        Column("trained on", 1),
        Column("of these sampled", 1),
        Column("sampled in all", 1),
        Column("paper: inference"),
        Column("inference", 0),
    )
    rows = [_samples_row(view, row) for row in view.main_rows]
    left = [row for row in view.methods if row not in view.main_rows]
    notes = [
        "Trained on: responses to a query in each of its visits; of these sampled: not counting the data set's own. "
        "Sampled in all: while and before it trains, over the training queries and the seeds, rounds before the last "
        "included. Inference: replies that are sampled and scored for each that is given.",
        'Paper: Table 8 of arXiv 2304.05302v2, the same in v3, in its words; "fixed" says that the responses are made '
        "once, before training.",
        *([f"Rows that differ from one of these in nothing that counts here: {', '.join(left)}."] if left else []),
    ]
    title = "Samples a query (Table 8 of the RRHF paper)"
    return Table("table8", title, columns, tuple(rows), tuple(notes), view.records.arena) if rows else None


def _samples_row(view: View, row: str) -> tuple[Cell, ...]:
    settings, kind = view.methods[row], view.kind(row)
    method = {"best_of_n": "Best-of-n", "sft": "SFT", "ppo": "PPO", "rrhf": "RRHF"}.get(kind)
    method = "RRHF_OP" if settings.refresh is not None else method
    published = next((p for p in table8() if p.method == method), None)
    none = Missing("it trains nothing")
    trained_on: Cell = Cell.of(none)
    sampled: Cell = Cell.of(none)
    in_all: Cell = Cell.of(none)
    queries = view.experiment.data.train_prompts
    seeds = [seed for name, seed in view.records.training if name == row]
    if row in view.candidates:
        block = view.candidates[row]
        drawn = sum(r.source not in (*GIVEN, "reply") for c in block.items for r in c.responses)
        different = len({prompt.partition("/")[0] for prompt in block.prompts})
        trained_on = Cell(sum(len(c.responses) for c in block.items) / len(block.items))
        sampled = Cell(drawn / len(block.items))
        in_all = Cell(drawn * (settings.rounds or 1) / different / len(block.seeds))
    elif "sampler" in settings.requires and settings.family != "inference":
        rollouts = [view.records.counts.get(f"{row}, seed {seed}", {}).get("rollouts") for seed in seeds]
        known = [count for count in rollouts if count is not None]
        uncounted = Missing("the run's records hold no count of its rollouts")
        trained_on = sampled = Cell(1.0) if known else Cell.of(uncounted)
        in_all = Cell(math.fsum(known) / len(known) / queries) if known else Cell.of(uncounted)
    elif settings.family != "inference":
        trained_on, sampled, in_all = Cell(1.0), Cell(0.0), Cell(0.0)
    training = Missing("the paper has no such method" if published is None else "not given in the paper")
    return (
        Cell(row),
        Cell.of(published.method if published else Missing("the paper has no such method")),
        Cell.of(published.training if published and published.training else training),
        trained_on,
        sampled,
        in_all,
        Cell.of(published.inference if published else Missing("the paper has no such method")),
        Cell(settings.n or 1) if settings.family == "inference" else Cell(1),
    )


# --- Table 10 ------------------------------------------------------------------------------------------------------


def reviews(view: View) -> Table | None:
    """Table 10, where the run writes film reviews."""
    if not view.reviews:
        return None
    columns = (
        Column("paper: method"),
        Column("setting"),
        Column("this run"),
        Column("samples as"),
        Column("paper: reward", 3),
        *_reward_columns(view, 3),
        Column("paper: PPL", 2),
        *_ppl_columns(view),
    )
    rows: list[tuple[Cell, ...]] = []
    taken = set()
    for published in table10():
        row = _review_row(view, published.method, published.setting)
        none = [Cell.of(row)] * len(view.decodings) if isinstance(row, Missing) else []
        ours = [Cell.of(row)] * 2 if isinstance(row, Missing) else [Cell(row), samples_as(view, row)]
        rewards = none if isinstance(row, Missing) else _rewards(view, row)
        ppls = none if isinstance(row, Missing) else _ppls(view, row)
        head = (Cell(published.method), Cell(published.setting or "none"), *ours)
        rows.append((*head, Cell(published.reward), *rewards, Cell(published.ppl), *ppls))
        taken.add(row)
    none = [Cell.of(_UNPUBLISHED)]
    for row in view.rows:
        if row not in taken:
            ours = [Cell(row), samples_as(view, row)]
            rows.append((*none, *none, *ours, *none, *_rewards(view, row), *none, *_ppls(view, row)))
    notes = (
        "Published: Table 10 of arXiv 2304.05302v2, the same in v3: IMDB, with the rewards of a sentiment "
        "classifier. Ours: a small model on generated reviews; compare the order of rows.",
        "The paper's PPL column does not compare its rows, and ours stands beside it only for completeness. The values "
        "of PPO and NLPO appear to be those of RL4LMs, which measures how probable reference texts are under the "
        "trained policy; RRHF's stay within 0.02 of each other even for the policy that has collapsed to one sentence, "
        "which no perplexity of its own texts would do. Ours is of each row's replies under the perplexity model.",
    )
    title = "Film reviews (Table 10 of the RRHF paper, IMDB)"
    return Table("table10", title, columns, tuple(rows), notes, view.records.arena)


def _review_row(view: View, method: str, setting: str) -> str | Missing:
    """Our row beside a published one; all start from one model, as the paper's do from SFT."""
    rows = view.rows_from(BASE)
    free = setting.startswith("w/o")
    if method == "SFT":
        return BASE
    if method == "PPO":
        found = [row for row in rows if view.kind(row) == "ppo" and _penalty(view, row) != free]
    elif method == "RRHF":
        found = [row for row in rows if _as_printed(view, row) and view.sampling_policy(row) == setting]
    elif method.startswith("RRHF-OP"):
        online = [row for row in rows if _as_printed(view, row) and view.methods[row].refresh is not None]
        found = [row for row in online if bool(view.methods[row].reward_kl) != free]
    else:
        return Missing(f"{method} is no method of this project; the published number only")
    return view.plain_row(found) or Missing(f"no row of this run is {method} {setting}")


def _penalty(view: View, row: str) -> bool:
    return bool(getattr(view.methods[row], "kl_coefficient", 0.0))
