# SPDX-License-Identifier: Apache-2.0
"""Hubs that answer what no hub answers: findings, bounded time and output, and nothing outside of the cache."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import COMMIT, use_hub
from vllm_npu_quant.checkpoint import folder, hub, open_checkpoint
from vllm_npu_quant.errors import NpuQuantError

pytest.importorskip("huggingface_hub")
MODEL = "org/model"
CONFIG = b'{"model_type": "qwen3"}'
#: A header of one tensor without elements.
WEIGHTS = (60).to_bytes(8, "little") + b'{"w":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}'.ljust(60)


def listing(*siblings: Any, sha: Any = COMMIT) -> bytes:
    return json.dumps({"id": MODEL, "sha": sha, "siblings": list(siblings)}).encode()


@contextmanager
def answers(list_of_files: bytes, *, etag: str = "0" * 40, commit: str = COMMIT, drip: str = "") -> Iterator[str]:
    """A hub with these answers, which gives the named part of an answer byte by byte and never ends."""
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            what = "list" if self.path.startswith("/api/") else "headers" if "safetensors" in self.path else "config"
            content = {"list": list_of_files, "headers": WEIGHTS, "config": CONFIG}[what]
            if drip == f"{what} line":
                self._endless(b"HTTP/1.1 200 OK\r\nX-Long: ")
                return
            self.send_response(200)
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", str(1 << 20 if drip == what else len(content)))
            self.end_headers()
            if drip == what:
                self._endless(content[:8])
            elif self.command == "GET":
                self.wfile.write(content)

        def _endless(self, first: bytes) -> None:
            self.wfile.write(first)
            try:
                while not ended.wait(0.05):
                    self.wfile.write(b" ")
            except OSError:
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        ended.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Opens the model of a hub with an empty cache below ``home``, and reads its config."""
    (tmp_path / "home").mkdir()

    def opened(endpoint: str) -> Any:
        use_hub(monkeypatch, endpoint, tmp_path / "home")
        checkpoint = open_checkpoint(MODEL)
        if "config.json" in checkpoint.names:
            checkpoint.read_json("config.json")
        return checkpoint

    return opened


def refused(ask: Callable[[str], Any], endpoint: str) -> str:
    with pytest.raises(NpuQuantError) as caught:
        ask(endpoint)
    assert {finding.code for finding in caught.value.findings} == {"unreadable-file"}
    return str(caught.value)


FILES = ({"rfilename": "config.json", "size": len(CONFIG)}, {"rfilename": "model.safetensors", "size": len(WEIGHTS)})


def test_a_hub_that_is_one(ask: Callable[[str], Any]) -> None:
    with answers(listing(*FILES)) as endpoint:
        checkpoint = ask(endpoint)
    assert list(checkpoint.tensors) == ["w"]
    assert checkpoint.findings == ()


@pytest.mark.parametrize(
    "sha", ["../../../outside", "/outside", COMMIT + "/..", COMMIT[:-1], COMMIT.upper(), 7, None, []]
)
def test_commits(sha: Any, ask: Callable[[str], Any], tmp_path: Path) -> None:
    """A commit is a folder's name in the cache: another form is refused before anything is downloaded."""
    with answers(listing(*FILES, sha=sha)) as endpoint:
        assert "has not the form that hubs give" in refused(ask, endpoint)
    assert [path.name for path in tmp_path.rglob("*")] == ["home"]


@pytest.mark.parametrize(
    ("etag", "commit"),
    [("../../../../outside", COMMIT), ("/outside", COMMIT), ("0" * 40, "../../outside"), ("", COMMIT)],
)
def test_headers_that_become_paths(etag: str, commit: str, ask: Callable[[str], Any], tmp_path: Path) -> None:
    with answers(listing(*FILES), etag=etag, commit=commit) as endpoint:
        assert "has not the form that hubs give" in refused(ask, endpoint)
    assert [path.name for path in tmp_path.rglob("*")] == ["home"]


@pytest.mark.parametrize(
    "entry",
    [
        {"rfilename": "model.safetensors", "size": "1000"},
        {"rfilename": "model.safetensors", "size": [1]},
        {"rfilename": "model.safetensors", "size": -1},
        {"rfilename": "model.safetensors", "size": True},
        {"rfilename": 7, "size": 1},
        {"rfilename": None, "size": 1},
        {"size": 1},
        "model.safetensors",
        None,
    ],
)
def test_entries(entry: Any, ask: Callable[[str], Any]) -> None:
    with answers(listing(*FILES, entry)) as endpoint:
        assert "has not the form that hubs give" in refused(ask, endpoint)


@pytest.mark.parametrize("content", [b"", b"[]", b"<html>", b"{", b'{"sha": "' + COMMIT.encode() + b'"}', b"[" * 10**5])
def test_lists(content: bytes, ask: Callable[[str], Any]) -> None:
    with answers(content) as endpoint:
        assert refused(ask, endpoint)


def test_a_list_without_end(ask: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "CONFIG_MAX_BYTES", 1000)
    with answers(listing(*FILES, *({"rfilename": f"{number}.txt", "size": 1} for number in range(1000)))) as endpoint:
        assert refused(ask, endpoint)


def test_sizes_may_be_missing(ask: Callable[[str], Any]) -> None:
    with answers(listing({"rfilename": "README.md"}, {"rfilename": "LICENSE", "size": None}, *FILES)) as endpoint:
        assert list(ask(endpoint).tensors) == ["w"]


def test_many_names(ask: Callable[[str], Any]) -> None:
    """No header is asked for, and the answer is short."""
    files = [{"rfilename": f"model-{number}.safetensors", "size": 1} for number in range(folder.MAX_WEIGHT_FILES + 1)]
    with answers(listing(*files)) as endpoint:
        checkpoint = ask(endpoint)
    assert [finding.code for finding in checkpoint.findings] == ["unreadable-file"]
    assert len(str(NpuQuantError(checkpoint.findings))) < 2000


@pytest.mark.parametrize("part", ["list", "list line", "headers", "headers line", "config", "config line"])
def test_answers_without_end(part: str, ask: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then keeps every timeout of a connection from passing."""
    monkeypatch.setattr(hub, "ANSWER_TIMEOUT", 1.0)
    monkeypatch.setattr(hub, "ANSWER_RATE", 1 << 30)
    monkeypatch.setattr(hub, "PAUSE", 0.0)
    with answers(listing(*FILES), drip=part) as endpoint:
        if part.startswith("headers"):
            text = str(NpuQuantError(ask(endpoint).findings))
        else:
            text = refused(ask, endpoint)
    assert "no complete answer in" in text


def test_time_for_all_headers(ask: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HEADERS_TIMEOUT", 0.0)
    with answers(listing(*FILES)) as endpoint:
        found = ask(endpoint).findings
    assert "the headers of all files took more than" in str(NpuQuantError(found))


def test_names_of_the_hub_are_escaped(ask: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PAUSE", 0.0)
    monkeypatch.setattr(hub, "HEADERS_TIMEOUT", 0.0)
    name = "model\x1b[31m\nINFO all is well\x07.safetensors"
    with answers(listing({"rfilename": name, "size": 100})) as endpoint:
        text = str(NpuQuantError(ask(endpoint).findings))
    assert "the hub did not give" in text
    assert all(line.isprintable() for line in text.split("\n"))
