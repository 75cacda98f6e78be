# SPDX-License-Identifier: Apache-2.0
"""One module per operator that has a second CPU kernel, with the results of its reference.

Integers are equal bit for bit; float products may differ in the order of their float32 sums.
"""
