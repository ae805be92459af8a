"""Claims get the verdict of a planted effect, of its contrary, of small samples, and of rules worked by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy import stats

from rrhf_bench.errors import ConfigError
from rrhf_bench.evaluation import claims as rules
from rrhf_bench.evaluation.claims import ClaimResult, Finding, Scores, evaluate_claims
from rrhf_bench.evaluation.grid import Grid, Missing, Paired, pair
from rrhf_bench.evaluation.statistics import POOLED_FREEDOM, Estimate
from rrhf_bench.pipeline.results import RunRecords
from rrhf_bench.records import Decoding
from rrhf_bench.report.claims import RunEvidence, claim_results, power_words
from rrhf_bench.report.view import View
from rrhf_bench.seeding import generator
from rrhf_bench.settings.claims import (
    CLAIMS,
    ClaimSettings,
    CompoundSettings,
    CorrelationSettings,
    DifferenceSettings,
    EquivalenceSettings,
    Measure,
)
from rrhf_bench.settings.reading import load_experiment
from tests.test_report import HOSTILE, rows_of, synthetic, without_figures

Array = NDArray[np.float64]
SEEDS = (0, 1, 2)
NONE = Missing("not measured")


@dataclass
class Run:
    """Evidence as plain tables. A value that no table holds was not measured."""

    replies: dict[tuple[str, str, str], Grid] = field(default_factory=dict)
    trained_on: dict[str, Scores] = field(default_factory=dict)
    best: dict[str, Grid] = field(default_factory=dict)
    pairs: dict[str, Grid] = field(default_factory=dict)
    dev: dict[tuple[str, str], float] = field(default_factory=dict)
    decodings: tuple[Decoding, ...] = ("greedy",)
    pooled_rows: tuple[str, ...] = ()  # no pooling, unless a test names rows
    topics: dict[str, str] = field(default_factory=dict)

    def clusters(self, prompts: Sequence[str]) -> list[str]:
        return [self.topics.get(prompt, prompt) for prompt in prompts]

    def values(self, row: str, decoding: Decoding, measure: Measure) -> Grid | Missing:
        return self.replies.get((row, decoding, measure), NONE)

    def candidates(self, row: str) -> Scores | Missing:
        return self.trained_on.get(row, NONE)

    def best_candidates(self, row: str) -> Grid | Missing:
        return self.best.get(row, NONE)

    def accuracy(self, row: str) -> Grid | Missing:
        return self.pairs.get(row, NONE)

    def dev_reward(self, row: str, decoding: Decoding) -> float | Missing:
        return self.dev.get((row, decoding), NONE)


def grid(values: Any, *, seeds: tuple[int, ...] | None = None, one_model: bool = False) -> Grid:
    values_SP = np.atleast_2d(np.asarray(values, dtype=np.float64))
    prompts = tuple(f"p{p:03}" for p in range(values_SP.shape[1]))
    return Grid(seeds or tuple(range(len(values_SP))), prompts, values_SP, one_model)


def noisy(name: str, mean: float, prompts: int = 80, spread: float = 0.3, seeds: int = 3) -> Grid:
    """Return the sum of the mean, a share of each prompt that all rows have, and noise."""
    share = generator("share").normal(0, 1, 500)[:prompts]
    return grid(mean + share + generator("noise", name).normal(0, spread, (seeds, prompts)))


def scores(rows_SPk: Any) -> Scores:
    rows = tuple(tuple(tuple(map(float, k)) for k in rows_P) for rows_P in rows_SPk)
    return Scores(tuple(range(len(rows))), tuple(f"t{p}" for p in range(len(rows[0]))), rows)


def coins(name: str, share: float, pairs: int = 200) -> Grid:
    return grid(generator("coins", name).random((3, pairs)) < share)


def result(claim: ClaimSettings, run: Run, **options: Any) -> ClaimResult:
    (found,) = evaluate_claims({"it": claim}, run, **options)
    return found


# -- each kind, with an effect planted for it (sign 1) or against it (sign -1) ---------------------------------------


def reaches(sign: int, prompts: int, spread: float) -> tuple[ClaimSettings, Run]:
    run = Run()
    for row, mean in (("rrhf", 1.0), ("ppo", 1.0 - 0.5 * sign)):
        run.replies[row, "greedy", "reward"] = noisy(row, mean, prompts, spread)
    return DifferenceSettings(margin=0.05, higher="rrhf", lower="ppo", test="non-inferiority"), run


def ordered(sign: int, prompts: int, spread: float) -> tuple[ClaimSettings, Run]:
    run = Run()
    for row, mean in (("d", 1.0), ("p", 1.0 - 0.5 * sign)):
        run.replies[row, "greedy", "reward"] = noisy(row, mean, prompts, spread)
    return DifferenceSettings(margin=0.1, higher="d", lower="p"), run


def learner(sign: int, prompts: int, spread: float) -> tuple[ClaimSettings, Run]:
    run = Run(best={"rrhf": noisy("best", 1.0, prompts, spread)})
    run.replies["rrhf", "greedy", "reward"] = noisy("rrhf", 1.0 if sign > 0 else 0.4, prompts, spread)
    return EquivalenceSettings(margin=0.2, row="rrhf"), run


def overoptimises(sign: int, prompts: int, spread: float) -> tuple[ClaimSettings, Run]:
    run = Run()
    for row, proxy, gold, nll in (("op", 1.0, -0.5 * sign, 2.0), ("dp", 0.5, 0.0, 2.0 + 0.5 * (sign < 0))):
        run.replies[row, "greedy", "reward"] = noisy(row, proxy, prompts, spread)
        run.replies[row, "greedy", "gold"] = noisy(f"gold {row}", gold, prompts, spread)
        run.replies[row, "greedy", "nll"] = noisy(f"nll {row}", nll, prompts, spread)
    return CompoundSettings(proxy="rises", quality="falls", margin=0.05, row="op", reference="dp"), run


def repairs(sign: int, prompts: int, spread: float) -> tuple[ClaimSettings, Run]:
    run = Run()
    for row, gold, nll in (("op_kl", 0.5 * sign, 2.0 - 0.5 * sign), ("op", 0.0, 2.0)):
        run.replies[row, "greedy", "gold"] = noisy(f"gold {row}", gold, prompts, spread)
        run.replies[row, "greedy", "nll"] = noisy(f"nll {row}", nll, prompts, spread)
    return CompoundSettings(quality="rises", margin=0.0, row="op_kl", reference="op"), run


def spread_shrinks(sign: int, prompts: int, spread: float) -> tuple[ClaimSettings, Run]:
    effect = 0.4 if spread < 1 else 0.1
    stds = {"ip2": 1 - effect * (sign > 0), "ip1": 1 - effect * (sign < 0)}
    run = Run(trained_on={row: scores(generator(row).normal(0, std, (3, prompts, 4))) for row, std in stds.items()})
    return DifferenceSettings(margin=0.05, measure="spread", higher="ip1", lower="ip2"), run


def better_reward_model(sign: int, prompts: int, spread: float) -> tuple[ClaimSettings, Run]:
    run = Run(pairs={"rrhf": coins("rrhf", 0.5 + 0.2 * sign, prompts), "base": coins("base", 0.5, prompts)})
    return DifferenceSettings(margin=0.0, measure="accuracy", higher="rrhf", lower="base"), run


BELOW_CHANCE = DifferenceSettings(margin=0.0, measure="accuracy", higher=0.5, lower="base")


def below_chance(sign: int, prompts: int, spread: float) -> tuple[ClaimSettings, Run]:
    return BELOW_CHANCE, Run(pairs={"base": coins("b", 0.5 - 0.2 * sign, prompts)})


PLANTED: list[Callable[[int, int, float], tuple[ClaimSettings, Run]]] = [
    reaches, ordered, learner, overoptimises, repairs, spread_shrinks, better_reward_model, below_chance,
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_effect_is_supported_and_its_contrary_refuted(plant: Callable[..., Any]) -> None:
    assert result(*plant(1, 200, 0.3)).verdict == "supported"
    assert result(*plant(-1, 200, 0.3)).verdict == "refuted"


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_small_sample_decides_nothing_and_has_a_detectable_difference(plant: Callable[..., Any]) -> None:
    for sign in (1, -1):
        found = result(*plant(sign, 5, 2.0))
        assert found.verdict == "inconclusive"
        assert found.detectable is not None
        assert found.detectable > 0
        assert f"detectable {found.detectable:.3f}" in found.outcome


def test_two_copies_of_one_method_are_rarely_told_apart() -> None:
    """Nominal 2.5% a side. 400 runs with seeds that differ: at most 20 (5%), which 2.5% exceeds once in a thousand."""
    claim = DifferenceSettings(margin=0.0, higher="a", lower="b")
    verdicts = []
    for i in range(400):
        rng = generator("copies", i)
        share, run = rng.normal(0, 1, 60), Run()
        for row in ("a", "b"):
            of_seed = rng.normal(0, 0.1, (3, 1))
            run.replies[row, "greedy", "reward"] = grid(share + of_seed + rng.normal(0, 0.8, (3, 60)))
        verdicts.append(result(claim, run).verdict)
    assert verdicts.count("supported") <= 20
    assert verdicts.count("refuted") <= 20


# -- rules worked by hand --------------------------------------------------------------------------------------------


def exact(mean: float, seeds: tuple[float, float, float] = (-0.1, 0.0, 0.1)) -> Grid:
    """Return three seeds whose prompts are all alike, so t = mean / (0.1 / sqrt 3) on 2 degrees of freedom."""
    return grid(np.repeat(mean + np.array(seeds)[:, None], 4, axis=1))


def of_t(mean: float, freedom: float = 2.0) -> float:
    return float(2 * stats.t.sf(abs(mean) / (0.1 / np.sqrt(3)), freedom))


def test_holm_adjusts_over_all_claims_and_decodings_that_have_a_p() -> None:
    run = Run(decodings=("greedy", "sample"))
    run.replies["zero", "greedy", "reward"] = run.replies["zero", "sample", "reward"] = exact(0.0, (0, 0, 0))
    for row, mean in (("a", 2.0), ("b", 1.0), ("c", 0.5)):
        run.replies[row, "greedy", "reward"] = exact(mean)
    run.replies["c", "sample", "reward"] = exact(0.0)
    claims = {row: DifferenceSettings(margin=0.0, higher=row, lower="zero") for row in ("c", "a", "b")}
    found = {(r.name, r.decoding): r for r in evaluate_claims(claims, run)}
    p = {key: r.p for key, r in found.items()}
    assert p["a", "greedy"] == pytest.approx(of_t(2.0))
    assert p["b", "greedy"] == pytest.approx(of_t(1.0))
    assert p["c", "greedy"] == pytest.approx(of_t(0.5))
    assert p["c", "sample"] == pytest.approx(1)
    assert p["b", "sample"] is None  # four tests in all
    adjusted = {key: r.p_holm for key, r in found.items()}
    assert adjusted["a", "greedy"] == pytest.approx(4 * of_t(2.0))
    assert adjusted["b", "greedy"] == pytest.approx(3 * of_t(1.0))
    assert adjusted["c", "greedy"] == pytest.approx(2 * of_t(0.5))
    assert adjusted["c", "sample"] == pytest.approx(1)


def test_an_interval_alone_supports_nothing_if_holms_p_is_high() -> None:
    """t = 5.2 on 2 degrees of freedom: p is 0.035, so the interval excludes 0; with a second claim p is twice that."""
    run = Run()
    run.replies["a", "greedy", "reward"], run.replies["b", "greedy", "reward"] = exact(0.3), exact(0.0, (0, 0, 0))
    claim = DifferenceSettings(margin=0.0, higher="a", lower="b")
    assert result(claim, run).verdict == "supported"
    found = evaluate_claims({"it": claim, "again": claim}, run)[0]
    assert found.estimate is not None
    assert found.estimate.low > 0
    assert found.p == pytest.approx(of_t(0.3))
    assert found.p_holm == pytest.approx(2 * of_t(0.3))
    assert found.verdict == "inconclusive"
    assert "p is 0.070 after Holm's adjustment" in found.reason


def test_a_margin_shifts_the_threshold_and_not_the_estimate() -> None:
    run = Run()
    run.replies["a", "greedy", "reward"], run.replies["b", "greedy", "reward"] = exact(1.0), exact(0.0, (0, 0, 0))
    found = {m: result(DifferenceSettings(margin=m, higher="a", lower="b"), run) for m in (0.25, 1.0, 1.75)}
    assert {m: r.verdict for m, r in found.items()} == {0.25: "supported", 1.0: "inconclusive", 1.75: "refuted"}
    assert len({r.estimate for r in found.values()}) == 1
    assert found[0.25].p == pytest.approx(of_t(0.75)) == found[1.75].p
    assert found[1.0].p == pytest.approx(1.0)


def test_the_variance_between_seeds_is_pooled_over_the_trained_rows() -> None:
    """Rows of equal spread give the pooled variance its largest degrees of freedom, and p falls. The pooled variance is
    then no larger than the pair's own variance, which is used."""
    run = Run(pooled_rows=("a", "c", "d"))
    for row, mean in (("a", 0.3), ("c", 7.0), ("d", -7.0)):
        run.replies[row, "greedy", "reward"] = exact(mean)
    run.replies["b", "greedy", "reward"] = exact(0.0, (0, 0, 0))
    claim = DifferenceSettings(margin=0.0, higher="a", lower="b")
    found = result(claim, run)
    assert found.estimate is not None
    assert found.estimate.freedom == pytest.approx(2 + POOLED_FREEDOM[1])
    assert found.p is not None
    assert found.p < of_t(0.3)
    run.replies["c", "greedy", "reward"] = run.replies["d", "greedy", "reward"] = exact(0.0, (-50, 0, 50))
    assert (result(claim, run).p or 0) > of_t(0.3)  # rows that spread more make the pair less sure


def test_prompts_of_one_cluster_count_together() -> None:
    claim, run = ordered(1, 200, 0.3)
    alone = result(claim, run)
    run.topics = {f"p{p:03}": f"topic {p // 20}" for p in range(200)}
    assert alone.estimate is not None
    assert alone.estimate.clusters == 200
    together = result(claim, run).estimate
    assert together is not None
    assert (together.clusters, together.n) == (10, 200)


def test_one_training_seed_is_not_tested() -> None:
    run = Run()
    run.replies["a", "greedy", "reward"] = grid(5.0 + np.arange(20.0))
    run.replies["base", "greedy", "reward"] = grid(np.arange(20.0) % 3, one_model=True)
    found = result(DifferenceSettings(margin=0.0, higher="a", lower="base"), run)
    assert (found.verdict, found.p) == ("not tested", None)
    assert "one training seed" in found.reason
    # A fixed model has no training seeds at all.
    below = Run(pairs={"base": replace(coins("b", 0.2), seeds=(0,), values_SP=coins("b", 0.2).values_SP[:1])})
    below.pairs["base"] = replace(below.pairs["base"], one_model=True)
    assert result(BELOW_CHANCE, below).verdict == "supported"


def part(low: float, high: float, threshold: float, p_above: float, p_below: float) -> Finding:
    estimate = Estimate((low + high) / 2, low, high, 50, 3, None, "by hand")
    return Finding("theta", "reward", estimate, threshold, "", p_above, p_below)


@pytest.mark.parametrize(
    ("low", "high", "lies"),
    [
        (-0.25, 0.25, "lies within"),
        (-0.1, 0.1, "lies within"),
        (-0.2501, 0.1, "reaches over"),
        (0.1, 0.2501, "reaches over"),
        (-0.3, 0.3, "reaches over"),
        (0.25, 0.5, "reaches over"),
        (0.2501, 0.5, "lies outside"),
        (-0.5, -0.2501, "lies outside"),
    ],
)
def test_equivalence_includes_its_boundaries(low: float, high: float, lies: str) -> None:
    found = rules._equivalent(part(low, high, -0.25, 0.01, 0.99), part(low, high, 0.25, 0.96, 0.04), 0.25)
    assert lies in found.where
    assert (found.p_for, found.p_against) == (0.04, 0.96)  # the worse of two one-sided tests; the better contrary one
    assert found.p == 0.08


@pytest.mark.parametrize("mean", [0.0, 0.03, 0.06, 0.2, 0.5])
def test_equivalence_is_supported_if_and_only_if_the_interval_lies_within(mean: float) -> None:
    run = Run(best={"rrhf": exact(0.0, (0, 0, 0))})
    run.replies["rrhf", "greedy", "reward"] = exact(mean)
    found = result(EquivalenceSettings(margin=0.3, row="rrhf"), run)
    assert found.estimate is not None
    within = max(-found.estimate.low, found.estimate.high) <= 0.3
    assert (found.verdict == "supported") == within
    assert (found.verdict == "refuted") == (found.estimate.low > 0.3)


def test_non_inferiority_allows_the_margin_and_no_more() -> None:
    def verdict(margin: float) -> str:
        run = Run()
        run.replies["rrhf", "greedy", "reward"] = noisy("rrhf", 1.0, 300, 0.2)
        run.replies["ppo", "greedy", "reward"] = noisy("ppo", 1.1, 300, 0.2)
        return result(
            DifferenceSettings(margin=margin, higher="rrhf", lower="ppo", test="non-inferiority"), run
        ).verdict

    assert [verdict(margin) for margin in (0.0, 0.1, 0.2)] == ["refuted", "inconclusive", "supported"]


def test_a_compound_claim_needs_all_its_parts_and_gold_decides() -> None:
    must = part(0.1, 0.3, 0.0, 0.004, 0.996)
    gold, nll = part(0.05, 0.4, 0.0, 0.02, 0.98), part(0.2, 0.4, 0.0, 0.001, 0.999)
    found = rules._decided([must], gold, nll)
    assert (found.p_for, found.against) == (0.02, "")  # the largest of must and gold; nll does not enter
    assert found.estimate == gold.estimate  # the weaker of what the claim needs
    assert found.p_against == 1.0  # two ways to fail: 2 x 0.98, and no p exceeds 1
    assert rules._decided([must], None, nll).p_for == 0.004  # without gold the likelihood decides
    assert rules._decided([], gold, nll).p_for == 0.02

    down = part(-0.4, -0.2, 0.0, 0.999, 0.001)
    found = rules._decided([must], down, nll)
    assert (found.p_against, found.p_for) == (0.002, 0.999)  # 2 x 0.001
    assert found.estimate == down.estimate
    assert rules._decided([down], gold, nll).p_against == 0.002
    # The likelihood goes significantly the other way: two-sided 0.002.
    assert "other way" in rules._decided([must], gold, down).against
    assert rules._decided([must], gold, part(-0.4, 0.1, 0.0, 0.97, 0.03)).against == ""


def test_over_optimisation_is_not_supported_against_the_gold_reward() -> None:
    """The gold reward of op is higher by 0.2 and only the NLL rose: the claim must not be supported."""
    claim, run = overoptimises(1, 200, 0.3)
    run.replies["op", "greedy", "gold"] = noisy("gold op", 0.2, 200, 0.3)
    run.replies["op", "greedy", "nll"] = noisy("nll op", 3.0, 200, 0.3)
    found = result(claim, run)
    assert found.verdict == "refuted"
    assert found.estimate is not None
    reference, row = (run.replies[name, "greedy", "gold"].values_SP for name in ("dp", "op"))
    assert found.estimate.value == pytest.approx(reference.mean() - row.mean(), rel=1e-9)
    assert len(found.parts) == 3


def test_a_repair_is_not_supported_against_the_gold_reward() -> None:
    """The gold reward of op_kl is lower although its text is likelier: the claim must not be supported."""
    claim, run = repairs(1, 200, 0.3)
    run.replies["op_kl", "greedy", "gold"] = noisy("gold op_kl", -0.15, 200, 0.3)
    assert result(claim, run).verdict == "refuted"


def test_a_significant_part_the_other_way_makes_a_claim_inconclusive() -> None:
    claim, run = repairs(1, 200, 0.3)  # gold is higher ...
    run.replies["op_kl", "greedy", "nll"] = noisy("nll op_kl", 2.6, 200, 0.3)  # ... and the text less likely
    found = result(claim, run)
    assert found.verdict == "inconclusive"
    assert "the likelihood of the text goes the other way" in found.reason


def test_over_optimisation_without_a_gold_reward_rests_on_the_text() -> None:
    claim, run = overoptimises(-1, 200, 0.3)
    run.replies = {key: values for key, values in run.replies.items() if key[2] != "gold"}
    assert result(claim, run).verdict == "inconclusive"
    run.replies["op", "greedy", "nll"] = noisy("nll op", 3.0, 200, 0.3)
    found = result(claim, run)
    assert found.verdict == "supported"
    assert [words.split(" of ")[0] for words in found.parts] == ["proxy reward", "NLL per token"]
    run.replies = {key: values for key, values in run.replies.items() if key[2] == "reward"}
    assert result(claim, run).reason == "dp: not measured; op: not measured"


# -- pairing, picking, draws -----------------------------------------------------------------------------------------


def test_one_model_pairs_with_every_seed_on_the_common_prompts() -> None:
    a = grid([[1.0, 2, 3, np.nan], [2, 3, 4, 0], [3, 4, 5, 0]])
    base = replace(grid([9.0, 0, 1, 1, 1]), prompts=("q", "p000", "p002", "p003", "p001"), one_model=True)
    found = pair(a, base)
    assert isinstance(found, Paired)
    a_SP, b_SP, prompts = found.a_SP, found.b_SP, found.prompts
    assert prompts == ("p000", "p001", "p002", "p003")
    assert a_SP[:, :3].tolist() == [[1, 2, 3], [2, 3, 4], [3, 4, 5]]
    assert b_SP.tolist() == [[0, 1, 1, 1]] * 3
    run = Run(replies={("a", "greedy", "reward"): a, ("base", "greedy", "reward"): base})
    estimate = result(DifferenceSettings(margin=0.0, higher="a", lower="base"), run).estimate
    assert estimate is not None
    assert (estimate.n, estimate.value) == (3, pytest.approx(3 - 2 / 3))  # a seed has no number for the fourth prompt
    found = pair(a, replace(grid([[1.0] * 4, [2] * 4]), seeds=(2, 7)))
    assert isinstance(found, Paired)
    a_SP, b_SP = found.a_SP, found.b_SP
    assert a_SP.tolist() == [[3, 4, 5, 0]]
    assert b_SP.tolist() == [[1] * 4]
    for seeds, prompts in (((7,), a.prompts), ((0,), ("q", "r", "s", "t"))):
        run = Run()
        run.replies["a", "greedy", "reward"] = a
        run.replies["b", "greedy", "reward"] = replace(grid([1.0] * 4), seeds=seeds, prompts=prompts)
        assert result(DifferenceSettings(margin=0.0, higher="a", lower="b"), run).verdict == "not tested"


def test_the_best_of_several_rows_is_picked_on_dev_prompts_alone() -> None:
    claim = DifferenceSettings(margin=0.05, higher="rrhf", lower=("weak", "strong", "third"), test="non-inferiority")
    run = Run(dev={(row, "greedy"): dev for row, dev in (("weak", 0.9), ("strong", 0.7), ("third", 0.9))})
    means = {"rrhf": 1.0, "weak": 0.2, "strong": 3.0, "third": 3.0}
    for row, mean in means.items():
        run.replies[row, "greedy", "reward"] = noisy(row, mean)
    found = result(claim, run)
    assert found.picked == ("weak (of weak, strong, third)",)
    assert found.verdict == "supported"  # though two other rows are far better on the evaluation prompts
    swapped = Run(dict(run.replies), dev=run.dev)
    for a, b in (("weak", "strong"), ("strong", "weak")):
        swapped.replies[a, "greedy", "reward"] = run.replies[b, "greedy", "reward"]
    other = result(claim, swapped)
    assert (other.picked, other.verdict) == (found.picked, "refuted")
    del run.dev["third", "greedy"]
    assert result(claim, run).reason == "third: not measured"


def test_a_claim_depends_on_the_others_only_through_holm() -> None:
    claim, run = ordered(1, 80, 0.5)
    alone = result(claim, run)
    other, more = below_chance(1, 80, 0.5)
    run.pairs = more.pairs
    np.random.seed(3)
    both = evaluate_claims({"chance": other, "it": claim}, run)[1]
    assert replace(both, p_holm=alone.p_holm) == alone
    assert both.p_holm == pytest.approx(2 * (alone.p or 0), rel=1e-12)


def test_greedy_comes_before_sampled_and_each_has_its_own_verdict() -> None:
    claim, run = ordered(1, 100, 0.3)
    run.decodings = ("greedy", "sample")
    run.replies |= {(row, "sample", m): values for (row, _, m), values in ordered(-1, 100, 0.3)[1].replies.items()}
    found = evaluate_claims({"it": claim}, run)
    assert [(r.decoding, r.verdict) for r in found] == [("greedy", "supported"), ("sample", "refuted")]


# -- correlations over rows and the spread of candidates -------------------------------------------------------------


def runs(rewards_KS: Array, candidates_KS: Array) -> tuple[ClaimSettings, Run]:
    run, rows = Run(), tuple(f"r{k}" for k in range(len(rewards_KS)))
    for row, rewards_S, candidates_S in zip(rows, rewards_KS, candidates_KS, strict=True):
        run.replies[row, "greedy", "reward"] = grid(np.repeat(rewards_S[:, None], 2, axis=1))
        run.trained_on[row] = scores([[[c - 1, c], [c - 3, c]] for c in candidates_S])  # mean c - 1, best c
    return CorrelationSettings(measure="best_candidate", margin=0.5, over=rows), run


def rising(rows: int, sign: float = 1.0) -> tuple[Array, Array]:
    k = np.arange(rows, dtype=np.float64)[:, None] + np.array([0.0, 0.1, 0.2])
    return sign * k, k


def test_reward_follows_the_best_candidate_over_enough_rows() -> None:
    assert result(*runs(*rising(8))).verdict == "supported"
    assert result(*runs(*rising(8, -1.0))).verdict == "refuted"
    noise = generator("no relation").permutation(8)
    assert result(*runs(rising(8)[0][noise], rising(8)[1])).verdict in ("inconclusive", "refuted")
    few = result(*runs(*rising(4)))
    assert (few.verdict, few.p) == ("inconclusive", None)
    assert "4 rows are too few" in few.reason
    assert few.estimate is not None
    assert few.estimate.value == pytest.approx(1.0, abs=1e-12)


def test_the_correlation_is_that_of_scipy_over_rows_with_fishers_interval() -> None:
    rng = generator("runs")
    rewards, candidates = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
    claim, run = runs(rewards, candidates)
    x, y = candidates.mean(axis=1), rewards.mean(axis=1)
    for kind in (claim, CorrelationSettings(measure="mean_candidate", margin=0.5, over=claim.rows())):
        found = result(kind, run)
        assert found.estimate is not None
        rho = stats.spearmanr(x, y).statistic
        assert found.estimate.value == pytest.approx(rho, abs=1e-12)
        error = np.sqrt(1.06 / 3)
        reach = 1.959964 * error
        expected = (np.tanh(np.arctanh(rho) - reach), np.tanh(np.arctanh(rho) + reach))
        assert (found.estimate.low, found.estimate.high) == pytest.approx(expected, abs=1e-6)
        z = (np.arctanh(rho) - np.arctanh(0.5)) / error
        assert found.p == pytest.approx(2 * stats.norm.sf(abs(z)))
        assert f"slope {np.polyfit(x, y, 1)[0]:+.3f}" in found.beside[0]
        assert (found.estimate.n, found.counted) == (6, "rows")


@pytest.mark.parametrize("rows", [5, 12])
def test_rows_without_a_relation_are_called_correlated_at_the_nominal_rate(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Independent candidates and rewards, margin 0: 300 runs, nominal 2.5% (7.5) a side; 18 are 4 standard errors more.
    The bootstrap of the slope, which no verdict reads, is left out for speed."""
    monkeypatch.setattr(rules, "slope", lambda x, y, rng: Estimate(0.0, 0.0, 0.0, len(x), 1, None, "left out"))
    verdicts = []
    for i in range(300):
        draw = generator("unrelated", rows, i)
        claim, run = runs(draw.normal(size=(rows, 3)), draw.normal(size=(rows, 3)))
        claim = CorrelationSettings(measure="best_candidate", margin=0.0, over=claim.rows())
        verdicts.append(result(claim, run).verdict)
    assert 1 <= verdicts.count("supported") <= 18
    assert 1 <= verdicts.count("refuted") <= 18


def test_copies_of_a_row_do_not_differ_in_the_spread_of_their_candidates() -> None:
    """400 runs, each row with a spread of its own per seed: nominal 2.5% a side; at most 20."""
    claim = DifferenceSettings(margin=0.0, measure="spread", higher="b", lower="a")
    verdicts = []
    for i in range(400):
        draw = generator("spreads", i)
        stds = np.exp(draw.normal(0, 0.1, size=(2, 3, 1, 1)))
        values = stds * draw.normal(size=(2, 3, 40, 4))
        verdicts.append(result(claim, Run(trained_on={"a": scores(values[0]), "b": scores(values[1])})).verdict)
    assert verdicts.count("supported") <= 20
    assert verdicts.count("refuted") <= 20


def test_the_linearised_spread_has_the_error_of_a_jackknife_over_prompts() -> None:
    draw = generator("jackknife")
    values = draw.gamma(2.0, size=(3, 60, 4))
    linear = rules._linear_std(scores(values)).values_SP
    assert linear.mean() == pytest.approx(values.std(), abs=1e-12)
    without = [np.delete(values, p, axis=1).std() for p in range(60)]
    jackknife = np.sqrt(59 / 60 * ((without - np.mean(without)) ** 2).sum())
    # The two differ in the second order, by about 1 / 60.
    assert linear.mean(axis=0).std(ddof=1) / np.sqrt(60) == pytest.approx(jackknife, rel=0.02)


def test_the_spread_is_pooled_over_all_responses() -> None:
    rng = generator("ragged")
    ragged = {row: [[rng.normal(size=rng.integers(1, 6)) for _ in range(30)] for _ in SEEDS] for row in ("a", "b")}
    run = Run(trained_on={row: scores(values) for row, values in ragged.items()})
    found = result(DifferenceSettings(margin=0.0, measure="spread", higher="b", lower="a"), run)
    pooled = {row: np.std(np.concatenate([k for rows in values for k in rows])) for row, values in ragged.items()}
    assert found.estimate is not None
    assert found.estimate.value == pytest.approx(pooled["b"] - pooled["a"], abs=1e-12)
    assert (found.estimate.n, found.estimate.seeds) == (30, 3)


# -- what is missing -------------------------------------------------------------------------------------------------


EVERY: Mapping[str, ClaimSettings] = {
    "rrhf_reaches_ppo": DifferenceSettings(margin=0.05, higher="rrhf", lower=("ppo", "sft"), test="non-inferiority"),
    "best_of_n_learner": EquivalenceSettings(margin=0.3, row="rrhf"),
    "best_of_n_over_rows": CorrelationSettings(measure="best_candidate", margin=0.5, over=("rrhf", "sft", "ppo")),
    "reward_rises_with_sampling_quality": CorrelationSettings(margin=0.5, over=("rrhf", "sft", "ppo")),
    "ordered": DifferenceSettings(margin=0.0, higher="rrhf", lower="base"),
    "overoptimises": CompoundSettings(proxy="rises", quality="falls", margin=0.05, row="ppo", reference="rrhf"),
    "kl_repairs": CompoundSettings(quality="rises", margin=0.0, row="rrhf", reference="ppo"),
    "spread_shrinks": DifferenceSettings(margin=0.0, measure="spread", higher="ppo", lower="rrhf"),
    "better_reward_model": DifferenceSettings(margin=0.0, measure="accuracy", higher="rrhf", lower="base"),
    "base_below_chance": BELOW_CHANCE,
}


@pytest.mark.parametrize("name", EVERY)
def test_a_claim_without_its_numbers_is_not_tested_and_says_why(name: str) -> None:
    claim = EVERY[name]
    found = result(claim, Run())
    assert found.verdict == "not tested"
    assert "not measured" in found.reason
    assert any(row in found.reason for row in claim.rows())
    assert found.estimate is found.p is found.p_holm is found.detectable is None
    assert found.outcome == f"Not tested: {found.reason}."
    assert found.sentence == claim.sentence


# -- settings --------------------------------------------------------------------------------------------------------


def test_a_claim_names_its_rows() -> None:
    assert EVERY["rrhf_reaches_ppo"].rows() == ("rrhf", "ppo", "sft")
    assert EVERY["better_reward_model"].rows() == ("rrhf", "base")
    assert EVERY["base_below_chance"].rows() == ("base",)
    assert EVERY["best_of_n_learner"].rows() == ("rrhf",)


AB: dict[str, Any] = {"higher": "a", "lower": "b"}


@pytest.mark.parametrize(
    ("kind", "table", "fault"),
    [
        ("difference", {"margin": 0.0, "higher": "a", "lower": "a"}, "lower: found 'a' on both sides"),
        ("difference", {"margin": 0.0, "higher": ["a"], "lower": ["b", "a"]}, "lower: found 'a' on both sides"),
        ("difference", {"margin": 0.0, "higher": 0.5, "lower": 0.4}, "lower: found a number on both sides"),
        ("difference", {"margin": 0.0, "higher": 0.5, "lower": "a", "measure": "spread"}, "measure"),
        ("difference", {"margin": 0.0, "higher": ["a", "c"], "lower": "b", "measure": "accuracy"}, "measure"),
        ("compound", {"margin": 0.0, "row": "a", "reference": "a", "quality": "falls"}, "reference: found 'a' on both"),
        ("compound", {"margin": 0.0, "row": "a", "reference": "b"}, "quality"),
        ("equivalence", {"margin": 0.0, "row": "a", "reference": "a"}, "reference: found 'a' on both sides"),
        ("difference", AB, "margin"),
        ("difference", {"margin": -0.1, **AB}, "greater than or equal to 0"),
        ("correlation", {"margin": 1.0, "over": ["a", "b", "c"]}, "less than 1"),
        ("correlation", {"margin": 0.5, "over": ["a", "b"]}, "at least 3"),
        ("difference", {"margin": 0.0, "higher": [], "lower": ["b"]}, "expected a row, a list of rows or a number"),
        ("difference", {"margin": 0.0, "higher": True, "lower": ["b"]}, "expected a row, a list of rows or a number"),
    ],
)
def test_a_faulty_claim_names_its_key(kind: str, table: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        CLAIMS[kind].model_validate(table)


def test_an_experiment_file_holds_claims(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    text = """
[methods.rrhf]
[methods.ppo]
[claims.difference]
margin = 0.05
higher = "rrhf"
lower = ["ppo", "best_of_n"]
[methods.best_of_n]
[claims.mine]
kind = "difference"
margin = 0
higher = "rrhf"
lower = "base"
says = "Training helps."
"""
    path.write_text(text)
    claims = load_experiment(path).claims
    assert claims["difference"] == DifferenceSettings(margin=0.05, higher="rrhf", lower=("ppo", "best_of_n"))
    (tmp_path / "resolved.toml").write_text(load_experiment(path).to_toml())
    assert load_experiment(tmp_path / "resolved.toml").claims == claims
    assert claims["mine"].sentence == "Training helps."
    path.write_text(text.replace('"base"', '"bass"'))
    with pytest.raises(ConfigError, match=r"claims\.mine: found 'bass'.*did you mean 'base'"):
        load_experiment(path)


# -- in the report ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> RunRecords:
    made = synthetic(tmp_path_factory.mktemp("run"))
    return replace(made, experiment=made.experiment.model_copy(update={"claims": dict(EVERY)}))


@pytest.fixture(scope="module")
def report(records: RunRecords) -> Path:
    return without_figures(records, records.folder / "report")


def test_the_section_stands_after_the_result_with_one_item_a_claim(report: Path) -> None:
    page = (report / "report.md").read_text(encoding="utf-8")
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings[:3] == ["## Result", "## Claims", "## Differences"]
    section = page[page.index(headings[1]) : page.index(headings[2])]
    items = [line for line in section.splitlines() if line.startswith("- **")]
    assert [item.split("**")[1] for item in items] == [f"{name}." for name in EVERY]
    assert "*Greedy.* Refuted: proxy reward of rrhf minus ppo is" in items[0]
    assert items[0].index("*Greedy.*") < items[0].index("*Sampled.*")
    assert "Picked on dev prompts: ppo (of ppo, sft)" in items[0]
    assert "gold reward of rrhf minus ppo +" in items[0]
    assert "**Power.**" in section
    assert "proxy reward, greedy: " in section


def test_the_table_of_claims_holds_verdicts_and_estimates(records: RunRecords, report: Path) -> None:
    rows = {(row["claim"], row["decoding"]): row for row in rows_of(report / "tables/claims.csv")}
    assert len(rows) == sum(2 if claim.decoded else 1 for claim in EVERY.values())
    for decoding in ("greedy", "sampled"):
        assert rows["rrhf_reaches_ppo", decoding]["verdict"] == "refuted"  # ppo was planted 0.3 above
        assert rows["overoptimises", decoding]["verdict"] == "supported"  # and gold 1.0 below
        assert rows["kl_repairs", decoding]["verdict"] == "supported"
        assert rows["ordered", decoding]["verdict"] == "supported"
        assert rows["best_of_n_over_rows", decoding]["verdict"] == "not tested"
    assert rows["ordered", "greedy"]["seeds"] == "3"  # though base has one greedy run
    assert "sft: the run holds no training candidates" in rows["best_of_n_over_rows", "greedy"]["missing"]
    replies = {
        (row, seed, prompt): reward
        for row, seed, prompt, reward, decoding in (
            (r.method, r.seed, r.prompt, r.reward, r.decoding) for r in records.evaluated
        )
        if decoding == "sample"
    }
    gaps = [reward - replies["ppo", seed, p] for (row, seed, p), reward in replies.items() if row == "rrhf"]
    assert float(rows["rrhf_reaches_ppo", "sampled"]["estimate"]) == pytest.approx(np.mean(gaps), abs=1e-12)


def test_the_evidence_of_a_run_is_read_at_the_end_and_by_decoding(records: RunRecords) -> None:
    evidence = RunEvidence(View(records))
    points = [p for p in records.curves if (p.method, p.decoding, p.fraction) == ("ppo", "greedy", 1.0)]
    assert evidence.dev_reward("ppo", "greedy") == pytest.approx(np.mean([p.rewards for p in points]), abs=1e-12)
    late = replace(points[0], fraction=0.5, rewards=(1e6,))  # an earlier point, however high, is not the end
    assert RunEvidence(View(replace(records, curves=(*records.curves, late)))).dev_reward("ppo", "greedy") < 1e3
    sampled = RunEvidence(View(replace(records, curves=tuple(p for p in records.curves if p.decoding == "sample"))))
    assert isinstance(sampled.dev_reward("ppo", "greedy"), Missing)
    assert isinstance(sampled.dev_reward("ppo", "sample"), float)
    base = evidence.values("base", "greedy", "reward")
    assert isinstance(base, Grid)
    assert base.one_model
    assert base.seeds == (0,)
    assert isinstance(evidence.values("base", "greedy", "kl"), Missing)


def test_a_reply_without_tokens_has_no_nll_and_its_prompt_is_left_out(records: RunRecords) -> None:
    first = next(r for r in records.evaluated if (r.method, r.decoding) == ("rrhf", "greedy"))
    evaluated = tuple(replace(r, nll=0.0, nll_tokens=0) if r is first else r for r in records.evaluated)
    found = RunEvidence(View(replace(records, evaluated=evaluated))).values("rrhf", "greedy", "nll")
    assert isinstance(found, Grid)
    assert np.isnan(found.values_SP).sum() == 1
    claims = {"it": DifferenceSettings(margin=0.0, measure="nll", higher="rrhf", lower="ppo")}
    experiment = records.experiment.model_copy(update={"claims": claims})
    tested, _ = claim_results(View(replace(records, evaluated=evaluated, experiment=experiment)))
    assert tested.estimate is not None
    assert tested.estimate.n == 59


def test_the_order_of_records_changes_nothing(records: RunRecords) -> None:
    order = generator("order").permutation(len(records.evaluated))
    shuffled = replace(
        records,
        evaluated=tuple(records.evaluated[i] for i in order),
        pairs=records.pairs[::-1],
        candidates={row: groups[::-1] for row, groups in reversed(records.candidates.items())},
        curves=records.curves[::-1],
    )
    assert claim_results(View(shuffled)) == claim_results(View(records))


def test_without_claims_there_is_no_section_and_hostile_names_are_inert(records: RunRecords, tmp_path: Path) -> None:
    none = replace(records, experiment=records.experiment.model_copy(update={"claims": {}}))
    folder = without_figures(none, tmp_path / "none")
    assert "## Claims" not in (folder / "report.md").read_text(encoding="utf-8")
    assert not (folder / "tables/claims.csv").exists()
    claims = {HOSTILE: DifferenceSettings(margin=0.0, higher="rrhf", lower=HOSTILE)}
    hostile = replace(records, experiment=records.experiment.model_copy(update={"claims": claims}))
    page = (without_figures(hostile, tmp_path / "hostile") / "report.md").read_text(encoding="utf-8")
    assert "\n# heading" not in page
    assert "\x1b" not in page
    section = page[page.index("## Claims") : page.index("## Differences")]
    assert "lt;script" in section  # it is there, and shown
    assert "<script" not in section


def test_the_words_on_power_say_how_much_more_the_adjustment_asks_for() -> None:
    """Five tests with 4 degrees of freedom give (t(0.995) + t(0.8)) / (t(0.975) + t(0.8)) = (4.604 + 0.941) / 3.717."""
    estimate = Estimate(0.3, 0.1, 0.5, 60, 3, 0.01, "t", error=0.1, freedom=4.0)
    about: dict[str, Any] = {"sentence": "", "decoding": "greedy", "verdict": "inconclusive", "reason": ""}
    one = ClaimResult(unit="proxy reward", estimate=estimate, p_for=0.1, p_against=0.9, name="a", **about)
    assert "over 5 tests asks the first claim that is decided for up to 1.5 times" in power_words([one] * 5)
    assert "adjustment" not in power_words([one])


def test_an_empty_run_tests_no_claim(records: RunRecords) -> None:
    empty = replace(records, evaluated=(), pairs=(), candidates={}, test_candidates={}, curves=())
    found = claim_results(View(empty))
    assert {r.verdict for r in found} == {"not tested"}
    assert power_words(found).startswith("Nothing could be tested")
