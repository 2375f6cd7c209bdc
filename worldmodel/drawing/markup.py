"""HTML that is safe to open: names come from logs and file systems, so that every text is escaped for where it stands, and the page forbids
everything but its own script and style by their digests."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from typing import Any

from sensors.errors import one_line


class Markup(str):
    """Text that is markup already: made by functions of this package from escaped pieces, never from outside."""


def escaped(text: object, limit: int = 400) -> str:
    """text for an HTML element or a double-quoted attribute; control characters shown as escapes, cut at limit characters."""
    return html.escape(one_line(text, limit), quote=True)


def script_json(value: Any) -> str:
    """value as JSON for a `<script type="application/json">`: ASCII only and without `<`, `>` and `&`, so that nothing in it ends the element.
    ValueError for NaN."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def digest(text: str) -> str:
    """The source expression that a content security policy allows `text` by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def document(title: str, body: str, style: str, scripts: Sequence[str] = (), data: str | None = None, also: Sequence[str] = ()) -> str:
    """A whole page. title is escaped here, body is markup; scripts run in order after the body; data is the text of
    `<script type="application/json" id="data">` (`script_json`). also: further script and style digests to allow, of pages embedded by
    srcdoc, which inherit this page's policy."""
    allowed_scripts = " ".join([*map(digest, scripts), *also]) or "'none'"
    allowed_styles = " ".join([digest(style), *also])
    policy = f"default-src 'none'; script-src {allowed_scripts}; style-src {allowed_styles}; img-src data:; base-uri 'none'; form-action 'none'"
    held = "" if data is None else f'<script type="application/json" id="data">{data}</script>\n'
    run = "".join(f"<script>{text}</script>\n" for text in scripts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n{held}{run}</body>\n</html>\n"
    )
