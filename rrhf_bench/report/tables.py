"""The tables of a report, each from the records alone. The costs, which are wall-clock, stand apart from all others."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

from rrhf_bench.evaluation import metrics
from rrhf_bench.evaluation.statistics import best_of_n_kl
from rrhf_bench.pipeline.results import Timing
from rrhf_bench.records import Decoding, Evaluated, PairScored
from rrhf_bench.report.comparisons import Comparison, comparison_words, comparisons
from rrhf_bench.report.table import DECODING_WORDS, Cell, Column, Missing, Table
from rrhf_bench.report.view import (
    GIVEN,
    MEASURE_WORDS,
    REWARDS,
    Block,
    Found,
    View,
    unmeasured,
)
from rrhf_bench.settings.methods import candidates_of

FEATURES = ("details", "off_topic", "vague", "polite", "rude", "repeated", "garbled", "refused")
REWARD_MODEL = "reward model"

_NO_MODEL = Missing("a reply of the data set, written by no model of this run")
_INTERVALS = (
    "Brackets: 95% intervals, the percentiles of a bootstrap that resamples seeds and clusters of prompts, crossed. "
    "They are never shorter than those of Student's t, since few seeds tell little of their own spread. With one seed "
    "they leave that spread out: see the values of each seed."
)


def main_table(view: View) -> Table:
    """Every row under every decoding: rewards, text, distance from the initial policy, models in memory."""
    columns = (
        Column("method"),
        Column("decoding"),
        Column("proxy reward", 2, interval=True),
        Column("gold reward", 2, interval=True),
        Column("PPL", 2),
        Column("PPL per text", 2),
        Column("NLL per token", 3),
        Column("KL", 2),
        Column("length", 1),
        Column("distinct-2", 3),
        Column("fake turn", 3),
        Column("at cap", 3),
        Column("p_i accuracy", 3),
        Column("models", 0),
        Column("prompts", 0),
        Column("seeds", 0),
    )
    rows = tuple(_main_row(view, row, decoding) for row, decoding in view.blocks_in_order)
    models: dict[str, list[str]] = defaultdict(list)
    for row, settings in view.methods.items():
        models[", ".join(settings.models_in_memory())].append(row)
    in_memory = "; ".join(f"{names} ({', '.join(rows)})" for names, rows in models.items())
    notes = [
        "Proxy: the reward model that methods optimise. Gold: the world's true reward, seen by no method.",
        _INTERVALS,
        "PPL: exp(total NLL / total tokens) of the replies given their prompts, under the perplexity model; PPL per "
        "text: mean of each text's own; NLL per token: mean over texts of each text's mean NLL, in nats.",
        "KL: to the initial policy that the row started from, nats a reply, mean of the summed log-ratios of sampled "
        "replies (k1). Length: mean tokens, end-of-text included. distinct-2: distinct word pairs over all, mean over "
        "seeds.",
        "Fake turn, at cap: share of replies cut where they began another turn, or at the length cap.",
        "p_i accuracy: share of held-out pairs whose chosen reply has the higher length-normalised log-probability.",
        f"Models in memory while training, counted from the settings: {in_memory or 'no methods'}.",
        "Seeds of an initial policy, of sampled replies: draws of its replies, since it is not trained anew.",
        *_dropped(view),
    ]
    return Table("main", "Main comparison", columns, rows, tuple(notes), view.records.arena, group=1)


def _main_row(view: View, row: str, decoding: Decoding) -> tuple[Cell, ...]:
    block = view.block(row, decoding)
    head = (Cell(row), Cell(DECODING_WORDS[decoding]))
    models = Cell.of(_NO_MODEL) if row in GIVEN else Cell(_models(view, row))
    if block is None:
        none = Cell.of(absent(view, row, decoding))
        return (*head, *[none] * 10, _accuracy_cell(view, row), models, *[none] * 2)
    return (
        *head,
        Cell.of(view.mean(row, decoding, "reward")),
        Cell.of(view.mean(row, decoding, "gold")),
        *likelihood_cells(view, block, row, decoding),
        _kl_cell(view, row, decoding),
        Cell.of(view.mean(row, decoding, "tokens")),
        _distinct(block),
        _sized(metrics.fake_turn_share(block.items), block),
        _sized(metrics.length_share(block.items), block),
        _accuracy_cell(view, row),
        models,
        Cell(len(block.prompts)),
        Cell(len(block.seeds)),
    )


def absent(view: View, row: str, decoding: Decoding) -> Missing:
    """Why a row has no replies under a decoding."""
    if decoding == "greedy" and view.reranked(row) is not None:
        return Missing(f"greedy decoding leaves {view.method(row).label} nothing to choose from")
    return view.absent(row)


def likelihood_cells(view: View, block: Block[Evaluated], row: str, decoding: Decoding) -> tuple[Cell, Cell, Cell]:
    """Return the cells of PPL, PPL per text and NLL per token."""
    reason = unmeasured("nll", block.items) or unmeasured("nll_tokens", block.items)
    perplexity = None if reason else metrics.perplexity(block.items)
    if perplexity is None:
        cell = Cell.of(reason or Missing("no reply has a token"))
        return cell, cell, cell
    if perplexity.empty:  # a text without tokens has no mean, so prompts do not pair and there is no interval
        nlls = [reply.nll / reply.nll_tokens for reply in block.items if reply.nll is not None and reply.nll_tokens]
        nll = _sized(math.fsum(nlls) / len(nlls), block)
    else:
        nll = Cell.of(view.mean_of(block.array(_nll_per_token), block.prompts, "mean", row, decoding, "nll"))
    return _sized(perplexity.pooled, block), _sized(perplexity.per_text, block), nll


def _sized(value: float, block: Block[Evaluated]) -> Cell:
    """A number without an interval of its own."""
    return Cell(value, n=len(block.prompts), seeds=len(block.seeds))


def _nll_per_token(reply: Evaluated) -> float:
    assert reply.nll is not None
    assert reply.nll_tokens
    return reply.nll / reply.nll_tokens


def _kl_cell(view: View, row: str, decoding: Decoding) -> Cell:
    if row in GIVEN:
        return Cell.of(_NO_MODEL)
    if (n := view.reranked(row)) is not None:
        bound = f"for n = {n} its KL is at most {best_of_n_kl(n):.2f}"
        return Cell.of(Missing(f"{_no_weights(view, row).reason}; {bound}"))
    if decoding != "sample":
        return Cell.of(Missing("a KL is a mean over sampled replies"))
    return Cell.of(view.mean(row, decoding, "kl"))


def _no_weights(view: View, row: str) -> Missing:
    label = view.method(row).label
    return Missing(f"{label} has no log-probabilities of its own: it reranks the initial policy's samples")


def _distinct(block: Block[Evaluated]) -> Cell:
    """Mean over seeds, each on its own: it falls with the amount of text, and rows differ in their number of seeds."""
    found = [metrics.distinct_n(reply.response for reply in replies_P) for replies_P in block.items_SP]
    known = [share for share in found if share is not None]
    if len(known) < len(found):
        return Cell.of(Missing("some seed's replies hold no pair of words"))
    return _sized(math.fsum(known) / len(known), block)


def _models(view: View, row: str) -> int:
    return len(view.methods[row].models_in_memory()) if row in view.methods else 1


def _dropped(view: View) -> list[str]:
    """A footnote for rows of which some seeds lack prompts that others have."""
    found = [
        f"{row} ({DECODING_WORDS[decoding]}): {view.blocks[row, decoding].dropped}"
        for row, decoding in view.blocks_in_order
        if (row, decoding) in view.blocks and view.blocks[row, decoding].dropped
    ]
    return [f"Prompts left out because not every seed has answered them: {'; '.join(found)}."] if found else []


DIFFERENCE_COLUMNS = (
    Column("comparison"),
    Column("decoding"),
    Column("reward"),
    Column("difference", 3, interval=True, decides=0.0),
    Column("p", 4, decides=0.05),
    Column("p (Holm)", 4, decides=0.05),
    Column("verdict"),
    Column("detectable", 3),
    Column("prompts", 0),
    Column("clusters", 0),
    Column("seeds", 0),
)
DIFFERENCE_NOTES = (
    "Difference: mean over the prompts and seeds that both have. Interval and p come from one t statistic, which "
    "treats training seeds and clusters of prompts as random; its variance between seeds is pooled over the trained "
    "rows of the same decoding and reward. The interval is at 95% and p is of this comparison alone.",
    "Holm: p adjusted over the primary comparisons of the same decoding and reward. Higher or lower: this p is below "
    "0.05, which aims at a false verdict in at most one family in twenty. Otherwise the difference is inside noise, "
    "which is no proof of equality: read it with the next column. An exploratory comparison gets no verdict.",
    "Detectable: the smallest true difference that this comparison alone would find four times in five; an order of "
    "size, since few seeds tell little of their own spread, and more is needed in a family.",
)


_IN_NO_FAMILY = {
    "exploratory": Missing("exploratory: in no family of comparisons"),
    "one seed": Missing("one training seed does not show how far another training run would differ"),
}


def level_words(view: View) -> str:
    """Say which kinds of repetition the intervals cover, for a note."""
    clusters = {name for row, decoding in view.blocks for name in view.clusters(view.blocks[row, decoding].prompts)}
    prompts = {prompt for block in view.blocks.values() for prompt in block.prompts}
    seeds, grouped = len(view.experiment.seeds), len(clusters) < len(prompts)
    words = f"Intervals cover {len(prompts)} evaluation prompts" + (f" in {len(clusters)} clusters" if grouped else "")
    words += f" and {seeds} training seeds" if seeds > 1 else "; one seed, so training again is not covered"
    words += ". They do not cover other data, another reward model or another initial policy: all rows share one."
    given = {name: by for name, policy in view.experiment.policies.items() if (by := policy.trained_by) is not None}
    for name, row in given.items():
        words += (
            f" All seeds of the rows that start from {name} share one checkpoint, what {row} trained with one seed."
        )
    return words


def differences_table(view: View) -> Table:
    """Return the paired differences: those that are primary with Holm's p and a verdict, then the exploratory ones."""
    rows = tuple(map(difference_row, comparisons(view)))
    notes = (comparison_words(view), *DIFFERENCE_NOTES, level_words(view))
    return Table("differences", "Paired differences", DIFFERENCE_COLUMNS, rows, notes, view.records.arena, group=2)


def difference_row(c: Comparison) -> tuple[Cell, ...]:
    head = (Cell(f"{c.a} - {c.b}"), Cell(DECODING_WORDS[c.decoding]), Cell(MEASURE_WORDS[c.measure].split()[0]))
    if isinstance(c.estimate, Missing):
        return (*head, *[Cell.of(c.estimate)] * 8)
    assert c.detectable is not None
    p = [Cell(c.estimate.p), Cell.of(_IN_NO_FAMILY[c.standing]) if c.p is None else Cell(c.p)]
    sizes = (Cell(c.estimate.n), Cell(c.estimate.clusters), Cell(c.estimate.seeds))
    return (*head, Cell.of(c.estimate), *p, Cell(c.standing), Cell(c.detectable), *sizes)


def seeds_table(view: View) -> Table:
    """The mean rewards of each training seed: with few seeds these say more than an interval."""
    columns = (
        Column("method"),
        Column("decoding"),
        Column("seed", 0),
        Column("proxy reward", 3),
        Column("gold reward", 3),
    )
    rows = []
    for row, decoding in view.blocks_in_order:
        block = view.block(row, decoding)
        for s, seed in enumerate(block.seeds if block else ()):
            cells = []
            for measure in REWARDS:
                values = view.values(row, decoding, measure)
                found = values if isinstance(values, Missing) else float(values[s].mean())
                cells.append(Cell.of(found))
            rows.append((Cell(row), Cell(DECODING_WORDS[decoding]), Cell(seed), *cells))
        for seed, reason in view.failures.get(row, {}).items():
            failed = Cell.of(Missing(f"failed: {reason}"))
            rows.append((Cell(row), Cell(DECODING_WORDS[decoding]), Cell(seed), failed, failed))
    return Table("seeds", "Rewards of each seed", columns, tuple(rows), (), view.records.arena, group=1)


def candidates_table(view: View) -> Table:
    """How much of what each row had to learn from carried a ranking."""
    columns = (
        Column("method"),
        Column("samples as"),
        Column("k", 1),
        Column("responses", 0),
        Column("duplicates", 0),
        Column("ties", 0),
        Column("pairs", 0),
        Column("all equal", 0),
        Column("prompts", 0),
        Column("seeds", 0),
    )
    rows = []
    for row, block in view.candidates.items():
        found = metrics.candidate_statistics(block.items)
        counts = (found.responses, found.duplicates, found.ties, found.pairs, found.all_equal)
        sizes = (len(block.prompts), len(block.seeds))
        k = Cell(found.responses / found.prompts)
        rows.append((Cell(row), samples_as(view, row), k, *map(Cell, counts), *map(Cell, sizes)))
    notes = (
        "k: candidates a prompt. Duplicates: texts that repeat an earlier one to the same prompt. Ties: pairs of "
        "candidates with equal scores, which a ranking loss skips; all equal: prompts that teach no ranking. Counts "
        "are over all seeds; where a row samples while it trains, a prompt counts each time that it comes.",
    )
    return Table("candidates", "Training candidates", columns, tuple(rows), notes, view.records.arena)


def samples_as(view: View, row: str) -> Cell:
    """The paper's name for where a row's candidates come from."""
    if row not in view.methods or candidates_of(view.methods[row]) is None:
        return Cell.of(Missing("it is not trained on candidates"))
    return Cell.of(view.sampling_policy(row) or Missing("none of the paper's sampling policies"))


def accuracy(view: View, row: str) -> Found:
    """Share of held-out pairs that a row's p_i orders as the labels do."""
    if row in GIVEN:
        return _NO_MODEL
    if view.reranked(row) is not None:
        return _no_weights(view, row)
    block = view.pairs.get(row)
    if block is None:
        return view.absent(row)
    return view.once(("accuracy", row), lambda: view.mean_of(block.array(right), block.prompts, "accuracy", row))


def right(pair: PairScored) -> float:
    """1 where the chosen reply has the higher p_i, 0.5 for a tie, 0 else."""
    return (pair.chosen > pair.rejected) + 0.5 * (pair.chosen == pair.rejected)


def _accuracy_cell(view: View, row: str) -> Cell:
    return Cell.of(accuracy(view, row))


def features_table(view: View) -> Table | None:
    """What the replies are made of, where the world can tell."""
    if all(reply.features is None for reply in view.records.evaluated):
        return None
    held = {name for reply in view.records.evaluated for name in reply.features or ()}
    names = [name for name in FEATURES if name in held]
    columns = (Column("method"), Column("decoding"), *(Column(name.replace("_", " "), 3) for name in names))
    rows = []
    for row, decoding in view.blocks_in_order:
        block = view.block(row, decoding)
        reason = absent(view, row, decoding) if block is None else unmeasured("features", block.items)
        means: Mapping[str, float] = {} if block is None or reason else metrics.feature_means(block.items)
        uncounted = reason or Missing("the world does not count it")
        cells = [Cell(means[name]) if name in means else Cell.of(uncounted) for name in names]
        rows.append((Cell(row), Cell(DECODING_WORDS[decoding]), *cells))
    notes = (
        "Mean count a reply: sentences that are details of the topic, details of another topic, vague, polite, "
        "rude, said before, not of this world (garbled); refused: share of replies that refuse.",
    )
    return Table("features", "Features of the replies", columns, tuple(rows), notes, view.records.arena, group=1)


def counts_table(view: View) -> Table:
    """Everything dropped, truncated or tied on the way; what never happened is not listed."""
    columns = (Column("where"), Column("what"), Column("count", 0))
    rows = [
        (Cell(where), Cell(what.replace("_", " ")), Cell(count))
        for where, counts in view.records.counts.items()
        for what, count in counts.items()
        if count
    ]
    return Table("counts", "Counts", columns, tuple(rows), (), view.records.arena)


PEAK_NOTE = (
    "Peak MiB: peak resident memory of the process while the stage ran, models and sampling engine that the process "
    "keeps for later stages included; on a GPU the peak of what PyTorch allocated there. The largest of all runs."
)
_NO_PEAK = Missing(
    "the peak of some stage was not measured: the system cannot reset its peak, or the stage was made before peaks "
    "were reset"
)


def _peak(peaks: Iterable[float | None]) -> Cell:
    """Return the largest peak, or the reason for a dash when one of them was not measured."""
    found = list(peaks)
    known = [peak for peak in found if peak is not None]
    return Cell(max(known)) if known and len(known) == len(found) else Cell.of(_NO_PEAK)


def cost_tables(view: View) -> list[Table]:
    """Return the tables of seconds and memory: measured on one machine once, compared with nothing byte for byte."""
    return [table for table in (method_costs(view), stage_costs(view)) if table.rows]


COST_NOTES = (
    "Seconds, optimiser steps, sampled tokens and replies, reward calls (replies scored): of all that a row's method "
    "needs, mean over seeds. They hold sampling, "
    "scoring and judging its training candidates, its training, all earlier rounds, and the training of the rows whose "
    "models it samples. Of a train stage the seconds are those of the method alone, without loading and without the "
    "rewards on the dev prompts along the way; of the other stages they are those of the whole stage, with loading.",
    "Of these shared: seconds of stages that other rows of the run use as well. Each row that uses a shared stage is "
    "charged for it in full, so the rows do not add up to the cost of the run. A search for candidates that all seeds "
    "share is charged to each seed in full.",
    "Not charged: data, training of the initial policy, of the reward model and of the perplexity model, evaluation, "
    "and the samples on evaluation prompts, which judge every row alike. An initial policy that is itself a row, such "
    "as sft, is given to the rows that start from it or sample it: its training is charged to that row alone.",
    "Train peak MiB: of the row's last train stage alone, the largest of its seeds, since other stages hold other "
    "models. It is the peak resident memory of the process while that stage ran, models and sampling engine that the "
    "process keeps for later stages included; on a GPU it is the peak of what PyTorch allocated there.",
    "Models, models in memory: counted from the method's settings, not measured. They are what the algorithm needs "
    "while it trains.",
)
_AT_INFERENCE = Missing("it trains nothing: its cost is at inference, n samples and n scores a reply")
_NO_COST = Missing("no cost of this row was recorded")


def method_costs(view: View) -> Table:
    """Return what each row costs in all, mean over seeds, and the models that its settings name."""
    columns = (
        Column("method"),
        Column("seconds", 1),
        Column("of these shared", 1),
        Column("train peak MiB", 0),
        Column("sampled tokens", 0),
        Column("sampled replies", 0),
        Column("reward calls", 0),
        Column("optimiser steps", 0),
        Column("models", 0),
        Column("models in memory"),
    )
    rows = []
    for row, settings in view.methods.items():
        models = settings.models_in_memory()
        rows.append((Cell(row), *_cost_cells(view, row), Cell(len(models)), Cell(", ".join(models))))
    return Table("cost", "Cost by method", columns, tuple(rows), COST_NOTES, view.records.arena)


def _cost_cells(view: View, row: str) -> tuple[Cell, ...]:
    """Return the measured costs of a row."""
    costs = [cost for (name, _), cost in view.records.costs.items() if name == row]
    if not costs:
        missing = view.absent(row) if row in view.failures else _NO_COST
        return (Cell.of(_AT_INFERENCE if view.methods[row].family == "inference" else missing),) * 7

    def mean(values: Iterable[float]) -> Cell:
        return Cell(math.fsum(values) / len(costs), seeds=len(costs))

    return (
        mean(cost.seconds for cost in costs),
        mean(cost.shared_seconds for cost in costs),
        _peak(cost.train_peak_mib for cost in costs),
        mean(cost.sampled_tokens for cost in costs),
        mean(cost.sampled_replies for cost in costs),
        mean(cost.reward_calls for cost in costs),
        mean(cost.steps for cost in costs),
    )


def stage_costs(view: View) -> Table:
    """Return the seconds and peak memory of each kind of stage, by row."""
    columns = (
        Column("stage"),
        Column("row"),
        Column("runs", 0),
        Column("seconds", 1, interval=True),
        Column("seconds, total", 1),
        Column("peak MiB", 0),
    )
    groups: dict[tuple[str, str], list[Timing]] = defaultdict(list)
    for timing in view.records.timings:
        groups[timing.stage, timing.row or "all"].append(timing)
    rows = []
    for (stage, row), timings in groups.items():
        seconds = [timing.seconds for timing in timings]
        mean = Cell(math.fsum(seconds) / len(seconds), min(seconds), max(seconds))
        peak = _peak(timing.peak_mib for timing in timings)
        rows.append((Cell(stage), Cell(row), Cell(len(timings)), mean, Cell(math.fsum(seconds)), peak))
    notes = (
        "Seconds: of the whole stage, mean [least, most] over its runs, one run per seed when seeds differ. Those of a "
        "train stage include loading and the rewards on the dev prompts along the way.",
        PEAK_NOTE,
    )
    return Table("cost_stages", "Cost by stage", columns, tuple(rows), notes, view.records.arena)
