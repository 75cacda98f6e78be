# SPDX-License-Identifier: Apache-2.0
"""The command line. Each command gets typed data from ``vllm_npu_quant.inspection`` and prints it as text or JSON."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the console script ``vllm-npu-quant``."""
    import gc
    import os

    # Imports and headers create many objects and free few: the default thresholds cost a tenth of a short command's time.
    gc.set_threshold(100_000, 50, 50)
    # pydantic's search for plugins takes 0.1 s, and the models here use none.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    from vllm_npu_quant.cli.app import app

    app(prog_name="vllm-npu-quant")
