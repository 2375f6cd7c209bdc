"""`wm`: one file beside this one per command, found by name. A command file holds `HELP`, `add_arguments(parser)` and `run(args) -> int`,
and imports what is heavy inside `run`, so that `wm --help` stays quick."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import signal
import sys
from importlib.metadata import version

from sensors.errors import Interrupted, WmError, one_line

NOT_COMMANDS = {"cli", "terminal"}


def commands() -> list[str]:
    package = importlib.import_module("worldmodel.tools")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in NOT_COMMANDS)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="wm", description="Unlabelled driving logs in; forecasts and a proven encoder out.")
    top.add_argument("--version", action="version", version=f"wm {version('driving-worldmodel')}")
    rows = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in commands():
        module = importlib.import_module(f"worldmodel.tools.{name}")
        row = rows.add_parser(name, help=module.HELP, description=module.HELP)
        row.add_argument("--debug", action="store_true", help="show the traceback of an error")
        module.add_arguments(row)
        row.set_defaults(act=module.run)
    return top


def _on_sigterm(signum: int, frame: object) -> None:
    raise Interrupted(f"stopped by {signal.Signals(signum).name}")


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        return int(args.act(args))
    except WmError as error:
        if args.debug:
            raise
        print(f"wm {args.command}: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"wm {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if args.debug:
            raise
        print(f"wm {args.command}: {one_line(error)}; check the path, the rights and the free space", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
