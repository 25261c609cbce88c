"""A plain HTTP server that can be in trouble."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from mmlg_scale.data.store import CacheSettings

SIZE = 100_000


def content(name: str, size: int = SIZE) -> bytes:
    seed = hashlib.sha256(name.encode()).digest()
    return (seed * (size // len(seed) + 1))[:size]


def files_in(cache: CacheSettings) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir() if path.is_file())


def used(cache: CacheSettings) -> int:
    """Bytes in a cache's folder, which its threads may change meanwhile: what is gone by then has no size."""
    total = 0
    for path in cache.folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


class Server:
    """A plain HTTP server. `plan[name]` is what becomes of the next requests for a file: a status, cut, stall, wrong; then all is well.

    `folder` is what it serves; without one every name has a content.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.plan: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.release = threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        name = request.path.lstrip("/")
        self.requests[name] += 1
        todo = self.plan.get(name, [])
        what = todo.pop(0) if todo else "well"
        if what.isdigit():
            request.send_error(int(what))
            return
        body = self.body(name) if what != "wrong" else content("another")
        if body is None:
            request.send_error(404)
            return
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        try:
            if what in ("cut", "stall"):
                request.wfile.write(body[: len(body) // 2])
                request.wfile.flush()
                if what == "stall":
                    self.release.wait(20)
            else:
                request.wfile.write(body)
        except OSError:
            pass  # the other side has given up

    def body(self, name: str) -> bytes | None:
        if self.folder is None:
            return content(name)
        file = self.folder / name
        return file.read_bytes() if file.is_file() else None

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
