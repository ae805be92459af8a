"""Reward models that are trained here: the filter of their pairs, the training itself, ensembles of seeds."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rrhf_bench.data.dialogue import Template
from rrhf_bench.data.preferences import load_pairs
from rrhf_bench.data.prompts import fit_context
from rrhf_bench.jsonl import read_jsonl, write_jsonl
from rrhf_bench.pipeline import stage_helpers
from rrhf_bench.pipeline.file_commands import PlainSteps
from rrhf_bench.pipeline.results import FILTER
from rrhf_bench.pipeline.services import ModelRef, Services, load_reward
from rrhf_bench.pipeline.stage_context import Job
from rrhf_bench.pipeline.store import link_or_copy, replace_path
from rrhf_bench.policy.loading import load_tokenizer
from rrhf_bench.records import Preference, Response
from rrhf_bench.rewards.ensemble import write_ensemble
from rrhf_bench.rewards.pair_losses import OBJECTIVES
from rrhf_bench.rewards.perplexity_filter import filter_pairs
from rrhf_bench.rewards.train_head import Log, RewardTraining, count_steps, train_head, usable_pairs
from rrhf_bench.seeding import generator
from rrhf_bench.settings.reward import PerplexityFilterSettings, RewardTrainingSettings

NLL = "nll.npy"  # (P, 2), in the artifact of the training pairs' perplexities


def train_reward_model(
    services: Services, policy: ModelRef, pairs: Sequence[Preference], settings: RewardTrainingSettings, folder: Path,
    *, seed: int, log: Log | None = None,
) -> RewardTraining:  # fmt: skip
    """Train a reward model, or each member of an ensemble, from the initial policy on these pairs into a folder.

    The result of an ensemble is that of its last member. ``settings.filter`` is applied by ``keep_pairs`` beforehand.
    """
    train = partial(
        train_head,
        policy.source,
        pairs,
        settings,
        template=policy.template,
        pad_token=policy.pad_token,
        revision=policy.revision,
        device=services.device,
        log=log,
        trust_remote_code=policy.trust_remote_code,
    )
    if settings.ensemble is None:
        return train(folder, seed=seed)
    for i, own in enumerate(settings.ensemble.seeds(seed)):
        result = train(folder / f"member_{i}", seed=own)
    used, _ = usable_pairs(pairs, settings)
    write_ensemble(folder, settings.ensemble, used, member_loader(services, trained_ref(policy, settings)))
    return result


def trained_ref(policy: ModelRef, settings: RewardTrainingSettings) -> ModelRef:
    """Return how a reward model is read that was trained from this policy, as the model of an artifact."""
    label = (OBJECTIVES[settings.objective].labels or (None, None))[1]
    return ModelRef("model", template=policy.template, label=label, trust_remote_code=policy.trust_remote_code)


def member_loader(services: Services, ref: ModelRef) -> Callable[[str], Any]:
    """Return a function that loads the folder of one member."""
    return lambda source: load_reward(replace(ref, source=source), services.device, services.runtime.score_batch)


def pair_nll(services: Services, policy: ModelRef, pairs: Sequence[Preference]) -> NDArray[np.float64]:
    """Return (P, 2): the mean negative log-likelihood of a token of each pair's replies under a policy."""
    model = services.fixed_policy(policy)
    rows = [
        (pair.prompt, Response(reply or "", source))
        for pair in pairs
        for source, reply in (("chosen", pair.chosen), ("rejected", pair.rejected))
    ]
    found = stage_helpers.reply_nll(model, rows, services.runtime.score_batch)
    return np.array([nll / tokens for nll, tokens in found]).reshape(-1, 2)


def keep_pairs(
    pairs: Sequence[Preference], nll_P2: NDArray[np.float64], settings: PerplexityFilterSettings, seed: int
) -> tuple[list[Preference], dict[str, Any]]:
    """Return (the pairs that pass the filter, what they were before and after)."""
    return filter_pairs(pairs, nll_P2, settings, generator(seed, "perplexity filter"))


def train_from_file(
    steps: PlainSteps, policy: ModelRef, data: Path, settings: RewardTrainingSettings, out: Path, *, seed: int
) -> RewardTraining:
    """Train a reward model on a file of pairs and write its folder with ``metrics.jsonl`` beside the weights.

    The pairs may have margins and ties. The counts are those of reading and of training; ``filtered_out`` counts the
    pairs that the filter removed.
    """
    read = load_pairs(data, faulty_rows=steps.faulty_rows, margins_and_ties=True)
    tokenizer = load_tokenizer(policy.source, policy.revision, policy.pad_token, policy.trust_remote_code)
    template = Template(policy.template)
    pairs: Sequence[Preference]
    pairs, fitted = fit_context(  # a chat template may refuse a prompt; long texts are cut, and counted
        read.preferences,
        lambda prompt: len(template.render_prompt(prompt, tokenizer)[0]),
        sys.maxsize,
        faulty_rows=steps.faulty_rows,
        places=read.places,
    )
    log: list[Mapping[str, float]] = []
    with replace_path(out) as folder:
        folder.mkdir()
        counts = {**read.counts, "refused_by_template": fitted["refused_by_template"]}
        if settings.filter is not None:
            pairs, about = keep_pairs(pairs, pair_nll(steps.services, policy, pairs), settings.filter, seed)
            (folder / FILTER).write_text(json.dumps(about, indent=1))
            counts["filtered_out"] = about["before"]["pairs"] - len(pairs)
        total = count_steps(pairs, settings) * (1 if settings.ensemble is None else settings.ensemble.members)

        def note(metrics: Mapping[str, float]) -> None:
            log.append(metrics)
            steps.progress(len(log), total)

        result = train_reward_model(steps.services, policy, pairs, settings, folder, seed=seed, log=note)
        write_jsonl(folder / "metrics.jsonl", log)
    return replace(result, counts={**counts, **result.counts})


def pair_perplexity_stage(job: Job) -> None:
    """Write the mean negative log-likelihoods of the replies of the training pairs under a policy."""
    pairs = read_jsonl(job.inputs["data"] / "train.jsonl", Preference)
    np.save(job.out / NLL, pair_nll(job.services, job.ref(), pairs))


def filter_stage(job: Job) -> None:
    """Write the training pairs that pass a filter."""
    s = job.settings
    pairs = read_jsonl(job.inputs["data"] / "train.jsonl", Preference)
    settings = PerplexityFilterSettings.model_validate(s["filter"])
    kept, about = keep_pairs(pairs, np.load(job.inputs["perplexities"] / NLL), settings, s["seed"])
    write_jsonl(job.out / "train.jsonl", kept)
    job.write_json(FILTER, about)


def ensemble_stage(job: Job) -> None:
    """Write a reward model that reads several as one."""
    training = RewardTrainingSettings.model_validate(job.settings)  # the ensemble, and which pairs its members read
    settings = training.ensemble
    assert settings is not None
    ref = job.ref("member 0")
    for i in range(settings.members):
        source = job.inputs[f"member {i}"] / "model"
        shutil.copytree(source, job.out / "model" / f"member_{i}", copy_function=link_or_copy)
    pairs = read_jsonl(job.inputs["data"] / "train.jsonl", Preference)
    write_ensemble(job.out / "model", settings, usable_pairs(pairs, training)[0], member_loader(job.services, ref))
    replace(ref, source="model").write(job.out)
