"""The document: head, summary, lineage, how it ran, runs side by side, one section a stage."""

from __future__ import annotations

import argparse
import base64
import hashlib
import math
import sys
import time
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path

from fledge import svg
from fledge.errors import InputError
from fledge.evals.score import Score
from fledge.progress import clock
from fledge.report.figures import compared
from fledge.report.frontier import followed
from fledge.report.lineage import lineage
from fledge.report.markup import digits, numeric, signed
from fledge.report.stage import health, section
from fledge.report.view import View, alike, runs_of
from fledge.track import write_atomic


def write(run_dirs: Sequence[Path], path: Path, title: str = "") -> Path:
    """Write the page of these runs, in this order, to `path`."""
    views = [View.read(Path(d)) for d in run_dirs]
    write_atomic(path, page(views, title or path.resolve().parent.name))
    return path


@cache
def asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def page(views: Sequence[View], title: str) -> str:
    """The whole document."""
    body = [
        head(views, title),
        summary(views),
        lineage(views),
        health(views),
        side_by_side(views),
        *(section(v, views) for v in views),
        foot(views),
    ]
    return document(title, "\n".join(part for part in body if part), asset("script.js"))


def document(title: str, body: str, script: str = "") -> str:
    """A page of its own. The one script that may run is the given one, by its hash; nothing is asked of the network."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if script else "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<title>{escape(title)}</title>\n<style>{asset("style.css")}</style>\n</head>\n<body>\n<main id="top">\n'
        f"{body}\n</main>\n{f'<script>{script}</script>' if script else ''}\n</body>\n</html>\n"
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
    metric += "".join(f"<small>{escape(text)}</small>" for text in [*differences(score), score.note] if text)
    lacking = score.shortfall()
    metric += f"<span class=short>{escape(lacking)}</span>" if lacking else ""
    baseline = show(score.baseline)
    baseline += f"<small>{escape(score.baseline_name)}</small>" if score.baseline_name else ""
    label = f"{score.metric} {show(score.after)}, 95 % interval {show(score.low)} to {show(score.high)}"
    drawing = svg.interval(score.after, score.low, score.high, score.before, score.baseline, label)
    span = f"{show(score.low)} – {show(score.high)}" if math.isfinite(score.low) else "–"
    after = f"<strong>{show(score.after)}</strong>"
    n = f"{score.n:,}<small>{escape(score.unit)}</small>"
    return [metric, baseline, show(score.before), after, span, drawing, n]


def differences(score: Score) -> list[str]:
    """The paired differences in words."""
    named = ((score.gain, "before"), (score.lead, score.baseline_name or "baseline"))
    return [f"over {name}, paired: {signed(*interval)}" for interval, name in named if interval is not None]


def row(cells: Sequence[str], first: bool) -> str:
    kinds = ("stage", "metric", "num", "num", "num", "span", "draw", "num", "num", "digest")
    inside = "".join(
        f'<td class="{kind}" data-label="{label}">{cell}</td>'
        for kind, label, cell in zip(kinds, COLUMNS, cells, strict=True)
    )
    return f"<tr{' class=first' if first else ''}>{inside}</tr>"


# ---------------------------------------------------------------------------------------------------------- the rest


def side_by_side(views: Sequence[View]) -> str:
    """Runs of the same stage in the same charts, where there are several."""
    shown = "".join(compared(group) + followed(group) for group in alike(views))
    return f"<section id=compared><h2>Side by side</h2>{shown}</section>" if shown else ""


def foot(views: Sequence[View]) -> str:
    version = next(
        (a["packages"]["fledge"] for v in views for a in v.attempts if "fledge" in a.get("packages", {})), ""
    )
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return (
        f"<footer>fledge {escape(version)} · page made {made} · pale: every value, line: their moving mean · "
        "all numbers are in each run’s metrics.jsonl and manifest.json</footer>"
    )


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
