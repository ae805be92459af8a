"""The sides of a training step by name, the differences between their results, and the memory that each takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import measure_rounds, peak_above
from benchmarks.released import released
from benchmarks.workloads import IGNORE, Group, Workload, make_model, make_tokenization, padded_rows
from rrhf_bench.errors import StageError
from rrhf_bench.policy.policy import Computation, TransformersPolicy
from rrhf_bench.training.rrhf import rrhf_loss

Forward = Callable[[Group], tuple[Tensor, Tensor]]  # a group -> its loss and the (K,) scores p


def ours(model: Any, layout: Literal["packed", "padded"] = "packed", **how: Any) -> Forward:
    """Return the forward pass of a step as the package trains; ``how`` are fields of Computation."""
    policy = TransformersPolicy(model, make_tokenization(), Computation(**{"onednn": "off", **how}))
    if layout == "packed" != policy.layout:
        raise StageError(f"the model does not pack ({policy.layout_reason}), so there is nothing to compare")
    policy.layout = layout

    def forward(group: Group) -> tuple[Tensor, Tensor]:
        batch = group.batch
        return _loss(policy.token_logprobs(batch), batch.mask_BT.to(policy.device), group)

    return forward


def labelled(model: Any) -> Forward:
    """Return the forward pass of a careful trainer on padded rows, such as TRL's: the head on labelled positions only.

    Prompts are still repeated and rows still padded.
    """

    def forward(group: Group) -> tuple[Tensor, Tensor]:
        ids_KL, attention_KL, label_KL = padded_rows(group, model.device)
        hidden_KLD = model.base_model(input_ids=ids_KL, attention_mask=attention_KL, use_cache=False).last_hidden_state
        return _loss(labelled_logprobs(hidden_KLD, label_KL, model.get_output_embeddings()), label_KL != IGNORE, group)

    return forward


def labelled_logprobs(hidden_KLD: Tensor, label_KL: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Return (K, L) log-probs of the labels in float32 or better, 0 where a position is not scored."""
    scored_KL = label_KL != IGNORE
    logits_NV = head(hidden_KLD[scored_KL])
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    logp_N = logits_NV.gather(-1, label_KL[scored_KL][:, None]).squeeze(-1) - logits_NV.logsumexp(-1)
    return logp_N.new_zeros(label_KL.shape).masked_scatter(scored_KL, logp_N)


def _loss(logp_KL: Tensor, scored_KL: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Return (loss, (K,) scores) of a group by the package's own RRHF loss."""
    losses = rrhf_loss(
        logp_KL[None],
        scored_KL[None],
        torch.tensor([group.rewards], device=logp_KL.device),
        variant="official",
        padded_length_B=torch.tensor([group.padded_length], device=logp_KL.device),
    )
    return losses.total, losses.score_BG[0]


RELEASED, PACKED, STEERED = "released", "packed", "packed, oneDNN"
SIDES: Mapping[str, Callable[[Any], Forward]] = {
    RELEASED: released,
    "labelled rows": labelled,
    "padded": partial(ours, layout="padded"),
    PACKED: ours,
    STEERED: partial(ours, onednn="on"),
    "packed, checkpointed": partial(ours, checkpoint_activations=True),
}
COLOURS = dict(zip(SIDES, ("#6b6b6b", "#E69F00", "#CC79A7", "#0072B2", "#56B4E9", "#009E73"), strict=True))


def sides_for(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Return the sides that differ: oneDNN multiplies half precision on a CPU in any case, and nothing on a GPU."""
    steerable = device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return [name for name in SIDES if steerable or name != STEERED]


class Results(NamedTuple):
    """What a step computed, in float64 on the CPU."""

    loss: float
    score_N: Tensor  # p of all groups, one after another
    gradients: dict[str, Tensor]


class Steps(NamedTuple):
    """The work of a side: one step for each prompt of a workload, from the weights of a seed."""

    workload: Workload
    seed: int
    device: torch.device
    threads: int

    def model(self) -> Any:
        return make_model(self.workload.shape, seed=self.seed, dtype=self.workload.dtype, device=self.device)


class Stepper:
    """A side at work on a model of its own."""

    def __init__(self, side: str, steps: Steps, model: Any = None) -> None:
        torch.set_num_threads(steps.threads)  # of this process, which may be a new one
        self.model = steps.model() if model is None else model
        self.groups = steps.workload.groups(steps.seed)
        self.forward = SIDES[side](self.model)

    def prepare(self) -> None:
        """Set gradients to zeros in the memory that they have, as in a batch that other steps have begun."""
        self.model.zero_grad(set_to_none=False)

    def run(self) -> None:
        """Compute forward, loss and backward for each group in turn; gradients add up."""
        for group in self.groups:
            self.forward(group)[0].backward()

    def results(self) -> Results:
        """Return a step's loss, scores and gradients; the gradients are not kept on the model."""
        self.model.zero_grad()
        loss, scores = 0.0, []
        for group in self.groups:
            total, score_K = self.forward(group)
            total.backward()
            loss += total.item()
            scores.append(score_K.detach().double().cpu())
        gradients = {name: p.grad.double().cpu() for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad()
        return Results(loss, torch.cat(scores), gradients)


def time_steps(names: Sequence[str], steps: Steps, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each side's step in each round; for a process of its own."""
    return measure_rounds(steps.workload.name, {name: Stepper(name, steps) for name in names}, rounds)


def extra_memory(side: str, steps: Steps) -> int | None:
    """Return the bytes that a step takes above weights and gradients at its peak; for a process of its own.

    The step is the second of two whose gradients are added up, as in an accumulated batch: weights, gradients and what
    libraries set up once are there before it. None if the system does not say.
    """
    own = Stepper(side, steps)
    own.run()
    return peak_above(own.run, steps.device)


class Errors(NamedTuple):
    """How far a side's results are from another's, each relative to the other."""

    loss: float
    scores: float  # largest difference over largest score
    gradients: float  # norm of the difference of all gradients over their norm
    worst_gradient: float  # the same for the one weight where it is largest


def errors(found: Results, expected: Results) -> Errors:
    """Return the errors. Raises StageError if the two have gradients of different weights."""
    if found.gradients.keys() != expected.gradients.keys():
        names = ", ".join(sorted(found.gradients.keys() ^ expected.gradients.keys())[:4])
        raise StageError(f"gradients: only one of two sides has some for {names}")
    gap_W = torch.stack([(found.gradients[name] - gradient).norm() for name, gradient in expected.gradients.items()])
    norm_W = torch.stack([gradient.norm() for gradient in expected.gradients.values()])
    return Errors(
        abs(found.loss - expected.loss) / abs(expected.loss),
        ((found.score_N - expected.score_N).abs().max() / expected.score_N.abs().max()).item(),
        (gap_W.norm() / norm_W.norm()).item(),
        (gap_W / norm_W).max().item(),
    )


# The same sums in another order: a few units in the last place, times the root of the number of additions.
FLOAT32 = Errors(1e-5, 1e-5, 1e-5, 1e-5)


def reference(steps: Steps, found: Mapping[str, Results]) -> tuple[Results, Errors]:
    """Return the results that all sides must agree with, the released computation in float32, and the bound.

    In bfloat16 a value is rounded to 8 bits about 12 times in each layer (two norms, seven products, rotation,
    attention, two sums) and three times around the head, and its gradient as often on the way back. Independent
    roundings add up like a random walk: 2^-8 x sqrt(2 (12 layers + 3)) for gradients. Scores and loss are means over
    hundreds of tokens, taken in float32: no further off than one rounding to bfloat16 would put them.
    """
    if steps.workload.dtype == torch.float32:
        return found[RELEASED], FLOAT32
    walk = 2**-8 * math.sqrt(2 * (12 * steps.workload.shape.layers + 3))
    return Stepper(RELEASED, steps, steps.model().float()).results(), Errors(2**-8, 2**-8, walk, walk)


def check_equal(found: Mapping[str, Results], expected: Results, bound: Errors, where: str) -> dict[str, Errors]:
    """Return each side's errors. Raises StageError naming the first number beyond its bound."""
    compared = {name: errors(result, expected) for name, result in found.items()}
    for name, error in compared.items():
        for quantity, value, limit in zip(Errors._fields, error, bound, strict=True):
            if not value <= limit:  # a number that is none is no agreement
                raise StageError(
                    f"{where}: {quantity.replace('_', ' ')} of {name!r} is {value:.2g} from the released computation, "
                    f"relative to it; at most {limit:.2g} is rounding, so nothing was timed"
                )
    return compared
