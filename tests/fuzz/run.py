# SPDX-License-Identifier: Apache-2.0
"""Runs of the fuzz targets: ``python -m tests.fuzz.run --minutes 10``. Every input follows from a target and a number."""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from random import Random

from tests.fuzz.targets import TARGETS
from vllm_npu_quant.errors import NpuQuantError

__all__ = ["SECONDS", "run_one"]

#: CPU seconds of one input; the inputs that are made here take some milliseconds.
SECONDS = 20
#: Bytes of memory that the process may take beyond those at the start.
MEMORY = 2 << 30


class Endless(BaseException):
    """An input that takes too long; no handler of a reader catches it."""


@contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Endless(f"more than {SECONDS} s of CPU time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def run_one(target: str, number: int) -> None:
    """Give a target the input of this number. Anything but NpuQuantError is an error of the reader."""
    with _limited(), suppress(NpuQuantError):
        TARGETS[target](Random(f"{target} {number}"))


def main() -> int:
    """Run all targets in turn until the time is over, or one input of one target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="time for all targets together")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--target", choices=TARGETS, help="one target only")
    parser.add_argument("--one", action="store_true", help="the first input only, to see its error")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    targets = [args.target] if args.target else list(TARGETS)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, resource.RLIM_INFINITY))
    ends, number = time.monotonic() + 60 * args.minutes, args.first
    while time.monotonic() < ends:
        for target in targets:
            try:
                run_one(target, number)
            except BaseException:
                print(f"failed: python -m tests.fuzz.run --one --target {target} --first {number}", file=sys.stderr)
                raise
        number += 1
        if args.one:
            break
    print(f"{number - args.first:,} inputs of each of {len(targets)} targets: no error")
    return 0


if __name__ == "__main__":
    sys.exit(main())
