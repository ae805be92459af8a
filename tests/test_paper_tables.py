"""The published tables: what they say, and what follows from them (arXiv 2304.05302)."""

import numpy as np
import pytest
from scipy import stats

from rrhf_bench.errors import DataError
from rrhf_bench.evaluation.statistics import rank_correlation
from rrhf_bench.replication import paper


def offline_rows():
    """Table 6 without the online policies, which have no fixed training responses, and IP-1, which repeats DP."""
    return [row for row in paper.table6() if row.train_max is not None and row.setting != "IP-1"]


def test_every_table_reads_and_every_row_has_its_source():
    # tables 1, 2, 3, 5 to 10, the settings, and the curve of Figure 3
    assert len(paper.names()) == 11
    for name in paper.names():
        rows = paper.load(name)
        assert rows
        for row in rows:
            assert any(name in row.source for name in ("2304.05302", "official repository", "train.sh", "derived")), row
            assert None not in row.cells, "a line with more cells than the header"


def test_numbers_words_and_empty_cells_are_told_apart():
    best_of_4 = next(row for row in paper.load("rrhf_table2_hh_main") if row.text("setting") == "Best-of-4")
    assert best_of_4.cells["ppl_gpt2_medium"] is None
    assert best_of_4.number("ppl_gpt2_medium") is None
    assert best_of_4.number("reward_gptj_rm_static") == -0.97
    alpaca = next(row for row in paper.load("rrhf_table2_hh_main") if row.text("rho") == "Alpaca")
    assert alpaca.text("setting") == "none"  # "trained with nothing" is a word of the table, not a missing cell
    assert alpaca.text("note") == ""
    with pytest.raises(DataError, match="expected a number"):
        alpaca.number("setting")
    with pytest.raises(DataError, match="expected text"):
        alpaca.text("reward_gptj_rm_static")
    with pytest.raises(DataError, match="no column 'rewards'"):
        alpaca.number("rewards")


def test_rows_cannot_be_changed_by_a_reader():
    with pytest.raises(TypeError):
        paper.load("rrhf_table2_hh_main")[0].cells["rho"] = "mine"  # type: ignore[index]


@pytest.mark.parametrize("name", ["rrhf_table4", "../records", "rrhf_table2_hh_main.csv"])
def test_an_unknown_table_is_named_with_those_there_are(name):
    with pytest.raises(DataError, match="rrhf_table6_sampling"):
        paper.load(name)


def test_table_2_by_version():
    def reward(version):
        return {(row.rho, row.setting): row.reward for row in paper.table2(version)}

    v2, v3 = reward("v2"), reward("v3")
    assert len(v2) == 11
    assert len(v3) == 13
    assert v2["Alpaca", "RRHF_DP"] == -1.02
    assert v3["Alpaca", "RRHF_DP"] == -1.03
    assert set(v3) - set(v2) == {("Alpaca", "Best-of-4"), ("Alpaca", "RRHF_SP")}
    assert v3["Alpaca", "RRHF_SP"] == -0.96
    assert reward("v3") == {(row.rho, row.setting): row.reward for row in paper.table2()}
    assert [row.ppl for row in paper.table2() if row.setting == "Best-of-4"] == [None]
    # The three runs behind v3's DP: (-1.01 - 1.02 - 1.05) / 3 = -1.0267; printed to two decimals, hence half of one.
    runs = [float(word) for row in paper.table2() if "three runs" in row.note for word in row.note.split()[-3:]]
    assert np.mean(runs) == pytest.approx(v3["Alpaca", "RRHF_DP"], abs=0.005)
    with pytest.raises(DataError, match="'v4'"):
        paper.table2("v4")  # type: ignore[arg-type]


def test_tables_that_share_a_cell_agree():
    table2 = {(row.rho, row.setting): (row.ppl, row.reward) for row in paper.table2("v2")}
    table6 = {(row.rho, row.setting): row for row in paper.table6()}
    for rho in ("LLaMA", "Alpaca", "Alpaca-sft"):
        assert table2[rho, "RRHF_DP"] == (table6[rho, "DP"].ppl, table6[rho, "DP"].test_reward)
    first, again = table6["Alpaca", "DP"], table6["Alpaca", "IP-1"]
    assert (first.ppl, first.test_reward, first.train_max) == (again.ppl, again.test_reward, again.train_max)
    with_rank = paper.load("rrhf_table7_rank_ablation")[0]
    assert with_rank.number("reward") == table6["Alpaca", "BP"].test_reward == -1.03


def test_the_online_rows_of_table_6_have_no_training_responses():
    online = [row for row in paper.table6() if row.setting.startswith("OP")]
    assert [(row.test_reward, row.train_mean, row.train_std, row.train_max) for row in online] == [
        (0.34, None, None, None),
        (-0.86, None, None, None),
    ]


def test_best_of_n_learner():
    """The test reward follows the training maximum more closely than the training mean."""
    rows = offline_rows()
    assert len(rows) == 12
    test = [row.test_reward for row in rows]
    best = [row.train_max for row in rows]
    mean = [row.train_mean for row in rows]
    assert stats.pearsonr(test, best)[0] == pytest.approx(0.95, abs=0.005)
    assert stats.pearsonr(test, mean)[0] == pytest.approx(0.74, abs=0.005)
    rng = np.random.default_rng(0)
    assert rank_correlation(test, best, rng=rng).value == pytest.approx(0.95, abs=0.005)
    assert rank_correlation(test, mean, rng=rng).value == pytest.approx(0.87, abs=0.005)
    # max - test: DP .07 .07 .08, BP .01 .03 -.01, P .03 three times, D .06, IP-2 .19, IP-3 .29: 0.88 / 12 = 0.073
    assert np.subtract(best, test).mean() == pytest.approx(0.88 / 12)


def test_the_std_of_table_6_is_not_a_within_prompt_one():
    """Two replies: the prompt's population std is half their gap, that is max - mean, and so would its mean be."""
    for row in (row for row in paper.table6() if row.setting == "P"):
        assert row.train_max - row.train_mean == pytest.approx(0.22)
        assert row.train_std == 0.79


def test_human_study_cannot_separate_rrhf_from_ppo():
    v3 = {row.text("B"): row for row in paper.load("rrhf_table3_human") if row.text("version") == "v3"}
    assert all(row.number("win") + row.number("tie") + row.number("lose") == 100 for row in v3.values())

    def p(opponent):  # v3 scored 100 pairs a comparison, so the percentages are counts
        wins, losses = (int(v3[opponent].number(side)) for side in ("win", "lose"))
        return stats.binomtest(wins, wins + losses).pvalue  # the sign test: ties are left out

    assert p("PPO") == pytest.approx(0.89, abs=0.005)
    assert p("RRHF_IP-2") == pytest.approx(2 / 2**10)  # 0 of 10


def test_table_5_and_figure_3():
    accuracy = {row.scorer: row.accuracy_percent for row in paper.table5()}
    assert accuracy == {
        "Dahoas/gptj-rm-static": 68.49,
        "LLaMA": 45.09,
        "Alpaca": 45.13,
        "Alpaca-PPO": 46.03,
        "Alpaca-RRHF_DP": 61.75,
    }
    curve = paper.figure3_curve()
    assert [point.step for point in curve] == list(range(100, 3600, 200))
    assert (curve[0].ppl, curve[0].reward, curve[0].loss_relative) == (16.34, -1.33, 1.0)
    assert curve[-1].loss_relative == 0.0  # a zero that was read, not a gap
    assert curve[-1].reward == pytest.approx(-1.02)  # where Table 2 ends too
    # "loss and reward are anti-correlated"
    assert stats.pearsonr([p.loss_relative for p in curve], [p.reward for p in curve])[0] < -0.8
