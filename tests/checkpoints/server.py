"""A small web server on this machine that plays a hub and a file host, with the faults of real ones."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

COMMIT = "a" * 40


@dataclass
class Host:
    """Files by path ("owner/name/resolve/main/model.safetensors" is the hub's own form) and what goes wrong with them.

    cut: paths whose whole transfer ends after half of the bytes, the first time or always; `asked` lists (method, path, range).
    """

    files: dict[str, bytes]
    cut: set[str] = field(default_factory=set)
    always_cut: set[str] = field(default_factory=set)
    wrong_hash: set[str] = field(default_factory=set)
    status: int = 0  # answer everything with this
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(host: Host) -> Iterator[Host]:
    """The host, answering on 127.0.0.1 at `host.url`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path, asked = self.path.lstrip("/").partition("?")[0], self.headers.get("Range", "")
            host.asked.append((self.command, path, asked))
            content = host.files.get(path.replace(f"resolve/{COMMIT}", "resolve/main"))
            if host.status or content is None:
                self.send_response(host.status or 404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            digest = "0" * 64 if path in host.wrong_hash else hashlib.sha256(content).hexdigest()
            start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
            part = content[start:]
            self.send_response(206 if asked else 200)
            for name, value in {
                "ETag": f'"{digest}"',
                "X-Repo-Commit": COMMIT,
                "Content-Length": str(len(part)),
                "Accept-Ranges": "bytes",
                **({"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if asked else {}),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if not body:
                return
            if path in host.cut | host.always_cut:
                host.cut.discard(path)
                part = part[: len(part) // 2]
                self.close_connection = True
            self.wfile.write(part)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        host.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield host
        finally:
            server.shutdown()
            thread.join()
