"""A headless Chromium, told what to do by the DevTools protocol over a pair of pipes."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60.0
"""Seconds for an answer, also on a machine that is busy with something else."""


def found() -> str | None:
    """The browser on PATH."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def pipe() -> tuple[int, int]:
    """A pipe whose ends are out of the way of descriptors 3 and 4."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]


class Browser:
    """One window. `call` sends a command of the protocol; what the page said on its console is in `said`."""

    def __init__(self, program: str) -> None:
        self.folder = tempfile.mkdtemp(prefix="browser-")
        told, self._out = pipe()
        self._in, tells = pipe()

        def pipes() -> None:  # the browser reads commands from descriptor 3 and answers on 4
            os.dup2(told, 3)
            os.dup2(tells, 4)

        flags = ["--headless", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run", "--disable-quic"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []
        self.process = subprocess.Popen(
            [program, *flags, f"--user-data-dir={self.folder}", "about:blank"],
            pass_fds=(3, 4), preexec_fn=pipes, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(told)
        os.close(tells)
        self._number, self._left, self.events, self.session = 0, b"", [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            heard = self._hear()
            if heard.get("id") == self._number:
                assert "error" not in heard, (method, heard["error"])
                return heard["result"]

    def wait(self, event: str) -> dict[str, Any]:
        """The next event of that name since the last `open`."""
        while not (known := [e for e in self.events if e["method"] == event]):
            self._hear()
        return known[0]["params"]

    def _hear(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._in], [], [], max(0.0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            data = os.read(self._in, 1 << 20)
            assert data, "the browser is gone"
            self._left += data
        message, _, self._left = self._left.partition(b"\0")
        heard = json.loads(message)
        if "method" in heard:
            self.events.append(heard)
        return heard

    # -- what tests do

    def open(self, path: Path, *, width=1400, height=900, media="screen", scheme="light", script=True) -> None:
        """Load a page as a screen of that size shows it, or as paper."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        features = [
            {"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": "reduce"}
        ]  # fmt: skip
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.call("Page.navigate", url=path.as_uri())
        self.wait("Page.loadEventFired")

    def value(self, expression: str) -> Any:
        """What an expression is on the page."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def place(self, selector: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
        """A point of an element, scrolled into sight: (0, 0) its upper left corner, (1, 1) the lower right."""
        box = self.value(
            f"(e => {{e.scrollIntoView({{block: 'center'}}); const b = e.getBoundingClientRect();"
            f"return [b.left, b.top, b.width, b.height]}})(document.querySelector({json.dumps(selector)}))"
        )
        return box[0] + x * box[2], box[1] + y * box[3]

    def hover(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        at = self.place(selector, x, y)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=at[1])

    def click(self, selector: str) -> None:
        at = self.place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", clickCount=1)

    def picture(self, path: Path, whole: bool = False) -> None:
        """A screenshot, of what is in sight or of the whole page."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(taken["data"]))

    @property
    def said(self) -> list[str]:
        """What was written to the console, thrown, or asked in a dialog, since the page was opened."""
        kinds = (
            "Runtime.consoleAPICalled",
            "Runtime.exceptionThrown",
            "Log.entryAdded",
            "Page.javascriptDialogOpening",
        )
        return [json.dumps(e["params"]) for e in self.events if e["method"] in kinds]
