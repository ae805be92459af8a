"""The tables of a report, each from the records alone. The costs, which are wall-clock, stand apart from all others."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np

from rrhf_bench.evaluation import metrics
from rrhf_bench.evaluation.grid import Block, Grid, Missing
from rrhf_bench.evaluation.statistics import Estimate, best_of_n_kl
from rrhf_bench.pipeline.results import Cost, Timing
from rrhf_bench.records import Decoding, Evaluated, PairScored
from rrhf_bench.report.comparisons import Comparison, comparison_words, comparisons
from rrhf_bench.report.table import DECODING_WORDS, Cell, Field, Table, Value, build_table
from rrhf_bench.report.view import BEST, GIVEN, MEASURE_WORDS, REWARDS, Found, Measure, View, unmeasured
from rrhf_bench.settings.methods import candidates_of

Line = tuple[str, Decoding]  # a row under a decoding
FEATURES = ("details", "off_topic", "vague", "polite", "rude", "repeated", "garbled", "refused")

_NO_MODEL = Missing("a reply that no model of this run wrote")
_INTERVALS = (
    "Brackets: 95% intervals, the percentiles of a bootstrap that resamples seeds and clusters of prompts, crossed. "
    "They are never shorter than those of Student's t, since few seeds tell little of their own spread. With one seed "
    "they leave that spread out: see the values of each seed."
)
_WORLD_INTERVALS = (
    "Brackets: 95% intervals of Student's t over worlds. Worlds differ in how hard their prompts are and in the scale "
    "of their reward model, which all rows share: the intervals of two rows may overlap when their paired difference "
    "is clear. Read the table of differences for that."
)
_DRAWS = "Seeds of an initial policy, of sampled replies: draws of its replies, since it is not trained anew."


def main_table(view: View) -> Table:
    """Every row under every decoding: rewards, text, distance from the initial policy, models in memory."""

    fields: Sequence[Field[Line]] = (
        Field("method", lambda line: line[0]),
        Field("decoding", lambda line: DECODING_WORDS[line[1]]),
        Field("proxy reward", lambda line: view.mean(*line, "reward"), 2, interval=True),
        Field("gold reward", lambda line: view.mean(*line, "gold"), 2, interval=True),
        Field("PPL", lambda line: perplexity(view, *line), 2),
        Field("PPL per text", lambda line: perplexity(view, *line, per_text=True), 2),
        Field("NLL per token", lambda line: _nll(view, *line), 3),
        Field("KL", lambda line: _of_draws(view, *line, "kl"), 2),
        Field("entropy", lambda line: _of_draws(view, *line, "entropy"), 1),
        Field("length", lambda line: view.mean(*line, "tokens"), 1),
        Field("distinct-2", of_replies(view, _distinct), 3),
        Field("fake turn", of_replies(view, lambda block: _sized(metrics.fake_turn_share(block.items), block)), 3),
        Field("at cap", of_replies(view, lambda block: _sized(metrics.length_share(block.items), block)), 3),
        Field("p_i accuracy", lambda line: accuracy(view, line[0]), 3),
        Field("models", lambda line: _models(view, line[0]), 0),
        *sizes(view),
    )
    models: dict[str, list[str]] = defaultdict(list)
    for row, settings in view.methods.items():
        models[", ".join(settings.models_in_memory())].append(row)
    in_memory = "; ".join(f"{names} ({', '.join(rows)})" for names, rows in models.items())
    notes = [
        "Proxy: the reward model that methods optimise. Gold: the world's true reward, seen by no method.",
        _WORLD_INTERVALS if view.experiment.several_worlds else _INTERVALS,
        "PPL: exp(total NLL / total tokens) of the replies given their prompts, under the perplexity model; PPL per "
        "text: mean of each text's own; NLL per token: mean over texts of each text's mean NLL, in nats.",
        "KL: to the initial policy that the row started from, nats a reply, mean of the summed log-ratios of sampled "
        "replies (k1). Entropy: nats a reply, mean of minus the summed log-prob of each sampled reply under the "
        "distribution that it was drawn from, its temperature included: one draw's estimate of the entropy of a "
        "reply. Part of a sampled reward can come from a lower entropy alone.",
        "Length: mean tokens, end-of-text included. distinct-2: distinct word pairs over all, mean over "
        f"{view.repetition}s.",
        "Fake turn, at cap: share of replies cut where they began another turn, or at the length cap.",
        "p_i accuracy: share of held-out pairs whose chosen reply has the higher length-normalised log-probability.",
        f"Models in memory while training, counted from the settings: {in_memory or 'no methods'}.",
        *(() if view.experiment.several_worlds else (_DRAWS,)),
        *([f"{BEST}: the reply of the highest gold reward that the world can write."] if BEST in view.given else []),
        *_dropped(view),
    ]
    return build_table("main", "Main comparison", fields, view.blocks_in_order, notes, view.records.arena, group=1)


def of_replies(view: View, value: Callable[[Block[Evaluated]], Value]) -> Callable[[tuple[Any, ...]], Value]:
    """Return a number of the replies of a row under a decoding, with which a line begins, or why there is none."""

    def read(line: tuple[Any, ...]) -> Value:
        block = view.block(line[0], line[1])
        return view.absent(line[0], line[1]) if block is None else value(block)

    return read


def sizes(view: View) -> list[Field[Any]]:
    """Return the columns of the numbers of prompts and seeds."""
    return [
        Field("prompts", of_replies(view, lambda block: len(block.prompts)), 0),
        Field(f"{view.repetition}s", of_replies(view, lambda block: block.repetitions), 0),
    ]


def perplexity(view: View, row: str, decoding: Decoding, *, per_text: bool = False) -> Value:
    """Return the perplexity of a row's replies, or why it has none."""
    block, nll = view.block(row, decoding), view.values(row, decoding, "nll")
    if block is None or isinstance(nll, Missing):
        return nll if isinstance(nll, Missing) else view.absent(row, decoding)
    found = metrics.perplexity(block.items)
    if found is None:
        return Missing("no reply has a token")
    return _sized(found.per_text if per_text else found.pooled, block)


def _nll(view: View, row: str, decoding: Decoding) -> Value:
    """Return the mean over texts of the NLL per token. If some text has no token, there is no interval."""
    nll = view.values(row, decoding, "nll")
    if isinstance(nll, Missing):
        return nll
    known = nll.values_SP[np.isfinite(nll.values_SP)]
    if not len(known):
        return Missing("no reply has a token")
    if known.size < nll.values_SP.size:
        return Cell(math.fsum(known) / len(known), n=len(nll.prompts), seeds=len(nll.seeds))
    return view.mean_of(nll, "mean", row, decoding, "nll")


def _sized(value: float, block: Block[Evaluated]) -> Cell:
    """A number without an interval of its own."""
    return Cell(value, n=len(block.prompts), seeds=len(block.seeds))


def _of_draws(view: View, row: str, decoding: Decoding, measure: Literal["kl", "entropy"]) -> Value:
    """Return a mean over sampled replies that only the distribution they were drawn from can give, or why not."""
    if view.block(row, decoding) is None:
        return view.absent(row, decoding)
    if row in GIVEN:
        return _NO_MODEL
    if (n := view.reranked(row)) is not None:
        bound = f"; for n = {n} its KL is at most {best_of_n_kl(n):.2f}" if measure == "kl" else ""
        return Missing(f"{_no_weights(view, row).reason}{bound}")
    if decoding != "sample":
        return Missing("KL and entropy are means over sampled replies")
    return view.mean(row, decoding, measure)


def _no_weights(view: View, row: str) -> Missing:
    label = view.method(row).label
    return Missing(f"{label} has no log-probabilities of its own: it reranks the initial policy's samples")


def _distinct(block: Block[Evaluated]) -> Value:
    """Mean over seeds, each on its own: it falls with the amount of text, and rows differ in their number of seeds."""
    found = [metrics.distinct_n(reply.response for reply in replies_P) for replies_P in block.items_SP]
    known = [share for share in found if share is not None]
    if len(known) < len(found):
        return Missing("the replies of a seed or world hold no pair of words")
    return _sized(math.fsum(known) / len(known), block)


def _models(view: View, row: str) -> Value:
    if row in GIVEN:
        return _NO_MODEL
    return len(view.methods[row].models_in_memory()) if row in view.methods else 1


def _dropped(view: View) -> list[str]:
    """A footnote for rows of which some seeds lack prompts that others have."""
    found = [
        f"{row} ({DECODING_WORDS[decoding]}): {view.blocks[row, decoding].dropped}"
        for row, decoding in view.blocks_in_order
        if (row, decoding) in view.blocks and view.blocks[row, decoding].dropped
    ]
    return [f"Prompts left out because not every seed has answered them: {'; '.join(found)}."] if found else []


_IN_NO_FAMILY = {
    "exploratory": Missing("exploratory: in no family of comparisons"),
    "one seed": Missing("one training seed does not show how far another training run would differ"),
}


def _estimated(value: Callable[[Comparison, Estimate], Value]) -> Callable[[Comparison], Value]:
    """Return why a comparison has no estimate in place of the value."""
    return lambda c: c.estimate if isinstance(c.estimate, Missing) else value(c, c.estimate)


def difference_fields(view: View) -> Sequence[Field[Comparison]]:
    """Return the columns of a table of comparisons."""
    several = view.experiment.several_worlds
    clusters: Field[Comparison] = Field("clusters", _estimated(lambda _, estimate: estimate.clusters), 0)
    repeated: Field[Comparison] = Field("seeds", _estimated(lambda _, estimate: estimate.seeds), 0)
    if several:
        repeated = Field("worlds", _estimated(lambda _, estimate: estimate.worlds), 0)
    return (
        Field("comparison", lambda c: f"{c.a} - {c.b}"),
        Field("decoding", lambda c: DECODING_WORDS[c.decoding]),
        Field("reward", lambda c: MEASURE_WORDS[c.measure].split()[0]),
        Field("difference", lambda c: c.estimate, 3, interval=True, decides=0.0),
        Field("p", _estimated(lambda _, estimate: estimate.p), 4, decides=0.05),
        Field("p (Holm)", _estimated(lambda c, _: _IN_NO_FAMILY[c.standing] if c.p is None else c.p), 4, decides=0.05),
        Field("verdict", _estimated(lambda c, _: c.standing)),
        Field("detectable", _estimated(lambda c, _: c.detectable), 3),
        Field("prompts", _estimated(lambda _, estimate: estimate.n), 0),
        *(() if several else (clusters,)),
        repeated,
    )


def difference_notes(view: View) -> tuple[str, ...]:
    """Return the notes of a table of comparisons."""
    pooled = (
        "worlds as random; its variance between worlds, once the level that all rows of a world share is taken out, is "
        "pooled over the trained rows and initial policies"
        if view.experiment.several_worlds
        else "training seeds and clusters of prompts as random; its variance between seeds is pooled over the trained "
        "rows"
    )
    return (
        f"Difference: mean over the prompts and {view.repetition}s that both have. Interval and p come from one t "
        f"statistic, which treats {pooled} of the same decoding and reward, and is never below the pair's own. The "
        "interval is at 95% and p is of this comparison alone.",
        "Holm: p adjusted over the primary comparisons of the same decoding and reward. Higher or lower: this p is "
        "below 0.05, which aims at a false verdict in at most one family in twenty. Otherwise the difference is inside "
        "noise, which is no proof of equality: read it with the next column. An exploratory comparison gets no "
        "verdict.",
        "Detectable: the smallest true difference that this comparison alone would find four times in five; an order "
        f"of size, since few {view.repetition}s tell little of their own spread, and more is needed in a family.",
    )


def level_words(view: View) -> str:
    """Say which kinds of repetition the intervals cover, for a note."""
    worlds, seeds = view.experiment.worlds, len(view.experiment.seeds)
    clusters = {name for row, decoding in view.blocks for name in view.clusters(view.blocks[row, decoding].prompts)}
    prompts = {prompt for block in view.blocks.values() for prompt in block.prompts}
    words = f"Intervals cover {len(prompts)} evaluation prompts"
    if view.experiment.several_worlds:
        words = (
            f"Intervals cover {len(worlds)} embedded worlds, each with its own text, labels, models and "
            f"{len(prompts)} evaluation prompts, and {seeds} training seed{'s' if seeds > 1 else ''} in each. The "
            "world is the random unit: seeds, topics and prompts lie within it. They do not cover other kinds of data "
            "or larger models."
        )
    else:
        words += f" in {len(clusters)} clusters" if len(clusters) < len(prompts) else ""
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
    notes, arena = (comparison_words(view), *difference_notes(view), level_words(view)), view.records.arena
    return build_table(
        "differences", "Paired differences", difference_fields(view), comparisons(view), notes, arena, group=2
    )


def seeds_table(view: View) -> Table:
    """The mean rewards of each repetition: with few seeds or worlds these say more than an interval."""

    def mean(measure: Measure) -> Callable[[tuple[str, Decoding, int]], Value]:
        def value(line: tuple[str, Decoding, int]) -> Value:
            row, decoding, number = line
            if number in view.failures.get(row, ()):
                return Missing(f"failed: {view.failures[row][number]}")
            found = view.values(row, decoding, measure)
            return found if isinstance(found, Missing) else float(found.values_SP[found.seeds.index(number)].mean())

        return value

    times = view.experiment.repetitions
    world: Field[tuple[str, Decoding, int]] = Field("world", lambda line: times[line[2]].world, 0)
    fields: Sequence[Field[tuple[str, Decoding, int]]] = (
        Field("method", lambda line: line[0]),
        Field("decoding", lambda line: DECODING_WORDS[line[1]]),
        *((world,) if view.experiment.several_worlds else ()),
        Field("seed", lambda line: times[line[2]].seed, 0),
        *(Field(MEASURE_WORDS[measure], mean(measure), 3) for measure in REWARDS),
    )
    lines = []
    for row, decoding in view.blocks_in_order:
        block = view.block(row, decoding)
        lines += [(row, decoding, seed) for seed in (*(block.seeds if block else ()), *view.failures.get(row, ()))]
    title = "Rewards of each world" if view.experiment.several_worlds else "Rewards of each seed"
    return build_table("seeds", title, fields, lines, (), view.records.arena, group=1)


def candidates_table(view: View) -> Table:
    """How much of what each row had to learn from carried a ranking."""

    @cache
    def counted(row: str) -> metrics.CandidateStatistics:
        return metrics.candidate_statistics(view.candidates[row].items)

    fields: Sequence[Field[str]] = (
        Field("method", lambda row: row),
        Field("samples as", lambda row: samples_as(view, row)),
        Field("k", lambda row: counted(row).responses / counted(row).prompts, 1),
        Field("responses", lambda row: counted(row).responses, 0),
        Field("duplicates", lambda row: counted(row).duplicates, 0),
        Field("ties", lambda row: counted(row).ties, 0),
        Field("pairs", lambda row: counted(row).pairs, 0),
        Field("all equal", lambda row: counted(row).all_equal, 0),
        Field("prompts", lambda row: len(view.candidates[row].prompts), 0),
        Field(f"{view.repetition}s", lambda row: view.candidates[row].repetitions, 0),
    )
    notes = (
        "k: candidates a prompt. Duplicates: texts that repeat an earlier one to the same prompt. Ties: pairs of "
        "candidates with equal scores, which a ranking loss skips; all equal: prompts that teach no ranking. Counts "
        f"are over all {view.repetition}s; where a row samples while it trains, a prompt counts each time that it "
        "comes.",
    )
    return build_table("candidates", "Training candidates", fields, view.candidates, notes, view.records.arena)


def samples_as(view: View, row: str) -> str | Missing:
    """The paper's name for where a row's candidates come from."""
    if row not in view.methods or candidates_of(view.methods[row]) is None:
        return Missing("it is not trained on candidates")
    return view.sampling_policy(row) or Missing("none of the paper's sampling policies")


def orders(view: View, row: str) -> Grid | Missing:
    """Return how a row's p_i orders each held-out pair: 1 as its label does, 0.5 for a tie, 0 the other way round."""
    if row in GIVEN:
        return _NO_MODEL
    if view.reranked(row) is not None:
        return _no_weights(view, row)
    if row in view.methods and view.methods[row].family == "inference":
        return Missing(f"it trains nothing: its weights are those of {view.initial(row)}")
    if row not in view.pairs:
        return view.absent(row)
    return view.pairs[row].grid(_right, one_model=view.one_model(row))


def _right(pair: PairScored) -> float:
    return (pair.chosen > pair.rejected) + 0.5 * (pair.chosen == pair.rejected)


def accuracy(view: View, row: str) -> Found:
    """Share of held-out pairs that a row's p_i orders as the labels do."""
    return view.mean_of(orders(view, row), "accuracy", row)


def features_table(view: View) -> Table | None:
    """What the replies are made of, where the world can tell."""
    held = {name for reply in view.records.evaluated for name in reply.features or ()}
    if all(reply.features is None for reply in view.records.evaluated):
        return None

    @cache
    def means(line: Line) -> Mapping[str, float] | Missing:
        block = view.blocks.get(line)
        if block is None:
            return view.absent(*line)
        return unmeasured("features", block.items) or metrics.feature_means(block.items)

    def mean(name: str) -> Callable[[Line], Value]:
        def value(line: Line) -> Value:
            found = means(line)
            return found if isinstance(found, Missing) else found.get(name, Missing("the world does not count it"))

        return value

    fields: Sequence[Field[Line]] = (
        Field("method", lambda line: line[0]),
        Field("decoding", lambda line: DECODING_WORDS[line[1]]),
        *(Field(name.replace("_", " "), mean(name), 3) for name in FEATURES if name in held),
    )
    notes = (
        "Mean count a reply: sentences that are details of the topic, details of another topic, vague, polite, "
        "rude, said before, not of this world (garbled); refused: share of replies that refuse.",
    )
    arena, lines = view.records.arena, view.blocks_in_order
    return build_table("features", "Features of the replies", fields, lines, notes, arena, group=1)


def counts_table(view: View) -> Table:
    """Everything dropped, truncated or tied on the way; what never happened is not listed."""
    records, words = view.records, view.experiment.repetition_words
    counted = {
        **{"data" if w is None else f"data, world {w}": counts for w, counts in records.data_counts.items()},
        **{f"{row}, {words(number)}": counts for (row, number), counts in records.counts.items()},
        **{f"{row}, {words(number)}, judge": counts for (row, number), counts in records.judge_counts.items()},
    }
    lines = [(where, *item) for where, counts in counted.items() for item in counts.items() if item[1]]
    fields: Sequence[Field[tuple[str, str, int]]] = (
        Field("where", lambda line: line[0]),
        Field("what", lambda line: line[1].replace("_", " ")),
        Field("count", lambda line: line[2], 0),
    )
    return build_table("counts", "Counts", fields, lines, (), view.records.arena)


PEAK_NOTE = (
    "Peak MiB: peak resident memory of the process while the stage ran, models and sampling engine that the process "
    "keeps for later stages included; on a GPU the peak of what PyTorch allocated there. The largest of all runs."
)
_NO_PEAK = Missing(
    "the peak of some stage was not measured: the system cannot reset its peak, or the stage was made before peaks "
    "were reset"
)


def _peak(peaks: Iterable[float | None]) -> float | Missing:
    """Return the largest peak, or the reason for a dash when one of them was not measured."""
    found = list(peaks)
    known = [peak for peak in found if peak is not None]
    return max(known) if known and len(known) == len(found) else _NO_PEAK


def cost_tables(view: View) -> list[Table]:
    """Return the tables of seconds and memory: measured on one machine once, compared with nothing byte for byte."""
    return [table for table in (method_costs(view), stage_costs(view)) if table.rows]


def cost_notes(view: View) -> tuple[str, ...]:
    """Return what the columns of the costs hold."""
    return (
        "Seconds, optimiser steps, sampled tokens and replies, reward calls (replies scored): of all that a row's "
        f"method needs, mean over {view.repetition}s. They hold sampling, scoring and judging its training candidates, "
        "its training, all earlier rounds, and the training of the rows whose models it samples. Of a train stage the "
        "seconds are those of the method alone, without loading and without the rewards on the dev prompts along the "
        "way; of the other stages they are those of the whole stage, with loading.",
        "Of these shared: seconds of stages that other rows of the run use as well. Each row that uses a shared stage "
        "is charged for it in full, so the rows do not add up to the cost of the run. A search for candidates that "
        "all seeds share is charged to each seed in full.",
        "Not charged: data, training of the initial policy, of the reward model and of the perplexity model, "
        "evaluation, and the samples on evaluation prompts, which judge every row alike. An initial policy that is "
        "itself a row, such as sft, is given to the rows that start from it or sample it: its training is charged to "
        "that row alone.",
        f"Train peak MiB: of the row's last train stage alone, the largest of its {view.repetition}s, since other "
        "stages hold other models. It is the peak resident memory of the process while that stage ran, models and "
        "sampling engine that the process keeps for later stages included; on a GPU it is the peak of what PyTorch "
        "allocated there.",
        "Training TFLOPs, an estimate in units of 10^12: 6 x P x trained tokens + 2 x P x forwarded tokens, P the "
        "parameters of the policy. Trained: fed to the policy in optimiser steps, prompts included. Forwarded: tokens "
        "of replies that pass a model without gradients, once for each of policy (sampling), reference, reward and "
        "value model. Every model counts as one of P parameters, a beam as one sample, and adapters as full training; "
        "attention is left out.",
        "Models, models in memory: counted from the method's settings, not measured. They are what the algorithm needs "
        "while it trains.",
    )


_NO_TRAINING = Missing("it trains nothing")
_AT_INFERENCE = Missing("it trains nothing: its cost is at inference, n samples and n scores a reply")
_NO_COST = Missing("no cost of this row was recorded")


def _tflops(costs: Sequence[Cost]) -> Value:
    known = [cost.tflops for cost in costs if cost.tflops is not None]
    if len(known) < len(costs):
        return Missing("the run's artifacts do not record the tokens that were trained on")
    return Cell(math.fsum(known) / len(known), seeds=len(known))


def method_costs(view: View) -> Table:
    """Return what each row costs in all, mean over seeds, and the models that its settings name."""
    costs: dict[str, list[Cost]] = defaultdict(list)
    for (row, _), cost in view.records.costs.items():
        costs[row].append(cost)

    def of_costs(value: Callable[[list[Cost]], Value]) -> Callable[[str], Value]:
        """Return a number of a row's costs, or why it has none."""

        def read(row: str) -> Value:
            if row in costs:
                return value(costs[row])
            if view.methods[row].family == "inference":
                return _NO_TRAINING if view.reranked(row) is None else _AT_INFERENCE
            return view.absent(row) if row in view.failures else _NO_COST

        return read

    def mean(value: Callable[[Cost], float]) -> Callable[[str], Value]:
        return of_costs(lambda found: Cell(math.fsum(map(value, found)) / len(found), seeds=len(found)))

    fields: Sequence[Field[str]] = (
        Field("method", lambda row: row),
        Field("seconds", mean(lambda cost: cost.seconds), 1),
        Field("of these shared", mean(lambda cost: cost.shared_seconds), 1),
        Field("train peak MiB", of_costs(lambda found: _peak(cost.train_peak_mib for cost in found)), 0),
        Field("sampled tokens", mean(lambda cost: cost.sampled_tokens), 0),
        Field("sampled replies", mean(lambda cost: cost.sampled_replies), 0),
        Field("reward calls", mean(lambda cost: cost.reward_calls), 0),
        Field("optimiser steps", mean(lambda cost: cost.steps), 0),
        Field("training TFLOPs", of_costs(_tflops), 2),
        Field("models", lambda row: _models(view, row), 0),
        Field("models in memory", lambda row: ", ".join(view.methods[row].models_in_memory())),
    )
    return build_table("cost", "Cost by method", fields, view.methods, cost_notes(view), view.records.arena)


def stage_costs(view: View) -> Table:
    """Return the seconds and peak memory of each kind of stage, by row."""
    runs: dict[tuple[str, str], list[Timing]] = defaultdict(list)
    for timing in view.records.timings:
        runs[timing.stage, timing.row or "all"].append(timing)

    def mean(timings: Sequence[Timing]) -> Cell:
        seconds = [timing.seconds for timing in timings]
        return Cell(math.fsum(seconds) / len(seconds), min(seconds), max(seconds))

    fields: Sequence[Field[tuple[str, str]]] = (
        Field("stage", lambda line: line[0]),
        Field("row", lambda line: line[1]),
        Field("runs", lambda line: len(runs[line]), 0),
        Field("seconds", lambda line: mean(runs[line]), 1, interval=True),
        Field("seconds, total", lambda line: math.fsum(timing.seconds for timing in runs[line]), 1),
        Field("peak MiB", lambda line: _peak(timing.peak_mib for timing in runs[line]), 0),
    )
    notes = (
        "Seconds: of the whole stage, mean [least, most] over its runs, one run per seed or world. Those of a "
        "train stage include loading and the rewards on the dev prompts along the way.",
        PEAK_NOTE,
    )
    return build_table("cost_stages", "Cost by stage", fields, runs, notes, view.records.arena)
