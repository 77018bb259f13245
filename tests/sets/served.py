"""A web server on loopback that gives byte ranges of a folder, and fails as it is told."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Served:
    """A folder at an address.

    fault: called with (file name, first byte) of every GET; "503", "drop" (the connection ends
    inside of the body), "403", "whole" (no ranges, and more to come than anybody could hold) or
    None. asked: (name, first, bytes) of each.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.address = folder, f"http://127.0.0.1:{port}/sets/birds"
        self.fault: Callable[[str, int], str | None] = lambda name, first: None
        self.asked: list[tuple[str, int, int]] = []


@contextmanager
def served(folder: Path) -> Iterator[Served]:
    """Serve a folder until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, body: bool) -> None:
            name = self.path.removeprefix("/sets/birds/")
            path = state.folder / name
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first = int(found[1]) if found else 0
            fault = state.fault(name, first) if body else None
            if fault in ("503", "403") or not path.is_file():
                self.send_response(int(fault) if fault in ("503", "403") else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = path.read_bytes()
            ranged = found is not None and fault != "whole"
            part = data[first : int(found[2]) + 1] if found and ranged else data
            if body:
                state.asked.append((name, first, len(part)))
            self.send_response(206 if ranged else 200)
            size = 10**12 if fault == "whole" else len(part)
            self.send_header("Content-Length", str(size))
            self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
            self.end_headers()
            if body:
                self.wfile.write(part[: len(part) // 2] if fault == "drop" else part)
            if fault == "drop":
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = Served(folder, server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
