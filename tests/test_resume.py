"""A training run that is stopped at any step and started again ends as one that was never stopped, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from baselines.online_dpo_settings import OnlineDPOSettings
from baselines.ppo_settings import PPOSettings
from baselines.reinforce_settings import ReinforceSettings
from baselines.sft_settings import SFTSettings
from rrhf_bench.pipeline import stage_helpers
from rrhf_bench.pipeline.training_record import FileCheckpoints
from rrhf_bench.records import Candidates, Preference, Response
from rrhf_bench.settings.methods import LoraSettings
from rrhf_bench.testing import PROMPTS, Run
from rrhf_bench.training.method import TrainInputs
from rrhf_bench.training.rrhf_settings import RRHFSettings

PAIRS = [Preference(prompt, " add" * (1 + i % 3), " no") for i, prompt in enumerate(PROMPTS)]
CANDIDATES = [
    Candidates(
        pair.prompt,
        (
            Response(pair.chosen, "chosen", score=1.0),
            Response(pair.rejected, "rejected", score=0.0),
            Response(" a dad", "model", "length", score=float(i % 2)),
        ),
    )
    for i, pair in enumerate(PAIRS)
]
OFFLINE: dict[str, Any] = {"epochs": 2, "batch_prompts": 3, "lr": 3e-3}
ON_POLICY: dict[str, Any] = {"iterations": 4, "rollouts": 8, "minibatch": 4, "lr": 3e-3}
METHODS: dict[str, Any] = {
    "rrhf": RRHFSettings(**OFFLINE),
    "rrhf with adapters": RRHFSettings(**OFFLINE, lora=LoraSettings(rank=2)),
    "sft": SFTSettings(**OFFLINE),
    "op-2+kl": RRHFSettings(
        **OFFLINE, candidates={"refresh": 2, "reward_kl": 0.01, "n": 2, "sources": ("model", "chosen")}
    ),
    "ppo": PPOSettings(
        iterations=5, rollouts=6, minibatch=3, update_epochs=2, lr=3e-3, kl="adaptive", kl_target=1.0, kl_horizon=20,
        reward_scale="running",
    ),
    "ppo with a value model": PPOSettings(iterations=3, rollouts=6, minibatch=3, update_epochs=1, value="separate"),
    "xpo": OnlineDPOSettings(**ON_POLICY, xpo_alpha=1e-3),
    "reinforce with a decaying mean": ReinforceSettings(**ON_POLICY, baseline="ema", decay=0.7, include_present=False),
}  # fmt: skip


class Noted:
    """What a run has noted, as a stage keeps it."""

    def __init__(self) -> None:
        self.log: list[Any] = []

    def state(self) -> Any:
        return self.log

    def load(self, state: Any) -> None:
        self.log[:] = state


class Killed(BaseException):
    pass


def train(settings: Any, folder: Path, dtype: torch.dtype = torch.float32, kill_at: int | None = None) -> Any:
    """(weights, log, result) of a run that goes on from what it finds, or the end of it at its line ``kill_at``."""
    run, noted = Run(stop=("ad",)), Noted()
    run.policy.model.to(dtype)
    written = 0

    def log(line: Any) -> None:
        nonlocal written
        noted.log.append(dict(line))
        written += 1
        if written == kill_at:
            raise Killed

    unadapted = stage_helpers.adapt(run.policy, settings, seed=0)
    context = replace(run.context, log=log, checkpoints=FileCheckpoints(folder, 0.0, noted))
    context = replace(context, reference=unadapted or context.reference)
    inputs = TrainInputs(PAIRS, [replace(c, responses=c.responses[:1]) for c in CANDIDATES])
    if "sampler" not in settings.needs:
        inputs = TrainInputs(PAIRS, CANDIDATES)
    result = stage_helpers.trainer(settings, 128).fit(run.policy, inputs, context)
    return run.weights(), noted.log, result


@pytest.mark.parametrize(
    ("name", "onednn"),
    [*((name, "off") for name in METHODS), ("rrhf with adapters", "on"), ("ppo with a value model", "on")],
    indirect=["onednn"],
)
def test_a_killed_run_ends_as_if_it_had_not_been(name: str, onednn: str, tmp_path: Path) -> None:
    """One run is killed at its first line, there again, in its middle and at its end."""
    settings = METHODS[name]
    weights, log, result = train(settings, tmp_path / "whole")
    middle = len(log) // 2
    for kill_at in (1, 1, middle, len(log) - middle):  # lines after the run went on
        with pytest.raises(Killed):
            train(settings, tmp_path / "killed", kill_at=kill_at)
        torch.rand(kill_at)
        np.random.seed(kill_at)
    found, lines, same = train(settings, tmp_path / "killed")
    assert lines == log
    assert same == result
    assert all(torch.equal(found[key], weights[key]) for key in weights)


ON_POLICY: dict[str, Any] = {"iterations": 4, "rollouts": 8, "minibatch": 4, "lr": 3e-3}


def test_half_precision_goes_on_from_its_float32_copies(tmp_path: Path) -> None:
    settings = RRHFSettings(**{**OFFLINE, "lr": 1e-4})
    weights, log, _ = train(settings, tmp_path / "whole", torch.bfloat16)
    with pytest.raises(Killed):
        train(settings, tmp_path / "part", torch.bfloat16, kill_at=len(log) // 2)
    found, lines, _ = train(settings, tmp_path / "part", torch.bfloat16)
    assert lines == log
    assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_a_damaged_checkpoint_is_as_good_as_none(tmp_path: Path) -> None:
    settings = METHODS["sft"]
    weights, log, _ = train(settings, tmp_path / "whole")
    with pytest.raises(Killed):
        train(settings, tmp_path / "part", kill_at=3)
    (kept,) = (tmp_path / "part").iterdir()
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    found, lines, _ = train(settings, tmp_path / "part")
    assert lines == log  # from the beginning
    assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_one_checkpoint_is_kept_and_none_before_it_is_due(tmp_path: Path) -> None:
    train(METHODS["sft"], tmp_path / "often")
    assert len(list((tmp_path / "often").iterdir())) == 1
    checkpoints = FileCheckpoints(tmp_path / "rarely", 1e6, Noted())
    checkpoints.offer({"step": 1})
    assert not (tmp_path / "rarely").exists()
    assert checkpoints.last() is None
