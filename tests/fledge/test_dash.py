"""The dashboard: what it shows is what the files say, while they grow; and what it does not show to whom."""

import http.client
import json
import shutil
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest
from PIL import Image

from fledge import artifact, cli
from fledge.config import Config, StageConfig, parent
from fledge.dash import server
from fledge.errors import InputError
from fledge.evals.score import Score
from fledge.track import Run, TrackConfig
from tests import launch

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'>"


class Parents(Config):
    init: str | None = parent("causal-lm", required=False)


class Toy(StageConfig):
    stage: str = "pretrain.clm"
    parents: Parents = Parents()
    track: TrackConfig = TrackConfig(wandb="off", group="family")


def open_run(folder: Path, name: str, parents=None) -> Run:
    return Run.open(Toy(out=str(folder), name=name), parents or {})


def publish(run: Run, note: str = ""):
    score = Score("exact answers", after=0.5, n=10, low=0.4, high=0.6, before=0.1, baseline=0.7, baseline_name=note)
    return run.publish(
        "causal-lm", lambda to: (to / "model.safetensors").write_text(run.name), [score], architecture={}
    )


@pytest.fixture
def runs(tmp_path):
    """runs/{one, sweep/lr-1/two}: finished, the second raised from the first."""
    folder = tmp_path / "runs"
    with open_run(folder, "one") as run:
        for step in range(3):
            run.log(step, {"train/loss": 1 / (step + 1), "odd": float("nan") if step == 1 else 1.0})
        run.picture("view", Image.new("RGB", (4, 3), "red"), "a caption")
        run.samples("rows", [{"prompt": "x", "score": 1.5}])
        first = publish(run)
    with open_run(folder / "sweep/lr-1", "two", {"init": first}) as run:
        publish(run)
    return folder


class Client:
    """Asks a server of `folder`, which runs in a thread."""

    def __init__(self, folder: Path):
        self.server = server.serve(folder, 0)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        self.port = self.server.server_port

    def ask(self, path: str, host: str | None = "127.0.0.1", method: str = "GET"):
        """(status, headers, content)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.putrequest(method, path, skip_host=True)
        if host is not None:
            connection.putheader("Host", host)
        connection.endheaders()
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, response.headers, content

    def json(self, path: str):
        status, _, content = self.ask(path)
        return json.loads(content) if status == 200 else status

    def curve(self, run: str, key: str):
        return self.json(f"/api/curves?run={run}")[key]["line"]


@pytest.fixture
def client(runs):
    client = Client(runs)
    yield client
    client.server.shutdown()
    client.server.server_close()


# ------------------------------------------------------------------------------------------------ what it shows


def test_runs_of_folders_of_folders(runs, client):
    for other in (".hidden/run", "one~1", "one/wandb/inner"):
        shutil.copytree(runs / "sweep/lr-1/two", runs / other)
    shutil.copytree(runs / "one", runs / "sweep/a/z")
    (runs / "loop").symlink_to(runs, target_is_directory=True)
    (runs / "report.html").write_text("")
    found = client.json("/api/runs")
    assert [(run["id"], run["folder"], run["name"]) for run in found] == [
        ("one", "", "one"),
        ("sweep/a/z", "sweep/a", "z"),
        ("sweep/lr-1/two", "sweep/lr-1", "two"),
    ]
    one = found[0]
    assert (one["state"], one["stage"], one["group"]) == ("finished", "pretrain.clm", "family")
    assert one["scores"][0] | {"after": "0.50", "interval": "0.40 – 0.60", "lacking": ""} == one["scores"][0] | {
        "after": "0.50", "interval": "0.40 – 0.60", "lacking": "",
    }  # fmt: skip
    assert [(entry["name"], entry["kind"]) for entry in one["media"]] == [("view", "picture"), ("rows", "samples")]


def test_a_run_itself_may_be_given(runs):
    client = Client(runs / "one")
    assert [run["id"] for run in client.json("/api/runs")] == ["one"]
    assert len(client.curve("one", "train/loss")) == 3
    client.server.shutdown()
    client.server.server_close()


def test_curves_are_the_lines_of_the_file(client):
    assert client.curve("one", "train/loss") == [[0, 1], [1, 0.5], [2, pytest.approx(1 / 3, rel=1e-5)]]
    assert client.curve("one", "odd") == [[0, 1], [1, None], [2, 1]]
    assert client.json("/api/curves?run=nobody") == 404


def test_numbers_appear_as_they_are_logged_and_go_when_they_are_dropped(runs, client):
    run = open_run(runs, "live")
    versions, seen = [], []

    def look():
        versions.append(next(one["version"] for one in client.json("/api/runs") if one["id"] == "live"))
        seen.append(client.json("/api/curves?run=live").get("x", {}).get("line", []))
        return seen[-1]

    for step in range(4):
        run.log(step, {"x": step})
        assert look() == [[s, s] for s in range(step + 1)]
    with open(run.dir / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "x"')  # a line that is being written
        file.flush()
        assert look() == seen[-2]
        file.write(b": 4}\n")
    assert look()[-1] == [4, 4]
    run.truncate(2)  # back to a checkpoint
    assert look() == [[0, 0], [1, 1]]
    run.log(2, {"x": -1})
    assert look() == [[0, 0], [1, 1], [2, -1]]
    run.truncate(0)  # back, and further than it was, between two looks
    for step in range(9):
        run.log(step, {"x": 0.5})
    assert look() == [[s, 0.5] for s in range(9)]
    assert len(set(versions)) == len(versions)
    run.close()


def test_a_long_curve_is_thinned_with_its_extremes(runs, client):
    run = open_run(runs, "long")
    for step in range(5000):
        run.log(step, {"x": -7.0 if step == 1234 else 1.0})
    run.close()
    curve = client.json("/api/curves?run=long")["x"]
    assert len(curve["line"]) == len(curve["band"]) == 500
    assert min(low for _, low, _ in curve["band"]) == -7 and [x for x, *_ in (curve["line"][0], curve["line"][-1])] == [
        0,
        4999,
    ]


def test_media_and_pages_and_lineage(client):
    status, headers, content = client.ask("/media?run=one&name=view")
    assert status == 200 and headers["Content-Type"] == "image/png" and content[:8] == b"\x89PNG\r\n\x1a\n"
    assert client.json("/media?run=one&name=rows") == [{"prompt": "x", "score": 1.5}]
    status, _, page = client.ask("/run?id=sweep%2Flr-1%2Ftwo")
    assert status == 200 and b"exact answers" in page
    drawn = client.json("/api/lineage")["svg"]
    assert "Lineage: text to one, one to sweep/lr-1/two" in drawn and 'href="/run?id=one"' in drawn
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        status, headers, _ = client.ask(path)
        assert status == 200 and headers["Content-Type"].startswith(kind)


def test_the_lineage_of_a_run_that_goes_on(runs, client):
    first = artifact.open(runs / "one/artifact")
    run = open_run(runs, "child", {"init": first})
    drawn = client.json("/api/lineage")["svg"]
    assert "one to child" in drawn and 'href="/run?id=child"' in drawn and ">running<" in drawn
    run.close()
    shutil.rmtree(runs / "one")  # what it was raised from is known by its digest alone
    assert f"{first.digest[:8]} to child" in client.json("/api/lineage")["svg"]


def test_a_file_that_was_changed_from_outside_is_named(runs, client):
    (runs / "one/metrics.jsonl").write_text("rubbish\n")
    status, _, content = client.ask("/api/curves?run=one")
    assert status == 500 and "metrics.jsonl: no record of a step: b'rubbish'" in json.loads(content)["error"]
    (runs / "one/status.json").write_text("{")
    status, _, content = client.ask("/api/runs")
    assert status == 500 and "status.json: cannot be read" in json.loads(content)["error"]


# ------------------------------------------------------------------------------------------------ to whom, and what not


def test_it_listens_on_loopback_alone(client):
    assert client.server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "host, status",
    [
        ("127.0.0.1:8347", 200), ("localhost:9000", 200), ("localhost", 200), ("evil.example:8347", 403),
        ("127.0.0.1.evil.example", 403), ("localhost.evil.example:80", 403), ("evil.example:127.0.0.1", 403),
        ("", 403), (None, 403),
    ],
)  # fmt: skip
def test_another_host_name_is_refused(client, host, status):
    """A page from elsewhere whose name was pointed here (DNS rebinding) sends its own name."""
    for path in ("/", "/api/runs", "/media?run=one&name=view", "/run?id=one"):
        assert client.ask(path, host)[0] == status


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_it_only_reads(runs, client, method):
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    assert client.ask("/api/runs", method=method)[0] == 501
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before


def test_no_file_but_the_media_that_a_run_has_listed(runs, client):
    media = runs / "one/media"
    secret = runs.parent / "secret.png"
    shutil.copy(media / "view.png", secret)
    shutil.copy(media / "view.png", media / "unlisted.png")
    (media / "page.html").write_text("<script>1</script>")
    (media / "link.png").symlink_to(secret)
    index = json.loads((media / "index.json").read_text())
    planted = ["../../../secret.png", str(secret), "../identity.json", "..", "", "link.png", "page.html", "absent.png"]
    index += [{"name": f"p{i}", "file": name, "kind": "picture", "caption": ""} for i, name in enumerate(planted)]
    (media / "index.json").write_text(json.dumps(index))
    asked = [f"p{i}" for i in range(len(planted))]
    asked += ["unlisted", "view.png", "../media/view", "../../secret", str(secret)]
    for name in asked:
        assert client.ask(f"/media?run=one&name={urllib.parse.quote(name, safe='')}")[0] == 404, name
    for run in ("..", "../runs/one", str(runs / "one"), "one/", "./one", "one/media", ""):
        quoted = urllib.parse.quote(run, safe="")
        for path in (f"/media?run={quoted}&name=view", f"/run?id={quoted}", f"/api/curves?run={quoted}"):
            assert client.ask(path)[0] == 404, path
    for path in (
        "/secret.png",
        "/../secret.png",
        "/..%2fsecret.png",
        "/page.py",
        "/server.py",
        "//etc/passwd",
        "/runs/one",
    ):
        assert client.ask(path)[0] == 404, path


def test_what_runs_say_is_escaped_and_no_script_but_its_own_may_run(runs, client):
    with open_run(runs, "hostile") as run:
        run.log(0, {HOSTILE: 1.0})
        run.samples("rows", [{HOSTILE: HOSTILE}], HOSTILE)
        publish(run, HOSTILE)
    for path in ("/run?id=hostile", "/api/lineage", "/"):
        status, headers, content = client.ask(path)
        assert status == 200 and b"<script>document" not in content and b"<img src=x" not in content
    policy = client.ask("/")[1]["Content-Security-Policy"]
    assert "script-src 'self'" in policy and "default-src 'none'" in policy and "unsafe" not in policy
    for path in ("/api/runs", "/api/curves?run=hostile", "/media?run=hostile&name=rows"):
        _, headers, _ = client.ask(path)
        assert headers["Content-Type"] == "application/json" and headers["X-Content-Type-Options"] == "nosniff"
    script = (Path(server.__file__).parent / "page.js").read_text()
    assert not [
        word for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(") if word in script
    ]
    assert "http" not in script.replace("http://www.w3.org/2000/svg", "")  # a name, not a place


def test_nothing_is_logged_and_ctrl_c_ends_it(runs, tmp_path):
    secret = "canaryCanaryCanary"
    process = subprocess.Popen(
        [sys.executable, "-m", "fledge.cli", "dash", str(runs), "--port", "0"],
        env=launch.environment(SOME_API_KEY=secret, PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    first = process.stdout.readline()
    assert first.startswith(f"dash: 2 runs below {runs} at http://127.0.0.1:")
    port = int(first.rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", f"/api/runs?token={secret}", headers={"Authorization": f"Bearer {secret}"})
    content = connection.getresponse().read()
    assert json.loads(content) and secret.encode() not in content
    process.send_signal(2)
    rest, _ = process.communicate(timeout=10)
    assert process.returncode == 0 and secret not in rest and len(rest.splitlines()) <= 2


def test_wrong_input(tmp_path, capsys):
    assert cli.main(["dash", str(tmp_path / "nowhere")]) == 2
    assert "is no folder; expected a folder of runs" in capsys.readouterr().err
    assert cli.main(["dash", str(tmp_path), "--port", "70000"]) == 2
    taken = server.serve(tmp_path, 0)
    with pytest.raises(InputError, match="choose another one"):
        server.serve(tmp_path, taken.server_port)
    taken.server_close()


# ------------------------------------------------------------------------------------------------ in a browser


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_page_in_a_browser(runs, client, tmp_path):
    """The page as Chromium ends up with it: every run, no message of an error, and nothing that a run says is run."""
    with open_run(runs, "hostile") as run:
        for step in range(3):
            run.log(step, {HOSTILE: step})
        run.samples("rows", [{HOSTILE: HOSTILE}], HOSTILE)
        publish(run, HOSTILE)

    def dom(tab: str) -> str:
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'chromium'}"]
        command += ["--enable-logging=stderr", "--virtual-time-budget=1500", "--dump-dom"]
        done = subprocess.run(
            [*command, f"http://127.0.0.1:{client.port}/#{tab}"], capture_output=True, text=True, timeout=60
        )
        said = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "source: chrome://" not in line]
        assert not said
        return done.stdout

    curves = dom("curves")
    assert curves.count("<canvas") == 3 and 'data-key="train/loss"' in curves and ">two</a>" in curves
    assert 'role="alert" hidden' in curves and "<title>fledge</title>" in curves
    media = dom("media")
    assert "a caption" in media and "&lt;script&gt;" in media and "<title>fledge</title>" in media
    assert "exact answers" in dom("scores") and "<svg" in dom("lineage")
