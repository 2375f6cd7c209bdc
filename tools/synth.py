"""`wm synth STORE`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "make synthetic logs: streets with traffic, scanner, cameras and exact labels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "store", metavar="STORE", type=Path, help="the store, or with --format nuscenes the folder of the dataset; made if it is not there"
    )
    parser.add_argument("--logs", type=int, default=8, metavar="N", help="how many, of the seeds S .. S+N-1 (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the first one (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, metavar="T", help="length of each log (default: %(default)s)")
    parser.add_argument("--lidar", choices=("hdl64", "hdl32"), default="hdl64", help="64 beams as in KITTI (default) or 32 as in nuScenes")
    parser.add_argument("--cameras", choices=("none", "front", "six"), default="none", help="none (default), one forward, or six around")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="keep each K-th turn of the scanner's 10 per second (default: %(default)s)")
    parser.add_argument("--format", choices=("store", "nuscenes"), default="store", help="a store (default), or the files of another dataset")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="logs made at the same time (default: %(default)s); with --format nuscenes one after the other",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    import time

    from sensors.errors import UsageError
    from sensors.simulator.log import check, simulate
    from worldmodel.tools.terminal import print_json, reporter

    if min(args.logs, args.workers, args.every) < 1:
        raise UsageError(f"--logs {args.logs} --workers {args.workers} --every {args.every}: give at least 1")
    options = {"seconds": args.seconds, "lidar": args.lidar, "cameras": args.cameras, "every": args.every}
    seeds = range(args.seed, args.seed + args.logs)
    for seed in (seeds[0], seeds[-1]):  # before anything is written
        check(seed, **options)
    report = reporter("logs")
    start = time.monotonic()
    if args.format == "nuscenes":
        from sensors.formats.nuscenes_writer import write_logs

        def logs() -> Any:
            for done, seed in enumerate(seeds):
                report(done, args.logs, f"street {seed}")
                yield simulate(seed, **options)

        write_logs(args.store, logs())
        written, present, otherwise = [f"synthetic/street-{seed:06d}" for seed in seeds], [], []
        report(args.logs, args.logs, "")
    else:
        written, present, otherwise = _fill_store(args.store, [(seed, options) for seed in seeds], args.workers, report)
    seconds = time.monotonic() - start
    if args.json:
        print_json("synth", store=str(args.store), format=args.format, written=written, present=present, otherwise=otherwise, seconds=seconds)
        return 0
    there = f", {len(present)} were there" if present else ""
    print(f"{len(written)} logs of {args.seconds:g} s written to {args.store}{there}; {seconds:.0f} s")
    if otherwise:
        print(f"{len(otherwise)} of those that were there are of another length, rate, LiDAR or cameras than asked ({otherwise[0]}) and stay as they "
              "are; give another store or other seeds")  # fmt: skip
    return 0


def _fill_store(store: Path, wanted: list[tuple[int, dict[str, Any]]], workers: int, report: Any) -> tuple[list[str], list[str], list[str]]:
    """Ids of the logs written now, of those that were in the store already, and of those of the latter that were made otherwise than asked."""
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    from sensors.store.reader import open_store
    from sensors.store.writer import prepare_store

    prepare_store(store)
    opened, asked = open_store(store), {f"synthetic/street-{seed:06d}": options for seed, options in wanted}
    known = set(opened.ids)
    jobs = [(store, seed, options) for seed, options in wanted if f"synthetic/street-{seed:06d}" not in known]
    present = [f"synthetic/street-{seed:06d}" for seed, _ in wanted if f"synthetic/street-{seed:06d}" in known]
    otherwise = sorted(log_id for log_id in present if _made_otherwise(opened.manifest(log_id), **asked[log_id]))
    written = []
    if workers == 1:
        for done, job in enumerate(jobs):
            report(done, len(jobs), "")
            (written if _write(job) else present).append(f"synthetic/street-{job[1]:06d}")
    else:
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_end_at_once)
        try:
            futures = {pool.submit(_write, job): job[1] for job in jobs}
            for done, future in enumerate(as_completed(futures)):
                (written if future.result() else present).append(f"synthetic/street-{futures[future]:06d}")
                report(done, len(jobs), "")
        finally:
            pool.shutdown(cancel_futures=True)  # what has begun is finished, what waits is not begun
    report(len(jobs), len(jobs), "")
    return sorted(written), sorted(present), otherwise


def _made_otherwise(manifest: dict[str, Any], *, seconds: float, lidar: str, cameras: str, every: int) -> bool:
    """Whether a stored log is not the one that these options make, as far as its sensors and the number of its sweeps tell."""
    from sensors.simulator.camera import chosen

    made = {name: (row["rate_hz"], row["sweeps"]) for name, row in manifest["lidars"].items()}
    turns = -(-((seconds * 10 + 1e-9) // 1) // every)  # whole ones, and each K-th of them, as `simulate` has it
    return made != {lidar: (10 / every, turns)} or set(manifest["cameras"]) != set(chosen(cameras))


def _end_at_once() -> None:
    """For a worker, which Ctrl-C at a terminal reaches too: it would take the next log. One that is half written is none to the store."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _write(job: tuple[Path, int, dict[str, Any]]) -> bool:
    """Whether the log was written; False where another process was quicker."""
    from sensors.files import Exists
    from sensors.simulator.log import simulate
    from sensors.store.writer import write_log

    store, seed, options = job
    try:
        write_log(store, simulate(seed, **options))
    except Exists:
        return False
    return True
