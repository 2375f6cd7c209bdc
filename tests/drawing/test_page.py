"""The page and the report: small, self-contained, deaf to hostile names, and drawn by a real browser."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from worldmodel.drawing import charts
from worldmodel.drawing.markup import Markup, digest, escaped, script_json
from worldmodel.drawing.page import forecast_page, octahedral, quantised
from worldmodel.drawing.report import Section, picture, playing_page, report_page, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


class Elements(html.parser.HTMLParser):
    """Every element with its attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.held: dict[str, list[str]] = {"script": [], "style": []}
        self.inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag in self.held:
            self.inside = tag
            self.held[tag].append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.held[self.inside][-1] += data


def unpack_octahedral(packed: np.ndarray) -> np.ndarray:
    """What the shader does."""
    f = packed.astype(np.float64) / 65535 * 2 - 1
    d = np.column_stack([f, 1 - np.abs(f).sum(axis=1)])
    t = np.maximum(-d[:, 2], 0)
    d[:, :2] += np.where(d[:, :2] >= 0, -t[:, None], t[:, None])
    return d / np.linalg.norm(d, axis=1, keepdims=True)


def test_directions_and_ranges_come_back_within_millimetres():
    d = np.random.default_rng(0).normal(size=(4000, 3))
    d[:6] = np.concatenate([np.eye(3), -np.eye(3)])
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    assert np.linalg.norm(unpack_octahedral(octahedral(d)) - d, axis=1).max() < 7e-5
    assert octahedral(np.array([[0.0, 0, 0], [np.nan, 1, 0]])).tolist() == octahedral(np.array([[0.0, 0, 1]] * 2)).tolist()
    r = np.linspace(0, 56, 999)
    assert np.abs(quantised(r, 57.0) / 65535 * 57 - r).max() < 5e-4
    assert quantised(np.array([np.nan, np.inf, -1, 57.0, 56.999999]), 57.0).tolist() == [65535, 65535, 65535, 65535, 65534]


def test_a_page_of_full_sweeps_stays_below_ten_megabytes_and_says_what_it_left_out(street):
    forecast = street(columns=5000, hidden=True)
    assert len(forecast.futures[0].ranges) > 90_000
    many = {f"baseline_{i}": forecast.futures[0].ranges for i in range(9)}
    futures = tuple(
        dataclasses.replace(f, baselines={name: f.ranges for name in many} | {"accumulate_nearest": f.ranges}) for f in forecast.futures * 3
    )
    page = forecast_page(dataclasses.replace(forecast, futures=futures))
    assert len(page.encode()) < 10_000_000
    assert re.search(r"[0-9,]+ of [0-9,]+ rays an instant are drawn", page)
    assert "of" not in re.search(r"poses: log · ([^<]*)<", forecast_page(street())).group(1)


def test_the_data_of_a_page_give_back_the_forecast(street):
    forecast = street()
    data = json.loads(re.search(r'id="data">(.*?)</script>', forecast_page(forecast)).group(1))
    blob = base64.b64decode(data["blob"])
    frame, future = data["frames"][len(forecast.past) + 1], forecast.futures[1]
    read = lambda offset, kind, count: np.frombuffer(blob, kind, count, offset)  # noqa: E731
    directions = unpack_octahedral(read(frame["direction"], "<u2", 2 * frame["count"]).reshape(-1, 2))
    ranges = read(frame["model"], "<u2", frame["count"]) / 65535 * frame["metres"]
    np.testing.assert_allclose(directions * ranges[:, None], future.directions * future.ranges[:, None], atol=0.005)
    assert (read(frame["baselines"][1], "<u2", frame["count"]) == 65535).all()
    np.testing.assert_allclose(read(frame["width"], "u1", frame["count"]) * 0.05, np.ptp(future.quantiles, axis=1), atol=0.026)


def test_with_a_withheld_sector_the_numbers_are_those_of_its_rays(street):
    forecast = street(hidden=True)
    cells = [float(np.median(np.abs(f.ranges - f.truth)[f.hidden])) for f in forecast.futures]
    page = forecast_page(forecast)
    assert "over the rays into the withheld sector" in page and "over all rays" in forecast_page(street())
    row = re.search(r"<th scope=row>model</th>(.*?)</tr>", page).group(1)
    assert [float(c) for c in re.findall(r">([0-9.]+) /", row)] == pytest.approx(cells, abs=6e-4)


def test_hostile_names_stay_text(street, hostile):
    forecast = street(hostile)
    futures = tuple(dataclasses.replace(f, baselines={hostile: f.ranges}) for f in forecast.futures)
    forecast = dataclasses.replace(forecast, run=hostile, poses=hostile, best_baseline=hostile, futures=futures)
    plain = Elements(forecast_page(street()))
    for page in (forecast_page(forecast), report_page(hostile, hostile, [Section(hostile, [hostile], hostile_parts(hostile))])):
        seen = Elements(page)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u2028\u2029]", page)
        assert not any(name.startswith("on") or name == "style" for _, attributes in seen.found for name in attributes)
        assert all(
            str(attributes.get("src", "data:image/png")).startswith("data:image/png") and "href" not in attributes for _, attributes in seen.found
        )
        assert len(seen.held["script"]) <= len(plain.held["script"])
        assert "alert(1)" not in "".join(seen.held["script"] + seen.held["style"])


def hostile_parts(name: str) -> list[Markup]:
    return [
        charts.line_chart({name: ([0, 1], [1, 2])}, name, name),
        charts.bar_chart([(name, {name: 1.0, "b": 2.0})], name),
        charts.table([name], [(name,)], name),
        picture(PNG, name),
    ]


def test_a_page_fetches_nothing_and_allows_only_its_own_script(street, hostile):
    forecast = street(hostile)
    page = forecast_page(forecast)
    seen = Elements(page)
    policy = next(a["content"] for tag, a in seen.found if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    script, style = seen.held["script"][-1], seen.held["style"][0]
    assert policy.startswith("default-src 'none'; ") and digest(script) in policy and digest(style) in policy and "unsafe" not in policy
    assert not re.search(r"(?i)https?://|//[a-z0-9]+\.[a-z]{2,}|@import|url\(", re.sub(r'"blob":"[^"]*"', "", page))
    assert not [a for _, a in seen.found if "src" in a or "href" in a]


def test_json_in_a_script_cannot_end_it():
    text = script_json({"a": "</script><!--\u2028&"})
    assert not re.search("[<>&\u2028]", text) and json.loads(text) == {"a": "</script><!--\u2028&"}
    with pytest.raises(ValueError):
        script_json(float("nan"))


def test_text_is_escaped_for_elements_and_attributes():
    assert escaped("<a \"b\" 'c' & \x1b]8;;x\n") == "&lt;a &quot;b&quot; &#x27;c&#x27; &amp; \\x1b]8;;x\\n"


def test_a_report_takes_markup_only_from_this_package_and_pictures_that_cannot_run():
    with pytest.raises(TypeError, match="prose"):
        report_page("t", "", [Section("s", parts=["<script>alert(1)</script>"])])
    with pytest.raises(ValueError, match="PNG"):
        picture(b"<svg onload=alert(1)>")


def test_a_report_that_would_be_too_large_leaves_out_the_largest_part_and_says_so(tmp_path):
    parts = [Markup("<p>small</p>"), Markup("<p>" + "x" * 50_000 + "</p>")]
    page = report_page("t", "", [Section("s", parts=parts)], max_bytes=10_000)
    assert "small" in page and "xxx" not in page and "Left out to keep this page small: a part of 0.1 MB" in page
    write_report(tmp_path / "report.html", "t", "", [])
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_charts_show_gaps_and_say_where_there_is_nothing():
    curve = charts.line_chart({"a": (range(6), [1, 2, float("nan"), 3, 4, float("inf")])}, "step", "loss")
    assert curve.count("M", curve.index('fill="none"') - 200, curve.index('fill="none"')) == 2
    assert "no finite value" in charts.line_chart({"a": ([1], [float("nan")])}, "step", "loss")
    assert "nan" not in charts.bar_chart([("a", {"x": float("nan"), "y": -2.0})])
    marked = charts.table(["m", "e"], [("a", 2.0), ("b", 1.0), ("c", float("nan"))], lowest=(1,))
    assert '<td class="best">1</td>' in marked and marked.count("best") == 1


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7), (0.013, 0.0131), (0, 1e6), (5, 5)])
def test_ticks_are_few_round_and_inside(low, high):
    found = charts.ticks(low, high)
    assert 1 <= len(found) <= 6 and all(low - 1e-9 <= t <= high + 1e-9 for t in found)


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine to open the page with")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
         "--hide-scrollbars", "--window-size=1000,800", "--virtual-time-budget=3000", "--enable-logging=stderr", "--v=0")  # fmt: skip


def browse(url: str, folder, *more: str) -> tuple[str, str]:
    """What chromium prints (the document with --dump-dom) and its log, for a page opened from a file."""
    ran = subprocess.run([CHROMIUM, *FLAGS, f"--user-data-dir={folder}/profile", *more, url], capture_output=True, timeout=100, check=False)
    return ran.stdout.decode(errors="replace"), ran.stderr.decode(errors="replace")


@needs_chromium
def test_a_browser_draws_the_page_and_runs_nothing_of_a_hostile_name(street, hostile, tmp_path):
    forecast = street(hostile, hidden=True)
    (tmp_path / "page.html").write_text(forecast_page(forecast), encoding="utf-8")
    url = (tmp_path / "page.html").as_uri() + "#at=5&mode=0"
    document, _ = browse(url, tmp_path, "--dump-dom")
    assert re.search(r'<body[^>]* data-ready="1"', document)
    assert re.search(r'id="now">\+0\.6 s', document) and "median error" in document
    _, log = browse(url, tmp_path, f"--screenshot={tmp_path / 'shot.png'}")
    assert "Content Security Policy" not in log and "Uncaught" not in log
    shot = np.asarray(Image.open(io.BytesIO((tmp_path / "shot.png").read_bytes())).convert("RGB"), np.int32)
    stage = shot[shot.shape[0] // 8 : shot.shape[0] // 2]
    third = stage.shape[1] // 3
    lit = [
        int(((part.max(axis=2) > 110) & (np.ptp(part, axis=2) > 50)).sum()) for part in (stage[:, :third], stage[:, third:-third], stage[:, -third:])
    ]
    assert min(lit) > 200, f"points seen per panel: {lit}"


@needs_chromium
def test_a_browser_plays_the_page_inside_a_report(street, tmp_path):
    part = playing_page(forecast_page(street()), "forecast")
    write_report(tmp_path / "report.html", "Report", "", [Section("Page", parts=[part])])
    # the embedded page runs in a process of its own unless told otherwise, and virtual time does not wait for that one
    together = "--disable-features=IsolateSandboxedIframes"
    for budget in (3000, 6000, 12000):
        more = (together, f"--virtual-time-budget={budget}", f"--screenshot={tmp_path / 'shot.png'}")
        _, log = browse((tmp_path / "report.html").as_uri(), tmp_path, *more)
        assert "Content Security Policy" not in log and "Uncaught" not in log
        shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"), np.int32)[250:]
        drawn = int(((shot.max(axis=2) > 110) & (np.ptp(shot, axis=2) > 60)).sum())
        if drawn > 300:
            return
    pytest.fail(f"{drawn} pixels drawn in the embedded page")
