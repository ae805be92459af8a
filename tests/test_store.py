"""An artifact of the store, and each file beside it, is complete or absent after any failure."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rrhf_bench.errors import StoreError
from rrhf_bench.pipeline import store as store_module
from rrhf_bench.pipeline.run_folder import _store_beside
from rrhf_bench.pipeline.store import (
    MANIFEST,
    TIMING,
    Store,
    atomic_file,
    canonical,
    content_key,
    disk_errors,
    folder_identity,
    is_unchanged,
    replace_path,
    with_checksum,
    write_file,
)

KEY = content_key("some artifact")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def put(store: Store, text: str) -> None:
    with store.new_artifact(KEY, {"name": "greeting"}) as folder:
        (folder / "a.txt").write_text(text)


def write_half(path: Path, error: type[BaseException] = ZeroDivisionError) -> None:
    path.write_text("half")
    raise error


def test_a_written_artifact_has_its_manifest(store: Store) -> None:
    assert not store.has(KEY)
    put(store, "hello")
    assert store.has(KEY)
    assert (store.folder(KEY) / "a.txt").read_text() == "hello"
    # printf hello | sha256sum
    sha256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    files = {"a.txt": {"size": 5, "sha256": sha256}}
    assert json.loads((store.folder(KEY) / MANIFEST).read_text()) == {"key": KEY, "name": "greeting", "files": files}
    assert store.is_intact(KEY)
    assert list(store.root.iterdir()) == [store.folder(KEY)]  # nothing else is left


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_nothing(store: Store, error: type[BaseException]) -> None:
    with pytest.raises(error), store.new_artifact(KEY, {}) as folder:
        write_half(folder / "a.txt", error)
    assert not store.has(KEY)
    assert list(store.root.iterdir()) == []


def test_nothing_is_there_before_the_block_ends(store: Store) -> None:
    with store.new_artifact(KEY, {}) as folder:
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


def test_a_second_write_that_fails_leaves_the_first(store: Store) -> None:
    put(store, "first")
    with pytest.raises(ZeroDivisionError), store.new_artifact(KEY, {}) as folder:
        write_half(folder / "a.txt")
    assert store.has(KEY)
    assert (store.folder(KEY) / "a.txt").read_text() == "first"


def test_a_manifest_of_another_key_is_no_artifact(store: Store) -> None:
    put(store, "hello")
    (store.folder(KEY) / MANIFEST).write_text(json.dumps({"key": content_key("another")}))
    assert not store.has(KEY)


# Damage


def put_text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def replace_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new)) and None


# What happens to the folder of an artifact, and the file that is named.
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (put_text("a.txt", "hell"), "a.txt"),
    "one letter": (put_text("a.txt", "hallo"), "a.txt"),
    "removed": (lambda folder: (folder / "a.txt").unlink(), "a.txt"),
    "added": (put_text("golds.jsonl", ""), "golds.jsonl"),
    "timing removed": (lambda folder: (folder / TIMING).unlink(), TIMING),
    "timing edited": (replace_text(TIMING, "1.5", "1.6"), TIMING),
    "timing truncated": (put_text(TIMING, '{"seconds": 1.5'), TIMING),
    "manifest truncated": (put_text(MANIFEST, '{"key": '), MANIFEST),
    "manifest of another kind": (put_text(MANIFEST, "[]"), MANIFEST),
    "manifest without sizes": (replace_text(MANIFEST, '"size"', '"bytes"'), MANIFEST),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_changed_artifact_is_not_read(store: Store, damage: str) -> None:
    change, name = DAMAGES[damage]
    with store.new_artifact(KEY, {"name": "greeting"}) as folder:
        (folder / "a.txt").write_text("hello")
        (folder / TIMING).write_text(json.dumps(with_checksum({"seconds": 1.5})))
    assert store.is_intact(KEY)
    assert store.damage(KEY) is None
    assert store.require(KEY, "greeting") == store.folder(KEY)
    change(store.folder(KEY))
    words = store.damage(KEY)
    assert words is not None
    assert words.startswith(f"{store.folder(KEY) / name} ")
    assert not store.is_intact(KEY)
    with pytest.raises(StoreError) as caught:
        store.require(KEY, "greeting")
    assert str(caught.value).startswith(f"greeting: {words}; ")
    put(store, "hello")
    assert store.is_intact(KEY)
    assert list(store.root.iterdir()) == [store.folder(KEY)]


def test_a_hidden_file_is_no_damage(store: Store) -> None:
    put(store, "hello")
    (store.folder(KEY) / ".DS_Store").write_text("")
    assert store.is_intact(KEY)


def test_an_absent_artifact_is_not_damaged_and_cannot_be_required(store: Store) -> None:
    assert store.damage(KEY) is None
    assert not store.is_intact(KEY)
    with pytest.raises(StoreError, match=r"^greeting is not complete in .*; run the experiment again$"):
        store.require(KEY, "greeting")


def test_large_files_are_read_when_they_were_touched_or_when_all_is_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SMALL_BYTES", 4)
    put(store, "hello")
    file = store.folder(KEY) / "a.txt"
    written = file.stat().st_mtime_ns
    file.write_text("hallo")
    assert store.damage(KEY) == f"{file} has changed since it was written"
    assert store.has(KEY)  # which looks at sizes
    os.utime(file, ns=(written, written))  # as a disk that forgets: no time, no size tells it
    assert store.damage(KEY) is None
    assert store.damage(KEY, "all") == f"{file} has changed since it was written"
    file.write_text("hello")  # touched and the same
    assert store.damage(KEY) is None
    file.write_text("hell")
    assert not store.has(KEY)


@pytest.mark.parametrize("value", [{}, {"a": 1.5, "é": [None, {"b": (1, 2)}]}, {"a": math.nan, "b": math.inf}])
def test_a_checksum_holds_through_a_file_and_breaks_with_any_value(value: dict[str, Any]) -> None:
    read = json.loads(json.dumps(with_checksum(value)))
    assert is_unchanged(read)
    for changed in ({**read, "a": 2}, {**read, "another": 2}, [read], value):
        assert not is_unchanged(changed)


# What is left over


def test_a_sweep_removes_what_dead_processes_left_and_nothing_else(store: Store) -> None:
    put(store, "hello")
    dead, alive, other = (content_key(name) for name in ("dead", "alive", "other"))
    for key in (dead, alive):
        (store.root / f".{key[:32]}-x1y2").mkdir()
        (store.root / f".{key[:32]}-x1y2" / "half.txt").write_text("half")
    (store.root / f".{dead[:32]}-x1y2.old").mkdir()
    (store.root / f".{dead[:32]}.lock").write_text("{}")
    (store.root / "journals").mkdir()
    for key in (KEY, other):
        write_file(store.scratch(key) / "step", "7")
    with store.exclusive_lock(alive):
        store.sweep()
        assert {path.name for path in store.root.iterdir()} == {
            KEY[:32], f".{alive[:32]}-x1y2", f".{alive[:32]}.lock", "journals", ".scratch",
        }  # fmt: skip
    assert [path.name for path in (store.root / ".scratch").iterdir()] == [other[:32]]  # that artifact is not complete
    store.sweep()
    assert {path.name for path in store.root.iterdir()} == {KEY[:32], "journals", ".scratch"}


def test_scratch_outlives_a_failure_and_goes_with_the_artifact(store: Store) -> None:
    checkpoint = store.scratch(KEY) / "step"
    write_file(checkpoint, "7")
    with pytest.raises(ZeroDivisionError), store.new_artifact(KEY, {}) as folder:
        write_half(folder / "a.txt")
    assert checkpoint.read_text() == "7"
    put(store, "hello")
    assert not checkpoint.parent.exists()


def test_an_artifact_is_on_the_disk_before_it_has_its_name(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []

    def name_of(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    def fsync(descriptor: int, sync: Callable[[int], None] = os.fsync) -> None:
        calls.append(("sync", name_of(descriptor)))
        sync(descriptor)

    def replace(source: Path, target: Path, rename: Callable[..., None] = os.replace) -> None:
        calls.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with store.new_artifact(KEY, {}) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text("1")
    assert set(calls[:4]) == {("sync", name) for name in ("weights", "model", MANIFEST, folder.name)}
    assert calls[4:] == [("rename", KEY[:32]), ("sync", store.root.name)]


# atomic_file


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "step"
    write_file(target, "one")
    with pytest.raises(ZeroDivisionError), atomic_file(target) as path:
        write_half(path)
    assert target.read_text() == "one"
    write_file(target, b"two")
    assert target.read_text() == "two"
    assert list(target.parent.iterdir()) == [target]


# Disks


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
RUST = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("error", [FULL, RUST])
def test_a_full_disk_is_one_line_and_leaves_nothing(store: Store, error: Exception) -> None:
    with pytest.raises(StoreError) as caught, disk_errors(store.root), store.new_artifact(KEY, {}):
        raise error
    assert str(caught.value).startswith(f"{store.root}: there is no room to write ")
    assert "\n" not in str(caught.value)
    assert list(store.root.iterdir()) == []


def test_the_error_of_a_library_after_a_full_disk_is_traced_to_the_disk(store: Store) -> None:
    def save() -> None:
        try:
            raise FULL
        except OSError:
            raise KeyError("half a file") from None

    with pytest.raises(StoreError, match="there is no room to write"), disk_errors(store.root):
        save()


def test_a_file_without_permission_is_named_and_other_errors_are_unchanged(tmp_path: Path) -> None:
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "a.txt"))
    expected = r"a\.txt: cannot be written \(Permission denied\); choose another"
    with pytest.raises(StoreError, match=expected), disk_errors(tmp_path):
        raise denied
    elsewhere = PermissionError(errno.EACCES, "Permission denied", "/etc/shadow")
    for error in (elsewhere, ZeroDivisionError(), FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "a"))):
        with pytest.raises(type(error)) as caught, disk_errors(tmp_path):
            raise error
        assert caught.value is error


def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be written .*; choose another --runs DIR"):
        put(Store(tmp_path / "file" / "store"), "hello")


def test_equal_values_have_equal_keys() -> None:
    assert canonical({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}'
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 1.0})
    # sha256 of the two bytes {}
    assert content_key({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


# replace_path


def fill_file(path: Path) -> None:
    path.write_text("new")


def fill_folder(path: Path) -> None:
    path.mkdir()
    (path / "a.txt").write_text("new")


@pytest.mark.parametrize("fill", [fill_file, fill_folder])
def test_replacing_gives_the_name_when_the_block_ends_well(tmp_path: Path, fill: Callable[[Path], None]) -> None:
    target = tmp_path / "deep" / "out"
    with replace_path(target) as path:
        fill(path)
        assert not target.exists()
    assert (target if target.is_file() else target / "a.txt").read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def write_half_a_folder(path: Path) -> None:
    path.mkdir()
    write_half(path / "a.txt")


@pytest.mark.parametrize("fill", [write_half, write_half_a_folder])
def test_replacing_leaves_nothing_when_the_block_fails(tmp_path: Path, fill: Callable[[Path], None]) -> None:
    with pytest.raises(ZeroDivisionError), replace_path(tmp_path / "out") as path:
        fill(path)
    assert list(tmp_path.iterdir()) == []


def test_replacing_keeps_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), replace_path(target) as path:
        write_half(path)
    assert target.read_text() == "old"
    with replace_path(target) as path:
        fill_file(path)
    assert target.read_text() == "new"


def test_replacing_takes_an_empty_folder_and_refuses_a_full_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with replace_path(target) as path:
        fill_folder(path)
    with pytest.raises(StoreError, match=r"out: is a folder that is not empty; name a new one"), replace_path(target):
        pytest.fail("the block must not start")
    assert (target / "a.txt").read_text() == "new"


def test_replacing_is_refused_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"out: cannot be written"), replace_path(tmp_path / "file" / "out"):
        pytest.fail("the block must not start")


def test_a_folder_that_is_replaced_stays_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("kept")

    def write(divisor: int) -> None:
        with replace_path(target, over=True) as path:
            path.mkdir()
            (path / "new").write_text(f"written {1 / divisor}")
            assert (target / "old").read_text() == "kept"

    with pytest.raises(ZeroDivisionError):
        write(0)
    assert [file.name for file in target.iterdir()] == ["old"]

    def full(source: Path, place: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(StoreError):
            write(1)
    assert [file.name for file in target.iterdir()] == ["old"]
    write(1)
    assert [file.name for file in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]  # no temporary folder is left


# The store of a run


@pytest.mark.parametrize("named", [".", "..", "runs/a", "link"])
def test_the_store_of_a_run_is_found_however_its_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    runs = tmp_path / "runs"
    (runs / "a" / "report").mkdir(parents=True)
    (runs / "store").mkdir()
    (tmp_path / "link").symlink_to(runs / "a")
    monkeypatch.chdir({".": runs / "a", "..": runs / "a" / "report"}.get(named, tmp_path))
    assert _store_beside(Path(named)).root.samefile(runs / "store")


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
    renamed = folder_identity(moved)
    (moved / "sub" / "weights").write_bytes(b"0124")
    assert len({identity, renamed, folder_identity(moved)}) == 3


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
