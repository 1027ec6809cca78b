"""The line that says how far a run is."""

import io

import pytest

from fledge import progress
from fledge.progress import Progress, clock


def test_without_a_terminal_there_is_a_plain_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress("mae", 100, 40, "img", show=True, stream=out) as line:
        for i in range(60):
            now[0] += 0.5
            line.update({"loss": 1 / (i + 1)}, rows=32)
    lines = out.getvalue().splitlines()
    assert lines[0] == "mae  step 60/100  loss 0.0500  2.00 it/s  64 img/s  ETA 0:20"
    assert len(lines) == 3 and lines[-1] == "mae  step 100/100  loss 0.0167  2.00 it/s  64 img/s  took 0:30"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (750, "12:30"), (11100, "3:05:00")])
def test_clock(seconds, text):
    assert clock(seconds) == text
