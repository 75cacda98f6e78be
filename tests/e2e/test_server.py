# SPDX-License-Identifier: Apache-2.0
"""The OpenAI-compatible server answers from a ModelSlim checkpoint, with nothing said about its quantization."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_index import fixture

pytestmark = pytest.mark.engine

START_SECONDS, ANSWER_SECONDS = 300, 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(folder: Path, log: Path) -> Iterator[str]:
    """The address of a running server; it and its engine are gone afterwards."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny", "--enforce-eager"]
    command += ["--max-model-len", "256", "--max-num-seqs", "4", "--kv-cache-memory-bytes", str(64 << 20)]
    env = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**env, "VLLM_LOGGING_LEVEL": "INFO"},
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):  # the engine's process is in the same session
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def ask(url: str, body: dict[str, Any] | None = None, timeout: float = 5) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        text = response.read()
        return json.loads(text) if text else None


def wait_until_ready(address: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            ask(address + "/health")
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    pytest.fail(f"the server did not start in {START_SECONDS} s:\n{log.read_text()[-4000:]}")


def test_completion(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with server(fixture("msmodelslim-qwen3-w8a8-dynamic"), log) as address:
        wait_until_ready(address, log)
        assert [model["id"] for model in ask(address + "/v1/models")["data"]] == ["tiny"]
        body = {"model": "tiny", "prompt": "The price of peace is", "max_tokens": 4, "temperature": 0}
        answers = [ask(address + "/v1/completions", body, ANSWER_SECONDS) for _ in range(2)]
    assert answers[0]["usage"]["completion_tokens"] == 4
    assert answers[0]["choices"][0]["text"] == answers[1]["choices"][0]["text"] != ""
    assert "quantization=modelslim" in log.read_text()
