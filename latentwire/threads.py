"""The number of threads that a process computes with."""

from __future__ import annotations

import os

import torch


def use_threads(cpus: float) -> int:
    """Compute with as many threads as ``training.cpus_per_worker`` gives CPUs.

    There are at most as many as this process has cores. PyTorch by itself takes every core, also
    those that others are busy on: then each operation waits for its slowest thread. Returns the
    number of threads.
    """
    threads = min(max(1, int(cpus)), cores())
    torch.set_num_threads(threads)
    return threads


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
