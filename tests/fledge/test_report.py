"""The report page: whole, self-contained, honest, and deaf to whatever a name or a sample tries to tell the browser."""

import base64
import hashlib
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
from fledge.report import figures, graph
from fledge.report.lineage import family as lineage_of
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


def family(tmp_path: Path) -> Path:
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


@pytest.fixture
def runs(tmp_path):
    return family(tmp_path)


def test_the_page_is_whole_and_alone(runs):
    path = report.write(report.runs_of(runs), runs / "report.html", "A family")
    text = path.read_text()
    page = Page(text)
    assert page.tags.count("script") == 1 and "link" not in page.tags and "iframe" not in page.tags
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'" in text
    assert all(source.startswith("data:image/png;base64,") for source in page.loads) and len(page.loads) == 1
    assert not re.search(r"(?:https?:)?//[a-z]|url\(|@import", text, re.IGNORECASE)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert {"run-mae", "run-clm", "run-clip", "run-sft"} <= set(page.ids)
    assert page.tags.count("svg") >= 4 * 4


def test_everything_from_outside_is_escaped(runs):
    text = report.write(report.runs_of(runs), runs / "report.html", EVIL).read_text()
    assert EVIL not in text and text.count("<script") == 1
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
    nodes, edges = lineage_of([report.View.read(runs / "clip")])
    names = {key: node.name for key, node in nodes.items()}
    named = {(names[a], names[b]) for a, b in edges}
    assert named == {("pixels", "mae"), ("text", "clm"), ("mae", "clip"), ("clm", "clip")}
    nodes, edges = lineage_of([report.View.read(d) for d in report.runs_of(runs)])
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


def section(text: str, name: str) -> str:
    return text.partition(f'id="run-{name}"')[2].partition("</section>")[0]


def test_a_stage_says_what_departs_and_who_its_kin_is(runs):
    text = report.write(report.runs_of(runs), runs / "report.html").read_text()
    clip = section(text, "clip")
    assert '<a href="#run-mae">mae</a> <small>(image)</small>' in clip
    departs = clip.partition("departs from the published recipe")[2].partition("</dl>")[0]
    assert re.findall("<dt>(.*?)</dt><dd>(.*?) <s>(.*?)</s></dd>", departs) == [
        ("note", html.escape(f"clip {EVIL}"), "plain")
    ]
    assert clip.index("departs from the published recipe") < clip.index("The whole config") < clip.index("<svg")
    assert '<a href="#run-clip">clip</a>' in section(text, "mae")  # its child
    (runs / "clip" / "departures.json").unlink()  # as runs of an earlier version are
    assert "departs from" not in section(report.write([runs / "clip"], runs / "one.html").read_text(), "clip")


def test_how_it_ran(tmp_path):
    def extra(step, rng):
        known = {"time/step": 0.5, "time/data": 0.1, "time/tokens_per_second": 3000 + step % 3}
        known |= {"train/spikes": step // 25, "system/mfu": 0.4 + step % 2 / 10, "system/memory_gib": 1 + step / 100}
        return known

    make(tmp_path, "clm", "pretrain.clm", "causal-lm", extra=extra)
    odd = make(tmp_path, "mae", "pretrain.mae", "vision-encoder", finish=False)
    odd.log(70, {"train/nonfinite": 3})
    clm, mae = (report.View.read(tmp_path / name) for name in ("clm", "mae"))
    assert {k: clm.health[k] for k in ("step", "speed", "data wait", "MFU", "memory", "spikes", "not finite")} == {
        "step": "500 ms", "speed": "3,001 tokens/s", "data wait": "20.0%", "MFU": "45.0%", "memory": "1.59 GiB",
        "spikes": "2", "not finite": "0",
    }  # fmt: skip
    assert "MFU" not in mae.health and mae.health["not finite"] == "3" and mae.health["speed"].endswith("rows/s")
    text = report.write(report.runs_of(tmp_path), tmp_path / "report.html").read_text()
    assert "45.0%" in text and "<th class=num>MFU</th>" in text
    assert "MFU" not in report.write([tmp_path / "mae"], tmp_path / "mae.html").read_text()


def test_runs_of_one_stage_share_their_charts(tmp_path):
    for name in ("one", "two"):
        make(tmp_path, name, "pretrain.mae", "vision-encoder")
    make(tmp_path, "other", "pretrain.clm", "causal-lm")
    text = report.write(report.runs_of(tmp_path), tmp_path / "report.html").read_text()
    shared = text.partition("<section id=compared>")[2].partition("</section>")[0]
    assert (
        shared.count("<figure") == 3 and "one <b data-value>" in shared and "other" not in shared
    )  # two of three runs
    (chart,) = re.findall(r"<figure.*?</figure>", shared.partition("loss")[0] + shared.partition("loss")[2])[:1]
    assert 'class="line c1"' in chart and 'class="line"' in chart


def hovered(points):
    data = re.search('data-hover="(.*?)"', svg.curves([points]))[1]
    return json.loads(html.unescape(data))["lines"][0]


def test_what_the_pointer_reads_is_what_was_logged():
    points = [(float(x), y) for x, y in [(3, 0.1234567), (5, None), (7, 2e-9)]]
    assert hovered(points) == {"from": 3, "by": 2, "y": [0.12346, None, 2e-9]}
    assert hovered([(0, 1.0), (1, 1.0), (9, 2.0)]) == {"at": [0, 1, 9], "y": [1, 1, 2]}


def test_the_frontier_and_the_calibration(tmp_path):
    def extra(step, rng):
        return {"train/objective/kl": step / 100, "train/objective/score": step / 60}

    kept = track.Run.publish
    gold = Score("gold score", 0.74, 320, 0.71, 0.77, before=0.7)
    run = make(tmp_path, "ppo", "align.ppo", "chat-model", finish=False, extra=extra)
    save = lambda folder: (folder / "model.safetensors").write_bytes(b"x")  # noqa: E731
    kept(run, "chat-model", save, [gold], architecture={}, step=60, kl=0.2)
    bins = [{"low": 0.5, "high": 0.75, "predicted": 0.6, "observed": 0.65, "n": 40}]
    bins += [{"low": 0.75, "high": 1.0, "predicted": 0.9, "observed": 0.8, "n": 160}]
    margins = [
        {"low": 0.1, "high": 0.3, "accuracy": 0.6, "n": 50},
        {"low": 0.3, "high": 2.0, "accuracy": 0.9, "n": 150},
    ]
    run = make(tmp_path, "reward", "align.reward", "reward-model", finish=False)
    kept(run, "reward-model", save, [], architecture={}, step=60, calibration=bins, ece=0.09, margins=margins)
    text = report.write(report.runs_of(tmp_path), tmp_path / "report.html").read_text()
    Page(text)
    ppo, reward = section(text, "ppo"), section(text, "reward")
    assert "update 59 · KL 0.59 · 0.9833" in html.unescape(ppo) and "after · KL 0.2 · 0.74" in html.unescape(ppo)
    assert "ECE 0.090" in reward and reward.count('class="whisker"') == 4 and reward.count('class="bar"') == 2
    assert "accuracy by margin" in reward and "0.3 to 2 · right 0.900 · 150 pairs" in html.unescape(reward)
    assert "ECE" not in ppo and "frontier:" not in reward


def policy_run(out, name, alpha, beta, steps=96, measured=True):
    """A PPO run whose held-out gold follows Gao et al.'s curve exactly, and whose reward rises with d."""

    def extra(step, rng):
        kl = 0.0 if step < 8 else (step + 1) / 12
        d = math.sqrt(kl)
        gold = 0.7 + (d * (alpha - beta * math.log(d)) if d else 0.0)
        return {"eval/kl": kl, "eval/score": gold, "eval/reward": -1 + d / 4} if (step + 1) % 8 == 0 else {}

    run = make(out, name, "align.ppo", "chat-model", finish=False, extra=extra, steps=steps)
    if measured:
        save = lambda folder: (folder / "model.safetensors").write_bytes(name.encode())  # noqa: E731
        scores = [Score("gold score", 0.5, 320, 0.4, 0.6, before=0.7)]
        run.publish("chat-model", save, scores, architecture={}, step=steps, kl=8.0)


def test_gold_and_proxy_over_the_root_of_kl(tmp_path):
    """The peak of d (α - β log d) is at KL = exp(2 (α / β - 1)): e for 1.5, and below the first point for .2."""
    policy_run(tmp_path, "one", 0.3, 0.2)
    policy_run(tmp_path, "two", 0.02, 0.1)
    text = html.unescape(report.write(report.runs_of(tmp_path), tmp_path / "report.html").read_text())
    Page(text)
    shared = text.partition("<section id=compared>")[2].partition("</section>")[0]
    assert "judged: gold score" in shared and "its reward, the proxy" in shared
    assert "one <b>peak at KL 2.7 [2.7, 2.7]</b>" in shared and "two <b>peak before KL 1.3</b>" in shared
    assert f"one · peak of the fit at KL {math.e:.4g} · +{0.2 * math.exp(0.5):.3g}" in shared
    assert 'class="dot c1"' in shared and 'class="line c1"' in shared
    alone = section(text, "one")
    assert alone.count("how far it can be followed") == 2 and 'class="dot c1"' in alone


def test_a_frontier_of_few_points_has_no_fit(tmp_path):
    policy_run(tmp_path, "short", 0.3, 0.2, steps=24, measured=False)
    text = report.write(report.runs_of(tmp_path), tmp_path / "report.html").read_text()
    assert "how far it can be followed" in text and "peak" not in section(text, "short")


def test_wilson_intervals():
    """Newcombe 1998, table I: 81 of 263 and 0 of 20."""
    assert figures.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert figures.wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


# ------------------------------------------------------------------------------------------------------- drawings


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.5, 1]), (0.13, 0.97, [0.2, 0.4, 0.6, 0.8]), (0, 400, [0, 100, 200, 300, 400]), (-3, 3, [-2, 0, 2])],
)
def test_ticks_are_round(low, high, expected):
    assert svg.ticks(low, high) == pytest.approx(expected)


def test_labels_tell_ticks_apart():
    assert svg.labels([0.9995, 1, 1.0005]) == ["0.9995", "1", "1.0005"]
    assert svg.labels([0, 0.25, 1500]) == ["0", "0.25", "1.5k"]
    assert svg.labels([100_001, 100_002]) == ["100.001k", "100.002k"]


def test_thinning_keeps_means_extremes_and_ends():
    points = [(float(i), float(i % 10)) for i in range(10_000)]
    points[5000] = (5000.0, 99.0)
    line, band = svg.thin(points)
    assert len(line) == 400 and line[0][0] == 0 and line[-1][0] == 9999
    assert np.mean([y for _, y in line]) == pytest.approx(np.mean([y for _, y in points]))
    assert max(high for _, _, high in band) == 99 and min(low for _, low, _ in band) == 0
    assert svg.thin(points[:400]) == (points[:400], [])


def test_a_missing_value_is_a_gap():
    drawing = svg.curves([[(0, 1.0), (1, 2.0), (2, None), (3, 1.0), (4, 2.0)]])
    (path,) = re.findall(r'class="line" d="([^"]+)"', drawing)
    assert path.count("M") == 2 and path.count("L") == 2
    assert "no finite value" in svg.curves([[(0, None), (1, None)]])


def test_smoothing_is_centred():
    line = svg.smooth([(float(i), 3.0 * i) for i in range(50)], 9)
    assert [y for _, y in line[4:-4]] == pytest.approx([3.0 * i for i in range(4, 46)])


def test_boxes_of_a_graph_do_not_overlap():
    edges = "pixels>mae pixels>dino text>mlm text>clm mae>clip mlm>clip pixels>scratch text>scratch clm>sft sft>reward "
    edges += "sft>ppo reward>ppo"
    pairs = [tuple(e.split(">")) for e in edges.split()]
    names = {n for pair in pairs for n in pair}
    for down in (False, True):
        drawing = graph.draw({n: graph.Node(n) for n in sorted(names)}, pairs, down=down)
        box = r'<rect x="([-\d.]+)" y="([-\d.]+)" width="([\d.]+)" height="([\d.]+)"'
        boxes = [tuple(map(float, found)) for found in re.findall(box, drawing)]
        assert len(boxes) == len(names)
        for i, (x, y, w, h) in enumerate(boxes):
            for x2, y2, w2, h2 in boxes[i + 1 :]:
                assert x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
        assert graph.crossings(*graph.arranged(sorted(names), pairs)) == 0
        width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing).groups())
        assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h in boxes)


def test_the_artifact_keeps_its_scores(runs):
    kept = artifact.open(runs / "mae" / "artifact").manifest["metrics"]["scores"]
    assert Score.from_dict(kept[0]).baseline_name == "raw pixels"
