"""scripts/gpu_check.py on a CPU, where most of its steps run in small, and what it says when it cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.py"


def check(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script away from the tree and without a PYTHONPATH, as a user's own Python does."""
    path = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(command, cwd=folder, env=path | variables, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_every_step_that_a_cpu_can_do_passes(tmp_path):
    done = check(tmp_path, "--device", "cpu", "--small")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    steps = ["machine", "attention", "head", "architectures", "training", "sampling", "memory", "speed"]
    assert [line["step"] for line in lines] == steps
    assert [line["step"] for line in lines if "skipped" in line] == ["memory"]
    assert all(line["ok"] for line in lines if line["step"] != "memory")
    by_step = {line["step"]: line for line in lines}
    assert by_step["machine"]["torch"] == torch.__version__
    assert set(by_step["architectures"]["errors"]) == {"llama", "gpt2"}
    assert 0 < by_step["head"]["errors"]["float32, 1000 tokens"] < 1e-6


def test_a_missing_package_is_one_line_and_code_2(tmp_path):
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('No module', name='numpy')")
    missing = check(tmp_path, "--device", "cpu", PYTHONPATH=str(tmp_path))
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1
    assert "numpy" in missing.stderr
    assert not (tmp_path / "gpu_check.jsonl").exists()


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu_check

    return gpu_check


def test_a_missing_card_is_code_2(script, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    monkeypatch.chdir(tmp_path)
    assert script.main() == 2
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_raises_or_comes_too_late_is_written_down_and_the_others_go_on(script, monkeypatch):
    def broken(check):
        raise RuntimeError("no kernel\nfor this card")

    steps = {"broken": broken, "fine": lambda check: (True, {"errors": {"a": 0.0}}), "off": lambda check: (False, {})}
    monkeypatch.setattr(script, "STEPS", steps)
    lines = list(script.run(script.Check("cpu", True), list(steps), seconds=60))
    assert [line["ok"] for line in lines] == [False, True, False]
    assert lines[0]["error"] == "RuntimeError: no kernel"
    (late,) = script.run(script.Check("cpu", True), ["fine"], seconds=-1)
    assert "skipped" in late
    assert "ok" not in late


def test_an_error_beyond_its_limit_or_not_a_number_fails(script):
    limits = {"float32": 1e-5, "bfloat16": 1e-2}
    assert script.within({"float32 a": 1e-5, "bfloat16 b": 1e-2}, limits)
    assert not script.within({"float32 a": 2e-5}, limits)
    assert not script.within({"bfloat16 b": float("nan")}, limits)


def test_the_page_lists_what_was_sent_in(script, tmp_path):
    assert script.table(ROOT / "reports" / "gpu") in (ROOT / "docs" / "gpu.md").read_text()
    about = {"step": "machine", "ok": True, "card": "A card", "driver": "1.2", "cuda": "13.0", "torch": "2.13.0"}
    about |= {"transformers": "5.19.0", "triton": "3.7.1", "at": "2026-01-02T03:04:05+00:00"}
    lines = [about, {"step": "head", "ok": False}, {"step": "speed", "skipped": "480 s were over"}]
    (tmp_path / "card.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert script.table(tmp_path).splitlines()[-1] == (
        "| A card | 1.2 | 13.0 | 2.13.0 | 5.19.0 | 3.7.1 | 2026-01-02 | head failed; speed skipped |"
    )
