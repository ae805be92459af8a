"""Validate keys of an experiment against each other, one line a fault."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from pydantic import ValidationError

from rrhf_bench.errors import nearest
from rrhf_bench.settings.base import Settings
from rrhf_bench.settings.claims import BOTH_SIDES
from rrhf_bench.settings.experiment import (
    BY_METHOD,
    TOY_MODELS,
    WORLDS,
    DataSettings,
    Experiment,
    FileSource,
    ModelSettings,
    PolicySettings,
)
from rrhf_bench.settings.methods import MethodSettings, candidates_of

RESERVED_ROWS = ("base", "chosen", "rejected", "reply", "best")  # rows that tables have without being asked
OWN_SOURCES = ("model", "chosen", "rejected", "reply")  # candidate sources that need no table of their own

# The keys of [data] that the embedded worlds do not read.
NOT_OF_WORLDS = ("subset", "split", "revision", "faulty_rows", "diverging", "prompt_words", "reply_words")
# The keys of a model that one trained here does not read, and what decides in their place.
NOT_OF_TRAINED: Mapping[str, str] = {
    "dtype": "its weights are float32",
    "max_length": "its context is scratch.context",
    "pad_token": "its tokenizer has one of its own",
}
# The same of a reward model, which is trained from the initial policy.
NOT_OF_TRAINED_REWARD: Mapping[str, str] = {
    "dtype": "its weights are float32",
    "pad_token": "it has that of the initial policy",
    "label": "its labels are those of training.objective",
}


def contradictions(experiment: Experiment, unread: Collection[str]) -> Iterator[str]:
    """Yield faults that no single key shows. ``unread``: names of tables that are missing for faults of their own."""
    evaluation = experiment.evaluation
    rows = (*RESERVED_ROWS[:1], *experiment.policies, *experiment.methods)
    if experiment.name == "store":
        yield "name: found 'store', the folder beside the runs that holds the artifacts of them all; choose another"
    yield from _data_faults(experiment.data)
    yield from _model_faults(experiment, unread)
    yield from _runtime_faults(experiment)
    if evaluation.pairs < evaluation.prompts:
        yield f"evaluation.pairs: found {evaluation.pairs}; expected at least evaluation.prompts ({evaluation.prompts})"
    if evaluation.pool_prompts > evaluation.prompts:
        yield f"evaluation.pool_prompts: found {evaluation.pool_prompts}; expected at most {evaluation.prompts}"
    if len(set(evaluation.decoding)) < len(evaluation.decoding):
        yield f"evaluation.decoding: found {list(evaluation.decoding)}; a decoding may stand once only"
    if len(set(experiment.seeds)) < len(experiment.seeds):
        yield f"seeds: found {list(experiment.seeds)}; a seed may stand once only"
    yield from _world_faults(experiment)
    for name, source in experiment.sources.items():
        if name in OWN_SOURCES:
            yield f"sources.{name}: the name is taken; {', '.join(OWN_SOURCES)} need no table"
        if not isinstance(source, FileSource):
            models = (*experiment.policies, *_that_train(experiment))
            yield from _unknown(f"sources.{name}.model", source.model, models, unread)
    for name, method in experiment.methods.items():
        if name in RESERVED_ROWS:
            yield f"methods.{name}: the name is taken; tables have the rows {', '.join(RESERVED_ROWS)} by itself"
        if method.initial is not None:
            yield from _unknown(f"methods.{name}.initial", method.initial, (*experiment.policies,), unread)
        yield from (f"methods.{name}.candidates{fault}" for fault in _candidate_faults(experiment, method, unread))
    yield from _circles(experiment)
    yield from _tuning_faults(experiment, unread)
    for name, claim in experiment.claims.items():
        for row in claim.rows():
            yield from _unknown(f"claims.{name}", row, rows, unread)
    if experiment.report.against is not None:
        yield from _unknown("report.against", experiment.report.against, _that_train(experiment), unread)
    named = experiment.report.primary or ()
    for i, pair in enumerate(named):
        for row in pair:
            yield from _unknown("report.primary", row, rows, unread)
        if pair[0] == pair[1]:
            yield f"report.primary: {BOTH_SIDES.format(pair[0])}"
        elif pair in named[:i] or pair[::-1] in named[:i]:
            yield f"report.primary: found {list(pair)} twice; a comparison may stand once only"


def _changed(table: Settings, *keys: str) -> list[str]:
    """Return those of the keys that differ from their defaults."""
    return [key for key in keys if getattr(table, key) != type(table).model_fields[key].default]


def _data_faults(data: DataSettings) -> Iterator[str]:
    """Yield keys of [data] that its source does not read."""
    unread = ("subset", "split", "revision") if data.source == "files" else ("path",)
    for key in _changed(data, *unread, *(NOT_OF_WORLDS if data.source in WORLDS else ())):
        yield f"data.{key}: has no effect with data.source = {data.source!r}; remove the key, or change the source"


def _world_faults(experiment: Experiment) -> Iterator[str]:
    """Yield what is wrong with ``worlds``."""
    worlds = experiment.worlds
    if len(set(worlds)) < len(worlds):
        yield f"worlds: found {list(worlds)}; a world may stand once only"
    if worlds and experiment.data.source not in WORLDS:
        yield (
            f"worlds: found {list(worlds)} with data.source = {experiment.data.source!r}; only the embedded data "
            f"({', '.join(WORLDS)}) has several worlds; set worlds = [] and repeat with seeds = [0, 1, 2]"
        )
    if worlds and _changed(experiment.data, "seed"):
        yield f"data.seed: found {experiment.data.seed}, but worlds = {list(worlds)} names them; remove one of the keys"


def _tuning_faults(experiment: Experiment, unread: Collection[str]) -> Iterator[str]:
    """Yield what is wrong with [tune]: rows that cannot be tuned, refused values, unequal numbers of trials."""
    trained = _that_train(experiment)
    for row, grid in experiment.tune.items():
        if row not in trained:
            if row not in unread:
                allowed = ", ".join(trained)
                yield f"tune.{row}: found no such row that trains; allowed are {allowed}{nearest(row, trained)}"
            continue
        if not grid:
            yield f"tune.{row}: found no key; give the values of one, such as lr = [1e-4, 1e-3], or remove the table"
        method = experiment.methods[row]
        candidates = candidates_of(method)
        if candidates is not None and candidates.rounds > 1:
            yield f"tune.{row}: the row has {candidates.rounds} rounds; only rows of one round are tuned; remove it"
        keys = [key for key in type(method).model_fields if key not in ("kind", "initial", "candidates", "lora")]
        for key in grid:
            if key not in keys:
                yield f"tune.{row}.{key}: unknown key; allowed are {', '.join(keys)}{nearest(key, keys)}"
        if set(grid) <= set(keys):
            for values in experiment.trials(row):
                try:
                    method.changed(values)
                except ValidationError as error:
                    words = "; ".join(str(fault["msg"]) for fault in error.errors())
                    yield f"tune.{row}: found {values}; {words}"
    counts = {row: len(experiment.trials(row)) for row, grid in experiment.tune.items() if grid}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{row} {count}" for row, count in counts.items())
        yield f"tune: found different numbers of trials ({found}); expected the same for each row, for equal footing"


def _unknown(where: str, name: str, allowed: Sequence[str], unread: Collection[str]) -> Iterator[str]:
    """Yield the fault of a key that names a row or policy which is not there."""
    if name not in (*allowed, *unread):
        yield f"{where}: found {name!r}; allowed are {', '.join(allowed) or 'none here'}{nearest(name, allowed)}"


def _runtime_faults(experiment: Experiment) -> Iterator[str]:
    runtime = experiment.runtime
    policies = (experiment.policy, *experiment.policies.values())
    dtypes = {"float32" if policy.from_scratch else policy.dtype for policy in policies}
    if runtime.autocast is not None and "float32" not in dtypes:
        yield (
            f"runtime.autocast: found {runtime.autocast!r}, but no policy has float32 weights ({', '.join(dtypes)}); "
            'remove it, since it changes nothing, or set policy.dtype = "float32"'
        )
    if runtime.kernels is not None and runtime.device == "cpu":
        yield f'runtime.kernels: found {runtime.kernels!r} with runtime.device = "cpu"; its kernels need a GPU'


def _model_faults(experiment: Experiment, unread: Collection[str]) -> Iterator[str]:
    world = experiment.data.source in WORLDS
    policies = {"policy": experiment.policy} | {f"policies.{name}": p for name, p in experiment.policies.items()}
    models: dict[str, ModelSettings] = {**policies, "perplexity_model": experiment.perplexity_model}
    for key, model in models.items():
        if model.source in TOY_MODELS and not world:
            yield f'{key}.source: "{model.source}" needs data.source = "toy"; use "scratch", a hub id or a folder'
        if model.source == "toy-raw" and (experiment.data.source != "toy" or key == "perplexity_model"):
            yield f'{key}.source: "toy-raw" is a policy of the embedded dialogues, data.source = "toy"'
        for name in _changed(model, *NOT_OF_TRAINED) if model.from_scratch else ():
            advice = "remove the key"
            if name == "dtype" and key != "perplexity_model":
                advice = 'remove the key; runtime.autocast = "bfloat16" rounds products alike'
            yield f"{key}.{name}: has no effect on a model trained here: {NOT_OF_TRAINED[name]}; {advice}"
        if key == "perplexity_model" and not model.from_scratch and model.pad_token is not None:
            yield f"{key}.pad_token: has no effect, because padding is masked; remove the key"
        if model.scratch.hidden % model.scratch.heads or model.scratch.hidden // model.scratch.heads % 32:
            yield (
                f"{key}.scratch: found hidden = {model.scratch.hidden} in {model.scratch.heads} heads; expected heads "
                "of 32, 64, 96 or 128, which the samplers know"
            )
    rewards = {"reward_model": experiment.reward_model}
    rewards |= {f"reward_models.{name}": model for name, model in experiment.reward_models.items()}
    for key, reward in rewards.items():
        if reward.source == "toy" and not world:
            yield f'{key}.source: "toy" needs data.source = "toy"; use "scratch", a hub id or a folder'
        if experiment.data.rows == "texts" and experiment.data.source not in WORLDS and reward.from_scratch:
            yield f"{key}.source: texts have no pairs to train a reward model on; name a folder or a hub id"
        if reward.from_scratch and reward.layout != "classifier":
            yield f'{key}.layout: a reward model trained here is a "classifier"'
        for name in _changed(reward, *NOT_OF_TRAINED_REWARD) if reward.from_scratch else ():
            why = NOT_OF_TRAINED_REWARD[name]
            yield f"{key}.{name}: has no effect on a reward model trained here: {why}; remove the key"
        for name in _changed(reward, "template", "pad_token", "label") if reward.layout == "value-head" else ():
            if not reward.from_scratch:
                yield f'{key}.{name}: has no effect with layout = "value-head"; remove the key'
        template = experiment.policy.template
        if reward.from_scratch and reward.template != template and _changed(reward, "template"):
            yield f"{key}.template: a reward model trained here has that of [policy], {template!r}; remove the key"
    if experiment.data.margins_and_ties and (world or experiment.data.rows == "texts"):
        yield "data.margins_and_ties: has no effect; only pairs of files and of the hub have such columns; remove it"
    if experiment.data.rows == "texts" and experiment.data.source in WORLDS:
        yield 'data.rows: found "texts"; the embedded worlds have pairs; remove the key'
    if experiment.judge is not None and experiment.judge.source == "toy" and experiment.data.source != "toy":
        yield 'judge.source: "toy" judges the embedded dialogues, data.source = "toy"; use "endpoint"'
    if experiment.policy.trained_by is not None:
        yield f"policy.source: found {experiment.policy.source!r}; only a table of [policies] may be a row's result"
    for name, policy in experiment.policies.items():
        if name in RESERVED_ROWS or name in experiment.methods or name == "policy":
            yield f"policies.{name}: the name is taken; it would be a row of the tables beside the one of that name"
        template = experiment.policy.template
        if policy.template != template and policy.trained_by is None:
            yield f"policies.{name}.template: found {policy.template!r}; expected {template!r}, that of [policy]"
        yield from (f"policies.{name}{fault}" for fault in _unused_faults(experiment, policy))
        if policy.trained_by is not None:
            trained = [f"{BY_METHOD}{row}" for row in _that_train(experiment)]
            yield from _unknown(f"policies.{name}.source", policy.source, trained, [BY_METHOD + row for row in unread])


def _unused_faults(experiment: Experiment, policy: PolicySettings) -> Iterator[str]:
    """Keys of one of [policies] that nothing would read."""
    unused = set(_changed(policy, *PolicySettings.model_fields))
    if policy.trained_by is not None:
        for key in sorted(unused - {"source", "part"}):
            yield f".{key}: has no effect: a row's result is as what the row started from; remove the key"
    elif policy.source == "toy-raw" and "scratch" in unused:
        yield '.scratch: has no effect: "toy-raw" is trained as [policy.scratch] says; remove the table'


def _that_train(experiment: Experiment) -> list[str]:
    """The rows that end with a model of their own."""
    return [name for name, method in experiment.methods.items() if method.family != "inference"]


def _circles(experiment: Experiment) -> Iterator[str]:
    """Yield rows that would have to be trained before themselves."""
    seen: set[str] = set()

    def needed(row: str) -> Iterator[tuple[str, str]]:
        """Yield (a policy or row that must be there before this row; the key that says so)."""
        method = experiment.methods[row]
        if method.initial is not None:
            yield method.initial, f"methods.{row}.initial"
        candidates = candidates_of(method)
        for name in () if candidates is None else candidates.sources:
            if (model := getattr(experiment.sources.get(name), "model", None)) is not None and name not in OWN_SOURCES:
                yield model, f"sources.{name}.model"

    def visit(row: str | None, before: tuple[tuple[str, str], ...]) -> Iterator[str]:
        """``before``: (row, the key by which it needs the next) on the way to this row."""
        rows = [name for name, _ in before]
        if row in rows:
            circle = before[rows.index(row) :]
            ways = [
                f"{one} needs {two} ({key})"
                for (one, key), (two, _) in zip(circle, circle[1:] + circle[:1], strict=True)
            ]
            yield (
                f"methods.{row}: would have to be trained before itself: {', '.join(ways)}; change one of these keys"
            )
        elif row in experiment.methods and row not in seen:
            assert row is not None
            seen.add(row)
            for name, key in needed(row):
                policy = experiment.policies.get(name)
                yield from visit(name if policy is None else policy.trained_by, (*before, (row, key)))

    for row in experiment.methods:
        yield from visit(row, ())


def _candidate_faults(experiment: Experiment, method: MethodSettings, unread: Collection[str]) -> Iterator[str]:
    """Yield what is wrong with where a row's candidates come from."""
    candidates = candidates_of(method)
    if candidates is None or not set(unread).isdisjoint(candidates.sources):
        return
    sources, k = candidates.sources, experiment.responses(method)
    allowed = (*OWN_SOURCES, *experiment.sources)
    files = [name for name in sources if isinstance(experiment.sources.get(name), FileSource)]
    unknown = sorted(set(sources) - set(allowed))
    if unknown:
        yield f".sources: found {unknown[0]!r}; allowed are {', '.join(allowed)}{nearest(unknown[0], allowed)}"
    elif k < 2 and not files:
        yield f': k = {k} response a prompt leaves nothing to rank; add sources, or use kind = "sft"'
    single = experiment.data.rows == "texts" or experiment.data.source == "toy-reviews"
    if "reply" in sources and not single and "data" not in unread:
        yield '.sources: "reply" is a data set\'s single reply to a prompt; this one has pairs: "chosen", "rejected"'
    if experiment.data.rows == "texts" and {"chosen", "rejected"} & set(sources):
        yield f'.sources: found {list(sources)}, but texts have one reply to a prompt; use "reply"'
    if candidates.scored_by == "judge" and experiment.judge is None and "judge" not in unread:
        yield '.scored_by: found "judge", and there is no [judge]; add the table, with source = "toy" or "endpoint"'
    if candidates.scored_by == "file" and set(files) != set(sources):
        yield (
            f'.scored_by: found "file", but of sources = {list(sources)} only {files} are files; scores of two kinds '
            "have no common scale: keep the files alone, or let the reward model score them all"
        )
