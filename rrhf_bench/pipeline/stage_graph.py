"""The stages of an experiment as data: what each needs, and the key of what it makes. Free of torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rrhf_bench.pipeline.judging import judge_identity
from rrhf_bench.pipeline.store import content_key, folder_identity
from rrhf_bench.sampling.backend import Backend, choose_backend
from rrhf_bench.settings.candidates import Beams, Candidates, Draw, GivenCandidates, Sampling, Strategy
from rrhf_bench.settings.experiment import (
    TOY_MODELS,
    WORLDS,
    Experiment,
    FileSource,
    ModelSettings,
    PolicySettings,
    Repetition,
    RewardModelSettings,
)
from rrhf_bench.settings.methods import MethodSettings, candidates_of

# Raised when a stage's code would give another result for the same settings: old artifacts are then not used.
VERSIONS = {
    "data": 3,
    "model": 2,
    "reward model": 1,
    "prompts": 3,
    "sample": 1,
    "file": 2,
    "score": 2,
    "judge": 1,
    "score pairs": 1,
    "reference": 1,
    "train": 11,
    "tune": 1,
    "evaluate": 5,
    "evaluate pairs": 1,
    "pair perplexity": 1,
    "filter": 1,
    "ensemble": 1,
}

# The version of the embedded world of dialogues. No other data depend on it.
WORLD = 2
# The version of the rules by which files and hub sets are read. The embedded worlds do not depend on them.
READER = 2
# The same for models of the hub and of folders: how their tokenizers are read, and which tokens end a reply.
MODEL_READER = 3


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
    trial: int = 0  # of tuning, from 1
    world: int | None = None  # of several that a plan has
    recorded: Mapping[str, Any] = field(default_factory=dict)  # settings that decide nothing: where a file lies

    @cached_property
    def key(self) -> str:
        own = {"kind": self.kind, "version": VERSIONS[self.kind], "settings": self.settings}
        return content_key({**own, "inputs": self.input_keys})

    @property
    def input_keys(self) -> dict[str, str]:
        return {role: stage.key for role, stage in self.inputs.items()}


@dataclass(frozen=True)
class Plan:
    experiment: Experiment
    backend: Backend
    wanted: tuple[Stage, ...]  # what the report reads, row by row; two rows of equal settings share a key
    # By row and number of the repetition: scored samples of each of its sources on the evaluation prompts.
    test_scores: Mapping[tuple[str, int], Mapping[str, Stage]] = field(default_factory=dict)
    # By name of [reward_models] and number of the repetition: its "model", and the scores of held-out "pairs" and of
    # the "pool".
    reward_models: Mapping[tuple[str, int], Mapping[str, Stage]] = field(default_factory=dict)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Return all stages, each key once, inputs before the stages that read them."""
        found: dict[str, Stage] = {}

        def visit(stage: Stage) -> None:
            if stage.key not in found:
                for needed in stage.inputs.values():
                    visit(needed)
                found[stage.key] = stage

        for stage in (*self.wanted, *(stage for own in self.reward_models.values() for stage in own.values())):
            visit(stage)
        return tuple(found.values())


# The rows of the tables that hold the data set's own replies.
PAIR_ROWS = ("chosen", "rejected")
OWN_REPLIES = frozenset({*PAIR_ROWS, "reply"})
# The row of the best replies that the embedded world of dialogues can write: the ceiling of the gold reward.
BEST_ROW = "best"


def make_plan(experiment: Experiment) -> Plan:
    """Return every stage of an experiment. Raises StoreError for a model folder that is not there."""
    backend = choose_backend(experiment.sampling.backend, device=experiment.runtime.device)
    number = {repetition: n for n, repetition in experiment.repetitions.items()}
    wanted: list[Stage] = []
    test_scores: dict[tuple[str, int], Mapping[str, Stage]] = {}
    reward_models: dict[tuple[str, int], Mapping[str, Stage]] = {}
    perplexity_model: Stage | None = None
    for world in experiment.worlds or (experiment.data.seed,):
        builder = _Builder(experiment.in_world(world), backend, perplexity_model)
        own_scores, own_models = builder.test_scores(), builder.reward_models()
        named = _of_world(world if experiment.several_worlds else None)
        perplexity_model = named(builder.perplexity_model)
        wanted += map(named, builder.all(own_scores))
        for found, own in ((test_scores, own_scores), (reward_models, own_models)):
            for (name, seed), stages in own.items():
                found[name, number[Repetition(world, seed)]] = {role: named(stage) for role, stage in stages.items()}
    return Plan(experiment, backend, tuple(wanted), test_scores, reward_models)


def _of_world(world: int | None) -> Callable[[Stage], Stage]:
    """Return a function that names the world of a stage and of its inputs; it leaves a single world's as they are."""
    found: dict[str, Stage] = {}

    def named(stage: Stage) -> Stage:
        if world is None or stage.world is not None:
            return stage
        if stage.key not in found:
            inputs = {role: named(needed) for role, needed in stage.inputs.items()}
            found[stage.key] = replace(stage, name=f"{stage.name}, world {world}", world=world, inputs=inputs)
        return found[stage.key]

    return named


@dataclass(frozen=True)
class _Builder:
    experiment: Experiment
    backend: Backend
    # The perplexity model of the first world judges all worlds, because its corpus asks about every topic.
    shared_perplexity_model: Stage | None = None
    trained: dict[tuple[str, int, int], Stage] = field(default_factory=dict)  # by row, rounds, seed

    def test_scores(self) -> dict[tuple[str, int], Mapping[str, Stage]]:
        """Return by row and seed the scored samples of its sources on the evaluation prompts."""
        return {
            (row, seed): self.scores(row, method, "test", seed)
            for seed in self.experiment.seeds
            for row, method in self.experiment.methods.items()
            if (candidates := candidates_of(method)) is not None and candidates.scored_by == "reward model"
        }

    def all(self, test_scores: Mapping[tuple[str, int], Mapping[str, Stage]]) -> Iterator[Stage]:
        e = self.experiment
        yield self.pair_scores("train", e.data.train_prompts)
        yield self.pair_scores("test", e.evaluation.pairs)
        for row in ("reply",) if e.data.rows == "texts" else PAIR_ROWS:
            yield self.evaluate_pairs(row)
        if e.data.source == "toy":
            yield self.evaluate_pairs(BEST_ROW)
        for seed in e.seeds:
            yield self.evaluate("base", None, seed)
            for name in e.policies:
                yield self.evaluate(name, None, seed, initial=name)
            yield self.pool(seed)
            for row, method in e.methods.items():
                if candidates_of(method) is not None:
                    yield from self.candidates(row, method, seed).values()
                    yield from test_scores.get((row, seed), {}).values()
                yield self.evaluate(row, method, seed, initial=method.initial)

    @cached_property
    def data(self) -> Stage:
        e = self.experiment
        settings = e.data.model_dump(mode="json", exclude={"train_prompts", "long_prompts"})
        if e.data.source not in WORLDS:
            del settings["toy"]
            settings["reader"] = READER
        if e.data.source == "toy":
            settings["world"] = WORLD
        content, recorded = None, {}
        if e.data.source == "files" and e.data.path is not None:  # what decides files is their content, not their path
            from rrhf_bench.data.rows import find_files

            digest = hashlib.sha256()
            for path in find_files(e.data.path):
                digest.update(path.read_bytes())
            content, recorded = digest.hexdigest(), {"path": settings.pop("path")}
        settings |= {"dev": e.evaluation.dev_prompts, "test": e.evaluation.pairs, "content": content}
        return Stage("data", "data", settings, {}, f"from {e.data.path or e.data.source}", recorded=recorded)

    def _model(self, name: str, settings: ModelSettings, corpus: str, start: Stage | None = None) -> Stage:
        if not settings.from_scratch:
            return Stage(name, "model", self._given(settings), {}, f"{settings.source}, as it is")
        scratch = settings.scratch
        size = f"Llama, {scratch.layers} layers of {scratch.hidden}, {scratch.epochs} epochs from "
        dump = scratch.model_dump(mode="json", exclude={"raw_epochs"})
        slice_ = {"scratch": dump, "corpus": corpus, "seed": self.experiment.data.seed}
        slice_ |= {} if settings.template == "hh" else {"template": settings.template}
        inputs = {"data": self.data} | ({} if start is None else {"start": start})
        return Stage(name, "model", slice_, inputs, size + ("scratch" if start is None else start.name))

    @cached_property
    def raw_policy(self) -> Stage:
        """Return the embedded world's model before instruction, from which "toy" goes on."""
        settings = self.experiment.policy
        scratch = settings.scratch.model_copy(update={"epochs": settings.scratch.raw_epochs})
        settings = settings.model_copy(update={"source": "toy", "scratch": scratch})
        return self._model("raw policy", settings, "raw_corpus")

    @cached_property
    def policy(self) -> Stage:
        """Return [policy], from which every row starts that names no other."""
        return self._policy("policy", self.experiment.policy)

    def _policy(self, name: str, settings: PolicySettings) -> Stage:
        row = settings.trained_by
        if row is not None:
            return self.train(row, self.experiment.methods[row], self.experiment.seeds[0])
        if settings.source == "toy-raw":
            return self.raw_policy
        instructed = settings.source == "toy" and self.experiment.data.source == "toy"
        return self._model(name, settings, "corpus", self.raw_policy if instructed else None)

    def initial(self, name: str | None) -> Stage:
        """Return the initial policy of that name in [policies], or [policy]."""
        return self.policy if name is None else self._policy(f"policy {name}", self.experiment.policies[name])

    def _dtype(self, name: str | None) -> str:
        settings = self.experiment.policy if name is None else self.experiment.policies[name]
        row = settings.trained_by
        return settings.dtype if row is None else self._dtype(self.experiment.methods[row].initial)

    @cached_property
    def perplexity_model(self) -> Stage:
        """Return the model that judges fluency, which all embedded worlds of a run share."""
        return self.shared_perplexity_model or self._model(
            "perplexity model", self.experiment.perplexity_model, "perplexity_corpus"
        )

    @cached_property
    def reward_model(self) -> Stage:
        return self._reward_model("reward model", self.experiment.reward_model, self.experiment.data.seed)

    @cached_property
    def pair_perplexities(self) -> Stage:
        """Return the stage that computes what all filters read, whatever their seed and options."""
        inputs = {"data": self.data, "policy": self.policy}
        return Stage("perplexities of the training pairs", "pair perplexity", {}, inputs, "under policy")

    def _reward_model(self, name: str, settings: RewardModelSettings, seed: int) -> Stage:
        if not settings.from_scratch:
            return Stage(name, "reward model", self._given(settings), {}, f"{settings.source}, as it is")
        training, data = settings.training, self.data
        if training.filter is not None:
            filter_ = training.filter.model_dump(mode="json", exclude_none=True)
            own = {"filter": filter_, "seed": seed if training.filter.keep == "random" else 0}
            size = f"{training.filter.keep}, by perplexity"
            inputs = {"data": data, "perplexities": self.pair_perplexities}
            data = Stage(f"pairs of {name}", "filter", own, inputs, size)
        dump = training.model_dump(mode="json", exclude={"filter", "ensemble"})
        inputs, size = {"data": data, "policy": self.policy}, "Bradley-Terry on the labelled pairs"
        if training.ensemble is None:
            return Stage(name, "reward model", {"training": dump, "seed": seed}, inputs, size)
        members = {
            f"member {i}": Stage(f"{name}, member {i}", "reward model", {"training": dump, "seed": own}, inputs, size)
            for i, own in enumerate(training.ensemble.seeds(seed))
        }
        together = {"ensemble": training.ensemble.model_dump(mode="json")}
        together |= training.model_dump(mode="json", include={"pairs", "ties"}, exclude_defaults=True)
        return Stage(name, "ensemble", together, {"data": data, **members}, training.ensemble.combine)

    def reward_models(self) -> dict[tuple[str, int], Mapping[str, Stage]]:
        """Return the stages of [reward_models]. A model that is trained here has one of each seed."""
        found: dict[tuple[str, int], Mapping[str, Stage]] = {}
        for name, settings in self.experiment.reward_models.items():
            for seed in self.experiment.seeds if settings.from_scratch else self.experiment.seeds[:1]:
                model = self._reward_model(f"reward model {name}, seed {seed}", settings, seed)
                pairs = self.pair_scores("test", self.experiment.evaluation.pairs, model)
                pool = self._scored(self.pool(seed).inputs["candidates"], model)
                found[name, seed] = {"model": model, "pairs": pairs, "pool": pool}
        return found

    def _given(self, settings: ModelSettings | RewardModelSettings) -> dict[str, Any]:
        """Return the settings of a model that is used as it is: a folder by its content, a hub model by id, revision.

        The settings of an adapter's folder have the content of its base as well.
        """
        dump: dict[str, Any] = {"reader": MODEL_READER}
        dump |= settings.model_dump(mode="json", exclude={"scratch", "training", "part"})
        folder = Path(settings.source)
        if folder.is_dir():
            dump["identity"] = folder_identity(folder)
            base = _base_folder(folder)
            dump |= {} if base is None else {"base": folder_identity(base)}
        return dump

    @cached_property
    def prompts(self) -> Stage:
        """Return the stage of the training, dev and test prompts that fit the context of every initial policy."""
        e = self.experiment
        # A row's result reads as what it started from. What a policy is called decides nothing, nor which comes first.
        others = {
            self.initial(name).key: self.initial(name)
            for name, policy in e.policies.items()
            if policy.trained_by is None and not _read_alike(policy, e.policy)
        }
        others = {f"policy {i}": others[key] for i, key in enumerate(sorted(others), 1) if key != self.policy.key}
        settings = {
            "train_prompts": e.data.train_prompts,
            "long_prompts": e.data.long_prompts,
            "template": e.policy.template,
            "new_tokens": max(e.sampling.max_new_tokens, e.evaluation.max_new_tokens),
        }
        size = f"{e.data.train_prompts} to train on, {e.evaluation.dev_prompts} dev, {e.evaluation.prompts} to evaluate"
        return Stage("prompts", "prompts", settings, {"data": self.data, "policy": self.policy, **others}, size)

    def _sampler(self, strategy: Strategy) -> str:
        """Return the identity of the sampler that serves a strategy."""
        return choose_backend(self.experiment.sampling.backend, strategy, self.experiment.runtime.device).identity

    def sample(self, samples: Sampling, model: Stage, dtype: str, split: str, seed: int) -> Stage:
        """Return the stage of a model's candidates; seeds share the results of a search if they share the model."""
        sampling = self.experiment.sampling
        drawn = isinstance(samples, Draw)
        settings = {
            **samples.arguments(),
            "max_new_tokens": sampling.max_new_tokens,
            "stop": list(sampling.training_stop),
            "split": split,
            "sampler": self._sampler(samples.strategy),
            "dtype": dtype,
        }
        settings |= {"seed": seed} if drawn else {}
        count = self.experiment.data.train_prompts
        if split == "test":
            count = settings["prompts"] = self.experiment.evaluation.prompts
        whose = "" if model is self.policy else f" of {model.name.removeprefix('train ')}"
        return Stage(
            f"candidates{whose} for {split} prompts ({_how(samples)})" + (f", seed {seed}" if drawn else ""),
            "sample",
            settings,
            {"prompts": self.prompts, "policy": model},
            f"{count} prompts x {samples.n}",
            seed=seed if drawn else model.seed,
        )

    def samples(self, row: str, method: MethodSettings, split: str, seed: int) -> dict[str, Stage]:
        """Return by source the responses that a row has before it trains, without the data set's own."""
        e, candidates = self.experiment, _candidates(method)
        found = {}
        for name in candidates.sources:
            source = e.sources.get(name)
            if isinstance(source, FileSource):
                if split == "train":
                    found[name] = self._file(name, source, candidates.scored_by == "file")
            elif source is not None:
                of_row = e.methods.get(source.model) if source.model not in e.policies else None
                model = self.initial(source.model) if of_row is None else self.train(source.model, of_row, seed)
                dtype = self._dtype(source.model if of_row is None else of_row.initial)
                found[name] = self.sample(source, model, dtype, split, seed)
            elif name == "model" and not candidates.refresh:
                assert not isinstance(candidates, GivenCandidates)
                model = self.initial(method.initial)
                if candidates.rounds > 1:
                    before = candidates.model_copy(update={"rounds": candidates.rounds - 1})
                    model = self.train(row, method.model_copy(update={"candidates": before}), seed)
                found[name] = self.sample(candidates, model, self._dtype(method.initial), split, seed)
        return found

    def _file(self, name: str, source: FileSource, scored: bool) -> Stage:
        content = hashlib.sha256(Path(source.file).read_bytes()).hexdigest()
        settings = {"content": content, "name": name, "scored": scored}
        inputs, where = {"prompts": self.prompts}, {"path": source.file}
        return Stage(f"responses of {name}", "file", settings, inputs, f"from {source.file}", recorded=where)

    def scores(self, row: str, method: MethodSettings, split: str, seed: int) -> dict[str, Stage]:
        """Return the same with the reward model's scores."""
        return {name: self._scored(sample) for name, sample in self.samples(row, method, split, seed).items()}

    def _scored(self, sample: Stage, reward: Stage | None = None) -> Stage:
        inputs = {"candidates": sample, "prompts": self.prompts, "reward model": reward or self.reward_model}
        by = f" by {reward.name}" if reward else ""
        return Stage(f"scores of {sample.name}{by}", "score", {}, inputs, sample.size, seed=sample.seed)

    def candidates(self, row: str, method: MethodSettings, seed: int) -> dict[str, Stage]:
        """Return by role in training the scored responses that a row trains on, without the data set's own."""
        scored_by = _candidates(method).scored_by
        if scored_by == "judge":
            return {"judged": self._judged(row, method, seed)}
        scored = (self.samples if scored_by == "file" else self.scores)(row, method, "train", seed)
        return {f"scores {name}": stage for name, stage in scored.items()}

    def _references(self, method: MethodSettings, candidates: Mapping[str, Stage]) -> dict[str, Stage]:
        """Return by role in training the log-probs of the responses that a row trains on, under its initial policy.

        A stage depends on a set of responses and on the initial policy alone, so rows share it.
        """
        initial = self.initial(method.initial)
        settings, shared = {"dtype": self._dtype(method.initial)}, {"prompts": self.prompts, "policy": initial}

        def stage(whose: str, inputs: Mapping[str, Stage], size: str, seed: int | None) -> Stage:
            name = f"log-probs of {whose} under {initial.name}"
            return Stage(name, "reference", settings, {**shared, **inputs}, size, seed=seed)

        found = {
            f"reference {role}": stage(own.name.removeprefix("scores of "), {"candidates": own}, own.size, own.seed)
            for role, own in candidates.items()
        }
        trained_on = candidates_of(method)
        # The data set's own replies are no candidates of a stage, unless a judge has rated them with the others.
        if trained_on is None or ("judged" not in candidates and not OWN_REPLIES.isdisjoint(trained_on.sources)):
            size = f"{self.experiment.data.train_prompts} pairs"
            found["reference pairs"] = stage("the training pairs", {}, size, None)
        return found

    def _judged(self, row: str, method: MethodSettings, seed: int) -> Stage:
        """Return the stage that rates whole groups: a judge reads all responses to a prompt together."""
        judge = self.experiment.judge
        assert judge is not None
        samples = self.samples(row, method, "train", seed)
        settings = {"identity": judge_identity(judge), "sources": list(_candidates(method).sources)}
        inputs = {"prompts": self.prompts} | {f"candidates {name}": stage for name, stage in samples.items()}
        size = f"{self.experiment.data.train_prompts} prompts x {self.experiment.responses(method)}"
        recorded = {"judge": judge.model_dump(mode="json")}  # where it listens may change from run to run
        name = f"ratings of the candidates of {self._whose(row, method)}, seed {seed}"
        return Stage(name, "judge", settings, inputs, size, row, seed, recorded=recorded)

    def pair_scores(self, split: str, count: int, reward: Stage | None = None) -> Stage:
        inputs = {"prompts": self.prompts, "reward model": reward or self.reward_model}
        by = f" by {reward.name}" if reward else ""
        return Stage(f"scores of {split} pairs{by}", "score pairs", {"split": split}, inputs, f"{count} pairs")

    def pool(self, seed: int) -> Stage:
        """Return the stage of the pool that best-of-n is estimated from: samples of the initial policy.

        The pool has the evaluation's prompts, temperature and top-k. Its n = 1 point is then the policy whose replies
        are evaluated beside it.
        """
        n, prompts = self.experiment.evaluation.pool_samples, self.experiment.evaluation.pool_prompts
        settings = self._decoding(None) | {"n": n, "top_p": 1.0, "split": "pool", "prompts": prompts, "seed": seed}
        del settings["decoding"]
        size = f"{prompts} prompts x {n}"
        inputs = {"prompts": self.prompts, "policy": self.policy}
        return self._scored(Stage(f"best-of-n pool, seed {seed}", "sample", settings, inputs, size, seed=seed))

    def _decoding(self, initial: str | None) -> dict[str, Any]:
        e = self.experiment
        own = e.evaluation.model_dump(mode="json", include={"decoding", "temperature", "top_k", "max_new_tokens"})
        stop = list(e.sampling.stop)
        return {**own, "stop": stop, "sampler": self.backend.identity, "dtype": self._dtype(initial)}

    def train(self, row: str, method: MethodSettings, seed: int) -> Stage:
        """Return the stage whose model is a row's: of several rounds the last; of a tuned row the best trial.

        Seeds after the first train with the settings of the best trial.
        """
        made = (row, _rounds(method), seed)
        if made not in self.trained:
            tuned = self._tuned(row, method) if row in self.experiment.tune else None
            if tuned is None:
                self.trained[made] = self._train(row, method, seed)
            elif seed == self.experiment.seeds[0]:
                self.trained[made] = tuned
            else:
                self.trained[made] = self._train(row, method, seed, tuned=tuned)
        return self.trained[made]

    def _tuned(self, row: str, method: MethodSettings) -> Stage:
        """Return the stage that picks the best of a row's trials by their reward on the dev prompts."""
        e = self.experiment
        trials, seed = e.trials(row), e.seeds[0]
        trained = {
            f"trial {i}": self._train(row, method.changed(values), seed, trial=i) for i, values in enumerate(trials, 1)
        }
        settings = {"trials": trials, "decoding": e.evaluation.decoding[0]}
        return Stage(f"tune {row}, seed {seed}", "tune", settings, trained, f"{len(trials)} trials", row, seed)

    def _train(
        self, row: str, method: MethodSettings, seed: int, *, trial: int = 0, tuned: Stage | None = None
    ) -> Stage:
        e = self.experiment
        initial = self.initial(method.initial)
        inputs = {"prompts": self.prompts, "policy": initial, "reward model": self.reward_model}
        candidates = candidates_of(method)
        responses: Mapping[str, Stage] = {}
        if candidates is not None:
            responses = self.candidates(row, method, seed)
            inputs |= {"pair scores": self.pair_scores("train", e.data.train_prompts), **responses}
        if "reference" in method.requires and "sampler" not in method.needs:
            inputs |= self._references(method, responses)
        inputs |= {} if tuned is None else {"tuned": tuned}
        # The inputs hold the initial policy, and the samples of the model of the round before.
        unread: Any = {"initial": True, "candidates": {"rounds"}}
        settings = {
            "method": method.model_dump(mode="json", exclude=unread, exclude_none=True),
            "seed": seed,
            "curve_points": e.evaluation.curve_points,
            **({"curve_kl": True} if e.evaluation.curve_kl else {}),
            "evaluation": self._decoding(method.initial),
        }
        if "sampler" in method.needs:
            settings["sampling"] = {
                "max_new_tokens": e.sampling.max_new_tokens,
                "stop": list(e.sampling.training_stop),
                "sampler": self._sampler("sample" if candidates is None else candidates.strategy),
            }
        size = method.budget(e.data.train_prompts, e.responses(method))
        whose = self._whose(row, method) + (f", trial {trial}" if trial else "")
        return Stage(f"train {whose}, seed {seed}", "train", settings, inputs, size, row, seed, trial)

    def _whose(self, row: str, method: MethodSettings) -> str:
        """Return the name of a row, or of a round of it before its last."""
        last = _rounds(method) == _rounds(self.experiment.methods[row])
        return row if last else f"round {_rounds(method)} of {row}"

    def evaluate(self, row: str, method: MethodSettings | None, seed: int, initial: str | None = None) -> Stage:
        inputs = self._judging(self.initial(initial))
        prompts = self.experiment.evaluation.prompts
        settings: dict[str, Any] = {"seed": seed, "prompts": prompts, "evaluation": self._decoding(initial)}
        if method is not None and method.family == "inference":
            settings["method"] = method.model_dump(mode="json", exclude={"initial"}, exclude_none=True)
        elif method is not None:
            inputs["trained"] = self.train(row, method, seed)
        decodings = " and ".join(self.experiment.evaluation.decoding)
        size = f"{prompts} prompts, {decodings}"
        return Stage(f"evaluate {row}, seed {seed}", "evaluate", settings, inputs, size, row, seed)

    def evaluate_pairs(self, row: str) -> Stage:
        """Return the stage that judges replies that no model wrote; their lengths are in tokens of [policy]."""
        count = self.experiment.evaluation.prompts
        settings = {"reply": row, "prompts": count}
        size = f"{count} {'best replies of the world' if row == BEST_ROW else 'replies of the data set'}"
        return Stage(f"evaluate {row} replies", "evaluate pairs", settings, self._judging(self.policy), size, row)

    def _judging(self, policy: Stage) -> dict[str, Stage]:
        judges = {"reward model": self.reward_model, "perplexity model": self.perplexity_model}
        return {"prompts": self.prompts, "policy": policy, **judges}


def _read_alike(one: PolicySettings, other: PolicySettings) -> bool:
    """Return True if two policies surely share one tokenizer and one context, those of the embedded world."""
    if one.source not in TOY_MODELS or other.source not in TOY_MODELS:
        return False
    sizes = [(policy.scratch.vocabulary, policy.scratch.context) for policy in (one, other)]
    return one.source == "toy-raw" or sizes[0] == sizes[1]


def _base_folder(folder: Path) -> Path | None:
    """Return the folder of the base model that an adapter's folder names, or None."""
    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        found = Path(base)
    except (OSError, ValueError, TypeError, KeyError):  # no adapter, or one that loading refuses
        return None
    return found if found.is_dir() else None


def _candidates(method: MethodSettings) -> Candidates:
    """Return where the candidates of a row come from that trains on some."""
    candidates = candidates_of(method)
    assert candidates is not None, f"{method.kind} trains on no candidates"
    return candidates


def _rounds(method: MethodSettings) -> int:
    candidates = candidates_of(method)
    return 1 if candidates is None else candidates.rounds


def _how(samples: Sampling) -> str:
    """Return how samples are made, in words."""
    if isinstance(samples, Draw):
        top_p = f", top-p={samples.top_p}" if samples.top_p != 1.0 else ""
        top_k = f", top-k={samples.top_k}" if samples.top_k else ""
        return f"n={samples.n}, T={samples.temperature}{top_p}{top_k}"
    if isinstance(samples, Beams):
        return f"beam search, beams={samples.beams}"
    sizes = f"beams={samples.beams}, groups={samples.groups}, penalty={samples.diversity_penalty}"
    return f"diverse beam search, {sizes}"
