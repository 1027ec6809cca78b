"""A graph without cycles as SVG: boxes in layers, few crossings, level curves. Classes: `node plain source edge`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from fledge import svg


@dataclass
class Node:
    """A box of a graph: a name, a line below and a number that ends it, where a click leads; a source is a pill.

    In a narrow box the number stands alone; it is never cut.
    """

    name: str
    below: str = ""
    number: str = ""
    href: str = ""
    source: bool = False
    plain: bool = False


def draw(nodes: Mapping[str, Node], edges: Sequence[tuple[str, str]], *, down: bool = False) -> str:
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
    number = {n: i for i, n in enumerate(nodes)}  # by which the script finds who is whose parent
    ends = [f"{number[chain[0]]} {number[chain[-1]]}" for chain in chains]
    body = [_edge([place[n] for n in chain], deep, turn, e) for chain, e in zip(chains, ends, strict=True)]
    size = turn((deep, wide))
    body += [_box(nodes[n], number[n], turn(place[n]), size, narrow=down) for n in nodes]
    width, height = turn((length, across))
    style = f' style="max-width:{width * (1.0 if not down else 1.15):g}px"'
    label = "Lineage: " + ", ".join(f"{nodes[a].name} to {nodes[b].name}" for a, b in edges)
    return svg.document(width, height, "".join(body), label, "graph", style)


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


def _edge(points: list[tuple[float, float]], deep: float, turn, ends: str) -> str:
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
    return f'<path class="edge" data-edge="{ends}" d="{pen}"/>'


def _box(node: Node, number: int, centre: tuple[float, float], size: tuple[float, float], narrow: bool) -> str:
    (x, y), (width, height) = centre, size
    room, letter = (width - 6, 6.3) if narrow else (width - 14, 7.2)
    css = "node source" if node.source else "node plain" if node.plain else "node"
    height = min(height, 30) if node.source else height
    radius = height / 2 if node.source else 8
    box = f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"/>'
    small = letter * 0.78
    below = _fit(node.below, room - (len(node.number) + 1) * small if node.number else room, small)
    below = node.number if narrow and node.number else f"{below} {node.number}".strip()
    lift = -3 if below else 4
    name = escape(_fit(node.name, room, letter))
    text = f'<text class="name" x="{x:g}" y="{y + lift:g}" text-anchor="middle">{name}</text>'
    if below:
        text += f'<text class="below" x="{x:g}" y="{y + 13:g}" text-anchor="middle">{escape(below)}</text>'
    said = f"{node.below} {node.number}".strip()
    whole = f"<title>{escape(f'{node.name}: {said}' if said else node.name)}</title>"
    inside = f'<g class="{css}" data-node="{number}">{whole}{box}{text}</g>'
    return f'<a href="{escape(node.href)}">{inside}</a>' if node.href else inside


def _fit(text: str, room: float, letter: float) -> str:
    """`text`, cut where it would leave its box."""
    most = max(3, int(room / letter))
    return text if len(text) <= most else text[: most - 1] + "…"
