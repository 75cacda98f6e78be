# SPDX-License-Identifier: Apache-2.0
"""One module per operator: its arithmetic in plain torch, and the source that it is taken from.

Every function takes the checked arguments of a call. Sources are named as in Huawei's repositories: op-plugin (the
interface, its documents docs/zh/custom_APIs/torch_npu/torch_npu-<operator>.md and its NumPy tests), ops-nn and
ops-transformer (kernels, aclnn documents, golden.py). Memory that the device does not write holds garbage here.
"""
