"""Recognising errors of running out of memory. Light: a trial's driver imports it without torch."""

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
"""Words of such errors: torch's on GPUs and CPUs, cuBLAS's and cuDNN's, C++'s, Python's, the
system's, and those of Ray's memory monitor."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on a GPU, in the process or on the node.

    Ray Train wraps its workers' errors, which are looked at too.
    """
    errors = [error, *getattr(error, "worker_failures", {}).values()]
    texts = [f"{type(each).__name__} {each}" for each in errors]
    together = "\n".join(texts)
    return any(word in together for word in OUT_OF_MEMORY)
