"""PPO's frontier: what a policy gained against how far it went; and how far a reward can be followed at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from fledge import svg
from fledge.evals.overoptimisation import Fit, fit
from fledge.report.figures import LINES, framed
from fledge.report.view import View
from fledge.track import figure

ENOUGH = 6  # points of a curve of three parameters
AT_START = 1e-4  # a KL below which the policy is its reference


def frontier(view: View) -> str:
    """What a policy gained against how far it went from its reference (Gao et al. 2023, "Scaling Laws for Reward Model
    Overoptimization"): the score that it learned from, update by update, and the judged score before and after."""
    scores = dict(view.series("train/objective/score"))
    both = [(step, kl, scores.get(step)) for step, kl in view.series("train/objective/kl")]
    seen = [(step, kl, score) for step, kl, score in both if kl is not None and score is not None]
    parts = [learned(seen)] if len(seen) > 1 else []
    parts += [judged(view)] if view.stage.endswith(".ppo") else []
    return (f"<div class=charts>{''.join(parts)}</div>" if any(parts) else "") + followed([view])


def learned(seen: Sequence[tuple[float, float, float]]) -> str:
    """(update, KL, score): points that grow darker with time, and their moving mean."""
    last = max(len(seen) - 1, 1)
    said = [f"update {step:g} · KL {figure(kl)} · {figure(score)}" for step, kl, score in seen]
    marks = [
        svg.Mark(kl, score, text, radius=2.6, weight=0.2 + 0.7 * i / last)
        for i, ((_, kl, score), text) in enumerate(zip(seen, said, strict=True))
    ]
    window = max(3, len(seen) // 6)
    means = [svg.smooth([(s, p[i]) for s, *p in seen], window) for i in (0, 1)]
    path = [(a, b) for (_, a), (_, b) in zip(*means, strict=True) if a is not None and b is not None]
    drawing = svg.scatter(marks, "KL to the reference, nats an answer", "score by the reward", path=path)
    return framed("frontier: what it learned from", "", drawing)


def judged(view: View) -> str:
    """The first score before and after, by whoever judged held-out answers."""
    score, kl = next(iter(view.scores), None), view.measured.get("kl")
    if score is None or score.before is None or kl is None:
        return ""
    marks = [
        svg.Mark(0.0, score.before, f"before · {figure(score.before)}", css="start", radius=4),
        svg.Mark(kl, score.after, f"after · KL {figure(kl)} · {figure(score.after)}", score.low, score.high, radius=4),
    ]
    path = [(0.0, score.before), (kl, score.after)]
    drawing = svg.scatter(marks, "KL to the reference, nats an answer", score.metric, path=path)
    return framed(
        f"frontier: {escape(score.metric)}, held out", f"{figure(score.before)} → {figure(score.after)}", drawing
    )


# ------------------------------------------------------------------------------------------------- gold against proxy


@dataclass
class Curve:
    """Held-out scores of one run over its KL, (P,) each, as gains over the start; Gao et al.'s fit, if it has one."""

    name: str
    colour: int
    steps: list[float]
    kl: np.ndarray
    gain: np.ndarray
    fit: Fit | None

    @classmethod
    def read(cls, view: View, key: str, colour: int) -> Curve | None:
        """Of `eval/KEY` and `eval/kl`; None where there are not two points."""
        scores = dict(view.series(f"eval/{key}"))
        found = [(s, kl, scores[s]) for s, kl in view.series("eval/kl") if kl is not None and scores.get(s) is not None]
        if len(found) < 2:
            return None
        steps, kl, score = zip(*found, strict=True)
        first = int(np.argmin(kl))
        known = score[first] if kl[first] < AT_START else None
        try:
            curve = fit(kl, score, start=known) if len(found) >= ENOUGH else None
        except ValueError:  # the policy never moved
            curve = None
        start = known if known is not None else curve.start if curve else score[first]
        return cls(view.name, colour, list(steps), np.array(kl), np.array(score) - start, curve)

    def marks(self) -> list[svg.Mark]:
        css = f"dot c{self.colour}" if self.colour else "dot"
        points = zip(self.steps, self.kl, self.gain, strict=True)
        said = [(kl, y, f"{self.name} · update {step:g} · KL {figure(kl)} · {y:+.3g}") for step, kl, y in points]
        marks = [svg.Mark(math.sqrt(max(kl, 0)), y, text, radius=2.6, css=css) for kl, y, text in said]
        return marks + ([self.summit()] if self.turns() else [])

    def turns(self) -> bool:
        """Whether the fitted curve has its peak among the points where the policy had moved."""
        return self.fit is not None and self.first() <= self.fit.peak < self.kl.max()

    def first(self) -> float:
        """The least KL of a policy that had moved."""
        return float(self.kl[self.kl >= AT_START].min(initial=self.kl.max()))

    def summit(self) -> svg.Mark:
        """The peak of the fit, as a ring."""
        assert self.fit is not None
        height = float(self.fit(self.fit.peak)) - self.fit.start
        text = f"{self.name} · peak of the fit at KL {figure(self.fit.peak)} · {height:+.3g}"
        return svg.Mark(math.sqrt(self.fit.peak), height, text, radius=4, css="start")

    def line(self) -> svg.Line:
        """The fit; without one, what joins the points."""
        css = f"line c{self.colour}" if self.colour else "line"
        if self.fit is None:
            return css, sorted(zip(np.sqrt(np.clip(self.kl, 0, None)).tolist(), self.gain.tolist(), strict=True))
        d = np.linspace(0, math.sqrt(self.kl.max()), 60)
        return css, list(zip(d.tolist(), (self.fit(d**2) - self.fit.start).tolist(), strict=True))

    def said(self) -> str:
        """Where the fit is highest, with its interval."""
        if self.fit is None:
            return ""
        if self.turns():
            low, high = (f"{v:.2g}" if math.isfinite(v) else "∞" for v in self.fit.peak_interval)
            return f"peak at KL {self.fit.peak:.2g} [{low}, {high}]"
        return f"peak before KL {self.first():.2g}" if self.fit.peak < self.first() else "no peak within"


def followed(views: Sequence[View]) -> str:
    """Judge (gold) and reward (proxy) on the same held-out answers over sqrt(KL), with the curve of Gao et al. 2022;
    several runs in colours of their own."""
    views, drawn = views[:LINES], []
    judge = next((v.scores[0].metric for v in views if v.scores), "score")
    for key, title in (("score", f"judged: {judge}"), ("reward", "its reward, the proxy")):
        of_one = 0 if key == "score" or len(views) > 1 else 1  # gold and proxy of one run in two colours
        curves = [Curve.read(view, key, of_one + i) for i, view in enumerate(views)]
        drawn.append(panel(title, [curve for curve in curves if curve is not None]))
    if judge == "reward":  # who judges is the reward itself: both are the same
        drawn = drawn[:1]
    return f"<div class=charts>{''.join(drawn)}</div>" if any(drawn) else ""


def panel(title: str, curves: Sequence[Curve]) -> str:
    """One quantity of several runs."""
    if not curves:
        return ""
    drawing = svg.scatter(
        [mark for curve in curves for mark in curve.marks()],
        "√KL to the reference, KL in nats an answer",
        "gain over the start",
        lines=[curve.line() for curve in curves],
    )
    if len(curves) == 1:
        return framed(f"how far it can be followed: {escape(title)}", curves[0].said(), drawing)
    entries = "".join(
        f"<span class=entry><i class=c{curve.colour}></i>{escape(curve.name)} <b>{curve.said()}</b></span>"
        for curve in curves
    )
    head = f"<figcaption><span>how far it can be followed: {escape(title)}</span></figcaption>"
    return f"<figure class=chart>{head}<div class=entries>{entries}</div>{drawing}</figure>"
