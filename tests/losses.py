"""Helpers for the tests of methods: batches with random log-probs, first rollouts, formulas broken on purpose."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from rrhf_bench.pipeline import stage_helpers
from rrhf_bench.policy.tokenization import Tokenization
from rrhf_bench.records import Candidates, Prompt
from rrhf_bench.settings.online import OnPolicySettings
from rrhf_bench.testing import PROMPTS, Run
from rrhf_bench.training.method import MethodBatch, TrainInputs
from rrhf_bench.training.on_policy import OnPolicyTrainer
from rrhf_bench.training.rollouts import Rollouts


def random_batch(
    method: Any, inputs: TrainInputs, tokenization: Tokenization, *, examples: slice = slice(None)
) -> tuple[Tensor, MethodBatch]:
    """Return the (R, T) log-probs and the batch of a method's examples, with a reference. Padding is zero, as the loop
    gives it; the responses are of several lengths."""
    batch = MethodBatch.of(method.examples(inputs)[examples], tokenization, None)
    mask_RT, rng = batch.responses.mask_BT, torch.Generator().manual_seed(0)
    logp_RT, reference_RT = (-torch.rand(mask_RT.shape, generator=rng) * mask_RT for _ in range(2))
    return logp_RT, replace(batch, reference_RT=reference_RT)


def by_response(batch: MethodBatch, *tables_RT: Tensor) -> list[list[list[list[float]]]]:
    """Return for each prompt and response its token values in each table, without padding."""
    groups: list[list[list[list[float]]]] = [[] for _ in range(batch.prompts)]
    for row, group in enumerate(batch.group_of):
        length = batch.responses.lengths[row]
        groups[group].append([table[row, :length].tolist() for table in tables_RT])
    return groups


def build_trainer(settings: Any) -> Any:
    """Return the loop that trains a method on texts of at most 128 tokens."""
    return stage_helpers.trainer(settings, 128)


def draw_first_rollouts(
    run: Run, settings: OnPolicySettings, prompts: Sequence[Prompt] = PROMPTS
) -> tuple[OnPolicyTrainer, Any, Rollouts]:
    """Return the trainer of an on-policy method, its state, and the rollouts of its first iteration."""
    trainer = build_trainer(settings)
    state = trainer.start(run.policy)
    inputs = TrainInputs(candidates=[Candidates(prompt, ()) for prompt in prompts])
    return trainer, state, trainer.roll_out(trainer.sampler(run.policy, run.context), inputs, state)


def assert_fault_is_noticed(
    module: ModuleType, name: str, right: str, wrong: str, checks: Callable[[Any], object]
) -> None:
    """Replace ``right`` in the source of a function or class by ``wrong``, and assert that its checks then fail."""
    source = inspect.getsource(getattr(module, name))
    assert source.count(right) == 1
    scope = dict(vars(module))
    exec(source.replace(right, wrong), scope)
    with pytest.raises(AssertionError):
        checks(scope[name])
