"""Batches with random log-probs, on which the loss of a method is compared with a slow definition."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rrhf_bench.policy.tokenization import Tokenization
from rrhf_bench.training.method import MethodBatch, TrainInputs


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
