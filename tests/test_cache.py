"""What the cache command shows and removes: never what a run refers to, nor what a process is making."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli

from rrhf_bench.errors import StoreError
from rrhf_bench.pipeline.cache import LEFT_OVER, UNFINISHED, list_store, prune
from rrhf_bench.pipeline.store import Store, content_key, with_checksum, write_file

POLICY, TRAINED, OLD, NEXT = (content_key(name) for name in ("policy", "train rrhf", "train old", "train next"))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs that share a policy; an artifact that nobody refers to; what killed processes left."""
    store = Store(tmp_path / "store")
    for key, kind, size in ((POLICY, "model", 1000), (TRAINED, "train", 300), (OLD, "train", 50)):
        with store.new_artifact(key, {"name": f"the {kind}", "kind": kind}) as folder:
            (folder / "model").mkdir()
            (folder / "model" / "weights").write_bytes(b"0" * size)
    refer(tmp_path, "one", {POLICY: "the model", TRAINED: "the train", NEXT: "train next, seed 0"})
    refer(tmp_path, "two", {POLICY: "the model"})
    for key in (NEXT, OLD[::-1]):
        write_file(store.scratch(key) / "step", "7")
    (store.root / f".{NEXT[:32]}-abcd").mkdir()
    (store.root / f".{NEXT[:32]}.lock").write_text("{}")
    write_file(store.root / "journals" / "a.jsonl", "verdicts")
    return tmp_path


def refer(runs: Path, name: str, stages: dict[str, str]) -> None:
    run = {"stages": {key: {"name": stage} for key, stage in stages.items()}}
    write_file(runs / name / "run.json", json.dumps(with_checksum(run)))


def names(store: Store) -> set[str]:
    return {path.name for path in store.root.iterdir()}


def test_what_is_there_and_for_whom(runs: Path) -> None:
    found = list_store(runs)
    manifest = {key: (runs / "store" / key[:32] / "manifest.json").stat().st_size for key in (POLICY, TRAINED, OLD)}
    model, trained, old = 1000 + manifest[POLICY], 300 + manifest[TRAINED], 50 + manifest[OLD]
    assert found.sizes() == {
        "model": (1, model), "train": (2, trained + old), UNFINISHED: (2, 2), LEFT_OVER: (1, 0),
    }  # fmt: skip
    assert next(iter(found.sizes())) == "model"  # the largest
    assert found.by_run() == {"one": (3, model + trained + 1, trained + 1), "two": (1, model, 0)}
    assert found.journals == len("verdicts")
    assert {(item.what, item.id) for item in found.unused} == {
        ("train", OLD[:32]), (UNFINISHED, OLD[::-1][:32]), (LEFT_OVER, NEXT[:32]),
    }  # fmt: skip


def test_a_prune_keeps_what_a_run_refers_to(runs: Path) -> None:
    store = Store(runs / "store")
    assert len(prune(runs)) == 3
    assert names(store) == {POLICY[:32], TRAINED[:32], ".scratch", "journals"}
    assert [path.name for path in (store.root / ".scratch").iterdir()] == [NEXT[:32]]
    assert store.is_intact(POLICY)
    assert prune(runs) == ()


def test_a_prune_leaves_what_a_process_is_making(runs: Path) -> None:
    store = Store(runs / "store")
    with store.exclusive_lock(NEXT), store.exclusive_lock(OLD):
        removed = {item.id for item in prune(runs)}
        assert removed == {OLD[::-1][:32]}
        assert (store.root / f".{NEXT[:32]}-abcd").is_dir()
        assert store.has(OLD)


def test_a_prune_waits_while_a_run_says_what_it_will_use(runs: Path) -> None:
    """The run's words are read after the gate: what it refers to only now is kept."""
    import threading

    removed: list[Any] = []
    thread = threading.Thread(target=lambda: removed.extend(prune(runs)))
    with Store(runs / "store").registration_lock():
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        refer(runs, "three", {OLD: "train old"})
    thread.join()
    assert OLD[:32] not in {item.id for item in removed}
    assert Store(runs / "store").is_intact(OLD)


def test_a_run_that_cannot_say_what_it_uses_stops_the_prune(runs: Path) -> None:
    text = (runs / "one" / "run.json").read_text()
    (runs / "one" / "run.json").write_text(text.replace(TRAINED, OLD))
    before = names(Store(runs / "store"))
    with pytest.raises(StoreError, match=r"one/run\.json: has changed since it was written; run the experiment again"):
        prune(runs)
    assert names(Store(runs / "store")) == before


def test_the_command_removes_only_when_it_is_told_to(runs: Path, cli: Cli) -> None:
    store = Store(runs / "store")
    before = names(store)
    for words in ([], ["--prune"]):
        found = cli("cache", "--runs", runs, *words)
        assert found.code == 0
        assert "no run refers to 3 folders" in found.out
        assert ("unused: train the train" in found.out) is bool(words)
        assert names(store) == before
    refused = cli("cache", "--runs", runs, "--yes")
    assert (refused.code, refused.err) == (2, "error: --yes: says that --prune may remove; add --prune\n")
    printed = cli("cache", "--runs", runs, "--prune", "--yes", "--json").json
    assert {item["id"] for item in printed["removed"]} == {OLD[:32], OLD[::-1][:32], NEXT[:32]}
    assert printed["runs"]["two"]["items"] == 1
    assert OLD[:32] not in names(store)
    assert "removed 0 folders" in cli("cache", "--runs", runs, "--prune", "--yes").out


def test_ls_says_what_is_begun(runs: Path, cli: Cli) -> None:
    one, two = cli("ls", "--runs", runs, "--json").json
    assert one == {
        "run": "one", "stages": 3, "complete": 2, "unfinished": ["train next, seed 0"], "held": None, "report": None,
    }  # fmt: skip
    assert (two["stages"], two["complete"], two["unfinished"]) == (1, 1, [])
    assert "2 of 3" in cli("ls", "--runs", runs).out


def test_no_store_is_an_empty_one(tmp_path: Path, cli: Cli) -> None:
    assert prune(tmp_path) == ()
    assert cli("cache", "--runs", tmp_path, "--json").json["kinds"] == {}
    assert list(tmp_path.iterdir()) == []
