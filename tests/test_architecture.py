"""The direction of imports that docs/architecture.md promises: a file imports from its own room and rooms above it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from rrhf_bench.registry import METHODS

ROOT = Path(__file__).parents[1]

# From top to bottom. The settings of a method lie beside its code but belong to the room of settings: `plan` reads them
# without torch.
ROOMS = {
    "nouns": ("errors", "records", "seeding", "jsonl", "schedule", "registry"),
    "settings": ("settings", "*_settings"),
    "data": ("data",),
    "policy": ("policy",),
    "sampling": ("sampling",),
    "rewards": ("rewards",),
    "evaluation": ("evaluation",),
    "training": ("training",),
    "baselines": ("baselines",),
    "pipeline": ("pipeline",),
    "report": ("report",),
    "replication": ("replication",),
    "command line": ("terminal", "cli", "cli_files", "cli_options"),
    "tests": ("testing",),
}
ORDER = list(ROOMS)


def room_of(module: str) -> str:
    """The room of a module such as ``rrhf_bench.policy.logprobs``."""
    name = module.removeprefix("rrhf_bench.")
    if name.endswith("_settings"):
        return "settings"
    return next(room for room, members in ROOMS.items() if name.split(".")[0] in members)


def imported(source: str) -> Iterator[str]:
    """Our own modules that a file imports, anywhere in it; a name taken from a package is a module where it is one."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom) and node.module and is_ours(node.module):
            inside = [f"{node.module}.{alias.name}" for alias in node.names if is_module(f"{node.module}.{alias.name}")]
            yield from inside or [node.module]


def is_ours(module: str) -> bool:
    return module.split(".")[0] in ("rrhf_bench", "baselines")


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def upward(module: str, source: str) -> list[str]:
    """The imports of a file that lie in a room below its own."""
    return [
        f"{module} ({room_of(module)}) imports {name} ({room_of(name)})"
        for name in imported(source)
        if name != "rrhf_bench" and ORDER.index(room_of(name)) > ORDER.index(room_of(module))
    ]


FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in ("rrhf_bench", "baselines")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != ROOT / "rrhf_bench" / "__init__.py"
}


def test_no_file_imports_from_a_room_below():
    for name, path in FILES.items():
        assert not upward(name.removesuffix(".__init__"), path.read_text(encoding="utf-8"))


def test_a_report_knows_no_model():
    """Records in, files out: of what computes with weights nothing but pure formulas is imported."""
    below = {"policy", "sampling", "rewards", "training"}
    for module, path in FILES.items():
        if room_of(module) in ("report", "replication"):
            assert not below & {room_of(name) for name in imported(path.read_text(encoding="utf-8"))}, module


def test_the_generic_rooms_know_no_method_by_name():
    """They ask the registry and the settings for traits; the replication of one paper may name its methods."""
    named = {method.settings.partition(":")[0] for method in METHODS.values()}
    for module, path in FILES.items():
        if room_of(module) in ("evaluation", "pipeline", "report"):
            source = path.read_text(encoding="utf-8")
            words = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
            assert not words & set(METHODS), module
            assert not named & set(imported(source)), module


def test_the_page_names_every_room_and_file():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    missing = [str(path.relative_to(ROOT)) for path in FILES.values() if path.stem != "__init__"]
    missing = [name for name in missing if not name.endswith("_settings.py")]  # one row of the page for all
    assert not [name for name in missing if f"`{Path(name).name}`" not in page]
    positions = [page.index(f"\n| {room} |") for room in ROOMS]
    assert positions == sorted(positions)


def test_every_test_that_the_page_on_reliability_names_exists():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"(?<=`)(test_\w+\.py)`((?:[:,] `[a-z0-9_]+`(?: \(slow\))?)*)", page)
    assert len(named) > 50
    for file, names in named:
        (path,) = (ROOT / "tests").rglob(file)
        tests = set(re.findall(r"def test_(\w+)", path.read_text(encoding="utf-8")))
        assert set(re.findall(r"`(\w+)`", names)) <= tests, file
