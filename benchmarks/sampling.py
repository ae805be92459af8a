"""Measure the tokens a second of raw vLLM and of the bench's sampler on the same engine.

    python -m benchmarks.sampling --out reports/performance/sampling.json

Raw vLLM is ``llm.generate`` on token ids and parameters that lie ready. The bench's sampler starts from prompts as text
and ends with records, with the same seeds. Both must write the same tokens, or nothing is timed. The engine's prefix
cache is emptied before every run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from benchmarks.measure import begin, device_of, main, measure_rounds, ratios, say, spread, timed, write_json
from benchmarks.page import Table, show, spread_words
from rrhf_bench.data.dialogue import Template
from rrhf_bench.data.toy.scratch import train_language_model
from rrhf_bench.data.toy.world import World, build_world
from rrhf_bench.errors import ConfigError, StageError
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.policy.tokenization import Tokenization
from rrhf_bench.records import STOP_STRINGS, Candidates, Prompt
from rrhf_bench.sampling.backend import choose_backend
from rrhf_bench.sampling.sampler import SamplingSpec
from rrhf_bench.sampling.vllm import VLLMSampler, import_vllm
from rrhf_bench.settings.experiment import ScratchSettings

CONTEXT = 512  # of prompt + reply, as in the embedded world
# Small Llamas that are trained here for a moment, so that replies end as they do in a run: a random one never ends.
SIZES = {
    "world": ScratchSettings(epochs=1),  # the embedded world's own policy
    "4M": ScratchSettings(hidden=256, layers=4, heads=8, ffn=768, lr=3e-3, epochs=1),
}
TEXTS = 600  # that such a Llama is trained on

ModelOption = Annotated[str, typer.Option(help=f"{', '.join(SIZES)} (trained here for a moment), or a folder")]
RoundsOption = Annotated[int, typer.Option(help="that count; one before them does not")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="of the CPU; PyTorch's own number otherwise")]
OutOption = Annotated[Path | None, typer.Option(help="where the numbers go, as JSON")]


class Engine(NamedTuple):
    """A policy of a folder with vLLM on it, and the head of the record of what is measured on them."""

    record: dict[str, Any]
    seconds: dict[str, float]  # that vLLM's import and start took
    folder: Path
    policy: TransformersPolicy
    sampler: VLLMSampler


@contextmanager
def engine_of(benchmark: str, model: str, threads: int | None, kv_mib: int = 96) -> Iterator[Engine]:
    """Yield the engine of one of SIZES, which is trained first, or of a folder. Raises ConfigError without vLLM."""
    if choose_backend("vllm").name != "vllm":
        raise ConfigError(f"benchmarks.{benchmark}: vLLM is not installed here; expected it, since it samples")
    device = device_of("auto").type
    record = begin(benchmark, torch.device(device), threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if model in SIZES else Path(model)
        if model in SIZES:
            say("training the small model")
            train_language_model(
                small_world(corpus=TEXTS).corpus,
                SIZES[model],
                seed=0,
                folder=folder,
                device=device,
                log=lambda metrics: None,
                progress=lambda done, total: None,
            )
        policy = TransformersPolicy.load(folder, template=Template(), device=device)
        samplers: list[VLLMSampler] = []

        def start() -> None:
            samplers.append(
                VLLMSampler(folder, policy.tokenization, max_model_len=CONTEXT, device=device, kv_cache_mib=kv_mib)
            )

        seconds = {"import": timed(import_vllm), "start": timed(start)}
        record["model"] = {"name": model, "parameters": sum(map(torch.numel, policy.parameters()))}
        yield Engine(record, seconds, folder, policy, samplers[0])
    say()


def small_world(seed: int = 0, *, corpus: int = 1, preferences: int = 1) -> World:
    """Return an embedded world that holds little beside some texts or pairs."""
    return build_world(
        seed=seed, raw_corpus=1, corpus=corpus, perplexity_corpus=1, preferences=preferences, dev=1, test=1
    )


def world_prompts(count: int) -> list[Prompt]:
    """Return that many different prompts of the embedded world."""
    return list(dict.fromkeys(pair.prompt for pair in small_world(1, preferences=count).preferences))[:count]


class Ours:
    """The bench's sampler on vLLM, from prompts to records."""

    def __init__(self, sampler: VLLMSampler, prompts: Sequence[Prompt], spec: SamplingSpec) -> None:
        self.sampler, self.prompts, self.spec = sampler, prompts, spec
        self.runs: list[list[Candidates]] = []

    def prepare(self) -> None:
        """Prepare a tokenization that remembers no prompt: it is part of the work to encode them."""
        empty_cache(self.sampler)
        before = self.sampler.tokenization
        self.sampler.tokenization = Tokenization(before.tokenizer, before.template, "sampling")

    def run(self) -> None:
        self.runs.append(self.sampler.sample(self.prompts, self.spec))

    def ids(self, run: int) -> list[tuple[int, ...]]:
        """Return the replies of a run."""
        return [reply.token_ids or () for row in self.runs[run] for reply in row.responses]


class Raw(Ours):
    """The engine alone: ids and parameters made beforehand, outputs left as they come."""

    def prepare(self) -> None:
        """Make requests and parameters anew: the engine may write into them."""
        from vllm import SamplingParams

        empty_cache(self.sampler)
        places = [(prompt, index) for prompt in self.prompts for index in range(self.spec.n)]
        prompt_ids = self.sampler.tokenization.prompt_ids
        self.requests: list[Any] = [{"prompt_token_ids": list(prompt_ids(prompt))} for prompt, _ in places]
        self.params = [
            SamplingParams(
                temperature=self.spec.temperature,
                max_tokens=self.spec.max_new_tokens,
                stop=list(self.spec.stop),
                seed=self.spec.request_seed(prompt, index),
                logprobs=0 if self.spec.logprobs else None,
            )
            for prompt, index in places
        ]

    def run(self) -> None:
        self.runs.append(self.sampler.llm.generate(self.requests, self.params, use_tqdm=False))

    def ids(self, run: int) -> list[tuple[int, ...]]:
        outputs: list[Any] = self.runs[run]
        return [tuple(output.outputs[0].token_ids) for output in outputs]


def empty_cache(sampler: VLLMSampler) -> None:
    if not sampler.llm.reset_prefix_cache():
        raise StageError("vLLM did not empty its prefix cache, so a round would profit from the one before; run again")


def measure(
    sampler: VLLMSampler,
    prompts: Sequence[Prompt],
    *,
    n: int,
    logprobs: bool = False,
    max_new_tokens: int,
    rounds: int,
) -> dict[str, Any]:
    """Return one row of the result. Raises StageError if our tokens are not those of raw vLLM."""
    name = f"n={n}" + (" with log-probs" if logprobs else "")
    spec = SamplingSpec(n, 1.0, max_new_tokens, seed=0, purpose="benchmark", stop=STOP_STRINGS, logprobs=logprobs)
    sides = {"raw": Raw(sampler, prompts, spec), "ours": Ours(sampler, prompts, spec)}
    for side in sides.values():
        side.prepare()
        side.run()
    replies = sides["ours"].ids(0)
    differing = sum(a != b for a, b in zip(sides["raw"].ids(0), replies, strict=True))
    if differing:
        raise StageError(
            f"{name}: {differing} of {len(replies)} replies are not those of raw vLLM with the same seeds; "
            "expected none: what writes other tokens cannot be compared by its speed"
        )
    seconds = measure_rounds(name, sides, rounds)
    tokens = {side: [sum(map(len, of.ids(r))) for r in range(-rounds, 0)] for side, of in sides.items()}
    rate = {side: [n / s for n, s in zip(tokens[side], seconds[side], strict=True)] for side in sides}
    return {
        "workload": name,
        "replies": len(replies),
        "share_ended": sum(ids[-1] == sampler.tokenization.eos_id for ids in replies) / len(replies),
        "tokens": {side: spread(counts)._asdict() for side, counts in tokens.items()},
        "tokens_per_second": {side: spread(rates)._asdict() for side, rates in rate.items()},
        "ours_over_raw": ratios(rate["ours"], rate["raw"])._asdict(),
        "rounds": rate,
    }


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def sampling(
    model: ModelOption = "4M",
    n: Annotated[list[int] | None, typer.Option(help="samples a prompt; may be repeated  [default: 1, 4, 16]")] = None,
    replies: Annotated[int, typer.Option(help="of a run: this many prompts over n")] = 256,
    rounds: RoundsOption = 9,
    max_new_tokens: int = 64,
    kv_cache_mib: Annotated[int, typer.Option(help="of the engine on a CPU, as runtime.kv_cache_mib")] = 96,
    threads: ThreadsOption = None,
    out: OutOption = None,
) -> None:
    """Measure the tokens a second of raw vLLM and of the bench's sampler on it."""
    counts = n or [1, 4, 16]
    with engine_of("sampling", model, threads, kv_cache_mib) as (record, costs, _, policy, sampler):
        sync = spread([timed(lambda: sampler.sync(policy)) for _ in range(9)])
        questions = world_prompts(replies // min(counts))
        record |= {
            "sampler": sampler.identity,
            "settings": {"rounds": rounds, "max_new_tokens": max_new_tokens, "kv_mib": kv_cache_mib},
            "engine_seconds": {**costs, "sync": sync._asdict()},
            "rows": [],
        }
        for count, logprobs in (*((count, False) for count in counts), (counts[0], True)):
            how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "rounds": rounds}
            prompts = questions[: max(1, replies // count)]
            record["rows"].append(measure(sampler, prompts, n=count, logprobs=logprobs, **how))
            if out is not None:  # row by row: what a long run has measured is not lost with it
                write_json(out, record)
    cells = [
        [
            row["workload"],
            *(f"{row['tokens_per_second'][side]['median']:,.0f}" for side in ("raw", "ours")),
            spread_words(list(row["ours_over_raw"].values()), 3),
        ]
        for row in record["rows"]
    ]
    show(
        Table(("workload", "raw vLLM, tokens/s", "ours", "ours / raw"), cells),
        f"{model}: {record['model']['parameters']:,} parameters, {sampler.identity}; the engine started in "
        f"{costs['start']:.2f} s after its import, a sync takes {1000 * sync.median:.0f} ms",
    )


if __name__ == "__main__":
    main(app)
