"""What running out of memory looks like. Light: a trial's driver imports it without torch."""

from __future__ import annotations

OUT_OF_MEMORY = (
    "OutOfMemoryError",
    "OUT_OF_MEMORY",
    "MemoryError",
    "out of memory",
    "not enough memory",
    "due to memory pressure",
    "low on memory",
    "an't allocate memory",
    "annot allocate memory",
    "bad_alloc",
    "ALLOC_FAILED",
)
"""Words for what is too large: torch's on GPUs and CPUs, cuBLAS's and cuDNN's, C++'s, Python's, the
system's, and those of Ray's memory monitor."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether something was too large: for its GPU, its process, or, as Ray Train tells of its workers, the node."""
    found = [error, *getattr(error, "worker_failures", {}).values()]
    return any(word in f"{type(one).__name__} {one}" for one in found for word in OUT_OF_MEMORY)
