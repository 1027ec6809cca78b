"""All of one run: figures, parents, what its config departs in, health, curves, pictures, samples, environment."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fledge.evals.score import Score
from fledge.progress import clock
from fledge.report.figures import calibration, charts
from fledge.report.frontier import frontier
from fledge.report.markup import details, digits, table, terms
from fledge.report.media import gallery
from fledge.report.view import HEALTH, View


def section(view: View, views: Sequence[View]) -> str:
    """What a click on the stage leads to."""
    kind = f"<span class=kind>{escape(view.kind)}</span>" if view.kind else ""
    back = "<a class=back href=#lineage>lineage ↑</a>" if len(views) > 1 else ""
    parts = [
        f"<h2>{escape(view.name)} {kind}{back}</h2>",
        f"<p class=facts><code>{escape(view.stage)}</code> · {escape(view.state())}</p>",
        facts(view, views),
        config(view),
        charts(view),
        frontier(view),
        calibration(view),
        gallery(view),
        hand_off(view),
        environment(view),
    ]
    return f'<section class=stage id="{escape(view.anchor)}">{"".join(parts)}</section>'


def facts(view: View, views: Sequence[View]) -> str:
    """Parents, children, figures, and how the steps went."""
    family = [
        ("raised from", ", ".join(parent_link(role, p, views) for role, p in view.parents.items())),
        ("raised", ", ".join(child_links(view, views))),
        ("artifact", f"<code>{escape(view.digest[:12])}</code>" if view.digest else ""),
        ("handed over", escape(taken(view))),
    ]
    figures = [(escape(s.metric), score_line(s)) for s in view.scores]
    health = [(f'<span title="{escape(HEALTH[k])}">{escape(k)}</span>', escape(v)) for k, v in view.health.items()]
    return terms(figures, "figures") + terms(family) + terms(health, "health")


def parent_link(role: str, parent: Mapping[str, Any], views: Sequence[View]) -> str:
    digest = str(parent.get("digest", ""))
    here = next((v for v in views if v.digest and v.digest == digest), None)
    text = link(here) if here else escape(str(parent.get("name") or digest[:12]))
    return f"{text} <small>({escape(role)})</small>"


def child_links(view: View, views: Sequence[View]) -> list[str]:
    children = (v for v in views if any(p.get("digest") == view.digest for p in v.parents.values()))
    return [link(v) for v in children] if view.digest else []


def link(view: View) -> str:
    return f'<a href="#{escape(view.anchor)}">{escape(view.name)}</a>'


def taken(view: View) -> str:
    """Which checkpoint it is, where that is not simply the last."""
    found = view.manifest.get("checkpoint")
    return f"step {found['step']} of {found['of']}, {found['why']}" if found else ""


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


# ---- config


def config(view: View) -> str:
    """What departs from the published recipe, which the class defaults are; then all of it, folded."""
    whole = details("The whole config", f"<pre>{escape(view.config)}</pre>") if view.config else ""
    if not view.departures:
        return whole
    entries = terms(((escape(key), departure(found)) for key, found in view.departures.items()), "departures")
    return f"<h3>What departs from the published recipe</h3>{entries}{whole}"


def departure(found: Mapping[str, Any]) -> str:
    """The value, and the one that it takes the place of."""
    instead = f" <s>{escape(plain(found['default']))}</s>" if "default" in found else ""
    return f"{escape(plain(found.get('value')))}{instead}"


def plain(value: Any) -> str:
    """A value of a config, as YAML would have it on one line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(plain(v) for v in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


# ---- the small print


def hand_off(view: View) -> str:
    """What the artifact says of itself, without what the page shows already."""
    known = ("files", "seal", "parents", "metrics", "config", "digest", "kind", "checkpoint")
    rest = {k: v for k, v in view.manifest.items() if k not in known and v not in (None, {}, [], "")}
    other = {
        k: v for k, v in view.measured.items() if k not in ("scores", "calibration", "margins", "annotated_margins")
    }
    if other:
        rest["metrics"] = other
    text = json.dumps(rest, indent=2, ensure_ascii=False)
    return details("Artifact", f"<pre>{escape(text)}</pre>") if rest else ""


def environment(view: View) -> str:
    """Where the run was worked on, attempt by attempt, and with which versions."""
    if not view.attempts:
        return ""
    title = "Environment" if len(view.attempts) == 1 else f"Environment ({len(view.attempts)} attempts)"
    rows = [attempt(i, found) for i, found in enumerate(view.attempts, 1)]
    last = view.attempts[-1]
    packages = " · ".join(f"{escape(k)} {escape(str(v))}" for k, v in last.get("packages", {}).items())
    beside = terms([("packages", packages), ("logs", escape(str(last.get("logs", ""))))], "wide")
    return details(title, table(("attempt", "started", "machine", "ranks", "git", "changed"), rows) + beside)


def attempt(number: int, found: Mapping[str, Any]) -> list[str]:
    """One row: when, on what, how many ranks, which revision, and what was other than before."""
    started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(found["started"])) if "started" in found else "–"
    hosts = found.get("hosts") or {}
    ranks = str(found.get("world_size", 1)) + (f" on {len(hosts)} hosts" if len(hosts) > 1 else "")
    git = found.get("git")
    revision = f"{git['revision'][:10]}{' with changes' * bool(git.get('changed'))}" if git else "–"
    changed = ", ".join(found.get("changed", [])) or "–"
    return [escape(text) for text in (str(number), started, machine(found), ranks, revision, changed)]


def machine(found: Mapping[str, Any]) -> str:
    """Device, cores, Python and system."""
    parts = [found.get("device"), f"{found.get('cores', '?')} cores", f"Python {found.get('python', '?')}"]
    return ", ".join(str(p) for p in [*parts, found.get("system")] if p)


# ---- how all of them went

TIMES = ("stage", "steps", "time", *HEALTH, "attempts")


def health(views: Sequence[View]) -> str:
    """One row a run: what its steps took and how they went. A column that no run knows is left out."""
    rows = [{"stage": link(v), **health_row(v)} for v in views if v.health]
    columns = [c for c in TIMES if any(row.get(c) for row in rows)]
    if not rows:
        return ""
    cells = ([row.get(c) or "–" for c in columns] for row in rows)
    said = terms(((escape(k), escape(HEALTH[k])) for k in HEALTH if k in columns), "meanings")
    return (
        f"<section id=health><h2>How it ran</h2>{table(columns, cells, columns[1:], 'cards health')}"
        f"{details('What the columns mean', said)}</section>"
    )


def health_row(view: View) -> dict[str, str]:
    steps = view.status.get("step") or (view.metrics[-1]["step"] + 1 if view.metrics else 0)
    found = {"steps": f"{steps:,}", "time": clock(view.seconds), **view.health}
    return {k: escape(v) for k, v in found.items()} | {"attempts": str(len(view.attempts)) if view.attempts else ""}
