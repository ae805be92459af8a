"""Reward models on held-out pairs: accuracy, by difference of length, calibration; the filter of their training pairs.

The numbers of an experiment's [reward_models] and of the command `score-pairs`. Letters: S training seeds, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from rrhf_bench.evaluation.statistics import (
    Estimate,
    Floats,
    bootstrap_mean,
    expected_best_of_n,
    paired_difference,
)
from rrhf_bench.records import Candidates, PoolScored
from rrhf_bench.report.drawing import GREY, HUES, WIDTH, Drawn, Made, legend_above, legend_key, new_panels
from rrhf_bench.report.section import Part, Section, Sentence
from rrhf_bench.report.table import Cell, Column, Missing, Table
from rrhf_bench.report.view import View
from rrhf_bench.seeding import generator

LENGTH_BINS = 5  # of about equal numbers of pairs
CONFIDENCE_BINS = 5  # of equal width, from 0.5 to 1
FEWEST = 2  # pairs or prompts of a mean with an interval
_SINGLE = Missing("a mean over a single pair or prompt has no interval")


@dataclass(frozen=True)
class JudgedPairs:
    """One reward model on held-out pairs."""

    name: str
    gap_SP: Floats  # the reward of the chosen reply less that of the rejected one
    words_P: NDArray[np.int64]  # words of the chosen reply less those of the rejected one
    clusters_P: Sequence[str]
    pool: Mapping[int, Sequence[PoolScored]] = field(default_factory=dict)  # by seed
    pool_clusters: Sequence[str] = ()
    trained_on: float | None = None  # pairs, mean over seeds and worlds
    filtered: Mapping[str, Any] | None = None  # the pairs before and after the filter, with the first seed and world
    worlds_S: Sequence[int] | None = None  # of several worlds, whose pairs differ

    @property
    def right_SP(self) -> Floats:
        """Return 1 if the chosen reply has the higher reward, 0.5 for equal rewards, else 0."""
        return (self.gap_SP > 0) + 0.5 * (self.gap_SP == 0)

    @property
    def confidence_SP(self) -> Floats:
        """Return the predicted probability that the reply with the higher reward is the chosen one."""
        return expit(np.abs(self.gap_SP))

    def mean(self, value_SP: Floats, what: str, of_P: NDArray[np.bool_] | None = None) -> Estimate:
        of_P = np.ones(len(self.words_P), dtype=bool) if of_P is None else of_P
        clusters = [name for name, kept in zip(self.clusters_P, of_P, strict=True) if kept]
        rng = generator("reward model", self.name, what)
        return bootstrap_mean(value_SP[:, of_P], rng=rng, clusters_P=clusters, worlds_S=self.worlds_S)


def judged_pairs(
    name: str, by_seed: Mapping[int, Sequence[Candidates]], clusters_P: Sequence[str], **about: Any
) -> JudgedPairs:
    """Return one reward model's scores of the chosen and rejected replies, the same pairs with every seed."""
    score = {
        source: np.array([[_of(group, source).score for group in groups] for groups in by_seed.values()], dtype=float)
        for source in ("chosen", "rejected")
    }
    first = next(iter(by_seed.values()))
    words = [len(_of(group, "chosen").text.split()) - len(_of(group, "rejected").text.split()) for group in first]
    return JudgedPairs(name, score["chosen"] - score["rejected"], np.array(words), clusters_P, **about)


def _of(group: Candidates, source: str) -> Any:
    return next(response for response in group.responses if response.source == source)


def calibration(model: JudgedPairs) -> list[tuple[float, float, int]]:
    """Return (mean predicted probability, share right, pairs) of each bin of confidence that holds a pair."""
    confidence, right = model.confidence_SP.ravel(), model.right_SP.ravel()
    bin_N = np.minimum(((confidence - 0.5) * 2 * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    bins = ((bin_N == b) for b in range(CONFIDENCE_BINS))
    return [(float(confidence[of].mean()), float(right[of].mean()), int(of.sum())) for of in bins if of.any()]


def calibration_error(model: JudgedPairs) -> float:
    """Return the expected calibration error: |predicted - observed|, averaged over bins by their pairs (1706.04599)."""
    bins = calibration(model)
    return sum(abs(predicted - observed) * n for predicted, observed, n in bins) / sum(n for *_, n in bins)


def length_bins(words_P: NDArray[np.int64]) -> list[tuple[int, int, NDArray[np.bool_]]]:
    """Return (least, most, which pairs) of bins of the difference in words, with about as many pairs in each."""
    edges = np.unique(np.quantile(words_P, np.linspace(0, 1, LENGTH_BINS + 1)[1:-1], method="inverted_cdf"))
    bin_P = np.searchsorted(edges, words_P, side="left")
    found = (bin_P == b for b in range(len(edges) + 1))
    return [(int(words_P[of].min()), int(words_P[of].max()), of) for of in found if of.any()]


def models_table(models: Sequence[JudgedPairs], arena: str) -> Table:
    """Return accuracy, its difference from the first model, log loss, calibration and the gold reward of best-of-n."""
    best = {model.name: _best_of_n(model) for model in models}
    n = next((n for n, _ in best.values() if n), 0)
    several = len(models) > 1
    trained = [Column("trained on", 0)] if any(model.trained_on for model in models) else []
    columns = [Column("reward model"), *trained, Column("accuracy", 3, True)]
    columns += [Column(f"less {models[0].name}", 3, True), Column("p", 3, decides=0.05)] if several else []
    columns += [Column("log loss", 3), Column("calibration error", 3)]
    columns += [Column(f"gold of best of {n}", 3, True)] if n else []
    columns += [Column(f"gold less {models[0].name}", 3, True)] if n and several else []
    rows = []
    for model in models:
        cells = [
            Cell.of(model.name),
            *(_count(model.trained_on) for _ in trained),
            Cell.of(_accuracy(model, "accuracy")),
        ]
        if several:
            less = _difference(model, models[0], model.right_SP, models[0].right_SP, model.clusters_P)
            cells += [Cell.of(less), Cell.of(less if isinstance(less, Missing) else float(less.p or 0.0))]
        cells += [Cell.of(float(np.logaddexp(0, -model.gap_SP).mean())), Cell.of(calibration_error(model))]
        gold = best[model.name][1]
        if n:
            cells.append(Cell.of(gold if isinstance(gold, Missing) else _gold_mean(model, gold)))
        if n and several:
            first = best[models[0].name][1]
            missing = next((g for g in (gold, first) if isinstance(g, Missing)), None)
            cells.append(Cell.of(missing or _difference(model, models[0], gold, first, model.pool_clusters)))
        rows.append(tuple(cells))
    pairs, seeds, worlds = models[0].gap_SP.shape[1], len(models[0].gap_SP), len(set(models[0].worlds_S or ()))
    repeated = (
        f"{pairs} held-out pairs in each of {worlds} worlds. Equal rewards count one half. 95% intervals over worlds"
        if worlds
        else f"{pairs} held-out pairs in {len(set(models[0].clusters_P))} clusters; training seeds: {seeds} of the "
        "first row. Equal rewards count one half. 95% intervals over seeds and clusters of pairs"
    )
    footnotes = [
        f"{repeated}; p is not adjusted.",
        *([f"Trained on: pairs, mean over {'worlds' if worlds else 'seeds'}."] if trained and seeds > 1 else []),
        "Log loss: -log sigma(r chosen - r rejected). Calibration error: |predicted - observed| over "
        f"{CONFIDENCE_BINS} bins of sigma(|difference|). Both presuppose a Bradley-Terry score: not a probability, and "
        "not the standardised score of an ensemble.",
    ]
    if n:
        footnotes.append(
            f"Gold of best of {n}: expected gold reward of the sample that the model ranks first of {n} samples of the "
            "initial policy, from the pool of the best-of-n curve."
        )
    return Table("reward_models", "Reward models", tuple(columns), tuple(rows), tuple(footnotes), arena)


def _count(pairs: float | None) -> Cell:
    return Cell.of(Missing("it was not trained here") if pairs is None else pairs)


def _difference(
    one: JudgedPairs, other: JudgedPairs, value_SP: Any, other_SP: Any, clusters_P: Sequence[str]
) -> Estimate | Missing:
    if one is other:
        return Missing("it is the one that the others are compared with")
    if len(value_SP) != len(other_SP) and 1 not in (len(value_SP), len(other_SP)):
        return Missing("the two have different seeds")
    if not one.worlds_S and value_SP.shape[1] < FEWEST:
        return _SINGLE
    return paired_difference(value_SP, other_SP, clusters_P=clusters_P, worlds_S=one.worlds_S)


def _best_of_n(model: JudgedPairs) -> tuple[int, Floats | Missing]:
    """Return (n, gold reward of the expected best of n by seed and prompt); n is a quarter of the samples."""
    pools = list(model.pool.values())
    if not pools or any(row.golds is None for pool in pools for row in pool):
        return 0, Missing("there is no gold reward, or no pool")
    n = max(1, min(len(row.rewards) for pool in pools for row in pool) // 4)
    rows = ((np.array([r.rewards for r in pool]), np.array([r.golds for r in pool], dtype=float)) for pool in pools)
    return n, np.stack([expected_best_of_n(rewards, n, value_BN=golds) for rewards, golds in rows])


def _accuracy(model: JudgedPairs, what: str, of_P: NDArray[np.bool_] | None = None) -> Estimate | Missing:
    """Return the accuracy on all pairs or on those of ``of_P``; ``what`` names its draws."""
    pairs = len(model.words_P) if of_P is None else int(of_P.sum())
    return model.mean(model.right_SP, what, of_P) if model.worlds_S or pairs >= FEWEST else _SINGLE


def _gold_mean(model: JudgedPairs, gold_SP: Floats) -> Estimate | Missing:
    if not model.worlds_S and gold_SP.shape[1] < FEWEST:
        return _SINGLE
    rng = generator("reward model", model.name, "gold")
    return bootstrap_mean(gold_SP, rng=rng, clusters_P=model.pool_clusters, worlds_S=model.worlds_S)


def lengths_table(models: Sequence[JudgedPairs], arena: str) -> Table | None:
    """Return the accuracy of each model by how many words the chosen reply has more than the rejected one.

    Of several worlds there is no such table, because each has pairs of other lengths.
    """
    if models[0].worlds_S is not None:
        return None
    rows = [
        (
            Cell.of(model.name),
            Cell.of(f"{low} to {high}"),
            Cell.of(float(of_P.sum())),
            Cell.of(_accuracy(model, f"words {low}", of_P)),
        )
        for model in models
        for low, high, of_P in length_bins(model.words_P)
    ]
    columns = (Column("reward model"), Column("words more"), Column("pairs", 0), Column("accuracy", 3, True))
    note = "Words of the chosen reply less those of the rejected one, in bins of about as many pairs."
    return Table("reward_model_lengths", "Accuracy by length", columns, tuple(rows), (note,), arena, group=0)


def calibration_table(models: Sequence[JudgedPairs], arena: str) -> Table:
    """Return predicted and observed shares by confidence."""
    rows = [
        (Cell.of(model.name), Cell.of(predicted), Cell.of(observed), Cell.of(float(n)))
        for model in models
        for predicted, observed, n in calibration(model)
    ]
    columns = (Column("reward model"), Column("predicted", 3), Column("observed", 3), Column("pairs x seeds", 0))
    note = "Predicted: mean sigma(|difference of rewards|) of a bin. Observed: share whose chosen reply scores higher."
    return Table("reward_model_calibration", "Calibration", columns, tuple(rows), (note,), arena, group=0)


def filter_table(models: Sequence[JudgedPairs], arena: str) -> Table | None:
    """Return what a filter left of the training pairs, or None if no model has one."""
    filtered = [(model.name, model.filtered) for model in models if model.filtered is not None]
    if not filtered:
        return None
    keys = ("pairs", "chosen_perplexity", "rejected_perplexity", "chosen_words", "rejected_words", "chosen_likelier")
    sides = [("before the filter", filtered[0][1]["before"]), *((name, about["after"]) for name, about in filtered)]
    rows = tuple((Cell.of(name), *(Cell.of(float(side[key])) for key in keys)) for name, side in sides)
    columns = (
        Column("training pairs"),
        *(Column(key.replace("_", " "), digits) for key, digits in zip(keys, (0, 2, 2, 1, 1, 3), strict=True)),
    )
    note = (
        "Perplexity: median over replies of their perplexity a token under the initial policy. Words: mean of a reply. "
        "Chosen likelier: share of pairs whose chosen reply has the lower perplexity. "
        f"{'Of the first world' if models[0].worlds_S else 'With the first seed'}."
    )
    return Table("reward_model_filter", "Training pairs before and after", columns, rows, (note,), arena)


def pairs_figure(models: Sequence[JudgedPairs]) -> Made:
    """Draw accuracy by difference of length, and observed against predicted shares."""
    one_world = models[0].worlds_S is None
    figure, axes = new_panels(1, 2 if one_world else 1, height=2.6, width=WIDTH if one_world else 4.0)
    by_length, reliability = axes[0][0], axes[0][-1]
    bins = length_bins(models[0].words_P) if one_world else []
    for i, model in enumerate(models):
        colour = HUES[i % len(HUES)]
        for x, (low, _, of_P) in enumerate(bins):
            found = _accuracy(model, f"words {low}", of_P)
            if isinstance(found, Estimate):
                at = x + 0.12 * (i - (len(models) - 1) / 2)
                by_length.plot([at, at], [found.low, found.high], color=colour, linewidth=1.2)
                by_length.plot([at], [found.value], marker="o", color=colour)
        points = calibration(model)
        reliability.plot([p for p, *_ in points], [o for _, o, _ in points], marker="o", color=colour)
    if one_world:
        by_length.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
        by_length.set_xticks(range(len(bins)), [f"{low} to {high}" for low, high, _ in bins])
        by_length.set_xlabel("words of the chosen reply less those of the rejected one")
        by_length.set_ylabel("accuracy")
    reliability.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=0.8, linestyle=":")
    reliability.set_xlabel("predicted: sigma(|difference of rewards|)")
    reliability.set_ylabel("observed share right")
    legend_above(figure, [legend_key(m.name, HUES[i % len(HUES)]) for i, m in enumerate(models)])
    caption = "Calibration: on the diagonal a difference of rewards means the probability that Bradley-Terry gives it."
    if one_world:
        caption = f"Left: accuracy with its 95% interval, in bins of about as many pairs. Right: {caption}"
    return Drawn("reward_models", "Reward models on held-out pairs", caption), figure


def tables(models: Sequence[JudgedPairs], arena: str) -> list[Table]:
    """Return all tables that the models have numbers for."""
    found = (models_table, filter_table, lengths_table, calibration_table)
    return [table for make in found if (table := make(models, arena)) is not None]


def _mean_count(counts: Sequence[int | None]) -> float | None:
    known = [count for count in counts if count is not None]
    return sum(known) / len(known) if known else None


def _parts(view: View) -> Sequence[Part]:
    judged: dict[str, list[Any]] = {}
    for reward in view.records.reward_models:
        judged.setdefault(reward.name, []).append(reward)
    models = [
        judged_pairs(
            name,
            {reward.seed: reward.pairs for reward in of_name},
            view.clusters([group.prompt.id for group in of_name[0].pairs]),
            pool={reward.seed: reward.pool for reward in of_name},
            pool_clusters=view.clusters([row.prompt.id for row in of_name[0].pool]),
            trained_on=_mean_count([reward.trained_on for reward in of_name]),
            filtered=of_name[0].filtered,
            worlds_S=[view.records.worlds[reward.seed] for reward in of_name] if view.records.worlds else None,
        )
        for name, of_name in judged.items()
    ]
    if not models:
        return []
    about = Sentence("These reward models are only compared: no method trained on their scores.")
    made = tables(models, view.records.arena)
    return [about, *made, pairs_figure(models)]


SECTION = Section("Reward models", _parts)
