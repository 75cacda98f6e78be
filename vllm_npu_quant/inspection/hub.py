# SPDX-License-Identifier: Apache-2.0
"""Models of a hub: config files through huggingface_hub's cache, headers of weight files by range requests.

Of a checkpoint of 700 GB this reads a few megabytes. Nothing is imported from a model's repository, and no code of it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vllm_npu_quant.checkpoint import (
    CONFIG_MAX_BYTES,
    DESCRIPTION_MAX_BYTES,
    INDEX_MAX_BYTES,
    Checkpoint,
    Header,
    find_local,
    header_length,
    parse_header,
    read_json,
)
from vllm_npu_quant.errors import Finding, NpuQuantError

__all__ = ["RemoteCheckpoint", "open_hub"]

#: Bytes of the first request for a header, enough for the headers of most files.
FIRST = 256 * 1024
#: Requests at a time.
WORKERS = 8
TIMEOUT = 30.0


def open_hub(name: str, *, revision: str | None = None) -> Checkpoint:
    """The files of a model of a hub. Complete snapshots of the local cache are used without asking the hub.

    Raises:
        NpuQuantError: unreadable-file, where the model cannot be found or reached.
    """
    folder = find_local(name, revision=revision)
    local = Checkpoint.open(folder) if folder is not None else None
    if local is not None and local.files and not any(f.code == "index-mismatch" for f in local.findings):
        return local
    try:
        return RemoteCheckpoint.open_remote(name, revision=revision)
    except NpuQuantError:
        if local is not None and local.names:  # better than nothing: its findings say what is missing
            return local
        raise


class RemoteCheckpoint(Checkpoint):
    """A checkpoint on a hub, of which only configs and headers are here. Values cannot be read."""

    has_values = False

    def __init__(self, repository: str, revision: str, file_sizes: Mapping[str, int]) -> None:
        super().__init__(Path(repository))
        self.repository = repository
        self.revision = revision
        self.file_sizes = file_sizes
        self._headers: dict[str, Header] | None = None

    @classmethod
    def open_remote(cls, repository: str, *, revision: str | None = None) -> RemoteCheckpoint:
        """Ask the hub for the list of files, and read the headers of the weight files.

        Raises:
            NpuQuantError: unreadable-file.
        """
        info = _asked(repository, "its list of files", lambda: _model_info(repository, revision))
        sizes = {
            sibling.rfilename: sibling.size or 0
            for sibling in info.siblings or ()
            if "/" not in sibling.rfilename and not sibling.rfilename.startswith(".")
        }
        checkpoint = cls(repository, info.sha or revision or "main", sizes)
        checkpoint._scan(sorted(sizes))
        return checkpoint

    def read_json(self, name: str) -> dict[str, Any]:
        limit = CONFIG_MAX_BYTES
        if name.endswith(".index.json"):
            limit = INDEX_MAX_BYTES
        elif name.startswith("quant_model_description"):
            limit = DESCRIPTION_MAX_BYTES
        if self.file_sizes.get(name, 0) > limit:
            raise _unreadable(
                self.repository, f"{name} is larger than the limit of {limit:,} bytes", "check the repository"
            )
        path = _asked(self.repository, name, lambda: _download(self.repository, name, self.revision))
        return read_json(path, max_bytes=limit, file=name)

    def read(self, name: str, *, float32: bool = False) -> Any:
        raise _unreadable(
            self.repository,
            "only the headers of this model's weight files were read, no values",
            f"download the model first: hf download {self.repository}",
        )

    def _header(self, name: str) -> Header:
        if self._headers is None:
            files = [file for file in self.names if file.endswith(".safetensors")]
            with ThreadPoolExecutor(WORKERS) as pool:
                self._headers = dict(zip(files, pool.map(self._fetch_header, files), strict=True))
        return self._headers[name]

    def _fetch_header(self, name: str) -> Header:
        size = self.file_sizes.get(name, 0)
        try:
            content = _asked(self.repository, name, lambda: self._range(name, 0, min(FIRST, size)))
            length = header_length(content, file=name, file_size=size) + 8
            if length > len(content):
                first = len(content)
                content += _asked(self.repository, name, lambda: self._range(name, first, length))
            if length > len(content):
                raise _unreadable(self.repository, f"the hub sent less of {name} than was asked for", "try again")
        except NpuQuantError as error:
            return Header(name, {}, {}, error.findings, size)
        return parse_header(content, file=name, file_size=size)

    def _range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start to stop of a file. A server that ignores the range is cut off as soon as they have come."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session

        if stop <= start:
            return b""
        url = hf_hub_url(self.repository, name, revision=self.revision)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        session: Any = get_session()
        if hasattr(session, "stream"):  # httpx, huggingface_hub 1 and later
            with session.stream("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT) as answer:
                answer.raise_for_status()
                return _cut(answer.iter_bytes(1 << 16), answer.status_code, start, stop)
        with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            answer.raise_for_status()
            return _cut(answer.iter_content(1 << 16), answer.status_code, start, stop)


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


def _model_info(repository: str, revision: str | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT)


def _download(repository: str, name: str, revision: str) -> str:
    from huggingface_hub import hf_hub_download

    return hf_hub_download(repository, name, revision=revision)


def _asked(repository: str, what: str, ask: Callable[[], Any]) -> Any:
    """What a call to the hub gives.

    Raises:
        NpuQuantError: unreadable-file, for whatever the call raises: each version of huggingface_hub has errors of its own.
    """
    try:
        return ask()
    except NpuQuantError:
        raise
    except Exception as error:
        raise _explained(repository, what, error) from None


def _explained(repository: str, what: str, error: Exception) -> NpuQuantError:
    kind = type(error).__name__
    first = (str(error).strip() or kind).splitlines()[0][:200]
    if kind == "GatedRepoError":
        fix = "accept the model's terms on the hub, and log in with `hf auth login`"
    elif kind in ("RepositoryNotFoundError", "HFValidationError", "RevisionNotFoundError"):
        fix = (
            "check the name and the revision; a private model needs `hf auth login`; a folder needs a path that exists"
        )
    elif kind in ("OfflineModeIsEnabled", "LocalEntryNotFoundError"):
        fix = "download the model while the hub can be reached, or give the path of a folder"
    else:
        fix = "check the connection and HF_ENDPOINT, or give the path of a folder"
    return _unreadable(repository, f"the hub did not give {what}", fix, f"{kind}: {first}")


def _unreadable(repository: str, message: str, fix: str, found: str = "") -> NpuQuantError:
    return NpuQuantError([Finding("unreadable-file", message, file=repository[:200], found=found, fix=fix)])
