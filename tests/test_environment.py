"""The set-up script: which machine it finds, what uv is given, and when .venv is made again."""

import ast
import importlib.util
import shutil
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "environment.py"
SPEC = importlib.util.spec_from_file_location("environment", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
environment = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(environment)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("[ $1 = -L ] && echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'", "gpu"),
        ("echo 'No devices found.'", "cpu"),
        ("echo 'GPU 0: half alive'; exit 9", "cpu"),
        (None, "cpu"),
    ],
)
def test_a_gpu_that_the_driver_lists_decides(tmp_path, monkeypatch, body, kind):
    if body is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.find_machine() == kind


def test_uv_gets_the_configuration_of_pip_unless_it_has_its_own(monkeypatch):
    monkeypatch.setattr(environment.os, "environ", {"UV_DEFAULT_INDEX": "mine"})
    listed = (
        ":env:.find-links='/a /b'\nglobal.find-links='/c'\nglobal.index-url='theirs'\nglobal.extra-index-url='\\nx\\ny'"
    )
    found = environment.uv_environment(listed)
    assert (found["UV_FIND_LINKS"], found["UV_DEFAULT_INDEX"], found["UV_INDEX"]) == ("/a,/b", "mine", "x y")


def test_a_cpu_machine_leaves_out_what_is_built_for_cuda_and_asks_pytorchs_index_second():
    tried = environment.attempts("cpu", "torch==2.0")
    assert [".[cpu,dev]" in words for _, words in tried] == [True, True, False, False, False]
    assert [environment.CPU_INDEX in words for _, words in tried] == [False, True, False, True, False]
    assert all({"torchvision ; sys_platform == 'never'"} <= set(override) for override, _ in tried)
    assert "torch==2.0+cpu ; sys_platform != 'darwin'" in tried[0][0]
    assert [override for override, _ in environment.attempts("gpu", "torch==2.0")] == [["torch==2.0,!=2.0+cpu"]] * 2


def test_the_environment_is_made_again_if_what_it_was_made_from_changed(tmp_path, monkeypatch):
    made = []

    def install(root, kind, run):
        made.append(kind)
        (root / ".venv/bin").mkdir()
        (root / ".venv/bin/python").touch()
        return run("true") and kind == "gpu"

    monkeypatch.setattr(environment, "install", install)
    (tmp_path / "scripts").mkdir()
    for name in ("pyproject.toml", "scripts/environment.py"):
        shutil.copy(SCRIPT.parents[1] / name, tmp_path / name)
    assert "without vLLM" in environment.set_up(tmp_path, "cpu")
    assert "with vLLM" in environment.set_up(tmp_path, "gpu")
    environment.set_up(tmp_path, "gpu")
    (tmp_path / "pyproject.toml").write_text("changed")
    environment.set_up(tmp_path, "gpu")
    assert made == ["cpu", "gpu", "gpu"]
    (tmp_path / ".venv/setup.json").unlink()  # as after a kill
    monkeypatch.setattr(environment, "install", lambda root, kind, run: None if not run("false") else 1)
    with pytest.raises(SystemExit, match=r"(?s)setup\.log ends:.*\$ false"):
        environment.set_up(tmp_path, "gpu")
    assert not (tmp_path / ".venv/setup.json").exists()


def test_an_environment_that_make_did_not_make_is_left_alone(tmp_path, monkeypatch):
    shutil.copytree(SCRIPT.parent, tmp_path / "scripts")
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    with pytest.raises(SystemExit, match="not one that make made"):
        environment.set_up(tmp_path, "cpu")
    assert [path.name for path in (tmp_path / ".venv").iterdir()] == ["bin"]


def test_an_old_python_can_read_the_script_as_far_as_its_refusal():
    ast.parse(SCRIPT.read_text(), feature_version=(3, 8))
