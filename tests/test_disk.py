"""Full, read-only and damaged disks under a whole run: one line, exit 2, nothing half-written; then it goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rrhf_bench.errors import BenchError, StoreError
from rrhf_bench.pipeline.run_folder import load_run, open_run
from rrhf_bench.pipeline.stage_graph import make_plan
from rrhf_bench.pipeline.store import Store
from rrhf_bench.settings.reading import load_experiment

ROOT = Path(__file__).parents[1]

# Every kind of stage that a disk could meet, as small as they come.
TINY = """
name = "tiny"
[data]
source = "files"
path = "{path}"
train_prompts = 8
[policy]
source = "scratch"
scratch = {{ vocabulary = 300, hidden = 32, layers = 1, heads = 1, ffn = 64, epochs = 1 }}
[reward_model]
source = "scratch"
training = {{ epochs = 1 }}
[perplexity_model]
source = "scratch"
scratch = {{ vocabulary = 300, hidden = 32, layers = 1, heads = 1, ffn = 64, epochs = 1 }}
[sampling]
backend = "transformers"
max_new_tokens = 4
[candidates]
n = 2
[methods.sft]
epochs = 1
[evaluation]
prompts = 4
pairs = 6
dev_prompts = 2
curve_points = 1
max_new_tokens = 4
pool_prompts = 2
pool_samples = 2
[runtime]
device = "cpu"
workers = 1
"""

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from rrhf_bench import cli
cli.main()
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    rows = (
        {"prompt": f"\n\nHuman: question {i}\n\nAssistant:", "chosen": " Yes, it is.", "rejected": " No."}
        for i in range(40)
    )
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.toml").write_text(TINY.format(path=tmp_path / "pairs.jsonl"))
    return tmp_path / "tiny.toml"


def start(*words: object, prefix: tuple[str, ...] = (), program: str = "from rrhf_bench import cli; cli.main()") -> Any:
    limit = [word for word in words if isinstance(word, int)]
    rest = [str(word) for word in words if not isinstance(word, int)]
    return subprocess.run(
        [*prefix, sys.executable, "-c", program, *map(str, limit), *rest],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def one_error(done: Any) -> str:
    """The one line of what ended with exit code 2."""
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def nothing_half_written(runs: Path) -> None:
    store = Store(runs / "store")
    for path in store.root.glob("*"):
        assert store.is_intact(json.loads((path / "manifest.json").read_text())["key"]), path
    assert not [path for path in runs.rglob(".*") if path.name != ".scratch"]


@pytest.mark.slow
def test_a_disk_that_fills_up_while_weights_are_written(experiment: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    done = start("run", experiment, "--runs", runs, 40_000, program=LIMITED)  # data fits, weights do not
    line = one_error(done)
    assert line.startswith(f"policy: {runs / 'store'}: there is no room to write (File too large); make room or ")
    assert [json.loads(path.read_text())["kind"] for path in runs.glob("store/*/manifest.json")] == ["data"]
    nothing_half_written(runs)
    done = start("run", experiment, "--runs", runs, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reused"] == 1


def test_a_disk_that_is_full_from_the_start(experiment: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    line = one_error(start("run", experiment, "--runs", runs, 100, program=LIMITED))
    assert f"{runs}" in line
    assert "there is no room to write (File too large)" in line
    assert not [path for path in runs.rglob("*") if path.is_file()]


def can_mount() -> bool:
    done = subprocess.run(["unshare", "-rm", "true"], capture_output=True) if shutil.which("unshare") else None
    return done is not None and done.returncode == 0


mounting = pytest.mark.skipif(not can_mount(), reason="a file system cannot be mounted here without being root")


@mounting
@pytest.mark.parametrize(
    ("kibibytes", "name"),
    [
        (8, "tiny"),
        pytest.param(40, "data", marks=pytest.mark.slow),
        pytest.param(160, "policy", marks=pytest.mark.slow),
    ],
)
def test_a_small_file_system(experiment: Path, tmp_path: Path, kibibytes: int, name: str) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    copy = tmp_path / "copy"  # of what is there at the end: the file system goes with the process
    script = 'size=$1; runs=$2; copy=$3; shift 3; mount -t tmpfs -o size="$size"k none "$runs"; "$@"; code=$?; '
    script += 'cp -r "$runs" "$copy"; exit $code'
    prefix = ("unshare", "-rm", "sh", "-c", script, "sh", str(kibibytes), str(runs), str(copy))
    line = one_error(start("run", experiment, "--runs", runs, prefix=prefix))
    assert "there is no room to write (No space left on device); make room or choose another --runs DIR" in line
    assert name in line
    nothing_half_written(copy)


@mounting
def test_a_read_only_file_system(experiment: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    script = 'mount -t tmpfs -o ro none "$1"; shift; "$@"'
    prefix = ("unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path / "runs"))
    line = one_error(start("run", experiment, "--runs", tmp_path / "runs", prefix=prefix))
    assert line.endswith("cannot be written (Read-only file system); choose another --runs DIR")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(experiment: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir(mode=0o500)
    line = one_error(start("run", experiment, "--runs", tmp_path / "runs"))
    assert line.endswith("cannot be written (Permission denied); choose another --runs DIR")


# Damage, under a whole run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an experiment that has been run."""
    folder = tmp_path_factory.mktemp("whole")
    experiment.__wrapped__(folder)  # type: ignore[attr-defined]
    done = start("run", folder / "tiny.toml", "--runs", folder / "runs")
    assert done.returncode == 0, done.stderr
    return folder


def tables(runs: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (runs / "tiny" / "report" / "tables").iterdir()}


def artifact(runs: Path, name: str) -> Path:
    stages = json.loads((runs / "tiny" / "run.json").read_text())["stages"]
    return Store(runs / "store").folder(next(key for key, stage in stages.items() if stage["name"] == name))


def other_score(path: Path) -> None:
    text = path.read_text()
    at = text.index('"reward": ') + len('"reward": ')
    path.write_text(text[:at] + ("1" if text[at] != "1" else "2") + text[at + 1 :])


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.slow
def test_what_was_edited_or_cut_is_refused_by_the_report_and_made_again_by_the_run(whole: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(whole / "runs", runs)
    before = tables(runs)
    edited = artifact(runs, "evaluate sft, seed 0") / "evaluated.jsonl"
    cut = artifact(runs, "policy") / "model" / "model.safetensors"
    size = cut.stat().st_size
    other_score(edited)
    half(cut)
    line = one_error(start("report", runs / "tiny"))
    assert line.startswith(f"{runs / 'tiny'}: 'evaluate sft, seed 0': {edited} has changed since it was written; run ")
    assert tables(runs) == before  # as they were
    done = start("cache", "--runs", runs, "--verify")
    assert one_error(done) == "2 artifacts are damaged; `run` of an experiment makes its own again"
    found = {line.split(": ")[1] for line in done.stdout.splitlines() if line.startswith("damaged: ")}
    assert found == {"evaluate sft, seed 0", "policy"}
    done = start("run", whole / "tiny.toml", "--runs", runs)
    assert done.returncode == 0, done.stderr
    notes = {line for line in done.stdout.splitlines() if line.startswith("note: ")}
    assert notes == {
        f"note: evaluate sft, seed 0 is made again: {edited} has changed since it was written",
        f"note: policy is made again: {cut} has {size // 2} bytes and was written with {size}",
    }
    assert "2 stages made" in done.stdout
    assert tables(runs) == before
    nothing_half_written(runs)


def another_row(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace("sft", "ppo"))
    assert path.read_text() != text


@pytest.mark.parametrize("damage", [half, another_row])
@pytest.mark.parametrize("name", ["run.json", "config.toml"])
def test_a_run_folder_that_was_edited_or_cut_is_refused(
    experiment: Path, tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    folder = open_run(make_plan(load_experiment(experiment)), tmp_path / "runs", "rrhf-bench run tiny.toml")
    with pytest.raises(StoreError, match="is not complete in"):  # so far all is well
        load_run(folder)
    damage(folder / name)
    with pytest.raises(BenchError) as caught:
        load_run(folder)
    assert str(caught.value).startswith(str(folder / name))
    assert "is not complete in" not in str(caught.value)


@pytest.mark.parametrize("name", ["environment.json", "run.json"])
def test_what_a_killed_process_left_in_a_run_folder_is_overwritten(experiment: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "runs" / "tiny"
    (folder / ".report.77.new" / "tables").mkdir(parents=True)
    (folder / f".{name}.part").write_text("{")
    open_run(make_plan(load_experiment(experiment)), tmp_path / "runs", "rrhf-bench run tiny.toml")
    assert {path.name for path in folder.iterdir()} == {"config.toml", "environment.json", "run.json"}
