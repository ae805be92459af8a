"""The benchmarks' own arithmetic: the released loss on hand-made numbers, equal sides, medians, memory, pages."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks import scaling, step
from benchmarks.labelled import labelled_logprobs
from benchmarks.measure import (
    MEMORY_ENVIRONMENT,
    Side,
    Spread,
    apart,
    in_own_process,
    measure_rounds,
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
    check_equal,
    errors,
    sides_for,
    timed_step,
)
from benchmarks.workloads import (
    IGNORE,
    SHAPES,
    Group,
    Shape,
    Workload,
    make_model,
    model_flops,
    padded_rows,
    useful_flops,
)
from rrhf_bench.errors import ConfigError, StageError, StoreError
from rrhf_bench.training.rrhf import rrhf_loss

CPU = torch.device("cpu")
LN2 = math.log(2)


# --- the released computation ---------------------------------------------------------------------------------

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


def test_released_loss_divides_by_the_padded_length():
    """A row of padding more: every score, and with them the loss, shrinks from 4ths to 5ths."""
    rewards = torch.tensor([2.0, 1.0, 3.0])
    logits = torch.cat([hand_made_logits(), torch.zeros(3, 1, 4)], 1)
    labels = torch.cat([LABELS, torch.full((3, 1), IGNORE)], 1)
    # float32, as above; undivided by the row of padding it would be a quarter more.
    assert released_loss(logits, labels, rewards)[0].item() == pytest.approx(5.5 * LN2 * 4 / 5, rel=1e-6)


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


# --- equal sides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["15M-cut", "15M-k32", "60M-bf16"])
def test_sides_agree(name):
    workload = step.WORKLOADS[name].quick()
    groups = workload.groups(0)
    steppers = {
        side: Stepper.make(side, workload.shape, seed=0, dtype=workload.dtype, device=CPU)
        for side in sides_for(workload.dtype, CPU)
    }
    found = {side: stepper.results(groups) for side, stepper in steppers.items()}
    expected, bound = step.reference(workload, found, groups, seed=0, device=CPU)
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


def test_workloads_are_what_they_say():
    for name, parameters in (("15M", 15e6), ("60M", 60e6)):
        assert SHAPES[name].parameters == pytest.approx(parameters, rel=0.05)
    shape = SHAPES["tiny"]
    model = make_model(shape, seed=0, dtype=torch.float32, device=CPU)
    assert sum(p.numel() for p in model.parameters()) == shape.parameters
    for workload in step.WORKLOADS.values():
        groups = workload.groups(0)
        assert groups == workload.groups(0)
        for group, query in zip(groups, workload.queries, strict=True):
            lengths = [len(response) for response in group.responses]
            assert (len(group.query), len(lengths), len(set(group.rewards))) == (query, workload.k, workload.k)
            assert min(lengths) >= 32
            assert max(lengths) <= (128 if workload.cut is None else workload.cut - query)


def test_useful_flops_by_counting():
    """Every fed token goes through the trunk and attends to what it sees; every response token is predicted once."""
    shape = Shape(hidden=4, layers=2, heads=1, ffn=8, tied=True, vocabulary=11)
    group = Group((2, 3, 4), ((5, 6, 7, 8), (9,)), (1.0, 2.0))
    trunk = 2 * (4 * 4 * 4 + 3 * 4 * 8)
    flops = 0
    for segment, before in ((3, 0), (3, 3), (0, 3)):  # the prompt; each response without its last token
        for position in range(segment):
            flops += 6 * trunk + 3 * 2 * shape.layers * 2 * shape.hidden * (before + position + 1)
    flops += 6 * 4 * 11 * 5
    assert model_flops(shape, 3, [4, 1]) == flops
    for position in range(2):  # of the prompt's tokens but the last, the last layer needs keys and values
        flops -= 6 * (2 * 4 * 4 + 3 * 4 * 8) + 3 * 2 * 2 * shape.hidden * (position + 1)
    assert useful_flops(shape, group) == pytest.approx(flops)
    first = sum(6 * trunk + 3 * 2 * shape.layers * 2 * shape.hidden * (3 + i + 1) for i in range(3)) + 6 * 4 * 11 * 4
    assert useful_flops(shape, group, {0}) == pytest.approx(flops - first * 2 / 3)


def test_a_response_is_silent_where_its_score_has_no_gradient():
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(50):
        rewards = rng.permutation(6).astype(float)
        group = Group((2,), tuple((3,) for _ in rewards), tuple(rewards))
        score = torch.tensor(rng.normal(size=6), requires_grad=True)
        (grad,) = torch.autograd.grad(rank_loss(score, rewards), score)
        found = group.silent(score.detach())
        assert found == {i for i in range(6) if grad[i] == 0}
        counts.append(len(found))
    assert 0 < sum(counts) < 300


@pytest.mark.parametrize("k", [2, 6, 7])
def test_where_rewards_contradict_every_score_hardly_anyone_is_silent(k):
    score = torch.randn(k, generator=torch.Generator().manual_seed(0))
    group = Group((2,), tuple((3,) for _ in range(k)), tuple(map(float, range(k)))).contradicting(score)
    assert sorted(group.rewards) == list(range(k))
    assert (np.argsort(group.rewards) == np.argsort(-score.numpy())).all()
    assert len(group.silent(score)) == k % 2  # of an odd number the one in the middle


def rank_loss(score, rewards):
    """RRHF's loss as a function of the scores, pair by pair; the cross-entropy of the best is its own score here."""
    loss = -score[int(rewards.argmax())]
    for i in range(len(rewards)):
        for j in range(len(rewards)):
            if rewards[i] < rewards[j]:
                loss = loss + torch.relu(score[i] - score[j])
    return loss


# --- measuring ------------------------------------------------------------------------------------------------


def test_order_is_fair():
    sides = ["a", "b", "c"]
    rounds = [order(sides, n) for n in range(6)]
    assert all(sorted(found) == sides for found in rounds)
    assert {found[0] for found in rounds} == set(sides)
    for first, second in (("a", "b"), ("b", "c"), ("a", "c")):
        before = sum(found.index(first) < found.index(second) for found in rounds)
        assert 1 <= before <= 5


def test_rounds_prepare_and_count():
    calls: list[str] = []
    sides = {
        name: Side(lambda name=name: calls.append(f"run {name}"), lambda name=name: calls.append(f"prepare {name}"))
        for name in "ab"
    }
    seconds = measure_rounds(sides, 3)
    assert {name: len(found) for name, found in seconds.items()} == {"a": 3, "b": 3}
    assert len(calls) == 2 * 2 * 4  # a round that does not count among them
    for before, after in zip(calls[::2], calls[1::2], strict=True):
        assert (before.split()[0], after) == ("prepare", f"run {before.split()[1]}")


def test_ratios_are_of_rounds():
    """A slow round slows both sides: the ratio is 2 in every round, while that of the medians would be 2.0 by luck."""
    assert ratios([2.0, 20.0, 4.0], [1.0, 10.0, 2.0]) == Spread(2.0, 2.0, 2.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 10.0]) == Spread(3.0, 2.0, 4.0)
    with pytest.raises(ValueError, match="no rounds"):
        spread([])


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read where Linux puts it")
def test_peak_is_what_was_alive_at_once():
    """48 MB, then 96, then 48 alive: 96 at the peak, whatever was used before."""
    words = 12_000_000
    torch.ones(2 * words)

    def run() -> None:
        first = torch.ones(words)
        second = first + 1
        del first
        second.sum()

    found = peak_above(run, CPU)
    assert found is not None
    assert found / 1e6 == pytest.approx(96, abs=4)  # a page, an arena, a library's first call


def test_own_process_has_its_environment_and_its_faults():
    before = os.environ.get("MALLOC_ARENA_MAX")
    assert in_own_process(os.getenv, "MALLOC_ARENA_MAX") == MEMORY_ENVIRONMENT["MALLOC_ARENA_MAX"]
    assert os.environ.get("MALLOC_ARENA_MAX") == before
    with pytest.raises(StageError, match="its process died"):
        in_own_process(os.abort)


def of_this_process():
    return Side(lambda: counted.append(os.getpid()), lambda: counted.append(0))


def that_dies():
    return Side(os.abort)


def that_maps():
    """A side that asks for 40 MB that it has not had before, and touches them."""
    kept = []
    return Side(lambda: kept.append(torch.ones(10_000_000)))


def told():
    """A side that fails at its third run, or unless it was prepared before each, in a process of its own."""

    def run():
        counted.append(1)
        assert counted == [0, 1, 0, 1][: len(counted)], counted

    return Side(run, lambda: counted.append(0))


counted: list[int] = []


def test_sides_apart_are_prepared_and_run_in_processes_of_their_own():
    with apart({"a": of_this_process, "b": told}) as sides:
        for name in ("a", "b"):
            sides[name].prepare()
        sides["a"].run()
        sides["b"].run()
        sides["a"].run()
        assert len(sides["a"].usage()) == 2
        with pytest.raises(AssertionError, match="0, 1, 0, 1, 1"):  # what a side raises is raised here
            sides["b"].run()
    assert not counted
    with apart({"maps": that_maps}) as sides:
        sides["maps"].run()
        (used,) = sides["maps"].usage()
    if sys.platform == "linux":
        assert used.pages >= 40_000_000 // os.sysconf("SC_PAGESIZE")
        assert used.kernel_seconds > 0
    with apart({"dies": that_dies}) as sides, pytest.raises(StageError, match="dies: its process died"):
        sides["dies"].run()


# --- from end to end ------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    """The number of threads, put back: --threads sets it for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_step_from_end_to_end(tmp_path, threads):
    """Measured, written, and drawn again from the file alone: the same page."""
    out, first, second = tmp_path / "step.json", tmp_path / "first", tmp_path / "second"
    arguments = ["--quick", "--rounds", "2", "--threads", "1", "--rows", "15M-cut", "--no-memory"]
    run = CliRunner().invoke(step.app, [*arguments, "--out", str(out), "--report", str(first)])
    assert run.exit_code == 0, run.output
    assert "packed, checkpointed" in run.output
    record = json.loads(out.read_text())
    (row,) = record["rows"]
    assert row["queries"] == [4, 8]
    assert all(len(seconds) == 2 for seconds in row["seconds"].values())
    assert all(max(error.values()) < 1e-5 for error in row["errors"].values())
    assert row["summary"][RELEASED]["times_released"] == [1.0, 1.0, 1.0]
    again = CliRunner().invoke(step.app, ["--from", str(out), "--report", str(second)])
    assert again.exit_code == 0, again.output
    for name in ("step.md", "step.json", "figures/step.svg"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize("gradients", ["kept", "none"])
def test_what_is_there_before_a_timed_step(gradients, threads, monkeypatch):
    found = []
    step_ = Stepper.step

    def spy(stepper, groups):
        found.append({p.grad is not None for p in stepper.model.parameters()})
        step_(stepper, groups)
        found.append(max(p.grad.abs().max().item() for p in stepper.model.parameters()))

    monkeypatch.setattr(Stepper, "step", spy)
    workload = step.WORKLOADS["15M-cut"].quick()
    arguments = workload.shape, workload.groups(0), 0, workload.dtype, torch.device("cpu"), 1
    side = timed_step(RELEASED, *arguments, gradients)
    for _ in range(2):
        side.prepare()
        side.run()
    first, largest, second, again = found
    assert first == {False}
    assert second == {gradients == "kept"}
    assert again == largest  # those that are there are zeros


def test_scaling_from_end_to_end(tmp_path, threads):
    arguments = ["--quick", "--rounds", "1", "--threads", "1", "--rows", "k", "--rows", "vocabulary"]
    run = CliRunner().invoke(scaling.app, [*arguments, "--report", str(tmp_path)])
    assert run.exit_code == 0, run.output
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert list(record["k"]["tokens"]) == ["2", "4"]
    assert list(record["vocabulary"]["seconds"][RELEASED]) == ["8000", "16000", "32000", "64000"]
    assert (tmp_path / "figures" / "scaling.png").is_file()
    with pytest.raises(StoreError, match=r"scaling\.json: holds 'scaling'; expected a record of 'step'"):
        CliRunner().invoke(step.app, ["--from", str(tmp_path / "scaling.json")], catch_exceptions=False)


def test_marginal_cost_by_hand():
    """3 s a step and 2 ms a response token, where a plain token costs 1.6 ms: one more response costs 1.25 its own."""
    tokens = {"2": 150, "4": 310, "8": 600}
    seconds = {k: [3 + 0.002 * n, 3 + 0.002 * n] for k, n in tokens.items()}
    record = {
        "tokens": tokens,
        "plain_tokens": 1000,
        "seconds": {"packed": seconds, "plain for packed": [1.6, 1.6]},
    }
    found = scaling.marginal(record, "packed")
    assert found["a"].median == pytest.approx(3.0)
    assert found["b"].median == pytest.approx(0.002)
    for key in ("b / c", "2 to 4", "4 to 8"):
        assert found[key].median == pytest.approx(1.25), key


def test_plain_rows_see_as_much_as_responses():
    """On average over tokens; in all as many tokens as the group has, up to a row."""
    (group,) = replace(scaling.BASE, vocabulary=500).groups(0)
    batch = scaling.plain_batch(group, 500, 0)
    lengths = [1 + len(response) for response in batch.response_ids]
    assert 0 <= group.distinct_tokens - sum(lengths) < max(lengths)
    in_plain = sum(sum(range(n)) for n in lengths) / sum(lengths)
    in_group = sum(128 + t for response in group.responses for t in range(len(response))) / group.response_tokens
    assert in_plain == pytest.approx(in_group, rel=0.05)  # long responses have more of the tokens


def test_planning_goes_through_the_loop(threads):
    peak, seconds = scaling.planning_memory(12, 0)
    assert seconds > 0
    assert peak is None or peak >= 0
    assert scaling.MadePrompts(5, 0)[3] == scaling.MadePrompts(9, 0)[3]
    assert len(list(scaling.MadePrompts(5, 0))) == 5


@pytest.mark.parametrize("app", [step.app, scaling.app])
def test_unknown_rows_are_named(app):
    with pytest.raises(ConfigError, match=r"--rows: found '15M-cat'; allowed are "):
        CliRunner().invoke(app, ["--rows", "15M-cat"], catch_exceptions=False)


def test_a_cut_bounds_query_and_response():
    workload = Workload("w", "w", "tiny", 8, (100,), cut=110)
    (group,) = workload.groups(0)
    assert group.padded_length == 110
    assert {len(response) for response in group.responses} == {10}
