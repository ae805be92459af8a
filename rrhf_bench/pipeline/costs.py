"""Compute the cost of a row's trained policy by one walk backwards over the stages that its method needs.

Charged to a row: drawing, scoring and judging its training candidates, reading them from a file, their log-probs under
the initial policy if the method reads these, its own training, all earlier rounds, and the training of the rows whose
models it samples, with all that these need in turn. Stages that several rows need are charged in full to each of them.

Not charged: what every row is given (data, prompts, initial policies, reward and perplexity model), and evaluation. An
initial policy that is itself a trained row, such as sft, is given as well: its training is charged to that row alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from rrhf_bench.pipeline.results import Cost, Row
from rrhf_bench.pipeline.stage_graph import OWN_REPLIES

Stages = Mapping[str, Mapping[str, Any]]  # run.json: by key, the kind, settings and inputs of each stage


@dataclass(frozen=True)
class StageCost:
    """Hold the cost of one stage; that of a train stage leaves out loading and the curve on the dev prompts."""

    seconds: float
    sampled_tokens: int = 0
    sampled_replies: int = 0
    reward_calls: int = 0  # replies that the reward model scored
    steps: int = 0  # of the optimiser
    trained_tokens: int = 0  # fed to the policy with gradients
    forwarded_tokens: int = 0  # of replies that passed a model without gradients, once for each model
    parameters: int | None = None  # of the policy of a train stage; None of other stages and where it is not recorded


def needed_stages(stages: Stages, trained: str, given: Collection[str]) -> list[str]:
    """Return the keys of all stages charged to the policy of a train stage, each once, that stage first.

    ``given`` names the sources whose model is an initial policy: their samples are charged, their training is not.
    """
    found: dict[str, None] = {}

    def add_trained(key: str) -> None:
        if key in found:
            return
        found[key] = None
        inputs = own = stages[key]["inputs"]
        if "judged" in own:
            found[own["judged"]] = None
            inputs = stages[own["judged"]]["inputs"]
        elif OWN_REPLIES & {*stages[key]["settings"]["method"].get("candidates", {}).get("sources", ())}:
            found[own["pair scores"]] = None
        found.update({key: None for role, key in own.items() if role.startswith("reference ")})
        for source, candidates in sampled_inputs(inputs):
            drawn = stages[candidates]["inputs"].get("candidates", candidates)  # of a score stage, or itself
            found.update({candidates: None, drawn: None})
            model = stages[drawn]["inputs"].get("policy")  # none: read from a file
            is_given = model == own["policy"] if source == "model" else source in given
            if model is not None and stages[model]["kind"] == "train" and not is_given:
                add_trained(model)

    add_trained(trained)
    return list(found)


def sampled_inputs(inputs: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Return (source, key) of the sampled responses among the inputs of a train or judge stage."""
    return [(role.split(" ", 1)[1], key) for role, key in inputs.items() if role.startswith(("scores ", "candidates "))]


def total(stages: Iterable[StageCost]) -> StageCost:
    """Return the sum over stages."""
    all_ = list(stages)
    counts = {field.name for field in fields(StageCost)} - {"seconds", "parameters"}
    sums = {name: sum(getattr(stage, name) for stage in all_) for name in counts}
    return StageCost(math.fsum(stage.seconds for stage in all_), **sums)


def cost_of(stages: Iterable[StageCost], parameters: int | None, **own: Any) -> Cost:
    """Return the cost of stages together, with FLOPs for a policy of that many parameters."""
    whole = total(stages)
    flops = None
    if parameters is not None:
        flops = float(parameters) * (6 * whole.trained_tokens + 2 * whole.forwarded_tokens)
    shared = {field.name for field in fields(StageCost)} & {field.name for field in fields(Cost)}
    return Cost(**{name: getattr(whole, name) for name in shared}, flops=flops, **own)


def row_costs(
    needed: Mapping[Row, Collection[str]], spent: Mapping[str, StageCost], peaks_mib: Mapping[Row, float | None]
) -> dict[Row, Cost]:
    """Return the cost of each row and seed from the stages that it needs, its last train stage first.

    Shared are the stages that another row needs.
    """
    users: dict[str, set[str]] = defaultdict(set)
    for (row, _), keys in needed.items():
        for key in keys:
            users[key].add(row)

    def cost(keys: Collection[str], peak_mib: float | None) -> Cost:
        shared = math.fsum(spent[key].seconds for key in keys if len(users[key]) > 1)
        parameters = spent[next(iter(keys))].parameters
        return cost_of((spent[key] for key in keys), parameters, shared_seconds=shared, train_peak_mib=peak_mib)

    return {row_and_seed: cost(keys, peaks_mib[row_and_seed]) for row_and_seed, keys in needed.items()}
