"""Two models side by side, as `fledge compare` found them: in the terminal, or on a page of their own."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fledge.report.markup import details, digits, table, terms
from fledge.report.media import cell
from fledge.report.page import document
from fledge.track import figure

MOST_ROWS = 20  # of the table at first sight; the others are one click away
Found = Mapping[str, Any]


def facts(found: Found) -> list[tuple[str, str]]:
    """What was measured: (term, words)."""
    win, score, length = found["win"], found["score"], found["length"]
    said = [
        ("b wins", f"{share(win)}; {tally(win)}; sign test p {figure(win['p'])}"),
        ("mean score", f"a {figure(score['a'])}, b {figure(score['b'])}; {gain(score)}" if score else ""),
        ("mean length", f"a {figure(length['a'])}, b {figure(length['b'])} characters; {by_length(length)}"),
        ("KL of b to a", "" if found["kl"] is None else f"{figure(found['kl'])} nats an answer"),
        ("same verdict in either order", "" if found["consistent"] is None else f"{found['consistent']:.1%}"),
        ("judge", str(found["judge"])),
        ("prompts", prompts(found)),
    ]
    return [(term, text) for term, text in said if text]


def share(win: Found) -> str:
    return f"{win['rate']:.1%} [{win['low']:.1%}, {win['high']:.1%}]"


def tally(win: Found) -> str:
    return f"{win['wins']:,} wins, {win['ties']:,} ties (half a win each), {win['losses']:,} losses"


def gain(score: Found) -> str:
    show = digits(score["low"], score["high"])
    return f"b - a {show(score['difference'])} [{show(score['low'])}, {show(score['high'])}]"


def by_length(length: Found) -> str:
    """Whether the longer answer wins, and who wins where neither is longer."""
    longer, similar = length["longer_wins"], length["similar"]
    parts = [f"the longer answer wins {longer:.1%}"] if longer is not None else []
    if similar is not None:
        parts.append(f"where lengths are within a tenth ({similar['n']:,}) b wins {share(similar)}")
    return "; ".join(parts) or "no two answers of similar length"


def prompts(found: Found) -> str:
    """How many of which, and how they were answered."""
    how = "greedy" if found["greedy"] else f"temperature {found['temperature']:g}, seed {found['seed']}"
    units = "" if found["unit"] == "prompts" else f" about {found['units']:,} {found['unit']}"
    which = f", {found['split']}" if found["data"] == "world" else ""
    return f"{found['n']:,}{units} ({found['data']}{which}); {how}, at most {found['max_new_tokens']} tokens"


# ---------------------------------------------------------------------------------------------------------- terminal


def text(found: Found, width: int = 100, most: int = 8) -> str:
    """For a terminal: the two models, what was measured, and the first answers side by side."""
    head = [f"{side}  {found[side]['path']} ({found[side]['stage']} {found[side]['digest'][:12]})" for side in "ab"]
    longest = max(len(term) for term, _ in facts(found))
    lines = [*head, ""]
    for term, words in facts(found):
        lines += textwrap.wrap(words, max(width, 40), initial_indent=term.ljust(longest + 2),
                               subsequent_indent=" " * (longest + 2))  # fmt: skip
    return "\n".join([*lines, "", *side_by_side(found["rows"][:most], width)])


def side_by_side(rows: Sequence[Found], width: int) -> list[str]:
    """Three columns: prompt, a, b; the answer that won is marked with a star."""
    column = max(12, (width - 8) // 3)
    lines = ["   ".join(name.ljust(column) for name in ("prompt", "a", "b")).rstrip(), ("─" * column + "   ") * 3]
    for row in rows:
        stars = ("", "* " if row["preference"] < 0 else "", "* " if row["preference"] > 0 else "")
        cells = [wrapped(star + str(row[k]), column) for star, k in zip(stars, ("prompt", "a", "b"), strict=True)]
        for n in range(max(map(len, cells))):
            lines.append("   ".join((c[n] if n < len(c) else "").ljust(column) for c in cells).rstrip())
    return [line.rstrip() for line in lines]


def wrapped(words: str, column: int) -> list[str]:
    """Lines of a cell; control characters of an answer do not reach the terminal."""
    plain = "".join(c if c.isprintable() else " " for c in words)
    return textwrap.wrap(plain, column) or [""]


# -------------------------------------------------------------------------------------------------------------- page


def page(found: Found) -> str:
    """One HTML file in the report's style: no network, no script."""
    title = f"{found['a']['name']} and {found['b']['name']}, side by side"
    models = [(side, f"<code>{escape(found[side]['path'])}</code> {model(found[side])}") for side in "ab"]
    rows = found["rows"]
    more = (
        details(f"{len(rows) - MOST_ROWS:,} more prompts", answers(rows[MOST_ROWS:])) if len(rows) > MOST_ROWS else ""
    )
    body = (
        f"<header><h1>{escape(title)}</h1><p class=verdict>{escape(verdict(found))}</p></header>"
        f"<section>{terms(models, 'figures')}{terms([(escape(t), escape(w)) for t, w in facts(found)], 'figures')}"
        f"</section><section class=samples><h2>Answers</h2>{answers(rows[:MOST_ROWS])}{more}</section>"
    )
    return document(title, body)


def model(side: Found) -> str:
    return f"<small>{escape(side['stage'])} {escape(side['digest'][:12])}</small>"


def verdict(found: Found) -> str:
    """Who wins, in a sentence, by the interval of the win rate."""
    win = found["win"]
    name = found["b"]["name"] if win["low"] > 0.5 else found["a"]["name"] if win["high"] < 0.5 else ""
    said = f"{name} wins" if name else "Neither wins beyond chance"
    return f"{said}: b is preferred in {share(win)} of the prompts."


def answers(rows: Sequence[Found]) -> str:
    columns = list(dict.fromkeys(k for row in rows for k in row))
    numbers = [c for c in columns if c not in ("prompt", "a", "b")]
    return table(columns, ([cell(row.get(c)) for c in columns] for row in rows), numbers)
