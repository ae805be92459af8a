"""The store and what is written beside it: complete or absent, whatever happens on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rrhf_bench.errors import StoreError
from rrhf_bench.pipeline.store import MANIFEST, Store, canonical, content_key, folder_identity, replacing

KEY = content_key("some artifact")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def put(store: Store, text: str) -> None:
    with store.writing(KEY, {"name": "greeting"}) as folder:
        (folder / "a.txt").write_text(text)


def write_half(path: Path) -> None:
    path.write_text("half")
    raise ZeroDivisionError


def test_what_was_written_is_there_with_its_manifest(store: Store) -> None:
    assert not store.has(KEY)
    put(store, "hello")
    assert store.has(KEY)
    assert (store.folder(KEY) / "a.txt").read_text() == "hello"
    assert store.about(KEY) == {"key": KEY, "name": "greeting"}
    assert list(store.root.iterdir()) == [store.folder(KEY)]  # nothing else is left


def test_a_block_that_fails_leaves_nothing(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.writing(KEY, {}) as folder:
        write_half(folder / "a.txt")
    assert not store.has(KEY)
    assert list(store.root.iterdir()) == []


def test_a_block_that_is_interrupted_leaves_nothing(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt), store.writing(KEY, {}):
        raise KeyboardInterrupt
    assert list(store.root.iterdir()) == []


def test_nothing_is_there_before_the_block_ends(store: Store) -> None:
    with store.writing(KEY, {}) as folder:
        (folder / "a.txt").write_text("half")
        assert not store.has(KEY)
        assert not store.folder(KEY).exists()


def test_a_folder_without_its_manifest_is_no_artifact_and_is_replaced(store: Store) -> None:
    store.folder(KEY).mkdir(parents=True)
    (store.folder(KEY) / "a.txt").write_text("half")
    (store.folder(KEY) / "stray.txt").write_text("half")
    assert not store.has(KEY)
    put(store, "whole")
    assert store.has(KEY)
    assert sorted(path.name for path in store.folder(KEY).iterdir()) == ["a.txt", MANIFEST]
    assert (store.folder(KEY) / "a.txt").read_text() == "whole"


def test_a_second_write_replaces_the_first(store: Store) -> None:
    put(store, "first")
    put(store, "second")
    assert (store.folder(KEY) / "a.txt").read_text() == "second"


def test_a_second_write_that_fails_leaves_the_first(store: Store) -> None:
    put(store, "first")
    with pytest.raises(ZeroDivisionError), store.writing(KEY, {}) as folder:
        write_half(folder / "a.txt")
    assert store.has(KEY)
    assert (store.folder(KEY) / "a.txt").read_text() == "first"


def test_a_manifest_of_another_key_is_no_hit(store: Store) -> None:
    put(store, "hello")
    (store.folder(KEY) / MANIFEST).write_text(json.dumps({"key": content_key("another")}))
    assert not store.has(KEY)


def test_a_damaged_manifest_is_said_and_not_guessed(store: Store) -> None:
    put(store, "hello")
    (store.folder(KEY) / MANIFEST).write_text('{"key"')
    with pytest.raises(StoreError, match=r"manifest\.json: cannot be read .*; remove that folder"):
        store.has(KEY)


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be written .*; choose another --runs DIR"):
        put(Store(tmp_path / "file" / "store"), "hello")


def test_equal_values_have_equal_keys() -> None:
    assert canonical({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}'
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 1.0})
    # sha256 of the two bytes {}
    assert content_key({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


# replacing


def fill_file(path: Path) -> None:
    path.write_text("new")


def fill_folder(path: Path) -> None:
    path.mkdir()
    (path / "a.txt").write_text("new")


@pytest.mark.parametrize("fill", [fill_file, fill_folder])
def test_replacing_gives_the_name_when_the_block_ends_well(tmp_path: Path, fill: Callable[[Path], None]) -> None:
    target = tmp_path / "deep" / "out"
    with replacing(target) as path:
        fill(path)
        assert not target.exists()
    assert (target if target.is_file() else target / "a.txt").read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def write_half_a_folder(path: Path) -> None:
    path.mkdir()
    write_half(path / "a.txt")


@pytest.mark.parametrize("fill", [write_half, write_half_a_folder])
def test_replacing_leaves_nothing_when_the_block_fails(tmp_path: Path, fill: Callable[[Path], None]) -> None:
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "out") as path:
        fill(path)
    assert list(tmp_path.iterdir()) == []


def test_replacing_keeps_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(target) as path:
        write_half(path)
    assert target.read_text() == "old"
    with replacing(target) as path:
        fill_file(path)
    assert target.read_text() == "new"


def test_replacing_takes_an_empty_folder_and_refuses_a_full_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with replacing(target) as path:
        fill_folder(path)
    with pytest.raises(StoreError, match=r"out: is a folder that is not empty; name a new one"), replacing(target):
        pytest.fail("the block must not start")
    assert (target / "a.txt").read_text() == "new"


def test_replacing_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"out: cannot be written"), replacing(tmp_path / "file" / "out"):
        pytest.fail("the block must not start")


# folder_identity


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "weights").write_bytes(b"0123")
    return folder


def test_a_folder_is_known_by_names_and_contents(model: Path, tmp_path: Path) -> None:
    identity = folder_identity(model)
    assert identity.startswith("folder:")
    os.utime(model / "config.json", (1, 1))
    assert folder_identity(model) == identity  # a time decides nothing in a small file
    moved = model.rename(tmp_path / "elsewhere")
    assert folder_identity(moved) == identity
    (moved / "config.json").rename(moved / "other.json")
    assert folder_identity(moved) != identity


def test_a_changed_byte_changes_the_identity(model: Path) -> None:
    identity = folder_identity(model)
    (model / "sub" / "weights").write_bytes(b"0124")
    assert folder_identity(model) != identity


def test_a_large_file_is_known_by_size_and_time(model: Path) -> None:
    with (model / "big").open("wb") as file:
        file.truncate((1 << 24) + 1)  # sparse
    identity = folder_identity(model)
    assert folder_identity(model) == identity
    os.utime(model / "big", (1, 1))
    assert folder_identity(model) != identity


def test_an_empty_folder_has_no_identity(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is empty; expected a model folder"):
        folder_identity(tmp_path)
