"""CoH: Chain of Hindsight, supervised fine-tuning on replies behind words of feedback (arXiv 2302.02676).

The released code is forhaoliu/chain-of-hindsight. Departures from it:
1. The marker stands behind the last turn's ``Assistant:`` alone. The code also puts a row's marker into the history.
2. A chained row is two examples: its first reply behind a prompt, and its second reply behind prompt, first reply and
   markers. The log-probs are those of the row, except that the second reply does not see the first one's end token.
3. There is no random masking of past tokens (the paper's 0 to 5%, the code's default 0) and no pretraining loss.
A loss sees no marker: markers are text of the prompt, and the trained policy is prompted with one (``cue``).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from baselines.coh_settings import CoHSettings, Form
from baselines.sft import sft_loss
from rrhf_bench.errors import DataError
from rrhf_bench.policy.logprobs import sequence_score
from rrhf_bench.policy.tokenization import Tokenization
from rrhf_bench.records import Prompt
from rrhf_bench.training.method import Example, LossOutput, MethodBatch, TrainInputs
from rrhf_bench.training.pairs import pair_examples

coh_loss = sft_loss  # The update is SFT's; the method is in the text of the prompts.


def hindsight(example: Example, form: Form, settings: CoHSettings) -> list[Example]:
    """Return the examples of one row: each reply that it holds, behind all text that comes before the reply."""
    marker = {"good": settings.good, "bad": settings.bad}
    reply = dict(zip(("good", "bad"), example.responses, strict=True))
    text, made = example.prompt.text, []
    for i, side in enumerate(form.split("-")):
        again = example.prompt.text if i and settings.repeat_prompt else ""
        text += again + marker[side]
        made.append(Example(Prompt(text), (reply[side],)))
        text += reply[side].text
    return made


def require_whole_markers(tokenization: Tokenization, prompt: Prompt, markers: Sequence[str]) -> None:
    """Raise DataError if a policy cannot be prompted with a marker, or reads it as other text."""
    if tokenization.template.kind == "chat" or tokenization.template.cue:
        found = "a chat template" if tokenization.template.kind == "chat" else "an initial policy with markers already"
        raise DataError(f'coh: found {found}; it needs plain transcripts (template = "hh"), to which it adds markers')
    plain, unknown = tokenization.prompt_ids(prompt), tokenization.tokenizer.unk_token_id
    seen = {}
    for marker in markers:
        marked = tokenization.prompt_ids(Prompt(prompt.text + marker))
        added = seen[marker] = marked[len(plain) :]
        if marked[: len(plain)] != plain or not added or (unknown is not None and unknown in added):
            raise DataError(
                f"coh: the tokenizer does not keep the marker {marker!r} apart from the prompt, or has no tokens for "
                "it; it needs markers of whole tokens: change good and bad"
            )
    if len(set(seen.values())) < len(seen):
        raise DataError(f"coh: the tokenizer reads the markers {list(seen)} as the same tokens; change good and bad")


class CoH:
    """CoH as a LossMethod. An example is one reply behind a prompt with markers."""

    def __init__(self, settings: CoHSettings) -> None:
        self.settings = settings

    def examples(self, inputs: TrainInputs) -> Sequence[Example]:
        """Return the examples of the rows of each pair, which takes the forms in turn or all of them.

        Raises DataError if a prompt has no pair, or if the tokenizer splits a marker.
        """
        s, pairs = self.settings, pair_examples(inputs, self.settings.kind)
        if inputs.tokenization is not None:
            require_whole_markers(inputs.tokenization, pairs[0].prompt, (s.good, s.bad))
        forms = [s.forms if s.mix == "all" else (s.forms[i % len(s.forms)],) for i in range(len(pairs))]
        return [
            example
            for pair, own in zip(pairs, forms, strict=True)
            for form in own
            for example in hindsight(pair, form, s)
        ]

    def loss(self, logp_RT: Tensor, batch: MethodBatch) -> LossOutput:
        """Return the loss over the batch's response tokens, or over its responses, as ``reduction`` says."""
        mask_RT = batch.responses.mask_BT.to(logp_RT.device)
        loss = coh_loss(logp_RT, mask_RT, reduction=self.settings.reduction)
        weight = float(mask_RT.sum()) if self.settings.reduction == "token" else float(batch.prompts)
        return LossOutput(loss, weight, {"logps/mean": sequence_score(logp_RT, mask_RT).mean().item()})
