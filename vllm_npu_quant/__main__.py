# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_npu_quant``: the command line."""

from vllm_npu_quant.cli import main

if __name__ == "__main__":
    main()
