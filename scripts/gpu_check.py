"""Checks on a GPU what no CPU can: that kernels compiled for this card compute what the definitions say, and how fast.

    python scripts/gpu_check.py [--out gpu_check.jsonl] [--steps attention,head] [--seconds 480]
    python scripts/gpu_check.py --device cpu --small      # to check this file

It needs PyTorch, transformers and pydantic, no installation, no network and no vLLM, and runs over this tree. Each step
writes a line of JSON as soon as it ends: what was measured, the limits, and whether it was within them. The steps are
in the order of what they are worth, and those for which no time is left are noted as skipped. The exit code is 0 if
every step that ran passed, 1 if one failed, 2 if nothing could run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests' models; `tests` itself may be the name of another package
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

try:
    import numpy as np
    import torch
    import transformers
    from architectures import made, packed, tokenization
    from torch._dynamo.utils import counters
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from baselines.ppo_math import policy_loss
    from baselines.sft import sft_loss
    from rrhf_bench.policy import attention
    from rrhf_bench.policy.batching import ResponseBatch, pack
    from rrhf_bench.policy.head import token_logprobs
    from rrhf_bench.policy.logprobs import gather_logprobs
    from rrhf_bench.policy.policy import Computation, TransformersPolicy
    from rrhf_bench.records import Prompt
    from rrhf_bench.sampling.beam import beam_search
    from rrhf_bench.sampling.sampler import SamplingSpec
    from rrhf_bench.sampling.sync_check import LIMITS, Agreement
    from rrhf_bench.sampling.transformers import TransformersSampler
    from rrhf_bench.settings.methods import OptimiserSettings
    from rrhf_bench.training.optimiser import AdamW
    from rrhf_bench.training.rrhf import rrhf_loss
except ModuleNotFoundError as error:
    print(f"gpu_check: needs the package {error.name}, which {sys.executable} does not have; install it, or run "
          "this file with the python of an environment that `make env` made", file=sys.stderr)  # fmt: skip
    sys.exit(2)

PACKAGES = ("torch", "transformers", "triton", "vllm", "numpy", "pydantic")
Found = dict[str, Any]


class Check:
    """The device under test, and sizes: large on a GPU, ``small`` where only this file is checked."""

    def __init__(self, device: str, small: bool) -> None:
        self.device, self.small = torch.device(device), small

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, body: Callable[[], Any], rounds: int = 5) -> float:
        """Return the median seconds of ``body``, after one call that does not count."""
        body()
        took = []
        for _ in range(rounds):
            self.synchronize()
            began = time.perf_counter()
            body()
            self.synchronize()
            took.append(time.perf_counter() - began)
        return sorted(took)[rounds // 2]


def relative(found: Any, expected: Any) -> float:
    """Return the norm of the difference as a share of the norm of what is expected, both in float64."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


def within(errors: dict[str, float], limits: dict[str, float]) -> bool:
    """Return True if each error is at most the limit whose name its own begins with; one that is no number is not."""
    return all(
        error <= next(limit for name, limit in limits.items() if key.startswith(name)) for key, error in errors.items()
    )


# The steps. Each returns (passed, what was found).


def machine(check: Check) -> tuple[bool, Found]:
    """Record the card, the versions and the rates of products and copies; check that float32 products are not TF32."""
    found: Found = {name: _version(name) for name in PACKAGES}
    found |= {"python": platform.python_version(), "card": "CPU"}
    if check.cuda:
        card = torch.cuda.get_device_properties(check.device)
        found |= {
            "card": card.name,
            "capability": f"{card.major}.{card.minor}",
            "gib": round(card.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    n = 256 if check.small else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(n, n, device=check.device, dtype=dtype)
        took = check.seconds(lambda a=a: a @ a)
        found[f"{str(dtype)[6:]} TFLOP/s"] = round(2 * n**3 / took / 1e12, 2)
    copied = torch.empty((1 << 20) if check.small else (1 << 29), device=check.device)
    found["copy GB/s"] = round(2 * copied.nbytes / check.seconds(copied.clone) / 1e9, 1)
    a = torch.randn(512, 512, device=check.device)
    errors = {"float32 product": relative(a @ a, a.double() @ a.double())}
    limits = {"float32": 1e-5}
    return within(errors, limits), {**found, "errors": errors, "limits": limits}


def attention_of_packs(check: Check) -> tuple[bool, Found]:
    """The attention that this device uses for packs, against one dense mask in float64: outputs and gradients."""
    before = _graphs()
    errors: dict[str, float] = {}
    shapes = [("float32", 14, 2, 64), ("bfloat16", 14, 2, 64), ("bfloat16", 32, 32, 128), ("bfloat16", 4, 4, 32)]
    for name, heads, kv, size in shapes[:2] if check.small else shapes:
        longest = 1000 if heads * size > 1024 else 4096  # the definition holds all scores
        for length in (20, 129) if check.small else (20, 127, 128, 129, 1000, longest):
            first = (length - 2) // 2  # the last token of each reply is not fed
            pairs = [((1, 2, 3, 4), (5,) * first), ((1, 2, 3, 4), (6,) * (length - 2 - first))]
            (part,) = pack(ResponseBatch.of_pairs(pairs), 1 << 14)
            tokens, scale = len(part.ids_L), size**-0.5
            torch.manual_seed(0)
            leaves = [
                torch.randn(1, tokens, n, size, device=check.device, dtype=getattr(torch, name))
                .transpose(1, 2)
                .requires_grad_()
                for n in (heads, kv, kv)
            ]
            form = attention.flex_attention if check.cuda else attention.SharedPrefixAttention.apply
            found = form(*leaves, part.prefixes, scale)
            d_out = torch.randn_like(found)
            gradients = torch.autograd.grad(found, leaves, d_out)
            exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
            expected = attention.dense_attention(*exact, part.prefixes, scale)
            wanted = torch.autograd.grad(expected, exact, d_out.double())
            worst = max(relative(own, true) for own, true in zip((found, *gradients), (expected, *wanted), strict=True))
            errors[f"{name} {heads}/{kv}x{size}, {tokens} tokens"] = worst
    limits = {"float32": 1e-5, "bfloat16": 2e-2}
    graphs = _graphs() - before
    few = graphs <= 4 * len(shapes)  # two for a model, or four where lengths and heads coincide
    return within(errors, limits) and few, {"errors": errors, "limits": limits, "compiled graphs": graphs}


def head(check: Check) -> tuple[bool, Found]:
    """Log-probs from the chunked head, and their gradients, against the definition in float64."""
    errors: dict[str, float] = {}
    rows, hidden = (48, 32) if check.small else (600, 256)
    for vocabulary in (1000,) if check.small else (32_000, 152_000):
        for name in ("float32", "bfloat16"):
            torch.manual_seed(0)
            dtype = getattr(torch, name)
            layer = torch.nn.Linear(hidden, vocabulary, bias=False, device=check.device, dtype=dtype)
            states = torch.randn(rows, hidden, device=check.device).to(dtype).requires_grad_()
            token = torch.randint(vocabulary, (rows,), device=check.device)
            exact = [states.detach().double().requires_grad_(), layer.weight.detach().double().requires_grad_()]
            expected = gather_logprobs(exact[0] @ exact[1].t(), token)
            wanted = torch.autograd.grad(expected.sum(), exact)
            found = token_logprobs(layer, states, token, 1.0)
            gradients = torch.autograd.grad(found.sum(), [states, layer.weight])
            pairs = zip((found, *gradients), (expected, *wanted), strict=True)
            errors[f"{name}, {vocabulary} tokens"] = max(relative(own, true) for own, true in pairs)
    limits = {"float32": 1e-5, "bfloat16": 2e-2}
    return within(errors, limits), {"errors": errors, "limits": limits}


def architectures(check: Check) -> tuple[bool, Found]:
    """Packed against padded rows, log-probs and gradients, for each architecture that packs on a CPU."""
    errors: dict[str, float] = {}
    unpacked: dict[str, str] = {}
    models = packed(head_size=16)  # FlexAttention's kernels have heads of 16 and more
    for name in ("llama", "gpt2") if check.small else models:
        batch = _ragged(97)
        model = made(models[name]).to(check.device)
        policy = TransformersPolicy(model, tokenization())
        if policy.layout != "packed":
            unpacked[name] = str(policy.layout_reason)
            continue
        found = _logprobs_and_gradient(policy, batch)
        policy.layout = "padded"
        expected = _logprobs_and_gradient(policy, batch)
        errors[name] = max(relative(own, true) for own, true in zip(found, expected, strict=True))
    limits = {"": 1e-4}
    return within(errors, limits) and not unpacked, {"errors": errors, "limits": limits, "padded": unpacked}


def training(check: Check) -> tuple[bool, Found]:
    """Three optimiser steps of RRHF, SFT and PPO, here and on the CPU: the log-probs of a batch after each.

    In bfloat16 AdamW trains float32 copies of the weights.
    """
    batch = _groups(97)
    mask_BGT = batch.mask_BT.unflatten(0, (-1, 4))
    reward_BG = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.9, 0.1, 0.5, 0.7], [0.0, 0.2, 0.1, 0.3]], dtype=torch.float64)

    def rrhf(logp_BT: Any, old_logp_BT: Any) -> Any:
        return rrhf_loss(logp_BT.unflatten(0, (-1, 4)), mask_BGT.to(logp_BT.device), reward_BG.to(logp_BT.device)).total

    def sft(logp_BT: Any, old_logp_BT: Any) -> Any:
        return sft_loss(logp_BT, batch.mask_BT.to(logp_BT.device))

    def ppo(logp_BT: Any, old_logp_BT: Any) -> Any:
        mask_BT = batch.mask_BT.to(logp_BT.device)
        advantage_BT = (reward_BG.flatten().float().to(logp_BT.device)[:, None] - 0.3).expand(mask_BT.shape)
        return policy_loss(logp_BT, old_logp_BT, advantage_BT, mask_BT, clip=0.2).loss

    def trained(device: Any, dtype: Any, loss: Callable[[Any, Any], Any]) -> Any:
        policy = TransformersPolicy(made(packed(head_size=16)["llama"], dtype).to(device), tokenization())
        optimiser = AdamW(policy.parameters(), OptimiserSettings(kind="sft", lr=1e-3))
        with torch.no_grad():
            old_logp_BT = policy.token_logprobs(batch)
        seen = []
        for _ in range(3):
            loss(policy.token_logprobs(batch), old_logp_BT).backward()
            optimiser.clip()
            optimiser.step(1e-3)
            with torch.no_grad():
                seen.append(policy.token_logprobs(batch).cpu() - old_logp_BT.cpu())
        optimiser.close()
        return torch.stack(seen)  # (3, B, T) changes of log-probs

    errors: dict[str, float] = {}
    for name, loss in {"rrhf": rrhf, "sft": sft, "ppo": ppo}.items():
        for dtype in (torch.float32, torch.bfloat16):
            if name != "rrhf" and dtype == torch.bfloat16:
                continue
            # In bfloat16 the CPU in float32 is the definition: two devices round apart, in different places.
            expected = trained("cpu", torch.float32, loss)
            errors[f"{str(dtype)[6:]}, {name}"] = relative(trained(check.device, dtype, loss), expected)
    limits = {"float32": 1e-2, "bfloat16": 0.5}  # of changes of log-probs: AdamW divides small gradients by themselves
    return within(errors, limits), {"errors": errors, "limits": limits}


def sampling(check: Check) -> tuple[bool, Found]:
    """The transformers sampler under the sampler's contract, and diverse beams token for token as on the CPU."""
    found: Found = {}
    passed = True
    make = packed(head_size=16)["llama"]
    for name in ("float32", "bfloat16"):
        policy = TransformersPolicy(made(make, getattr(torch, name)).to(check.device), tokenization())
        sampler = TransformersSampler(policy, max_model_len=128)
        gaps = _sampled_gaps(sampler, policy)
        agreement = Agreement.of(gaps, 1.0)
        passed &= agreement.within(LIMITS[name])
        found[name] = {"mean": agreement.mean, "max": agreement.max}
    prompts = [(5, 6, 7), (8, 9), (10, 11, 12, 13, 14)]
    beams = [
        beam_search(
            made(make).to(device),
            prompts,
            beams=4,
            groups=4,
            diversity_penalty=1.0,
            max_new_tokens=12,
            eos_ids=[1],
            pad_id=2,
        )
        for device in ("cpu", check.device)
    ]
    ids = [[[beam.token_ids for beam in rows] for rows in side] for side in beams]
    found["beams are the CPU's"] = ids[0] == ids[1]
    return passed and ids[0] == ids[1], found


def memory(check: Check) -> tuple[bool, Found] | None:
    """Compare the memory of training a model of the shape of Qwen2.5-0.5B, in GiB, with arithmetic."""
    if not check.cuda:
        return None  # the allocator of a CPU counts nothing
    found: dict[str, float] = {}
    expected: dict[str, float] = {}
    batch = _replies(170, 100, groups=6)
    # KiB a token that the layers keep, counted on the meta device with transformers 5.19.
    for name, layers_kib in (("float32", 2529), ("bfloat16", 1351)):
        torch.cuda.empty_cache()
        start = torch.cuda.memory_allocated()
        model = _qwen_of_half_a_billion(getattr(torch, name), check.device)
        policy = TransformersPolicy(model, tokenization(), Computation(pass_tokens=1 << 12))
        fed = policy.fed_tokens(batch)
        weights = sum(p.nbytes for p in policy.parameters())
        trained = sum(p.numel() for p in policy.parameters())
        copies = 4 * trained if name == "bfloat16" else 0
        optimiser = AdamW(policy.parameters(), OptimiserSettings(kind="sft", lr=1e-5))
        logp_BT = policy.token_logprobs(batch)
        found[f"{name}, after a forward pass"] = (torch.cuda.memory_allocated() - start) / 2**30
        kept = fed * (layers_kib << 10)
        expected[f"{name}, after a forward pass"] = (weights + copies + kept) / 2**30
        (-logp_BT.mean()).backward()
        del logp_BT
        optimiser.clip()
        optimiser.step(1e-5)
        found[f"{name}, after a step"] = (torch.cuda.memory_allocated() - start) / 2**30
        expected[f"{name}, after a step"] = (weights + copies + 8 * trained) / 2**30
        optimiser.close()
        del model, policy, optimiser
    errors = {key: abs(found[key] / expected[key] - 1.0) for key in found}
    limits = {"": 0.1}
    return within(errors, limits), {"found": found, "expected": expected, "errors": errors, "limits": limits}


def speed(check: Check) -> tuple[bool, Found]:
    """Forward and backward passes of six replies to a prompt, packed and in padded rows, in turn."""
    if check.small:
        model = made(packed(head_size=16)["llama"]).to(check.device)
    else:
        model = _qwen_of_half_a_billion(torch.bfloat16, check.device)
    prompt, replies = (8, 16) if check.small else (170, 100)
    batch = _replies(prompt, replies, groups=1 if check.small else 4)
    policy = TransformersPolicy(model, tokenization(), Computation(pass_tokens=4096))
    if policy.layout != "packed":
        return False, {"padded": policy.layout_reason}

    def step() -> None:
        policy.token_logprobs(batch).mean().backward()
        policy.model.zero_grad(set_to_none=True)

    took: dict[str, list[float]] = {"packed": [], "padded": []}
    for _ in range(1 if check.small else 3):
        for layout, seconds in took.items():
            policy.layout = layout
            seconds.append(check.seconds(step, rounds=3))
    best = {layout: min(seconds) for layout, seconds in took.items()}
    tokens = sum(batch.lengths) + 6 * prompt * len(batch.prompt_ids)  # as if every reply had its own prompt
    ratio = best["padded"] / best["packed"]
    found = {f"tokens/s, {layout}": round(tokens / seconds) for layout, seconds in best.items()}
    return check.small or ratio > 1.0, {**found, "ratio": round(ratio, 2), "limits": {"ratio": 1.0}}


STEPS: dict[str, Callable[[Check], tuple[bool, Found] | None]] = {
    "machine": machine,
    "attention": attention_of_packs,
    "head": head,
    "architectures": architectures,
    "training": training,
    "sampling": sampling,
    "memory": memory,
    "speed": speed,
}


# Functions that several steps call.


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def _graphs() -> int:
    """Return how many graphs torch has compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


def _ids(start: int, count: int, vocabulary: int) -> tuple[int, ...]:
    return tuple(3 + (start + 7 * i) % (vocabulary - 3) for i in range(count))


def _ragged(vocabulary: int) -> Any:
    """Three prompts with one to six responses of one to forty tokens."""
    lengths = {5: (1, 4, 40, 7, 7, 12), 30: (9,), 2: (3, 25)}
    pairs = [
        (_ids(prompt, prompt, vocabulary), _ids(10 * row + prompt, length, vocabulary))
        for prompt, rows in lengths.items()
        for row, length in enumerate(rows)
    ]
    return ResponseBatch.of_pairs(pairs)


def _groups(vocabulary: int) -> Any:
    """Three prompts with four responses each."""
    return ResponseBatch.of_pairs(
        [(_ids(p, 6 + p, vocabulary), _ids(20 * p + 5 * g, 3 + 4 * g, vocabulary)) for p in range(3) for g in range(4)]
    )


def _replies(prompt: int, reply: int, groups: int) -> Any:
    """``groups`` prompts with six replies each."""
    return ResponseBatch.of_pairs(
        [(_ids(p, prompt, 90), _ids(31 * p + 5 * g, reply, 90)) for p in range(groups) for g in range(6)]
    )


def _logprobs_and_gradient(policy: Any, batch: Any) -> list[Any]:
    """Log-probs of a batch, and the gradients of a weighted sum of them by every parameter, as one vector."""
    logp_BT = policy.token_logprobs(batch)
    weight_BT = torch.linspace(-1.0, 1.0, logp_BT.numel(), device=logp_BT.device).view_as(logp_BT)
    policy.model.zero_grad(set_to_none=True)
    (logp_BT * weight_BT).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    policy.model.zero_grad(set_to_none=True)
    return [logp_BT, gradient]


def _sampled_gaps(sampler: Any, policy: Any) -> Any:
    """|log-prob of the sampler - log-prob of the trainer| of tokens sampled behind three prompts."""
    prompts = [Prompt(f"\n\nHuman: {words}\n\nAssistant:") for words in ("a", "b c d", "e f g h i j k l")]
    spec = SamplingSpec(n=4, temperature=1.0, max_new_tokens=8, seed=0, purpose="gpu check", logprobs=True)
    rows = [
        (policy.tokenization.prompt_ids(row.prompt), reply)
        for row in sampler.sample(prompts, spec)
        for reply in row.responses
    ]
    with torch.no_grad():
        logp_BT = policy.token_logprobs(ResponseBatch.of_pairs([(ids, reply.token_ids) for ids, reply in rows])).cpu()
    return np.concatenate(
        [
            np.abs(np.array(reply.logprobs) - logp_T[: len(reply.logprobs)].double().numpy())
            for (_, reply), logp_T in zip(rows, logp_BT, strict=True)
        ]
    )


def _qwen_of_half_a_billion(dtype: Any, device: Any) -> Any:
    """A random model of the shape of Qwen2.5-0.5B, made on the device."""
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2ForCausalLM(config).to(dtype)


def table(folder: Path) -> str:
    """Return the cards whose files of results lie in a folder, as a Markdown table, newest first."""
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        about = next((line for line in lines if line["step"] == "machine" and "card" in line), None)
        if about is None:
            continue
        failed = [line["step"] for line in lines if line.get("ok") is False]
        skipped = [line["step"] for line in lines if "skipped" in line]
        outcome = (
            "; ".join([*(f"{step} failed" for step in failed), *(f"{step} skipped" for step in skipped)]) or "passed"
        )
        cells = [about[name] for name in ("card", "driver", "cuda", "torch", "transformers", "triton")]
        rows.append((about["at"], [*cells, about["at"][:10], outcome]))
    if not rows:
        return "Nobody has run the checks on a card yet: everything in this repository was measured on CPUs."
    names = ["card", "driver", "CUDA", "torch", "transformers", "triton", "date", "outcome"]
    body = [names, [":---"] * len(names), *(cells for _, cells in sorted(rows, reverse=True))]
    return "\n".join("| " + " | ".join(str(cell) for cell in cells) + " |" for cells in body)


def run(check: Check, names: Sequence[str], seconds: float) -> Iterator[Found]:
    """Yield one line for each step. A step that raises has failed, and the others go on."""
    began = time.monotonic()
    for name in names:
        start = time.monotonic()
        line: Found = {"step": name, "device": str(check.device), "small": check.small}
        if start - began > seconds:
            yield {**line, "skipped": f"{seconds:g} s were over"}
            continue
        try:
            result = STEPS[name](check)
        except Exception as error:  # whatever a card or a version of a library does
            reason = str(error).strip().partition("\n")[0][:500]
            line |= {"ok": False, "error": f"{type(error).__name__}: {reason}"}
        else:
            line |= {"skipped": "needs a CUDA GPU"} if result is None else {"ok": bool(result[0]), **result[1]}
        yield {**line, "seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Check on a GPU what no CPU can.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU manages in seconds")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.jsonl"), help="a line of JSON for each step")
    parser.add_argument("--steps", default=",".join(STEPS), help="which of them, in this order")
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="only print the results in a folder as a table")
    parser.add_argument("--seconds", type=float, default=480.0, help="after which no step begins")
    arguments = parser.parse_args()
    if arguments.table is not None:
        print(table(arguments.table))
        return 0
    names = arguments.steps.split(",")
    if unknown := sorted(set(names) - set(STEPS)):
        parser.error(f"--steps: found {unknown[0]!r}; expected some of {','.join(STEPS)}")

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: torch finds no CUDA GPU, so nothing was checked; --device cpu --small checks this file")
        return 2
    transformers.utils.logging.set_verbosity_error()
    torch.set_float32_matmul_precision("highest")
    passed = True
    with arguments.out.open("w", encoding="utf-8") as out:
        for line in run(Check(arguments.device, arguments.small), names, arguments.seconds):
            line["at"] = datetime.now(UTC).isoformat(timespec="seconds")
            out.write(json.dumps(line) + "\n")
            out.flush()
            passed &= line.get("ok", True)
            state = "skipped" if "skipped" in line else "ok" if line["ok"] else "FAILED"
            reason = line.get("skipped") or line.get("error") or line.get("errors") or ""
            print(f"{line['step']:<14} {state:<8} {line.get('seconds', 0):>6} s  {reason}", flush=True)
    print(f"written: {arguments.out}; see docs/gpu.md")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
