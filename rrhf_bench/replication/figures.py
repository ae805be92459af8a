"""The figures of the RRHF paper beside this run: Figure 3, and the points of Table 6."""

from __future__ import annotations

from rrhf_bench.replication.counterparts import RRHF, counterpart
from rrhf_bench.replication.paper import FIGURE_3, TABLE_6, load
from rrhf_bench.report.drawing import Drawn, Made, colours, legend_above, legend_key, new_panels
from rrhf_bench.report.figures import (
    decoding_keys,
    finish_loss_panels,
    loss_panels,
    loss_words,
    quality_panel,
    quality_words,
)
from rrhf_bench.report.view import View

_SHADES = {"LLaMA": "#b5b5b5", "Alpaca": "#000000", "Alpaca-sft": "#6b6b6b"}  # of the published points


def loss_and_reward(view: View) -> Made | None:
    """Return Figure 3: loss and reward of the row that samples as DP, or of the first RRHF row, beside the paper's."""
    dp = counterpart(view, "Alpaca", "RRHF_DP")
    row = dp if isinstance(dp, str) else next(row for row in view.methods if view.kind(row) == RRHF)
    if not any(name == row and log for (name, _), log in view.records.training.items()):
        return None
    figure, axes = new_panels(2, 2, height=3.3, width=4.6)
    (above, their_loss), (below, their_reward) = axes
    loss_panels(above, below, view, row, colours(view)[row])
    published = load(FIGURE_3)
    steps = [point.number("training_step") for point in published]
    their_loss.plot(
        steps, [point.number("loss_relative_0_1") for point in published], "o-", color="black", markersize=2.5
    )
    their_loss.set_title("paper, Figure 3 (DP)\nloss (relative height)")
    their_reward.plot(
        steps, [point.number("mean_reward_digitised") for point in published], "o-", color="black", markersize=2.5
    )
    finish_loss_panels([(above, below), (their_loss, their_reward)], across=2)
    legend_above(figure, decoding_keys(view))
    left = row if row == dp else f"{row}, which does not sample as DP"
    caption = (
        f"{loss_words(view)} Left: {left}. Right: Figure 3 of 2304.05302v2 (Alpaca, DP), read from the plot; its loss "
        "axis has no labels, and its rewards are on another scale."
    )
    return Drawn("figure3", "Loss and reward while training (Figure 3 of the RRHF paper)", caption), figure


def published_quality() -> Made:
    """Return the paper's own points of test reward against the quality of training candidates."""
    published = [
        row for row in load(TABLE_6) if row.cell("train_max") and row.text("setting") != "IP-1"
    ]  # IP-1 repeats DP
    figure, axes = new_panels(1, 1, height=3.5, width=3.6)
    points = [
        (row.number("train_mean"), row.number("train_max"), row.number("test_reward"), _SHADES[row.text("rho")])
        for row in published
    ]
    quality_panel(axes[0][0], "paper, Table 6", points, "paper")
    axes[0][0].set_ylabel("test reward")
    handles = [legend_key(rho, shade, marker="s") for rho, shade in _SHADES.items()]
    axes[0][0].legend(handles=handles, loc="lower right", handletextpad=0.2, labelspacing=0.2)
    caption = f"{quality_words('row')} The published points (2304.05302v2), on another reward scale than this run's."
    return Drawn("table6_points", "Test reward against sampling quality in the paper", caption), figure
