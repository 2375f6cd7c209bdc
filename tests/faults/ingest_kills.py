"""Kill ingest at random instants, again and again, until it is through; then compare the store with one that was never disturbed.

    python -m tests.faults.ingest_kills --kills 50 --source DIR [--workers 2] [--seed 0] [--keep FOLDER]

Prints a table and ends with 1 when a byte differs, a log is half there, an interrupted store does not open, or a killed process left
something that the next run does not clear away.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sensors.store.reader import Store, open_store


def command(args: argparse.Namespace, store: Path) -> list[str]:
    return [sys.executable, "-m", "worldmodel", "ingest", str(args.source), str(store), "--workers", str(args.workers)]


def digests(store: Store) -> dict[str, str]:
    return {log_id: store.manifest(log_id)["digest"] for log_id in store.ids}


def killed_run(args: argparse.Namespace, store: Path, after_s: float) -> bool:
    """One run that is killed with its workers after a while; whether it was killed before its end."""
    process = subprocess.Popen(command(args, store), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def opened_after(store: Path) -> Store | None:
    """What a reader finds; None where there is not even the mark of a store yet."""
    return open_store(store) if (store / "store.json").is_file() else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="recordings, as `wm ingest` takes them")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="leave both stores in this new folder")
    args = parser.parse_args()
    place = args.keep or Path(tempfile.mkdtemp(prefix="wm-ingest-kills-"))
    place.mkdir(exist_ok=True)
    rng = random.Random(args.seed)
    try:
        start = time.monotonic()
        # 3: finished, with items in quarantine
        if subprocess.run(command(args, place / "unbroken"), stdout=subprocess.DEVNULL).returncode not in (0, 3):
            return 1
        whole_s = time.monotonic() - start
        whole = digests(open_store(place / "unbroken"))
        kills, rounds, problems = 0, 0, []
        store = place / f"broken-{rounds}"
        seen: dict[str, int] = {"nothing yet": 0, "some logs": 0, "all logs": 0}
        while kills < args.kills:
            # early instants are the interesting ones when a run has few logs, so runs end anywhere up to the whole time
            over = not killed_run(args, store, rng.uniform(0.05, 1.0) * whole_s)
            kills += not over
            opened = opened_after(store)
            found = {} if opened is None else digests(opened)
            seen["nothing yet" if not found else "all logs" if found == whole else "some logs"] += not over
            problems += [] if opened is None else opened.verify(deep=True)
            problems += [f"{log_id}: differs from the unbroken run" for log_id, digest in found.items() if whole.get(log_id) != digest]
            if over or found == whole:
                rounds += 1
                shutil.rmtree(store)
                store = place / f"broken-{rounds}"
        subprocess.run(command(args, store), check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        final = open_store(store)
        problems += final.verify(deep=True) + [f"left over: {name}" for name in final.strangers()]
        same = digests(final) == whole
        rows = [
            ("logs in the source", len(whole)),
            ("unbroken run, s", f"{whole_s:.1f}"),
            ("kills (SIGKILL)", kills),
            *((f"  state after: {name}", count) for name, count in seen.items()),
            ("stores carried to the end", rounds + 1),
            ("problems", len(problems)),
            ("digests equal to the unbroken run's", "yes" if same else "NO"),
        ]
        for name, value in rows:
            print(f"{name:40} {value}")
        for line in problems[:20]:
            print(f"  {line}")
        return 0 if same and not problems else 1
    finally:
        if args.keep is None:
            shutil.rmtree(place)


if __name__ == "__main__":
    sys.exit(main())
