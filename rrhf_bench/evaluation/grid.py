"""Measurements of one row by training seed and prompt, and the pairing of two rows.

Letters: S seeds (with several worlds: seeds of worlds), P prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from rrhf_bench.evaluation.statistics import Floats

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Missing:
    """Why there is no number."""

    reason: str


@dataclass(frozen=True, slots=True)
class Grid:
    """Values (S, P) of one row, nan if a reply has none. ``one_model``: every seed of a world evaluates one model.

    ``worlds`` holds the world of each seed if the run has several worlds; a prompt is then named by its place in the
    data of its world, and one name stands for another prompt in each world.
    """

    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    values_SP: Floats
    one_model: bool = False
    worlds: tuple[int, ...] | None = None

    @property
    def mean_S(self) -> Floats:
        return np.asarray(self.values_SP.mean(axis=1))

    def only(self, seeds: Sequence[int], prompts: Sequence[str]) -> Grid:
        """Return the values of these seeds and prompts, in their order."""
        rows, columns = _places(self.seeds, seeds), _places(self.prompts, prompts)
        values_SP = self.values_SP[np.ix_(rows, columns)]
        return Grid(tuple(seeds), tuple(prompts), values_SP, self.one_model, _chosen(self.worlds, rows))


@dataclass(frozen=True)
class Block(Generic[T]):
    """Records as seeds x prompts, the same prompts in every seed. ``dropped`` counts those that some seed lacks."""

    seeds: tuple[int, ...]
    prompts: tuple[str, ...]  # ids, sorted
    items_SP: tuple[tuple[T, ...], ...]
    dropped: int = 0
    worlds: tuple[int, ...] | None = None  # as in Grid

    @property
    def items(self) -> list[T]:
        return [item for items_P in self.items_SP for item in items_P]

    @property
    def repetitions(self) -> int:
        """Return the number of seeds, or of worlds if there are several."""
        return len(set(self.worlds or self.seeds))

    def grid(self, value: Callable[[T], float], *, one_model: bool = False) -> Grid:
        values = [[value(item) for item in items_P] for items_P in self.items_SP]
        return Grid(self.seeds, self.prompts, np.array(values, dtype=np.float64), one_model, self.worlds)

    def only(self, seeds: Sequence[int], prompts: Sequence[str]) -> Block[T]:
        """Return the records of these seeds and prompts, in their order."""
        rows, columns = _places(self.seeds, seeds), _places(self.prompts, prompts)
        items_SP = tuple(tuple(self.items_SP[s][c] for c in columns) for s in rows)
        return Block(tuple(seeds), tuple(prompts), items_SP, worlds=_chosen(self.worlds, rows))


@dataclass(frozen=True, slots=True)
class Paired:
    """Values (S, P) of two rows on the seeds and prompts that both have; ``worlds`` as in Grid."""

    a_SP: Floats
    b_SP: Floats
    prompts: tuple[str, ...]
    worlds: tuple[int, ...] | None


def pair(a: Grid, b: Grid) -> Paired | Missing:
    """Return the values of both rows on the seeds and prompts that both have.

    One model with one seed of its world stands against every seed of that world. In a run of several worlds the world
    is the random unit, so that rows with only one world in common do not pair.
    """
    prompts = in_both(a.prompts, b.prompts)
    if _alone(a) or _alone(b):
        one, others = (a, b) if _alone(a) else (b, a)
        place = {world: i for i, world in enumerate(_worlds(one))}
        rows = [(place[world], i) for i, world in enumerate(_worlds(others)) if world in place]
        rows = rows if one is a else [(i, j) for j, i in rows]
    else:
        rows = [(a.seeds.index(seed), b.seeds.index(seed)) for seed in in_both(a.seeds, b.seeds)]
    if not rows:
        return Missing("no seed in common")
    if len(prompts) < 2:
        return Missing("fewer than 2 prompts in common")
    of_a, of_b = [i for i, _ in rows], [j for _, j in rows]
    worlds = _chosen(a.worlds, of_a)
    if worlds is not None and len(set(worlds)) < 2:
        return Missing("only one world has both rows")
    a_SP = a.values_SP[np.ix_(of_a, _places(a.prompts, prompts))]
    b_SP = b.values_SP[np.ix_(of_b, _places(b.prompts, prompts))]
    return Paired(a_SP, b_SP, prompts, worlds)


def _alone(grid: Grid) -> bool:
    """Return True for one model that was evaluated with one seed in each world."""
    return grid.one_model and len(set(_worlds(grid))) == len(grid.seeds)


def _worlds(grid: Grid) -> tuple[int, ...]:
    return grid.worlds or (0,) * len(grid.seeds)


def _chosen(worlds: tuple[int, ...] | None, rows: Sequence[int]) -> tuple[int, ...] | None:
    return None if worlds is None else tuple(worlds[row] for row in rows)


def in_both(a: Sequence[T], b: Sequence[T]) -> tuple[T, ...]:
    """Return the items that both have, in the order of ``a``."""
    known = set(b)
    return tuple(item for item in a if item in known)


def _places(all_: Sequence[T], some: Sequence[T]) -> list[int]:
    place = {item: i for i, item in enumerate(all_)}
    return [place[item] for item in some]
