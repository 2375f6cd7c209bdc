"""`wm forecast RUN`: a clip's forecast as files to look at and to load."""

from __future__ import annotations

import argparse

HELP = "draw truth, forecast and best baseline of a clip: a page that plays, a GIF, clouds, arrays"
FORMATS = ("html", "gif", "ply", "npz")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="a run folder of `wm pretrain`")
    parser.add_argument("--clip", metavar="ID", help="LOG@STAMP_NS of its t = 0 (default: the first clip; --list shows all)")
    parser.add_argument(
        "--data", action="extend", nargs="+", metavar="D", help="stores, or YAML files of parts of stores (default: those of the run)"
    )
    parser.add_argument("-o", "--output", metavar="DIR", help="the folder to make (default: RUN/forecasts/CLIP)")
    parser.add_argument("--formats", metavar="LIST", default=",".join(FORMATS), help="any of %(default)s, separated by commas")
    parser.add_argument("--hide-sector", type=float, metavar="DEG", help="withhold a sector this wide, straight ahead, and draw what is filled in")
    parser.add_argument("--rays", type=int, default=40000, metavar="N", help="rays an instant, drawn at random (default: %(default)s; 0: all)")
    parser.add_argument("--checkpoint", metavar="NAME", default="best", help="best, latest or a checkpoint's name (default: %(default)s)")
    parser.add_argument("--device", metavar="DEV", default="cpu", help="cpu, cuda, cuda:N or auto (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the clips of the data and stop")
    parser.add_argument("--overwrite", action="store_true", help="replace files of an earlier forecast")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    import math
    from pathlib import Path

    from sensors.errors import UsageError, one_line

    folder = Path(args.run_folder)
    formats = list(dict.fromkeys(part.strip() for part in args.formats.split(",") if part.strip()))
    if not formats:
        raise UsageError(f"--formats: names none; give some of {', '.join(FORMATS)}")
    if unknown := sorted(set(formats) - set(FORMATS)):
        raise UsageError(f"--formats {one_line(unknown[0])}: not one of {', '.join(FORMATS)}")
    if args.hide_sector is not None and not 0 < args.hide_sector <= 180:
        raise UsageError(f"--hide-sector {args.hide_sector:g}: give its width in degrees, above 0 and at most 180")
    if args.rays < 0:
        raise UsageError(f"--rays {args.rays}: give a number of rays, or 0 for all")
    if not folder.is_dir():
        raise UsageError(f"{one_line(folder)}: no such run folder; make one with `wm pretrain`")

    from sensors.data import open_data
    from sensors.files import read_json, safe_name, write_file
    from worldmodel import load, rundir
    from worldmodel.source import clips_of_parts
    from worldmodel.tools.terminal import print_json, reporter

    if not args.data and not (folder / "data.json").is_file():
        raise UsageError(f"--data is needed: {one_line(folder)} does not say which data it was trained on")
    data = args.data or read_json(folder / "data.json")["data"]
    clips, _ = clips_of_parts([part for path in data for part in open_data(path)], rundir.read_config(folder))
    by_id = {clip.id: clip for clip in clips}
    if args.list:
        if args.json:
            print_json("forecast", clips=list(by_id))
        else:
            print("\n".join(one_line(name) for name in by_id))
        return 0
    if args.clip is not None and args.clip not in by_id:
        raise UsageError(f"--clip {one_line(args.clip)}: none of the {len(by_id)} clips of the data; --list shows them")
    clip = by_id[args.clip] if args.clip is not None else clips[0]
    output = Path(args.output) if args.output else folder / "forecasts" / safe_name(clip.id)
    if output.exists() and not output.is_dir():
        raise UsageError(f"{one_line(output)}: is a file; give a folder with -o")
    if not args.overwrite and output.exists() and any(output.iterdir()):
        raise UsageError(f"{one_line(output)}: holds files already; give another -o, or --overwrite")

    report = reporter("forecast")
    report(0, 2, f"clip {one_line(clip.id)}")
    sector = None if args.hide_sector is None else (0.0, math.radians(args.hide_sector))
    forecast = load(folder, args.checkpoint, args.device).forecast(clip, hide_sector_rad=sector, count=args.rays or None)
    report(1, 2, "drawing")
    files = draw(forecast, formats, hidden=sector is not None)
    for name, content in files.items():
        write_file(output / name, content, new=not args.overwrite)
    report(2, 2)
    if args.json:
        print_json("forecast", run=str(folder), clip=clip.id, poses=forecast.poses, best_baseline=forecast.best_baseline,
                   files={name: len(content) for name, content in files.items()}, folder=str(output), errors=errors_of(forecast))  # fmt: skip
    else:
        for name, content in files.items():
            print(f"{one_line(output / name)}  {len(content) / 1e6:.2f} MB")
    return 0


def draw(forecast: object, formats: list[str], hidden: bool) -> dict[str, bytes]:
    """The files of a `worldmodel.forecast.Forecast` by name, in the order of `formats`; with a hidden sector also ``sector.png``."""
    from worldmodel.drawing.animation import gif_bytes
    from worldmodel.drawing.clouds import forecast_plys, npz_bytes
    from worldmodel.drawing.page import forecast_page
    from worldmodel.drawing.sector import sector_of, sector_picture
    from worldmodel.forecast import Forecast

    assert isinstance(forecast, Forecast)
    makers = {
        "html": lambda: {"forecast.html": forecast_page(forecast).encode()},
        "gif": lambda: {"forecast.gif": gif_bytes(forecast)},
        "ply": lambda: forecast_plys(forecast),
        "npz": lambda: {"forecast.npz": npz_bytes(forecast)},
    }
    files: dict[str, bytes] = {}
    for name in formats:
        files |= makers[name]()
    if hidden and any(sector_of(future) for future in forecast.futures):
        files["sector.png"] = sector_picture(forecast)
    return files


def errors_of(forecast: object) -> list[dict[str, object]]:
    """Median absolute range errors in metres, and of how many rays (the hidden ones, where a sector was withheld): a row per method and horizon."""
    from worldmodel.drawing.animation import median_error, scored
    from worldmodel.forecast import Forecast

    assert isinstance(forecast, Forecast)
    return [
        {"method": name, "horizon_s": future.horizon_s, "l1_median": median_error(future, ranges), "rays": len(scored(future, ranges))}
        for future in forecast.futures
        for name, ranges in {"model": future.ranges, **future.baselines}.items()
    ]
