"""Measure where the seconds of a PPO iteration go, with prompts and replies packed and with padded rows.

    python -m benchmarks.ppo --out reports/performance/ppo.json

Both sides are the bench's own PPO, from the same weights, on the same engine, prompts and seeds, under a reward model
that is trained here for a moment; they differ in the layout that the policy and the reference are fed in. In each round
both run a few iterations of which the first does not count, in turn.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from baselines.ppo import PPO
from baselines.ppo_settings import PPOSettings
from benchmarks.measure import main, measure_rounds, ratios, spread, write_json
from benchmarks.page import Table, show, spread_words
from benchmarks.sampling import (
    ModelOption,
    OutOption,
    RoundsOption,
    ThreadsOption,
    engine_of,
    small_world,
    world_prompts,
)
from rrhf_bench.errors import ConfigError
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.records import STOP_STRINGS, Candidates
from rrhf_bench.rewards.hub import ClassifierReward
from rrhf_bench.rewards.train_head import train_head
from rrhf_bench.settings.reward import RewardTrainingSettings
from rrhf_bench.training.method import TrainContext, TrainInputs
from rrhf_bench.training.on_policy import OnPolicyTrainer

PARTS = ("sync", "sample", "score", "logprobs", "update", "iteration")
PAIRS = 400  # that the reward model is trained on


class Layout:
    """PPO with a policy and a reference that are fed in one layout."""

    def __init__(self, layout: Any, initial: TransformersPolicy, settings: PPOSettings, context: TrainContext) -> None:
        self.layout, self.initial, self.settings, self.context = layout, initial, settings, context
        self.policy = initial
        self.rounds: list[list[Mapping[str, float]]] = []  # the iterations of each round, by part

    def prepare(self) -> None:
        self.policy, reference = (copy.deepcopy(self.initial) for _ in range(2))
        reference.model.requires_grad_(False)
        self.policy.layout = reference.layout = self.layout
        self.rounds.append([])
        self.context = replace(self.context, reference=reference, took=self.rounds[-1].append)

    def run(self) -> None:
        inputs = TrainInputs(candidates=[Candidates(prompt, ()) for prompt in world_prompts(self.settings.rollouts)])
        OnPolicyTrainer(PPO(self.settings), self.settings).fit(self.policy, inputs, self.context)

    def seconds(self) -> dict[str, list[float]]:
        """Return for each part its mean seconds in each round, without the first iteration and the first round."""
        return {
            part: [statistics.fmean(took[part] for took in round_[1:]) for round_ in self.rounds[1:]] for part in PARTS
        }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def ppo(
    model: ModelOption = "4M",
    rollouts: Annotated[int, typer.Option(help="of an iteration")] = 64,
    iterations: Annotated[int, typer.Option(min=2, help="of a round; the first does not count")] = 4,
    rounds: RoundsOption = 5,
    max_new_tokens: int = 64,
    threads: ThreadsOption = None,
    out: OutOption = None,
) -> None:
    """Measure the seconds of a PPO iteration by part, packed and padded."""
    settings = PPOSettings(
        iterations=iterations, rollouts=rollouts, minibatch=max(1, rollouts // 2), update_epochs=2, lr=1e-5
    )
    with engine_of("ppo", model, threads) as engine, tempfile.TemporaryDirectory() as reward:
        policy, device = engine.policy, engine.policy.device.type
        if policy.layout != "packed":
            raise ConfigError(
                f"--model: {model} does not pack ({policy.layout_reason}), so there is nothing to compare"
            )
        pairs = small_world(preferences=PAIRS).preferences
        train_head(engine.folder, pairs, RewardTrainingSettings(epochs=1), Path(reward), seed=0, device=device)
        context = TrainContext(
            seed=0,
            sampler=engine.sampler,
            reward=ClassifierReward.load(reward, device=device),
            reference=None,
            max_new_tokens=max_new_tokens,
            stop=STOP_STRINGS,
            watch=lambda progress, policy: None,
            log=lambda metrics: None,
        )
        sides = {layout: Layout(layout, policy, settings, context) for layout in ("packed", "padded")}
        measure_rounds("ppo", sides, rounds)
    seconds = {name: side.seconds() for name, side in sides.items()}
    share = {name: ratios(parts["sync"], parts["iteration"]) for name, parts in seconds.items()}
    over = {
        part: ratios(seconds["padded"][part], seconds["packed"][part]) for part in ("logprobs", "update", "iteration")
    }
    record = {
        **engine.record,
        "settings": {**settings.model_dump(exclude_none=True), "rounds": rounds, "max_new_tokens": max_new_tokens},
        "seconds": {name: {part: spread(s)._asdict() for part, s in parts.items()} for name, parts in seconds.items()},
        "share_of_sync": {name: ratio._asdict() for name, ratio in share.items()},
        "padded_over_packed": {part: ratio._asdict() for part, ratio in over.items()},
        "rounds": seconds,
    }
    if out is not None:
        write_json(out, record)
    cells = [
        [name, *(f"{1000 * spread(parts[part]).median:,.0f}" for part in PARTS), f"{share[name].median:.1%}"]
        for name, parts in seconds.items()
    ]
    title = f"{model}: {record['model']['parameters']:,} parameters, ms of an iteration of {rollouts} rollouts"
    show(Table(("layout", *PARTS, "share of sync"), cells), title)
    print("padded / packed:", ", ".join(f"{part} {spread_words(ratio, 2)}" for part, ratio in over.items()))


if __name__ == "__main__":
    main(app)
