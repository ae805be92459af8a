"""Measure the tokens a second of raw vLLM and of the bench's sampler on the same engine.

    python -m benchmarks.sampling --out reports/performance/sampling.json

Raw vLLM is ``llm.generate`` on token ids and parameters that lie ready. The bench's sampler starts from prompts as text
and ends with records, with the same seeds. Both must write the same tokens, or nothing is timed. The engine's prefix
cache is emptied before every run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.measure import Side, begin, device_of, main, measure_rounds, ratios, say, spread, timed, write_json
from benchmarks.page import Table, show, spread_words
from rrhf_bench.data.dialogue import Template
from rrhf_bench.data.toy.scratch import train_language_model
from rrhf_bench.data.toy.world import build_world
from rrhf_bench.errors import ConfigError, StageError
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.policy.tokenization import Tokenization
from rrhf_bench.records import STOP_STRINGS, Candidates, Prompt
from rrhf_bench.sampling.backend import choose_backend
from rrhf_bench.sampling.sampler import SamplingSpec
from rrhf_bench.sampling.vllm import VLLMSampler, import_vllm
from rrhf_bench.settings.experiment import ScratchSettings

NAME = "sampling"
CONTEXT = 512  # of prompt + reply, as in the embedded world
Ids = tuple[int, ...]

# Small Llamas that are trained here for a moment, so that replies end as they do in a run: a random one never ends.
SIZES = {
    "world": ScratchSettings(epochs=1),  # the embedded world's own policy
    "4M": ScratchSettings(hidden=256, layers=4, heads=8, ffn=768, lr=3e-3, epochs=1),
}
TEXTS = 600  # that it is trained on


def small_llama(settings: ScratchSettings, folder: Path, device: str) -> None:
    """Write a Llama that has read some of the embedded world's dialogues once."""
    say("training the small model")
    world = build_world(seed=0, raw_corpus=1, corpus=TEXTS, perplexity_corpus=1, preferences=1, dev=1, test=1)
    train_language_model(
        world.corpus,
        settings,
        seed=0,
        folder=folder,
        device=device,
        log=lambda metrics: None,
        progress=lambda done, total: None,
    )


def world_prompts(count: int) -> list[Prompt]:
    """Return that many different prompts of the embedded world."""
    world = build_world(seed=1, raw_corpus=1, corpus=1, perplexity_corpus=1, preferences=count, dev=1, test=1)
    return list(dict.fromkeys(pair.prompt for pair in world.preferences))[:count]


class Ours:
    """The bench's sampler on vLLM, from prompts to records."""

    def __init__(self, sampler: VLLMSampler, prompts: Sequence[Prompt], spec: SamplingSpec) -> None:
        self.sampler, self.prompts, self.spec = sampler, prompts, spec
        self.runs: list[list[Candidates]] = []

    def prepare(self) -> None:
        """Prepare a tokenization that remembers no prompt: it is part of the work to encode them."""
        empty_cache(self.sampler)
        before = self.sampler.tokenization
        self.sampler.tokenization = Tokenization(before.tokenizer, before.template, NAME)

    def run(self) -> None:
        self.runs.append(self.sampler.sample(self.prompts, self.spec))

    def ids(self, run: int) -> list[Ids]:
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

    def ids(self, run: int) -> list[Ids]:
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
    spec = SamplingSpec(
        n=n,
        temperature=1.0,
        max_new_tokens=max_new_tokens,
        seed=0,
        purpose="benchmark",
        stop=STOP_STRINGS,
        logprobs=logprobs,
    )
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
    turns = {side: Side(of.run, of.prepare) for side, of in sides.items()}
    seconds = measure_rounds(turns, rounds, progress=lambda words: say(f"{name}, {words}"))
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


def start_engine(folder: Path, policy: TransformersPolicy, kv_cache_mib: int) -> tuple[VLLMSampler, dict[str, Any]]:
    """Return a sampler, and what it takes beside sampling: seconds of import, start, and a sync of all weights."""
    samplers: list[VLLMSampler] = []

    def start() -> None:
        device = policy.device.type
        samplers.append(
            VLLMSampler(folder, policy.tokenization, max_model_len=CONTEXT, device=device, kv_cache_mib=kv_cache_mib)
        )

    took = {"import": timed(import_vllm), "start": timed(start)}
    syncs = spread([timed(lambda: samplers[0].sync(policy)) for _ in range(9)])
    return samplers[0], {**took, "sync": syncs._asdict()}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def sampling(
    model: Annotated[str, typer.Option(help=f"{', '.join(SIZES)} (trained here for a moment), or a folder")] = "4M",
    n: Annotated[list[int] | None, typer.Option(help="samples a prompt; may be repeated  [default: 1, 4, 16]")] = None,
    replies: Annotated[int, typer.Option(help="of a run: this many prompts over n")] = 256,
    rounds: Annotated[int, typer.Option(help="that count; one before them does not")] = 9,
    max_new_tokens: int = 64,
    kv_cache_mib: Annotated[int, typer.Option(help="of the engine on a CPU, as runtime.kv_cache_mib")] = 96,
    threads: Annotated[int | None, typer.Option(min=1, help="of the CPU; PyTorch's own number otherwise")] = None,
    out: Annotated[Path | None, typer.Option(help="where the numbers go, as JSON")] = None,
) -> None:
    """Measure the tokens a second of raw vLLM and of the bench's sampler on it."""
    if choose_backend("vllm").name != "vllm":
        raise ConfigError("benchmarks.sampling: vLLM is not installed here; expected it, since it is what is measured")
    counts = n or [1, 4, 16]
    device = device_of("auto")
    record = begin(NAME, device, threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if model in SIZES else Path(model)
        if model in SIZES:
            small_llama(SIZES[model], folder, device.type)
        policy = TransformersPolicy.load(folder, template=Template(), device=device.type)
        sampler, costs = start_engine(folder, policy, kv_cache_mib)
        questions = world_prompts(replies // min(counts))
        record |= {
            "model": {"name": model, "parameters": sum(map(torch.numel, policy.parameters()))},
            "sampler": sampler.identity,
            "settings": {"rounds": rounds, "max_new_tokens": max_new_tokens, "kv_mib": kv_cache_mib},
            "engine_seconds": costs,
            "rows": [],
        }
        for count, logprobs in (*((count, False) for count in counts), (counts[0], True)):
            prompts = questions[: max(1, replies // count)]
            record["rows"].append(
                measure(sampler, prompts, n=count, logprobs=logprobs, max_new_tokens=max_new_tokens, rounds=rounds)
            )
            if out is not None:  # row by row: what a long run has measured is not lost with it
                write_json(out, record)
    say()
    columns = ("workload", "raw vLLM, tokens/s", "ours", "ours / raw")
    cells = [
        [
            row["workload"],
            *(f"{row['tokens_per_second'][side]['median']:,.0f}" for side in ("raw", "ours")),
            spread_words(list(row["ours_over_raw"].values()), 3),
        ]
        for row in record["rows"]
    ]
    show(
        Table(columns, cells),
        f"{model}: {record['model']['parameters']:,} parameters, {sampler.identity}; the engine started in "
        f"{costs['start']:.2f} s after its import, a sync takes {1000 * costs['sync']['median']:.0f} ms",
    )


if __name__ == "__main__":
    main(app)
