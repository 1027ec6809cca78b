"""Drawings as text: curves, an interval on a line, a graph. No library, no script; colours come from the page's CSS.

Classes: `line pale band rule tick frame dot start base mark zero` in plots, `node plain source edge` in graphs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

MOST_POINTS = 400  # of one line: more cannot be seen, and a page must stay small


def compact(value: float) -> str:
    """A number for an axis: 0.25, 1.5k, 3e-4."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if abs(value) >= size:
                return f"{value / size:.4g}{letter}" if abs(value) < 1e12 else f"{value:.0e}"
    if abs(value) < 1e-3:
        mantissa, power = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(power)}"
    return f"{value:.4g}"


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


def curve(points: Sequence[Point], *, noisy: bool = False, label: str = "") -> str:
    """One quantity over steps, with axes. `noisy`: every value pale, their moving mean in front."""
    drawn, band = thin(points)
    known = [v for _, v in drawn if v is not None] + [v for _, low, high in band for v in (low, high)]
    if not known:
        return _empty("no finite value")
    x = Scale(points[0][0], max(points[-1][0], points[0][0] + 1), 40, 312)
    y = Scale(*_limits(known), 130, 8)
    body = _axes(x, y)
    if band:
        edge = [f"{x(at):g} {y(high):g}" for at, _, high in band] + [
            f"{x(at):g} {y(low):g}" for at, low, _ in band[::-1]
        ]
        body += f'<path class="band" d="M{"L".join(edge)}Z"/>'
    if noisy and len(drawn) >= 40:
        body += "" if band else _path(drawn, x, y, "pale")
        body += _path(smooth(drawn, max(5, len(drawn) // 20)), x, y, "line")
    else:
        body += _path(drawn, x, y, "line")
    return _svg(320, 152, body, label)


def _axes(x: Scale, y: Scale, x_label: str = "", y_label: str = "") -> str:
    rules = [
        f'<path class="rule" d="M{x.start:g} {y(v):g}H{x.end:g}"/>'
        f'<text class="tick" x="{x.start - 6:g}" y="{y(v) + 3.5:g}" text-anchor="end">{compact(v)}</text>'
        for v in ticks(y.low, y.high)
    ]
    marks = [v for v in ticks(x.low, x.high, 5) if not x_label or x(v) < x.end]
    rules += [
        f'<text class="tick" x="{x(v):g}" y="{y.start + 15:g}" text-anchor="{_anchor(x, v)}">{compact(v)}</text>'
        for v in marks
    ]
    rules.append(f'<path class="frame" d="M{x.start:g} {y.start:g}H{x.end:g}"/>')
    if x_label:
        rules.append(
            f'<text class="tick" x="{x.end:g}" y="{y.start + 29:g}" text-anchor="end">{escape(x_label)}</text>'
        )
    if y_label:
        rules.append(f'<text class="tick" x="2" y="{y.end - 8:g}">{escape(y_label)}</text>')
    return "".join(rules)


def _anchor(x: Scale, value: float) -> str:
    return "end" if x(value) > x.end - 8 else "middle"


def scatter(points: Sequence[tuple[float, float]], x_label: str, y_label: str, *, joined=False, diagonal=False) -> str:
    """One quantity against another: PPO's gold score over KL (`joined` in order), a calibration (`diagonal`)."""
    if not points:
        return _empty("nothing measured")
    x = Scale(*_limits([p[0] for p in points]), 40, 312)
    y = Scale(*_limits([p[1] for p in points]), 160, 22)
    body = _axes(x, y, x_label, y_label)
    if diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        body += _path([(low, low), (high, high)], x, y, "zero") if low < high else ""
    if joined:
        body += _path(points, x, y, "pale")
    body += "".join(f'<circle class="dot" cx="{x(a):g}" cy="{y(b):g}" r="3"/>' for a, b in points)
    return _svg(320, 196, body, f"{y_label} over {x_label}")


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
    return _svg(140, 24, body, label)


def _empty(text: str) -> str:
    return _svg(320, 152, f'<text class="tick" x="160" y="80" text-anchor="middle">{escape(text)}</text>', text)


def _svg(width: float, height: float, body: str, label: str, css: str = "") -> str:
    name = f' role="img" aria-label="{escape(label)}"' if label else ' aria-hidden="true"'
    return f'<svg class="{css or "plot"}" viewBox="0 0 {width:g} {height:g}"{name}>{body}</svg>'


# ------------------------------------------------------------------------------------------------------------- graph


@dataclass
class Node:
    """A box of a graph: a name, a line below (`brief` in a narrow box), where a click leads; a source is a pill."""

    name: str
    below: str = ""
    brief: str = ""
    href: str = ""
    source: bool = False
    plain: bool = False
    layer: int = field(default=0, compare=False)


def graph(nodes: Mapping[str, Node], edges: Sequence[tuple[str, str]], *, down: bool = False) -> str:
    """A graph without cycles, drawn left to right, or `down` the page for narrow screens."""
    edges = [(a, b) for a, b in dict.fromkeys(edges) if a in nodes and b in nodes and a != b]
    layers, chains = _layers(nodes, edges)
    links = _links(chains)
    _untangle(layers, links)
    rank = {n: i for i, layer in enumerate(layers) for n in layer}
    widest = max(sum(1.0 if n in nodes else 0.4 for n in layer) for layer in layers)
    if down:
        deep, wide, gap, pitch = 46.0, min(112.0, 360 / widest - 8), 34.0, min(120.0, 360 / widest)
    else:
        deep, wide, gap, pitch = 152.0, 50.0, 58.0, 64.0
    cross = _positions(layers, links, {n: 1.0 if n in nodes else 0.4 for n in rank})
    place = {n: (rank[n] * (deep + gap) + deep / 2 + 1, cross[n] * pitch + wide / 2 + 1) for n in rank}
    length = len(layers) * (deep + gap) - gap + 2
    across = max(place[n][1] for n in place) + wide / 2 + 1
    turn = (lambda p: (p[1], p[0])) if down else (lambda p: p)
    body = [_edge([place[n] for n in chain], deep, turn) for chain in chains]
    size = turn((deep, wide))
    body += [_box(nodes[n], turn(place[n]), size, narrow=down) for n in nodes]
    width, height = turn((length, across))
    style = f' style="max-width:{width * (1.0 if not down else 1.15):g}px"'
    label = "Lineage: " + ", ".join(f"{nodes[a].name} to {nodes[b].name}" for a, b in edges)
    return _svg(width, height, "".join(body), label, "graph").replace("<svg", f"<svg{style}", 1)


def arranged(names: Iterable[str], edges: Sequence[tuple[str, str]]) -> tuple[list[list[str]], list[tuple[str, str]]]:
    """Layers in the order in which they are drawn, and the links between neighbouring layers."""
    layers, chains = _layers(dict.fromkeys(names), edges)
    links = _links(chains)
    _untangle(layers, links)
    return layers, links


def _links(chains: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    return [(a, b) for chain in chains for a, b in zip(chain, chain[1:], strict=False)]


def _layers(nodes: Mapping[str, Any], edges: Sequence[tuple[str, str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Nodes by longest way from a source. An edge over several layers gets a waypoint in each: chains of names."""
    depth = dict.fromkeys(nodes, 0)
    for _ in nodes:  # as many rounds as the longest way may have edges; a cycle would end here too
        for a, b in edges:
            depth[b] = max(depth[b], min(depth[a] + 1, len(nodes) - 1))
    layers: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for n in nodes:
        layers[depth[n]].append(n)
    chains = []
    for a, b in edges:
        ways = [f"{a}\n{b}\n{i}" for i in range(depth[a] + 1, depth[b])]
        for i, way in enumerate(ways, depth[a] + 1):
            layers[i].append(way)
        chains.append([a, *ways, b])
    return layers, chains


def crossings(layers: Sequence[Sequence[str]], links: Sequence[tuple[str, str]]) -> int:
    """How many pairs of links cross between neighbouring layers."""
    at = {n: (i, k) for i, layer in enumerate(layers) for k, n in enumerate(layer)}
    ends = [(*at[a], at[b][1]) for a, b in links]  # (layer, place there, place in the next one)
    pairs = ((e, f) for i, e in enumerate(ends) for f in ends[:i] if e[0] == f[0])
    return sum((e[1] - f[1]) * (e[2] - f[2]) < 0 for e, f in pairs)


def _untangle(layers: list[list[str]], links: Sequence[tuple[str, str]]) -> None:
    """Order every layer for few crossings: by the mean place of the neighbours, then by swaps while they help."""
    near: dict[str, list[str]] = {n: [] for layer in layers for n in layer}
    for a, b in links:
        near[a].append(b)
        near[b].append(a)
    best, least = [layer[:] for layer in layers], crossings(layers, links)
    for sweep in range(8):
        for layer in layers if sweep % 2 == 0 else layers[::-1]:
            at = {n: k / max(1, len(one) - 1) for one in layers for k, n in enumerate(one)}
            mean = {n: sum(at[m] for m in near[n]) / len(near[n]) if near[n] else at[n] for n in layer}
            layer.sort(key=mean.__getitem__)
        _swap(layers, links)
        if (found := crossings(layers, links)) < least:
            best, least = [layer[:] for layer in layers], found
    layers[:] = best


def _swap(layers: list[list[str]], links: Sequence[tuple[str, str]]) -> None:
    """Exchange neighbours in a layer for as long as that takes crossings away."""
    now, better = crossings(layers, links), True
    while better and now:
        better = False
        for layer in layers:
            for k in range(len(layer) - 1):
                layer[k], layer[k + 1] = layer[k + 1], layer[k]
                if (then := crossings(layers, links)) < now:
                    now, better = then, True
                else:
                    layer[k], layer[k + 1] = layer[k + 1], layer[k]


def _positions(
    layers: list[list[str]], links: Sequence[tuple[str, str]], size: Mapping[str, float]
) -> dict[str, float]:
    """Where each node lies across its layer, in units of one box: near its neighbours, none on top of another."""
    near: dict[str, list[str]] = {n: [] for layer in layers for n in layer}
    for a, b in links:
        near[a].append(b)
        near[b].append(a)
    at = {n: float(k) for layer in layers for k, n in enumerate(layer)}
    apart = lambda a, b: (size[a] + size[b]) / 2  # noqa: E731
    for _ in range(24):
        for layer in layers:
            wish = [sum(at[m] for m in near[n]) / len(near[n]) if near[n] else at[n] for n in layer]
            first, last = wish[:], wish[:]
            for k in range(1, len(layer)):
                first[k] = max(first[k], first[k - 1] + apart(layer[k - 1], layer[k]))
            for k in range(len(layer) - 2, -1, -1):
                last[k] = min(last[k], last[k + 1] - apart(layer[k], layer[k + 1]))
            at |= {n: (f + s) / 2 for n, f, s in zip(layer, first, last, strict=True)}
    least = min(at[n] - size[n] / 2 for n in at)
    return {n: p - least - 0.5 for n, p in at.items()}


def _edge(points: list[tuple[float, float]], deep: float, turn) -> str:
    """A curve from the end of the first box to the start of the last, level at every waypoint."""
    (x0, y0), *middle, (x1, y1) = points
    stops = [(x0 + deep / 2, y0)]
    for x, y in middle:
        stops += [(x - deep / 2, y), (x + deep / 2, y)]
    stops.append((x1 - deep / 2, y1))
    pen = "M{:g} {:g}".format(*turn(stops[0]))
    for (ax, ay), (bx, by) in zip(stops, stops[1:], strict=False):
        half = (ax + bx) / 2
        pairs = [turn((half, ay)), turn((half, by)), turn((bx, by))]
        pen += "C" + " ".join(f"{px:g} {py:g}" for px, py in pairs)
    return f'<path class="edge" d="{pen}"/>'


def _box(node: Node, centre: tuple[float, float], size: tuple[float, float], narrow: bool) -> str:
    (x, y), (width, height) = centre, size
    room, letter = (width - 6, 6.3) if narrow else (width - 14, 7.2)
    css = "node source" if node.source else "node plain" if node.plain else "node"
    height = min(height, 30) if node.source else height
    radius = height / 2 if node.source else 8
    box = f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"/>'
    below = (node.brief or node.below) if narrow else node.below
    lift = -3 if below else 4
    name = escape(_fit(node.name, room, letter))
    text = f'<text class="name" x="{x:g}" y="{y + lift:g}" text-anchor="middle">{name}</text>'
    if below:
        below = escape(_fit(below, room, letter * 0.78))
        text += f'<text class="below" x="{x:g}" y="{y + 13:g}" text-anchor="middle">{below}</text>'
    whole = f"<title>{escape(f'{node.name}: {node.below}' if node.below else node.name)}</title>"
    inside = f'<g class="{css}">{whole}{box}{text}</g>'
    return f'<a href="{escape(node.href)}">{inside}</a>' if node.href else inside


def _fit(text: str, room: float, letter: float) -> str:
    """`text`, cut where it would leave its box."""
    most = max(3, int(room / letter))
    return text if len(text) <= most else text[: most - 1] + "…"
