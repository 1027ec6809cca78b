"""The server of the dashboard: this machine only, reading only.

It binds to 127.0.0.1, answers GET alone, and refuses a request whose Host is another name than this machine's: a page
from elsewhere that lets its own name point here (DNS rebinding) reads nothing. Files are found by the name of a run and
of a picture that the run itself has listed, never by a path. Nothing is logged.
"""

import json
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fledge.dash.runs import Runs
from fledge.errors import InputError

PORT = 8347
NAMES = ("127.0.0.1", "localhost")  # with any port: a tunnel may lead here
ASSETS = {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css"}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
MEDIA = {".png": "image/png", ".json": "application/json"}
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
ALONE = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

Answer = tuple[int, str, bytes]
"""Status, type, content."""


def answer(runs: Runs, path: str, query: dict[str, str]) -> Answer:
    """What stands at a path."""
    try:
        if path in ASSETS:
            file = ASSETS[path]
            return 200, TYPES[Path(file).suffix], (files("fledge.dash") / file).read_bytes()
        if path == "/api/runs":
            return _json(runs.listing())
        if path == "/api/curves":
            return _json(runs.curves(query.get("run", "")))
        if path == "/api/lineage":
            return _json({"svg": runs.lineage()})
        if path == "/media":
            found = runs.media(query.get("run", ""), query.get("name", ""))
            return (200, MEDIA[found.suffix], found.read_bytes()) if found and found.suffix in MEDIA else _nothing()
        if path == "/run":
            page = runs.page(query.get("id", ""))
            return (200, TYPES[".html"], page.encode()) if page is not None else _nothing()
    except InputError as error:  # a file of a run was changed from outside; the others can still be looked at
        return _json({"error": str(error)}, 500)
    return _nothing()


def _json(value: Any, status: int = 200) -> Answer:
    if value is None:
        return _nothing()
    return status, MEDIA[".json"], json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _nothing() -> Answer:
    return 404, "text/plain", b"there is nothing here\n"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "fledge", ""
    timeout = 60
    runs: Runs

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        host = (self.headers.get("Host") or "").rpartition(":")[0] or (self.headers.get("Host") or "")
        if host not in NAMES:
            self._send(403, "text/plain", b"expected Host: 127.0.0.1 or localhost\n", "")
            return
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        status, kind, content = answer(self.runs, url.path, query)
        # A run's own page brings the policy that it needs, with everything inside and no connections.
        self._send(status, kind, content, ALONE if url.path == "/run" else POLICY + ALONE)

    def _send(self, status: int, kind: str, content: bytes, policy: str) -> None:
        self.send_response(status)
        heads = {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store"}
        heads |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        heads |= {"Cross-Origin-Resource-Policy": "same-origin", "Content-Security-Policy": policy or ALONE}
        for name, value in heads.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a log of what was looked at serves nobody."""


class Server(ThreadingHTTPServer):
    """On loopback alone."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error; anything else is told."""
        import sys

        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def serve(folder: str | Path, port: int | None = None) -> Server:
    """A server of the runs below `folder`, ready to `serve_forever`.

    Args:
        port: None: PORT, or any free one where that is taken; 0: any free one.

    Raises:
        InputError: no such folder, or the port is taken.
    """
    folder = Path(folder)
    if port is not None and port > 65535:
        raise InputError(f"--port {port}: expected at most 65535")
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; expected a folder of runs, such as runs")
    handler = type("RunsHandler", (Handler,), {"runs": Runs(folder)})
    for wish in [PORT, 0] if port is None else [port]:
        try:
            return Server(("127.0.0.1", wish), handler)
        except OSError as error:
            reason = error.strerror
    raise InputError(f"--port {port}: {reason}; choose another one, or leave it out")


def main(folder: str | Path, port: int | None = None) -> None:
    """Serve until Ctrl-C."""
    with serve(folder, port) as server:
        count = len(Runs(Path(folder)).find())
        print(
            f"dash: {count} run{'s' * (count != 1)} below {folder} at http://127.0.0.1:{server.server_port}", flush=True
        )
        print(
            f"dash: from another machine: ssh -L 8347:127.0.0.1:{server.server_port} {socket.gethostname()}", flush=True
        )
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print()
