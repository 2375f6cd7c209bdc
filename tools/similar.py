"""`wm similar FEATURES --clip ID`: where else did it look like this."""

from __future__ import annotations

import argparse

HELP = "find the moments most similar to one, across logs, by the distance of their latents"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("features", metavar="FEATURES", help="a folder made by `wm export RUN --to features --data D`")
    parser.add_argument("--clip", metavar="ID", required=True, help="LOG@STAMP_NS of the moment to look for")
    parser.add_argument("--count", type=int, metavar="N", default=10, help="how many to find (default: %(default)s)")
    parser.add_argument("--approximate", action="store_true", help="search a graph instead of every frame; needs the extra `search`")
    parser.add_argument("-o", "--output", metavar="FILE", default=None, help="write a page with a picture of each")
    parser.add_argument(
        "--data", action="extend", nargs="+", metavar="D", default=[], help="stores, or YAML files of parts of stores, to draw the sweeps from"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the page if it is there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from sensors.errors import UsageError, one_line
    from sensors.files import check_output

    output = Path(args.output) if args.output else None
    if output is not None:
        check_output(output, overwrite=args.overwrite)
    if args.data and output is None:
        raise UsageError("--data: the pictures are for a page; name it with -o")
    if args.count < 1:
        raise UsageError(f"--count {args.count}: give how many to find, 1 or more")

    from sensors.data import open_data
    from sensors.files import write_file
    from worldmodel import similar
    from worldmodel.tools.terminal import print_json, print_table

    moments = similar.read(Path(args.features))
    at = moments.find(args.clip)
    hits = similar.nearest(moments, at, args.count, similar.approximate_index(moments) if args.approximate else None)
    if output is not None:
        parts = [part for path in args.data for part in open_data(path)]
        write_file(output, similar.page(moments, at, hits, parts).encode(), new=not args.overwrite)
    if args.json:
        rows = [{"rank": rank, "clip": hit.clip, "distance": hit.distance} for rank, hit in enumerate(hits, 1)]
        print_json("similar", features=args.features, clip=args.clip, frames=len(moments.stamps_ns), logs=len(moments.logs),
                   approximate=args.approximate, rows=rows, page=None if output is None else str(output))  # fmt: skip
        return 0
    print_table(
        f"{len(moments.stamps_ns)} frames of {len(moments.logs)} logs",
        ["clip", "distance"],
        [(one_line(hit.clip), f"{hit.distance:.3f}") for hit in hits],
    )
    if output is not None:
        print(f"page: {one_line(output)}")
    return 0
