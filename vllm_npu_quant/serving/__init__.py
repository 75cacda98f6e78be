# SPDX-License-Identifier: Apache-2.0
"""What a stored layer becomes on this host: the decision, the dispatch table and its costs."""
