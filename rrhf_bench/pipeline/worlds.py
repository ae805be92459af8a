"""Put the records of one experiment in several embedded worlds together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

from rrhf_bench.pipeline.results import Cost, RunRecords, rows_in_order
from rrhf_bench.pipeline.store import content_key
from rrhf_bench.settings.experiment import Experiment

T = TypeVar("T")


def merge_worlds(experiment: Experiment, of_world: Mapping[int, RunRecords]) -> RunRecords:
    """Return the records of a run over several worlds.

    The seed of each record is the number of its repetition already (``Experiment.repetitions``). A prompt differs from
    world to world; ``RunRecords.place`` names it by its place in the data of its world.
    """
    every = list(of_world.values())
    first = every[0]

    def joined(of: Callable[[RunRecords], Mapping[Any, T]]) -> dict[Any, T]:
        return {key: value for records in every for key, value in of(records).items()}

    def in_order(of: Callable[[RunRecords], Iterable[T]]) -> tuple[T, ...]:
        return tuple(chain.from_iterable(map(of, every)))

    def by_row(of: Callable[[RunRecords], Mapping[tuple[str, int], T]]) -> dict[tuple[str, int], T]:
        found = joined(of)
        return {key: found[key] for key in sorted(found, key=lambda key: place[key[0]])}

    places = {world: _places(records) for world, records in of_world.items()}
    place = {row: i for i, row in enumerate(rows_in_order(experiment))}
    methods = first.experiment.methods  # with the settings that tuning has picked
    if any(records.experiment.methods != methods for records in every):
        methods = experiment.methods
    return RunRecords(
        folder=first.folder,
        experiment=experiment.model_copy(update={"methods": methods}),
        arena=content_key([records.arena for records in every])[:12],
        arena_words=_arena_words(of_world),
        evaluated=tuple(sorted(in_order(lambda r: r.evaluated), key=lambda reply: place[reply.method])),
        pairs=tuple(sorted(in_order(lambda r: r.pairs), key=lambda pair: place[pair.method])),
        reward_pairs=in_order(lambda r: r.reward_pairs),
        curves=in_order(lambda r: r.curves),
        pools=joined(lambda r: r.pools),
        candidates=by_row(lambda r: r.candidates),
        test_candidates=by_row(lambda r: r.test_candidates),
        training=by_row(lambda r: r.training),
        data_counts={world: counts for world, r in of_world.items() for counts in r.data_counts.values()},
        counts=by_row(lambda r: r.counts),
        judge_counts=by_row(lambda r: r.judge_counts),
        timings=in_order(lambda r: r.timings),
        curve_seconds=by_row(lambda r: r.curve_seconds),
        notes=tuple(dict.fromkeys(in_order(lambda r: r.notes))),
        command=first.command,
        environment=first.environment,
        costs=by_row(lambda r: r.costs),
        failures=by_row(lambda r: r.failures),
        tuned={
            row: tuple(replace(trial, world=w) for w, r in of_world.items() for trial in r.tuned.get(row, ()))
            for row in joined(lambda r: r.tuned)
        },
        trials={
            row: _mean_cost([r.trials[row] for r in every if row in r.trials]) for row in joined(lambda r: r.trials)
        },
        clusters=joined(lambda r: r.clusters),
        places=places,
        held_out=frozenset(places[world][prompt] for world, r in of_world.items() for prompt in r.held_out),
        worlds={number: time.world for number, time in experiment.repetitions.items()},
        reward_models=in_order(lambda r: r.reward_models),
    )


def _places(records: RunRecords) -> dict[str, str]:
    """Return by id the place of each prompt of a world among those of its split and kind of topic."""
    places = {}
    for split, ids in records.prompts.items():
        for kind, held_out in (("", False), (" on held-out topics", True)):
            own = [prompt for prompt in ids if (prompt in records.held_out) == held_out]
            places.update({prompt: f"{split}{kind} {i}" for i, prompt in enumerate(own)})
    return places


def _mean_cost(costs: Sequence[Cost]) -> Cost:
    """Return the mean of costs; counts are rounded, and the peak is the largest."""
    n = len(costs)
    counts = ("sampled_tokens", "sampled_replies", "reward_calls", "steps")
    seconds = ("seconds", "shared_seconds")
    peaks = [cost.train_peak_mib for cost in costs if cost.train_peak_mib is not None]
    flops = [cost.flops for cost in costs if cost.flops is not None]
    return replace(
        costs[0],
        **{name: round(sum(getattr(cost, name) for cost in costs) / n) for name in counts},
        **{name: sum(getattr(cost, name) for cost in costs) / n for name in seconds},
        train_peak_mib=max(peaks, default=None),
        flops=sum(flops) / n if len(flops) == n else None,
    )


def _arena_words(of_world: Mapping[int, RunRecords]) -> dict[str, str]:
    """Return the description of the arena; what differs between the worlds is told of each."""
    words = {}
    for name in next(iter(of_world.values())).arena_words:
        found = {world: records.arena_words[name] for world, records in of_world.items()}
        same = len(set(found.values())) == 1
        words[name] = next(iter(found.values())) if same else "; ".join(f"world {w}: {t}" for w, t in found.items())
    return words
