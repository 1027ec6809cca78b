"""Small pieces of HTML. Whatever came from outside is escaped by whoever puts it in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from fledge.track import figure


def details(title: str, inside: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


def numeric(yes: bool) -> str:
    return " class=num" if yes else ""


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[str] = (), css: str = "cards"
) -> str:
    """Rows of cells, ready as HTML; on a phone every row is a card with the column's name before each cell."""
    right = set(numbers)
    header = "".join(f"<th{numeric(c in right)}>{escape(c)}</th>" for c in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td{numeric(c in right)} data-label="{escape(c)}">{cell}</td>'
            for c, cell in zip(columns, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class=scroll><table class="{css}"><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


def terms(pairs: Iterable[tuple[str, str]], css: str = "") -> str:
    """Terms and what is said of them, both ready as HTML; those of which nothing is said are left out."""
    rows = "".join(f"<div><dt>{term}</dt><dd>{text}</dd></div>" for term, text in pairs if text)
    return f'<dl class="{css}">{rows}</dl>' if rows else ""


def digits(low: float, high: float) -> Callable[[float | None], str]:
    """How to print figures with this interval: two digits of its width, no more than four decimals."""
    width = high - low
    if not (math.isfinite(width) and width > 0):
        return figure
    places = min(4, max(0, 1 - math.floor(math.log10(width))))
    return lambda v: "–" if v is None or math.isnan(v) else f"{v:,.{places}f}"


def signed(low: float, high: float) -> str:
    show = digits(low, high)
    return " to ".join(("+" if v > 0 else "") + show(v) for v in (low, high))
