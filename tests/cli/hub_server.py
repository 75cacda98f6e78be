# SPDX-License-Identifier: Apache-2.0
"""A model hub on this host, for HF_ENDPOINT: the few answers that huggingface_hub asks for, from a folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["COMMIT", "Hub", "serve"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What was asked.

    Attributes:
        endpoint: the URL for HF_ENDPOINT.
        ranges: (file, Range header) of every request for a file's content.
        sent: bytes of files that were sent.
    """

    endpoint: str
    ranges: list[tuple[str, str | None]] = field(default_factory=list)
    sent: int = 0


@contextmanager
def serve(models: dict[str, Path], *, honour_ranges: bool = True) -> Iterator[Hub]:
    """Serve folders as models, on a free port of the loopback interface."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None: ...

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            for name, folder in models.items():
                if path in (f"api/models/{name}", f"api/models/{name}/revision/main"):
                    return self._info(name, folder)
                prefix, found, rest = path.partition("/resolve/")
                if found and prefix == name:
                    return self._file(folder / rest.partition("/")[2], body=body)
            return self._send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}, body=body)

        def _info(self, name: str, folder: Path) -> None:
            siblings = [{"rfilename": file.name, "size": file.stat().st_size} for file in sorted(folder.iterdir())]
            info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

        def _file(self, file: Path, *, body: bool) -> None:
            if not file.is_file():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body=body)
            content = file.read_bytes()
            headers = {"ETag": '"' + hashlib.sha256(content).hexdigest() + '"', "X-Repo-Commit": COMMIT}
            asked = self.headers.get("Range")
            if body:
                hub.ranges.append((file.name, asked))
            if asked and honour_ranges:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                part = content[int(first) : int(last) + 1 if last else None]
                headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
                return self._send(206, part, headers, body=body, counted=True)
            return self._send(200, content, headers, body=body, counted=True)

        def _send(
            self, status: int, content: bytes, headers: dict[str, str], *, body: bool = True, counted: bool = False
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                try:
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                if counted:
                    hub.sent += len(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
