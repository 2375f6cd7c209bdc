"""Reading bytes that somebody else wrote: beneath one root, regular files only, bounded, never blocking."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from sensors.errors import one_line
from sensors.records import RecordError


def locate_beneath(root: Path, name: str) -> Path:
    """The real path of the file called `name` (relative, as a table or listing has it) under `root`.

    RecordError for an absolute name, one with `..` or control characters, and for a link that leads out of the root."""
    shown = one_line(name, 120)
    if not name or "\0" in name or "\\" in name or "://" in name or name.startswith("/") or ".." in name.split("/") or name[1:2] == ":":
        raise RecordError(f"file name {shown!r}: not a relative path beneath {root.name}/; it is not opened")
    base = os.path.realpath(root)
    path = os.path.realpath(os.path.join(base, name))
    if os.path.commonpath((base, path)) != base:
        raise RecordError(f"{shown}: a link that leads out of {root.name}/; give the folder that it leads to, or copy the file")
    return Path(path)


def read_beneath(root: Path, name: str, limit_bytes: int) -> bytes:
    """The whole content of a regular file beneath `root`; RecordError when absent, not regular or larger than limit_bytes."""
    path = locate_beneath(root, name)
    shown = one_line(name, 120)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        todo = "make it readable and run again" if isinstance(error, PermissionError) else "fetch it again"
        raise RecordError(f"{shown}: {error.strerror or error}; {todo}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise RecordError(f"{shown}: not a regular file; it is not read")
    try:
        with os.fdopen(descriptor, "rb") as file:
            if status.st_size > limit_bytes:
                raise RecordError(f"{shown}: {status.st_size} bytes, more than {limit_bytes} that such a file can have")
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise RecordError(f"{shown}: {error.strerror or error}; fetch it again") from error
    if len(data) != status.st_size:
        raise RecordError(f"{shown}: {len(data)} bytes read where {status.st_size} were expected; it changed while it was read")
    return data
