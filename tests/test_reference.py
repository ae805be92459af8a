"""Reference log-probs as data: computed once, kept, and given to a loss with its batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rrhf_bench.pipeline.stage_graph import make_plan
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.records import Candidates, Response
from rrhf_bench.registry import Method
from rrhf_bench.settings.reading import load_experiment
from rrhf_bench.training.method import Example, LossOutput, MethodBatch, TrainInputs
from rrhf_bench.training.offline import OfflineTrainer
from rrhf_bench.training.reference import ResponseLogprobs, response_logprobs
from rrhf_bench.training.rrhf_settings import RRHFSettings
from tests.test_training import CANDIDATES, PROMPTS, context


def by_hand(policy: TransformersPolicy, group: Candidates, response: Response) -> list[float]:
    """One unpadded pass of one response, its log-softmax and its shift by hand."""
    prompt_ids = list(policy.tokenization.prompt_ids(group.prompt))
    ids = list(policy.tokenization.response_ids(response.text, ended=response.ended))
    with torch.no_grad():
        logp_LV = policy.model(torch.tensor([prompt_ids + ids])).logits[0].double().log_softmax(-1)
    return [logp_LV[len(prompt_ids) - 1 + t, token].item() for t, token in enumerate(ids)]


def test_each_response_has_the_log_probs_of_the_slow_definition(policy: TransformersPolicy, tmp_path: Path) -> None:
    silent = Candidates(PROMPTS[0], (Response("", "model", "length"), Response("", "model", "eos")))
    made = response_logprobs(policy, [*CANDIDATES, silent], max_length=512, batch=5)
    made.write(tmp_path)
    table = ResponseLogprobs.read(tmp_path)
    for group in CANDIDATES:
        for response in group.responses:
            found = table.of(group.prompt, response)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, by_hand(policy, group, response), atol=1e-5)
            assert np.array_equal(found, made.of(group.prompt, response))
    # A cut reply without text has no token, and the end of one that says nothing is a token.
    assert len(table.of(PROMPTS[0], silent.responses[1])) == 1
    with pytest.raises(KeyError):
        table.of(PROMPTS[0], silent.responses[0])


def test_a_response_that_ended_is_another_than_one_that_was_cut(policy: TransformersPolicy) -> None:
    cut, ended = Response(" It is", "model", "length"), Response(" It is", "model", "eos")
    table = response_logprobs(policy, [Candidates(PROMPTS[0], (cut, ended))], max_length=512)
    assert len(table.of(PROMPTS[0], ended)) == len(table.of(PROMPTS[0], cut)) + 1


def test_an_empty_table_can_be_kept(policy: TransformersPolicy, tmp_path: Path) -> None:
    response_logprobs(policy, [], max_length=512).write(tmp_path)
    assert ResponseLogprobs.read(tmp_path)._rows == {}


class Seen:
    """A loss that keeps the batches that it is given."""

    def __init__(self) -> None:
        self.batches: list[tuple[torch.Tensor, MethodBatch]] = []

    def examples(self, inputs: TrainInputs) -> list[Example]:
        return [Example(row.prompt, row.responses, row.scores) for row in inputs.candidates]

    def loss(self, logp_RT: torch.Tensor, batch: MethodBatch) -> LossOutput:
        self.batches.append((logp_RT.detach(), batch))
        return LossOutput(0.0 * logp_RT.sum(), float(batch.prompts))


class Referring(RRHFSettings):
    requires = RRHFSettings.requires | {"reference"}
    kind: str = "tests.test_reference:METHOD"  # type: ignore[assignment]


METHOD = Method("tests.test_reference:Referring", "tests.test_reference:Seen", "referring", "#000000", "offline")


@pytest.mark.parametrize(
    ("candidates", "roles"),
    [
        ({"sources": ["model"]}, {"reference scores model"}),
        ({"sources": ["model", "chosen"]}, {"reference scores model", "reference pairs"}),
        ({"sources": ["chosen", "rejected"]}, {"reference pairs"}),
        ({"scored_by": "judge"}, {"reference judged"}),
        ({"refresh": 4}, set()),  # its reference is a model: it samples while it trains
    ],
)
def test_a_row_has_the_log_probs_of_what_it_trains_on(
    write: Callable[..., Path], candidates: dict[str, Any], roles: set[str]
) -> None:
    table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in candidates.items())
    judge = '[judge]\nsource = "toy"\n' if "scored_by" in candidates else ""
    row = f'kind = "tests.test_reference:METHOD"\ncandidates = {{ {table} }}\n'
    text = f"{judge}[methods.a]\n{row}[methods.b]\nlr = 0.01\n{row}"
    plan = make_plan(load_experiment(write(text)))
    a, b = ({role: s for role, s in stage.inputs.items() if role.startswith("reference ")} for stage in plan.stages
            if stage.kind == "train")  # fmt: skip
    assert set(a) == set(b) == roles
    assert {role: stage.key for role, stage in a.items()} == {role: stage.key for role, stage in b.items()}


def test_a_loss_finds_the_reference_of_its_rows_in_its_batch(policy: TransformersPolicy, tmp_path: Path) -> None:
    """Before any step the policy is the reference, so both log-probs are equal to rounding; a cut response too."""
    policy.pass_tokens = 60  # several passes a step
    inputs = TrainInputs(candidates=CANDIDATES, reference=response_logprobs(policy, CANDIDATES, max_length=512))
    cut_at = max(len(policy.tokenization.prompt_ids(prompt)) for prompt in PROMPTS) + 4
    for max_length in (512, cut_at):
        seen = Seen()
        settings = Referring(epochs=1, batch_prompts=4, max_length=max_length)
        OfflineTrainer(seen, settings).fit(policy, inputs, context(tmp_path))
        assert len(seen.batches) > 2
        for logp_RT, batch in seen.batches:
            assert batch.reference_RT is not None
            torch.testing.assert_close(batch.reference_RT, logp_RT, rtol=0, atol=1e-5)
            assert (batch.reference_RT != 0).equal(batch.responses.mask_BT)
            assert batch.grouped(batch.reference_RT).shape[0] == batch.prompts


class Neighbours(Seen):
    """A loss that also reads each prompt's likelihood of the next prompt's first reply."""

    def examples(self, inputs: TrainInputs) -> list[Example]:
        following = [*inputs.candidates[1:], inputs.candidates[0]]
        return [
            Example(row.prompt, (row.responses[0], other.responses[0]))
            for row, other in zip(inputs.candidates, following, strict=True)
        ]


def test_responses_that_a_method_makes_have_a_reference_too(policy: TransformersPolicy, tmp_path: Path) -> None:
    seen = Neighbours()
    inputs = TrainInputs(candidates=CANDIDATES, reference=response_logprobs(policy, CANDIDATES, max_length=512))
    settings = Referring(epochs=2, batch_prompts=4, lr=1e-2)
    OfflineTrainer(seen, settings).fit(policy, inputs, context(tmp_path))
    for logp_RT, batch in seen.batches:
        assert batch.reference_RT is not None
        torch.testing.assert_close(batch.reference_RT, logp_RT, rtol=0, atol=1e-5)


def test_a_loss_that_requires_no_reference_has_none(policy: TransformersPolicy, tmp_path: Path) -> None:
    seen = Seen()
    OfflineTrainer(seen, RRHFSettings(epochs=1)).fit(policy, TrainInputs(candidates=CANDIDATES), context(tmp_path))
    assert all(batch.reference_RT is None for _, batch in seen.batches)
    rewards = torch.cat([batch.reward_R for _, batch in seen.batches])
    assert sorted(rewards.tolist()) == sorted(score for group in CANDIDATES for score in group.scores)
