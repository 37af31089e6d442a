"""How benchmarks measure: both sides of a ratio in turns in one process, so that a busy machine slows them alike."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    ratio: float
    goal: str
    detail: str

    def __str__(self) -> str:
        return f"| {self.what} | {self.ratio:.2f} | {self.goal} | {self.detail} |"


def in_turns(
    first: Callable[[], object], second: Callable[[], object], repeats: int
) -> tuple[float, float]:
    """Median seconds of both, after one unmeasured call of each."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for call, taken in zip((first, second), seconds, strict=True):
            began = time.perf_counter()
            call()
            # Turn 0 is the unmeasured one.
            if turn:
                taken.append(time.perf_counter() - began)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def peak_bytes(call: Callable[[], object]) -> int:
    """Return how far one call raises the resident memory of a forked process of its own."""
    # A process's peak never falls again: each call needs one of its own, forked from this state.
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_peak, args=(call, there))
    process.start()
    try:
        return here.recv()
    finally:
        process.join()


def _peak(call: Callable[[], object], result: Connection) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    # Linux counts ru_maxrss in KiB.
    result.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
