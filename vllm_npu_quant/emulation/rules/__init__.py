# SPDX-License-Identifier: Apache-2.0
"""One module per operator: its arguments, the rules for them, and the shapes and dtypes of its outputs.

The rules are those of Atlas A2 and A3 (Ascend 910B, 910_93), from the documents, C++ checks and tests of op-plugin and
from the aclnn documents of ops-nn and ops-transformer; comments name what differs between them.
"""
