"""The only place that writes durably: what is committed is whole, also after a crash, and what is not committed does not exist.

One file:      `write_file`, `write_json` replace it atomically; with ``new=True`` they refuse to replace.
A folder:      `commit_folder` publishes a mapping of names to bytes with a manifest, or, for large content,

                   with new_folder(parent) as folder:
                       with folder.create("weights.bin") as out:
                           out.append(data)
                       folder.write("note.txt", b"...")
                       folder.publish("step_000100")

               which leaves either a complete `parent/step_000100` or nothing. `check_folder` verifies what `commit_folder` wrote.
Generations:   ``generation-000007.json`` in a folder, created and never replaced; the highest number is current.
Locks:         `lock` keeps others from doing the same work twice. Correctness does not rest on it: publishing never replaces.

The order is always: data, sync, name, sync of the folder that holds the name and of every folder made on the way. After a sync failed
the file is given up, since a second sync may report success for pages that the kernel dropped. A file's length and digest are compared
with what was read back before it gets its name. Digests are sha256.

A manifest is JSON with a field ``digest``: the sha256 of the canonical JSON (sorted keys, no spaces, UTF-8) of all other fields.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensors.errors import UsageError, WmError, one_line

TEMPORARY = "tmp-"
MANIFEST = "manifest.json"
JSON_BYTES = 64 << 20
_GENERATION = re.compile(r"generation-([0-9]{6,12})\.json")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@~+-]{0,199}(/[A-Za-z0-9_][A-Za-z0-9_.@~+-]{0,199}){0,3}")
_BLOCK = 1 << 20


class BadFile(WmError):
    """A stored file that is not what was written: which file, what was found, what to do."""


class Exists(WmError):
    """The name is taken already; nothing was changed."""


class Busy(WmError):
    """Another process holds the lock."""


class Calls:
    """Every system call that changes the disk, so that a test can record, refuse or stop at each of them."""

    def create(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        return os.write(descriptor, data)

    def sync(self, descriptor: int, path: Path) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def make_folder(self, path: Path) -> None:
        os.mkdir(path)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def rename_new(self, source: Path, target: Path) -> None:
        """Rename; FileExistsError where `target` exists, whatever it is."""
        if _renameat2(source, target):
            return
        if source.is_dir():
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            os.rename(source, target)  # onto a folder that is not empty it fails, and ours never are
        else:
            os.link(source, target)
            os.unlink(source)

    def remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            os.unlink(path)


calls = Calls()


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    return libc if hasattr(libc, "renameat2") else None


def _renameat2(source: Path, target: Path) -> bool:
    """renameat2(2) with RENAME_NOREPLACE; False where the kernel or the file system does not know it."""
    libc, at_cwd, no_replace = _libc(), -100, 1
    if libc is None:
        return False
    if libc.renameat2(at_cwd, os.fsencode(source), at_cwd, os.fsencode(target), no_replace) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[calls.write(descriptor, view) :]


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        calls.sync(descriptor, path)
    finally:
        os.close(descriptor)


def make_folder(path: Path, root: Path | None = None) -> None:
    """Make a folder with its missing ancestors, each synced into its parent; with `root`, all from `root` down are synced in any case,
    so that a folder made by a process that died before its sync is safe too."""
    missing = []
    folder = path
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for folder in reversed(missing):
        try:
            calls.make_folder(folder)
        except FileExistsError:
            if not folder.is_dir():
                raise
    upward = [path, *path.parents]
    known = upward[: upward.index(root) + 1] if root is not None else []
    for folder in dict.fromkeys([*missing, *known]):
        sync_folder(folder.parent)


def writable(folder: Path) -> bool:
    """Whether a file can be made in the folder, or in the nearest one above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def check_output(path: Path, *, overwrite: bool) -> None:
    """UsageError for a file that a command could not write when its work is done: there already, a folder, or in a place closed to it."""
    if path.is_dir():
        raise UsageError(f"{one_line(path)}: is a folder; give a file with -o")
    if path.exists() and not overwrite:
        raise UsageError(f"{one_line(path)}: is there already; give another name with -o, or --overwrite")
    if not writable(path.absolute().parent):
        raise UsageError(f"{one_line(path)}: no file can be made there; give another place with -o")


def write_file(path: Path, data: bytes, *, new: bool = False) -> None:
    """Put `data` at `path`: readers see the old content or the new, never a part. new: `Exists` where there is something already."""
    make_folder(path.parent)
    temporary = path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        descriptor = calls.create(temporary)
        try:
            _write_all(descriptor, data)
            calls.sync(descriptor, temporary)
        finally:
            calls.close(descriptor)
        if temporary.read_bytes() != data:
            raise BadFile(f"{one_line(path)}: reads back otherwise than it was written; do not trust this disk or mount")
        if new:
            _rename_new(temporary, path)
        else:
            calls.replace(temporary, path)
    except BaseException:
        _discard(temporary)
        raise
    sync_folder(path.parent)


def _rename_new(source: Path, target: Path) -> None:
    try:
        calls.rename_new(source, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise Exists(f"{one_line(target)}: exists already; nothing was changed") from error
        raise


def _discard(path: Path) -> None:
    if os.path.lexists(path):
        with suppress(OSError):  # the reason why it is being removed is what has to be told; a leftover is found by its name
            calls.remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, and sync the folder that held it; nothing happens where there is none."""
    if os.path.lexists(path):
        calls.remove(path)
        sync_folder(path.parent)


def write_json(path: Path, value: Any, *, new: bool = False) -> None:
    write_file(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False).encode() + b"\n", new=new)


def read_json(path: Path, limit_bytes: int = JSON_BYTES) -> Any:
    """A JSON file that somebody else may have written: bounded, no NaN, no key twice; BadFile says what is wrong."""
    return parse_json(read_whole(path, limit_bytes), one_line(path))


def parse_json(data: bytes, what: str) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in items}) != len(items):
            raise ValueError("a key twice in one object")
        return dict(items)

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no number")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{what}: not JSON as it was written ({one_line(error, 120)}); restore it or write it again") from error


def read_whole(path: Path, limit_bytes: int) -> bytes:
    """The content of a regular file of at most limit_bytes; links are not followed."""
    return read_range(path, 0, None, limit_bytes)


def read_range(path: Path, offset: int, length: int | None, limit_bytes: int = 1 << 31) -> bytes:
    """`length` bytes of a regular file from `offset` on, None: all, by pread. BadFile when it is shorter, not regular, or a link."""
    shown = one_line(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BadFile(f"{shown}: {error.strerror}; restore it or write it again") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadFile(f"{shown}: not a regular file; it is not read")
        wanted = status.st_size - offset if length is None else length
        if wanted > limit_bytes or offset < 0 or wanted < 0 or offset + wanted > status.st_size:
            raise BadFile(f"{shown}: {wanted} bytes wanted at {offset}, it has {status.st_size} (limit {limit_bytes}); restore it or write it again")
        parts, got = [], 0
        while got < wanted:
            part = os.pread(descriptor, wanted - got, offset + got)
            if not part:
                raise BadFile(f"{shown}: ends after {offset + got} bytes, {offset + wanted} were expected; it shrank while it was read")
            parts.append(part)
            got += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
    except OSError as error:
        raise BadFile(f"{shown}: {error.strerror}; restore it or write it again") from error
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Entry:
    """What a manifest says of one file: its path inside the folder, bytes and sha256."""

    path: str
    bytes: int
    sha256: str


class Output:
    """A file that grows by appending, with a running digest; `size` is where the next append will start."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self._digest = hashlib.sha256()
        self._descriptor: int | None = calls.create(path)

    def append(self, data: bytes) -> int:
        """Write `data` at the end; gives the offset at which it starts."""
        assert self._descriptor is not None, "closed"
        _write_all(self._descriptor, data)
        self._digest.update(data)
        self.size += len(data)
        return self.size - len(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def close(self, sync: bool = True) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            try:
                if sync:
                    calls.sync(descriptor, self.path)
            finally:
                calls.close(descriptor)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self.close(sync=kind is None)


class NewFolder:
    """A folder in the making, under a temporary name beside its final place. Made by `new_folder`."""

    def __init__(self, parent: Path) -> None:
        self.parent, self.path = parent, parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        self._outputs: dict[str, Output] = {}
        calls.make_folder(self.path)

    def create(self, name: str) -> Output:
        """A new file, e.g. ``labels/boxes.bin``; close it (or use it as a context) before `publish`."""
        checked_name(name)
        folder = (self.path / name).parent
        for missing in reversed([f for f in (folder, *folder.parents) if self.path in f.parents and not f.exists()]):
            calls.make_folder(missing)
        self._outputs[name] = Output(self.path / name)
        return self._outputs[name]

    def write(self, name: str, data: bytes) -> None:
        with self.create(name) as out:
            out.append(data)

    def entries(self) -> list[Entry]:
        """The files so far, by path."""
        return [Entry(name, out.size, out.sha256) for name, out in sorted(self._outputs.items())]

    def publish(self, name: str) -> Path:
        """Compare every file with what was meant, sync the folders, and give the folder its name; `Exists` where that is taken."""
        for entry in self.entries():
            check_entry(self.path, entry)
        for folder, _, _ in os.walk(self.path, topdown=False):
            sync_folder(Path(folder))
        _rename_new(self.path, self.parent / name)
        sync_folder(self.parent)
        return self.parent / name

    def discard(self) -> None:
        for out in self._outputs.values():
            with suppress(OSError):  # the folder is given up in any case
                out.close(sync=False)
        _discard(self.path)


@contextmanager
def new_folder(parent: Path) -> Iterator[NewFolder]:
    """A folder to fill and then `publish`; what was not published by the end, or failed, is removed."""
    make_folder(parent)
    folder = NewFolder(parent)
    try:
        yield folder
    finally:
        folder.discard()


def commit_folder(final: Path, files: Mapping[str, bytes], about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write `files` (names to contents) and, last, `manifest.json` with their lengths and sha256, the fields of `about` (JSON values) and a
    digest of itself, as the new folder `final`. `Exists` where it is there already. Gives the manifest."""
    with new_folder(final.parent) as folder:
        for name, data in files.items():
            folder.write(name, data)
        manifest = dict(about or {}) | {"files": [vars(entry) for entry in folder.entries()]}
        sealed = seal(manifest)
        folder.write(MANIFEST, sealed)
        folder.publish(final.name)
    return unseal(sealed, str(final))


def check_folder(folder: Path, *, digests: bool = True) -> dict[str, Any]:
    """The manifest of a folder that `commit_folder` wrote, after comparing it and every file it names (lengths; with digests, content).
    Files that it does not name are ignored. BadFile otherwise, UsageError where there is none."""
    if not (folder / MANIFEST).exists():
        raise UsageError(f"{one_line(folder)}: {'holds no ' + MANIFEST if folder.is_dir() else 'no such folder'}; give one that wm wrote whole")
    manifest = unseal(read_whole(folder / MANIFEST, JSON_BYTES), one_line(folder / MANIFEST))
    for entry in entries_of(manifest, one_line(folder / MANIFEST)):
        check_entry(folder, entry, digests=digests)
    return manifest


def check_entry(folder: Path, entry: Entry, *, digests: bool = True) -> None:
    """Compare one file with what the manifest says of it; no part of its path below `folder` may be a link."""
    path = folder / entry.path
    try:
        for part in (path, *path.parents):
            if part == folder:
                break
            if part.is_symlink():
                raise BadFile(f"{one_line(path)}: a link; it is not followed")
        status = path.lstat()
    except OSError as error:
        raise BadFile(f"{one_line(path)}: {error.strerror}; restore it or write it again") from error
    if not stat.S_ISREG(status.st_mode):
        raise BadFile(f"{one_line(path)}: not a regular file; it is not read")
    if status.st_size != entry.bytes:
        raise BadFile(f"{one_line(path)}: {status.st_size} bytes, {entry.bytes} expected; restore it or write it again")
    if digests and (found := sha256_of(path)) != entry.sha256:
        raise BadFile(f"{one_line(path)}: content changed (sha256 {found[:12]}, {entry.sha256[:12]} expected); restore it or write it again")


def entries_of(manifest: Mapping[str, Any], what: str) -> list[Entry]:
    """The checked ``files`` of a manifest: relative plain names beneath the folder, none twice, sane sizes and digests."""
    rows = manifest.get("files")
    if not isinstance(rows, list) or len(rows) > 100_000:
        raise BadFile(f"{what}: no list of files (or more than 100000); restore it or write it again")
    entries = []
    for row in rows:
        if not isinstance(row, dict) or set(row) != {"path", "bytes", "sha256"}:
            raise BadFile(f"{what}: a file entry is not of path, bytes, sha256; restore it or write it again")
        path, size, digest = row["path"], row["bytes"], row["sha256"]
        if not isinstance(path, str) or not is_name(path):
            raise BadFile(f"{what}: file name {one_line(repr(path), 80)} is not a plain name beneath the folder; it is not opened")
        if type(size) is not int or not 0 <= size < 1 << 50:
            raise BadFile(f"{what}: {one_line(path)} has {one_line(repr(size), 40)} bytes; restore it or write it again")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise BadFile(f"{what}: {one_line(path)} has no sha256 of 64 digits; restore it or write it again")
        entries.append(Entry(path, size, digest))
    if len({entry.path for entry in entries}) != len(entries):
        raise BadFile(f"{what}: names a file twice; restore it or write it again")
    return entries


def is_name(name: str) -> bool:
    """Whether this is a plain relative file name, of at most four parts, that stays beneath its folder."""
    return _NAME.fullmatch(name) is not None


def checked_name(name: str) -> str:
    if not is_name(name):
        raise ValueError(f"{name!r} is not a plain file name; use safe_name for names from outside")
    return name


def safe_name(text: str) -> str:
    """A file name for any text: readable where that is safe on every file system, and otherwise made distinct by a digest, also for two
    names that a file system would take for one. ``dataset/log`` becomes ``dataset@log``."""
    plain = text.replace("/", "@")
    reserved = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
    safe = re.fullmatch(r"[a-z0-9_][a-z0-9_.+-]{0,79}(@[a-z0-9_.+-]{1,80})?", plain) and "@" not in text and plain[-1] != "."
    if safe and plain.split(".")[0] not in reserved:
        return plain
    readable = re.sub(r"[^a-z0-9_.+@-]", "_", plain.lower()).lstrip("-.+@")[:60] or "_"
    return f"{readable}~{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:24]}"


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()


def digest_of(value: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of `value` without its field ``digest``."""
    return hashlib.sha256(_canonical({key: item for key, item in value.items() if key != "digest"})).hexdigest()


def seal(value: Mapping[str, Any]) -> bytes:
    """`value` as JSON with the digest of itself."""
    sealed = dict(value) | {"digest": digest_of(value)}
    return json.dumps(sealed, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def unseal(data: bytes, what: str) -> dict[str, Any]:
    """The object that `seal` wrote; BadFile when it is not that, to the last byte."""
    value = parse_json(data, what)
    if not isinstance(value, dict) or not isinstance(value.get("digest"), str):
        raise BadFile(f"{what}: not a manifest with a digest; restore it or write it again")
    try:
        if value["digest"] != digest_of(value) or data != seal(value):
            raise BadFile(f"{what}: does not agree with the digest it carries; restore it or write it again")
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{what}: not JSON as it was written ({one_line(error, 120)}); restore it or write it again") from error
    return value


def generations(folder: Path) -> list[int]:
    """The generation numbers in a folder, ascending."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for match in map(_GENERATION.fullmatch, names) if match)


def generation_path(folder: Path, number: int) -> Path:
    return folder / f"generation-{number:06d}.json"


@contextmanager
def lock(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` (made if need be, never removed) for the duration. While somebody else holds it, wait, or raise `Busy`."""
    make_folder(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise Busy(f"{what}: in use by {_holder(descriptor)}; wait for it, or stop it") from error
        os.ftruncate(descriptor, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        held = json.loads(os.pread(descriptor, 4096, 0))
        return one_line(f"process {held['pid']} on {held['host']} since {held['since']}", 120)
    except (ValueError, TypeError, KeyError):
        return "another process"
