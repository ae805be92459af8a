"""Sampling with vLLM, in this process: one engine, whose weights are replaced as policies change."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rrhf_bench.errors import StageError
from rrhf_bench.policy.loading import load_reason
from rrhf_bench.policy.policy import Policy
from rrhf_bench.policy.tokenization import Tokenization
from rrhf_bench.records import Candidates, Prompt, Response
from rrhf_bench.sampling.backend import choose_backend
from rrhf_bench.sampling.sampler import SamplingSpec, fitting_ids, to_response

# Engines are kept until they are replaced: one that is collected tears down the process groups that all engines share.
_ENGINES: list[Any] = []

_OTHER = 'set sampling.backend = "transformers" (--backend transformers)'

CPU_BLOCK = 32  # tokens of a block of the KV cache: the CPU's default of 128 would never cache a short prompt


class VLLMSampler:
    """A Sampler over one in-process vLLM engine.

    ``folder`` gives architecture, vocabulary and first weights; ``sync`` replaces the weights by those of any policy
    with the same architecture and vocabulary. Raises StageError if the engine does not start on ``device``.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenization: Tokenization,
        *,
        max_model_len: int,
        device: str = "cpu",
        dtype: str = "float32",
        revision: str | None = None,
        trust_remote_code: bool = False,
        architecture: str | None = None,
        kv_cache_mib: int = 96,
        gpu_memory: float = 0.4,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.tokenization = tokenization
        self.progress = progress
        self.max_model_len = max_model_len
        self.identity = f"{choose_backend('vllm').identity} {dtype}"
        cuda = torch.device(device).type == "cuda"
        self._device = device
        self._folder = str(folder)
        self._settings: dict[str, Any] = {
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            # Named by the caller if config.json names none: vLLM would take the model for one without a head.
            "hf_overrides": {} if architecture is None else {"architectures": [architecture]},
            "dtype": dtype,
            "enforce_eager": True,
            # A seeded request whose prompt is cut over two engine steps rewinds its generator, which those of vLLM on a
            # CPU cannot do ("CPU Generator does not use offset").
            "enable_chunked_prefill": False,
            "enable_prefix_caching": True,
            "block_size": None if cuda else CPU_BLOCK,
            "logprobs_mode": "processed_logprobs",  # raw ones could not show a temperature that was not applied
            "generation_config": "vllm",  # a model's own sampling defaults have no say here
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            # The engine's default KV cache on a CPU is gigabytes that take seconds to fill.
            **({"gpu_memory_utilization": gpu_memory} if cuda else {"kv_cache_memory_bytes": kv_cache_mib << 20}),
        }
        self.llm: Any = None
        self._start()

    def _start(self) -> None:
        with _untouched_random_state():
            engine = import_vllm()
            self._require_device()
            gc.collect()
            gc.freeze()  # the engine collects often; what is imported so far is never garbage
            length = self.max_model_len
            try:
                self.llm = engine(
                    self._folder, max_model_len=length, max_num_batched_tokens=max(8192, length), **self._settings
                )
            # It asserts that no one else frees memory while it measures how much there is.
            except (RuntimeError, ValueError, OSError, AssertionError) as error:
                memory = "runtime.kv_cache_mib" if "kv_cache_memory_bytes" in self._settings else "runtime.gpu_memory"
                raise StageError(
                    f"{self._folder}: vLLM could not start for {length} tokens of prompt and reply "
                    f"({load_reason(error)}); lower policy.max_length, change {memory}, or {_OTHER}"
                ) from error
        _ENGINES.append(self.llm)
        self._started_for = length

    def _require_device(self) -> None:
        """Raise StageError if the installed vLLM computes elsewhere than the trainer: nothing chooses its device."""
        from vllm.platforms import current_platform

        found, expected = current_platform.device_type or "no device that it finds", torch.device(self._device).type
        if found != expected:
            raise StageError(
                f"{self.identity}: computes on {found}, and the policy is on {expected}; set runtime.device to where "
                f"both are, or {_OTHER}"
            )

    def resize(self, max_model_len: int) -> None:
        """Set the most tokens of prompt + reply. A longer engine has the folder's weights until the next sync."""
        self.max_model_len = max_model_len
        if max_model_len > self._started_for:
            _ENGINES.remove(self.llm)
            self.llm = None
            gc.unfreeze()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._start()

    def sample(self, prompts: Sequence[Prompt], spec: SamplingSpec) -> list[Candidates]:
        from vllm import SamplingParams

        assert spec.strategy == "sample", "choose_backend has beams searched for on transformers"
        requests: list[dict[str, list[int]]] = []
        params: list[Any] = []
        for prompt in prompts:
            ids = list(fitting_ids(self.tokenization, prompt, spec.max_new_tokens, self.max_model_len))
            for index in range(spec.n):
                requests.append({"prompt_token_ids": ids})
                params.append(
                    SamplingParams(
                        temperature=spec.temperature,
                        top_p=spec.top_p,
                        top_k=spec.top_k,
                        max_tokens=spec.max_new_tokens,
                        stop=list(spec.stop),
                        # The request names every end. The engine's folder may list others than the policy synced last.
                        ignore_eos=True,
                        stop_token_ids=list(self.tokenization.end_ids),
                        seed=None if spec.greedy else spec.request_seed(prompt, index),
                        logprobs=0 if spec.logprobs else None,
                        flat_logprobs=True,  # a list of numbers, not an object and a dictionary a token
                        detokenize=bool(spec.stop),  # to_response decodes; the engine must only where it is to stop
                    )
                )
        # For log-probs vLLM compiles a function that counts ranks, which nobody here reads: on a CPU two seconds, once.
        eager = nullcontext() if torch.cuda.is_available() else torch.compiler.set_stance("force_eager")
        with _untouched_random_state(), eager:
            replies = [output.outputs[0] for output in self._generate(requests, params)]
        responses = (self._response(reply, spec) for reply in replies)
        return [Candidates(prompt, tuple(islice(responses, spec.n))) for prompt in prompts]

    def _response(self, reply: Any, spec: SamplingSpec) -> Response:
        logprobs = reply.logprobs.logprobs if spec.logprobs else None
        assert logprobs is None or len(logprobs) == len(reply.token_ids), "expected the sampled token's log-prob alone"
        return to_response(self.tokenization, spec, reply.token_ids, logprobs)

    def _generate(self, requests: list[dict[str, list[int]]], params: list[Any]) -> list[Any]:
        """Return the outputs; slices for progress change no result, because each request has its own seed."""
        size = 512 if self.progress is not None else max(1, len(requests))
        outputs: list[Any] = []
        for start in range(0, len(requests), size):
            outputs += self.llm.generate(requests[start : start + size], params[start : start + size], use_tqdm=False)
            if self.progress is not None:
                self.progress(len(outputs), len(requests))
        return outputs

    def sync(self, policy: Policy) -> None:
        """Load new weights and empty the prefix cache, which holds states of the old ones."""
        with _untouched_random_state(), torch.no_grad():
            try:
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": policy.state()})
            except (ValueError, KeyError) as error:
                raise StageError(
                    f"{self._folder}: vLLM does not take its weights ({load_reason(error)}); {_OTHER}"
                ) from error
            if not self.llm.reset_prefix_cache():
                raise StageError("vLLM did not empty its prefix cache, so it would sample from old weights; run again")
        self.tokenization = policy.tokenization


def import_vllm() -> Any:
    """Return vLLM's ``LLM``, imported under what it reads from the environment."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: weights sync without a copy
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override the size of the cache
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # binding would pin the trainer's threads as well
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # On a GPU vLLM's attention in float32 is a Triton kernel, which multiplies in TF32 (10 of 23 bits) without this.
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    from vllm import LLM
    from vllm.model_executor.models import bloom
    from vllm.model_executor.models.transformers.base import Base

    bloom._add_transformer_prefix = _name_bloom_weights
    # vLLM rewrites classes of transformers (GPT-NeoX, Phi, OLMo) for torch.compile: the trainer's models then fail.
    # Nothing is compiled here (``enforce_eager``).
    Base._decorate_for_torch_compile = lambda self: None
    return LLM


def _name_bloom_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield BLOOM's weights under vLLM's names. vLLM's own function misnames the tied LM head of a policy."""
    for name, weight in weights:
        yield name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}", weight


@contextmanager
def _untouched_random_state() -> Iterator[None]:
    """Restore the state of the process's generators, which vLLM seeds."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
