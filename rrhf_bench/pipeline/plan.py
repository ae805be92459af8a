"""The stages of an experiment as data: what each needs, and the key of what it makes. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rrhf_bench.config import Experiment, ModelSettings, RewardModelSettings
from rrhf_bench.pipeline.store import content_key, folder_identity
from rrhf_bench.sampling.backend import Backend, choose_backend
from rrhf_bench.settings import READ, SEARCH_KEYS, CandidateSettings, MethodSettings

# Raised when a stage's code would give another result for the same settings: old artifacts are then not used.
VERSIONS = {
    "data": 1,
    "model": 1,
    "reward model": 1,
    "prompts": 2,
    "sample": 1,
    "score": 2,
    "score pairs": 1,
    "train": 1,
    "evaluate": 1,
    "evaluate pairs": 1,
}


@dataclass(frozen=True)
class Stage:
    """One artifact to be: ``key`` is the sha256 of all that decides its value."""

    name: str  # unique in a plan, for people: "train rrhf, seed 0"
    kind: str
    settings: Mapping[str, Any]  # JSON; enters the key
    inputs: Mapping[str, Stage]  # role -> the stage that makes it
    size: str  # in words
    row: str | None = None
    seed: int | None = None
    recorded: Mapping[str, Any] = field(default_factory=dict)  # settings that decide nothing: where a file lies

    @cached_property
    def key(self) -> str:
        return content_key(
            {
                "kind": self.kind,
                "version": VERSIONS[self.kind],
                "settings": self.settings,
                "inputs": {role: stage.key for role, stage in self.inputs.items()},
            }
        )


@dataclass(frozen=True)
class Plan:
    experiment: Experiment
    backend: Backend
    wanted: tuple[Stage, ...]  # what the report reads, row by row; two rows of equal settings share a key

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """All of them, in an order in which each finds its inputs made; equal keys once."""
        return tuple(_ordered(self.wanted))


# What the tables call the replies of the data set.
PAIR_ROWS = ("chosen", "rejected")


def make_plan(experiment: Experiment) -> Plan:
    """Every stage of an experiment. Raises StoreError for a model folder that is not there."""
    backend = choose_backend(experiment.sampling.backend)
    return Plan(experiment, backend, tuple(_Builder(experiment, backend).all()))


def _ordered(stages: Iterable[Stage]) -> Iterator[Stage]:
    """Inputs before what needs them, each key once."""
    seen: set[str] = set()

    def visit(stage: Stage) -> Iterator[Stage]:
        if stage.key in seen:
            return
        for needed in stage.inputs.values():
            yield from visit(needed)
        seen.add(stage.key)
        yield stage

    for stage in stages:
        yield from visit(stage)


@dataclass(frozen=True)
class _Builder:
    experiment: Experiment
    backend: Backend

    def all(self) -> Iterator[Stage]:
        e = self.experiment
        yield self.train_pairs
        yield self.test_pairs
        for row in PAIR_ROWS:
            yield self.evaluate_pairs(row)
        for seed in e.seeds:
            yield self.evaluate("base", None, seed)
            yield self.pool(seed)
            for row, method in e.methods.items():
                if "candidates" in method.requires and "model" in (method.sources or ()):
                    yield self.scores(method, "train", seed)
                    yield self.scores(method, "test", seed)
                yield self.evaluate(row, method, seed)

    @cached_property
    def data(self) -> Stage:
        e = self.experiment
        settings = e.data.model_dump(mode="json", exclude={"train_prompts", "long_prompts"})
        if e.data.source != "toy":
            del settings["toy"]
        sizes = {"dev": e.evaluation.dev_prompts, "test": e.evaluation.pairs}
        where = e.data.path or e.data.source
        content = _content(e)
        recorded = {} if content is None else {"path": settings.pop("path")}
        settings |= {**sizes, "content": content}
        return Stage("data", "data", settings, {}, f"from {where}", recorded=recorded)

    def _model(self, name: str, settings: ModelSettings, corpus: str) -> Stage:
        if not settings.from_scratch:
            return Stage(name, "model", self._given(settings), {}, f"{settings.source}, as it is")
        scratch = settings.scratch
        size = f"Llama, {scratch.layers} layers of {scratch.hidden}, trained from scratch for {scratch.epochs} epochs"
        slice_ = {"scratch": scratch.model_dump(mode="json"), "corpus": corpus, "seed": self.experiment.data.seed}
        return Stage(name, "model", slice_, {"data": self.data}, size)

    @cached_property
    def policy(self) -> Stage:
        return self._model("policy", self.experiment.policy, "corpus")

    @cached_property
    def perplexity_model(self) -> Stage:
        return self._model("perplexity model", self.experiment.perplexity_model, "perplexity_corpus")

    @cached_property
    def reward_model(self) -> Stage:
        settings = self.experiment.reward_model
        if not settings.from_scratch:
            return Stage("reward model", "reward model", self._given(settings), {}, f"{settings.source}, as it is")
        return Stage(
            "reward model",
            "reward model",
            {"training": settings.training.model_dump(mode="json"), "seed": self.experiment.data.seed},
            {"data": self.data, "policy": self.policy},
            "Bradley-Terry on the labelled pairs",
        )

    def _given(self, settings: ModelSettings | RewardModelSettings) -> dict[str, Any]:
        """A model that is used as it is: a folder by its content, a hub model by id and revision."""
        dump = settings.model_dump(mode="json", exclude={"scratch", "training"})
        folder = Path(settings.source)
        return {**dump, "identity": folder_identity(folder)} if folder.is_dir() else dump

    @cached_property
    def prompts(self) -> Stage:
        """The prompts that fit the policy's context: training, dev and test."""
        e = self.experiment
        settings = {
            "train_prompts": e.data.train_prompts,
            "long_prompts": e.data.long_prompts,
            "template": e.policy.template,
            "new_tokens": max(e.sampling.max_new_tokens, e.evaluation.max_new_tokens),
        }
        sizes = (
            f"{e.data.train_prompts} to train on, {e.evaluation.dev_prompts} dev, {e.evaluation.prompts} to evaluate"
        )
        return Stage("prompts", "prompts", settings, {"data": self.data, "policy": self.policy}, sizes)

    def sample(self, candidates: CandidateSettings, split: str, seed: int) -> Stage:
        """Candidates of the initial policy; those of a search are the same for all seeds."""
        sampling = self.experiment.sampling
        strategy = candidates.strategy or "sample"
        settings = {
            **candidates.model_dump(mode="json", include=set(READ[strategy])),
            "max_new_tokens": sampling.max_new_tokens,
            "stop": list(sampling.training_stop),
            "split": split,
            "sampler": choose_backend(sampling.backend, strategy).identity,
            "dtype": self.experiment.policy.dtype,
        }
        if candidates.drawn:
            settings["seed"] = seed
        count = self.experiment.data.train_prompts
        if split == "test":
            count = settings["prompts"] = self.experiment.evaluation.prompts
        return Stage(
            f"candidates for {split} prompts ({_how(candidates)})" + (f", seed {seed}" if candidates.drawn else ""),
            "sample",
            settings,
            {"prompts": self.prompts, "policy": self.policy},
            f"{count} prompts x {candidates.n}",
            seed=seed if candidates.drawn else None,
        )

    def scores(self, candidates: CandidateSettings, split: str, seed: int) -> Stage:
        sample = self.sample(candidates, split, seed)
        return Stage(
            sample.name.replace("candidates", "scores of candidates"),
            "score",
            {},
            {"candidates": sample, "prompts": self.prompts, "reward model": self.reward_model},
            sample.size,
            seed=sample.seed,
        )

    def _pairs(self, split: str, count: int) -> Stage:
        inputs = {"prompts": self.prompts, "reward model": self.reward_model}
        return Stage(f"scores of {split} pairs", "score pairs", {"split": split}, inputs, f"{count} pairs")

    @cached_property
    def train_pairs(self) -> Stage:
        return self._pairs("train", self.experiment.data.train_prompts)

    @cached_property
    def test_pairs(self) -> Stage:
        return self._pairs("test", self.experiment.evaluation.pairs)

    def pool(self, seed: int) -> Stage:
        """Many samples of the initial policy on the first evaluation prompts: what best-of-n is estimated from."""
        e = self.experiment
        settings = {
            "n": e.evaluation.pool_samples,
            "temperature": e.evaluation.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "max_new_tokens": e.evaluation.max_new_tokens,
            "stop": list(e.sampling.stop),
            "split": "pool",
            "prompts": e.evaluation.pool_prompts,
            "seed": seed,
            "sampler": self.backend.identity,
            "dtype": e.policy.dtype,
        }
        size = f"{e.evaluation.pool_prompts} prompts x {e.evaluation.pool_samples}"
        inputs = {"prompts": self.prompts, "policy": self.policy}
        sample = Stage(f"best-of-n pool, seed {seed}", "sample", settings, inputs, size, seed=seed)
        return Stage(
            f"scores of the best-of-n pool, seed {seed}",
            "score",
            {},
            {"candidates": sample, "prompts": self.prompts, "reward model": self.reward_model},
            size,
            seed=seed,
        )

    def _decoding(self) -> dict[str, Any]:
        e = self.experiment
        return {
            "decoding": list(e.evaluation.decoding),
            "temperature": e.evaluation.temperature,
            "max_new_tokens": e.evaluation.max_new_tokens,
            "stop": list(e.sampling.stop),
            "sampler": self.backend.identity,
            "dtype": e.policy.dtype,
        }

    def train(self, row: str, method: MethodSettings, seed: int) -> Stage:
        e = self.experiment
        inputs = {"prompts": self.prompts, "policy": self.policy, "reward model": self.reward_model}
        if "candidates" in method.requires:
            inputs["pair scores"] = self.train_pairs
            if "model" in (method.sources or ()):
                inputs["scores"] = self.scores(method, "train", seed)
        settings = {
            "method": method.model_dump(mode="json", exclude=set(SEARCH_KEYS) if method.drawn else None),
            "seed": seed,
            "curve_points": e.evaluation.curve_points,
            "evaluation": self._decoding(),
        }
        if "sampler" in method.requires:
            settings["sampling"] = {
                "max_new_tokens": e.sampling.max_new_tokens,
                "stop": list(e.sampling.training_stop),
            }
        return Stage(
            f"train {row}, seed {seed}", "train", settings, inputs, method.budget(e.data.train_prompts), row, seed
        )

    def evaluate(self, row: str, method: MethodSettings | None, seed: int) -> Stage:
        inputs = {
            "prompts": self.prompts,
            "policy": self.policy,
            "reward model": self.reward_model,
            "perplexity model": self.perplexity_model,
        }
        prompts = self.experiment.evaluation.prompts
        settings: dict[str, Any] = {"seed": seed, "prompts": prompts, "evaluation": self._decoding()}
        if method is not None and method.family == "inference":
            settings["method"] = method.model_dump(mode="json", exclude=set(SEARCH_KEYS))
        elif method is not None:
            inputs["trained"] = self.train(row, method, seed)
        decodings = " and ".join(self.experiment.evaluation.decoding)
        size = f"{prompts} prompts, {decodings}"
        return Stage(f"evaluate {row}, seed {seed}", "evaluate", settings, inputs, size, row, seed)

    def evaluate_pairs(self, row: str) -> Stage:
        inputs = {
            "prompts": self.prompts,
            "policy": self.policy,  # whose tokens lengths are counted in
            "reward model": self.reward_model,
            "perplexity model": self.perplexity_model,
        }
        count = self.experiment.evaluation.prompts
        size = f"{count} replies of the data set"
        return Stage(f"evaluate {row} replies", "evaluate pairs", {"reply": row, "prompts": count}, inputs, size, row)


def _how(candidates: CandidateSettings) -> str:
    """How samples come about, for people."""
    if candidates.drawn:
        return f"n={candidates.n}, T={candidates.temperature}"
    if candidates.strategy == "beam":
        return f"beam search, beams={candidates.beams}"
    sizes = f"beams={candidates.beams}, groups={candidates.groups}, penalty={candidates.diversity_penalty}"
    return f"diverse beam search, {sizes}"


def _content(experiment: Experiment) -> str | None:
    """What decides files on disk: their contents, not their path."""
    if experiment.data.source != "files" or experiment.data.path is None:
        return None
    import hashlib

    from rrhf_bench.data.sources import find_files

    digest = hashlib.sha256()
    for path in find_files(experiment.data.path, None):
        digest.update(path.read_bytes())
    return digest.hexdigest()
