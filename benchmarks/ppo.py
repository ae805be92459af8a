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
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from baselines.ppo import PPO
from baselines.ppo_settings import PPOSettings
from benchmarks.measure import Side, begin, device_of, main, measure_rounds, ratios, say, spread, write_json
from benchmarks.page import Table, show, spread_words
from benchmarks.sampling import CONTEXT, SIZES, small_llama, world_prompts
from rrhf_bench.data.dialogue import Template
from rrhf_bench.data.toy.world import build_world
from rrhf_bench.errors import ConfigError
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.records import STOP_STRINGS, Candidates
from rrhf_bench.rewards.hub import ClassifierReward
from rrhf_bench.rewards.reward import RewardModel
from rrhf_bench.rewards.train_head import train_head
from rrhf_bench.sampling.backend import choose_backend
from rrhf_bench.sampling.vllm import VLLMSampler
from rrhf_bench.settings.reward import RewardTrainingSettings
from rrhf_bench.training.method import TrainContext, TrainInputs
from rrhf_bench.training.on_policy import OnPolicyTrainer

NAME = "ppo"
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
        took = self.rounds[-1].append
        self.lent = TrainContext(**{**vars(self.context), "reference": reference, "took": took})

    def run(self) -> None:
        inputs = TrainInputs(candidates=[Candidates(prompt, ()) for prompt in world_prompts(self.settings.rollouts)])
        OnPolicyTrainer(PPO(self.settings), self.settings).fit(self.policy, inputs, self.lent)


def small_reward(folder: Path, where: Path, device: str) -> RewardModel:
    """Return a reward model on the body of a policy, from some of the embedded world's pairs."""
    world = build_world(seed=0, raw_corpus=1, corpus=1, perplexity_corpus=1, preferences=PAIRS, dev=1, test=1)
    train_head(folder, world.preferences, RewardTrainingSettings(epochs=1), where, seed=0, device=device)
    return ClassifierReward.load(str(where), device=device)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def ppo(
    model: Annotated[str, typer.Option(help=f"{', '.join(SIZES)}; trained here for a moment")] = "4M",
    rollouts: Annotated[int, typer.Option(help="of an iteration")] = 64,
    iterations: Annotated[int, typer.Option(min=2, help="of a round; the first does not count")] = 4,
    rounds: Annotated[int, typer.Option(help="that count; one before them does not")] = 5,
    max_new_tokens: int = 64,
    threads: Annotated[int | None, typer.Option(min=1, help="of the CPU; PyTorch's own number otherwise")] = None,
    out: Annotated[Path | None, typer.Option(help="where the numbers go, as JSON")] = None,
) -> None:
    """Measure the seconds of a PPO iteration by part, packed and padded."""
    if model not in SIZES:
        raise ConfigError(f"--model: found {model!r}; allowed are {', '.join(SIZES)}")
    if choose_backend("vllm").name != "vllm":
        raise ConfigError("benchmarks.ppo: vLLM is not installed here; expected it, since it samples the rollouts")
    device = device_of("auto")
    record = begin(NAME, device, threads)
    settings = PPOSettings(
        iterations=iterations, rollouts=rollouts, minibatch=max(1, rollouts // 2), update_epochs=2, lr=1e-5
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "policy"
        small_llama(SIZES[model], folder, device.type)
        policy = TransformersPolicy.load(folder, template=Template(), device=device.type)
        if policy.layout != "packed":
            raise ConfigError(
                f"--model: {model} does not pack ({policy.layout_reason}), so there is nothing to compare"
            )
        context = TrainContext(
            seed=0,
            sampler=VLLMSampler(folder, policy.tokenization, max_model_len=CONTEXT, device=device.type),
            reward=small_reward(folder, Path(temporary) / "reward", device.type),
            reference=None,
            max_new_tokens=max_new_tokens,
            stop=STOP_STRINGS,
            watch=lambda progress, policy: None,
            log=lambda metrics: None,
        )
        sides = {layout: Layout(layout, policy, settings, context) for layout in ("packed", "padded")}
        measure_rounds({name: Side(side.run, side.prepare) for name, side in sides.items()}, rounds, progress=say)
    say()
    seconds = {
        name: {
            part: [statistics.fmean(took[part] for took in round_[1:]) for round_ in side.rounds[1:]] for part in PARTS
        }
        for name, side in sides.items()
    }
    record |= {
        "model": {"name": model, "parameters": sum(map(torch.numel, policy.parameters()))},
        "settings": {**settings.model_dump(exclude_none=True), "rounds": rounds, "max_new_tokens": max_new_tokens},
        "seconds": {name: {part: spread(s)._asdict() for part, s in parts.items()} for name, parts in seconds.items()},
        "share_of_sync": {name: ratios(parts["sync"], parts["iteration"])._asdict() for name, parts in seconds.items()},
        "padded_over_packed": {
            part: ratios(seconds["padded"][part], seconds["packed"][part])._asdict()
            for part in ("logprobs", "update", "iteration")
        },
        "rounds": seconds,
    }
    if out is not None:
        write_json(out, record)
    cells = [
        [
            name,
            *(f"{1000 * spread(parts[part]).median:,.0f}" for part in PARTS),
            f"{ratios(parts['sync'], parts['iteration']).median:.1%}",
        ]
        for name, parts in seconds.items()
    ]
    title = f"{model}: {record['model']['parameters']:,} parameters, ms of an iteration of {rollouts} rollouts"
    show(Table(("layout", *PARTS, "share of sync"), cells), title)
    over = {part: list(ratio.values()) for part, ratio in record["padded_over_packed"].items()}
    print("padded / packed:", ", ".join(f"{part} {spread_words(ratio, 2)}" for part, ratio in over.items()))


if __name__ == "__main__":
    main(app)
