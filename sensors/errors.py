"""Errors meant for people. Each message is one line: which log, sensor, stamp or file; what is wrong; what to do.

Commands print the line and end with `exit_code`; any other exception is a defect of the program.
"""

from __future__ import annotations


class WmError(Exception):
    """Something failed that the user can mend."""

    exit_code = 1


class UsageError(WmError):
    """The command was asked for something that it does not do."""

    exit_code = 2


class Interrupted(WmError):
    """SIGINT or SIGTERM arrived and the state has been saved."""

    exit_code = 130


def one_line(text: object, limit: int = 400) -> str:
    """text as one printable line: control characters (ANSI escapes, newlines) shown as escapes."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return line if len(line) <= limit else line[: limit - 3] + "..."
