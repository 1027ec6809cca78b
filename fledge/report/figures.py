"""Curves, and a reward model's calibration."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fledge import svg
from fledge.evals.score import wilson
from fledge.report.markup import details
from fledge.report.view import View
from fledge.track import figure

MOST_CHARTS = 9  # of a stage at first sight; the others are one click away
MOST_SHARED = 6  # of a comparison
LINES = 6  # the most that one chart tells apart


def charts(view: View) -> str:
    """Small multiples of all that was logged; the most telling first."""
    drawn = [chart(names, [view.series(k) for k in names]) for names in pairs(view)]
    if not drawn:
        return ""
    first = f"<div class=charts>{''.join(drawn[:MOST_CHARTS])}</div>"
    rest = f"<div class=charts>{''.join(drawn[MOST_CHARTS:])}</div>"
    return first + (details(f"{len(drawn) - MOST_CHARTS} more curves", rest) if len(drawn) > MOST_CHARTS else "")


def pairs(view: View) -> list[list[str]]:
    """The keys of each chart: what is measured in training and in evaluation by one name shares one."""
    logged = view.logged()
    hidden = HIDDEN + (("time/rows_per_second",) if "time/tokens_per_second" in logged else ())
    keys = [k for k in logged if len(view.series(k)) > 1 and k not in hidden]
    keys.sort(key=lambda k: (len(set(view.known(k))) == 1, order(k)))  # what never changed says least
    shown = []
    for key in keys:
        twin = "train/" + key.removeprefix("eval/")
        if key.startswith("eval/") and twin in keys:
            shown[shown.index([twin])].append(key)
        else:
            shown.append([key])
    return shown


HIDDEN = ("time/data", "train/nonfinite")  # the share says more; a count of events is in the list of facts


def order(key: str) -> tuple[int, str]:
    """The loss, the other terms, evaluations, gradient norm, rate, what the machine did."""
    last = {"train/loss": 0, "train/grad_norm": 3, "train/lr": 4, "train/spikes": 7}
    group, _, _ = key.partition("/")
    return last.get(key, {"train": 1, "eval": 2, "time": 6, "system": 6}.get(group, 5)), key


def chart(keys: Sequence[str], lines: Sequence[Sequence[svg.Point]], names: Sequence[str] = ()) -> str:
    """Quantities over steps with their last values. `keys` as they were logged; `names`, where the lines are runs."""
    key = keys[0]
    noisy = key.startswith(("train/", "time/", "system/")) and key not in ("train/lr", "train/spikes")
    finals = [next((y for _, y in reversed(points) if y is not None), None) for points in lines]
    label = ", ".join(
        f"{name}: {figure(points[0][1])} to {figure(final)}"
        for name, points, final in zip(names or keys, lines, finals, strict=True)
    )
    drawing = svg.curves(lines, noisy=noisy, label=f"{key}, {label}" if names else label)
    if len(lines) == 1:
        return framed(titled(key), figure(finals[0]), drawing)
    legend = [titled(k) for k in keys] if not names else [escape(n) for n in names]
    entries = "".join(
        f"<span class=entry><i class=c{i}></i>{name} <b data-value>{figure(final)}</b></span>"
        for i, (name, final) in enumerate(zip(legend, finals, strict=True))
    )
    head = f"<span>{titled(key)}</span><b data-step></b>" if names else "<span></span><b data-step></b>"
    return f"<figure class=chart><figcaption>{head}</figcaption><div class=entries>{entries}</div>{drawing}</figure>"


def titled(key: str) -> str:
    group, slash, name = key.rpartition("/")
    return f"<span class=group>{escape(group + slash)}</span>{escape(name)}"


def framed(title: str, value: str, drawing: str) -> str:
    """One drawing under its name, with a value at the right that the script replaces by the one under the pointer."""
    return (
        f"<figure class=chart><figcaption><span>{title}</span><b data-value>{escape(value)}</b></figcaption>"
        f"{drawing}</figure>"
    )


def compared(group: Sequence[View]) -> str:
    """Runs of one stage in the same charts: what most of them logged, the most telling first."""
    group = group[:LINES]
    keys = [k for k in dict.fromkeys(k for v in group for k in v.logged()) if not k.startswith(("time/", "system/"))]
    shared = [k for k in keys if sum(len(v.series(k)) > 1 for v in group) > 1 and k not in ("train/lr", *HIDDEN)]
    drawn = []
    for key in sorted(shared, key=order)[:MOST_SHARED]:
        having = [v for v in group if len(v.series(key)) > 1]
        drawn.append(chart([key], [v.series(key) for v in having], [v.name for v in having]))
    if not drawn:
        return ""
    return f"<h3>{escape(group[0].stage)}</h3><div class=charts>{''.join(drawn)}</div>"


# -------------------------------------------------------------------------------------------------------- calibration


def calibration(view: View) -> str:
    """A reliability diagram: predicted against observed share, of `calibration=[{"predicted", "observed", "n"}, …]`.

    The bars say where the predictions lie; whiskers are 95 % Wilson intervals.
    """
    bins = [b for b in view.measured.get("calibration") or [] if b.get("observed") is not None and b.get("n")]
    if not bins:
        return ""
    marks = []
    for b in bins:
        low, high = wilson(b["observed"], b["n"])
        text = f"predicted {b['predicted']:.3f} · right {b['observed']:.3f} · {b['n']:,} pairs"
        marks.append(svg.Mark(b["predicted"], b["observed"], text, low, high))
    most = max(b["n"] for b in bins)
    bars = [(b["low"], b["high"], 0.3 * b["n"] / most) for b in bins if "low" in b and "high" in b]
    edge = min([b.get("low", b["predicted"]) for b in bins])
    floor = min([m.low for m in marks if m.low is not None] + [edge])
    drawing = svg.scatter(
        marks, "predicted probability", "observed share", diagonal=True, bars=bars,
        x_limits=(edge, 1.0), y_limits=(max(0.0, floor - 0.02), 1.0),
    )  # fmt: skip
    error = view.measured.get("ece")
    value = f"ECE {error:.3f}" if error is not None else ""
    return f"<div class=charts>{framed('calibration on held-out pairs', value, drawing)}{margins(view)}</div>"


def margins(view: View) -> str:
    """Accuracy by the size of the difference in reward, of `margins=[{"low", "high", "accuracy", "n"}, …]`.

    Whiskers are 95 % Wilson intervals.
    """
    marks = []
    for b in view.measured.get("margins") or []:
        low, high = wilson(b["accuracy"], b["n"])
        text = f"{figure(b['low'])} to {figure(b['high'])} · right {b['accuracy']:.3f} · {b['n']:,} pairs"
        marks.append(svg.Mark((b["low"] + b["high"]) / 2, b["accuracy"], text, low, high))
    if not marks:
        return ""
    drawing = svg.scatter(marks, "difference in reward", "accuracy", path=[(m.x, m.y) for m in marks])
    return framed("accuracy by margin", "", drawing)
