"""One page for a folder of runs: what came out, where it came from, how it went. `python -m fledge.report OUT`.

The page is a single HTML file: its style, drawings and pictures are inside, it asks the network for nothing and runs no
script. Everything that came from outside (names, samples, captions, configs) is escaped.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import statistics
import struct
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from fledge import svg
from fledge.errors import InputError
from fledge.evals.score import Score
from fledge.progress import clock
from fledge.track import figure, read_json, read_metrics, write_atomic

MOST_CHARTS = 9  # of a stage at first sight; the others are one click away
MOST_ROWS = 12  # of a sample table, likewise
SEES = ("vision-encoder", "image-classifier")
READS = ("text-encoder", "causal-lm", "chat-model", "reward-model")


# --------------------------------------------------------------------------------------------------------- reading


@dataclass
class View:
    """A run folder as it lies on the disk, finished or not."""

    dir: Path
    config: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    identity: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    media: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> View:
        text = folder / "config.yaml"
        return cls(
            dir=folder,
            config=text.read_text(encoding="utf-8") if text.exists() else "",
            metrics=read_metrics(folder / "metrics.jsonl"),
            status=read_json(folder / "status.json", {}),
            attempts=read_json(folder / "environment.json", {}).get("attempts", []),
            identity=read_json(folder / "identity.json", {}),
            manifest=read_json(folder / "artifact" / "manifest.json", {}),
            media=read_json(folder / "media" / "index.json", []),
        )

    @property
    def name(self) -> str:
        return self.dir.name

    @property
    def anchor(self) -> str:
        return f"run-{self.name}"

    @property
    def stage(self) -> str:
        return self.status.get("stage") or self.identity.get("stage") or self.manifest.get("stage") or ""

    @property
    def kind(self) -> str:
        return self.manifest.get("kind", "")

    @property
    def digest(self) -> str:
        return self.manifest.get("digest", "")

    @property
    def seconds(self) -> float:
        return float(self.status.get("seconds", 0.0))

    @cached_property
    def scores(self) -> list[Score]:
        return [Score.from_dict(s) for s in self.manifest.get("metrics", {}).get("scores", [])]

    @cached_property
    def parents(self) -> dict[str, dict[str, Any]]:
        """Role -> what is known of the parent; an unfinished run knows the digests only."""
        return self.manifest.get("parents") or {
            role: {"digest": digest} for role, digest in self.identity.get("parents", {}).items()
        }

    def series(self, key: str) -> list[svg.Point]:
        """(step, value) where `key` was logged; null where it was not finite."""
        return [(r["step"], r[key]) for r in self.metrics if key in r]

    def logged(self) -> list[str]:
        return [k for k in dict.fromkeys(k for r in self.metrics for k in r) if k not in ("step", "nonfinite")]

    def state(self) -> str:
        """finished in 1:10 · going on (step 40) · failed at step 312"""
        state, step = self.status.get("state", "not started"), self.status.get("step") or self._last()
        if state == "finished":
            return f"finished in {clock(self.seconds)}"
        return (
            f"{'not finished' if state in ('running', 'stopped') else state}, step {step}, {clock(self.seconds)} so far"
        )

    def _last(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0


def runs_of(folder: Path) -> list[Path]:
    """The run folders in `folder` by the time they were started; runs that were set aside (NAME~1) are left out."""
    found = [p.parent for p in folder.glob("*/config.yaml") if "~" not in p.parent.name and p.parent.name[0] != "."]
    if not found and (folder / "config.yaml").exists():
        found = [folder]
    return sorted(found, key=lambda p: (read_json(p / "status.json", {}).get("started", 0.0), p.name))


def write(run_dirs: Sequence[Path], path: Path, title: str = "") -> Path:
    """Write the page of these runs, in this order, to `path`."""
    views = [View.read(Path(d)) for d in run_dirs]
    write_atomic(path, page(views, title or path.resolve().parent.name))
    return path


# -------------------------------------------------------------------------------------------------------- the page


def page(views: Sequence[View], title: str) -> str:
    """The whole document."""
    body = [head(views, title), summary(views), lineage(views), *(section(v, views) for v in views), foot(views)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n'
        f'<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main id="top">\n'
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def head(views: Sequence[View], title: str) -> str:
    """Title, when, how long, and in one sentence how it went."""
    began = [v.status["started"] for v in views if "started" in v.status]
    ended = [v.status["updated"] for v in views if "updated" in v.status]
    facts = [f"{len(views)} stage{'s' * (len(views) != 1)}", f"{spoken(sum(v.seconds for v in views))} of work"]
    facts += [span(min(began), max(ended))] if began else []
    links = " ".join(f'<a href="#{escape(v.anchor)}">{escape(v.name)}</a>' for v in views)
    return (
        f"<header><h1>{escape(title)}</h1><p class=facts>{' · '.join(map(escape, facts))}</p>"
        f"<p class=verdict>{escape(verdict(views))}</p><nav>{links}</nav></header>"
    )


def span(first: float, last: float) -> str:
    """3 May 2026, 03:00 to 03:09 UTC"""
    day, hour = (lambda t: time.strftime("%d %b %Y", time.gmtime(t)).lstrip("0")), "%H:%M"
    begin, end = (time.strftime(hour, time.gmtime(t)) for t in (first, last))
    if day(first) != day(last):
        return f"{day(first)}, {begin} to {day(last)}, {end} UTC"
    return f"{day(first)}, {begin} UTC" if begin == end else f"{day(first)}, {begin} to {end} UTC"


def spoken(seconds: float) -> str:
    """42 s, 7 min 42 s, 3 h 5 min"""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def verdict(views: Sequence[View]) -> str:
    """How many figures beat what stands beside them, and by name those that do not."""
    compared = [(v, s) for v in views for s in v.scores if s.before is not None or s.baseline is not None]
    lost = [(v, s, s.shortfall()) for v, s in compared if s.shortfall()]
    waiting = [v.name for v in views if v.status.get("state") != "finished"]
    parts = []
    if compared:
        parts.append(f"{len(compared) - len(lost)} of {len(compared)} figures beat everything that stands beside them.")
    parts += [f"{v.name}: {s.metric} {why}." for v, s, why in lost]
    parts += [f"Not finished: {', '.join(waiting)}."] if waiting else []
    return " ".join(parts)


# ------------------------------------------------------------------------------------------------------ the summary

COLUMNS = ("stage", "metric", "baseline", "before", "after", "95 % interval", "", "n", "time", "artifact")


def summary(views: Sequence[View]) -> str:
    """The table at the top: one row a score. On a phone every row is a card."""
    rows = [row for v in views for row in rows_of(v)]
    if not rows:
        return ""
    header = "".join(f"<th{numeric(c in ('baseline', 'before', 'after', 'n', 'time'))}>{c}</th>" for c in COLUMNS)
    return (
        "<section id=summary><h2>What came out</h2><div class=wide><table class=summary>"
        f"<thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "<p class=legend><span><i class=key-dot></i>after, with its 95 % bootstrap interval</span>"
        "<span><i class=key-ring></i>before</span><span><i class=key-bar></i>baseline</span></p></section>"
    )


def rows_of(view: View) -> list[str]:
    """A row for each score of a run, or one that says that there is none."""
    name = f'<a href="#{escape(view.anchor)}">{escape(view.name)}</a>'
    spent, digest = clock(view.seconds), f"<code>{escape(view.digest[:12])}</code>" if view.digest else "–"
    if not view.scores:
        return [row([name, escape(view.state()), *["–"] * 3, "", "", "–", spent, digest], first=True)]
    return [
        row([name if i == 0 else "", *score_cells(s), spent if i == 0 else "", digest if i == 0 else ""], first=i == 0)
        for i, s in enumerate(view.scores)
    ]


def score_cells(score: Score) -> list[str]:
    """metric, baseline, before, after, interval, its drawing, n."""
    show = digits(score.low, score.high)
    better = "higher is better" if score.higher_is_better else "lower is better"
    metric = (
        f"{escape(score.metric)} <span class=arrow title='{better}'>{'↑' if score.higher_is_better else '↓'}</span>"
    )
    metric += "".join(f"<small>{escape(text)}</small>" for text in [*pairs(score), score.note] if text)
    lacking = score.shortfall()
    metric += f"<span class=short>{escape(lacking)}</span>" if lacking else ""
    baseline = show(score.baseline)
    baseline += f"<small>{escape(score.baseline_name)}</small>" if score.baseline_name else ""
    label = f"{score.metric} {show(score.after)}, 95 % interval {show(score.low)} to {show(score.high)}"
    drawing = svg.interval(score.after, score.low, score.high, score.before, score.baseline, label)
    span = f"{show(score.low)} – {show(score.high)}" if math.isfinite(score.low) else "–"
    after = f"<strong>{show(score.after)}</strong>"
    return [
        metric,
        baseline,
        show(score.before),
        after,
        span,
        drawing,
        f"{score.n:,}<small>{escape(score.unit)}</small>",
    ]


def pairs(score: Score) -> list[str]:
    """The paired differences in words."""
    named = ((score.gain, "before"), (score.lead, score.baseline_name or "baseline"))
    return [f"over {name}, paired: {signed(*interval)}" for interval, name in named if interval is not None]


def signed(low: float, high: float) -> str:
    show = digits(low, high)
    return " to ".join(("+" if v > 0 else "") + show(v) for v in (low, high))


def row(cells: Sequence[str], first: bool) -> str:
    kinds = ("stage", "metric", "num", "num", "num", "span", "draw", "num", "num", "digest")
    inside = "".join(
        f'<td class="{kind}" data-label="{label}">{cell}</td>'
        for kind, label, cell in zip(kinds, COLUMNS, cells, strict=True)
    )
    return f"<tr{' class=first' if first else ''}>{inside}</tr>"


def digits(low: float, high: float) -> Callable[[float | None], str]:
    """How to print figures with this interval: two digits of its width, no more than four decimals."""
    width = high - low
    if not (math.isfinite(width) and width > 0):
        return figure
    places = min(4, max(0, 1 - math.floor(math.log10(width))))
    return lambda v: "–" if v is None or math.isnan(v) else f"{v:,.{places}f}"


def numeric(yes: bool) -> str:
    return " class=num" if yes else ""


# ------------------------------------------------------------------------------------------------------ the lineage


def lineage(views: Sequence[View]) -> str:
    """From pixels and text to the last policy: across for a desk, down for a phone. A click leads to the stage."""
    nodes, edges = family(views)
    if len(views) < 2 and not edges:
        return ""
    return (
        "<section id=lineage><h2>Where it came from</h2>"
        f"<div class=across>{svg.graph(nodes, edges)}</div><div class=down>{svg.graph(nodes, edges, down=True)}</div>"
        "</section>"
    )


def family(views: Sequence[View]) -> tuple[dict[str, svg.Node], list[tuple[str, str]]]:
    """Nodes by artifact digest and edges parent -> child, from the manifests alone: a moved folder keeps its family."""
    nodes: dict[str, svg.Node] = {}
    edges: list[tuple[str, str]] = []
    for view in views:
        nodes[view.digest or f"run {view.name}"] = svg.Node(view.name, *headline(view), f"#{view.anchor}")

    def visit(me: str, kind: str, stage: str, parents: Mapping[str, Mapping[str, Any]], origin: Any) -> None:
        for parent in parents.values():
            digest = str(parent.get("digest", ""))
            if not digest:
                continue
            known = digest in nodes
            name = str(parent.get("name") or digest[:8])
            nodes.setdefault(digest, svg.Node(name, str(parent.get("kind", "")), plain=True))
            edges.append((digest, me))
            if not known:
                visit(digest, str(parent.get("kind", "")), str(parent.get("stage", "")), parent.get("parents") or {},
                      parent.get("origin"))  # fmt: skip
        if not parents:
            for source in ["elsewhere"] if origin else sources(kind, stage):
                nodes.setdefault(source, svg.Node(source, source=True))
                edges.append((source, me))

    for view in views:
        visit(view.digest or f"run {view.name}", view.kind, view.stage, view.parents, view.manifest.get("origin"))
    first = {k: n for k, n in nodes.items() if n.source}
    return first | nodes, edges


def sources(kind: str, stage: str) -> list[str]:
    """What something without parents was raised from."""
    if kind in SEES or stage.endswith((".mae", ".dino", ".classify")):
        return ["pixels"]
    if kind in READS or stage.endswith((".mlm", ".clm", ".sft")):
        return ["text"]
    return ["pixels", "text"] if kind == "dual-encoder" or stage.endswith(".clip") else []


def headline(view: View) -> tuple[str, str]:
    """The first score of a run in a few words, and as a bare number; its kind where there is none."""
    if not view.scores:
        return view.kind or view.status.get("state", ""), ""
    score = view.scores[0]
    number = digits(score.low, score.high)(score.after)
    return f"{score.metric} {number}", number


# ------------------------------------------------------------------------------------------------------- one stage


def section(view: View, views: Sequence[View]) -> str:
    """All of one run: facts, curves, pictures, samples, config."""
    kind = f"<span class=kind>{escape(view.kind)}</span>" if view.kind else ""
    parts = [
        f"<h2>{escape(view.name)} {kind}</h2>",
        f"<p class=facts><code>{escape(view.stage)}</code> · {escape(view.state())}</p>",
        facts(view, views),
        charts(view),
        frontier(view),
        calibration(view),
        gallery(view),
        details("Config", f"<pre>{escape(view.config)}</pre>") if view.config else "",
        hand_off(view),
        attempts(view),
    ]
    return f'<section class=stage id="{escape(view.anchor)}">{"".join(parts)}</section>'


def facts(view: View, views: Sequence[View]) -> str:
    """Parents, scores, throughput, and the machine, as a list of terms."""
    terms = {
        "raised from": ", ".join(parent_link(role, p, views) for role, p in view.parents.items()),
        **{escape(s.metric): score_line(s) for s in view.scores},
        "speed": escape(throughput(view)),
        "artifact": f"<code>{escape(view.digest[:12])}</code>" if view.digest else "",
        "not finite": escape(nonfinite(view)),
        "machine": f"<small>{escape(machine(view.attempts[-1]))}</small>" if view.attempts else "",
    }
    rows = "".join(
        f"<div{' class=row' if term == 'machine' else ''}><dt>{term}</dt><dd>{text}</dd></div>"
        for term, text in terms.items()
        if text
    )
    return f"<dl>{rows}</dl>" if rows else ""


def parent_link(role: str, parent: Mapping[str, Any], views: Sequence[View]) -> str:
    digest = str(parent.get("digest", ""))
    here = next((v for v in views if v.digest and v.digest == digest), None)
    name = escape(here.name if here else str(parent.get("name") or digest[:12]))
    text = f'<a href="#{escape(here.anchor)}">{name}</a>' if here else name
    return f"{text} <small>({escape(role)})</small>"


def score_line(score: Score) -> str:
    """after, in bold, and beside it what it is compared with."""
    show = digits(score.low, score.high)
    beside = [f"before {show(score.before)}"] if score.before is not None else []
    beside += [f"{score.baseline_name or 'baseline'} {show(score.baseline)}"] if score.baseline is not None else []
    tail = f" <small>{escape(', '.join(beside))}</small>" if beside else ""
    lacking = score.shortfall()
    return f"<strong>{show(score.after)}</strong>{tail}" + (
        f" <span class=short>{escape(lacking)}</span>" if lacking else ""
    )


def throughput(view: View) -> str:
    """Median step and rows per second, and the share of time that waited for data."""
    steps = [y for _, y in view.series("time/step") if y]
    rows = [y for _, y in view.series("time/rows_per_second") if y]
    waits = [y for _, y in view.series("time/data") if y is not None]
    parts = [f"{statistics.median(steps) * 1000:,.3g} ms a step"] if steps else []
    parts += [f"{statistics.median(rows):,.0f} rows a second"] if rows else []
    parts += [f"{sum(waits) / sum(steps):.1%} waiting for data"] if steps and waits else []
    return ", ".join(parts)


def machine(attempt: Mapping[str, Any]) -> str:
    """Device, cores, Python and the libraries that matter to the result."""
    packages = attempt.get("packages", {})
    parts = [
        str(attempt.get("device", "")),
        f"{attempt.get('cores', '?')} cores",
        f"Python {attempt.get('python', '?')}",
    ]
    parts += [f"{name} {packages[name]}" for name in ("torch", "timm", "transformers") if name in packages]
    git = attempt.get("git")
    parts += [f"git {git['revision'][:10]}{' with changes' * bool(git.get('changed'))}"] if git else []
    return ", ".join(p for p in parts if p)


def nonfinite(view: View) -> str:
    count = sum(1 for r in view.metrics if "nonfinite" in r)
    return f"{count} logged step{'s' * (count != 1)}; gaps in the curves" if count else ""


# ---- curves


def charts(view: View) -> str:
    """Small multiples of all that was logged; the most telling first."""
    keys = sorted((k for k in view.logged() if len(view.series(k)) > 1), key=order)
    drawn = [chart(k, view.series(k)) for k in keys if not k.startswith("time/data")]
    if not drawn:
        return ""
    first = f"<div class=charts>{''.join(drawn[:MOST_CHARTS])}</div>"
    rest = f"<div class=charts>{''.join(drawn[MOST_CHARTS:])}</div>"
    return first + (details(f"{len(drawn) - MOST_CHARTS} more curves", rest) if len(drawn) > MOST_CHARTS else "")


def order(key: str) -> tuple[int, str]:
    """The loss, then evaluations, the other terms, gradient norm, rate, time."""
    last = {"train/loss": 0, "train/grad_norm": 3, "train/lr": 4}
    group, _, _ = key.partition("/")
    return last.get(key, {"eval": 1, "train": 2, "time": 6}.get(group, 5)), key


def chart(key: str, points: Sequence[svg.Point]) -> str:
    """One quantity over steps with its name and last value."""
    noisy = key.startswith(("train/", "time/")) and key != "train/lr"
    final = next((y for _, y in reversed(points) if y is not None), None)
    group, slash, name = key.rpartition("/")
    title = f"<span class=group>{escape(group + slash)}</span>{escape(name)}"
    drawing = svg.curve(points, noisy=noisy, label=f"{key}: {figure(points[0][1])} to {figure(final)}")
    return f"<figure class=chart><figcaption><span>{title}</span><b>{figure(final)}</b></figcaption>{drawing}</figure>"


def frontier(view: View) -> str:
    """What a policy gained against how far it went: the gold score over KL, where a run logs both."""
    gold, kl = dict(view.series("eval/gold")), dict(view.series("eval/kl"))
    points = [(kl[s], gold[s]) for s in gold if s in kl and gold[s] is not None and kl[s] is not None]
    if len(points) < 2:
        return ""
    drawing = svg.scatter(points, "KL to the reference", "gold score", joined=True)  # type: ignore[arg-type]
    return (
        f"<div class=charts><figure class=chart><figcaption><span>frontier</span></figcaption>{drawing}</figure></div>"
    )


def calibration(view: View) -> str:
    """Predicted against observed share, where a stage publishes `calibration=[{"predicted": p, "observed": q}, …]`."""
    bins = view.manifest.get("metrics", {}).get("calibration") or []
    points = [(b["predicted"], b["observed"]) for b in bins if b.get("observed") is not None]
    if not points:
        return ""
    drawing = svg.scatter(points, "predicted", "observed", diagonal=True)
    return titled("calibration", drawing)


def titled(title: str, drawing: str) -> str:
    """One drawing by itself, as wide as a curve."""
    head = f"<figcaption><span>{escape(title)}</span></figcaption>"
    return f"<div class=charts><figure class=chart>{head}{drawing}</figure></div>"


# ---- pictures and samples


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
    image = f'<img{small} src="{source}" alt="{escape(caption)}" width="{width}" height="{height}" loading="lazy">'
    return f"<figure class=picture><div class=scroll>{image}</div><figcaption>{escape(caption)}</figcaption></figure>"


def samples(path: Path, caption: str) -> str:
    rows = [r for r in json.loads(path.read_text(encoding="utf-8")) if isinstance(r, dict)]
    if not rows:
        return ""
    columns = list(dict.fromkeys(k for r in rows for k in r))
    number = lambda v: v is None or (isinstance(v, (int, float)) and not isinstance(v, bool))  # noqa: E731
    numbers = {c for c in columns if all(number(r.get(c)) for r in rows)}
    table = lambda some: samples_table(columns, numbers, some)  # noqa: E731
    rest = details(f"{len(rows) - MOST_ROWS} more rows", table(rows[MOST_ROWS:])) if len(rows) > MOST_ROWS else ""
    return f"<figure class=samples><figcaption>{escape(caption)}</figcaption>{table(rows[:MOST_ROWS])}{rest}</figure>"


def samples_table(columns: Sequence[str], numbers: set[str], rows: Iterable[Mapping[str, Any]]) -> str:
    header = "".join(f"<th{numeric(c in numbers)}>{escape(c)}</th>" for c in columns)
    one = lambda c, v: f'<td{numeric(c in numbers)} data-label="{escape(c)}">{cell(v)}</td>'  # noqa: E731
    body = "".join("<tr>" + "".join(one(c, r.get(c)) for c in columns) + "</tr>" for r in rows)
    return f"<div class=scroll><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>"


def cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return escape(figure(value) if isinstance(value, float) else str(value))


# ---- the small print


def details(title: str, inside: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


def hand_off(view: View) -> str:
    """What the artifact says of itself, without what the page shows already."""
    known = ("files", "seal", "parents", "metrics", "config", "digest", "kind")
    rest = {k: v for k, v in view.manifest.items() if k not in known and v not in (None, {}, [], "")}
    other = {k: v for k, v in view.manifest.get("metrics", {}).items() if k not in ("scores", "calibration")}
    if other:
        rest["metrics"] = other
    text = json.dumps(rest, indent=2, ensure_ascii=False)
    return details("Artifact", f"<pre>{escape(text)}</pre>") if rest else ""


def attempts(view: View) -> str:
    """Where the run was worked on, and how often it was begun."""
    if not view.attempts:
        return ""
    title = "Environment" if len(view.attempts) == 1 else f"Environment ({len(view.attempts)} attempts)"
    return details(title, f"<pre>{escape(json.dumps(view.attempts[-1], indent=2, ensure_ascii=False))}</pre>")


def foot(views: Sequence[View]) -> str:
    version = next(
        (a["packages"]["fledge"] for v in views for a in v.attempts if "fledge" in a.get("packages", {})), ""
    )
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return (
        f"<footer>fledge {escape(version)} · page made {made} · pale: every value, line: their moving mean · "
        "all numbers are in each run’s metrics.jsonl and manifest.json</footer>"
    )


CSS = """
:root{--paper:#fcfcfa;--card:#fff;--ink:#1b1d1f;--soft:#5f6467;--faint:#8b9094;--rule:#e5e5e0;--accent:#0b6e69;
--wash:#0b6e6918;--serif:ui-serif,"Iowan Old Style","Palatino Linotype",Palatino,"Source Serif 4",Georgia,serif;
--sans:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"Noto Sans",sans-serif;
--mono:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media (prefers-color-scheme:dark){:root{--paper:#141617;--card:#1a1d1e;--ink:#e8e7e3;--soft:#a3a7a8;--faint:#7c8184;
--rule:#2c3032;--accent:#5cc8bd;--wash:#5cc8bd22}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.55 var(--sans);font-variant-numeric:tabular-nums}
main{max-width:1240px;margin:0 auto;padding:56px 32px 40px}
h1,h2{font-family:var(--serif);font-weight:500;letter-spacing:-.012em;line-height:1.15;margin:0}
h1{font-size:42px}
h2{font-size:27px;margin-bottom:18px}
a{color:var(--accent);text-decoration:none}
a:hover{text-decoration:underline}
small{display:inline;color:var(--faint);font-size:12px}
code,pre{font:12.5px/1.6 var(--mono)}
header{margin-bottom:8px}
.facts{color:var(--soft);margin:10px 0 0}
.verdict{font-family:var(--serif);font-size:19px;line-height:1.5;max-width:44em;margin:18px 0 0}
nav{display:flex;flex-wrap:wrap;gap:6px 18px;margin-top:22px}
section{margin-top:60px;scroll-margin-top:16px}
section.stage{border-top:1px solid var(--rule);padding-top:36px;margin-top:56px}
section.stage h2{margin-bottom:0;display:flex;flex-wrap:wrap;align-items:baseline;gap:4px 12px}
.kind{font:13px/1 var(--sans);letter-spacing:0;color:var(--soft)}
.scroll,.wide{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;width:100%}
th{font-weight:500;font-size:12px;color:var(--faint);text-align:left;padding:0 14px 8px 0;white-space:nowrap;
border-bottom:1px solid var(--rule)}
td{padding:9px 14px 9px 0;vertical-align:top}
.num{text-align:right;white-space:nowrap}
th.num{text-align:right}
th:last-child,td:last-child{padding-right:0}
.summary tr.first td{border-top:1px solid var(--rule)}
.summary tbody tr:first-child td{border-top:0}
.summary td small{display:block;line-height:1.35}
.summary .stage{font-weight:600;white-space:nowrap}
.summary .metric{min-width:220px}
.summary .num small{white-space:normal}
.summary .span{white-space:nowrap;color:var(--soft)}
.summary .draw{width:140px;padding-top:8px}
.summary .draw svg{display:block;width:140px;height:24px}
.summary .digest{color:var(--soft)}
.arrow{color:var(--faint)}
.short{display:inline-block;font-size:12px;line-height:1.4;color:var(--ink);
border:1px solid var(--soft);border-radius:5px;
padding:1px 7px;margin-top:4px}
.summary .short{display:block;width:fit-content}
.legend{display:flex;flex-wrap:wrap;gap:4px 22px;font-size:12px;color:var(--faint);margin:14px 0 0}
.legend i{display:inline-block;margin-right:7px;vertical-align:middle}
.key-dot{width:18px;height:8px;background:radial-gradient(circle,var(--accent) 3.6px,transparent 4px),
linear-gradient(var(--accent),var(--accent)) center/18px 2px no-repeat}
.key-ring{width:8px;height:8px;border:1.5px solid var(--soft);border-radius:50%}
.key-bar{width:2px;height:12px;background:var(--soft)}
svg{display:block;width:100%;height:auto}
svg text{font-family:var(--sans);fill:var(--ink)}
.tick{font-size:10px;fill:var(--faint)!important}
.rule{stroke:var(--rule);fill:none}
.frame{stroke:var(--faint);fill:none;opacity:.6}
.line{stroke:var(--accent);stroke-width:1.7;fill:none;stroke-linejoin:round;stroke-linecap:round}
.pale{stroke:var(--accent);stroke-width:1;fill:none;opacity:.28;stroke-linejoin:round}
.band{fill:var(--wash)}
.zero{stroke:var(--faint);stroke-dasharray:3 3;fill:none}
.dot{fill:var(--accent)}
.start{fill:var(--paper);stroke:var(--soft);stroke-width:1.5}
.base{stroke:var(--soft);stroke-width:2}
.mark{stroke:var(--accent);stroke-width:2.2;stroke-linecap:round}
.graph{margin:0 auto;overflow:visible}
.across{overflow-x:auto;padding:2px}
.down{display:none}
.edge{fill:none;stroke:var(--faint);stroke-width:1.3;opacity:.55}
.node rect{fill:var(--card);stroke:var(--rule);stroke-width:1.2}
.node.plain rect{stroke-dasharray:4 3}
.node.source rect{fill:var(--wash);stroke:none}
.node .name{font-size:13px;font-weight:600}
.node .below{font-size:10.5px;fill:var(--soft)}
a:hover .node rect,a:focus .node rect{stroke:var(--accent)}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:14px 32px;margin:22px 0 0}
dt{font-size:12px;color:var(--faint)}
dd{margin:1px 0 0}
dl .row{grid-column:1/-1}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:26px 30px;margin-top:30px}
figure{margin:0}
.chart figcaption{display:flex;justify-content:space-between;gap:12px;font-size:13px;margin-bottom:4px;
overflow-wrap:anywhere}
.chart b{font-weight:600}
.group{color:var(--faint)}
.picture,.samples{margin-top:32px}
.picture img{display:block;max-width:100%;height:auto;border-radius:6px;background:var(--card)}
.picture .pixels{image-rendering:pixelated;width:max(50%,240px)}
.picture figcaption{color:var(--soft);font-size:13px;margin-top:8px;max-width:60em}
.samples figcaption{color:var(--soft);font-size:13px;margin-bottom:12px}
.samples td{border-top:1px solid var(--rule);white-space:pre-wrap;overflow-wrap:anywhere;min-width:7em;font-size:13.5px}
.samples td.num{min-width:0;white-space:nowrap}
.samples tbody tr:first-child td{border-top:0}
details{margin-top:14px}
.stage>details:first-of-type{margin-top:30px}
summary{cursor:pointer;color:var(--soft);font-size:13.5px;width:fit-content}
summary:hover{color:var(--accent)}
pre{background:var(--card);border:1px solid var(--rule);border-radius:6px;padding:14px 16px;overflow-x:auto;
margin:10px 0 0}
footer{margin-top:72px;padding-top:18px;border-top:1px solid var(--rule);color:var(--faint);font-size:12px}
@media (max-width:720px){
main{padding:32px 18px 28px}
h1{font-size:31px}h2{font-size:23px}
.verdict{font-size:17px}
section{margin-top:44px}
.across{display:none}.down{display:block}
.node .name{font-size:12px}.node .below{font-size:9.5px}
.summary thead{display:none}
.summary,.summary tbody{display:block}
.summary tr{display:grid;grid-template-columns:repeat(3,1fr);gap:6px 12px;padding:14px 0;
border-top:1px solid var(--rule)}
.summary tbody tr:first-child{border-top:0}
.summary tr:not(.first){border-top-style:dashed}
.summary td{display:block;padding:0;border:0!important;text-align:left;white-space:normal;min-width:0}
.summary td:empty{display:none}
.summary td[data-label]:not([data-label=""]):not(.stage):not(.metric)::before{content:attr(data-label);display:block;
font-size:11px;color:var(--faint)}
.summary .stage,.summary .metric{grid-column:1/-1}
.summary .stage{font-size:17px}
.summary .span{grid-column:span 2}
.summary .draw{grid-column:1/-1;padding:0;width:auto;order:1}
.summary .draw svg{width:200px;height:34px;margin-left:-6px}
.samples thead{display:none}
.samples tr{display:block;padding:10px 0;border-top:1px solid var(--rule)}
.samples td,.samples td.num{display:flex;gap:12px;border:0;padding:2px 0;text-align:left;white-space:pre-wrap}
.samples td::before{content:attr(data-label);flex:0 0 6em;color:var(--faint);font-size:12px;overflow-wrap:anywhere}
.charts{grid-template-columns:1fr}
}
@media print{
:root{--paper:#fff;--card:#fff;--ink:#000;--soft:#444;--faint:#666;--rule:#ccc;--accent:#0b6e69}
body{font-size:10.5pt}main{max-width:none;padding:0}nav,details{display:none}
figure,tr,dl,.across{break-inside:avoid}h2{break-after:avoid}
.charts{grid-template-columns:repeat(3,1fr);gap:14px}.summary{font-size:8.5pt}.summary td,.summary th{padding-right:8px}
.summary td.draw,.summary th:nth-child(7){display:none}.wide,.scroll,.across{overflow:visible}.legend{display:none}
.summary .metric{min-width:0}.summary code{font-size:7pt}
a{color:inherit}
}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fledge.report", description="Write OUT/report.html from a folder of runs."
    )
    parser.add_argument("out", type=Path, help="folder of runs, or one run")
    parser.add_argument("--title", default="", help="heading of the page; by default the folder's name")
    options = parser.parse_args(arguments)
    try:
        runs = runs_of(options.out)
        if not runs:
            raise InputError(
                f"{options.out}: no run in it; expected folders with a config.yaml, as `fledge run` writes them"
            )
        print(write(runs, options.out / "report.html", options.title or options.out.resolve().name))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
