"""`wm doctor`: what of this works on this machine, and how to get the rest. Looks, changes nothing, and always ends with 0."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELP = "say what works on this machine, and how to get the rest"

DISTRIBUTION = "driving-worldmodel"
# shared library, the Debian package that brings it, who needs it
LIBRARIES = (
    ("libGL.so.1", "libgl1", "open3d, OpenCV"),
    ("libEGL.so.1", "libegl1", "open3d"),
    ("libgthread-2.0.so.0", "libglib2.0-0", "OpenCV"),
    ("libusb-1.0.so.0", "libusb-1.0-0", "open3d"),
    ("libgomp.so.1", "libgomp1", "torch, numba"),
)
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "firefox")
OPEN3D = "open3d-cpu" if (sys.platform, platform.machine()) == ("linux", "x86_64") else "open3d"
# imported in a process of their own, since a missing library may end it: (module, distribution)
IMPORTS = (("numpy", "numpy"), ("scipy", "scipy"), ("numba", "numba"), ("pyarrow", "pyarrow"), ("blosc2", "blosc2"), ("cv2", "opencv-python"),
           ("kiss_icp", "kiss-icp"), ("open3d", OPEN3D), ("torch", "torch"))  # fmt: skip
IMPORT_SECONDS = 180
PROBE = """
import importlib, json, sys
for name in sys.argv[1:]:
    print(json.dumps({"start": name}), flush=True)
    row = {"name": name}
    try:
        module = importlib.import_module(name)
        row["version"] = str(getattr(module, "__version__", ""))
        if name == "torch":
            row["threads"], row["cuda"] = module.get_num_threads(), module.version.cuda
            row["gpus"] = [module.cuda.get_device_name(i) for i in range(module.cuda.device_count())]
            row["bf16"] = bool(row["gpus"]) and bool(module.cuda.is_bf16_supported())
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(row), flush=True)
"""


@dataclass(frozen=True)
class Finding:
    """One thing looked at: state is ok, lacking (something the core needs) or optional (absent, and needed by some); remedy says what to do."""

    group: str
    name: str
    state: str
    text: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from sensors.errors import one_line
    from worldmodel.tools.terminal import print_json

    imports = probe([name for name, _ in IMPORTS])
    findings = [*_system(), *_threads(imports), *_packages(imports), *_gpu(imports), *_caches(), *_libraries(), *_extras(), *_adapters()]
    lines = commands(findings)
    lacking = sum(finding.state == "lacking" for finding in findings)
    if args.json:
        print_json("doctor", ok=not lacking, findings=[vars(finding) for finding in findings], commands=lines)
        return 0
    marks = {"ok": "ok", "lacking": "LACKING", "optional": "absent"}
    for finding in findings:
        print(f"{marks[finding.state]:8} {finding.group:10} {one_line(finding.name, 40):20} {one_line(finding.text, 100)}".rstrip())
    for finding in findings:
        if finding.remedy and finding.state != "ok" and not finding.remedy.startswith(("apt:", "extra:")):
            print(f"{finding.name}: {one_line(finding.remedy)}")
    for line in lines:
        print(line)
    print("all that the core needs is there" if not lacking else f"{lacking} things lack")
    return 0


def commands(findings: list[Finding]) -> list[str]:
    """The one apt line and the one pip line that bring what the findings lack; none where nothing does."""
    packages = list(dict.fromkeys(f.remedy.removeprefix("apt:") for f in findings if f.state != "ok" and f.remedy.startswith("apt:")))
    extras = list(dict.fromkeys(f.remedy.removeprefix("extra:") for f in findings if f.state != "ok" and f.remedy.startswith("extra:")))
    lines = []
    if packages:
        lines.append(f"{'' if _is_root() else 'sudo '}apt-get install -y --no-install-recommends {' '.join(packages)}")
    if extras:
        lines.append(f"pip install '{DISTRIBUTION}[{','.join(extras)}]'")
    return lines


def _is_root() -> bool:
    return hasattr(os, "getuid") and os.getuid() == 0


def probe(modules: list[str]) -> dict[str, dict[str, Any]]:
    """Per module what importing it gave: version, or error; in one process after the other, a new one after each that died."""
    import json
    import subprocess

    found: dict[str, dict[str, Any]] = {}
    waiting = list(modules)
    while waiting:
        try:
            done = subprocess.run([sys.executable, "-c", PROBE, *waiting], capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False)
            output, how = done.stdout, f"its import ended the process ({done.returncode})"
        except subprocess.TimeoutExpired as error:
            output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else (error.stdout or "")
            how = f"its import took more than {IMPORT_SECONDS} s"
        started = None
        for line in output.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # what a module prints while it is imported
            if isinstance(row, dict) and row.get("start") in waiting:
                started = row["start"]
            elif isinstance(row, dict) and row.get("name") == started:
                found[row["name"]] = row
        if started is not None and started not in found:
            found[started] = {"name": started, "error": how}
        left = [name for name in waiting if name not in found]
        if len(left) == len(waiting):
            found |= {name: {"name": name, "error": how} for name in left}
            break
        waiting = left
    return found


def _system() -> list[Finding]:
    from importlib.metadata import version

    python = sys.version_info[:2]
    fits = (3, 11) <= python < (3, 13)
    rows = [
        Finding("system", DISTRIBUTION, "ok", version(DISTRIBUTION)),
        Finding("system", "python", "ok" if fits else "lacking", platform.python_version(), "" if fits else "use Python 3.11 or 3.12"),
        Finding("system", "platform", "ok", platform.platform()),
    ]
    memory = _memory_gib()
    if memory is not None:
        rows.append(Finding("system", "memory", "ok", f"{memory:.1f} GiB"))
    return rows


def _memory_gib() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return None


def _threads(imports: dict[str, dict[str, Any]]) -> list[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"{usable} usable of {os.cpu_count()}"
    if "threads" in imports.get("torch", {}):
        text += f", torch takes {imports['torch']['threads']}"
    if os.environ.get("OMP_NUM_THREADS"):
        text += f", OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"
    flags = _cpu_flags()
    have = [flag for flag in CPU_FLAGS if flag in flags]
    bf16 = "bf16 arithmetic" if {"avx512_bf16", "amx_bf16"} & set(have) else "no bf16 arithmetic"
    return [
        Finding("processor", "cores", "ok", text),
        Finding("processor", "instructions", "ok", f"{' '.join(have)} ({bf16})" if flags else f"not known on {platform.system()}"),
    ]


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.split(":", 1)[1].split())
    except OSError:
        pass  # no such file on other systems
    return set()


def _packages(imports: dict[str, dict[str, Any]]) -> list[Finding]:
    rows = []
    for name, distribution in IMPORTS:
        row = imports[name]
        if "error" in row:
            missing = row["error"].startswith("ModuleNotFoundError")
            remedy = f"pip install {distribution}" if missing else "see the system libraries below; else install it again"
            rows.append(Finding("package", name, "lacking", row["error"], remedy))
        else:
            rows.append(Finding("package", name, "ok", row["version"]))
    return rows


def _gpu(imports: dict[str, dict[str, Any]]) -> list[Finding]:
    import shutil

    torch = imports["torch"]
    if torch.get("gpus"):
        return [Finding("gpu", name, "ok", f"CUDA {torch['cuda']}, bf16 {'yes' if torch['bf16'] else 'no'}") for name in torch["gpus"]]
    if shutil.which("nvidia-smi") and not torch.get("cuda"):
        return [Finding("gpu", "none used", "optional", "there seems to be one, but this torch is built for the CPU", "install torch for CUDA")]
    return [Finding("gpu", "none", "ok", "trains on the CPU")]


def _caches() -> list[Finding]:
    """numba keeps compiled kernels beside the files, or where NUMBA_CACHE_DIR says; without a place every start compiles again."""
    import sensors.kernels
    from sensors.files import writable

    places = {"numba": Path(os.environ.get("NUMBA_CACHE_DIR") or Path(next(iter(sensors.kernels.__path__))) / "__pycache__")}
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    places["matplotlib"] = Path(os.environ.get("MPLCONFIGDIR") or Path(home) / "matplotlib")
    rows = []
    for name, place in places.items():
        good = writable(place)
        variable = {"numba": "NUMBA_CACHE_DIR", "matplotlib": "MPLCONFIGDIR"}[name]
        text = str(place) if good else f"{place}: not writable"
        rows.append(Finding("cache", name, "ok" if good else "optional", text, "" if good else f"set {variable} to a folder that can be written to"))
    return rows


def _libraries() -> list[Finding]:
    import ctypes
    import shutil

    rows = []
    for library, package, who in LIBRARIES if sys.platform == "linux" else ():
        try:
            ctypes.CDLL(library)
            rows.append(Finding("library", library, "ok", f"for {who}"))
        except OSError:
            rows.append(Finding("library", library, "lacking", f"not found; {who} need it", f"apt:{package}"))
    browser = next((name for name in BROWSERS if shutil.which(name)), None)
    rows.append(Finding("library", "browser", "ok", f"{browser}: opens the pages") if browser
                else Finding("library", "browser", "optional", "none here; the pages open in any browser elsewhere", "apt:chromium"))  # fmt: skip
    return rows


def _adapters() -> list[Finding]:
    try:
        from sensors.adapters.base import adapters, broken

        good = [Finding("adapter", name, "ok", f"reads {name}") for name in adapters()]
    except Exception as error:  # one of the packages above lacks
        return [Finding("adapter", "all", "lacking", f"{type(error).__name__}: {error}", "see the packages above")]
    return good + [
        Finding("adapter", name, "optional", f"cannot be used: {why}", "mend it, or uninstall its package") for name, why in broken().items()
    ]


def _extras() -> list[Finding]:
    """The extras of the installed distribution, by its own metadata, each with the packages of it that are not installed."""
    import re
    from importlib.metadata import PackageNotFoundError, distribution, version

    wanted: dict[str, list[str]] = {}
    for requirement in distribution(DISTRIBUTION).requires or []:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", requirement)
        if name and extra:
            wanted.setdefault(extra.group(1), []).append(name.group(0))
    rows = []
    for extra, names in sorted(wanted.items()):
        missing = []
        for name in dict.fromkeys(names):
            try:
                version(name)
            except PackageNotFoundError:
                missing.append(name)
        if missing:
            rows.append(Finding("extra", extra, "optional", f"not installed: {', '.join(missing)}", f"extra:{extra}"))
        else:
            rows.append(Finding("extra", extra, "ok", ", ".join(dict.fromkeys(names))))
    return rows
