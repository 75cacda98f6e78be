# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by name: a local folder, a snapshot in the local cache of a hub, or the files of a hub itself.

Of a hub's model, configs are downloaded and headers of weight files are read by range requests: a few megabytes of a
checkpoint of 700 GB. Nothing is imported from a model's repository, and no code of it runs.

The hub is Hugging Face's, or ModelScope where ``VLLM_USE_MODELSCOPE`` is set, as for vLLM.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from vllm_npu_quant.checkpoint.files import listed
from vllm_npu_quant.checkpoint.folder import MAX_WEIGHT_FILES, Checkpoint, pickled_weights
from vllm_npu_quant.checkpoint.json_files import CONFIG_MAX_BYTES, json_limit, parse_json
from vllm_npu_quant.checkpoint.safetensors_header import Header, HeaderBudget, header_length, parse_header
from vllm_npu_quant.checkpoint.text import shown
from vllm_npu_quant.errors import Finding, NpuQuantError, Severity

__all__ = ["RemoteCheckpoint", "find_local", "is_path", "open_checkpoint"]

#: Bytes of the first request for a header, enough for the headers of most files.
FIRST = 256 * 1024
#: Requests at a time.
WORKERS = 8
#: Seconds in which some bytes of an answer have to come: of the list of a model's files, and of a part of one.
LIST_TIMEOUT = 10.0
READ_TIMEOUT = 30.0
#: Seconds for a whole answer, with one more for each ANSWER_RATE bytes; and for all headers of a model together.
ANSWER_TIMEOUT = 60.0
ANSWER_RATE = 1 << 19
HEADERS_TIMEOUT = 600.0
#: Seconds before a part of a file is asked for a second and last time.
PAUSE = 1.0

#: A commit, and the identity of a file's content, as hubs give them. Both become names in huggingface_hub's cache.
_COMMIT = re.compile("[0-9a-f]{40}")
_ETAG = re.compile("[0-9A-Za-z][0-9A-Za-z_-]{0,127}")

_Answer = TypeVar("_Answer")


def open_checkpoint(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    download_dir: str | Path | None = None,
    follow_links: bool = True,
    headers: bool = True,
) -> Checkpoint:
    """Open the checkpoint of a local folder or of a model of a hub.

    A hub's model comes from the local cache where that holds all of its weight files, without a request; else from the hub.
    A part in the cache is opened where the hub cannot be reached: its findings say what is missing.

    Args:
        model: a folder or a hub id ("Qwen/Qwen3-8B").
        revision: branch, tag or commit of a hub id; None is its main branch.
        token: of a private model; None and True are the token that the hub's own library has stored.
        download_dir: vLLM's ``--download-dir``: a cache that is looked into before the usual one, and downloaded to.
        follow_links: whether links that lead out of a folder are followed; else they are findings.
        headers: False leaves the headers of a folder's or a hub's weight files unread, for who needs names and configs only:
            ``tensors``, ``files`` and ``findings`` are empty then.

    Raises:
        NpuQuantError: unreadable-file, where there is no such folder, or the hub cannot be reached or does not have it.
    """
    name = os.fspath(model)
    if os.path.isdir(name) or is_path(name):
        return Checkpoint.open(name, follow_links=follow_links, headers=headers)
    cached = _open_cached(name, revision, download_dir)
    if cached is not None and _is_complete(cached):
        return cached
    hub = _ModelScope if _uses_modelscope() else _HuggingFace
    remote = hub(name, revision, token, download_dir)
    try:
        remote.list_files()
    except NpuQuantError:
        if cached is not None and cached.names:
            return cached
        raise
    if headers:
        remote.read_headers()
    return remote


def is_path(name: str) -> bool:
    """Whether a model's name can only be a path or a URL, so that no hub is asked."""
    return (
        name.startswith((".", "/", "~", "\\"))
        or name.count("/") > 1
        or "\\" in name
        or os.path.exists(name)
        or not name
    )


def find_local(model: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None) -> Path | None:
    """The folder of a model: the folder itself, or the snapshot of a hub id in the local cache.

    Never goes to the network. The snapshot may be incomplete: ``Checkpoint.findings`` tells.

    Args:
        model: a folder or a hub id ("Qwen/Qwen3-8B").
        revision: branch, tag or commit of a hub id; None is its main branch.
        cache_dir: the cache, where it is not the one that the hub's library takes by default.

    Returns:
        None where there is neither such a folder nor a snapshot.
    """
    if os.path.isdir(model):
        return Path(model)
    name = str(model)
    if is_path(name):
        return None
    return (_find_modelscope if _uses_modelscope() else _find_hugging_face)(name, revision, cache_dir)


def _find_hugging_face(model: str, revision: str | None, cache_dir: str | Path | None) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError

    try:
        # Without the pattern, some versions refuse a snapshot that lacks any file, be it a README.
        folder = snapshot_download(
            model, revision=revision, cache_dir=cache_dir, local_files_only=True, ignore_patterns="*"
        )
    except (OSError, HFValidationError):  # not in the cache; not the form of a hub id
        return None
    return Path(folder)


def _find_modelscope(model: str, revision: str | None, cache_dir: str | Path | None) -> Path | None:
    _require_modelscope(model)
    from modelscope.hub import errors
    from modelscope.hub.snapshot_download import snapshot_download

    missing = getattr(errors, "CacheNotFound", ValueError)  # since modelscope 1.19
    try:
        folder = snapshot_download(
            model,
            revision=None if revision == "main" else revision,
            cache_dir=None if cache_dir is None else str(cache_dir),
            local_files_only=True,
        )
    except (OSError, ValueError, missing, errors.InvalidParameter):
        return None
    return Path(folder)


class _Cached(Checkpoint):
    """A snapshot that is spread over several caches: vLLM has weights in ``--download-dir``, and configs in the usual one."""

    def __init__(self, folders: list[Path]) -> None:
        super().__init__(folders[0])
        self.folders = folders

    def path(self, name: str) -> Path:
        return next((path for folder in self.folders if os.path.lexists(path := folder / name)), self.folder / name)


def _open_cached(model: str, revision: str | None, download_dir: str | Path | None) -> Checkpoint | None:
    """The files of one commit of a model in the local caches."""
    places = [None] if download_dir is None else [Path(download_dir), None]
    folders = [folder for place in places if (folder := find_local(model, revision=revision, cache_dir=place))]
    if not folders:
        return None
    cached = _Cached(
        [folder for folder in folders if folder.name == folders[0].name]
    )  # a snapshot's name is its commit
    names = {name for folder in cached.folders for name in listed(folder) if not name.startswith(".")}
    cached.names = tuple(sorted(names))
    cached.read_headers()
    return cached


def _is_complete(cached: Checkpoint) -> bool:
    """Whether a snapshot lacks no weight file, as far as its own files tell."""
    if not cached.files:
        return bool(pickled_weights(cached.names))
    errors = {finding.code for finding in cached.findings if finding.severity is Severity.ERROR}
    return errors.isdisjoint(("index-mismatch", "unreadable-file")) and not _is_unexplained(cached)


def _is_unexplained(cached: Checkpoint) -> bool:
    """Whether weights are no plain floats and no file here says what they are.

    Such a file may be on the hub: older versions of vLLM download config.json and weights, and no description beside them.
    """
    plain = ("BF16", "F16", "F32", "F64")
    if all(tensor.dtype in plain for name, tensor in cached.tensors.items() if name.endswith(".weight")):
        return False
    if any(name.startswith(("quant_model_description", "quant_config", "quantize_config")) for name in cached.names):
        return False
    if "config.json" not in cached.names:
        return True
    try:
        config = cached.read_json("config.json")
    except NpuQuantError:
        return False
    holders = [holder for holder in (config, config.get("text_config")) if isinstance(holder, Mapping)]
    return not any(holder.get(key) for holder in holders for key in ("quantization_config", "compression_config"))


class RemoteCheckpoint(Checkpoint):
    """A checkpoint on a hub, of which only configs and headers are read. Values cannot be read."""

    has_values = False
    #: How to get the model onto this host.
    how_to_download = ""

    def __init__(
        self,
        repository: str,
        revision: str | None,
        token: str | bool | None = None,
        download_dir: str | Path | None = None,
    ) -> None:
        super().__init__(Path(repository))
        self.repository = repository
        self.revision = revision
        self.token = token
        self.download_dir = download_dir
        self.file_sizes: Mapping[str, int] = {}
        self._headers: dict[str, Header] = {}
        self._budget = HeaderBudget()
        #: When the headers have to be there, by ``time.monotonic``.
        self._deadline = float("inf")

    def list_files(self) -> None:
        """Ask the hub for the names and sizes of the repository's own files, in one request.

        Raises:
            NpuQuantError: unreadable-file.
        """
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            fix = "download the model while the hub can be reached, or give the path of a folder"
            raise _unreadable(self.repository, "the model is not in the local cache, and HF_HUB_OFFLINE is set", fix)
        with self._asking("its list of files"):
            sizes = self._within(ANSWER_TIMEOUT, self._list)
        self.file_sizes = {name: size for name, size in sizes.items() if "/" not in name and not name.startswith(".")}
        self.names = tuple(sorted(self.file_sizes))

    def read_headers(self, *, consolidated: bool = True) -> None:
        names = [name for name in self.names if name.endswith(".safetensors")]
        if len(names) > MAX_WEIGHT_FILES:
            super().read_headers(consolidated=consolidated)
            return
        self._budget = HeaderBudget()
        self._deadline = time.monotonic() + HEADERS_TIMEOUT
        with ThreadPoolExecutor(WORKERS) as pool:
            self._headers = dict(zip(names, pool.map(self._fetch_header, names), strict=True))
        self._deadline = float("inf")
        super().read_headers(consolidated=consolidated)

    def read_json(self, name: str) -> dict[str, Any]:
        limit = json_limit(name)
        if self.file_sizes.get(name, 0) > limit:
            raise _unreadable(
                self.repository, f"{name} is larger than the limit of {limit:,} bytes", "check the repository"
            )
        with self._asking(name):
            content = self._within(ANSWER_TIMEOUT + limit / ANSWER_RATE, self._content, name)
        return parse_json(content, max_bytes=limit, file=name)

    def read(self, name: str, *, float32: bool = False) -> Any:
        raise self._no_values()

    def blocks(self, name: str, elements: int) -> Iterator[Any]:
        raise self._no_values()

    def _no_values(self) -> NpuQuantError:
        return _unreadable(
            self.repository,
            "only the headers of this model's weight files were read, no values",
            f"download the model first: {self.how_to_download} {self.repository}",
        )

    def header(self, name: str, budget: HeaderBudget | None = None) -> Header:
        return self._headers[name]

    def _fetch_header(self, name: str) -> Header:
        size = self.file_sizes.get(name, 0)
        try:
            content = self._part(name, 0, min(FIRST, size))
            length = header_length(content, file=name, file_size=size) + 8
            self._budget.take(name, nbytes=length)
            if length > len(content):
                content += self._part(name, len(content), length)
            if length > len(content):
                raise _unreadable(self.repository, f"the hub sent less of {name} than was asked for", "try again")
        except NpuQuantError as error:
            return Header(name, {}, {}, error.findings, size)
        return parse_header(content, file=name, file_size=size, budget=self._budget)

    def _part(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start to stop of a file; asked for twice, since one lost answer of hundreds must not stop a server."""
        if stop <= start:
            return b""
        seconds = ANSWER_TIMEOUT + (stop - start) / ANSWER_RATE
        try:
            with self._asking(name):
                return self._within(seconds, self._range, name, start, stop)
        except NpuQuantError:
            time.sleep(PAUSE)
        with self._asking(name):
            return self._within(seconds, self._range, name, start, stop)

    def _within(self, seconds: float, ask: Callable[..., _Answer], *args: Any) -> _Answer:
        """The result of a request, whose answer may come byte by byte without an end.

        Raises:
            TimeoutError: after this many seconds, or at the deadline. The thread of the request is left behind; it is a
                daemon, so it does not keep the process from ending.
        """
        seconds = min(seconds, self._deadline - time.monotonic())
        if seconds <= 0:
            raise TimeoutError(f"the headers of all files took more than {HEADERS_TIMEOUT:.0f} s")
        pool = ThreadPool(1)
        try:
            return pool.apply_async(ask, args).get(seconds)
        except multiprocessing.TimeoutError:
            raise TimeoutError(f"no complete answer in {seconds:.0f} s") from None
        finally:
            pool.close()

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Report what the hub's library or the connection raises.

        Raises:
            NpuQuantError: unreadable-file.
        """
        try:
            yield
        except _hub_errors() as error:
            raise self._explained(what, error) from error

    def _explained(self, what: str, error: Exception) -> NpuQuantError:
        kind = type(error).__name__
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        first = (str(error).strip() or kind).splitlines()[0][:200]
        if getattr(response, "headers", {}).get("X-Error-Code") == "GatedRepo":
            fix = "accept the model's terms on the hub, and give a token: `hf auth login`, HF_TOKEN, or --hf-token of vLLM"
        elif kind in ("RepositoryNotFoundError", "HFValidationError", "RevisionNotFoundError") or status in (
            401,
            403,
            404,
        ):
            fix = "check the name and the revision; a private model needs a token; a folder needs a path that exists"
        else:
            fix = f"check the connection and {self._endpoint_variable}, or give the path of a folder"
        return _unreadable(self.repository, f"the hub did not give {what}", fix, f"{kind}: {first}")

    _endpoint_variable = ""

    def _sizes(self, files: Any, name_key: str, size_key: str) -> dict[str, int]:
        """Bytes of every file, from a hub's list of files.

        Raises:
            NpuQuantError: unreadable-file if it is not a list of names and sizes.
        """
        sizes = {}
        for file in files if isinstance(files, list) else [files]:
            name, size = (file.get(name_key), file.get(size_key)) if isinstance(file, dict) else (None, None)
            if type(name) is not str or type(size) not in (int, type(None)) or (size or 0) < 0:
                raise self._nonsense("its list of files", f"{shown(name)}: {shown(size)}")
            sizes[name] = size or 0
        return sizes

    def _nonsense(self, what: str, found: str) -> NpuQuantError:
        """The error for an answer of another form than a hub's."""
        fix = f"check that {self._endpoint_variable} is the address of a hub"
        return _unreadable(self.repository, f"the hub's answer for {what} has not the form that hubs give", fix, found)

    @abstractmethod
    def _list(self) -> dict[str, int]:
        """Bytes of every file of the repository."""

    @abstractmethod
    def _content(self, name: str) -> bytes:
        """A whole small file."""

    @abstractmethod
    def _range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start to stop of a file. A server that ignores the range is cut off as soon as they have come."""


class _HuggingFace(RemoteCheckpoint):
    how_to_download = "hf download"
    _endpoint_variable = "HF_ENDPOINT"

    def _list(self) -> dict[str, int]:
        from huggingface_hub import constants
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(self.repository)
        revision = f"/revision/{quote(self.revision, safe='')}" if self.revision is not None else ""
        url = f"{constants.ENDPOINT}/api/models/{self.repository}{revision}?blobs=true"
        content = self._get(url, {}, LIST_TIMEOUT, 0, CONFIG_MAX_BYTES + 1)
        info = parse_json(content, file="the hub's list of files")
        commit = info.get("sha")
        if type(commit) is not str or not _COMMIT.fullmatch(commit):
            raise self._nonsense("its list of files", f"sha: {shown(commit)}")
        self.revision = commit
        return self._sizes(info.get("siblings"), "rfilename", "size")

    def _content(self, name: str) -> bytes:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        # The library makes file names of its cache from both headers, as they are.
        url = hf_hub_url(self.repository, name, revision=self.revision)
        told = get_hf_file_metadata(url, token=self.token, timeout=LIST_TIMEOUT)
        for pattern, value in ((_COMMIT, told.commit_hash), (_ETAG, told.etag)):
            if value is None or not pattern.fullmatch(value):
                raise self._nonsense(name, shown(value))
        path = hf_hub_download(
            self.repository, name, revision=self.revision, token=self.token, cache_dir=self.download_dir
        )
        return Path(path).read_bytes()

    def _range(self, name: str, start: int, stop: int) -> bytes:
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.repository, name, revision=self.revision)
        return self._get(url, _range_headers(start, stop), READ_TIMEOUT, start, stop)

    def _get(self, url: str, headers: Mapping[str, str], timeout: float, start: int, stop: int) -> bytes:
        """Bytes start to stop of an address."""
        from huggingface_hub.utils import build_hf_headers, get_session

        headers = {**build_hf_headers(token=self.token), **headers}
        session: Any = get_session()
        if hasattr(session, "stream"):  # httpx, huggingface_hub 1 and later
            with session.stream("GET", url, headers=headers, follow_redirects=True, timeout=timeout) as answer:
                answer.raise_for_status()
                return _cut(answer.iter_bytes(1 << 16), answer.status_code, start, stop)
        with session.get(url, headers=headers, stream=True, timeout=timeout) as answer:
            answer.raise_for_status()
            return _cut(answer.iter_content(1 << 16), answer.status_code, start, stop)


class _ModelScope(RemoteCheckpoint):
    """ModelScope, by the two addresses that its own library uses.

    Nothing is put into its cache, whose layout changes between versions: vLLM downloads all files with the weights.
    """

    how_to_download = "modelscope download"
    _endpoint_variable = "MODELSCOPE_ENDPOINT"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        _require_modelscope(self.repository)
        from modelscope.hub.api import HubApi, ModelScopeConfig
        from requests import Session

        self.revision = "master" if self.revision in (None, "main") else self.revision
        endpoint = HubApi().endpoint
        self._url = f"{endpoint}/api/v1/models/{quote(self.repository)}"
        self._session = Session()
        token = self.token if isinstance(self.token, str) else os.environ.get("MODELSCOPE_API_TOKEN")
        if token:
            self._session.headers["Authorization"] = f"Bearer {token}"
            self._session.cookies.set("m_session_id", token, domain=urlsplit(endpoint).hostname, path="/")
        elif cookies := ModelScopeConfig.get_cookies():
            self._session.cookies.update(cookies)

    def _list(self) -> dict[str, int]:
        query = {"Revision": self.revision, "Recursive": "False"}
        content = self._get("repo/files", query, {}, LIST_TIMEOUT, 0, CONFIG_MAX_BYTES + 1)
        found = parse_json(content, file="the hub's list of files")
        data = found.get("Data")
        files = data.get("Files") if isinstance(data, dict) else None
        if not isinstance(files, list):
            message = found.get("Message")
            raise _unreadable(
                self.repository,
                "the hub did not give its list of files",
                "check the name and the revision; a private model needs a token",
                str(message or "an answer without files")[:200],
            )
        kept = [file for file in files if not isinstance(file, dict) or file.get("Type") != "tree"]
        return self._sizes(kept, "Path", "Size")

    def _content(self, name: str) -> bytes:
        return self._range(name, 0, self.file_sizes.get(name, 0))

    def _range(self, name: str, start: int, stop: int) -> bytes:
        query = {"Revision": self.revision, "FilePath": name}
        return self._get("repo", query, _range_headers(start, stop), READ_TIMEOUT, start, stop)

    def _get(
        self, path: str, query: Mapping[str, Any], headers: Mapping[str, str], timeout: float, start: int, stop: int
    ) -> bytes:
        """Bytes start to stop of an address below the model's."""
        with self._session.get(
            f"{self._url}/{path}", params=query, headers=headers, stream=True, timeout=timeout
        ) as answer:
            answer.raise_for_status()
            return _cut(answer.iter_content(1 << 16), answer.status_code, start, stop)


def _range_headers(start: int, stop: int) -> dict[str, str]:
    return {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}


def _cut(chunks: Iterable[bytes], status: int, start: int, stop: int) -> bytes:
    """The wanted bytes of an answer, which has the whole file where its status is not 206 (partial content)."""
    skip = 0 if status == 206 else start
    wanted = skip + stop - start
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) >= wanted:
            break
    return bytes(content[skip:wanted])


def _hub_errors() -> tuple[type[Exception], ...]:
    """The errors that the hubs' libraries raise for a hub that refuses or cannot be reached.

    Errors of requests are OSErrors. Those of the client that huggingface_hub has used since version 1 (httpx, then httpx2)
    are not; huggingface_hub's own error names their base.
    """
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError

    return (OSError, HFValidationError, *HfHubHTTPError.__bases__)


def _uses_modelscope() -> bool:
    """Whether vLLM takes models from ModelScope; it reads the variable so."""
    return os.environ.get("VLLM_USE_MODELSCOPE", "").strip().lower() in ("1", "true")


def _require_modelscope(model: str) -> None:
    if importlib.util.find_spec("modelscope") is None:
        fix = "pip install modelscope, or leave VLLM_USE_MODELSCOPE unset"
        raise _unreadable(model, "VLLM_USE_MODELSCOPE is set, and the package modelscope is not installed", fix)


def _unreadable(repository: str, message: str, fix: str, found: str = "") -> NpuQuantError:
    return NpuQuantError([Finding("unreadable-file", message, file=repository[:200], found=found, fix=fix)])
