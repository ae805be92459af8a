"""The benchmarks' own arithmetic: the released loss on hand-made numbers, equal sides, medians, memory, pages."""

from __future__ import annotations

import json
import math
import os
import sys

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import scaling, step
from benchmarks.measure import (
    KEEPING_ENVIRONMENT,
    MEMORY_ENVIRONMENT,
    Spread,
    in_own_process,
    order,
    peak_above,
    ratios,
    spread,
)
from benchmarks.released import released_loss
from benchmarks.sides import (
    FLOAT32,
    RELEASED,
    Errors,
    Results,
    Stepper,
    Steps,
    check_equal,
    errors,
    labelled_logprobs,
    reference,
    sides_for,
)
from benchmarks.workloads import IGNORE, Group, padded_rows
from rrhf_bench.errors import ConfigError, StageError, StoreError
from rrhf_bench.training.rrhf import rrhf_loss

CPU = torch.device("cpu")
LN2 = math.log(2)

# Every scored position predicts tokens 0, 1, 2, 3 with probability 1/2, 1/4, 1/8, 1/8: log-probs -1, -2, -3, -3 ln 2.
# Sums of rows a, b, c: -1-2 = -3, -1, -3-3-2 = -8 (in ln 2); over L = 4 positions: -0.75, -0.25, -2.
LABELS = torch.tensor([[IGNORE, 0, 1, IGNORE], [IGNORE, 0, IGNORE, IGNORE], [IGNORE, 2, 2, 1]])


def hand_made_logits() -> torch.Tensor:
    logits = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.125])).expand(3, 4, 4).clone()
    logits[LABELS == IGNORE] = torch.tensor([3.0, -7.0, 0.0, 11.0])  # what is not scored must not matter
    return logits


@pytest.mark.parametrize(
    ("rewards", "loss"),
    [
        # c best, then a, then b: b is above a by 0.5, a above c by 1.25, b above c by 1.75; the best's score is -2.
        ([2.0, 1.0, 3.0], 0.5 + 1.25 + 1.75 + 2.0),
        # b best, then a, then c: as they are scored, so that only minus the best's score is left.
        ([2.0, 3.0, 1.0], 0.25),
        # a and b tied and above c, which is scored below both; no pair between a and b, and the first of them is best.
        ([1.0, 1.0, 0.0], 0.75),
    ],
)
def test_released_loss_by_hand(rewards, loss):
    found, scores = released_loss(hand_made_logits(), LABELS, torch.tensor(rewards))
    # float32: some units in its last place, 1.2e-7; the next wrong answer is a quarter of log 2 away.
    assert torch.allclose(scores, torch.tensor([-0.75, -0.25, -2.0]) * LN2, rtol=1e-6)
    assert found.item() == pytest.approx(loss * LN2, rel=1e-6)
    assert (LABELS == IGNORE).sum() == 6  # the argument is as it was


def test_released_loss_is_the_official_variant():
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = torch.randn(5, 9, 7, generator=random, dtype=torch.float64) * 3
        labels = torch.randint(7, (5, 9), generator=random)
        labels = labels.masked_fill(torch.rand(5, 9, generator=random) < 0.5, IGNORE)
        labels[:, 4] = 1  # one scored position at least
        rewards = torch.randint(4, (5,), generator=random).double()  # ties among them
        logp = labelled_logprobs(logits, labels, lambda hidden: hidden)
        expected = rrhf_loss(
            logp[None], (labels != IGNORE)[None], rewards[None], variant="official", padded_length_B=torch.tensor([9])
        )
        loss, scores = released_loss(logits, labels, rewards)
        # float64, the same sums in another order.
        torch.testing.assert_close(loss, expected.total, rtol=1e-12, atol=0)
        torch.testing.assert_close(scores, expected.score_BG[0], rtol=1e-12, atol=0)


def test_padded_rows_by_hand():
    """A label is what its position predicts: the prompt's last position predicts the first token of the response."""
    group = Group((5, 6), ((7, 8, 9), (7,)), (1.0, 2.0))
    ids, attention, labels = padded_rows(group, CPU)
    assert ids.tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 0, 0]]
    assert attention.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert labels.tolist() == [[IGNORE, 7, 8, 9, IGNORE], [IGNORE, 7, IGNORE, IGNORE, IGNORE]]


@pytest.mark.parametrize("name", ["15M-cut", "60M-bf16"])
def test_sides_agree(name):
    workload = step.WORKLOADS[name].quick()
    steps = Steps(workload, 0, CPU, torch.get_num_threads())
    found = {side: Stepper(side, steps).results() for side in sides_for(workload.dtype, CPU)}
    expected, bound = reference(steps, found)
    check_equal(found, expected, bound, name)


def test_another_loss_is_not_equal():
    """The check sees what the sides could get wrong: a score, one weight's gradient, a number that is none."""
    expected = Results(2.0, torch.tensor([1.0, -2.0]), {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([0.01])})
    assert errors(expected, expected) == Errors(0.0, 0.0, 0.0, 0.0)
    for wrong in (
        expected._replace(loss=2.0001),
        expected._replace(loss=math.nan),
        expected._replace(score_N=torch.tensor([1.0, -2.0001])),
        # A thousandth of a small weight's gradient is nothing beside the gradient of all: 1e-5 of 5.
        expected._replace(gradients={**expected.gradients, "b": torch.tensor([0.01001])}),
    ):
        with pytest.raises(StageError, match=r"'wrong'.*nothing was timed"):
            check_equal({"wrong": wrong}, expected, FLOAT32, "row")
    with pytest.raises(StageError, match="only one of two sides has some for b"):
        errors(expected._replace(gradients={"a": torch.tensor([3.0, 4.0])}), expected)


def test_order_is_fair():
    sides = ["a", "b", "c"]
    rounds = [order(sides, n) for n in range(6)]
    assert all(sorted(found) == sides for found in rounds)
    assert {found[0] for found in rounds} == set(sides)
    for first, second in (("a", "b"), ("b", "c"), ("a", "c")):
        before = sum(found.index(first) < found.index(second) for found in rounds)
        assert 1 <= before <= 5


def test_ratios_are_of_rounds():
    """A slow round slows both sides: the ratio is 2 in every round, while that of the medians would be 2.0 by luck."""
    assert ratios([2.0, 20.0, 4.0], [1.0, 10.0, 2.0]) == Spread(2.0, 2.0, 2.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 10.0]) == Spread(3.0, 2.0, 4.0)
    with pytest.raises(ValueError, match="no rounds"):
        spread([])


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read where Linux puts it")
def test_peak_is_what_was_alive_at_once():
    """48 MB, then 96, then 48 alive: 96 at the peak, whatever was used before. Here other tests' memory would count."""
    found = in_own_process(_peak_of_two_tensors)
    assert found is not None
    # The system counts resident pages in batches of up to 0.25 MB a thread; a third tensor would add 48 MB.
    assert abs(found / 1e6 - 96) < 0.5


def _peak_of_two_tensors() -> int | None:
    def run() -> None:
        first = torch.ones(12_000_000)
        second = first + 1
        del first
        second.sum()

    run()  # so that the library's own pages, 1 to 7 MB by processor, are there before
    return peak_above(run, CPU)


def test_own_process_has_its_environment_and_its_faults():
    before = os.environ.get("MALLOC_ARENA_MAX")
    assert in_own_process(os.getenv, "MALLOC_ARENA_MAX") == MEMORY_ENVIRONMENT["MALLOC_ARENA_MAX"]
    name, value = next(iter(KEEPING_ENVIRONMENT.items()))
    assert in_own_process(os.getenv, name, environment=KEEPING_ENVIRONMENT) == value
    assert os.environ.get("MALLOC_ARENA_MAX") == before
    with pytest.raises(StageError, match="its process died"):
        in_own_process(os.abort)


# --- from end to end ------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    """The number of threads, put back: --threads sets it for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_step_from_end_to_end(tmp_path, threads):
    """Measured, written, and drawn again from the file alone: the same page."""
    out, first, second = tmp_path / "step.json", tmp_path / "first", tmp_path / "second"
    arguments = ["--quick", "--rounds", "2", "--threads", "1", "--rows", "15M-cut", "--no-memory"]
    run = CliRunner().invoke(step.app, [*arguments, "--out", str(out), "--report", str(first)])
    assert run.exit_code == 0, run.output
    record = json.loads(out.read_text())
    (row,) = record["rows"]
    assert row["queries"] == [4, 8]
    both = [row["seconds"], *([row["seconds_keeping"]] if sys.platform == "linux" else [])]
    for seconds in both:
        assert list(seconds) == sides_for(torch.float32, CPU)
        assert all(len(of) == 2 for of in seconds.values())
    assert all(max(error.values()) < 1e-5 for error in row["errors"].values())
    assert row["summary"][RELEASED]["times_released"] == [1.0, 1.0, 1.0]
    assert row["packed_tokens"] == sum(
        q + sum(r) - len(r) for q, r in zip(row["queries"], row["responses"], strict=True)
    )
    again = CliRunner().invoke(step.app, ["--from", str(out), "--report", str(second)])
    assert again.exit_code == 0, again.output
    for name in ("step.md", "step.json", "figures/step.svg"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    with pytest.raises(StoreError, match=r"step\.json: holds 'step'"):
        CliRunner().invoke(scaling.app, ["--from", str(out)], catch_exceptions=False)


@pytest.mark.parametrize("held", [{"rows": [{"workload": "15M"}]}, {"workloads": []}])
def test_a_record_of_another_version_is_refused(tmp_path, held):
    (tmp_path / "step.json").write_text(json.dumps({"benchmark": "step", **held}))
    with pytest.raises(StoreError, match=r"step\.json: holds rows of another version"):
        CliRunner().invoke(step.app, ["--from", str(tmp_path / "step.json")], catch_exceptions=False)


@pytest.mark.slow
def test_scaling_from_end_to_end(tmp_path, threads, monkeypatch):
    scan = scaling.SCANS["vocabulary"]
    monkeypatch.setitem(scaling.SCANS, "vocabulary", scan._replace(workloads={8000: scan.workloads[8000]}))
    arguments = ["--quick", "--rounds", "1", "--threads", "1", "--rows", "vocabulary"]
    run = CliRunner().invoke(scaling.app, [*arguments, "--report", str(tmp_path)])
    assert run.exit_code == 0, run.output
    (row,) = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert (row["scan"], row["x"]) == ("vocabulary", 8000)
    assert (tmp_path / "figures" / "scaling.png").is_file()


@pytest.mark.parametrize("app", [step.app, scaling.app])
def test_unknown_rows_are_named(app):
    with pytest.raises(ConfigError, match=r"--rows: found '15M-cat'; allowed are "):
        CliRunner().invoke(app, ["--rows", "15M-cat"], catch_exceptions=False)
