"""The report page: whole, self-contained, honest, and deaf to whatever a name or a sample tries to tell the browser."""

import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fledge import artifact, report, svg, track
from fledge.config import StageConfig
from fledge.evals.score import Score
from fledge.track import TrackConfig

VOID = {"meta", "img", "br", "hr", "input", "link"}
EVIL = "<script>alert(1)</script>"


class Toy(StageConfig):
    stage: str = "pretrain.mae"
    note: str = "plain"
    track: TrackConfig = TrackConfig(wandb="off")


class Page(HTMLParser):
    """Reads a page, insists that tags are balanced, and collects what it would load and where it leads."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        if tag == "a":
            self.links.append(given["href"])
        loading = ("src", "srcset", "data", "action", "poster") + (() if tag == "a" else ("href",))
        self.loads += [v for k, v in attrs if k in loading]
        assert not [k for k, _ in attrs if k.startswith("on")], attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def make(out: Path, name: str, stage: str, kind: str, parents=None, scores=(), steps=60, finish=True, extra=None):
    """A run folder as a stage leaves it, with curves that look like training."""
    run = track.Run.open(Toy(stage=stage, name=name, out=str(out), note=f"{name} {EVIL}"), parents or {})
    rng = np.random.default_rng(len(name))
    for step in range(steps):
        decay = math.exp(-4 * step / steps)
        values = {
            "train/loss": 0.4 + decay + rng.normal() * 0.05,
            "train/lr": 1e-3 * math.sin(math.pi * (step + 1) / steps),
        }
        values |= {"train/grad_norm": 1 + decay * rng.random(), "time/step": 0.03 + rng.random() / 100}
        values |= {"time/data": 0.001, "time/rows_per_second": 2100 + 100 * rng.normal()}
        values |= extra(step, rng) if extra else {}
        run.log(step, values)
        if (step + 1) % max(1, steps // 8) == 0:
            run.log(step, {"eval/accuracy": 1 - decay * 0.8})
    if not finish:
        return run
    save = lambda folder: (folder / "model.safetensors").write_bytes(name.encode())  # noqa: E731
    return run.publish(kind, save, list(scores), architecture={"width": 8}, step=steps)


@pytest.fixture
def runs(tmp_path):
    """Pixels -> mae, text -> clm, both -> clip; one figure that does not beat its baseline; one run unfinished."""
    seen = Score(
        "accuracy", 0.62, 400, 0.57, 0.67, before=0.31, baseline=0.7, baseline_name="raw pixels", unit="characters"
    )
    mae = make(tmp_path, "mae", "pretrain.mae", "vision-encoder", scores=[seen])
    read = Score("bits per byte", 2.1, 40, 2.0, 2.2, before=8.0, higher_is_better=False, unit="documents")
    clm = make(tmp_path, "clm", "pretrain.clm", "causal-lm", scores=[read])
    make(tmp_path, "clip", "align.clip", "dual-encoder", {"image": mae, "text": clm})
    sft = make(tmp_path, "sft", "finetune.sft", "chat-model", {"model": clm}, finish=False)
    sft.log(60, {EVIL: 1.0, "train/loss": math.nan})
    sft.log(61, {EVIL: 2.0, "train/loss": 0.5})
    sft.picture("masks", Image.new("RGB", (64, 32), "teal"), f"what it sees {EVIL}")
    sft.samples("answers", [{"prompt": EVIL, "score": i / 7, "right": i % 2 == 0} for i in range(20)], "answers")
    return tmp_path


def test_the_page_is_whole_and_alone(runs):
    path = report.write(report.runs_of(runs), runs / "report.html", "A family")
    text = path.read_text()
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    assert all(source.startswith("data:image/png;base64,") for source in page.loads) and len(page.loads) == 1
    assert not re.search(r"(?:https?:)?//[a-z]|url\(|@import", text, re.IGNORECASE)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert {"run-mae", "run-clm", "run-clip", "run-sft"} <= set(page.ids)
    assert page.tags.count("svg") >= 4 * 4


def test_everything_from_outside_is_escaped(runs):
    text = report.write(report.runs_of(runs), runs / "report.html", EVIL).read_text()
    assert EVIL not in text and "<script" not in text
    assert text.count(html.escape(EVIL)) >= 20  # title, configs, metric name, caption, samples


def test_it_says_what_is_not_beaten_and_what_is_not_finished(runs):
    text = report.write(report.runs_of(runs), runs / "report.html").read_text()
    assert "1 of 2 figures beat everything that stands beside them." in text
    assert "mae: accuracy does not beat its baseline (raw pixels)." in text
    assert "Not finished: sft." in text
    table = text[text.index("<table class=summary>") : text.index("</table>")]
    assert table.count('class="short"') + table.count("class=short") == 1
    assert "0.62" in table and "0.57 – 0.67" in table and "2.10" in table and "400" in table


def test_the_family_comes_from_the_manifests(runs):
    """Rebuilt from one run alone, the page still names all ancestors."""
    nodes, edges = report.family([report.View.read(runs / "clip")])
    names = {key: node.name for key, node in nodes.items()}
    named = {(names[a], names[b]) for a, b in edges}
    assert named == {("pixels", "mae"), ("text", "clm"), ("mae", "clip"), ("clm", "clip")}
    nodes, edges = report.family([report.View.read(d) for d in report.runs_of(runs)])
    names = {key: node.name for key, node in nodes.items()}
    assert {(names[a], names[b]) for a, b in edges} == named | {("clm", "sft")}


def test_a_folder_becomes_a_page_by_one_command(runs, capsys):
    (runs / "mae~1").mkdir()
    (runs / "mae~1" / "config.yaml").write_text("stage: pretrain.mae\n")
    assert report.main([str(runs)]) == 0
    assert capsys.readouterr().out.strip() == str(runs / "report.html")
    assert "mae~1" not in (runs / "report.html").read_text()
    assert report.main([str(runs / "nothing")]) == 2
    assert "no run in it" in capsys.readouterr().err


def test_media_cannot_leave_their_folder(runs):
    (runs / "secret.json").write_text(json.dumps([{"x": "SECRET"}]))
    (runs / "sft" / "media" / "fake.png").write_bytes(b"<svg onload=alert(1)>")
    entries = [{"file": "../../secret.json", "kind": "samples"}, {"file": "fake.png", "kind": "picture"}]
    (runs / "sft" / "media" / "index.json").write_text(json.dumps(entries))
    text = report.write([runs / "sft"], runs / "report.html").read_text()
    assert "SECRET" not in text and "<img" not in text


def test_an_empty_run_is_no_error(tmp_path):
    (tmp_path / "mae").mkdir()
    (tmp_path / "mae" / "config.yaml").write_text("stage: pretrain.mae\n")
    Page(report.write(report.runs_of(tmp_path), tmp_path / "report.html").read_text())


def test_nothing_else_of_the_run_reaches_the_page(runs, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "c0ffee" * 7)
    assert "c0ffee" not in report.write(report.runs_of(runs), runs / "report.html").read_text()


# ------------------------------------------------------------------------------------------------------- drawings


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.5, 1]), (0.13, 0.97, [0.2, 0.4, 0.6, 0.8]), (0, 400, [0, 100, 200, 300, 400]), (-3, 3, [-2, 0, 2])],
)
def test_ticks_are_round(low, high, expected):
    assert svg.ticks(low, high) == pytest.approx(expected)


def test_thinning_keeps_means_extremes_and_ends():
    points = [(float(i), float(i % 10)) for i in range(10_000)]
    points[5000] = (5000.0, 99.0)
    line, band = svg.thin(points)
    assert len(line) == 400 and line[0][0] == 0 and line[-1][0] == 9999
    assert np.mean([y for _, y in line]) == pytest.approx(np.mean([y for _, y in points]))
    assert max(high for _, _, high in band) == 99 and min(low for _, low, _ in band) == 0
    assert svg.thin(points[:400]) == (points[:400], [])


def test_a_missing_value_is_a_gap():
    drawing = svg.curve([(0, 1.0), (1, 2.0), (2, None), (3, 1.0), (4, 2.0)])
    (path,) = re.findall(r'class="line" d="([^"]+)"', drawing)
    assert path.count("M") == 2 and path.count("L") == 2
    assert "no finite value" in svg.curve([(0, None), (1, None)])


def test_smoothing_is_centred():
    line = svg.smooth([(float(i), 3.0 * i) for i in range(50)], 9)
    assert [y for _, y in line[4:-4]] == pytest.approx([3.0 * i for i in range(4, 46)])


def test_boxes_of_a_graph_do_not_overlap():
    edges = "pixels>mae pixels>dino text>mlm text>clm mae>clip mlm>clip pixels>scratch text>scratch clm>sft sft>reward "
    edges += "sft>ppo reward>ppo"
    pairs = [tuple(e.split(">")) for e in edges.split()]
    names = {n for pair in pairs for n in pair}
    for down in (False, True):
        drawing = svg.graph({n: svg.Node(n) for n in sorted(names)}, pairs, down=down)
        box = r'<rect x="([-\d.]+)" y="([-\d.]+)" width="([\d.]+)" height="([\d.]+)"'
        boxes = [tuple(map(float, found)) for found in re.findall(box, drawing)]
        assert len(boxes) == len(names)
        for i, (x, y, w, h) in enumerate(boxes):
            for x2, y2, w2, h2 in boxes[i + 1 :]:
                assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
        assert svg.crossings(*svg.arranged(sorted(names), pairs)) == 0
        width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing).groups())
        assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h in boxes)


def test_the_artifact_keeps_its_scores(runs):
    kept = artifact.open(runs / "mae" / "artifact").manifest["metrics"]["scores"]
    assert Score.from_dict(kept[0]).baseline_name == "raw pixels"
