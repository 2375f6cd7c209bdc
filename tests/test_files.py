"""What `sensors.files` commits is whole or absent, and is found out when it changed."""

import errno
import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensors import files


class Refusing(files.Calls):
    """Passes calls on, until the K-th, which fails with an error number; counts syncs by path."""

    def __init__(self, at, number):
        self.at, self.number, self.count, self.synced = at, number, 0, []

    def _next(self):
        self.count += 1
        if self.count == self.at:
            raise OSError(self.number, os.strerror(self.number))

    def create(self, path):
        self._next()
        return super().create(path)

    def write(self, descriptor, data):
        self._next()
        return super().write(descriptor, data)

    def sync(self, descriptor, path):
        self.synced.append(path)
        self._next()
        super().sync(descriptor, path)

    def replace(self, source, target):
        self._next()
        super().replace(source, target)

    def rename_new(self, source, target):
        self._next()
        super().rename_new(source, target)


def test_a_write_is_old_or_new_and_leaves_no_temporary_file_whatever_call_fails(tmp_path, monkeypatch):
    for at in range(1, 20):
        folder = tmp_path / str(at)
        folder.mkdir()
        path = folder / "a.txt"
        files.write_file(path, b"old")
        monkeypatch.setattr(files, "calls", refusing := Refusing(at, errno.EIO))
        try:
            files.write_file(path, b"new")
        except OSError as error:
            assert error.errno == errno.EIO
            # the last sync is that of the folder: by then the name is there
            assert path.read_bytes() == (b"new" if refusing.synced[-1:] == [folder] else b"old")
        else:
            assert at > refusing.count and path.read_bytes() == b"new"
            break
        finally:
            monkeypatch.undo()
        assert [p.name for p in folder.iterdir()] == ["a.txt"]
    else:
        pytest.fail("never passed")


def test_a_file_whose_sync_failed_is_not_synced_again(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "calls", refusing := Refusing(3, errno.EIO))
    with pytest.raises(OSError):
        files.write_file(tmp_path / "a", b"x")
    assert len(refusing.synced) == 1 and list(tmp_path.iterdir()) == []


def test_short_writes_are_continued_and_lying_ones_found(tmp_path, monkeypatch):
    class Short(files.Calls):
        def write(self, descriptor, data):
            return super().write(descriptor, data[:3])

    class Lying(files.Calls):
        def write(self, descriptor, data):
            super().write(descriptor, data[: len(data) // 2])
            return len(data)

    monkeypatch.setattr(files, "calls", Short())
    files.write_file(tmp_path / "a", bytes(range(100)))
    assert (tmp_path / "a").read_bytes() == bytes(range(100))
    monkeypatch.setattr(files, "calls", Lying())
    with pytest.raises(files.BadFile, match="reads back"):
        files.write_file(tmp_path / "b", bytes(100))
    with pytest.raises(files.BadFile, match="bytes"):
        files.commit_folder(tmp_path / "c", {"d": bytes(100)})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_new_names_are_never_taken_from_another(tmp_path):
    files.write_file(tmp_path / "a", b"first", new=True)
    with pytest.raises(files.Exists):
        files.write_file(tmp_path / "a", b"second", new=True)
    files.commit_folder(tmp_path / "f", {"x": b"first"})
    with pytest.raises(files.Exists):
        files.commit_folder(tmp_path / "f", {"x": b"second"})
    assert (tmp_path / "a").read_bytes() == b"first" and (tmp_path / "f/x").read_bytes() == b"first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "f"]


def test_renaming_without_replacing_works_without_the_system_call(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_renameat2", lambda source, target: False)
    test_new_names_are_never_taken_from_another(tmp_path)


def test_an_unfinished_folder_disappears(tmp_path):
    with pytest.raises(RuntimeError), files.new_folder(tmp_path) as folder:
        folder.write("labels/a", b"1")
        folder.create("b").append(b"2")
        raise RuntimeError
    with files.new_folder(tmp_path) as folder:
        folder.write("a", b"1")
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_byte_and_cut_of_a_committed_folder_is_found(tmp_path):
    made = files.commit_folder(tmp_path / "f", {"weights": bytes(range(50)), "labels/x": b"hello"}, {"step": 3, "loss": 0.25})
    assert files.check_folder(tmp_path / "f") == made and made["step"] == 3
    for path in sorted(p for p in (tmp_path / "f").rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for i in range(len(whole)):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
            with pytest.raises(files.BadFile):
                files.check_folder(tmp_path / "f")
        for cut in (b"", whole[:1], whole[: len(whole) // 2], whole[:-1], whole + b"\0"):
            path.write_bytes(cut)
            with pytest.raises(files.BadFile):
                files.check_folder(tmp_path / "f")
        path.write_bytes(whole)
    (tmp_path / "f/stranger").write_bytes(b"")
    files.check_folder(tmp_path / "f")
    (tmp_path / "f/weights").unlink()
    with pytest.raises(files.BadFile, match="weights"):
        files.check_folder(tmp_path / "f")


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "", "a//b", "a\0b", "C:\\x", ".", "-rf", "a\n", 3, None])
def test_a_manifest_does_not_lead_out_of_its_folder(tmp_path, path):
    entry = {"path": path, "bytes": 0, "sha256": "0" * 64}
    with pytest.raises(files.BadFile):
        files.entries_of({"files": [entry]}, "m")


def test_links_are_not_followed(tmp_path):
    (tmp_path / "outside").write_bytes(b"hello")
    files.commit_folder(tmp_path / "f", {"labels/x": b"hello"})
    (tmp_path / "f/labels/x").unlink()
    (tmp_path / "f/labels/x").symlink_to(tmp_path / "outside")
    with pytest.raises(files.BadFile, match="link"):
        files.check_folder(tmp_path / "f")
    with pytest.raises(files.BadFile):
        files.read_range(tmp_path / "f/labels/x", 0, 2)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(files.BadFile, match="regular"):
        files.read_range(tmp_path / "pipe", 0, 1)


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100000, "{} {}", '{"a": ' + "9" * 5000 + "}", "\ufeff{}", '{"a": 1e999}', ""]
)
def test_json_that_is_no_manifest_is_one_error(tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(files.BadFile) as caught:
        files.unseal(files.read_whole(tmp_path / "m.json", 1 << 20), "m.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@given(st.lists(st.text(st.characters(codec=None), max_size=300), min_size=2, max_size=6, unique=True))
def test_names_are_safe_and_distinct_also_where_case_and_accents_merge(texts):
    import unicodedata

    names = [files.safe_name(text) for text in texts]
    assert all(files.is_name(name) and "/" not in name and len(name) <= 200 and name.isascii() for name in names)
    assert len({unicodedata.normalize("NFC", name).lower() for name in names}) == len(texts)


def test_names_that_file_systems_reserve_are_encoded():
    assert files.safe_name("kitti_raw/2011_09_26_drive_0001_sync") == "kitti_raw@2011_09_26_drive_0001_sync"
    for text in ("con", "nul.txt", "a/b.", "a@b", "A/b", "..", "-rf", "a/" + "x" * 300, "caf\u00e9/1", "cafe\u0301/1"):
        assert "~" in files.safe_name(text)


HOLD = """
import sys
from pathlib import Path
from sensors import files
with files.lock(Path(sys.argv[1]), "log a/b"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_of_two_is_told_who_the_first_is(tmp_path):
    path = tmp_path / ".locks/a"
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(files.Busy, match=f"log a/b: in use by process {other.pid} on .* since"), files.lock(path, "log a/b"):
            pass
        other.communicate()
    with files.lock(path, "log a/b"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_generations_are_read_by_number_only(tmp_path):
    for name in ("generation-000002.json", "generation-000010.json", "generation-1.json", "generation-000003.json.bak", "tmp-x"):
        (tmp_path / name).write_bytes(b"")
    assert files.generations(tmp_path) == [2, 10] and files.generations(tmp_path / "absent") == []
