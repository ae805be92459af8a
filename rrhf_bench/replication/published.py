"""The tables of the RRHF paper (arXiv 2304.05302), each with this run's rows beside the published ones.

A table is a list of fields (a column and what stands in it) over a list of lines (our row, or why there is none, and
the published row beside it). ``counterparts.py`` says which row stands beside which.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial

from rrhf_bench.evaluation import metrics
from rrhf_bench.evaluation.grid import Block, Missing
from rrhf_bench.evaluation.statistics import Estimate
from rrhf_bench.records import Decoding, PairScored
from rrhf_bench.replication import eq7
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
from rrhf_bench.replication.paper import TABLE_2, TABLE_5, TABLE_6, TABLE_7, TABLE_8, TABLE_10, PublishedRow, load
from rrhf_bench.report.budgets import mean_cost, own_replies
from rrhf_bench.report.table import DECODING_WORDS, Cell, Field, L, Table, Value, build_table, number
from rrhf_bench.report.tables import accuracy, perplexity, samples_as
from rrhf_bench.report.view import BASE, GIVEN, View
from rrhf_bench.settings.methods import candidates_of

REWARD_MODEL = "reward model"

_SCALES = (
    "The published numbers are of 7B models under Dahoas/gptj-rm-static and gpt2-medium; ours are of other models "
    "under another reward model. The two scales have no common zero or unit: compare the order of rows, never the "
    "values."
)
PPL, REWARD = "ppl_gpt2_medium", "reward_gptj_rm_static"  # columns of Table 2
_UNPUBLISHED = Missing("the paper has no such row")
_NO_METHOD = Missing("the paper has no such method")
_UNDECODED = Missing("a reply of the data set is not decoded; its numbers are in the first column")

Line = tuple[str | Missing, PublishedRow | None]  # a row of the run, or why there is none; the published one beside it
Learner = tuple[str, Decoding]  # a row under a decoding


def _published(
    name: str, of: Callable[[PublishedRow], Value], digits: int | None = None, absent: Missing = _UNPUBLISHED
) -> Field[Line]:
    """Return a column of the published row."""
    return Field(name, lambda line: absent if line[1] is None else of(line[1]), digits)


def _paper(
    name: str,
    column: str,
    digits: int | None = None,
    none: str = "not given in the paper",
    absent: Missing = _UNPUBLISHED,
) -> Field[Line]:
    """Return the column of a number or word of the published row. ``none`` is the reason if the paper leaves it out."""

    def value(row: PublishedRow) -> Value:
        found = row.cell(column)
        if found is None:
            return Missing(none)
        return f"{found:g}" if digits is None and isinstance(found, float) else found

    return _published(f"paper: {name}", value, digits, absent)


def _ours(name: str, of: Callable[[str], Value], digits: int | None = None, *, interval: bool = False) -> Field[Line]:
    """Return a column of the run's row."""
    return Field(name, lambda line: line[0] if isinstance(line[0], Missing) else of(line[0]), digits, interval)


_THIS_RUN = _ours("this run", str)
_PAPER_ROW = _published("paper: row", lambda published: published.name)


def _table(
    view: View, name: str, title: str, fields: Sequence[Field[L]], lines: Iterable[L], notes: Sequence[str]
) -> Table:
    """Return the table, without the columns of the paper if no line has anything in them."""
    table = build_table(name, title, fields, lines, notes, view.records.arena)
    theirs = [column.name.startswith("paper: ") for column in table.columns]
    if any(cell.value is not None for row in table.rows for cell, paper in zip(row, theirs, strict=True) if paper):
        return table
    ours = [c for c, paper in enumerate(theirs) if not paper]
    columns = tuple(table.columns[c] for c in ours)
    return replace(table, columns=columns, rows=tuple(tuple(row[c] for c in ours) for row in table.rows))


def _decoded(
    view: View, name: str, read: Callable[[str, Decoding], Value], digits: int, *, interval: bool = False
) -> list[Field[Line]]:
    """Return a number of the replies under each decoding. That of a data set's reply stands in the first column."""

    def value(row: str, decoding: Decoding) -> Value:
        if row not in GIVEN:
            return read(row, decoding)
        return read(row, "given") if decoding == view.decodings[0] else _UNDECODED

    return [
        _ours(f"{name}, {DECODING_WORDS[d]}", partial(value, decoding=d), digits, interval=interval)
        for d in view.decodings
    ]


def _ppls(view: View) -> list[Field[Line]]:
    """Return the PPL under each decoding."""
    return _decoded(view, "PPL", partial(perplexity, view), 2)


def _rewards(view: View, digits: int = 2) -> list[Field[Line]]:
    """Return the reward under each decoding."""
    return _decoded(view, "reward", partial(view.mean, measure="reward"), digits, interval=True)


# --- Table 2 -------------------------------------------------------------------------------------------------------


def main_results(view: View) -> Table | None:
    """Return Table 2, our row beside each of its own."""
    if writes_reviews(view):
        return None
    printed: dict[tuple[object, ...], list[PublishedRow]] = defaultdict(list)  # v3, and what differs in v2
    for row in (*load(TABLE_2, "v3"), *load(TABLE_2, "v2")):
        printed[row.name, row.cell(PPL), row.cell(REWARD)].append(row)
    order = list(dict.fromkeys(rows[0].name for rows in printed.values()))
    groups = sorted(printed.values(), key=lambda rows: order.index(rows[0].name))
    versions = {
        (rows[-1].name, rows[-1].source): ", ".join(sorted(row.text("version") for row in rows)) for rows in groups
    }
    given = {"Good responses": "chosen", "Bad responses": "rejected"}
    theirs = [rows[-1] for rows in groups]  # the numbers of v2 were read at first hand
    fields = (
        _paper("model", "rho"),
        _published("setting", lambda published: published.text("setting")),
        _published("version", lambda published: versions[published.name, published.source]),
        _THIS_RUN,
        _paper("PPL", PPL, 2),
        *_ppls(view),
        _paper("reward", REWARD, 2),
        *_rewards(view),
        _published("source", lambda published: published.source),
    )
    wanted = list(dict.fromkeys((p.text("rho"), p.text("setting")) for p in theirs if p.text("rho") not in given))
    lines = [(given.get(p.text("rho")) or counterpart(view, p.text("rho"), p.text("setting")), p) for p in theirs]
    own = "No initial policy of this run says in which part it is (part = ...): base stands beside Alpaca."
    notes = (_SCALES, *_runs_of_dp(view), *choices(view, wanted), *([] if names_parts(view) else [own]))
    return _table(view, "table2", "Table 2 of the RRHF paper", fields, lines, notes)


def _runs_of_dp(view: View) -> list[str]:
    """Return how far apart single runs of DP are: the paper's three, and ours."""
    rows = {row.name: row for row in load(TABLE_2, "v3")}
    runs = [float(found) for found in re.findall(r"-?\d+\.\d+", rows["Alpaca RRHF_DP"].text("note"))]
    ppo = rows["Alpaca PPO"].number(REWARD)
    words = (
        f"Run to run: v3 prints Alpaca RRHF_DP as the mean of {len(runs)} runs "
        f"({', '.join(f'{run:g}' for run in runs)}), which are {max(runs) - min(runs):.2f} apart; PPO's {ppo:g} lies "
        "within them."
    )
    row = counterpart(view, "Alpaca", "RRHF_DP")
    for decoding in view.decodings if isinstance(row, str) else ():
        found = view.values(str(row), decoding, "reward")
        if not isinstance(found, Missing) and len(found.seeds) > 1:
            ours = [number(value, 3) for value in found.mean_S.tolist()]
            words += f" The {view.repetition}s of {row}, {DECODING_WORDS[decoding]}: {', '.join(ours)}."
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

    def size(of: Callable[[Block[PairScored]], int]) -> Callable[[str], Value]:
        return lambda row: found if isinstance(found := accuracy(view, row), Missing) else of(view.pairs[row])

    untrained = Missing("it was not trained by a row of this run")
    fields = (
        _ours("scorer", str),
        _ours("starts from", lambda row: view.initial(row) if row in view.methods else untrained),
        _paper("scorer", "scorer"),
        _paper("accuracy, %", "accuracy_percent", 2),
        _ours("accuracy, %", percent, 1, interval=True),
        _ours("ties", size(lambda block: sum(pair.chosen == pair.rejected for pair in block.items)), 0),
        _ours("pairs", size(lambda block: len(block.prompts)), 0),
        _ours(f"{view.repetition}s", size(lambda block: block.repetitions), 0),
    )
    settings = {"": "none", "PPO": "PPO", "RRHF_DP": "RRHF_DP"}
    theirs = {}
    for published in load(TABLE_5):
        part, _, how = published.text("scorer").partition("-")
        row = counterpart(view, part, settings[how]) if how in settings else None
        if isinstance(row, str):
            theirs[row] = published
        elif part == "Dahoas/gptj" and not writes_reviews(view):
            theirs[REWARD_MODEL] = published
    lines = [(row, theirs.get(row)) for row in (REWARD_MODEL, *view.rows)]
    first_hand = "Published: Table 5 of arXiv 2304.05302v2 (unchanged in v3), other models on other pairs."
    notes = (
        "Share of held-out pairs whose chosen reply scores higher: p_i is the log-probability of a reply divided by "
        "its own number of tokens. A tie counts one half; ties are counted over all "
        f"{view.repetition}s.",
        *([first_hand] if theirs else []),
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
        _PAPER_ROW,
        _THIS_RUN,
        _ours("starts from", view.initial),
        _ours("samples as", partial(samples_as, view)),
        _paper("PPL", "ppl", 2),
        *_ppls(view),
        _paper("reward", "test_reward", 2),
        *_rewards(view),
        _paper("mean", "train_mean", 2, none),
        _ours("mean", partial(eq7.candidate_mean, view), 2, interval=True),
        _paper("std", "train_std", 2, none),
        _ours("std", lambda row: counted(row).std, 2),
        _ours("std within prompt", lambda row: counted(row).within_std, 2),
        _paper("max", "train_max", 2, none),
        _ours("max", partial(eq7.candidate_maximum, view), 2, interval=True),
    )
    wanted = [(row.text("rho"), row.text("setting")) for row in load(TABLE_6)]
    pairs = [(counterpart(view, *setting), row) for setting, row in zip(wanted, load(TABLE_6), strict=True)]
    beside = [(row, published) for row, published in pairs if row in view.rewarded]
    others = [(row, None) for row in view.rewarded if row not in [taken for taken, _ in beside]]
    alone = [published.name for row, published in pairs if row not in view.rewarded]
    notes = [
        *([_SCALES] if beside else []),
        "PPL and reward: of the replies to the test prompts. Mean, std, max: of the rewards of the training "
        "candidates, the std over all of them pooled (as the paper's must be), max the mean over prompts of the best. "
        "The std within a prompt is not in the paper. IP-n: the candidates of its last round.",
        "OP-k: all candidates that were sampled while it trained, with their rewards before any KL penalty; the paper "
        "prints no candidates of these.",
        *choices(view, wanted),
        *([f"Published rows without a counterpart here: {', '.join(alone)}."] if alone and beside else []),
        *(["Published: Table 6 of arXiv 2304.05302v2, the same in v3."] if beside else []),
    ]
    return _table(view, "table6", "Sampling quality (Table 6 of the RRHF paper)", fields, [*beside, *others], notes)


def best_of_n_learning(view: View) -> Table:
    """Return the table of whether a trained model is as good as the best of its candidates (Eq. 7)."""
    published: dict[str | Missing, PublishedRow] = {}
    for theirs in reversed(load(TABLE_6)):
        published[counterpart(view, theirs.text("rho"), theirs.text("setting"))] = theirs

    def theirs_of(row: str, decoding: Decoding) -> tuple[Value, Value]:
        """Return (the share of the way from mean to maximum, maximum minus test reward) of the published row."""
        if decoding != "greedy":
            return (Missing("the paper's decoding is greedy"),) * 2
        theirs = published.get(row)
        if theirs is None or theirs.cell("train_mean") is None:
            return _UNPUBLISHED, _UNPUBLISHED
        maximum = theirs.number("train_max")
        short = maximum - theirs.number("test_reward")
        return 1 - short / (maximum - theirs.number("train_mean")), short

    def of_gap(value: Callable[[Estimate], Value]) -> Callable[[Learner], Value]:
        return lambda line: gap if isinstance(gap := eq7.paired_gap(view, *line), Missing) else value(gap)

    fields: Sequence[Field[Learner]] = (
        Field("method", lambda line: line[0]),
        Field("samples as", lambda line: samples_as(view, line[0])),
        Field("decoding", lambda line: DECODING_WORDS[line[1]]),
        Field("candidates: mean", lambda line: eq7.candidate_mean(view, line[0]), 2),
        Field("candidates: max", lambda line: eq7.candidate_maximum(view, line[0]), 2, True),
        Field("test reward", lambda line: view.mean(*line, "reward"), 2, True),
        Field("paper: way", lambda line: theirs_of(*line)[0], 2),
        Field("way from mean to max", lambda line: eq7.way(view, *line), 2),
        Field("untrained policy's own share of the way", lambda line: eq7.untrained_way(view, *line), 2),
        Field("paper: gap", lambda line: theirs_of(*line)[1], 2),
        Field("gap, unpaired", lambda line: eq7.unpaired_gap(view, *line), 2),
        Field("gap, paired", lambda line: eq7.paired_gap(view, *line), 2, True),
        Field("p", of_gap(lambda gap: gap.p), 4, decides=0.05),
        Field("prompts", of_gap(lambda gap: gap.n), 0),
        Field(f"{view.repetition}s", of_gap(lambda gap: gap.worlds or gap.seeds), 0),
    )
    theirs_words = "The paper's are worked out from the cells of its Table 6: greedy replies, another reward scale."
    notes = (
        "Eq. 7 of arXiv 2304.05302 says that the test reward comes to the mean over prompts of the candidates' "
        "maximum.",
        "Gap: maximum minus test reward. Unpaired: the maximum is of the training prompts. Paired: the same "
        "candidate policy was drawn on the evaluation prompts, and the model's reward is subtracted on each; above "
        "0 the model falls short. An interval over 0, or a p above 0.05, does not say that the two are equal: only an "
        "equivalence test among the claims can.",
        "Untrained policy's own share of the way: where the policy that the row started from stands under the same "
        "decoding, which is no effect of training.",
        *([theirs_words] if any(isinstance(row, str) for row in published) else []),
    )
    return _table(view, "eq7", "Test reward against the best candidate", fields, eq7.learners(view), notes)


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

    def less_full(row: str, decoding: Decoding) -> Value:
        if row == full[row]:
            return Missing("this is the full objective")
        against = full[row]
        return view.difference(row, against, decoding, "reward") if against else Missing("no row has weight 1")

    fields = [
        _PAPER_ROW,
        _THIS_RUN,
        _ours("samples as", partial(samples_as, view)),
        _ours("weight of ranking", weights.__getitem__, 0),
        _paper("PPL", "ppl", 2),
        *_ppls(view),
        _paper("reward", "reward", 2),
    ]
    for decoding, reward in zip(view.decodings, _rewards(view), strict=True):
        less = partial(less_full, decoding=decoding)
        fields += [reward, _ours(f"less full, {DECODING_WORDS[decoding]}", less, 2, interval=True)]

    def beside(row: str) -> PublishedRow | None:
        printed = view.sampling_policy(row) == "BP" and as_printed(view, row, but="rank_weight")
        setting = {1.0: "BP", 0.0: "BP - L_rank"}.get(weights[row]) if printed else None
        return next((r for r in load(TABLE_7) if r.name == f"{part_of(view, row)} {setting}"), None)

    ordered = [row for rows in groups for row in sorted(rows, key=lambda row: (row != full[row], weights[row]))]
    notes = (
        _SCALES,
        "Rows differ in the weight of the ranking term alone. Less full: paired difference to the row with weight 1 "
        f"over the prompts and {view.repetition}s that both have. These differences are exploratory; verdicts stand in "
        "the table of differences.",
        "The paper says of weights 10 and 100 that they did worse, without numbers. Published: Table 7 of arXiv "
        "2304.05302v2, the same in v3.",
    )
    title = "Without the ranking term (Table 7 of the RRHF paper)"
    return _table(view, "table7", title, fields, [(row, beside(row)) for row in ordered], notes)


# --- Table 8 -------------------------------------------------------------------------------------------------------


def samples_a_query(view: View) -> Table:
    """Return Table 8: responses a query that a method trains on, and samples in all and at inference."""
    names = {BEST_OF_N: "Best-of-n", SFT: "SFT", PPO: "PPO", RRHF: "RRHF"}
    published = {row.text("method"): row for row in load(TABLE_8)}

    def beside(row: str) -> PublishedRow | None:
        how = candidates_of(view.methods[row])
        online = how is not None and how.refresh > 0
        return published.get("RRHF_OP" if online else names.get(view.kind(row), ""))

    fields = (
        _ours("method", str),
        _paper("method", "method", absent=_NO_METHOD),
        _paper("training", "train_samples_per_query", absent=_NO_METHOD),
        _ours("trained on", lambda row: _samples(view, row)[0], 1),
        _ours("of these sampled", lambda row: _samples(view, row)[1], 1),
        _ours("sampled in all", lambda row: _samples(view, row)[2], 1),
        _paper("inference", "inference_samples_per_query", absent=_NO_METHOD),
        _ours("inference", lambda row: view.reranked(row) or 1, 0),
    )
    left = [row for row in view.methods if row not in view.main_rows]
    notes = [
        "Trained on: responses to a query that the method is given in each of its visits, those included that its loss "
        "passes over; of these sampled: not counting the data set's own. Sampled in all: the sampled replies of the "
        f"table of budgets, by training query. They are those of all rounds, mean over {view.repetition}s, with the "
        "greedy replies of a baseline and with what the rows sampled whose models this one samples. Inference: replies "
        "that are sampled and scored for each that is given.",
        'Paper: Table 8 of arXiv 2304.05302v2, the same in v3, in its words; "fixed" says that the responses are made '
        "once, before training.",
        *([f"Not shown, because they differ from a row here in numbers alone: {', '.join(left)}."] if left else []),
    ]
    lines = [(row, beside(row)) for row in view.main_rows]
    return _table(view, "table8", "Samples a query (Table 8 of the RRHF paper)", fields, lines, notes)


def _samples(view: View, row: str) -> tuple[Value, Value, Value]:
    """Return how many responses a query a row trained on, how many of these it sampled, and how many in all."""
    settings = view.methods[row]
    if settings.family == "inference":
        return (Missing("it trains nothing"),) * 3
    sampled = mean_cost(view, row, "sampled_replies")
    in_all: Value = Missing("no cost of this row was recorded")
    if sampled is not None:
        in_all = sampled / view.experiment.data.train_prompts
    if settings.family == "online":
        return getattr(settings, "replies", 1), getattr(settings, "replies", 1), in_all
    if candidates_of(settings) is None:
        return own_replies(view, row), 0, in_all
    block = view.candidates.get(row)
    if block is None:
        return view.absent(row), view.absent(row), in_all
    drawn = sum(r.source not in (*GIVEN, "reply") for c in block.items for r in c.responses)
    return sum(len(c.responses) for c in block.items) / len(block.items), drawn / len(block.items), in_all


# --- Table 10 ------------------------------------------------------------------------------------------------------


def reviews(view: View) -> Table | None:
    """Return Table 10, if the run writes film reviews."""
    if not writes_reviews(view):
        return None
    fields = (
        _paper("method", "method"),
        _published("setting", lambda published: published.text("setting") or "none"),
        _THIS_RUN,
        _ours("samples as", partial(samples_as, view)),
        _paper("reward", "reward", 3),
        *_rewards(view, 3),
        _paper("PPL", "perplexity", 2),
        *_ppls(view),
    )
    lines: list[Line] = [(_review_row(view, p.text("method"), p.text("setting")), p) for p in load(TABLE_10)]
    taken = {row for row, _ in lines}
    notes = (
        "Published: Table 10 of arXiv 2304.05302v2, the same in v3: IMDB, with the rewards of a sentiment "
        "classifier. Ours: a small model on generated reviews; compare the order of rows.",
        "The paper's PPL column does not compare its rows, and ours stands beside it only for completeness. The values "
        "of PPO and NLPO appear to be those of RL4LMs, which measures how probable reference texts are under the "
        "trained policy; RRHF's stay within 0.02 of each other even for the policy that has collapsed to one sentence, "
        "which no perplexity of its own texts would do. Ours is of each row's replies under the perplexity model.",
    )
    lines += [(row, None) for row in view.rows if row not in taken]
    return _table(view, "table10", "Film reviews (Table 10 of the RRHF paper, IMDB)", fields, lines, notes)


def _review_row(view: View, method: str, setting: str) -> str | Missing:
    """Return our row beside a published one. All rows start from one model, as the paper's start from SFT."""
    rows = view.rows_from(BASE)
    printed = [row for row in rows if as_printed(view, row)]
    free = setting.startswith("w/o")
    if method == "SFT":
        return BASE
    if method in ("PPO", "NLPO"):
        rows = view.rows_from(BASE, method.lower())
        found = [row for row in rows if bool(getattr(view.methods[row], "kl_coefficient", 0.0)) != free]
    elif method == "RRHF":
        found = [row for row in printed if view.sampling_policy(row) == setting]
    elif method.startswith("RRHF-OP"):
        how = {row: candidates_of(view.methods[row]) for row in printed}
        found = [row for row, h in how.items() if h and h.refresh and bool(h.reward_kl) != free]
    else:
        return Missing(f"{method} is no method of this project; the published number only")
    return view.plain_row(found) or Missing(f"no row of this run is {method} {setting}")
