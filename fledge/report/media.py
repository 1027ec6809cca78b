"""Pictures and sample tables that a run kept."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fledge.report.markup import details, table
from fledge.report.view import View
from fledge.track import figure

MOST_ROWS = 12  # of a sample table at first sight; the others are one click away


def gallery(view: View) -> str:
    """Pictures and sample tables in the order in which the run first showed them."""
    shown = []
    for entry in view.media:
        path = view.dir / "media" / Path(str(entry.get("file", ""))).name  # never outside this folder
        make = {"picture": picture, "samples": samples}.get(str(entry.get("kind", "")))
        if make is not None and path.is_file():
            shown.append(make(path, str(entry.get("caption") or entry.get("name", ""))))
    return "".join(shown)


def picture(path: Path, caption: str) -> str:
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return ""
    width, height = struct.unpack(">II", data[16:24])
    small = " class=pixels" if width < 160 else ""  # single pixels are the point: do not blur them
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    image = f'<img{small} src="{source}" alt="{escape(caption)}" width="{width}" height="{height}">'
    return f"<figure class=picture><div class=scroll>{image}</div><figcaption>{escape(caption)}</figcaption></figure>"


def samples(path: Path, caption: str) -> str:
    rows = [r for r in json.loads(path.read_text(encoding="utf-8")) if isinstance(r, dict)]
    if not rows:
        return ""
    columns = list(dict.fromkeys(k for r in rows for k in r))
    numbers = [c for c in columns if all(_number(r.get(c)) for r in rows)]
    first = samples_table(columns, numbers, rows[:MOST_ROWS])
    rest = rows[MOST_ROWS:]
    more = details(f"{len(rest)} more rows", samples_table(columns, numbers, rest)) if rest else ""
    return f"<figure class=samples><figcaption>{escape(caption)}</figcaption>{first}{more}</figure>"


def samples_table(columns: Sequence[str], numbers: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    return table(columns, ([cell(r.get(c)) for c in columns] for r in rows), numbers)


def _number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return escape(figure(value) if isinstance(value, float) else str(value))
