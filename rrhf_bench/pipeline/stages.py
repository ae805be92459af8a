"""The body of each kind of stage: inputs from artifacts, one artifact out. Nothing here knows about other stages."""

from __future__ import annotations

import json
import operator
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import cache, reduce
from pathlib import Path
from typing import Any

from rrhf_bench import registry
from rrhf_bench.data.preferences import load_preferences
from rrhf_bench.data.prompts import fit_context
from rrhf_bench.data.rrhf_files import load_candidates
from rrhf_bench.data.splits import split_preferences, split_texts
from rrhf_bench.data.texts import load_texts
from rrhf_bench.data.toy.gold import best_reply
from rrhf_bench.data.toy.reviews import build_reviews, own_reply
from rrhf_bench.data.toy.scratch import train_language_model
from rrhf_bench.data.toy.world import build_world
from rrhf_bench.errors import DataError, StageError
from rrhf_bench.jsonl import read_jsonl, read_objects, write_jsonl
from rrhf_bench.pipeline import preference_models, stage_helpers
from rrhf_bench.pipeline.candidates import assemble, pair_candidates, permute_rewards
from rrhf_bench.pipeline.judging import JOURNALS, judge_candidates
from rrhf_bench.pipeline.results import TUNED, WARNINGS
from rrhf_bench.pipeline.services import ModelRef, context_of
from rrhf_bench.pipeline.stage_context import Job
from rrhf_bench.pipeline.stage_graph import BEST_ROW
from rrhf_bench.pipeline.store import link_or_copy
from rrhf_bench.pipeline.training_record import FileCheckpoints, TrainingRecord
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.records import Candidates, CurvePoint, Evaluated, Preference, Prompt, Response
from rrhf_bench.rewards.gold import ReviewsGold
from rrhf_bench.rewards.train_head import count_steps
from rrhf_bench.sampling.backend import choose_backend
from rrhf_bench.sampling.sampler import Sampler, SamplingSpec
from rrhf_bench.seeding import derive_seed
from rrhf_bench.settings.candidates import STRATEGY_KEYS
from rrhf_bench.settings.experiment import WORLDS, JudgeTable, ScratchSettings
from rrhf_bench.settings.methods import MethodSettings, candidates_of
from rrhf_bench.settings.reward import RewardTrainingSettings
from rrhf_bench.training.method import TrainContext, TrainInputs, TrainResult
from rrhf_bench.training.reference import ResponseLogprobs, response_logprobs


def data(job: Job) -> None:
    """Write pairs in three disjoint parts, and corpora for models trained from scratch."""
    s = job.settings
    parts: Parts
    if s["source"] in WORLDS:
        sizes = {**s["toy"], "seed": s["seed"], "dev": s["dev"], "test": s["test"]}
        world: Any
        if s["source"] == "toy":
            world = build_world(**sizes)
            corpora = {"raw_corpus": world.raw_corpus}
        else:
            world = build_reviews(**{name: size for name, size in sizes.items() if name != "raw_corpus"})
            corpora = {}
        parts = world.preferences, world.dev, world.test
        corpora |= {"corpus": world.corpus, "perplexity_corpus": world.perplexity_corpus}
        about: dict[str, Any] = {"identity": f"{s['source']}, seed {s['seed']}", "gold": s["source"], "counts": {}}
        about |= {"held_out_topics": world.held_out_topics} if world.held_out_topics else {}
    else:
        identity, read, places, split_counts, parts = _read(s)
        job.write_json("places.json", places)
        # Every other prompt's chosen transcript, so that the judge of fluency has read nothing that the policy has.
        first = [derive_seed(s["seed"], "corpus half", pair.prompt.id) % 2 == 0 for pair in parts[0]]
        texts = [(pair.prompt.text + pair.chosen, half) for pair, half in zip(parts[0], first, strict=True)]
        corpora = {
            "corpus": tuple(text for text, half in texts if half),
            "perplexity_corpus": tuple(text for text, half in texts if not half),
        }
        about = {
            "identity": identity,
            "gold": None,
            "faulty_rows": s["faulty_rows"],
            "counts": {**read, **{f"split_{name}": count for name, count in split_counts.items()}},
        }
    for name, pairs in zip(("train", "dev", "test"), parts, strict=True):
        write_jsonl(job.out / f"{name}.jsonl", pairs)
    for name, texts_of in corpora.items():
        write_jsonl(job.out / f"{name}.jsonl", ({"text": text} for text in texts_of))
    job.write_json("about.json", about)


Parts = tuple[Sequence[Preference], Sequence[Preference], Sequence[Preference]]


def _read(s: Mapping[str, Any]) -> tuple[str, Mapping[str, int], Mapping[str, str], Mapping[str, int], Parts]:
    """Return (identity, counts of reading, the row of each prompt by its id, counts of splitting, (train, dev, test))
    of files or a hub set."""
    where: dict[str, Any] = {"split": s["split"], "revision": s.get("revision"), "data_dir": s.get("subset")}
    sizes = {"dev": s["dev"], "test": s["test"], "seed": s["seed"]}
    if s["rows"] == "texts":
        words: dict[str, Any] = {name: s[name] for name in ("prompt_words", "reply_words")}
        texts = load_texts(s["source"], s.get("path"), **where, **words)
        parts = split_texts(texts.texts, **sizes)
        train, dev, test = (
            [Preference(text.prompt, text.reply, None, text.ended, text.cluster) for text in part]
            for part in (parts.train, parts.dev, parts.test)
        )
        return texts.identity, texts.counts, {}, parts.counts, (train, dev, test)
    faults: dict[str, Any] = {"diverging": s["diverging"], "faulty_rows": s["faulty_rows"]}
    read_strength = s.get("margins_and_ties", False)
    loaded = load_preferences(s["source"], s.get("path"), **where, **faults, margins_and_ties=read_strength)
    if not read_strength and (ties := loaded.counts.get("ties")):
        raise DataError(
            f"data.margins_and_ties: found false, but {ties} of {loaded.counts['kept']} pairs have tie = true; set it "
            "to true, so that reward models read the ties and policies do not train on them"
        )
    split = split_preferences(loaded.preferences, **sizes)
    places = {prompt.id: place for prompt, place in loaded.places.items()}
    return loaded.identity, loaded.counts, places, split.counts, (split.train, split.dev, split.test)


def model(job: Job) -> None:
    """Write a language model that is trained from scratch on a corpus, or a reference to one that is given."""
    s = job.settings
    if "scratch" not in s:
        _given(s).write(job.out)
        return
    settings = ScratchSettings.model_validate(s["scratch"])
    texts = [line["text"] for _, line in read_objects(job.inputs["data"] / f"{s['corpus']}.jsonl")]
    log: list[Mapping[str, float]] = []
    job.services.make_room()
    train_language_model(
        texts,
        settings,
        seed=derive_seed(s["seed"], s["corpus"]),
        folder=job.out / "model",
        start=Path(job.ref("start").source) if "start" in job.inputs else None,
        device=job.services.device,
        log=log.append,
        progress=job.progress,
    )
    write_jsonl(job.out / "metrics.jsonl", log)
    ModelRef("model", template=s.get("template", "hh"), max_length=settings.context).write(job.out)


def reward_model(job: Job) -> None:
    """Write a reward model that is trained on the labelled pairs, or a reference to one that is given."""
    s = job.settings
    if "training" not in s:
        _given(s).write(job.out)
        return
    policy = job.ref()
    log: list[Mapping[str, float]] = []
    pairs = read_jsonl(job.inputs["data"] / "train.jsonl", Preference)
    settings = RewardTrainingSettings.model_validate(s["training"])
    steps_in_all = count_steps(pairs, settings)

    def note(metrics: Mapping[str, float]) -> None:
        log.append(metrics)
        job.progress(len(log), steps_in_all)

    job.services.make_room()
    folder = job.out / "model"
    result = preference_models.train_reward_model(
        job.services, policy, pairs, settings, folder, seed=s["seed"], log=note
    )
    write_jsonl(job.out / "metrics.jsonl", log)
    job.write_json("counts.json", result.counts)
    preference_models.trained_ref(policy, settings).write(job.out)


def _given(settings: Mapping[str, Any]) -> ModelRef:
    """Return the reference of a model that is used as it is, with the commit of a hub model."""
    only_in_keys = {"identity", "base", "reader"}
    ref = ModelRef(**{name: value for name, value in settings.items() if name not in only_in_keys})
    if Path(ref.source).is_dir():
        return ref
    try:
        from transformers import AutoConfig

        trusted = ref.trust_remote_code
        config = AutoConfig.from_pretrained(ref.source, revision=ref.revision, trust_remote_code=trusted)
        return replace(ref, revision=getattr(config, "_commit_hash", ref.revision))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StageError(f"{ref.source}: neither a folder nor to be had from the hub ({reason})") from error


def prompts(job: Job) -> None:
    """Write the training, dev and test pairs that every initial policy can be given.

    A prompt must leave room for a reply in each context, and each chat template must render it. No training prompt is
    on a held-out topic of the embedded world, see ``build_world``.
    """
    s = job.settings
    refs = [job.ref(role) for role in job.inputs if role == "policy" or role.startswith("policy ")]
    policies = [job.services.fixed_policy(ref) for ref in refs]
    context = min(map(context_of, policies, refs))
    about = job.read_json("data", "about.json")
    counts, held_out_topics = dict(about["counts"]), frozenset(about.get("held_out_topics", ()))
    rows = job.inputs["data"] / "places.json"  # absent in the embedded worlds
    places = json.loads(rows.read_text(encoding="utf-8")) if rows.is_file() else {}

    @cache
    def length(prompt: Prompt) -> int:
        return max(len(policy.tokenization.prompt_ids(prompt)) for policy in policies)

    for split, size in {"train": s["train_prompts"], "dev": None, "test": None}.items():
        pairs = [p for p in read_jsonl(job.inputs["data"] / f"{split}.jsonl", Preference) if not p.tie]
        distinct = list({pair.prompt: pair for pair in reversed(pairs)}.values())[::-1]  # the first of each prompt
        if split == "train" and held_out_topics:
            asked = len(distinct)
            distinct = [pair for pair in distinct if pair.cluster not in held_out_topics]
            counts["train_held_out_topic"] = asked - len(distinct)
        kept, fitted = fit_context(
            distinct,
            length,
            context - s["new_tokens"],
            long_prompts=s["long_prompts"],
            faulty_rows=about.get("faulty_rows", "error"),
            places={pair.prompt: places[pair.prompt.id] for pair in distinct if pair.prompt.id in places},
        )
        refused = fitted["refused_by_template"]
        if size is not None and len(kept) < size:
            of_template = f" and {refused} that the chat template refuses" if refused else ""
            if left_out := counts.get("train_held_out_topic"):
                of_template += f", and {left_out} on held-out topics"
            raise DataError(
                f"data.train_prompts: found {len(kept)} that leave room for a reply, and {fitted['long_prompt']} that "
                f"do not{of_template}; expected {size}; lower data.train_prompts or give more data"
            )
        kept = kept[:size]
        counts[f"{split}_long_prompt"] = fitted["long_prompt"]
        counts |= {f"{split}_refused_by_template": refused} if refused else {}
        counts[f"{split}_long_reply"] = sum(
            length(pair.prompt) + len(policies[0].tokenization.response_ids(reply, ended=True)) > context
            for pair in kept
            for reply in (pair.chosen, pair.rejected)
            if reply is not None
        )
        write_jsonl(job.out / f"{split}.jsonl", kept)
    job.write_json("about.json", {**about, "counts": counts})


def sample(job: Job) -> None:
    """Write n responses of a model to the prompts of a split."""
    s = job.settings
    strategy = s.get("strategy", "sample")
    pairs = job.pairs("train") if s["split"] == "train" else job.pairs("test")[: s["prompts"]]
    policy = job.services.fixed_policy(job.ref())
    backend = choose_backend(job.backend, strategy).name
    sampler = job.sampler(policy, backend, job.progress)
    unread = {"temperature": 1.0, "seed": 0}  # by a search
    spec = SamplingSpec(
        **{**unread, **{key: s[key] for key in (*STRATEGY_KEYS, "seed") if key in s}},
        max_new_tokens=s["max_new_tokens"],
        purpose=CANDIDATES if s["split"] != "pool" else "pool",
        stop=tuple(s["stop"]),
    )
    write_jsonl(job.out / "candidates.jsonl", sampler.sample([pair.prompt for pair in pairs], spec))


# The name in the seeds of training candidates: one for every sampling of a policy for training, command line included.
CANDIDATES = "candidates"


def file(job: Job) -> None:
    """Write the responses that a file has for the training prompts, with its scores if these are used."""
    s = job.settings
    loaded = load_candidates(s["path"], scored=s["scored"])
    wanted = {pair.prompt for pair in job.pairs("train")}
    groups: dict[Prompt, list[Response]] = defaultdict(list)
    for row in loaded.candidates:
        if row.prompt in wanted:
            groups[row.prompt] += (replace(response, source=s["name"]) for response in row.responses)
    if not groups:
        raise DataError(
            f"{s['path']}: none of its {len(loaded.candidates)} queries is a training prompt; expected the data set's "
            "prompts, as a transcript that ends with 'Assistant:'"
        )
    write_jsonl(job.out / "candidates.jsonl", (Candidates(p, tuple(found)) for p, found in groups.items()))
    missing = {"prompts_without_responses": len(wanted) - len(groups), "queries": len(loaded.candidates)}
    job.write_json("counts.json", {**loaded.counts, **missing})


def score(job: Job) -> None:
    """Write the candidates with their scores, and their gold rewards if there is a gold reward."""
    ref, candidates = job.ref("reward model"), job.candidates("candidates")
    scored = stage_helpers.score_shared_candidates(job.services.reward(ref), candidates, ref.source, job.progress)
    write_jsonl(job.out / "candidates.jsonl", scored)
    if (gold := job.gold) is not None:
        rows = [([row.prompt] * len(row.responses), [response.text for response in row.responses]) for row in scored]
        lines = ({"golds": gold.score(*row).tolist(), "features": gold.features(*row)} for row in rows)
        write_jsonl(job.out / "golds.jsonl", lines)


def judge(job: Job) -> None:
    """Write the rated training candidates of a row, and their ratings on all four axes."""
    s = job.settings
    pairs = pair_candidates(job.pairs("train"))
    groups = assemble(s["sources"], _sampled(job, "candidates "), pairs)
    if not groups:
        raise DataError(f"none of {len(pairs)} prompts has a response from {', '.join(s['sources'])}; add a source")
    # Not in the artifact: a stage that fails leaves none, and the verdicts must outlive it.
    journals = job.out.parent / JOURNALS
    result = judge_candidates(JudgeTable.model_validate(s["judge"]), groups, journals, job.progress)
    write_jsonl(job.out / "candidates.jsonl", result.candidates)
    rated = zip(result.candidates, result.ratings, strict=True)
    write_jsonl(job.out / "ratings.jsonl", ({"prompt": group.prompt, "ratings": given} for group, given in rated))
    job.write_json("counts.json", {**result.counts, "without_responses": len(pairs) - len(groups)})


def score_pairs(job: Job) -> None:
    """Write the data set's own replies with their scores; held-out pairs also check the reward model's input."""
    ref, split = job.ref("reward model"), job.settings["split"]
    reward, pairs = job.services.reward(ref), own_replies(job, split)
    scored = stage_helpers.score_shared_candidates(reward, pairs, ref.source, job.progress)
    write_jsonl(job.out / "candidates.jsonl", scored)
    if split == "test":
        checks = job.services.reward_checks(ref, job.pairs(split)[:CHECKED_PAIRS])
        warnings = [f"reward model, {check.name}: {check.found}" for check in checks if check.ok is False]
        job.write_json(WARNINGS, warnings)


CHECKED_PAIRS = 200  # enough to see a setting of the input that orders one pair in ten better


def own_replies(job: Job, split: str) -> list[Candidates]:
    """Return the data set's own replies to the prompts of a split.

    Of the embedded reviews' two completions, one is also the "reply": the data set's own, whatever its sentiment.
    """
    pairs = job.pairs(split)
    groups = pair_candidates(pairs)
    if not isinstance(job.gold, ReviewsGold):
        return groups
    return [
        replace(group, responses=(*group.responses, Response(getattr(pair, own_reply(pair)), "reply")))
        for pair, group in zip(pairs, groups, strict=True)
    ]


def reference(job: Job) -> None:
    """Write the token log-probs of training responses under the initial policy."""
    policy = job.services.fixed_policy(job.ref())
    groups = job.candidates("candidates") if "candidates" in job.inputs else pair_candidates(job.pairs("train"))
    length, batch = context_of(policy, job.ref()), job.services.runtime.score_batch
    response_logprobs(policy, groups, max_length=length, batch=batch, progress=job.progress).write(job.out)


def train(job: Job) -> None:
    """Write a policy trained by one method, its metrics, and its rewards on the dev prompts while it trains."""
    s = job.settings
    settings = _method(s["method"])
    if "tuned" in job.inputs:
        settings = settings.changed(job.read_json("tuned", TUNED)["picked"])
    reward = job.services.reward(job.ref("reward model"))  # first, or it could be dropped to make room for the policy
    policy = job.services.policy_to_train(job.ref())
    unadapted = stage_helpers.adapt(policy, settings, s["seed"])
    inputs = train_inputs(job, settings)
    cue = settings.cue or job.ref().cue
    reads_reference = {"reference", "sampler"} <= settings.needs
    initial = unadapted
    if initial is None and (reads_reference or s.get("curve_kl")):
        initial = job.services.fixed_policy(job.ref())
    record = TrainingRecord(job, policy.with_cue(cue), initial if s.get("curve_kl") else None)
    candidates = candidates_of(settings)
    backend = choose_backend(job.backend, "sample" if candidates is None else candidates.strategy).name
    assert job.scratch is not None
    sampling = s.get("sampling", s["evaluation"])
    context = TrainContext(
        seed=s["seed"],
        sampler=job.sampler(policy, backend) if "sampler" in settings.needs else None,
        reward=reward if "reward" in settings.needs else None,
        reference=initial if reads_reference else None,
        watch=record.watch,
        log=record.add,
        keep=record.made.extend,
        took=record.parts.append,
        checkpoints=FileCheckpoints(job.scratch, job.services.runtime.checkpoint_seconds, record),
        max_new_tokens=sampling["max_new_tokens"],
        stop=tuple(sampling["stop"]),
    )
    trainer = stage_helpers.trainer(settings, context_of(policy, job.ref()))
    with closing(record):
        result = trainer.fit(policy, inputs, context)
    job.seconds.update(train=record.trained, curve=record.seconds)
    parts, names = record.parts, record.parts[0] if record.parts else ()
    means = {name: sum(line[name] for line in parts) / len(parts) for name in names}  # seconds of an iteration
    job.seconds.update(layout=policy.layout, onednn_layers=policy.onednn_layers, parts=means)
    policy.save(job.out / "model")
    ModelRef(**{**job.ref().__dict__, "source": "model", "revision": None, "cue": cue}).write(job.out)
    write_jsonl(job.out / "metrics.jsonl", record.log)
    write_jsonl(job.out / "curve.jsonl", record.points)
    if record.made:
        write_jsonl(job.out / "candidates.jsonl", record.made)
    about: dict[str, Any] = asdict(result)
    about["parameters"] = sum(parameter.numel() for parameter in policy.model.parameters())
    about["forwarded_tokens"] = _forwarded_tokens(settings, inputs, policy, result)
    if policy.layout_reason is not None:
        about["padded"] = policy.layout_reason
    job.write_json("about.json", about)


def _forwarded_tokens(
    settings: MethodSettings, inputs: TrainInputs, policy: TransformersPolicy, result: TrainResult
) -> int:
    """Return how many tokens of replies passed a model without gradients for this training, once for each model.

    A row that samples while it trains has each of them pass every model that it holds: the policy writes it, the others
    read it. Other rows have the reward model and the reference read what they train on.
    """
    if "sampler" in settings.needs:
        return result.sampled_tokens * len(settings.models_in_memory())
    candidates = candidates_of(settings)
    readers = ("reference" in settings.needs) + (candidates is not None and candidates.scored_by == "reward model")
    groups = pair_candidates(inputs.preferences) if candidates is None else inputs.candidates
    replies = [reply for group in groups for reply in group.responses]
    return readers * sum(len(policy.tokenization.response_ids(r.text, ended=r.ended)) for r in replies)


def tune(job: Job) -> None:
    """Write the policy of the trial with the highest mean reward on the dev prompts at its end; of equals, the first.

    ``tuned.json`` holds the settings and the reward of every trial, null for a trial that could not finish.
    """
    trials, decoding = job.settings["trials"], job.settings["decoding"]
    rewards: dict[str, float] = {}
    for role in job.inputs:
        points = read_jsonl(job.inputs[role] / "curve.jsonl", CurvePoint)
        last = [point.rewards for point in points if point.decoding == decoding][-1]
        rewards[role] = sum(last) / len(last)
    roles = [f"trial {i}" for i in range(1, len(trials) + 1)]
    best = max((role for role in roles if role in rewards), key=lambda role: rewards[role])
    shutil.copytree(job.inputs[best] / "model", job.out / "model", copy_function=link_or_copy)
    replace(job.ref(best), source="model").write(job.out)
    picked = trials[roles.index(best)]
    job.write_json(TUNED, {"role": best, "picked": picked, "trials": trials, "rewards": [*map(rewards.get, roles)]})


def train_inputs(job: Job, settings: MethodSettings) -> TrainInputs:
    """Return the training pairs and, for a method that uses them, the scored candidates of its sources."""
    pairs = job.pairs("train")
    tables = [ResponseLogprobs.read(folder) for role, folder in job.inputs.items() if role.startswith("reference ")]
    reference = reduce(operator.or_, tables) if tables else None
    candidates = candidates_of(settings)
    if candidates is None:
        return TrainInputs(pairs, reference=reference)
    if "judged" in job.inputs:
        scored = job.candidates("judged")
    else:
        scored = assemble(candidates.sources, _sampled(job, "scores "), job.candidates("pair scores"))
    if candidates.permute_rewards:
        scored = permute_rewards(scored, job.settings["seed"])
    return TrainInputs(pairs, scored, reference)


def _sampled(job: Job, role: str) -> dict[str, list[Candidates]]:
    """Return by source the candidates of the inputs whose role is ``role`` and the name of a source."""
    return {name.removeprefix(role): job.candidates(name) for name in job.inputs if name.startswith(role)}


def evaluate(job: Job) -> None:
    """Write judged replies to the evaluation prompts in every decoding, and log-probs of the held-out pairs."""
    s = job.settings
    initial = job.services.fixed_policy(job.ref())
    judges = _judges(job)  # before the policy, or they could be dropped to make room for it
    policy = job.services.policy(job.ref("trained")) if "trained" in job.inputs else initial
    sampler: Sampler = job.sampler(policy)
    specs = stage_helpers.decodings(s["evaluation"], s["seed"], "evaluate")
    test, row, seed = job.pairs("test"), job.row or "", s["seed"]
    pairs = [pair for pair in test if pair.rejected is not None]
    sampled: TransformersPolicy | None = policy
    if "method" in s:  # the initial policy, drawn from in another way: not the distribution of its own log-probs
        sampler = registry.build(_method(s["method"])).wrap(sampler, judges.reward)
        specs = {decoding: spec for decoding, spec in specs.items() if not spec.greedy}
        sampled, pairs = None, []
    prompts = [pair.prompt for pair in test[: s["prompts"]]]
    records = stage_helpers.evaluate(row, seed, sampler, prompts, judges, specs, sampled, initial)
    write_jsonl(job.out / "evaluated.jsonl", records)
    scored = stage_helpers.score_pairs_by_likelihood(row, seed, policy, pairs, judges.batch)
    write_jsonl(job.out / "pairs.jsonl", scored)


def evaluate_pairs(job: Job) -> None:
    """Write replies that no model wrote to the evaluation prompts with the verdicts of the judges: the data set's
    chosen or rejected ones, or the best of the embedded world.

    Their length is counted in the policy's tokens.
    """
    reply = job.settings["reply"]
    pairs = job.pairs("test")[: job.settings["prompts"]]
    if reply == BEST_ROW:
        rows = [(pair.prompt, Response(best_reply(pair.prompt.text), reply)) for pair in pairs]
    else:
        rows = [(c.prompt, r) for c in pair_candidates(pairs) for r in c.responses if r.source == reply]
    tokenization = job.services.fixed_policy(job.ref()).tokenization
    verdicts = _judges(job).verdicts(rows, f"{reply} replies")
    records = [
        Evaluated(reply, 0, "given", p, r.text, r.finish, len(tokenization.response_ids(r.text, ended=True)), **verdict)
        for (p, r), verdict in zip(rows, verdicts, strict=True)
    ]
    write_jsonl(job.out / "evaluated.jsonl", records)


def _judges(job: Job) -> stage_helpers.Judges:
    return stage_helpers.Judges(
        job.services.reward(job.ref("reward model")),
        job.gold,
        job.services.fixed_policy(job.ref("perplexity model")),
        job.services.runtime.score_batch,
    )


def _method(settings: Mapping[str, Any]) -> MethodSettings:
    return registry.settings_class(settings["kind"]).model_validate(settings)


_BODIES = (
    data,
    model,
    reward_model,
    prompts,
    sample,
    file,
    score,
    judge,
    score_pairs,
    reference,
    train,
    tune,
    evaluate,
)
# By kind of stage: the name of the function in words.
BODIES: dict[str, Callable[[Job], None]] = {
    **{body.__name__.replace("_", " "): body for body in (*_BODIES, evaluate_pairs)},
    "pair perplexity": preference_models.pair_perplexity_stage,
    "filter": preference_models.filter_stage,
    "ensemble": preference_models.ensemble_stage,
}
