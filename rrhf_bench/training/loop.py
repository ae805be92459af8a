"""The one offline loop around a LossMethod: order, accumulation, schedule, clipping. Methods bring the loss only."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from rrhf_bench.errors import DataError, StageError
from rrhf_bench.policy.policy import Policy
from rrhf_bench.seeding import generator
from rrhf_bench.settings import OfflineSettings
from rrhf_bench.training.method import (
    Example,
    LossMethod,
    MethodBatch,
    Progress,
    TrainContext,
    TrainInputs,
    TrainResult,
)
from rrhf_bench.training.optimiser import adamw, lr_factor, set_lr


class OfflineTrainer:
    """Epochs over fixed examples, ``batch_prompts`` of them an optimiser step, in an order fixed by the seed."""

    def __init__(self, method: LossMethod, settings: OfflineSettings) -> None:
        self.method = method
        self.settings = settings
        self.requires = method.requires

    def fit(self, policy: Policy, inputs: TrainInputs, context: TrainContext) -> TrainResult:
        """Raises DataError where no example fits, StageError (with its step) where the loss is not finite."""
        settings = self.settings
        examples, counts = self._fitting(policy, self.method.examples(inputs))
        total = settings.epochs * math.ceil(len(examples) / settings.batch_prompts)
        optimiser = adamw(policy.parameters(), settings)
        context.watch(Progress(0.0, 0, 0), policy)
        for step, batch in enumerate(batches(examples, settings, context.seed)):
            lr = settings.lr * lr_factor(step, total, settings)
            set_lr(optimiser, lr)
            metrics = self.accumulate(policy, batch)
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.grad_clip)
            if not (math.isfinite(metrics["loss"]) and torch.isfinite(norm)):
                prompts = ", ".join(example.prompt.id for example in batch[:4])
                raise StageError(
                    f"step {step + 1} of {total}: loss {metrics['loss']} with gradient norm {norm.item()}; "
                    f"lower lr ({settings.lr}) or look at the prompts of this batch ({prompts}, ...)"
                )
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            context.log({"step": step + 1, **metrics, "lr": lr, "grad_norm": norm.item()})
            context.watch(Progress((step + 1) / total, step + 1, 0), policy)
        return TrainResult(total, 0, counts)

    def accumulate(self, policy: Policy, batch: Sequence[Example]) -> dict[str, float]:
        """Gradients of the mean loss over the batch, however it is cut into passes; the metrics' weighted means."""
        size = self.settings.micro_batch_prompts or len(batch)
        passes = [batch[i : i + size] for i in range(0, len(batch), size)]
        weight = 0.0
        sums: dict[str, float] = defaultdict(float)
        for examples in passes:
            method_batch = MethodBatch.of(examples, policy.tokenization, self.settings.max_length)
            output = self.method.loss(policy, method_batch)
            (output.loss * output.weight).backward()
            weight += output.weight
            for name, value in {"loss": output.loss.item(), **output.metrics}.items():
                sums[name] += value * output.weight
        for parameter in policy.parameters():
            if parameter.grad is not None:
                parameter.grad /= weight
        return {name: value / weight for name, value in sums.items()}

    def _fitting(self, policy: Policy, examples: Sequence[Example]) -> tuple[Sequence[Example], dict[str, int]]:
        """The examples whose prompt leaves room for a response, and what was dropped, cut or tied."""
        limit = self.settings.max_length
        tokenization = policy.tokenization
        lengths = [len(tokenization.prompt_ids(example.prompt)) for example in examples]
        kept = [e for e, length in zip(examples, lengths, strict=True) if limit is None or length < limit]
        if not kept:
            raise DataError(
                f"max_length {limit}: none of {len(examples)} prompts leaves room for a response "
                f"(the shortest has {min(lengths, default=0)} tokens); raise max_length"
            )
        cut = 0
        if limit is not None:
            for example, length in zip(examples, lengths, strict=True):
                ids = (tokenization.response_ids(r.text, ended=r.ended) for r in example.responses)
                cut += sum(length < limit < length + len(response) for response in ids)
        scored = [example.rewards for example in kept if example.rewards]
        counts = {
            "examples": len(kept),
            "prompts_too_long": len(examples) - len(kept),
            "responses_truncated": cut,
            "groups_with_ties": sum(len(set(r)) < len(r) for r in scored),
            "groups_all_equal": sum(len(set(r)) == 1 for r in scored),
        }
        return kept, counts


def batches(examples: Sequence[Example], settings: OfflineSettings, seed: int) -> Iterator[list[Example]]:
    """Every example once an epoch, shuffled by (seed, epoch); the last batch of an epoch may be smaller."""
    for epoch in range(settings.epochs):
        order = generator(seed, "order", epoch).permutation(len(examples))
        for start in range(0, len(examples), settings.batch_prompts):
            yield [examples[i] for i in order[start : start + settings.batch_prompts]]
