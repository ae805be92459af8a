"""rrhf_loss against a slow definition on ragged groups with ties, hand-worked numbers, and invariants."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rrhf_bench.training.rrhf import rrhf_loss

VARIANTS = ("paper", "intended", "official")


def slow(groups, variant, rank_weight=1.0, sft_weight=1.0, margin=0.0):
    """Eqs. 1 to 5 of 2304.05302 read aloud. A group: (list of (token log-probs, reward), longest query + response)."""
    ranks, sfts = [], []
    for candidates, padded_length in groups:
        p = []
        for logps, _ in candidates:
            p.append(sum(logps) / (padded_length if variant == "official" else len(logps)))
        rank = 0.0
        for i, (_, r_i) in enumerate(candidates):
            for j, (_, r_j) in enumerate(candidates):
                if r_i < r_j:
                    better = [sum(r > x for _, r in candidates) for x in (r_i, r_j)]
                    rank += max(0.0, p[i] - p[j] + margin * (better[0] - better[1]))
        best = max(range(len(candidates)), key=lambda i: candidates[i][1])  # the first of equals
        logps = candidates[best][0]
        sft = -{"paper": sum(logps), "intended": sum(logps) / len(logps), "official": sum(logps) / padded_length}[
            variant
        ]
        ranks.append(rank)
        sfts.append(sft)
    rank, sft = sum(ranks) / len(ranks), sum(sfts) / len(sfts)
    return rank_weight * rank + sft_weight * sft, rank, sft


def tensors(groups, extra_T=0, extra_G=0, dtype=torch.float64):
    B = len(groups)
    G = max(len(c) for c, _ in groups) + extra_G
    T = max(len(logps) for c, _ in groups for logps, _ in c) + extra_T
    logp = torch.full((B, G, T), -99.0, dtype=dtype)  # padding must never count
    mask = torch.zeros(B, G, T, dtype=torch.bool)
    reward = torch.full((B, G), math.nan, dtype=dtype)  # nor an absent candidate's reward
    for b, (candidates, _) in enumerate(groups):
        for g, (logps, r) in enumerate(candidates):
            logp[b, g, : len(logps)] = torch.tensor(logps, dtype=dtype)
            mask[b, g, : len(logps)] = True
            reward[b, g] = r
    return logp, mask, reward, torch.tensor([length for _, length in groups], dtype=dtype)


logps = st.lists(st.floats(-6, -0.01), min_size=1, max_size=6)
candidate = st.tuples(logps, st.sampled_from([-1.0, 0.0, 0.5, 2.0]))  # few values: ties are frequent
group = st.tuples(st.lists(candidate, min_size=1, max_size=5), st.integers(7, 30))


@settings(max_examples=150, deadline=None)
@given(st.lists(group, min_size=1, max_size=4), st.sampled_from(VARIANTS), st.sampled_from([0.0, 0.1]))
def test_equals_the_slow_definition(groups, variant, margin):
    logp, mask, reward, length = tensors(groups)
    ours = rrhf_loss(
        logp, mask, reward, variant=variant, rank_weight=3.0, sft_weight=0.5, margin=margin, padded_length_B=length
    )
    assert [x.item() for x in ours[:3]] == pytest.approx(slow(groups, variant, 3.0, 0.5, margin), rel=1e-12, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(group, min_size=1, max_size=3), st.sampled_from(VARIANTS), st.randoms(use_true_random=False))
def test_padding_order_and_a_constant_change_nothing(groups, variant, rng):
    """Padding, absent candidates, the order of candidates (where the best is unique) and reward + constant."""
    logp, mask, reward, length = tensors(groups)
    total = rrhf_loss(logp, mask, reward, variant=variant, padded_length_B=length).total.item()
    wider = tensors(groups, extra_T=3, extra_G=2)
    assert rrhf_loss(*wider[:3], variant=variant, padded_length_B=length).total.item() == pytest.approx(
        total, rel=1e-12
    )
    shifted = rrhf_loss(logp, mask, reward + 5.0, variant=variant, padded_length_B=length).total.item()
    assert shifted == pytest.approx(total, rel=1e-12)
    unique = [([c for c in cs if c[1] < max(r for _, r in cs)] + [(cs[0][0], 9.0)], n) for cs, n in groups]
    shuffled = [(rng.sample(cs, len(cs)), n) for cs, n in unique]
    one, two = (tensors(g) for g in (unique, shuffled))
    assert rrhf_loss(*one[:3], variant=variant, padded_length_B=length).total.item() == pytest.approx(
        rrhf_loss(*two[:3], variant=variant, padded_length_B=length).total.item(), rel=1e-12
    )


def test_published_example():
    """p = (-1, -.4, -.7, -1.2), r = (3, 1, 2, 2); pairs with r_i < r_j, as max(0, p_i - p_j):
    r=1 below 3, 2, 2: .6 + .3 + .8; r=2 (-.7) below 3: .3; r=2 (-1.2) below 3: 0. Sum 2.0. Best is -1."""
    logp = torch.tensor([[[-1.0], [-0.4], [-0.7], [-1.2]]])
    losses = rrhf_loss(logp, torch.ones_like(logp, dtype=torch.bool), torch.tensor([[3.0, 1.0, 2.0, 2.0]]))
    assert losses.rank.item() == pytest.approx(2.0, rel=1e-6)
    assert losses.sft.item() == pytest.approx(1.0, rel=1e-6)
    assert losses.total.item() == pytest.approx(3.0, rel=1e-6)


# Two candidates: best (-1, -2) with reward 1, worse (-1,) with reward 0; longest query + response 10.
TWO = [([([-1.0, -2.0], 1.0), ([-1.0], 0.0)], 10)]


@pytest.mark.parametrize(
    ("variant", "rank", "sft"),
    [
        ("paper", 0.5, 3.0),  # p = -1.5, -1: hinge -1 + 1.5; L_ft = 1 + 2
        ("intended", 0.5, 1.5),  # the same hinge; L_ft = 3 / 2
        ("official", 0.2, 0.3),  # p = -3/10, -1/10: hinge .2; L_ft = 3/10
    ],
)
def test_variants_by_hand(variant, rank, sft):
    logp, mask, reward, length = tensors(TWO)
    losses = rrhf_loss(logp, mask, reward, variant=variant, padded_length_B=length)
    assert (losses.rank.item(), losses.sft.item()) == pytest.approx((rank, sft), rel=1e-12)


def test_the_gradient_of_a_violated_pair_is_one_over_its_length():
    """Eq. 2: -1/2 a token on the better reply of 2 tokens, +1 on the worse of 1; nothing once ordered."""
    logp, mask, reward, _ = tensors(TWO)
    logp.requires_grad_()
    rrhf_loss(logp, mask, reward).rank.backward()
    assert logp.grad.tolist() == [[[-0.5, -0.5], [1.0, 0.0]]]
    ordered = logp.detach().clone()
    ordered[0, 1, 0] = -2.0
    ordered.requires_grad_()
    rrhf_loss(ordered, mask, reward).rank.backward()
    assert ordered.grad.abs().max().item() == 0.0


def test_arguments_are_not_written_to():
    logp, mask, reward, length = tensors(TWO, extra_G=1)
    copies = [x.clone() for x in (logp, mask, reward)]
    rrhf_loss(logp, mask, reward, variant="official", padded_length_B=length)
    for before, after in zip(copies, (logp, mask, reward), strict=True):
        assert torch.equal(before.nan_to_num(7.0), after.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [("empty", "no candidate with tokens"), ("nan", "not finite"), ("length", "padded_length_B")],
)
def test_what_cannot_be_is_refused(change, message):
    logp, mask, reward, _ = tensors(TWO)
    if change == "empty":
        mask = torch.zeros_like(mask)
    if change == "nan":
        reward = torch.full_like(reward, math.nan)
    with pytest.raises(ValueError, match=message):
        rrhf_loss(logp, mask, reward, variant="official" if change == "length" else "paper")
