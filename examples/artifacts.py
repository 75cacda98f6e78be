# SPDX-License-Identifier: Apache-2.0
"""Where the examples keep what they make, and how they make it so that a half-made thing is never used."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["build_once", "cache_root"]

#: Counts up when what is kept in the cache changes, so that nobody is served something an older version made.
RECIPE = "2"

#: A temporary directory older than this was left by a run that was killed.
STALE_SECONDS = 24 * 3600


def cache_root() -> Path:
    """``$VLLM_NPU_QUANT_CACHE``, else ``$XDG_CACHE_HOME/vllm-npu-quant``, else ``~/.cache/vllm-npu-quant``."""
    own = os.environ.get("VLLM_NPU_QUANT_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-npu-quant"
    return base.expanduser().absolute() / f"recipe-{RECIPE}"


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Return the directory ``target``; the first time, let ``build`` fill a temporary one and rename that.

    The rename is atomic, so ``target`` either does not exist or is complete, whatever happens to this process. Two
    processes may build at the same time: the first rename wins and the other's work is dropped.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target)
    # Beside the target, because a rename across file systems is a copy.
    unfinished = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    try:
        build(unfinished)
        # mkdtemp makes directories that nobody else may read; a cache directory follows the user's umask.
        umask = os.umask(0)
        os.umask(umask)
        unfinished.chmod(0o777 & ~umask)
        try:
            unfinished.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _prefix(target: Path) -> str:
    return f".unfinished-{target.name}-"


def _remove_stale(target: Path) -> None:
    for left in target.parent.glob(_prefix(target) + "*"):
        if time.time() - left.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
