"""The report page in a browser: it fits screens and paper, needs no script to be read, and answers a pointer."""

import json
import re

import pytest

from fledge import report
from tests import browser
from tests.fledge.test_report import EVIL, family

program = browser.found()
pytestmark = pytest.mark.skipif(program is None, reason=f"no browser on PATH: looked for {', '.join(browser.NAMES)}")

# Elements that stick out at the right, unless they lie in something that scrolls.
STICKING = """[...document.querySelectorAll("body *")].filter(e =>
  e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
  && !e.closest(".scroll, .wide, .across, pre")).map(e => e.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def window():
    assert program is not None
    with browser.Browser(program) as opened:
        yield opened


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def page(runs):
    return report.write(report.runs_of(runs), runs / "report.html", "A family")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "media"), [(390, "screen"), (768, "screen"), (1400, "screen"), (720, "print")])
def test_it_fits_in_silence(window, page, width, media, scheme):
    window.open(page, width=width, media=media, scheme=scheme)
    assert window.said == []
    assert window.value("document.documentElement.scrollWidth") <= width
    assert window.value(STICKING) == []
    paper = [int(v) for v in re.findall(r"\d+", window.value("getComputedStyle(document.body).backgroundColor"))]
    assert max(paper) < 64 if scheme == "dark" and media == "screen" else min(paper) > 240
    assert window.value("getComputedStyle(document.querySelector('.down')).display") == (
        "block" if width < 720 and media == "screen" else "none"
    )


def test_nothing_is_missing_without_the_script(window, page):
    window.open(page, script=False)
    off = window.value("document.body.textContent")
    assert EVIL in off and "stage: pretrain.mae" in off and "what it sees" in off and "raw pixels" in off
    assert window.value("document.querySelector('.read, .traced')") is None
    shown = "[...document.querySelectorAll('section')].every(s => s.getBoundingClientRect().height > 50)"
    assert window.value(shown)
    window.open(page, script=True)
    assert window.value("document.body.textContent") == off


def test_a_click_on_a_stage_shows_it(window, page):
    window.open(page)
    window.click(".across a[href='#run-clip']")
    assert window.value("location.hash") == "#run-clip"
    assert -2 <= window.value("document.querySelector('#run-clip').getBoundingClientRect().top") < 300
    text = window.value("document.querySelector('#run-clip').innerText")
    assert "raised from" in text and "mae (image)" in text and "clm (text)" in text
    assert "What departs from the published recipe" in text and "note" in text and "The whole config" in text


@pytest.mark.parametrize("at", [0.3, 0.62, 0.9])
def test_a_pointer_on_a_curve_reads_its_value(window, page, runs, at):
    """The step under the pointer by the axis as it is drawn (40 to 312 of 320), its value from metrics.jsonl."""
    window.open(page)
    drawn = "#run-mae .chart svg"
    rest = window.value("document.querySelector('#run-mae .chart b').textContent")
    window.hover(drawn, at)
    said = window.value("document.querySelector('#run-mae .chart b').textContent")
    step = round((at * 320 - 40) / (312 - 40) * 59)
    lines = [json.loads(line) for line in (runs / "mae" / "metrics.jsonl").read_text().splitlines()]
    value = next(r["train/loss"] for r in lines if r["step"] == step and "train/loss" in r)
    assert said == f"step {step} · {value:.4g}"
    window.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert window.value("document.querySelector('#run-mae .chart b').textContent") == rest


def test_a_pointer_on_the_lineage_lights_ancestors(window, page):
    window.open(page)
    lit = "[...document.querySelectorAll('.across .lit .name')].map(e => e.textContent).sort()"
    window.hover(".across a[href='#run-clip'] rect")
    assert window.value(lit) == ["clip", "clm", "mae", "pixels", "text"]
    window.hover(".across a[href='#run-mae'] rect")
    assert window.value(lit) == ["clip", "mae", "pixels"]
