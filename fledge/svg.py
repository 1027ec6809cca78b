"""Drawings as text: curves, points with whiskers, an interval on a line. No library; colours come from the page's CSS.

Classes: `line pale band rule tick frame dot start base mark zero bar whisker`, and `c1` to `c5` for the lines after the
first. What a script may show under the pointer stands in `data-hover` as JSON; a drawing is whole without it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

MOST_POINTS = 400  # of one line: more cannot be seen, and a page must stay small
WIDTH, LEFT, RIGHT = 320, 40, 312  # of a plot, and where its axis begins and ends


def compact(value: float, digits: int = 4) -> str:
    """A number for an axis: 0.25, 1.5k, 3e-4."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.{digits}g}{letter}" if abs(value) < 1e12 else f"{value:.0e}"
    if abs(value) < 1e-3:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:.{digits}g}"


def labels(values: Sequence[float]) -> list[str]:
    """Numbers for one axis, with as many digits as tell them apart."""
    several = ([compact(v, digits) for v in values] for digits in range(4, 16))
    return next((texts for texts in several if len(set(texts)) == len(values)), [compact(v) for v in values])


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """At most `most` + 1 round numbers within [low, high], evenly spaced by 1, 2 or 5 times a power of ten."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    for step in (power * m for m in (1, 2, 5, 10, 20)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first <= most:
            break
    return [i * step for i in range(first, last + 1)]


Point = tuple[float, float | None]


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> tuple[list[Point], list[tuple[float, float, float]]]:
    """At most `most` points, each the mean of a run of neighbours, and the (x, min, max) of each run where they differ.

    A missing value (None) stays a gap when nothing of its run is known.
    """
    if len(points) <= most:
        return list(points), []
    line: list[Point] = []
    band: list[tuple[float, float, float]] = []
    for i in range(most):
        run = points[i * len(points) // most : (i + 1) * len(points) // most]
        known = [y for _, y in run if y is not None]
        x = sum(x for x, _ in run) / len(run)
        line.append((x, sum(known) / len(known) if known else None))
        if known:
            band.append((x, min(known), max(known)))
    line[0], line[-1] = (
        (points[0][0], line[0][1]),
        (points[-1][0], line[-1][1]),
    )  # the line begins and ends where they do
    return line, band


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Centred moving mean; at the ends over the half of the window that there is."""
    half, out = window // 2, []
    for i, (x, y) in enumerate(points):
        known = [v for _, v in points[max(0, i - half) : i + half + 1] if v is not None]
        out.append((x, sum(known) / len(known) if known and y is not None else None))
    return out


@dataclass
class Scale:
    """Maps data to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return round(self.start + (value - self.low) / span * (self.end - self.start), 2) if span else self.start


def _limits(values: Sequence[float], pad: float = 0.06) -> tuple[float, float]:
    """Room around the values; a flat line lies in the middle."""
    low, high = min(values), max(values)
    if low == high:
        return (low - abs(low) * 0.5, high + abs(high) * 0.5) if low else (-1.0, 1.0)
    room = (high - low) * pad
    return (0.0 if 0 <= low < room else low - room), high + room


def _path(points: Sequence[Point], x: Scale, y: Scale, css: str) -> str:
    """One path; a gap where a value is missing, a dot where a value stands alone."""
    parts, dots, pen = [], [], False
    for i, (at, value) in enumerate(points):
        if value is None:
            pen = False
            continue
        parts.append(f"{'L' if pen else 'M'}{x(at):g} {y(value):g}")
        alone = not pen and (i + 1 == len(points) or points[i + 1][1] is None)
        if alone:
            dots.append(f'<circle class="dot" cx="{x(at):g}" cy="{y(value):g}" r="2.5"/>')
        pen = True
    return f'<path class="{css}" d="{"".join(parts)}"/>' + "".join(dots)


# ------------------------------------------------------------------------------------------------------------ curves


def curves(lines: Sequence[Sequence[Point]], *, noisy: bool = False, label: str = "") -> str:
    """Quantities of one kind over steps, with axes. `noisy`: moving means; of one alone, before its values."""
    thinned = [thin(points) for points in lines]
    known = [v for drawn, _ in thinned for _, v in drawn if v is not None]
    known += [v for _, band in thinned for _, low, high in band for v in (low, high) if len(lines) == 1]
    if not known:
        return _empty("no finite value")
    first, last = min(p[0][0] for p in lines if p), max(p[-1][0] for p in lines if p)
    x, y = Scale(first, max(last, first + 1), LEFT, RIGHT), Scale(*_limits(known), 130, 8)
    body = _axes(x, y)
    for i, (drawn, band) in enumerate(thinned):
        css = f"line c{i}" if i else "line"
        if noisy and len(drawn) >= 40:
            if len(lines) == 1:
                body += _band(band, x, y) if band else _path(drawn, x, y, "pale")
            body += _path(smooth(drawn, max(5, len(drawn) // 20)), x, y, css)
        else:
            body += _path(drawn, x, y, css)
    hover: dict[str, Any] = {name: [s.low, s.high, s.start, s.end] for name, s in (("x", x), ("y", y))}
    hover["lines"] = [_values(drawn) for drawn, _ in thinned]
    return document(WIDTH, 152, body, label, extra=_hover(hover))


def _band(band: Sequence[tuple[float, float, float]], x: Scale, y: Scale) -> str:
    edge = [f"{x(at):g} {y(high):g}" for at, _, high in band] + [f"{x(at):g} {y(low):g}" for at, low, _ in band[::-1]]
    return f'<path class="band" d="M{"L".join(edge)}Z"/>'


def _values(points: Sequence[Point]) -> dict[str, Any]:
    """Points for the script: even steps as the first and the distance, five digits of every value."""
    xs = [x for x, _ in points]
    by = xs[1] - xs[0] if len(xs) > 1 else 1
    even = all(b - a == by for a, b in zip(xs, xs[1:], strict=False))
    place = {"from": xs[0], "by": by} if even else {"at": [float(f"{x:.6g}") for x in xs]}
    return place | {"y": [None if y is None else float(f"{y:.5g}") for _, y in points]}


def _axes(x: Scale, y: Scale, x_label: str = "", y_label: str = "") -> str:
    rules = [
        f'<path class="rule" d="M{x.start:g} {y(v):g}H{x.end:g}"/>'
        f'<text class="tick" x="{x.start - 6:g}" y="{y(v) + 3.5:g}" text-anchor="end">{text}</text>'
        for v, text in _labelled(ticks(y.low, y.high))
    ]
    rules += [
        f'<text class="tick" x="{x(v):g}" y="{y.start + 15:g}" text-anchor="{_anchor(x, v)}">{text}</text>'
        for v, text in _labelled(ticks(x.low, x.high, 5))
    ]
    rules.append(f'<path class="frame" d="M{x.start:g} {y.start:g}H{x.end:g}"/>')
    if x_label:
        rules.append(
            f'<text class="tick" x="{x.end:g}" y="{y.start + 29:g}" text-anchor="end">{escape(x_label)}</text>'
        )
    if y_label:
        rules.append(f'<text class="tick" x="2" y="{y.end - 8:g}">{escape(y_label)}</text>')
    return "".join(rules)


def _labelled(values: Sequence[float]) -> list[tuple[float, str]]:
    return list(zip(values, labels(values), strict=True))


def _anchor(x: Scale, value: float) -> str:
    return "end" if x(value) > x.end - 8 else "middle"


# ------------------------------------------------------------------------------------------------------------ points


Line = tuple[str, Sequence[tuple[float, float]]]
"""A line of a scatter: its class, and where it goes."""


@dataclass
class Mark:
    """A point of a scatter: what it says under the pointer, its interval, its radius, its weight from 0 to 1."""

    x: float
    y: float
    text: str = ""
    low: float | None = None
    high: float | None = None
    radius: float = 3.0
    css: str = "dot"
    weight: float = 1.0


def scatter(
    marks: Sequence[Mark],
    x_label: str,
    y_label: str,
    *,
    path: Sequence[tuple[float, float]] = (),
    lines: Sequence[Line] = (),
    diagonal: bool = False,
    x_limits: tuple[float, float] | None = None,
    y_limits: tuple[float, float] | None = None,
    bars: Sequence[tuple[float, float, float]] = (),
) -> str:
    """One quantity against another. `path`, `lines`: behind the points; `bars`: (from, to, share of the height)."""
    if not marks:
        return _empty("nothing measured")
    lines = [("line", path), *lines] if path else lines
    heights = [v for m in marks for v in (m.y, m.low, m.high) if v is not None]
    heights += [y for _, points in lines for _, y in points]
    x = Scale(*(x_limits or _limits([m.x for m in marks])), LEFT, RIGHT)
    y = Scale(*(y_limits or _limits(heights)), 160, 22)
    body = "".join(_bar(x(a) + 1, x(b) - 1, y.start, y.start - (y.start - y.end) * share) for a, b, share in bars)
    body += _axes(x, y, x_label, y_label)
    if diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        body += _path([(low, low), (high, high)], x, y, "zero") if low < high else ""
    body += "".join(_path(points, x, y, css) for css, points in lines)
    body += "".join(_mark(m, x, y) for m in marks)
    hover = {"points": [[x(m.x), y(m.y), m.text] for m in marks]}
    return document(WIDTH, 196, body, f"{y_label} over {x_label}", extra=_hover(hover))


def _bar(left: float, right: float, bottom: float, top: float) -> str:
    return f'<path class="bar" d="M{left:g} {bottom:g}V{top:g}H{right:g}V{bottom:g}Z"/>'


def _mark(mark: Mark, x: Scale, y: Scale) -> str:
    at = x(mark.x)
    whisker = ""
    if mark.low is not None and mark.high is not None:
        whisker = f'<path class="whisker" d="M{at:g} {y(mark.low):g}V{y(mark.high):g}"/>'
    pale = f' fill-opacity="{mark.weight:.2g}"' if mark.weight < 1 else ""
    return f'{whisker}<circle class="{mark.css}" cx="{at:g}" cy="{y(mark.y):g}" r="{mark.radius:g}"{pale}/>'


def interval(after: float, low: float, high: float, before: float | None, baseline: float | None, label: str) -> str:
    """A figure with its interval on a line, beside where it started (ring) and its baseline (bar)."""
    others = [v for v in (before, baseline) if v is not None]
    values = [v for v in (after, low, high, *others) if math.isfinite(v)]
    if not math.isfinite(after):
        return ""
    x = Scale(*_limits(values, 0.0), 8, 132)
    low, high = (v if math.isfinite(v) else after for v in (low, high))
    body = '<path class="rule" d="M2 12H138"/>'
    if baseline is not None:
        body += f'<path class="base" d="M{x(baseline):g} 4V20"/>'
    if before is not None:
        body += f'<circle class="start" cx="{x(before):g}" cy="12" r="3.5"/>'
    body += f'<path class="mark" d="M{x(low):g} 12H{x(high):g}"/><circle class="dot" cx="{x(after):g}" cy="12" r="4"/>'
    return document(140, 24, body, label)


# ---------------------------------------------------------------------------------------------------------- documents


def _empty(text: str) -> str:
    return document(WIDTH, 152, f'<text class="tick" x="160" y="80" text-anchor="middle">{escape(text)}</text>', text)


def _hover(data: dict[str, Any]) -> str:
    return f' data-hover="{escape(json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False))}"'


def document(width: float, height: float, body: str, label: str, css: str = "plot", extra: str = "") -> str:
    """One drawing; `extra`: more attributes, from a space on."""
    name = f' role="img" aria-label="{escape(label)}"' if label else ' aria-hidden="true"'
    return f'<svg class="{css}" viewBox="0 0 {width:g} {height:g}"{name}{extra}>{body}</svg>'
