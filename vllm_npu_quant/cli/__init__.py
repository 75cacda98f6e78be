# SPDX-License-Identifier: Apache-2.0
"""The command line. Each command builds typed data (``vllm_npu_quant.inspection``), then prints it as text or as JSON."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """The console script ``vllm-npu-quant``."""
    import gc
    import os

    # Imports and headers make many objects and drop few: looking for garbage takes a tenth of a short command's time.
    gc.set_threshold(100_000, 50, 50)
    # Looking for plugins of pydantic takes a tenth of a second, and no model here has any.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    from vllm_npu_quant.cli.app import app

    app(prog_name="vllm-npu-quant")
