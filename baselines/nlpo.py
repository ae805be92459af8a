"""NLPO: PPO on a policy whose unlikely tokens are masked (arXiv 2210.01241).

Letters: N response tokens, B rows of one pass, T tokens of a row, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from baselines.nlpo_settings import NLPOSettings
from baselines.ppo import PPO, ValueFunction
from rrhf_bench.errors import StageError
from rrhf_bench.policy.batching import ResponseBatch
from rrhf_bench.policy.logprobs import gather_logprobs, outside_top_p
from rrhf_bench.policy.policy import Policy, TransformersPolicy

CHUNK_TOKENS = 512  # whose logits exist at a time


def masked_logprobs(
    logits_NV: Tensor, mask_logits_NV: Tensor, token_N: Tensor, *, top_p: float, temperature: float = 1.0
) -> Tensor:
    """Return the (N,) log-probs of tokens under the policy restricted to the mask policy's top-p set, renormalised.

    The token itself is always in the set: a rounding in the sampler's own sum must not make its log-prob infinite.
    """
    outside_NV = outside_top_p(mask_logits_NV.float() / temperature, top_p).scatter(1, token_N[:, None], False)
    return gather_logprobs(logits_NV.masked_fill(outside_NV, -torch.inf), token_N, temperature)


class MaskedCritic:
    """PPO's critic that also computes the log-probs, of the policy restricted by a copy of itself."""

    def __init__(self, value: ValueFunction, mask: TransformersPolicy, top_p: float) -> None:
        self.value = value
        self.mask = mask
        self.top_p = top_p

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the parameters of the value function that are not the policy's."""
        return self.value.parameters()

    def forward(self, policy: Policy, batch: ResponseBatch) -> tuple[Tensor, Tensor]:
        """Return the (B, T) masked log-probs and values of the response tokens."""
        assert isinstance(policy, TransformersPolicy)
        hidden_BTD = policy.response_states(batch).hidden_BTD
        with torch.no_grad():
            mask_hidden_BTD = self.mask.response_states(batch).hidden_BTD
        at_BT = batch.mask_BT.to(hidden_BTD.device)
        hidden_ND, mask_hidden_ND = hidden_BTD[at_BT], mask_hidden_BTD[at_BT]
        token_N = torch.tensor([token for ids in batch.response_ids for token in ids], device=hidden_BTD.device)
        head, mask_head = policy.model.get_output_embeddings(), self.mask.model.get_output_embeddings()

        def chunk(hidden_ND: Tensor, mask_hidden_ND: Tensor, token_N: Tensor) -> Tensor:
            with torch.no_grad():
                mask_logits_NV = mask_head(mask_hidden_ND)
            return masked_logprobs(
                head(hidden_ND), mask_logits_NV, token_N, top_p=self.top_p, temperature=batch.temperature
            )

        parts = zip(*(x.split(CHUNK_TOKENS) for x in (hidden_ND, mask_hidden_ND, token_N)), strict=True)
        logp_N = torch.cat([checkpoint(chunk, *part, use_reentrant=False) for part in parts])
        logp_BT = logp_N.new_zeros(at_BT.shape).masked_scatter(at_BT, logp_N)
        states = hidden_BTD if self.value.trunk is None else self.value.trunk.response_states(batch).hidden_BTD
        return logp_BT, self.value.values(states, batch)


class NLPO(PPO):
    """NLPO: everything is PPO's but the log-probs, which are those of the masked policy."""

    settings: NLPOSettings

    def critic(self, policy: Policy) -> MaskedCritic:  # type: ignore[override]
        """Return PPO's value function with a copy of the policy as its mask.

        Raises StageError for a model whose logits are not its head's.
        """
        assert isinstance(policy, TransformersPolicy)
        one_token = ResponseBatch.of_pairs([((policy.tokenization.eos_id,), (policy.tokenization.eos_id,))])
        with torch.no_grad():
            states = policy.response_states(one_token)
            logits_1V = policy.model.get_output_embeddings()(states.hidden_BTD[0])
            own_1 = gather_logprobs(logits_1V, torch.tensor([policy.tokenization.eos_id], device=logits_1V.device))
        if not torch.allclose(own_1, states.logp_BT[0], rtol=1e-2, atol=1e-2):
            raise StageError(
                "nlpo: the model caps or scales its logits, which the mask does not know; use another model"
            )
        self.mask = policy.frozen_copy()
        value = ValueFunction.of(policy, separate=self.settings.value == "separate")
        return MaskedCritic(value, self.mask, self.settings.top_p)

    @torch.no_grad()
    def begin(self, policy: Policy) -> None:
        """Copy the policy's weights into the mask policy."""
        own = self.mask.model.state_dict()
        for name, value in policy.state():
            own[name].copy_(value)
