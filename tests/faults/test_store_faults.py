"""Death, full disks and power cuts while a log is written: afterwards the store holds the old log or the new one, whole."""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sensors import files
from sensors.adapters import kitti_raw
from sensors.adapters.base import open_source
from sensors.errors import UsageError, WmError
from sensors.store.reader import open_store
from sensors.store.writer import write_log

pytestmark = pytest.mark.slow


class Death(BaseException):
    """The process is gone: nothing that would run after it changes the disk."""


class Faulty(files.Calls):
    """Lets calls through up to the K-th; there it dies (for good), or refuses once or for ever; a write may get half way first."""

    def __init__(self, at, error=None, forever=False, tear=False):
        self.at, self.error, self.forever, self.tear = at, error, forever, tear
        self.count, self.failed_syncs, self.synced_again = 0, set(), False

    def _next(self, before=lambda: None):
        self.count += 1
        if self.count == self.at or (self.count > self.at and (self.error is None or self.forever)):
            if self.count == self.at:
                before()
            raise Death if self.error is None else OSError(self.error, os.strerror(self.error))

    def create(self, path):
        self._next()
        return super().create(path)

    def write(self, descriptor, data):
        self._next(lambda: self.tear and os.write(descriptor, data[: len(data) // 2]))
        return super().write(descriptor, data)

    def sync(self, descriptor, path):
        self.synced_again |= (path, descriptor) in self.failed_syncs
        try:
            self._next()
        except OSError:
            self.failed_syncs.add((path, descriptor))
            raise
        super().sync(descriptor, path)

    def make_folder(self, path):
        self._next()
        super().make_folder(path)

    def replace(self, source, target):
        self._next()
        super().replace(source, target)

    def rename_new(self, source, target):
        self._next()
        super().rename_new(source, target)

    def remove(self, path):
        if self.error is None:
            self._next()
        super().remove(path)


@pytest.fixture
def log(tmp_path):
    """A log that has all kinds of files and little in them."""
    (tmp_path / "raw").mkdir()
    log = next(open_source(kitti_raw.write_sample(tmp_path / "raw")))
    return replace(log, sweep_stamps_ns={"velodyne": log.sweep_stamps_ns["velodyne"][:2]})


def digests(root: Path):
    """What a store holds, by what it is: {log id: (generation, sha256 of each file)}, after comparing every byte with it."""
    try:
        store = open_store(root)
    except UsageError:
        return {}
    assert store.verify(deep=True) == []
    return {log_id: {row["path"]: row["sha256"] for row in store.manifest(log_id)["files"]} for log_id in store.ids}


def test_death_at_every_call_leaves_nothing_or_the_whole_log_and_the_next_run_completes_it(tmp_path, log, monkeypatch):
    write_log(tmp_path / "whole", log)
    whole = digests(tmp_path / "whole")
    seen = set()
    for at in range(1, 500):
        root = tmp_path / "s"
        monkeypatch.setattr(files, "calls", Faulty(at, tear=at % 2 == 0))
        try:
            write_log(root, log)
            passed = True
        except Death:
            passed = False
        monkeypatch.undo()
        found = digests(root)
        assert found in ({}, whole)
        seen.add(bool(found))
        if not found:
            write_log(root, log)
        assert digests(root) == whole and open_store(root).strangers() == []
        shutil.rmtree(root)
        if passed:
            break
    assert passed and seen == {True, False} and at > 40


def test_death_while_a_log_is_replaced_keeps_the_old_until_the_new_is_whole(tmp_path, log, monkeypatch):
    write_log(tmp_path / "old", log)
    old = digests(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    write_log(tmp_path / "new", log, overwrite=True, lossless=True)
    new = digests(tmp_path / "new")
    assert old != new
    seen = set()
    for at in range(1, 500):
        root = tmp_path / "s"
        shutil.copytree(tmp_path / "old", root)
        reader = open_store(root).open_log(log.id)
        monkeypatch.setattr(files, "calls", Faulty(at))
        try:
            write_log(root, log, overwrite=True, lossless=True)
            passed = True
        except Death:
            passed = False
        monkeypatch.undo()
        found = digests(root)
        assert found in (old, new)
        seen.add(found == new)
        reader.read_sweep("velodyne", 1)
        shutil.rmtree(root)
        if passed:
            break
    assert passed and seen == {True, False}


@pytest.mark.parametrize("number, forever, every", [(errno.ENOSPC, True, 1), (errno.EDQUOT, False, 3), (errno.EIO, False, 2)])
def test_a_disk_that_refuses_at_any_call_costs_the_log_and_says_so_in_one_line(tmp_path, log, monkeypatch, number, forever, every):
    before = replace(log, id="kitti_raw/before")
    write_log(tmp_path / "whole", before)
    kept = digests(tmp_path / "whole")
    for at in range(1, 500, every):
        root = tmp_path / "s"
        shutil.copytree(tmp_path / "whole", root)
        monkeypatch.setattr(files, "calls", faulty := Faulty(at, number, forever))
        try:
            write_log(root, log)
            passed = True
        except WmError as error:
            passed = False
            assert os.strerror(number) in str(error) and "\n" not in str(error) and str(root) in str(error)
        monkeypatch.undo()
        assert not faulty.synced_again
        found = digests(root)
        assert found["kitti_raw/before"] == kept["kitti_raw/before"]
        if not passed and log.id not in found:
            assert [name for name in open_store(root).strangers() if "tmp-" in name] == []
        if log.id not in found:
            write_log(root, log)
        assert open_store(root).ids == ("kitti_raw/2011_09_26_drive_0001_sync", "kitti_raw/before") and open_store(root).verify() == []
        shutil.rmtree(root)
        if passed:
            break
    assert passed and at > 30


def test_a_disk_that_writes_less_than_it_says_is_found_before_the_log_is_named(tmp_path, log, monkeypatch):
    class Lying(files.Calls):
        def write(self, descriptor, data):
            super().write(descriptor, data[: len(data) // 2] if len(data) > 1000 else data)
            return len(data)

    monkeypatch.setattr(files, "calls", Lying())
    with pytest.raises(files.BadFile, match="bytes"):
        write_log(tmp_path / "s", log)
    assert digests(tmp_path / "s") == {}


class Journal(files.Calls):
    """Does every call and writes down what it was, for `crash_states`."""

    def __init__(self):
        self.operations = []
        self.names = {}

    def create(self, path):
        descriptor = super().create(path)
        self.names[descriptor] = path
        self.operations.append(("create", path))
        return descriptor

    def write(self, descriptor, data):
        done = super().write(descriptor, data)
        self.operations.append(("write", self.names[descriptor], bytes(data[:done])))
        return done

    def sync(self, descriptor, path):
        super().sync(descriptor, path)
        self.operations.append(("sync", path))

    def make_folder(self, path):
        super().make_folder(path)
        self.operations.append(("create folder", path))

    def replace(self, source, target):
        super().replace(source, target)
        self.operations.append(("rename", source, target))

    def rename_new(self, source, target):
        super().rename_new(source, target)
        self.operations.append(("rename", source, target))

    def remove(self, path):
        super().remove(path)
        self.operations.append(("remove", path))


class Node:
    """A file or a folder of a disk with a volatile cache: what it holds now, and what of that is sure to survive."""

    def __init__(self, folder):
        self.folder = folder
        self.now, self.sure = ({}, {}) if folder else (b"", b"")


def loaded(path):
    node = Node(path.is_dir())
    node.now = {child.name: loaded(child) for child in path.iterdir()} if path.is_dir() else path.read_bytes()
    node.sure = dict(node.now) if path.is_dir() else node.now
    return node


class Disk:
    """A replay of a journal: `sync` makes a file's bytes, or a folder's names, sure."""

    def __init__(self, root):
        self.root = root
        self.top = loaded(root)

    def find(self, path):
        node = self.top
        for part in path.relative_to(self.root).parts:
            node = node.now[part]
        return node

    def apply(self, operation):
        kind, path, *rest = operation
        if kind in ("create", "create folder"):
            self.find(path.parent).now[path.name] = Node(kind == "create folder")
        elif kind == "write":
            self.find(path).now += rest[0]
        elif kind == "sync":
            node = self.find(path)
            node.sure = dict(node.now) if node.folder else node.now
        elif kind == "rename":
            self.find(rest[0].parent).now[rest[0].name] = self.find(path.parent).now.pop(path.name)
        elif kind == "remove":
            self.find(path.parent).now.pop(path.name)


BYTES = {
    "kept": lambda sure, now: now,
    "dropped": lambda sure, now: sure,
    "halved": lambda sure, now: now[: (len(sure) + len(now)) // 2],
    "zeroed": lambda sure, now: sure + bytes(len(now) - len(sure)),
}


def unsure_names(node, where=()):
    """(folder, name) of every entry that a power cut may or may not keep."""
    if node.folder:
        for name in {*node.now, *node.sure}:
            if node.now.get(name) is not node.sure.get(name):
                yield (*where, name)
        for name, child in {**node.sure, **node.now}.items():
            yield from unsure_names(child, (*where, name))


def survivor(node, survives, data, where=()):
    """The tree after the cut as nested dicts: names chosen by `survives`, unsynced bytes by `data`."""
    if not node.folder:
        return node.now if node.now == node.sure else BYTES[data](node.sure, node.now)
    out = {}
    for name in sorted({*node.now, *node.sure}):
        chosen = node.now if survives((*where, name)) else node.sure
        if name in chosen:
            out[name] = survivor(chosen[name], survives, data, (*where, name))
    return out


def crash_states(root, journal):
    """(number of operations done, tree) for a cut after each operation: each way of losing bytes, with all unsynced names kept, none, all
    but one, and only one."""
    disk = Disk(root)
    for done in range(len(journal) + 1):
        unsure = list(unsure_names(disk.top))
        choices = [lambda place: True, lambda place: False]
        choices += [lambda place, one=one: place == one for one in unsure] + [lambda place, one=one: place != one for one in unsure]
        for data in BYTES:
            for survives in choices:
                yield done, survivor(disk.top, survives, data)
        if done < len(journal):
            disk.apply(journal[done])


def lay_out(tree, path):
    path.mkdir()
    for name, content in tree.items():
        if isinstance(content, dict):
            lay_out(content, path / name)
        else:
            (path / name).write_bytes(content)


def frozen(tree):
    return tuple((name, frozen(content) if isinstance(content, dict) else content) for name, content in tree.items())


@pytest.mark.parametrize("protocol", ["new", "replace"])
def test_a_power_cut_after_any_call_leaves_the_old_log_or_the_new_one(tmp_path, log, monkeypatch, protocol):
    place = tmp_path / "disk"
    place.mkdir()
    log = replace(log, cameras={}, image_stamps_ns={})
    if protocol == "replace":
        write_log(place / "s", log)
    old = digests(place / "s")
    shutil.copytree(place, tmp_path / "before")
    monkeypatch.setattr(files, "calls", journal := Journal())
    write_log(place / "s", log, overwrite=True, lossless=protocol == "replace")
    monkeypatch.undo()
    new = digests(place / "s")
    assert old != new
    moved = [tuple(tmp_path / "before" / part.relative_to(place) if isinstance(part, Path) else part for part in row) for row in journal.operations]
    states, results, total = set(), set(), 0
    for done, tree in crash_states(tmp_path / "before", moved):
        total += 1
        over = done == len(moved)
        key = (over, frozen(tree))
        if key in states:
            continue
        states.add(key)
        lay_out(tree, tmp_path / "after")
        found = digests(tmp_path / "after/s")
        assert found == new if over else found in (old, new), (done, moved[done - 1])
        results.add(found == new)
        shutil.rmtree(tmp_path / "after")
    assert results == {True, False} and len(states) > 60, (total, len(states))


def test_the_journal_can_tell_a_missing_sync(tmp_path, log, monkeypatch):
    """The same cuts find a protocol that forgets to sync, or the test above could not fail."""
    place = tmp_path / "disk"
    place.mkdir()

    class Forgetful(Journal):
        def sync(self, descriptor, path):
            if not str(path).endswith(".pack"):
                super().sync(descriptor, path)

    monkeypatch.setattr(files, "calls", journal := Forgetful())
    write_log(place / "s", log)
    monkeypatch.undo()
    (tmp_path / "before").mkdir()
    moved = [tuple(tmp_path / "before" / part.relative_to(place) if isinstance(part, Path) else part for part in row) for row in journal.operations]
    *_, (_, tree) = (state for state in crash_states(tmp_path / "before", moved) if state[0] == len(moved))
    lay_out(tree, tmp_path / "after")
    assert open_store(tmp_path / "after/s").verify() != []


def test_sixteen_writers_of_one_log_store_it_once_and_of_many_lose_none(tmp_path, log):
    from concurrent.futures import ThreadPoolExecutor

    def write(name):
        try:
            write_log(tmp_path / "s", replace(log, id=name))
            return "stored"
        except (files.Busy, files.Exists) as error:
            return type(error).__name__

    with ThreadPoolExecutor(16) as pool:
        same = list(pool.map(write, ["kitti_raw/one"] * 16))
        many = list(pool.map(write, [f"kitti_raw/log-{i}" for i in range(16)]))
    assert same.count("stored") == 1 and many == ["stored"] * 16
    store = open_store(tmp_path / "s")
    assert len(store.ids) == 17 and store.verify() == [] and store.strangers() == []
    assert len({str(sorted(row.items())) for row in digests(tmp_path / "s").values()}) == 1


def test_without_a_working_lock_two_writers_still_leave_one_whole_log(tmp_path, log, monkeypatch):
    """The lock saves work; that names are never replaced is what keeps the store whole."""
    import contextlib

    monkeypatch.setattr(files, "lock", lambda path, what, wait=False: contextlib.nullcontext())
    write_log(tmp_path / "s", replace(log, id="kitti_raw/other"))

    def second_writer():
        write_log(tmp_path / "s", log)

    with pytest.raises((files.Exists, WmError)):
        write_log(tmp_path / "s", log, before_commit=second_writer)
    assert open_store(tmp_path / "s").verify() == [] and len(open_store(tmp_path / "s").ids) == 2
    assert np.isfinite(open_store(tmp_path / "s").open_log(log.id).read_sweep("velodyne", 0).points).all()
