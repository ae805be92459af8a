"""The published tables: what they say, and what follows from them (arXiv 2304.05302)."""

import numpy as np
import pytest
from scipy import stats

from rrhf_bench.errors import DataError
from rrhf_bench.evaluation.statistics import rank_correlation
from rrhf_bench.replication import paper


def offline_rows():
    """Table 6 without the online policies, which have no fixed training responses, and IP-1, which repeats DP."""
    return [row for row in paper.load(paper.TABLE_6) if row.cell("train_max") and row.text("setting") != "IP-1"]


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
    best_of_4 = next(row for row in paper.load(paper.TABLE_2) if row.text("setting") == "Best-of-4")
    assert best_of_4.cells["ppl_gpt2_medium"] is None
    assert best_of_4.number("reward_gptj_rm_static") == -0.97
    alpaca = next(row for row in paper.load(paper.TABLE_2) if row.text("rho") == "Alpaca")
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
        paper.load(paper.TABLE_2)[0].cells["rho"] = "mine"  # type: ignore[index]


@pytest.mark.parametrize("name", ["rrhf_table4", "../records", "rrhf_table2_hh_main.csv"])
def test_an_unknown_table_is_named_with_those_there_are(name):
    with pytest.raises(DataError, match="rrhf_table6_sampling"):
        paper.load(name)


def test_table_2_by_version():
    def reward(version):
        return {row.name: row.number("reward_gptj_rm_static") for row in paper.load(paper.TABLE_2, version)}

    v2, v3 = reward("v2"), reward("v3")
    assert len(v2) == 11
    assert len(v3) == 13
    assert v2["Alpaca RRHF_DP"] == -1.02
    assert v3["Alpaca RRHF_DP"] == -1.03
    assert set(v3) - set(v2) == {"Alpaca Best-of-4", "Alpaca RRHF_SP"}
    assert v3["Alpaca RRHF_SP"] == -0.96
    # The three runs behind v3's DP: (-1.01 - 1.02 - 1.05) / 3 = -1.0267; printed to two decimals, hence half of one.
    notes = [row.text("note") for row in paper.load(paper.TABLE_2, "v3")]
    runs = [float(word) for note in notes if "three runs" in note for word in note.split()[-3:]]
    assert np.mean(runs) == pytest.approx(v3["Alpaca RRHF_DP"], abs=0.005)


def test_tables_that_share_a_cell_agree():
    table2 = {row.name: row for row in paper.load(paper.TABLE_2, "v2")}
    table6 = {row.name: row for row in paper.load(paper.TABLE_6)}
    for rho in ("LLaMA", "Alpaca", "Alpaca-sft"):
        one, other = table2[f"{rho} RRHF_DP"], table6[f"{rho} DP"]
        assert one.number("ppl_gpt2_medium") == other.number("ppl")
        assert one.number("reward_gptj_rm_static") == other.number("test_reward")
    first, again = dict(table6["Alpaca DP"].cells), dict(table6["Alpaca IP-1"].cells)
    assert {**first, "setting": "IP-1"} == again
    with_rank = paper.load(paper.TABLE_7)[0]
    assert with_rank.number("reward") == table6["Alpaca BP"].number("test_reward") == -1.03


def test_the_online_rows_of_table_6_have_no_training_responses():
    columns = ("test_reward", "train_mean", "train_std", "train_max")
    online = [row for row in paper.load(paper.TABLE_6) if row.text("setting").startswith("OP")]
    assert [tuple(map(row.cell, columns)) for row in online] == [(0.34, None, None, None), (-0.86, None, None, None)]


def test_best_of_n_learner():
    """The test reward follows the training maximum more closely than the training mean."""
    rows = offline_rows()
    assert len(rows) == 12
    test, best, mean = ([row.number(c) for row in rows] for c in ("test_reward", "train_max", "train_mean"))
    assert stats.pearsonr(test, best)[0] == pytest.approx(0.95, abs=0.005)
    assert stats.pearsonr(test, mean)[0] == pytest.approx(0.74, abs=0.005)
    rng = np.random.default_rng(0)
    assert rank_correlation(test, best, rng=rng).value == pytest.approx(0.95, abs=0.005)
    assert rank_correlation(test, mean, rng=rng).value == pytest.approx(0.87, abs=0.005)
    # max - test: DP .07 .07 .08, BP .01 .03 -.01, P .03 three times, D .06, IP-2 .19, IP-3 .29: 0.88 / 12 = 0.073
    assert np.subtract(best, test).mean() == pytest.approx(0.88 / 12)


def test_the_std_of_table_6_is_not_a_within_prompt_one():
    """Two replies: the prompt's population std is half their gap, that is max - mean, and so would its mean be."""
    for row in (row for row in paper.load(paper.TABLE_6) if row.text("setting") == "P"):
        assert row.number("train_max") - row.number("train_mean") == pytest.approx(0.22)
        assert row.number("train_std") == 0.79


def test_human_study_cannot_separate_rrhf_from_ppo():
    v3 = {row.text("B"): row for row in paper.load("rrhf_table3_human") if row.text("version") == "v3"}
    assert all(row.number("win") + row.number("tie") + row.number("lose") == 100 for row in v3.values())

    def p(opponent):  # v3 scored 100 pairs a comparison, so the percentages are counts
        wins, losses = (int(v3[opponent].number(side)) for side in ("win", "lose"))
        return stats.binomtest(wins, wins + losses).pvalue  # the sign test: ties are left out

    assert p("PPO") == pytest.approx(0.89, abs=0.005)
    assert p("RRHF_IP-2") == pytest.approx(2 / 2**10)  # 0 of 10


def test_table_5_and_figure_3():
    accuracy = {row.text("scorer"): row.number("accuracy_percent") for row in paper.load(paper.TABLE_5)}
    assert accuracy == {
        "Dahoas/gptj-rm-static": 68.49,
        "LLaMA": 45.09,
        "Alpaca": 45.13,
        "Alpaca-PPO": 46.03,
        "Alpaca-RRHF_DP": 61.75,
    }
    columns = ("training_step", "perplexity_digitised", "mean_reward_digitised", "loss_relative_0_1")
    curve = np.array([[row.number(column) for column in columns] for row in paper.load(paper.FIGURE_3)])
    assert curve[:, 0].tolist() == list(range(100, 3600, 200))
    assert curve[0, 1:].tolist() == [16.34, -1.33, 1.0]
    assert curve[-1, 3] == 0.0  # a zero that was read, not a gap
    assert curve[-1, 2] == pytest.approx(-1.02)  # where Table 2 ends too
    # "loss and reward are anti-correlated"
    assert stats.pearsonr(curve[:, 3], curve[:, 2])[0] < -0.8
