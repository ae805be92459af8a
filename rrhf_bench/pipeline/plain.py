"""The single steps on plain files, for people who bring their own: the stages' code without a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rrhf_bench.data.dialogue import TemplateKind
from rrhf_bench.data.sources import load_candidates, load_pairs, load_prompts, write_rrhf
from rrhf_bench.data.toy.gold import topic_of
from rrhf_bench.errors import ConfigError, DataError
from rrhf_bench.experiment import Dtype, RuntimeSettings
from rrhf_bench.jsonl import read_objects, write_jsonl
from rrhf_bench.pipeline import steps
from rrhf_bench.pipeline.candidates import assemble, pair_candidates
from rrhf_bench.pipeline.services import FILE, ModelRef, Services, context_of
from rrhf_bench.pipeline.store import replacing
from rrhf_bench.policy.policy import Tokenization
from rrhf_bench.records import Candidates, Decoding, Evaluated, Preference, Prompt
from rrhf_bench.rewards.gold import GoldReward
from rrhf_bench.sampling.backend import BackendName
from rrhf_bench.sampling.sampler import SamplingSpec
from rrhf_bench.settings import MethodSettings
from rrhf_bench.training.method import TrainContext, TrainInputs, TrainResult

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class PlainSteps:
    """What every plain-file step needs: the machine, the sampler's backend, where progress goes."""

    runtime: RuntimeSettings
    backend: BackendName
    progress: Report

    def sample(
        self, model: ModelRef, prompts: Path, out: Path, spec: SamplingSpec, sources: Sequence[str]
    ) -> dict[str, int]:
        """Sample n responses a prompt and write them in the RRHF layout, without scores; counts of what was read."""
        pairs, questions, counts = read_prompts(prompts, verbatim=model.template == "raw")
        if {"chosen", "rejected"} & set(sources) and not pairs:
            raise DataError(
                f'{prompts}: has no "chosen" and "rejected"; they are needed for --sources {",".join(sources)}'
            )
        with replacing(out) as path:
            services = Services(self.runtime)
            policy = services.fixed_policy(model)
            sampled = services.sampler(policy, model, self.backend, self.progress).sample(questions, spec)
            write_rrhf(path, assemble(sources, {"model": sampled}, pair_candidates(pairs)) if pairs else sampled)
        return counts

    def score(self, reward: ModelRef, candidates: Path, out: Path) -> dict[str, int]:
        """Score every response of a file, write the file again with ``scores``, and return counts of what is odd."""
        rows = load_candidates(candidates, scored=False).candidates
        with replacing(out) as path:
            model = Services(self.runtime).reward(reward)
            write_rrhf(path, steps.score_shared_candidates(model, rows, reward.source, self.progress))
        return dict(load_candidates(out).counts)

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
        services = Services(self.runtime)
        if "reward" in method.needs and reward is None:
            raise DataError(f"{method.kind}: scores its own samples; name a reward model with --reward-model")
        inputs, counts = _train_inputs(method, data)
        policy = services.policy(model)
        unadapted = steps.adapt(policy, method, seed)
        log: list[Mapping[str, float]] = []
        with replacing(out) as folder:
            folder.mkdir()
            context = TrainContext(
                seed=seed,
                sampler=services.sampler(policy, model, self.backend) if "sampler" in method.needs else None,
                reward=services.reward(reward) if reward is not None else None,
                reference=(unadapted or services.fixed_policy(model)) if "reference" in method.needs else None,
                watch=lambda progress, _: self.progress(round(1000 * progress.fraction), 1000),
                log=log.append,
                max_new_tokens=max_new_tokens,
                stop=stop,
            )
            result = steps.trainer(method, context_of(policy, model)).fit(policy, inputs, context)
            policy.save(folder)
            write_jsonl(folder / "metrics.jsonl", log)
        return replace(result, counts={**counts, **result.counts})

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
        """Write one judged record for each prompt and decoding as JSON lines; return them and counts of what was read.

        Raises DataError if the vocabulary of ``initial`` is not that of ``model``, or if ``gold`` is asked for and a
        prompt is not of the embedded world.
        """
        _, questions, counts = read_prompts(prompts)
        if gold:
            _require_embedded_world(questions, prompts)
        with replacing(out) as path:
            services = Services(self.runtime)
            policy = services.policy(model)
            reference = None
            if initial is not None:
                reference = services.fixed_policy(initial)
                _check_vocabularies(policy.tokenization, model, reference.tokenization, initial)
            judges = steps.Judges(
                services.reward(reward),
                GoldReward() if gold else None,
                services.fixed_policy(perplexity) if perplexity is not None else None,
                self.runtime.score_batch,
            )
            sampler = services.sampler(policy, model, self.backend, self.progress)
            records = steps.evaluate(name, seed, sampler, questions, judges, decodings, policy, reference)
            write_jsonl(path, records)
        return records, counts


def _require_embedded_world(prompts: Sequence[Prompt], path: Path) -> None:
    """Raise DataError if the gold reward is not defined for one of the prompts of a file."""
    for prompt in prompts:
        try:
            topic_of(prompt.text)
        except DataError as error:
            raise DataError(f"--gold: {path}: {error}; leave --gold out") from error


def _check_vocabularies(own: Tokenization, model: ModelRef, other: Tokenization, initial: ModelRef) -> None:
    """Raise DataError if a policy and its initial policy differ in vocabulary: the KL between them has no meaning."""
    if own.has_vocabulary_of(other):
        return
    found, expected = other.tokenizer.get_vocab(), own.tokenizer.get_vocab()
    alike = len(found.items() & expected.items())
    raise DataError(
        f"--initial {initial.source}: has another vocabulary than --model {model.source} ({len(found)} tokens against "
        f"{len(expected)}, {alike} of them with the same id in both); expected the same tokens with the same ids, "
        "without which a KL has no meaning; name the policy that the model was trained from, or leave --initial out"
    )


def read_prompts(path: Path, *, verbatim: bool = False) -> tuple[list[Preference], list[Prompt], dict[str, int]]:
    """(pairs if the file holds any, prompts, counts) of a file of prompts or preferences, told by its first line."""
    first: dict[str, Any] = (
        next((row for _, row in read_objects(path)), {}) if path.suffix == ".jsonl" else {"chosen": 1}
    )
    if "chosen" not in first:
        prompts = load_prompts(path, verbatim=verbatim)
        return [], prompts, {"prompts": len(prompts), "duplicate_prompt": len(prompts) - len(set(prompts))}
    data = load_pairs(path)
    return list(data.preferences), [pair.prompt for pair in data.preferences], dict(data.counts)


def _train_inputs(method: MethodSettings, data: Path) -> tuple[TrainInputs, Mapping[str, int]]:
    """(what a method reads: scored candidates, pairs, or prompts alone; counts of what was read)."""
    if "candidates" in method.requires:
        read = load_candidates(data)
        return TrainInputs(candidates=read.candidates), read.counts
    pairs, prompts, counts = read_prompts(data)
    if "pairs" in method.requires and not pairs:
        raise DataError(f'{data}: {method.kind} trains on pairs; expected lines with "chosen" and "rejected"')
    return TrainInputs(preferences=pairs, candidates=[Candidates(prompt, ()) for prompt in prompts]), counts


def model_ref(
    source: str,
    *,
    default_template: TemplateKind = "hh",
    template: TemplateKind | None = None,
    dtype: Dtype | None = None,
    pad_token: str | None = None,
    layout: Literal["classifier", "value-head"] | None = None,
    label: str | None = None,
) -> ModelRef:
    """Return the reference of a model named on the command line; None is an option that was not given.

    The folder of an artifact stands for the model in it. Raises ConfigError if a given option differs from what the
    artifact says.
    """
    options = {"template": template, "dtype": dtype, "pad_token": pad_token, "layout": layout, "label": label}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if is_artifact(source):
        ref = ModelRef.read(Path(source))
        for name, value in given.items():
            if value != (said := getattr(ref, name)):
                raise ConfigError(
                    f"--{name.replace('_', '-')}: found {value!r}, but the artifact {source} says {said!r}; leave the "
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
    """Return the --pad-token that one of a command's models gets.

    The option serves the models that are no artifacts, if there is one; an artifact then keeps its own pad token.
    """
    serves_others = any(other is not None and not is_artifact(other) for other in sources)
    return None if serves_others and is_artifact(source) else pad_token
