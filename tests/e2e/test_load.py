# SPDX-License-Identifier: Apache-2.0
"""A server of a quantized model: many requests at once, broken bodies, clients that hang up, memory over hundreds of
requests, SIGTERM while it loads, a worker that is killed, and a weight file that is cut before it is read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.e2e.test_server import ANSWER_SECONDS, ask, server, wait_until_ready
from tests.fixtures_index import fixture

pytestmark = pytest.mark.engine

MODEL = "msmodelslim-qwen3-w8a8-dynamic"
REQUESTS, AT_ONCE = 200, 100
#: Requests wait for each other on few cores.
LOADED_SECONDS = 300
END_SECONDS = 60

PROMPTS = [
    f"{word} is"
    for word in ("The price of peace", "Water", "A short answer", "Nothing", "The last line", "Snow", "He", "Work")
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that all tests share."""
    log = tmp_path_factory.mktemp("load") / "server.log"
    with server(fixture(MODEL), log) as address:
        wait_until_ready(address, log)
        yield address


def body_of(prompt: str, **changes: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": 8,
        "temperature": 0,
        "logprobs": 2,
        "return_tokens_as_token_ids": True,  # different tokens may have one text
        "ignore_eos": True,
    } | changes


def answer(address: str, prompt: str, timeout: float = LOADED_SECONDS, **changes: Any) -> dict[str, Any]:
    """The log-probabilities of a greedy answer."""
    (choice,) = ask(address + "/v1/completions", body_of(prompt, **changes), timeout)["choices"]
    return choice["logprobs"]


def agrees(alone: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two greedy answers are one: token by token, up to a step at which the first two candidates are nearly equal, so
    that the size of a batch may decide."""
    for step, (mine, theirs) in enumerate(zip(alone["tokens"], other["tokens"], strict=True)):
        best, second = sorted(alone["top_logprobs"][step].values(), reverse=True)[:2]
        if mine != theirs:
            return best - second < 0.05
    return True


def test_answers_under_load_are_those_without(loaded: str) -> None:
    alone = [answer(loaded, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(AT_ONCE) as clients:
        found = list(clients.map(lambda number: answer(loaded, PROMPTS[number % len(PROMPTS)]), range(REQUESTS)))
    wrong = [number for number, one in enumerate(found) if not agrees(alone[number % len(PROMPTS)], one)]
    assert not wrong


BROKEN: dict[str, bytes] = {
    "no JSON": b"{",
    "a list": b"[]",
    "nothing": b"",
    "not UTF-8": b'{"model": "tiny", "prompt": "\xff\xfe"}',
    "another model": json.dumps(body_of("a", model="other")).encode(),
    "negative length": json.dumps(body_of("a", max_tokens=-1)).encode(),
    "text for a number": json.dumps(body_of("a", max_tokens="many")).encode(),
    "tokens out of the vocabulary": json.dumps(body_of("") | {"prompt": [10**9]}).encode(),
    "longer than the model": json.dumps(body_of("a " * 3000)).encode(),
    "a deep prompt": b'{"model": "tiny", "prompt": ' + b"[" * 2000 + b"]" * 2000 + b"}",
}


def raw(address: str, body: bytes, *, read: bool = True) -> int:
    """Send a body as it is; the status, or 0 without waiting for an answer."""
    where = urlsplit(address)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    with socket.create_connection((where.hostname, where.port), timeout=ANSWER_SECONDS) as stream:
        stream.sendall(head.encode() + body)
        return int(stream.recv(64).split()[1]) if read else 0


def test_broken_requests_are_answered_as_such(loaded: str) -> None:
    before = answer(loaded, PROMPTS[0])
    found = {name: raw(loaded, body) for name, body in BROKEN.items()}
    assert {name: status for name, status in found.items() if not 400 <= status < 500} == {}
    assert agrees(before, answer(loaded, PROMPTS[0]))


def test_clients_that_hang_up_leave_the_server_free(loaded: str) -> None:
    """They asked for long answers, and the next client gets its own."""
    before = answer(loaded, PROMPTS[0])
    long = json.dumps(body_of(PROMPTS[1], max_tokens=240, stream=True)).encode()
    for _ in range(50):
        raw(loaded, long, read=False)
    assert agrees(before, answer(loaded, PROMPTS[0]))


@pytest.mark.variant
def test_memory_does_not_grow(loaded: str) -> None:
    def ask_many(count: int) -> int:
        with ThreadPoolExecutor(8) as clients:
            list(clients.map(lambda number: answer(loaded, PROMPTS[number % len(PROMPTS)]), range(count)))
        return sum(resident(process) for process in processes_with(urlsplit(loaded).port))

    ask_many(200)
    first = ask_many(100)
    last = ask_many(500)
    assert last - first < 32 << 20


# ------------------------------------------------------------------------------------------------------ processes that end


def session_of(process: int) -> int | None:
    """The session of a process that runs; None for one that has ended, waited for or not."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[3])


def processes_of(session: int) -> list[int]:
    numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [number for number in numbers if session_of(number) == session]


def processes_with(port: int | None) -> list[int]:
    """The processes of the server at a port."""
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                command = (path / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(port).encode() in command and b"--port" in command:
                return processes_of(session_of(int(path.name)) or -1)
    return []


def resident(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.2)
    return condition()


def started(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A server in a session of its own."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--enforce-eager"]
    command += ["--max-model-len", "128", "--max-num-seqs", "4", "--kv-cache-memory-bytes", str(64 << 20), *arguments]
    env = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with log.open("w") as stream:
        return subprocess.Popen(
            command, stdout=stream, stderr=stream, env={**env, "VLLM_LOGGING_LEVEL": "INFO"}, start_new_session=True
        )


def ended(process: subprocess.Popen[bytes], log: Path) -> str:
    """What it logged; fails, and ends what is left, where any process of the session outlives the limit."""
    gone = until(lambda: process.poll() is not None and not processes_of(process.pid), END_SECONDS)
    left = [Path(f"/proc/{number}/cmdline").read_bytes() for number in processes_of(process.pid)]
    if not gone:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    assert gone, left
    return log.read_text()


def test_sigterm_while_it_loads_leaves_no_process(tmp_path: Path) -> None:
    """It is sent again each second: vLLM 0.32 loses one that comes while the engine starts, of float models too."""
    log = tmp_path / "server.log"
    process = started(["--model", str(fixture(MODEL)), "--port", "0"], log)
    assert until(lambda: "Starting to load model" in log.read_text() or process.poll() is not None, 300)
    assert process.poll() is None, log.read_text()[-3000:]
    for _ in range(END_SECONDS):
        process.send_signal(signal.SIGTERM)
        if until(lambda: process.poll() is not None, 1):
            break
    ended(process, log)


@pytest.mark.variant
@pytest.mark.tp2
def test_a_killed_worker_ends_the_server_with_a_message(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = started(
        ["--model", str(fixture(MODEL)), "--served-model-name", "tiny", "--port", str(port), "-tp", "2"], log
    )
    wait_until_ready(f"http://127.0.0.1:{port}", log)
    (worker,) = [
        number for number in processes_of(process.pid) if b"Worker_TP1" in Path(f"/proc/{number}/cmdline").read_bytes()
    ]
    os.kill(worker, signal.SIGKILL)
    with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
        ask(f"http://127.0.0.1:{port}/v1/completions", body_of(PROMPTS[0]), ANSWER_SECONDS)
    assert "died unexpectedly" in ended(process, log)


# ------------------------------------------------------------------------------------------------- a file that gets shorter

_CUT = """
import os, sys
from vllm.model_executor.model_loader import weight_utils

opened = weight_utils.safe_open

def cut(path, *arguments, **options):
    os.truncate(path, 1000 + os.path.getsize(path) // 2)
    return opened(path, *arguments, **options)

weight_utils.safe_open = cut
from vllm import LLM
LLM(sys.argv[1], enforce_eager=True, max_model_len=64, kv_cache_memory_bytes=64 << 20)
"""


@pytest.mark.variant
def test_a_file_that_is_cut_before_it_is_read_is_an_error(tmp_path: Path) -> None:
    """After the headers were checked, and before vLLM opens it."""
    folder = tmp_path / "model"
    shutil.copytree(fixture(MODEL), folder)
    done = subprocess.run(
        [sys.executable, "-c", _CUT, str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )
    assert done.returncode == 1, (done.returncode, done.stderr[-3000:])
    assert "incomplete metadata" in done.stderr or "file not fully covered" in done.stderr, done.stderr[-3000:]
