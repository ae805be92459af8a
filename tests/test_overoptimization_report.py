"""The section on over-optimisation: planted forms are found again from records."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rrhf_bench.evaluation.statistics import best_of_n_kl
from rrhf_bench.pipeline.results import RunRecords
from rrhf_bench.records import CurvePoint
from rrhf_bench.report.drawing import styled
from rrhf_bench.report.overoptimization import OWN_PROXY, SECTION
from rrhf_bench.report.table import Table
from rrhf_bench.report.view import View
from tests.test_report import SEEDS, synthetic

ALPHA, BETA = 1.2, 0.7  # peak at d = exp(1.2 / 0.7 - 1) = 2.04, KL 4.17


def curve(row: str, seed: int) -> list[CurvePoint]:
    """Return a curve whose gold follows d (alpha - beta log d), alpha 0.1 apart between seeds."""
    points = []
    for k in range(9):
        kl = 1.1 * k
        d = math.sqrt(kl)
        gold = d * (ALPHA + 0.1 * (seed - 1) - BETA * math.log(d)) if k else 0.0
        golds, rewards = (gold - 0.5,) * 20, (0.3 + 0.2 * k,) * 20
        points.append(CurvePoint(row, seed, "sample", k / 8, 10 * k, 0, rewards, golds, kls=(kl,) * 20))
        points.append(CurvePoint(row, seed, "greedy", k / 8, 10 * k, 0, rewards, golds))
    return points


@pytest.fixture
def records(tmp_path: Path) -> RunRecords:
    made = synthetic(tmp_path)
    evaluation = made.experiment.evaluation.model_copy(update={"curve_kl": True})
    curves = tuple(point for seed in SEEDS for point in curve("ppo", seed))
    return replace(made, experiment=made.experiment.model_copy(update={"evaluation": evaluation}), curves=curves)


def test_the_planted_form_of_a_trained_row_is_found(records: RunRecords) -> None:
    with styled():
        _, table, (drawn, figure) = SECTION.parts(View(records))
    assert isinstance(table, Table)
    lines = {row[0].value: row for row in table.rows}
    assert set(lines) == {f"best of n by {OWN_PROXY}", "ppo"}
    _, _, alpha, beta, peak, measured, farthest, error, points, seeds = lines["ppo"]
    assert (alpha.value, beta.value) == pytest.approx((ALPHA, BETA))
    assert (beta.low, beta.high) == pytest.approx((BETA, BETA))
    # Student's t with 2 degrees of freedom: 4.303 x 0.1 / sqrt(3).
    assert alpha.high - alpha.value == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-3)
    assert peak.value == pytest.approx(math.exp(ALPHA / BETA - 1) ** 2)
    assert (measured.value, points.value, seeds.value) == ("yes", 24, 3)
    assert farthest.value == pytest.approx(8.8)
    assert error.value == pytest.approx(0.0, abs=1e-9)
    assert drawn.name == "overoptimization"
    assert len(figure.axes) == 4


def test_best_of_n_has_its_points_up_to_half_of_the_pool(records: RunRecords) -> None:
    _, table, _ = SECTION.parts(View(records))
    assert isinstance(table, Table)
    own = next(row for row in table.rows if row[0].value == f"best of n by {OWN_PROXY}")
    assert own[8].value == 3 * 4  # 2, 4, 8, 16 of 32 samples, three seeds
    assert own[6].value == pytest.approx(best_of_n_kl(16))
    assert np.isfinite(own[2].value)


def test_a_run_without_measured_distances_has_no_such_section(tmp_path: Path) -> None:
    assert SECTION.parts(View(synthetic(tmp_path))) == []
