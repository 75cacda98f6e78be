# SPDX-License-Identifier: Apache-2.0
"""Writes the pages of docs/ that are made from the source; a test compares them.

python docs/generate.py
"""

from __future__ import annotations

from pathlib import Path

from vllm_npu_quant.cli.render import matrix_markdown
from vllm_npu_quant.errors import CODES
from vllm_npu_quant.inspection import matrix

DOCS = Path(__file__).resolve().parent


def errors_page() -> str:
    """docs/errors.md: one paragraph for every error code."""
    lines = [
        "# Error codes",
        "",
        "<!-- Made by docs/generate.py from vllm_npu_quant/errors.py; edit there. -->",
        "",
        "Every error names its code, the layer, the file, what was expected and found, the nearest names, and what to do:",
        "",
        "```",
        "error[missing-tensor]: model.layers.3.mlp.up_proj: no weight file holds weight_scale, which W8A8_DYNAMIC needs",
        "  file     quant_model_description.json",
        "  expected model.layers.3.mlp.up_proj.weight_scale F32 or BF16 or F16 [N, G]",
        "  found    no such tensor; nearest: model.layers.3.mlp.up_proj.weight_scale_inv",
        "  fix      download the checkpoint again, or re-export it",
        "```",
        "",
        "All problems of a checkpoint come in one error, before any weight is read. Of one kind, the first 20 are shown in",
        "full and the rest is counted.",
        "",
    ]
    for code, text in CODES.items():
        lines += [f"## {code}", "", text, ""]
    return "\n".join(lines)


def support_matrix_page() -> str:
    """docs/support_matrix.md: what ``vllm-npu-quant matrix`` prints."""
    return matrix_markdown(matrix())


PAGES = {"errors.md": errors_page, "support_matrix.md": support_matrix_page}


def main() -> None:
    for name, make in PAGES.items():
        (DOCS / name).write_text(make())
        print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
