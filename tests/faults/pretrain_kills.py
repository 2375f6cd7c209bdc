"""Kill pretraining at random instants, again and again, resuming each time; then compare the final weights with those of an unbroken run.

    python -m tests.faults.pretrain_kills --kills 50 --data STORE [--steps 40] [--seed 0]

Prints a table and ends with 1 when a bit of the weights differs, a checkpoint that `latest` names is not whole, or a step is missing from
or twice in `metrics.jsonl`. Everything runs on one thread with the `tiny` overlay.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from worldmodel import checkpoint


def command(args: argparse.Namespace, run: Path) -> list[str]:
    start = [sys.executable, "-m", "worldmodel", "pretrain"]
    if (run / "data.json").exists():
        return [*start, "--resume", str(run)]
    return [*start, "--config", "tiny", "--data", str(args.data), "-o", str(run), "--set", f"train.steps={args.steps}", "train.save_every=5",
            "train.validate_every=20", "train.threads=1", "train.autocast=off", "train.channels_last=off"]  # fmt: skip


def digest(run: Path) -> str:
    found = checkpoint.load(run, "latest")
    total = hashlib.sha256(str(found.step).encode())
    for name, value in sorted(found.weights.items()):
        total.update(name.encode() + value.numpy().tobytes())
    return total.hexdigest()


def attempt(args: argparse.Namespace, run: Path, after_s: float | None) -> bool:
    """One run or resume, killed after a while; whether it was killed before its end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(args, run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=environment)
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a store")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="wm-pretrain-kills-"))
    rng = random.Random(args.seed)
    try:
        start = time.monotonic()
        attempt(args, place / "unbroken", None)
        whole_s, whole = time.monotonic() - start, digest(place / "unbroken")
        kills, finished, problems = 0, 0, []
        run = place / "broken-0"
        while kills < args.kills:
            killed = attempt(args, run, rng.uniform(0.1, 0.8) * whole_s)
            kills += killed
            if killed:
                if run.exists() and not (run / "data.json").exists():
                    shutil.rmtree(run)  # killed before there was anything to resume
                problems += checkpoint.latest_whole(run)[1]
                continue
            problems += [] if digest(run) == whole else [f"{run.name}: other weights than the unbroken run's"]
            steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
            problems += [] if steps == list(range(1, args.steps + 1)) else [f"{run.name}: steps {steps} in metrics.jsonl"]
            finished += 1
            shutil.rmtree(run)
            run = place / f"broken-{finished}"
        attempt(args, run, None)
        same = digest(run) == whole
        rows = [("steps", args.steps), ("unbroken run, s", f"{whole_s:.1f}"), ("kills (SIGKILL)", kills), ("runs carried to the end", finished + 1),
                ("problems", len(problems)), ("final weights equal to the unbroken run's", "yes" if same else "NO")]  # fmt: skip
        for name, value in rows:
            print(f"{name:44} {value}")
        for line in problems[:20]:
            print(f"  {line}")
        return 0 if same and not problems else 1
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    sys.exit(main())
