"""Models by reference, loaded when first asked for; one sampling engine an architecture, its weights synced."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from rrhf_bench.data.dialogue import Template, TemplateKind
from rrhf_bench.errors import DataError
from rrhf_bench.experiment import Dtype, RuntimeSettings
from rrhf_bench.jsonl import from_json
from rrhf_bench.policy.policy import Computation, TransformersPolicy
from rrhf_bench.records import Preference, Prompt
from rrhf_bench.rewards.checks import Check, on_pairs
from rrhf_bench.rewards.reward import RewardModel
from rrhf_bench.sampling.backend import BackendName
from rrhf_bench.sampling.contract import CheckedSampler
from rrhf_bench.sampling.sampler import Sampler

FILE = "model.json"


@dataclass(frozen=True)
class ModelRef:
    """Where a model is and how to read it; an artifact that holds a model has one as ``model.json``."""

    source: str  # a hub id or a folder
    revision: str | None = None
    template: TemplateKind = "hh"
    dtype: Dtype = "float32"
    pad_token: str | None = None
    max_length: int | None = None  # of prompt + reply
    layout: Literal["classifier", "value-head"] = "classifier"  # of a reward model
    label: str | None = None  # of a classifier of several labels, whose probability is the score
    trust_remote_code: bool = False

    @classmethod
    def read(cls, artifact: Path) -> ModelRef:
        """Return the reference of an artifact. Raises DataError if its ``model.json`` is none that ``write`` wrote."""
        path = artifact / FILE
        try:
            ref = from_json(cls, json.loads(path.read_text(encoding="utf-8")), str(path))
        except (OSError, ValueError, RecursionError) as error:  # DataError is a ValueError
            reason = str(error).removeprefix(f"{path}: ")
            raise DataError(
                f"{path}: is not the {FILE} of an artifact ({reason}); expected a folder of `runs/store`; if the model "
                "is a transformers folder, move this file out of it"
            ) from error
        return replace(ref, source=str(artifact / "model")) if ref.source == "model" else ref

    def write(self, artifact: Path) -> None:
        (artifact / FILE).write_text(json.dumps(asdict(self), indent=1))


def resolve_device(runtime: RuntimeSettings) -> str:
    if runtime.device != "auto":
        return runtime.device
    return "cuda" if torch.cuda.is_available() else "cpu"


class Services:
    """What stages are lent. Lives as long as the process; policies that train are loaded anew each time."""

    def __init__(self, runtime: RuntimeSettings) -> None:
        self.runtime = runtime
        self.device = resolve_device(runtime)
        self._kept: dict[tuple[str, ModelRef], Any] = {}  # by kind: one reference may name a policy and a reward model
        self._samplers: dict[str, Sampler] = {}
        self._policies: WeakKeyDictionary[TransformersPolicy, str] = WeakKeyDictionary()  # all alive, by their source

    def policy(self, ref: ModelRef) -> TransformersPolicy:
        """A policy of its own weights, to be trained."""
        policy = TransformersPolicy.load(
            ref.source,
            template=Template(ref.template),
            device=self.device,
            dtype=getattr(torch, ref.dtype),
            revision=ref.revision,
            pad_token=ref.pad_token,
            trust_remote_code=ref.trust_remote_code,
            computation=Computation(self.runtime.pass_tokens, self.runtime.checkpoint_activations, self.runtime.onednn),
        )
        self._policies[policy] = ref.source
        return policy

    def fixed_policy(self, ref: ModelRef) -> TransformersPolicy:
        """Return a policy that is not trained, such as the initial one or the perplexity model; it is loaded once."""
        key = ("policy", ref)
        if key not in self._kept:
            policy = self.policy(ref)
            policy.model.requires_grad_(False)
            self._kept[key] = policy
        return self._kept[key]

    def reward(self, ref: ModelRef) -> RewardModel:
        """Return a reward model that scores each text of a call once; it is loaded once."""
        key = ("reward model", ref)
        if key not in self._kept:
            self._kept[key] = DistinctTexts(load_reward(ref, self.device, self.runtime.score_batch))
        return self._kept[key]

    def held(self) -> list[tuple[str, int]]:
        """Return (what, bytes) of each model that this process holds, largest first: weights with gradients, and of a
        vLLM engine what it was given."""
        found = [(f"policy {source}", _bytes(policy)) for policy, source in self._policies.items()]
        found += [
            (f"{kind} {ref.source}", _bytes(model.reward))
            for (kind, ref), model in self._kept.items()
            if isinstance(model, DistinctTexts)
        ]
        for sampler in self._samplers.values():
            copy = getattr(sampler, "policy", None)  # of the transformers sampler
            found.append(
                ("sampler's copy of the policy", _bytes(copy)) if copy else ("vLLM engine", self._engine_bytes)
            )
        return sorted(found, key=lambda item: -item[1])

    @property
    def _engine_bytes(self) -> int:
        """The share of a GPU that a vLLM engine takes, or its cache on a CPU."""
        if self.device != "cuda":
            return self.runtime.kv_cache_mib << 20
        return round(self.runtime.gpu_memory * torch.cuda.get_device_properties(0).total_memory)

    def reward_checks(self, ref: ModelRef, pairs: Sequence[Preference]) -> tuple[Check, ...]:
        """What was found of a reward model when it was loaded, and what held-out pairs show of it."""
        model: Any = self.reward(ref)
        return (*model.reward.checks, *on_pairs(model.reward, pairs))

    def sampler(
        self,
        policy: TransformersPolicy,
        ref: ModelRef,
        backend: BackendName,
        progress: Callable[[int, int], None] | None = None,
        note: Callable[[dict[str, Any]], None] = lambda found: None,
    ) -> CheckedSampler:
        """A sampler that holds the policy's weights. ``ref`` names a folder or hub id of its architecture; ``note`` is
        told how far its log-probs were from the policy's whenever that was checked (sampling/contract.py).

        One engine serves all policies that compute alike (``engine_key``), whatever they are called, however they are
        prompted and to whatever length: two would hold two caches and pay two starts.
        """
        key = engine_key(policy, ref, backend)
        if key not in self._samplers:
            self._samplers[key] = self._start(policy, ref, backend)
        engine: Any = self._samplers[key]
        context = context_of(policy, ref)
        engine.resize(context)
        sampler = CheckedSampler(engine, ref.dtype, context, progress=progress, note=note)
        sampler.sync(policy)
        return sampler

    def _start(self, policy: TransformersPolicy, ref: ModelRef, backend: BackendName) -> Sampler:
        length = context_of(policy, ref)
        if backend == "transformers":
            from rrhf_bench.sampling.transformers import TransformersSampler

            return TransformersSampler(policy, max_model_len=length)
        from rrhf_bench.sampling.vllm import VLLMSampler

        return VLLMSampler(
            ref.source,
            policy.tokenization,
            max_model_len=length,
            device=self.device,
            dtype=ref.dtype,
            revision=ref.revision,
            trust_remote_code=ref.trust_remote_code,
            kv_cache_mib=self.runtime.kv_cache_mib,
            gpu_memory=self.runtime.gpu_memory,
        )


def _bytes(holder: object) -> int:
    """Return the bytes of the parameters, and of their gradients, of the modules that an object has as attributes."""
    modules = [value for value in vars(holder).values() if isinstance(value, torch.nn.Module)]
    tensors = {id(p): p for module in modules for p in module.parameters()}.values()
    return sum(p.nbytes + (p.grad.nbytes if p.grad is not None else 0) for p in tensors)


# What a model's configuration says that no forward pass reads: where it came from, how it was made, how it is trained.
UNREAD = {"_name_or_path", "_commit_hash", "transformers_version", "initializer_range", "use_cache", "problem_type"}
UNREAD |= {"dtype", "torch_dtype", "id2label", "label2id", "return_dict", "output_attentions", "output_hidden_states"}


def engine_key(policy: TransformersPolicy, ref: ModelRef, backend: BackendName) -> str:
    """What an engine is started for and cannot change: the architecture, the dtype that it computes in, and the
    vocabulary and end-of-text token by which it knows where a reply ends."""
    tokenization = policy.tokenization
    vocabulary = hashlib.sha256(json.dumps(sorted(tokenization.tokenizer.get_vocab().items())).encode()).hexdigest()
    architecture = _read(policy.model.config.to_dict())
    return json.dumps([backend, ref.dtype, vocabulary, tokenization.eos_id, architecture], sort_keys=True, default=str)


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what no forward pass reads, those within it alike."""
    return {
        name: _read(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name not in UNREAD and not name.endswith(("dropout", "pdrop"))
    }


def context_of(policy: TransformersPolicy, ref: ModelRef) -> int:
    """Prompt + reply tokens at most: the model's context, or less where the reference says so."""
    own = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    return min(x for x in (own, ref.max_length, 1 << 20) if x is not None)


class DistinctTexts:
    """A RewardModel in front of another that gives it each text of a call once.

    It remembers nothing from call to call: a score from another batch may differ in its last bits, and which calls went
    before depends on the number of workers.
    """

    def __init__(self, reward: RewardModel) -> None:
        self.reward = reward
        self.identity = reward.identity

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> NDArray[np.float64]:
        pairs = list(zip(prompts, responses, strict=True))
        place = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        scores = self.reward.score([prompt for prompt, _ in place], [text for _, text in place])
        return scores[[place[pair] for pair in pairs]]


def load_reward(ref: ModelRef, device: str, batch_size: int) -> RewardModel:
    if ref.layout == "value-head":
        from rrhf_bench.rewards.value_head import ValueHeadReward

        return ValueHeadReward.load(
            ref.source,
            revision=ref.revision,
            dtype=ref.dtype,
            device=device,
            batch_size=batch_size,
            trust_remote_code=ref.trust_remote_code,
        )
    from rrhf_bench.rewards.hub import ClassifierReward

    return ClassifierReward.load(
        ref.source,
        template=ref.template,
        revision=ref.revision,
        dtype=ref.dtype,
        pad_token=ref.pad_token,
        label=ref.label,
        device=device,
        batch_size=batch_size,
        trust_remote_code=ref.trust_remote_code,
    )
