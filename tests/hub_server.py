# SPDX-License-Identifier: Apache-2.0
"""Model hubs on this host, for HF_ENDPOINT and MODELSCOPE_ENDPOINT: the few answers that their libraries need."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

__all__ = ["COMMIT", "Hub", "environment_of", "serve", "use_hub"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What was asked.

    Attributes:
        endpoint: the URL for HF_ENDPOINT or MODELSCOPE_ENDPOINT.
        requests: method and path of every request.
        ranges: (file, Range header) of every request for a file's content.
        sent: bytes of files that were sent.
        failing: how many requests for parts of safetensors files will still be answered with an error of the server.
    """

    endpoint: str
    requests: list[str] = field(default_factory=list)
    ranges: list[tuple[str, str | None]] = field(default_factory=list)
    sent: int = 0
    failing: int = 0


def environment_of(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """Variables of a process that knows this hub and no other, and has a cache of its own."""
    ours = ("HF_", "HUGGING", "MODELSCOPE", "VLLM_USE_MODELSCOPE")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    hugging_face = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home)}
    modelscope = {
        "MODELSCOPE_ENDPOINT": hub.endpoint,
        "MODELSCOPE_CACHE": str(home / "modelscope"),
        "MODELSCOPE_HOME": str(home / "modelscope_home"),
    }
    return clean | hugging_face | modelscope | {"NO_PROXY": "127.0.0.1", **more}


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str, home: Path) -> None:
    """Let huggingface_hub in this process know this hub and no other, no token, and a cache of its own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "VLLM_USE_MODELSCOPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@contextmanager
def serve(
    models: dict[str, Path], *, honour_ranges: bool = True, token: str = "", modelscope: bool = False
) -> Iterator[Hub]:
    """Serve folders as models, on a free port of the loopback interface.

    Args:
        models: the folders by hub id.
        honour_ranges: whether a request for a part of a file gets it; else the whole file.
        token: what every request has to give, where it is not empty.
        modelscope: answer as ModelScope does; else as Hugging Face's hub.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None: ...

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            if token and self.headers.get("Authorization") != f"Bearer {token}":
                content = b'{"Code": 401, "Message": "no access", "error": "no access", "Success": false}'
                return self._send(401, content, {"X-Error-Code": "RepoNotFound"}, body=body)
            address = urlsplit(self.path)
            path = unquote(address.path).strip("/")
            query = {name: values[0] for name, values in parse_qs(address.query).items()}
            for name, folder in models.items():
                if modelscope and self._modelscope(path, query, name, folder, body=body):
                    return None
                if not modelscope and self._hugging_face(path, name, folder, body=body):
                    return None
            content = b'{"Code": 10010205001, "Message": "record not found", "error": "Repository not found"}'
            return self._send(404, content, {"X-Error-Code": "RepoNotFound"}, body=body)

        def _hugging_face(self, path: str, name: str, folder: Path, *, body: bool) -> bool:
            files = sorted(file for file in folder.iterdir() if file.is_file())
            prefix, found, rest = path.partition("/resolve/")
            if path in (
                f"api/models/{name}",
                f"api/models/{name}/revision/main",
                f"api/models/{name}/revision/{COMMIT}",
            ):
                siblings = [{"rfilename": file.name, "size": file.stat().st_size} for file in files]
                info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
                self._send_json(info)
            elif path.startswith(f"api/models/{name}/tree/"):
                tree = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40} for file in files
                ]
                self._send_json(tree)
            elif found and prefix == name:
                self._file(folder / rest.partition("/")[2], body=body)
            else:
                return False
            return True

        def _modelscope(self, path: str, query: dict[str, str], name: str, folder: Path, *, body: bool) -> bool:
            known = query.get("Revision", "master") == "master"
            if path == f"api/v1/models/{name}/repo/files" and known:
                files = [
                    {"Name": file.name, "Path": file.name, "Type": "blob", "Size": file.stat().st_size}
                    for file in sorted(folder.iterdir())
                ]
                files.append({"Name": "figures", "Path": "figures", "Type": "tree", "Size": 0})
                self._send_json({"Code": 200, "Success": True, "Data": {"Files": files}})
            elif path == f"api/v1/models/{name}/repo" and known and (folder / query["FilePath"]).is_file():
                self._file(folder / query["FilePath"], body=body)
            else:
                return False
            return True

        def _send_json(self, content: object) -> None:
            self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _file(self, file: Path, *, body: bool) -> None:
            if not file.is_file():
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body=body)
            content = file.read_bytes()
            headers = {"ETag": '"' + hashlib.sha256(content).hexdigest() + '"', "X-Repo-Commit": COMMIT}
            asked = self.headers.get("Range")
            if body:
                hub.ranges.append((file.name, asked))
            if asked and file.suffix == ".safetensors" and hub.failing > 0:
                hub.failing -= 1
                return self._send(503, b"busy", {}, body=body)
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
