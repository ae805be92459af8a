"""What several keys of an experiment together may not say: one line a fault."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from rrhf_bench.errors import nearest
from rrhf_bench.settings.experiment import (
    NAME,
    TOY_MODELS,
    WORLDS,
    Experiment,
    ModelSettings,
    PolicySettings,
    SourceSettings,
)
from rrhf_bench.settings.methods import READ, SIZES, CandidateSettings, MethodSettings

RESERVED_ROWS = ("base", "chosen", "rejected")  # rows that every table has without being asked
OWN_SOURCES = ("model", "chosen", "rejected", "reply")  # candidate sources that need no table of their own


def contradictions(experiment: Experiment, unread: Collection[str]) -> Iterator[str]:
    """Faults that no single key shows. ``unread``: names of tables with a fault of their own, which are not there."""
    evaluation = experiment.evaluation
    if experiment.name == "store":
        yield "name: found 'store', the folder beside the runs that holds the artifacts of them all; choose another"
    yield from _model_faults(experiment, unread)
    if evaluation.pairs < evaluation.prompts:
        yield f"evaluation.pairs: found {evaluation.pairs}; expected at least evaluation.prompts ({evaluation.prompts})"
    if evaluation.pool_prompts > evaluation.prompts:
        yield f"evaluation.pool_prompts: found {evaluation.pool_prompts}; expected at most {evaluation.prompts}"
    if len(set(experiment.seeds)) < len(experiment.seeds):
        yield f"seeds: found {list(experiment.seeds)}; a seed may stand once only"
    of_all = list(_search_faults(experiment.sampling))
    yield from (f"sampling: {fault}" for fault in of_all)
    for name, source in experiment.sources.items():
        yield from (f"sources.{name}{fault}" for fault in _source_faults(experiment, name, source, of_all, unread))
    rows = (*RESERVED_ROWS[:1], *experiment.policies, *experiment.methods)
    for name, method in experiment.methods.items():
        if name in RESERVED_ROWS:
            yield f"methods.{name}: the name is taken; every table has the rows {', '.join(RESERVED_ROWS)} by itself"
        if method.initial is not None and method.initial not in (*experiment.policies, *unread):
            allowed = tuple(experiment.policies)
            yield (
                f"methods.{name}.initial: found {method.initial!r}; expected a table of [policies] "
                f"({', '.join(allowed) or 'there is none'}){nearest(method.initial, allowed)}, or nothing for [policy]"
            )
        if "candidates" in method.requires:
            yield from (f"methods.{name}{fault}" for fault in _candidate_faults(experiment, method, of_all, unread))
    yield from _circles(experiment)
    for name, claim in experiment.claims.items():
        for row in claim.rows():
            if row not in (*rows, *unread):
                yield f"claims.{name}: found the row {row!r}; allowed are {', '.join(rows)}{nearest(row, rows)}"
    against, trained = experiment.report.against, _that_train(experiment)
    if against is not None and against not in (*trained, *unread):
        yield (
            f"report.against: found {against!r}; expected a row that trains ({', '.join(trained)})"
            f"{nearest(against, trained)}"
        )
    named = experiment.report.primary or ()
    for i, pair in enumerate(named):
        for row in pair:
            if row not in (*rows, *unread):
                yield f"report.primary: found the row {row!r}; allowed are {', '.join(rows)}{nearest(row, rows)}"
        if pair[0] == pair[1]:
            yield f"report.primary: found {pair[0]!r} on both sides; a row cannot be compared with itself"
        elif pair in named[:i] or pair[::-1] in named[:i]:
            yield f"report.primary: found {list(pair)} twice; a comparison may stand once only"


def _model_faults(experiment: Experiment, unread: Collection[str]) -> Iterator[str]:
    world = experiment.data.source in WORLDS
    policies = {"policy": experiment.policy} | {f"policies.{name}": p for name, p in experiment.policies.items()}
    models: dict[str, ModelSettings] = {**policies, "perplexity_model": experiment.perplexity_model}
    for key, model in models.items():
        if model.source in TOY_MODELS and not world:
            yield f'{key}.source: "{model.source}" needs data.source = "toy"; use "scratch", a hub id or a folder'
        if model.source == "toy-raw" and (experiment.data.source != "toy" or key == "perplexity_model"):
            yield f'{key}.source: "toy-raw" is a policy of the embedded dialogues, data.source = "toy"'
        if model.scratch.hidden % model.scratch.heads or model.scratch.hidden // model.scratch.heads % 32:
            yield (
                f"{key}.scratch: found hidden = {model.scratch.hidden} in {model.scratch.heads} heads; expected heads "
                "of 32, 64, 96 or 128, which the samplers know"
            )
    if experiment.reward_model.source == "toy" and not world:
        yield 'reward_model.source: "toy" needs data.source = "toy"; use "scratch", a hub id or a folder'
    if experiment.data.rows == "texts" and experiment.data.source in WORLDS:
        yield 'data.rows: found "texts"; the embedded worlds have pairs; remove the key'
    elif experiment.data.rows == "texts" and experiment.reward_model.from_scratch:
        yield "reward_model.source: texts have no pairs to train a reward model on; name a folder or a hub id"
    if experiment.reward_model.from_scratch and experiment.reward_model.layout != "classifier":
        yield 'reward_model.layout: a reward model trained here is a "classifier"'
    if experiment.judge is not None and experiment.judge.source == "toy" and experiment.data.source != "toy":
        yield 'judge.source: "toy" judges the embedded dialogues, data.source = "toy"; use "endpoint"'
    if experiment.policy.trained_by is not None:
        yield f"policy.source: found {experiment.policy.source!r}; only a table of [policies] may be a row's result"
    for name, policy in experiment.policies.items():
        if not re.fullmatch(NAME, name):
            yield f"policies.{name}: a name is letters, digits, - and _; choose another"
        if name in RESERVED_ROWS or name in experiment.methods or name == "policy":
            yield f"policies.{name}: the name is taken; it would be a row of the tables beside the one of that name"
        template = experiment.policy.template
        if policy.template != template and policy.trained_by is None:
            yield f"policies.{name}.template: found {policy.template!r}; expected {template!r}, that of [policy]"
        yield from (f"policies.{name}{fault}" for fault in _unused_faults(experiment, policy))
        row = policy.trained_by
        if row is not None and row not in (trained := _that_train(experiment)) and row not in unread:
            yield (
                f"policies.{name}.source: found {policy.source!r}; expected a row that trains "
                f"({', '.join(trained)}){nearest(row, trained)}"
            )


def _unused_faults(experiment: Experiment, policy: PolicySettings) -> Iterator[str]:
    """Keys of one of [policies] that nothing would read."""
    unused = {name for name, of in PolicySettings.model_fields.items() if getattr(policy, name) != of.default}
    if policy.trained_by is not None:
        for key in sorted(unused - {"source", "part"}):
            yield f".{key}: has no effect: a row's result is as what the row started from; remove the key"
    elif policy.source == "toy-raw" and "scratch" in unused:
        yield '.scratch: has no effect: "toy-raw" is trained as [policy.scratch] says; remove the table'


def _that_train(experiment: Experiment) -> list[str]:
    """The rows that end with a model of their own."""
    return [name for name, method in experiment.methods.items() if method.family != "inference"]


def _circles(experiment: Experiment) -> Iterator[str]:
    """Rows that would have to be trained before themselves."""
    seen: set[str] = set()

    def needed(row: str) -> Iterator[tuple[str, str]]:
        """(what must be trained before this row: another, or none of [methods]; the key that says so)"""
        method = experiment.methods[row]
        if method.initial is not None and method.initial in experiment.policies:
            yield experiment.policies[method.initial].trained_by or "", f"methods.{row}.initial"
        for name in method.sources or ():
            if name in experiment.sources and name not in OWN_SOURCES:
                model = experiment.sources[name].model or ""
                policy = experiment.policies.get(model)
                yield (policy.trained_by or "" if policy else model), f"sources.{name}.model"

    def visit(row: str, before: tuple[tuple[str, str], ...]) -> Iterator[str]:
        """``before``: (row, the key by which it needs the next) on the way to this row."""
        rows = [name for name, _ in before]
        if row in rows:
            circle = before[rows.index(row) :]
            afters = [*rows[rows.index(row) + 1 :], row]
            ways = ", ".join(f"{one} needs {after} ({key})" for (one, key), after in zip(circle, afters, strict=True))
            yield f"methods.{row}: would have to be trained before itself: {ways}; change one of these keys"
        elif row in experiment.methods and row not in seen:
            seen.add(row)
            for other, key in needed(row):
                yield from visit(other, (*before, (row, key)))

    for row in experiment.methods:
        yield from visit(row, ())


def _source_faults(
    experiment: Experiment, name: str, source: SourceSettings, of_all: Sequence[str], unread: Collection[str]
) -> Iterator[str]:
    if name in OWN_SOURCES:
        yield f": the name is taken; {', '.join(OWN_SOURCES)} need no table"
    if not re.fullmatch(NAME, name):
        yield ": a name is letters, digits, - and _; choose another"
    if source.file is not None:
        for key in source.said:
            yield f".{key}: has no effect on the responses of a file; remove the key"
        return
    models = (*experiment.policies, *_that_train(experiment))
    if source.model not in (*models, *unread):
        yield (
            f".model: found {source.model!r}; expected a table of [policies] or a row that trains "
            f"({', '.join(models)}){nearest(source.model or '', models)}"
        )
    yield from _sampling_faults(source, of_all)


def _candidate_faults(
    experiment: Experiment, method: MethodSettings, of_all: Sequence[str], unread: Collection[str]
) -> Iterator[str]:
    """What is wrong with how a row comes to its candidates."""
    sources = method.sources or ()
    if not set(unread).isdisjoint(sources):
        return
    allowed = (*OWN_SOURCES, *experiment.sources)
    files = [name for name in sources if name in experiment.sources and experiment.sources[name].file is not None]
    unknown = sorted(set(sources) - set(allowed))
    if unknown:
        yield f".sources: found {unknown[0]!r}; allowed are {', '.join(allowed)}{nearest(unknown[0], allowed)}"
    elif experiment.responses(method) < 2 and not files:
        yield (
            f": k = {experiment.responses(method)} response a prompt leaves nothing to rank; add sources, or "
            'use kind = "sft"'
        )
    single = experiment.data.rows == "texts" or experiment.data.source == "toy-reviews"
    twice = [source for i, source in enumerate(sources) if source in sources[:i]]
    if twice:
        yield f".sources: found {twice[0]!r} twice; a source may stand once only"
    if "reply" in sources and not single and "data" not in unread:
        yield '.sources: "reply" is a data set\'s single reply to a prompt; this one has pairs: "chosen", "rejected"'
    if experiment.data.rows == "texts" and {"chosen", "rejected"} & set(sources):
        yield f'.sources: found {list(sources)}, but texts have one reply to a prompt; use "reply"'
    if method.refresh is not None and "model" not in sources:
        yield (
            f".refresh: OP-{method.refresh} samples the policy while it trains, but sources = {list(sources)} has no "
            '"model"; add it, or remove refresh'
        )
    if method.refresh is not None and method.rounds is not None:
        yield ".rounds: has no effect beside refresh, which samples the policy all the time; remove one of the two"
    if method.rounds is not None and "model" not in sources:
        yield f'.rounds: IP-{method.rounds} samples the model of the round before, but sources has no "model"; add it'
    if method.reward_kl is not None and method.refresh is None:
        yield ".reward_kl: is of online sampling only; set refresh (k of OP-k), or remove it"
    if method.refresh is not None and method.scored_by is not None:
        yield f".scored_by: found {method.scored_by!r}; the reward model scores online candidates; remove the key"
    if method.scored_by == "judge" and experiment.judge is None and "judge" not in unread:
        yield '.scored_by: found "judge", and there is no [judge]; add the table, with source = "toy" or "endpoint"'
    if method.scored_by == "file" and set(files) != set(sources):
        yield (
            f'.scored_by: found "file", but of sources = {list(sources)} only {files} are files; scores of two kinds '
            "have no common scale: keep the files alone, or let the reward model score them all"
        )
    yield from _sampling_faults(method, of_all)


def _sampling_faults(candidates: CandidateSettings, of_all: Sequence[str]) -> Iterator[str]:
    """What is wrong with how the samples of a model come about."""
    drawn = candidates.drawn and "model" in (candidates.sources or ("model",))
    if drawn and candidates.temperature == 0.0 and (candidates.n or 0) > 1:
        yield f": temperature 0 gives {candidates.n} equal samples; raise it or set n = 1"
    read = READ[candidates.strategy or "sample"]
    for key in SIZES:
        if key not in read and getattr(candidates, key) is not None:  # said: nothing unread is inherited
            yield f'.{key}: has no effect where strategy = "{candidates.strategy}"; remove the key'
    yield from (f": {fault}" for fault in _search_faults(candidates) if fault not in of_all)


def _search_faults(candidates: CandidateSettings) -> Iterator[str]:
    """What is wrong with the sizes of a search."""
    beams, groups = candidates.beams, candidates.groups
    if candidates.drawn or beams is None:
        return
    if candidates.n != beams:
        yield f"n = {candidates.n}, but a search returns all its {beams} beams; set beams and remove n"
    if candidates.strategy == "diverse-beam" and groups is not None and beams % groups:
        yield f"{beams} beams do not divide into {groups} groups of equal size; change beams or groups"
