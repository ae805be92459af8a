"""The single steps on plain files: the stages' code without a store."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from rrhf_bench.data.dialogue import TemplateKind
from rrhf_bench.data.preferences import PreferenceData, holds_pairs, load_pairs
from rrhf_bench.data.prompts import fit_context, load_prompts
from rrhf_bench.data.rows import FaultyRows
from rrhf_bench.data.rrhf_files import count_candidates, load_candidates, write_rrhf
from rrhf_bench.data.toy.gold import topic_of
from rrhf_bench.errors import ConfigError, DataError
from rrhf_bench.jsonl import write_jsonl
from rrhf_bench.pipeline import stage_helpers
from rrhf_bench.pipeline.candidates import assemble, pair_candidates, permute_rewards
from rrhf_bench.pipeline.services import FILE, DistinctTexts, ModelRef, Services, context_of, reward_template
from rrhf_bench.pipeline.store import replace_path
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.records import Candidates, Decoding, Evaluated, Preference, Prompt
from rrhf_bench.rewards.gold import Gold
from rrhf_bench.sampling.backend import BackendName
from rrhf_bench.sampling.sampler import SamplingSpec
from rrhf_bench.settings.experiment import RuntimeSettings
from rrhf_bench.settings.methods import MethodSettings, candidates_of
from rrhf_bench.training.method import TrainContext, TrainInputs, TrainResult
from rrhf_bench.training.reference import response_logprobs

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class PlainSteps:
    """The steps on plain files. ``faulty_rows`` "drop" leaves out and counts the rows that a step cannot use.

    The counts of a step with a reward model have ``truncated``: the texts that were cut to the length that it reads.
    ``note`` receives what its checks warn of, one line each.
    """

    runtime: RuntimeSettings
    backend: BackendName
    progress: Report
    faulty_rows: FaultyRows = "error"
    note: Callable[[str], None] = lambda text: None

    @cached_property
    def services(self) -> Services:
        return Services(self.runtime)

    def sample(
        self, model: ModelRef, prompts: Path, out: Path, spec: SamplingSpec, sources: Sequence[str]
    ) -> Mapping[str, int]:
        """Sample n responses a prompt, write them in the RRHF layout without scores, and return counts of the input."""
        read = read_prompts(prompts, verbatim=model.template == "raw", faulty_rows=self.faulty_rows)
        if {"chosen", "rejected"} & set(sources) and not read.pairs:
            raise DataError(f'{prompts}: has no "chosen" and "rejected", which --sources {",".join(sources)} needs')
        with replace_path(out) as path:
            policy, new_tokens = self.services.fixed_policy(model), spec.max_new_tokens
            read = self._usable(read, [policy], _room(policy, model, new_tokens))
            sampler = self.services.sampler_for(policy, model, self.backend, read.prompts, new_tokens, self.progress)
            sampled = sampler.sample(read.prompts, spec)
            pairs = pair_candidates(read.pairs)
            write_rrhf(path, assemble(sources, {"model": sampled}, pairs) if pairs else sampled)
        return read.counts

    def score(self, reward: ModelRef, candidates: Path, out: Path) -> dict[str, int]:
        """Score every response of a file, write it again with ``scores``, and return counts of what is odd."""
        verbatim = reward_template(reward) == "raw"
        read = load_candidates(candidates, scored=False, verbatim=verbatim, faulty_rows=self.faulty_rows)
        with replace_path(out) as path:
            model = self._reward(reward)
            groups, refused = self._fit(read.candidates, model.prompt_length, sys.maxsize, read.places)
            scored = stage_helpers.score_shared_candidates(model, groups, reward.source, self.progress)
            write_rrhf(path, scored)
        return {**read.counts, **refused, **count_candidates(scored), "truncated": model.truncated}

    def score_pairs(self, reward: ModelRef, data: Path) -> tuple[list[Candidates], list[str], dict[str, int]]:
        """Return (the scored replies of each pair of a file, the cluster of each pair, counts). Ties are left out."""
        read = load_pairs(data, faulty_rows=self.faulty_rows)
        decided = _decided(read, data)
        model = self._reward(reward)
        pairs, refused = fit_context(
            decided, model.prompt_length, sys.maxsize, faulty_rows=self.faulty_rows, places=read.places
        )
        scored = stage_helpers.score_shared_candidates(model, pair_candidates(pairs), reward.source, self.progress)
        counts = {**read.counts, "refused_by_template": refused["refused_by_template"], "truncated": model.truncated}
        return scored, [pair.cluster or pair.prompt.id for pair in pairs], counts

    def train(
        self,
        method: MethodSettings,
        model: ModelRef,
        data: Path,
        out: Path,
        *,
        seed: int,
        reward: ModelRef | None,
        max_new_tokens: int,
        stop: tuple[str, ...],
    ) -> TrainResult:
        """Train a policy by one method and write a transformers folder with ``metrics.jsonl`` beside its weights."""
        services, needs = self.services, method.needs
        if "reward" in needs and reward is None:
            raise DataError(f"{method.kind}: scores its own samples; name a reward model with --reward-model")
        read = _train_rows(method, data, model.template == "raw", self.faulty_rows)
        policy = services.policy_to_train(model)
        context = context_of(policy, model)
        # The offline loop itself leaves long prompts out and counts them; a sampler stops at the first.
        limit = _room(policy, model, max_new_tokens) if "sampler" in needs else sys.maxsize
        usable, fitted = self._fit(read.groups, _prompt_length([policy]), limit, read.places)
        candidates = candidates_of(method)
        if candidates is not None and candidates.permute_rewards:
            usable = tuple(permute_rewards(usable, seed))
        prompts = {row.prompt for row in usable}
        inputs = TrainInputs([pair for pair in read.pairs if pair.prompt in prompts], usable)
        reads_reference = {"reference", "sampler"} <= needs
        if "reference" in method.requires and not reads_reference:
            groups = [*pair_candidates(inputs.preferences), *inputs.candidates]
            inputs = replace(inputs, reference=response_logprobs(policy, groups, max_length=context))
        unadapted = stage_helpers.adapt(policy, method, seed)
        log: list[Mapping[str, float]] = []
        with replace_path(out) as folder:
            folder.mkdir()
            judge = None if reward is None else self._reward(reward)
            sampler = None
            if "sampler" in needs:
                sampler = services.sampler_for(policy, model, self.backend, inputs.prompts, max_new_tokens)
            train_context = TrainContext(
                seed=seed,
                sampler=sampler,
                reward=judge,
                reference=(unadapted or services.fixed_policy(model)) if reads_reference else None,
                watch=lambda progress, _: self.progress(round(1000 * progress.fraction), 1000),
                log=log.append,
                max_new_tokens=max_new_tokens,
                stop=stop,
            )
            result = stage_helpers.trainer(method, context).fit(policy, inputs, train_context)
            policy.save(folder)
            write_jsonl(folder / "metrics.jsonl", log)
        truncated = {} if judge is None else {"truncated": judge.truncated}
        return replace(result, counts={**read.counts, **result.counts, **fitted, **truncated})

    def evaluate(
        self,
        model: ModelRef,
        reward: ModelRef,
        prompts: Path,
        out: Path,
        *,
        name: str,
        seed: int,
        decodings: Mapping[Decoding, SamplingSpec],
        initial: ModelRef | None,
        perplexity: ModelRef | None,
        gold: bool,
    ) -> tuple[list[Evaluated], dict[str, int]]:
        """Write one judged record for each prompt and decoding as JSON lines; return them and counts of the input.

        Raises DataError if the vocabulary of ``initial`` is not that of ``model``, or if ``gold`` is asked for and a
        prompt is not of the embedded world.
        """
        read = read_prompts(prompts, verbatim=model.template == "raw", faulty_rows=self.faulty_rows)
        if gold:
            _require_embedded_world(read.prompts, prompts)
        with replace_path(out) as path:
            services = self.services
            policy = services.policy(model)
            reference = None
            if initial is not None:
                reference = services.fixed_policy(initial)
                if not policy.tokenization.has_vocabulary_of(reference.tokenization):
                    raise DataError(
                        f"--initial {initial.source}: has another vocabulary than --model {model.source}, so that a KL "
                        "has no meaning; name the policy that the model was trained from, or leave --initial out"
                    )
            new_tokens = max(spec.max_new_tokens for spec in decodings.values())
            policies = [policy] if reference is None else [policy, reference]
            read = self._usable(read, policies, _room(policy, model, new_tokens))
            judge = self._reward(reward)
            fluency = None if perplexity is None else services.fixed_policy(perplexity)
            judges = stage_helpers.Judges(judge, Gold() if gold else None, fluency, self.runtime.score_batch)
            sampler = services.sampler_for(policy, model, self.backend, read.prompts, new_tokens, self.progress)
            records = stage_helpers.evaluate(name, seed, sampler, read.prompts, judges, decodings, policy, reference)
            write_jsonl(path, records)
        return records, {**read.counts, "truncated": judge.truncated}

    def _reward(self, ref: ModelRef) -> DistinctTexts:
        """Return the reward model, after a note for each warning of its checks."""
        reward = self.services.reward(ref)
        for check in reward.checks:
            if check.ok is False:
                self.note(f"{ref.source}: {check.name}: {check.found}")
        return reward

    def _usable(self, read: Questions, policies: Sequence[TransformersPolicy], limit: int) -> Questions:
        """Return the prompts that leave room for a reply and that the policies' chat templates render."""
        groups, counts = self._fit(read.groups, _prompt_length(policies), limit, read.places)
        kept = {group.prompt for group in groups}
        pairs = [pair for pair in read.pairs if pair.prompt in kept]
        return Questions(pairs, groups, {**read.counts, **counts}, read.places)

    def _fit(
        self,
        rows: Sequence[Candidates],
        prompt_length: Callable[[Prompt], int],
        limit: int,
        places: Mapping[Prompt, str],
    ) -> tuple[tuple[Candidates, ...], dict[str, int]]:
        """Return (the rows whose prompts the models of a step can be given, counts of the others)."""
        drop = self.faulty_rows
        kept, counts = fit_context(rows, prompt_length, limit, long_prompts=drop, faulty_rows=drop, places=places)
        return kept, {name: count for name, count in counts.items() if count and name != "kept"}


def _room(policy: TransformersPolicy, model: ModelRef, new_tokens: int) -> int:
    """Return the most tokens of a prompt. Raises ConfigError if a reply alone may fill the context."""
    context = context_of(policy, model)
    if new_tokens >= context:
        raise ConfigError(
            f"--max-new-tokens: found {new_tokens}; expected fewer than the {context} tokens of the context of "
            f"{model.source}, which a prompt and its reply share"
        )
    return context - new_tokens


def _prompt_length(policies: Sequence[TransformersPolicy]) -> Callable[[Prompt], int]:
    """Return a function that counts the tokens of a prompt by the policy that needs the most."""
    return lambda prompt: max(len(policy.tokenization.prompt_ids(prompt)) for policy in policies)


def _require_embedded_world(prompts: Sequence[Prompt], path: Path) -> None:
    """Raise DataError if the gold reward is not defined for one of the prompts of a file."""
    for prompt in prompts:
        try:
            topic_of(prompt.text)
        except DataError as error:
            raise DataError(f"--gold: {path}: {error}; leave --gold out") from error


class Questions(NamedTuple):
    """The rows of a file: a group for each prompt, without responses if the file holds no candidates, and its pairs.

    ``places`` names file and line of each prompt.
    """

    pairs: Sequence[Preference]
    groups: Sequence[Candidates]
    counts: Mapping[str, int]
    places: Mapping[Prompt, str]

    @property
    def prompts(self) -> list[Prompt]:
        return [group.prompt for group in self.groups]


def read_prompts(path: Path, *, verbatim: bool = False, faulty_rows: FaultyRows = "error") -> Questions:
    """Return the prompts of a file of prompts or preferences, which the first row decides.

    Ties are left out, as in an experiment, and ``ties`` counts them. With ``verbatim`` the prompts of a file of prompts
    are any text, which is not changed.
    """
    if holds_pairs(path):
        data = load_pairs(path, faulty_rows=faulty_rows)
        pairs = _decided(data, path)
        return Questions(pairs, [Candidates(pair.prompt, ()) for pair in pairs], data.counts, data.places)
    read = load_prompts(path, verbatim=verbatim, faulty_rows=faulty_rows)
    return Questions([], [Candidates(prompt, ()) for prompt in read.prompts], read.counts, read.places)


def _decided(read: PreferenceData, path: Path) -> list[Preference]:
    """Return the pairs that are no ties. Raises DataError if there is none."""
    decided = [pair for pair in read.preferences if not pair.tie]
    if not decided:
        raise DataError(f"{path}: found {len(read.preferences)} ties and no other pair; expected pairs with a label")
    return decided


def _train_rows(method: MethodSettings, data: Path, verbatim: bool, faulty_rows: FaultyRows) -> Questions:
    """Return scored candidates, pairs or prompts alone, as the method requires."""
    if candidates_of(method) is not None:
        scored = load_candidates(data, verbatim=verbatim, faulty_rows=faulty_rows)
        return Questions([], scored.candidates, scored.counts, scored.places)
    read = read_prompts(data, verbatim=verbatim, faulty_rows=faulty_rows)
    if "pairs" in method.requires and not read.pairs:
        raise DataError(f'{data}: {method.kind} trains on pairs; expected lines with "chosen" and "rejected"')
    return read


def model_ref(
    source: str, *, default_template: TemplateKind = "hh", prefix: str = "", **options: str | None
) -> ModelRef:
    """Return the reference of a model named on the command line; None is an option that was not given.

    ``options`` are fields of a ModelRef. The folder of an artifact stands for the model in it. Raises ConfigError if a
    given option differs from what the artifact says; ``prefix`` is how the options that every model has begin in that
    message, such as "reward-".
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if is_artifact(source):
        ref = ModelRef.read(Path(source))
        for name, value in given.items():
            if value != (said := getattr(ref, name)):
                option = (prefix if name in ("template", "dtype", "pad_token") else "") + name.replace("_", "-")
                raise ConfigError(
                    f"--{option}: found {value!r}, but the artifact {source} says {said!r}; leave the "
                    f"option out, or name the model itself, {ref.source}"
                )
        return ref
    folder = Path(source)
    place = str(folder.resolve()) if folder.is_dir() else source
    return ModelRef(place, **{"template": default_template, **given})


def is_artifact(source: str) -> bool:
    """Return True if a model named on the command line is the folder of an artifact."""
    return (Path(source) / FILE).is_file()


def pad_token_of(source: str, sources: Sequence[str | None], pad_token: str | None) -> str | None:
    """Return the --pad-token that one of the models gets that share this option.

    The option serves the models that are no artifacts, if there is one; an artifact then keeps its own pad token.
    """
    serves_others = any(other is not None and not is_artifact(other) for other in sources)
    return None if serves_others and is_artifact(source) else pad_token
