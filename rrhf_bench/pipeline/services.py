"""Load models by reference and keep the ones in use; one sampling engine an architecture, its weights synced."""

from __future__ import annotations

import gc
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from rrhf_bench.data.dialogue import Template, TemplateKind
from rrhf_bench.errors import ConfigError, DataError
from rrhf_bench.jsonl import from_json
from rrhf_bench.policy.loading import architecture_of, require_savable
from rrhf_bench.policy.policy import Computation, TransformersPolicy
from rrhf_bench.records import Preference, Prompt
from rrhf_bench.rewards import ensemble
from rrhf_bench.rewards.checks import Check, check_pairs
from rrhf_bench.rewards.reward import RewardModel
from rrhf_bench.sampling.backend import BackendName
from rrhf_bench.sampling.cached import cache_bytes
from rrhf_bench.sampling.sampler import Sampler
from rrhf_bench.sampling.sync_check import CheckedSampler
from rrhf_bench.settings.experiment import Dtype, RuntimeSettings

FILE = "model.json"

LENGTH_STEP = 256  # tokens; an engine for few requests is started for a multiple of it
SEQUENCES_CACHED = 2  # of the engine's length, which its KV cache holds at least


@dataclass(frozen=True)
class ModelRef:
    """The place of a model and how to read it; an artifact with a model stores one as ``model.json``."""

    source: str  # a hub id or a folder
    revision: str | None = None
    template: TemplateKind = "hh"
    dtype: Dtype = "float32"
    pad_token: str | None = None
    max_length: int | None = None  # of prompt + reply
    layout: Literal["classifier", "value-head"] = "classifier"  # of a reward model
    label: str | None = None  # of a classifier of several labels, whose probability is the score
    trust_remote_code: bool = False
    cue: str = ""  # text behind every prompt, with which a policy was trained

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


# How many models and samplers that the present stage has not used may stay in memory when it loads another. A GPU has
# room for none: at 7B each is a sixth of it. On a CPU an evaluation uses four (initial policy, reward model, perplexity
# model, sampler), which then survive a stage that samples from a policy of its own.
IDLE_MODELS = {"cpu": 4, "cuda": 0}


class Services:
    """The models of the stages, for the life of a process.

    Models that are not trained, and samplers of transformers, are kept from stage to stage. Before another model is
    loaded, the least recently used ones that the present stage has not used are dropped, down to IDLE_MODELS. Engines
    of vLLM stay for ever (sampling/vllm.py says why).
    """

    def __init__(self, runtime: RuntimeSettings) -> None:
        self.runtime = runtime
        device: str = runtime.device
        self.device = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        # By (kind, reference or engine key), the least recently used first. One reference may name a policy and a
        # reward model.
        self._kept: dict[tuple[str, ModelRef | str], Any] = {}
        self._used: set[tuple[str, ModelRef | str]] = set()  # by the present stage
        self._engines: dict[str, Sampler] = {}
        self._policies: WeakKeyDictionary[TransformersPolicy, str] = WeakKeyDictionary()  # all alive, by their source

    def begin_stage(self) -> None:
        """Mark everything kept as unused, so that it may be dropped when the stage loads a model."""
        self._used = set()

    def make_room(self) -> None:
        """Drop what the present stage has not used beyond IDLE_MODELS: a model is about to be loaded."""
        idle = [key for key in self._kept if key not in self._used]
        dropped = idle[: max(0, len(idle) - IDLE_MODELS[self.device])]
        for key in dropped:
            del self._kept[key]
        if dropped and self.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()  # an engine that starts measures what the device has left

    def _keep(self, key: tuple[str, ModelRef | str], load: Callable[[], Any]) -> Any:
        """Return what is kept under ``key``; if there is nothing, load it."""
        if key not in self._kept:
            self.make_room()
            self._kept[key] = load()
        self._used.add(key)
        self._kept[key] = self._kept.pop(key)  # the most recently used is last
        return self._kept[key]

    def policy_to_train(self, ref: ModelRef) -> TransformersPolicy:
        """Load a policy with weights of its own. Raises DataError if it could not be saved after it is trained."""
        policy = self.policy(ref)
        require_savable(ref.source, policy.model, policy.tokenization.tokenizer)
        return policy

    def policy(self, ref: ModelRef) -> TransformersPolicy:
        """Load a policy with weights of its own. It is not kept."""
        self.make_room()
        r = self.runtime
        policy = TransformersPolicy.load(
            ref.source,
            template=Template(ref.template, ref.cue),
            device=self.device,
            dtype=getattr(torch, ref.dtype),
            revision=ref.revision,
            pad_token=ref.pad_token,
            trust_remote_code=ref.trust_remote_code,
            computation=Computation(r.pass_tokens, r.checkpoint_activations, r.onednn, r.autocast, r.kernels),
        )
        self._policies[policy] = ref.source
        return policy

    def fixed_policy(self, ref: ModelRef) -> TransformersPolicy:
        """Return a policy that is not trained, such as the initial one or the perplexity model."""

        def load() -> TransformersPolicy:
            policy = self.policy(ref)
            policy.model.requires_grad_(False)
            return policy

        return self._keep(("policy", ref), load)

    def reward(self, ref: ModelRef) -> DistinctTexts:
        """Return a reward model that scores each text of a call once."""
        return self._keep(
            ("reward model", ref), lambda: DistinctTexts(load_reward(ref, self.device, self.runtime.score_batch))
        )

    def held(self) -> list[tuple[str, int]]:
        """Return (what, bytes) of each model that this process holds, largest first.

        The bytes are those of weights and gradients, and of a vLLM engine what it was given.
        """
        found = [(f"policy {source}", _bytes(policy)) for policy, source in self._policies.items()]
        for (kind, ref), kept in self._kept.items():
            if isinstance(kept, DistinctTexts):
                assert isinstance(ref, ModelRef)
                found.append((f"{kind} {ref.source}", _bytes(kept.reward)))
            elif kind == "sampler":
                found.append(("sampler's copy of the policy", _bytes(kept.policy)))
        size = self.runtime.kv_cache_mib << 20
        if self.device == "cuda":
            size = round(self.runtime.gpu_memory * torch.cuda.get_device_properties(0).total_memory)
        found += [("vLLM engine", size) for _ in self._engines]
        return sorted(found, key=lambda item: -item[1])

    def reward_checks(self, ref: ModelRef, pairs: Sequence[Preference]) -> tuple[Check, ...]:
        """Return the checks of a reward model at its load, and its checks on held-out pairs."""
        model = self.reward(ref)
        checked: Any = getattr(model.reward, "members", (model.reward,))[0]
        return (*model.checks, *check_pairs(checked, pairs))

    def sampler(
        self,
        policy: TransformersPolicy,
        ref: ModelRef,
        backend: BackendName,
        progress: Callable[[int, int], None] | None = None,
        note: Callable[[dict[str, Any]], None] = lambda found: None,
        *,
        kv_cache_mib: int | None = None,
    ) -> CheckedSampler:
        """Return a sampler that holds the policy's weights, and computes in the dtype of the policy's products.

        ``ref`` names a folder or hub id of its architecture; ``note`` receives the differences of its log-probs from
        the policy's at each check (sampling/sync_check.py). One engine serves all policies that compute alike
        (``engine_key``). ``kv_cache_mib`` replaces the setting of the runtime for an engine that this call starts.
        """
        ref = replace(ref, dtype=cast(Dtype, str(policy.dtype).removeprefix("torch.")))
        key = engine_key(policy, ref, backend)
        context = context_of(policy, ref)
        engine: Any
        if backend == "transformers":
            from rrhf_bench.sampling.transformers import TransformersSampler

            engine = self._keep(("sampler", key), lambda: TransformersSampler(policy, max_model_len=context))
        else:
            if key not in self._engines:
                self._engines[key] = self._start(policy, ref, kv_cache_mib or self.runtime.kv_cache_mib)
            engine = self._engines[key]
        engine.resize(context)
        sampler = CheckedSampler(engine, ref.dtype, context, progress=progress, note=note)
        sampler.sync(policy)
        return sampler

    def sampler_for(
        self,
        policy: TransformersPolicy,
        ref: ModelRef,
        backend: BackendName,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> CheckedSampler:
        """Return a sampler for these prompts and no longer ones.

        Its engine is started for the longest of them with its reply instead of the model's context, which may be a
        hundred times as long, and its KV cache on a CPU holds such a sequence. Samples do not depend on either.
        """
        longest = max((len(policy.tokenization.prompt_ids(prompt)) for prompt in prompts), default=0)
        length = min(context_of(policy, ref), math.ceil((longest + max_new_tokens) / LENGTH_STEP) * LENGTH_STEP)
        cache_mib = math.ceil(SEQUENCES_CACHED * cache_bytes(policy.model, length) / 2**20)
        cache_mib = max(cache_mib, self.runtime.kv_cache_mib)
        return self.sampler(policy, replace(ref, max_length=length), backend, progress, kv_cache_mib=cache_mib)

    def _start(self, policy: TransformersPolicy, ref: ModelRef, kv_cache_mib: int) -> Sampler:
        from rrhf_bench.sampling.vllm import VLLMSampler

        source, revision = architecture_of(ref.source, ref.revision)
        return VLLMSampler(
            source,
            policy.tokenization,
            max_model_len=context_of(policy, ref),
            device=self.device,
            dtype=ref.dtype,
            revision=revision,
            trust_remote_code=ref.trust_remote_code,
            architecture=None if policy.model.config.architectures else type(policy.model).__name__,
            kv_cache_mib=kv_cache_mib,
            gpu_memory=self.runtime.gpu_memory,
        )


def _bytes(holder: object) -> int:
    """Return the bytes of the parameters, and of their gradients, of the modules that an object has as attributes."""
    if isinstance(holder, ensemble.EnsembleReward):
        return sum(map(_bytes, holder.members))
    modules = [value for value in vars(holder).values() if isinstance(value, torch.nn.Module)]
    tensors = {id(p): p for module in modules for p in module.parameters()}.values()
    return sum(p.nbytes + (p.grad.nbytes if p.grad is not None else 0) for p in tensors)


# Keys of a model's configuration that no forward pass reads: its origin, its initialisation, its training.
UNREAD = {"_name_or_path", "_commit_hash", "transformers_version", "initializer_range", "use_cache", "problem_type"}
UNREAD |= {"dtype", "torch_dtype", "id2label", "label2id", "return_dict", "output_attentions", "output_hidden_states"}


def engine_key(policy: TransformersPolicy, ref: ModelRef, backend: BackendName) -> str:
    """Return what an engine is started for and cannot change: the architecture, the dtype that it computes in, and the
    vocabulary of its tokenizer. The ends of a reply are part of each request."""
    vocab = policy.tokenization.tokenizer.get_vocab()
    vocabulary = hashlib.sha256(json.dumps(sorted(vocab.items())).encode()).hexdigest()
    architecture = _keys_of_forward(policy.model.config.to_dict())
    return json.dumps([backend, ref.dtype, vocabulary, architecture], sort_keys=True, default=str)


def _keys_of_forward(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration, and those within it, without the keys that no forward pass reads."""
    return {
        name: _keys_of_forward(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name not in UNREAD and not name.endswith(("dropout", "pdrop"))
    }


def context_of(policy: TransformersPolicy, ref: ModelRef) -> int:
    """Return the most tokens of prompt + reply: the model's context, or less if the reference says so."""
    own = getattr(policy.model.config.get_text_config(), "max_position_embeddings", None)
    return min(x for x in (own, ref.max_length, 1 << 20) if x is not None)


Progress = Callable[[int, int], None]  # (done, total)
SCORE_TEXTS = 2048  # texts between two reports of progress


class DistinctTexts:
    """A RewardModel that gives another one each distinct text of a call once.

    It keeps no score for later calls: a score from another batch may differ in its last bits, and which calls came
    before depends on the number of workers.
    """

    def __init__(self, reward: RewardModel) -> None:
        self.reward = reward
        self.identity = reward.identity

    @property
    def truncated(self) -> int:
        """Return how many texts the model has cut to the length that it reads; a text of several calls counts in each.

        A reward that reads texts of any length, such as a gold reward, cuts none.
        """
        return getattr(self.reward, "truncated", 0)

    def prompt_length(self, prompt: Prompt) -> int:
        """Return the number of tokens that a prompt with a short reply is read as, or 0 for a reward without tokens.

        Raises RefusedDialogue if the model's chat template does not render the prompt.
        """
        encode = getattr(self.reward, "encode", None)
        return 0 if encode is None else len(encode(prompt, " a"))

    @property
    def checks(self) -> tuple[Check, ...]:
        """Return what was found of the model when it was loaded."""
        return getattr(self.reward, "checks", ())

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], progress: Progress | None = None
    ) -> NDArray[np.float64]:
        """Return the (N,) scores as computed; ``progress`` receives (distinct texts scored, distinct texts)."""
        pairs = list(zip(prompts, responses, strict=True))
        place = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
        distinct = list(place)
        scores = np.empty(len(distinct))
        for start in range(0, len(distinct), SCORE_TEXTS):
            part = distinct[start : start + SCORE_TEXTS]
            scores[start : start + len(part)] = self.reward.score([p for p, _ in part], [text for _, text in part])
            if progress is not None:
                progress(start + len(part), len(distinct))
        return scores[[place[pair] for pair in pairs]]


def reward_template(ref: ModelRef) -> TemplateKind:
    """Return how a reward model wants a dialogue. Only its contract is read: a faulty file is named before it loads."""
    from rrhf_bench.rewards.hub import contract_folder, contract_of

    folder = contract_folder(ref.source, ref.revision)
    folder = folder / "member_0" if (folder / ensemble.FILE).is_file() else folder  # all members read a text alike
    contract = contract_of(folder, ref.source, ref.layout, None)
    return ref.template if contract is None else contract.template


def load_reward(ref: ModelRef, device: str, batch_size: int) -> RewardModel:
    """Load a reward model. Raises ConfigError for options that its layout does not read."""
    shared: dict[str, Any] = {"revision": ref.revision, "dtype": ref.dtype, "trust_remote_code": ref.trust_remote_code}
    shared |= {"device": device, "batch_size": batch_size}
    if ref.layout == "value-head":
        from rrhf_bench.rewards.value_head import ValueHeadReward

        for key, option in (("template", "reward-template"), ("pad_token", "reward-pad-token"), ("label", "label")):
            if (value := getattr(ref, key)) != getattr(ModelRef, key):
                raise ConfigError(
                    f"{ref.source}: --{option}: found {value!r}, which --layout value-head does not read; leave it out"
                )
        return ValueHeadReward.load(ref.source, **shared)
    from rrhf_bench.rewards.hub import ClassifierReward

    own: dict[str, Any] = {"template": ref.template, "pad_token": ref.pad_token, "label": ref.label}
    if (Path(ref.source) / ensemble.FILE).is_file():
        return ensemble.EnsembleReward.load(
            Path(ref.source), lambda member: ClassifierReward.load(member, **own, **shared)
        )
    return ClassifierReward.load(ref.source, **own, **shared)
