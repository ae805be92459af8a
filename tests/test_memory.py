"""An allocation that fails ends a command in one line: what was made, what holds memory, what to change."""

from __future__ import annotations

import pytest
import torch

from rrhf_bench import cli_files
from rrhf_bench.cli_options import StepOptions
from rrhf_bench.data.dialogue import Template
from rrhf_bench.errors import StageError, is_out_of_memory
from rrhf_bench.pipeline.memory import out_of_memory_named, what_to_lower
from rrhf_bench.pipeline.services import ModelRef, Services
from rrhf_bench.policy import attention
from rrhf_bench.policy.policy import TransformersPolicy
from rrhf_bench.settings.experiment import RuntimeSettings

ON_A_GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"


def allocate_too_much(*arguments: object, **options: object) -> torch.Tensor:
    """Ask for 1 PiB, which no machine has."""
    return torch.empty(1 << 50, dtype=torch.uint8)


def test_a_failed_allocation_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        allocate_too_much()
    assert is_out_of_memory(caught.value)
    for error in (torch.OutOfMemoryError(ON_A_GPU), RuntimeError("CUDA error: out of memory"), MemoryError()):
        assert is_out_of_memory(error)
    for other in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory")):
        assert not is_out_of_memory(other)


def test_the_message_names_the_largest_models_and_what_to_change(llama_folder):
    services = Services(RuntimeSettings(device="cpu"))
    ref = ModelRef(str(llama_folder(0)))
    policy = services.policy(ref)
    services.sampler(policy, ref, "transformers")
    own = sum(p.nbytes for p in policy.parameters())
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert services.held() == [(f"policy {ref.source}", 2 * own), ("sampler's copy of the policy", own)]
    advice = what_to_lower("train", "cuda")
    with pytest.raises(StageError) as caught, out_of_memory_named(services, advice):
        raise torch.OutOfMemoryError(ON_A_GPU)
    message = str(caught.value)
    assert "\n" not in message
    assert message.index(f"policy {ref.source}") < message.index("sampler's copy")
    for key in ("runtime.pass_tokens", "runtime.checkpoint_activations", "lora", "runtime.gpu_memory", "2.00 GiB"):
        assert key in message
    del policy
    assert [what for what, _ in services.held()] == ["sampler's copy of the policy"]


def test_other_errors_pass_as_they_are(policy):
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_named(Services(RuntimeSettings(device="cpu")), ""):
        torch.mm(torch.ones(2, 3), torch.ones(2, 3))


def test_a_stage_without_memory_ends_a_run_with_one_line_and_code_2(tmp_path, cli):
    """A layer of the embedded policy that no machine can hold."""
    words = ["run", "experiments/smoke.toml", "--runs", str(tmp_path), "--set", "runtime.workers=1"]
    words += ["--set", "runtime.device=cpu", "--set", f"policy.scratch.ffn={1 << 42}"]
    found = cli(*words)
    assert found.code == 2
    (line,) = found.err.splitlines()
    assert line.startswith("error: ")
    assert "out of memory on cpu" in line


def test_a_command_on_plain_files_says_it_in_one_line_too(llama_folder):
    with (
        pytest.raises(StageError, match=r"out of memory on cpu .*--dtype bfloat16"),
        cli_files._steps(StepOptions(device="cpu"), "sampling") as steps,
    ):
        allocate_too_much(steps.services.policy(ModelRef(str(llama_folder(0)))))


def test_a_trial_of_packing_without_memory_chooses_no_layout(llama_folder, monkeypatch):
    """Padded rows would be chosen for the wrong reason, and cost several times as much in every step."""
    monkeypatch.setattr(attention, "_forward", allocate_too_much)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        TransformersPolicy.load(llama_folder(0), template=Template())
