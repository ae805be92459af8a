"""Measurements of one row by training seed and prompt, and the pairing of two rows.

Letters: S seeds, P prompts.
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
    """Values (S, P) of one row, nan if a reply has none. ``one_model``: every seed evaluates the same model."""

    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    values_SP: Floats
    one_model: bool = False

    @property
    def mean_S(self) -> Floats:
        return np.asarray(self.values_SP.mean(axis=1))

    def only(self, seeds: Sequence[int], prompts: Sequence[str]) -> Grid:
        """Return the values of these seeds and prompts, in their order."""
        values_SP = self.values_SP[np.ix_(_places(self.seeds, seeds), _places(self.prompts, prompts))]
        return Grid(tuple(seeds), tuple(prompts), values_SP, self.one_model)


@dataclass(frozen=True)
class Block(Generic[T]):
    """Records as seeds x prompts, the same prompts in every seed. ``dropped`` counts those that some seed lacks."""

    seeds: tuple[int, ...]
    prompts: tuple[str, ...]  # ids, sorted
    items_SP: tuple[tuple[T, ...], ...]
    dropped: int = 0

    @property
    def items(self) -> list[T]:
        return [item for items_P in self.items_SP for item in items_P]

    def grid(self, value: Callable[[T], float], *, one_model: bool = False) -> Grid:
        values = [[value(item) for item in items_P] for items_P in self.items_SP]
        return Grid(self.seeds, self.prompts, np.array(values, dtype=np.float64), one_model)

    def only(self, seeds: Sequence[int], prompts: Sequence[str]) -> Block[T]:
        """Return the records of these seeds and prompts, in their order."""
        columns = _places(self.prompts, prompts)
        rows = (self.items_SP[s] for s in _places(self.seeds, seeds))
        return Block(tuple(seeds), tuple(prompts), tuple(tuple(row[c] for c in columns) for row in rows))


def pair(a: Grid, b: Grid) -> tuple[Floats, Floats, tuple[str, ...]] | Missing:
    """Return the values of both rows on the seeds and prompts that both have, and these prompts.

    One model with one seed stands against every seed.
    """
    alone = any(grid.one_model and len(grid.seeds) == 1 for grid in (a, b))
    seeds, prompts = in_both(a.seeds, b.seeds), in_both(a.prompts, b.prompts)
    if not (seeds or alone):
        return Missing("no seed in common")
    if len(prompts) < 2:
        return Missing("fewer than 2 prompts in common")
    a_SP, b_SP = (grid.only(grid.seeds if alone else seeds, prompts).values_SP for grid in (a, b))
    return a_SP, b_SP, prompts


def in_both(a: Sequence[T], b: Sequence[T]) -> tuple[T, ...]:
    """Return the items that both have, in the order of ``a``."""
    known = set(b)
    return tuple(item for item in a if item in known)


def _places(all_: Sequence[T], some: Sequence[T]) -> list[int]:
    place = {item: i for i, item in enumerate(all_)}
    return [place[item] for item in some]
