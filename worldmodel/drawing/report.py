"""report.html: one file with everything in it, sections of prose, tables, charts, pictures and pages that play."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sensors.files import write_file
from worldmodel.drawing.markup import Markup, document, escaped
from worldmodel.drawing.page import policy_digests

REPORT_BYTES = 30_000_000


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs of plain text, and parts made by `picture`, `playing_page` and `worldmodel.drawing.charts`."""

    title: str
    prose: Sequence[str] = ()
    parts: Sequence[Markup] = ()


def picture(data: bytes, caption: str = "", width: int | None = None) -> Markup:
    """A PNG, GIF or JPEG by its first bytes, as a figure. ValueError for anything else (SVG can carry scripts)."""
    kinds = ((b"\x89PNG\r\n\x1a\n", "png"), (b"GIF8", "gif"), (b"\xff\xd8\xff", "jpeg"))
    kind = next((name for start, name in kinds if data.startswith(start)), None)
    if kind is None:
        raise ValueError("picture: neither PNG, GIF nor JPEG")
    size = "" if width is None else f' width="{int(width)}"'
    under = f"<figcaption>{escaped(caption)}</figcaption>" if caption else ""
    return Markup(f'<figure><img alt="{escaped(caption)}"{size} src="data:image/{kind};base64,{base64.b64encode(data).decode()}">{under}</figure>')


def playing_page(page: str, title: str) -> Markup:
    """A page made by `worldmodel.drawing.page.forecast_page`, inside this one; it runs apart from it (sandboxed) and under its policy."""
    return Markup(f'<iframe title="{escaped(title)}" sandbox="allow-scripts" srcdoc="{html.escape(page, quote=True)}"></iframe>')


def report_page(title: str, lead: str, sections: Sequence[Section], max_bytes: int = REPORT_BYTES) -> str:
    """The page. Where it would be larger than max_bytes the largest parts are left out, each with a line that says so."""
    parts = [(s, p) for s, section in enumerate(sections) for p in range(len(section.parts))]
    kept = {(s, p): sections[s].parts[p] for s, p in parts}
    for part in kept.values():
        if not isinstance(part, Markup):
            raise TypeError(f"report: a part is {type(part).__name__}, not Markup; text belongs into prose")
    for place in sorted(parts, key=lambda at: -len(kept[at])):
        if sum(map(len, kept.values())) <= max_bytes:
            break
        kept[place] = Markup(f'<p class="left-out">Left out to keep this page small: a part of {len(kept[place]) / 1e6:.1f} MB.</p>')
    body = [f'<h1>{escaped(title)}</h1><p class="lead">{escaped(lead, 2000)}</p>']
    for s, section in enumerate(sections):
        text = "".join(f"<p>{escaped(paragraph, 4000)}</p>" for paragraph in section.prose)
        held = "".join(kept[s, p] for p in range(len(section.parts)))
        body.append(f"<section><h2>{escaped(section.title)}</h2>{text}<div class=parts>{held}</div></section>")
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8").strip()
    return document(title, "\n".join(body), style, also=policy_digests())


def write_report(path: Path, title: str, lead: str, sections: Sequence[Section], *, new: bool = False) -> None:
    """Write the page to `path`, whole or not at all; with `new`, `sensors.files.Exists` where there is one already."""
    write_file(path, report_page(title, lead, sections).encode(), new=new)
