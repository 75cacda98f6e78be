# SPDX-License-Identifier: Apache-2.0
"""Serving of stored layers on this host: the decision, the dispatch table and its costs."""
