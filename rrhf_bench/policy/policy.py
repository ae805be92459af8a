"""The interface of a policy, which methods train and samplers sample from, and its transformers implementation."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rrhf_bench.data.dialogue import Template
from rrhf_bench.errors import DataError, StageError, is_out_of_memory
from rrhf_bench.policy import attention, onednn
from rrhf_bench.policy.adapters import adapters_off, add_adapters, merge, merged_state
from rrhf_bench.policy.batching import Pack, ResponseBatch, pack, padded, passes, places
from rrhf_bench.policy.head import token_logprobs
from rrhf_bench.policy.loading import end_ids_of, load_causal_lm, save_causal_lm
from rrhf_bench.policy.logprobs import gather_logprobs
from rrhf_bench.policy.tokenization import Tokenization
from rrhf_bench.settings.methods import LoraSettings

# Tokens fed at once: enough to keep the device busy, few enough for the activations to fit.
PASS_TOKENS = {"cpu": 2048, "cuda": 16384}
# How far the log-probs of two layouts may be apart on average, in nats: what a precision leaves, with room.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class ResponseStates:
    """Token log-probs and, from the same pass, the last hidden states at the positions that predict those tokens."""

    logp_BT: Tensor  # float32, 0 beyond each row's end
    hidden_BTD: Tensor  # the model's dtype, 0 beyond each row's end


class Policy(Protocol):
    """The interface that every training method is written against."""

    tokenization: Tokenization
    pass_tokens: int  # that a forward and its backward should be fed at once

    def fed_tokens(self, batch: ResponseBatch) -> int:
        """Return the number of tokens fed to the model for a batch, which is the cost of the batch."""
        ...

    def token_logprobs(self, batch: ResponseBatch) -> Tensor:
        """Return (B, T) float32 log-probs of the response tokens given prompt and earlier tokens; 0 beyond each end."""
        ...

    def response_states(self, batch: ResponseBatch) -> ResponseStates:
        """Return the same log-probs with the last hidden states at the predicting positions, from one pass."""
        ...

    def parameters(self) -> Iterable[torch.nn.Parameter]: ...

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Return an iterator over the weights under transformers' names, from which samplers copy.

        Adapters are added to a weight when the iterator reaches it. A consumer that copies each weight before it takes
        the next one therefore never holds a second copy of the model.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write a transformers folder (safetensors, config, tokenizer)."""
        ...


@dataclass(frozen=True)
class Computation:
    """How a policy computes. None of the fields changes a result beyond rounding, which is coarser with autocast."""

    pass_tokens: int | None = None  # fed at once where training can choose; none: by device, of PASS_TOKENS
    checkpoint_activations: bool = False  # computed again in the backward pass instead of kept
    onednn: Literal["auto", "on", "off"] = "auto"  # float32 products of linear layers on a CPU
    autocast: Literal["bfloat16"] | None = None  # of float32 weights: products in bfloat16, steps in float32
    kernels: Literal["liger"] | None = None  # that replace the model's own norms and gated layers on a GPU


class TransformersPolicy:
    """A causal language model of transformers as a Policy. Dropout is always off: ratios of probabilities need it.

    ``layout`` is the way in which responses are fed. It is "packed" unless packing does not hold for the model: a small
    group of responses is computed in both ways when the policy is made. Then it is "padded", and ``layout_reason`` says
    why. The LM head is applied to predicting positions only, in chunks.
    """

    def __init__(self, model: Any, tokenization: Tokenization, computation: Computation = Computation()) -> None:
        self.model = model.eval()
        self.tokenization = tokenization
        self.computation = computation
        self._body = model.base_model
        if self._head is None:
            raise DataError(f"{type(model).__name__}: has no language-model head; give a causal language model")
        if self._body is model:
            raise DataError(
                f"{type(model).__name__}: has no module {model.base_model_prefix!r}, where transformers says that the "
                "layers below its head are, so hidden states cannot be read; give a model of another architecture"
            )
        self.pass_tokens = computation.pass_tokens or PASS_TOKENS[self.device.type]
        self._checkpointed = _prepare_checkpoints(model) if computation.checkpoint_activations else []
        self._config = model.config.get_text_config()
        sliding = "sliding_attention" in (getattr(self._config, "layer_types", None) or ["sliding_attention"])
        self._window: int | None = getattr(self._config, "sliding_window", None) if sliding else None
        self._head_is_plain = self._check_head()
        self.onednn_layers = 0
        self._apply_onednn()
        self.layout: Literal["packed", "padded"] = "padded"
        if computation.kernels == "liger":
            self._apply_liger()
        self.layout_reason = self._choose_attention()
        if self.layout_reason is None:
            self.layout = "packed"

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        template: Template,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        pad_token: str | None = None,
        trust_remote_code: bool = False,
        computation: Computation = Computation(),
    ) -> TransformersPolicy:
        """Load from a hub id or a folder. Raises DataError naming the source if it cannot be loaded."""
        tokenizer, model = load_causal_lm(
            str(source), dtype=dtype, revision=revision, pad_token=pad_token, trust_remote_code=trust_remote_code
        )
        tokenization = Tokenization(tokenizer, template, str(source), end_ids_of(model))
        return cls(model.to(device), tokenization, computation)

    def _apply_onednn(self) -> None:
        wanted = self.computation.onednn
        if self.device.type == "cpu" and (wanted == "on" or (wanted == "auto" and onednn.worth_it())):
            self.onednn_layers = onednn.apply(self.model)

    @torch.no_grad()
    def _apply_liger(self) -> None:
        """Replace norms and gated layers by Liger's kernels. Raises StageError if they are missing or not equal."""
        from transformers.integrations.liger import apply_liger_kernel
        from transformers.utils import is_liger_kernel_available

        found, remedy = f'runtime.kernels: found "liger" on {self.device.type}', "remove the key"
        if self.device.type != "cuda" or not is_liger_kernel_available():
            raise StageError(f"{found}; expected a GPU and the package liger-kernel; {remedy}")
        group = self._trial()
        expected_BT = self.token_logprobs(group)
        # Its rotation would change every model of the process, not this one; its losses are not used here.
        apply_liger_kernel(self.model, {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False})
        if not any("forward" in vars(module) for module in self.model.modules()):
            raise StageError(f"{found}, which has no kernels for {self.model.config.model_type}; {remedy}")
        gap = self._gap(group, self.token_logprobs(group), expected_BT)
        if not gap <= ROUNDING[self.dtype]:
            raise StageError(f"{found}, whose log-probs differ by {gap:.1g} from the model's own; {remedy}")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the products, which decides how much a log-prob is rounded."""
        autocast = self.computation.autocast
        return getattr(torch, autocast) if autocast and self.model.dtype == torch.float32 else self.model.dtype

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != self.model.dtype)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def _head(self) -> Any:
        return self.model.get_output_embeddings()

    @torch.no_grad()
    def _check_head(self) -> bool:
        """Return True if logits are head(last hidden state), False if the model caps or scales its logits."""
        ids = torch.arange(4, device=self.device)[None] % self._config.vocab_size
        hidden = self._body(input_ids=ids, use_cache=False).last_hidden_state
        return torch.equal(self._head(hidden), self.model(input_ids=ids, use_cache=False).logits)

    @torch.no_grad()
    def _choose_attention(self) -> str | None:
        """Set the attention of packs if packs compute what padded rows compute; otherwise return the reason."""
        if getattr(self._config, "attn_logit_softcapping", None) is not None:
            self.model.set_attn_implementation("eager")
            return "its attention scores are soft-capped, which only eager attention computes"
        if not self._head_is_plain:
            return "its logits are not a linear map of the last hidden state"
        before = self.model.config._attn_implementation
        if before not in ("sdpa", attention.NAME):
            return f"its attention is {before}"
        group = self._trial()
        expected_BT = self.token_logprobs(group)  # in padded rows
        seen: list[Any] = []
        try:
            self.model.set_attn_implementation(attention.register())
            gap = self._gap(group, self._train_packed(group, seen), expected_BT)
            if len(seen) < self._config.num_hidden_layers:
                reason = "its layers have an attention of their own"
            elif not gap <= ROUNDING[self.dtype]:
                reason = f"log-probs differ by {gap:.1g}"
            else:
                return None
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            if is_out_of_memory(error):
                raise  # the error says nothing about packs
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
        self.model.set_attn_implementation(before)
        return reason

    def _train_packed(self, group: ResponseBatch, layers_seen: list[Any]) -> Tensor:
        """Return (B, T) log-probs of a group in packs. If the model is trained, a backward pass is tried as well: for
        some head sizes on some cards only the kernel of the backward pass does not compile."""
        table = self.model.get_input_embeddings().weight
        with torch.set_grad_enabled(table.requires_grad), self._autocast():
            hidden_ND = torch.cat([self._packed(part, layers_seen=layers_seen) for part in pack(group, 1 << 10)])
            logp_BT = self._by_row(group, self._logprobs(hidden_ND, group, range(len(group.lengths))))
            total = logp_BT.sum()
        if table.requires_grad and not torch.autograd.grad(total, table)[0].isfinite().all():
            raise ValueError("its gradients are not finite")
        return logp_BT.detach()

    @staticmethod
    def _gap(group: ResponseBatch, found_BT: Tensor, expected_BT: Tensor) -> float:
        """Return the mean difference of the log-probs of a group, in nats a token."""
        return (found_BT - expected_BT).abs().sum().item() / sum(group.lengths)

    def _trial(self) -> ResponseBatch:
        """Return a small ragged group, and a prompt with one response."""
        ids = [(11 + 37 * i) % self._config.vocab_size for i in range(40)]
        prompts, replies = (tuple(ids[:7]), tuple(ids[7:10])), [(5, 0), (1, 0), (3, 0), (4, 1)]
        responses = tuple(tuple(ids[12 + i : 12 + i + n]) for i, (n, _) in enumerate(replies))
        return ResponseBatch(prompts, responses, tuple(prompt for _, prompt in replies))

    def fed_tokens(self, batch: ResponseBatch) -> int:
        return batch.fed(packed=self.layout == "packed")

    def token_logprobs(self, batch: ResponseBatch) -> Tensor:
        return self._by_row(batch, self._forward(batch)[0])

    def response_states(self, batch: ResponseBatch) -> ResponseStates:
        logp_N, hidden_ND = self._forward(batch)
        return ResponseStates(self._by_row(batch, logp_N), self._by_row(batch, hidden_ND))

    def _forward(self, batch: ResponseBatch) -> tuple[Tensor, Tensor]:
        """Return ((N,) log-probs, (N, D) hidden states) of the N response tokens, row by row."""
        with self._autocast():
            if self.layout == "packed" and (self._window is None or batch.longest <= self._window):
                # All rows go into one pack if a backward pass follows: it keeps the activations of all packs anyway,
                # unless they are checkpointed, that is computed again pack by pack.
                together = torch.is_grad_enabled() and not self._checkpointed
                packs = pack(batch, max(self.pass_tokens, self.fed_tokens(batch)) if together else self.pass_tokens)
                parts = [list(part.rows) for part in packs]
                hidden_ND = torch.cat([self._packed(part) for part in packs])
            else:
                parts = passes(batch, self.pass_tokens)
                found = [self._padded(batch, part) for part in parts]
                hidden_ND, logp_N = (torch.cat(values) for values in zip(*found, strict=True))
            if self._head_is_plain:
                logp_N = self._logprobs(hidden_ND, batch, [row for part in parts for row in part])
        order_N = places(batch, parts).to(self.device)
        return logp_N[order_N], hidden_ND[order_N]

    def _packed(self, part: Pack, **extra: Any) -> Tensor:
        """Return the (N, D) hidden states that predict the tokens of a pack's responses."""
        with self._checkpoints():
            states_1LD = self._body(
                input_ids=part.ids_L[None].to(self.device),
                position_ids=part.position_L[None].to(self.device),
                # A mask of four dimensions is left as it is: the pack says which token attends to which.
                attention_mask=torch.empty(1, 1, 1, 1, device=self.device),
                use_cache=False,
                prefixes=part.prefixes,
                **extra,
            ).last_hidden_state
        return states_1LD[0, part.predict_N.to(self.device)]

    def _padded(self, batch: ResponseBatch, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the (N, D) hidden states that predict the response tokens of some rows, and their (N,) log-probs.

        There are no log-probs if the head is plain: it is then applied to the states of all passes together.
        """
        inputs, predict_BL = padded(batch, rows, self.device)
        with self._checkpoints():
            if self._head_is_plain:
                hidden_ND = self._body(**inputs, use_cache=False).last_hidden_state[predict_BL]
                return hidden_ND, hidden_ND.new_zeros(0)
            output = self.model(**inputs, use_cache=False, output_hidden_states=True)
        token_N = _tokens(batch, rows).to(self.device)
        logp_N = gather_logprobs(output.logits[predict_BL], token_N, batch.temperature)
        return output.hidden_states[-1][predict_BL], logp_N

    def _logprobs(self, hidden_ND: Tensor, batch: ResponseBatch, rows: Sequence[int]) -> Tensor:
        """Return the (N,) log-probs of the tokens of some rows, row by row, from the states that predict them."""
        return token_logprobs(self._head, hidden_ND, _tokens(batch, rows).to(self.device), batch.temperature)

    def _by_row(self, batch: ResponseBatch, value_N: Tensor) -> Tensor:
        """Return (N, ...) values of the response tokens as (B, T, ...), zeros beyond each row's end; differentiable."""
        mask_BT = batch.mask_BT.to(self.device)
        value_BT = value_N.new_zeros((*mask_BT.shape, *value_N.shape[1:]))
        value_BT[mask_BT] = value_N
        return value_BT

    @contextmanager
    def _checkpoints(self) -> Iterator[None]:
        """Let layers drop their activations in here; elsewhere they sample with a cache."""
        for layer in self._checkpointed:
            layer.training = torch.is_grad_enabled()
        try:
            yield
        finally:
            for layer in self._checkpointed:
                layer.training = False

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        return self.model.parameters()

    def state(self, device: str | None = None) -> Iterator[tuple[str, Tensor]]:
        return merged_state(self.model, device)

    def save(self, folder: Path) -> None:
        # A safetensors file is written from all of its tensors at once. Merged ones wait for it in the host's memory:
        # on a GPU one exists at a time, and what has no adapter is not copied.
        save_causal_lm(folder, self.model, self.tokenization.tokenizer, dict(self.state("cpu")))

    def adapt(self, lora: LoraSettings, seed: int) -> None:
        """Add low-rank adapters (2106.09685), whose product is zero at first. From here on only they train."""
        add_adapters(self.model, lora, seed)
        self._apply_onednn()

    def before_adapting(self) -> Policy:
        """Return the policy with its adapters off: a reference without gradients that takes no memory."""
        return _WithoutAdapters(self)

    def with_cue(self, cue: str) -> TransformersPolicy:
        """Return the policy, weights shared, as it is after training: ``cue`` stands behind each of its prompts."""
        if cue == self.tokenization.template.cue:
            return self
        cued = copy.copy(self)
        cued.tokenization = self.tokenization.with_cue(cue)
        return cued

    def frozen_copy(self) -> TransformersPolicy:
        """Return a reference model: the same weights, adapters added to them, no gradients."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        merge(model)
        return TransformersPolicy(model, self.tokenization, self.computation)


class _WithoutAdapters(TransformersPolicy):
    """The Policy that another one is with its adapters off. It shares everything with the other one."""

    def __init__(self, policy: TransformersPolicy) -> None:
        self.__dict__ = policy.__dict__

    @torch.no_grad()
    def _forward(self, batch: ResponseBatch) -> tuple[Tensor, Tensor]:
        with adapters_off(self.model):
            return super()._forward(batch)

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        return ()

    def state(self, device: str | None = None) -> Iterator[tuple[str, Tensor]]:
        with adapters_off(self.model):
            return super().state(device)


def _prepare_checkpoints(model: Any) -> list[Any]:
    """Prepare the layers that can compute their activations again, and return them. Raises DataError for none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise DataError(
            f"{type(model).__name__}: has no layers that can be checkpointed; set checkpoint_activations = false"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for layer in layers:
        layer.training = False
        for name, value in vars(layer).items():
            if "dropout" in name and isinstance(value, float):  # of the layer itself, which says "training" for a while
                setattr(layer, name, 0.0)
    return layers


def _tokens(batch: ResponseBatch, rows: Sequence[int]) -> Tensor:
    """Return the (N,) response tokens of some rows, row by row."""
    return torch.tensor([token for row in rows for token in batch.response_ids[row]])
