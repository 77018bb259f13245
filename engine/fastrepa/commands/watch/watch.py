"""The server of `fastrepa watch`: pages of one run, for a browser on this machine.

It listens on 127.0.0.1 alone. A request names one of a few pages or a number, never a file, and the
one that changes anything, by which samples are drawn, must come from a page of its own.
"""

from __future__ import annotations

import errno
import json
import re
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fastrepa.commands.watch.painter import MOST, Painter
from fastrepa.commands.watch.view import Body, View
from fastrepa.errors import ConfigError, DataError, FastrepaError, print_warning, worded
from fastrepa.pages.page import allowed, script
from fastrepa.reading.text import parse_json

HERE = "127.0.0.1"
PORTS = range(8710, 8730)  # tried in turn where none is asked for
LARGEST = 4096  # bytes of a request's body
_SAMPLE = re.compile(r"/samples/([0-9]{1,18})\.png")
_DRAWN = re.compile(r"/drawn/([0-9]{1,9})\.png")
# By another name a page of somebody else's would be let in, whose host resolves to this machine.
_HOST = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?")
_TEXT, _JSON, _PNG = "text/html; charset=utf-8", "application/json", "image/png"


class Server(ThreadingHTTPServer):
    """Serves one run. ConfigError where it cannot listen on the port; 0 takes any that is free."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, run: Path, port: int | None = None, painter: Painter | None = None) -> None:
        self.view = View(run)
        self.painter = painter or Painter(run)
        policy = (
            "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
            "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'; script-src "
        )
        scripts = (script("report.js", "live.js"), script("draw.js"))
        self.policy = policy + " ".join(map(allowed, scripts))
        for choice in PORTS if port is None else (port,):
            try:
                super().__init__((HERE, choice), _Handler)
                return
            except OSError as e:
                if port is not None or e.errno != errno.EADDRINUSE:
                    raise ConfigError(f"--port: {choice} cannot be had ({worded(e)})") from None
        raise ConfigError(f"--port: none of {PORTS[0]} to {PORTS[-1]} is free; give another")

    @property
    def address(self) -> str:
        """The address to open."""
        return f"http://{HERE}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in a line what went wrong, and nothing of a browser that went away."""
        error = sys.exception() or ""
        if not isinstance(error, ConnectionError | TimeoutError):
            print_warning(f"a page could not be made ({type(error).__name__}: {worded(error)})")


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "fastrepa", ""
    timeout = 30.0  # seconds without a word, after which a connection ends

    def do_GET(self) -> None:
        if not self._is_ours():
            return
        path = self.path.partition("?")[0]
        if path == "/":
            self._answer(self.server.view.page(), _TEXT)
        elif path == "/draw":
            self._answer(self.server.view.draw_page(MOST), _TEXT)
        elif path == "/draw/state":
            self._say(HTTPStatus.OK)
        elif match := _SAMPLE.fullmatch(path):
            self._answer(self.server.view.sample(int(match[1])), _PNG)
        elif match := _DRAWN.fullmatch(path):
            number = int(match[1])
            png = self.server.painter.picture(number)
            self._answer(None if png is None else Body(png, f'"{number}"'), _PNG)
        else:
            self._answer(None, _TEXT)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        if not self._is_ours():
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and int(length) <= LARGEST):
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        elif self.path != "/draw":
            self._refuse(HTTPStatus.NOT_FOUND)
        elif self.headers.get("Origin") != f"http://{self.headers['Host']}":
            self._refuse(HTTPStatus.FORBIDDEN)
        elif self.headers.get_content_type() != _JSON:
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        else:
            self._draw(self.rfile.read(int(length)))

    def _draw(self, body: bytes) -> None:
        status, refused = HTTPStatus.ACCEPTED, ""
        try:
            self.server.painter.begin(parse_json(body, Path("request")))
        except (ConfigError, DataError) as e:
            status, refused = HTTPStatus.BAD_REQUEST, str(e)
        except FastrepaError as e:
            status, refused = HTTPStatus.CONFLICT, str(e)
        self._say(status, refused)

    def _say(self, status: HTTPStatus, refused: str = "") -> None:
        state = {**self.server.painter.state(), "refused": refused}
        self._send(status, _JSON, json.dumps(state).encode(), "no-store")

    def _is_ours(self) -> bool:
        if _HOST.fullmatch(self.headers.get("Host") or ""):
            return True
        self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
        return False

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True  # a body may follow, which nobody reads
        self._send(status, "text/plain; charset=utf-8", f"{status.phrase}\n".encode(), "no-store")

    def _answer(self, body: Body | None, kind: str) -> None:
        if body is None:
            self._send(
                HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"Not Found\n", "no-store"
            )
        elif self.headers.get("If-None-Match") == body.tag:
            self._send(HTTPStatus.NOT_MODIFIED, kind, b"", "no-cache", body.tag)
        else:
            self._send(HTTPStatus.OK, kind, body.data, "no-cache", body.tag)

    def _send(
        self, status: HTTPStatus, kind: str, data: bytes, cache: str, tag: str | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            *((("Content-Length", str(len(data))),) if status != HTTPStatus.NOT_MODIFIED else ()),
            ("Cache-Control", cache),
            ("Content-Security-Policy", self.server.policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
            *((("ETag", tag),) if tag else ()),
            *((("Connection", "close"),) if self.close_connection else ()),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal is for what the user must know."""
