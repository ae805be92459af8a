"""What is installed here, and whether sampler, trainer and reward model agree: checks that anyone can run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import torch

from rrhf_bench.data.toy.reviews import build_reviews
from rrhf_bench.data.toy.scratch import train_language_model
from rrhf_bench.data.toy.world import build_world
from rrhf_bench.errors import BenchError
from rrhf_bench.pipeline.memory import WITHOUT_A_FILE, out_of_memory_named
from rrhf_bench.pipeline.run_folder import environment
from rrhf_bench.pipeline.services import ModelRef, Services
from rrhf_bench.policy import onednn
from rrhf_bench.records import Preference
from rrhf_bench.sampling.backend import BackendName, choose_backend
from rrhf_bench.sampling.sync_check import ASKED, LIMITS, Agreement, agreement
from rrhf_bench.settings.experiment import RuntimeSettings, ScratchSettings

TEMPERATURE = 0.7  # a temperature that is not applied must show
PAIRS = 100  # labelled pairs of the embedded worlds, to ask a reward model about


@dataclass(frozen=True)
class Finding:
    check: str
    ok: bool | None  # None: nothing to pass or fail, or a warning
    found: str


def examine(
    policy: ModelRef | None, reward: ModelRef | None, backend: BackendName, runtime: RuntimeSettings
) -> list[Finding]:
    """Return what is installed, and what the checks of sampler, trainer and reward model found."""
    findings = [Finding(name, None, version) for name, version in environment().items()]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (no CUDA GPU)"
    findings.append(Finding("device", None, f"{device}, {torch.get_num_threads()} threads"))
    findings.append(_pins())
    chosen = choose_backend(backend, device=runtime.device)
    findings.append(Finding("sampler", None, chosen.note or chosen.identity))
    services = Services(runtime)
    world = build_world(seed=0, raw_corpus=1, corpus=200, perplexity_corpus=1, preferences=8, dev=1, test=8)
    with tempfile.TemporaryDirectory() as folder:
        if policy is None:
            settings = ScratchSettings(epochs=1)
            place = Path(folder) / "model"
            silent: dict[str, Any] = {"log": lambda metrics: None, "progress": lambda done, total: None}
            train_language_model(world.corpus, settings, seed=0, folder=place, device=services.device, **silent)
            policy = ModelRef(str(place), max_length=settings.context)
        check = partial(_sampler, services, policy, chosen.name, world.test)
        findings += _guarded(services, "sampler's log-probs", check)
    if reward is not None:
        findings += _guarded(services, "reward model", partial(_reward, services, reward))
    return findings


def _guarded(services: Services, check: str, body: Callable[[], list[Finding]]) -> list[Finding]:
    """Return the findings of a check, or one failed finding if it cannot run."""
    try:
        with out_of_memory_named(services, WITHOUT_A_FILE):
            return body()
    except BenchError as error:
        return [Finding(check, False, str(error))]


def _pins() -> Finding:
    """Compare the versions of torch, transformers and vLLM with those that were tested together."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in requires("rrhf-bench") or ()]
    except PackageNotFoundError:
        return Finding("pinned versions", None, "rrhf-bench is not installed as a package; nothing to compare with")
    found = environment()
    wrong = [
        f"{r.name} {found[r.name]} (wanted {r.specifier})"
        for r in wanted
        if r.name in found and not r.specifier.contains(found[r.name], prereleases=True)
    ]
    return Finding("pinned versions", not wrong, "; ".join(wrong) or "as pinned")


def _sampler(services: Services, ref: ModelRef, backend: BackendName, pairs: tuple[Preference, ...]) -> list[Finding]:
    """Compare the sampler's log-probs with the trainer's, before and after a change of weights."""
    policy = services.policy(ref)
    prompts = [pair.prompt for pair in pairs]
    sampler = services.sampler_for(policy, ref, backend, prompts, ASKED.max_new_tokens)
    limit = LIMITS[str(policy.dtype).removeprefix("torch.")]
    before = agreement(sampler, policy, prompts, TEMPERATURE)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(0.9)
    missed = agreement(sampler, policy, prompts, TEMPERATURE)
    sampler.sync(policy)
    after = agreement(sampler, policy, prompts, TEMPERATURE)
    bound = f"limits {limit.mean:g} and {limit.max:g}"
    layout = "each prompt once, packed" if policy.layout == "packed" else f"padded rows: {policy.layout_reason}"
    found = [Finding("training layout", None, layout)]
    if policy.device.type == "cpu" and torch.backends.mkldnn.is_available():
        taken = f"taken in {policy.onednn_layers} layers" if policy.onednn_layers else "not taken"
        words = f"{onednn.gain():.2f} times as fast as the default in float32; {taken}, as runtime.onednn says"
        found.append(Finding("oneDNN", None, words))
    return [
        *found,
        Finding("log-probs, sampler and trainer", before.within(limit), f"{_apart(before)} ({bound})"),
        Finding("the same after new weights", after.within(limit), f"{_apart(after)} ({bound})"),
        Finding("a missed sync would show", not missed.within(limit), f"{_apart(missed)} with the old weights"),
    ]


def _apart(found: Agreement) -> str:
    return f"{found.mean:.1e} apart on average, {found.max:.1e} at most"


def _reward(services: Services, ref: ModelRef) -> list[Finding]:
    """Check the input of a reward model, and its order of pairs of an embedded world, which can give only a warning."""
    sizes = {"seed": 0, "corpus": 200, "perplexity_corpus": 1, "preferences": 8, "dev": 1, "test": PAIRS}
    pairs = build_reviews(**sizes).test if ref.template == "raw" else build_world(raw_corpus=1, **sizes).test
    findings = [Finding("reward model", None, services.reward(ref).identity)]
    for check in services.reward_checks(ref, pairs):
        warning = check.ok is False
        found = f"warning: {check.found}" if warning else check.found
        findings.append(Finding(f"its {check.name}", None if warning else check.ok, found))
    return findings
