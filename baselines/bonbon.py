"""BoNBoN: distillation of best-of-n from its best and worst candidates (arXiv 2406.00832; gl-ybnbxb/BoNBoN).

Letters: B prompts, R = 2 B rows, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from baselines.bonbon_settings import BoNBoNSettings
from rrhf_bench.training.method import Example, LossOutput, MethodBatch, TrainInputs
from rrhf_bench.training.pairs import reward_metrics, score_sides, scored_groups


def bonbon_target(n: int) -> float:
    """Return 1 / (2 beta_n) = (n - 1) H_{n-1}, H the harmonic number: the log-ratio difference under best-of-n.

    It is the difference that the best-of-n policy has between the best and the worst of n samples, on average. So the
    loss has no temperature of its own. With n = 8 it is the 1 / (2 x 0.0275482) of the released code.
    """
    return (n - 1) * sum(1.0 / i for i in range(1, n))


def bonbon_loss(
    best_logp_B: Tensor, best_ratio_B: Tensor, worst_ratio_B: Tensor, *, target: float, alpha: float = 0.005
) -> Tensor:
    """Return the mean of alpha * -log pi(y_best) + (1 - alpha) * (D - target)^2 (2406.00832).

    D is the log-ratio of the best response less that of the worst one. Log-probs and log-ratios are summed over tokens.
    """
    return (-alpha * best_logp_B + (1.0 - alpha) * (best_ratio_B - worst_ratio_B - target) ** 2).mean()


class BoNBoN:
    """BoNBoN as a LossMethod. An example is a prompt with the best and the worst of its candidates."""

    def __init__(self, settings: BoNBoNSettings) -> None:
        self.settings = settings
        self.target = bonbon_target(settings.group_size)

    def examples(self, inputs: TrainInputs) -> Sequence[Example]:
        """Return one example for each prompt with two different rewards. Raises DataError if there is none.

        Of tied candidates the first is taken.
        """
        examples = []
        for group in scored_groups(inputs, self.settings.kind):
            rewards = group.rewards
            if len(set(rewards)) > 1:
                pair = rewards.index(max(rewards)), rewards.index(min(rewards))
                responses = tuple(group.responses[i] for i in pair)
                examples.append(replace(group, responses=responses, rewards=tuple(rewards[i] for i in pair)))
        return examples

    def loss(self, logp_RT: Tensor, batch: MethodBatch) -> LossOutput:
        """Return the loss over the batch's prompts, which are its weight."""
        assert batch.reference_RT is not None
        ratio_RT = logp_RT - batch.reference_RT.to(logp_RT.device)
        best_ratio_B, worst_ratio_B = score_sides(ratio_RT, batch, "none")
        best_B, worst_B = score_sides(logp_RT, batch, "none")
        loss = bonbon_loss(best_B, best_ratio_B, worst_ratio_B, target=self.target, alpha=self.settings.alpha)
        metrics = {
            **reward_metrics(best_ratio_B, worst_ratio_B),
            "logps/chosen": best_B.mean().item(),
            "logps/rejected": worst_B.mean().item(),
        }
        return LossOutput(loss, float(batch.prompts), metrics)
