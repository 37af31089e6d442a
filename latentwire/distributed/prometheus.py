"""What a trial shows to Prometheus while it runs, at the metrics port of its node."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from ray.util.metrics import Gauge

SHOWN = {
    "examples_per_s": "Training examples per second, over all workers.",
    "tokens_per_s": "Positions per second that this worker's receivers are given in training, padding left out.",
    "padding_share": "Share of the receivers' positions in training that hold nothing.",
    "receiver_bytes": "Bytes of the frozen receivers' weights in one worker.",
    "cuda_bytes": "Most CUDA memory that the worker has held, in bytes; 0 without CUDA.",
    "dev_f1": "Development F1 at the last evaluation.",
    "best_dev_f1": "Highest development F1 of this trial so far.",
    "step": "Optimiser steps done.",
}
"""Name, after ``latentwire_``, and what it says."""


class TrialMetrics:
    """One trial's gauges, labelled by its name."""

    def __init__(self, trial: str) -> None:
        self._gauges = {
            name: Gauge(f"latentwire_{name}", description=said, tag_keys=("trial",)) for name, said in SHOWN.items()
        }
        self._tags = {"trial": trial}
        self._best = float("-inf")

    def show(self, values: Mapping[str, float]) -> None:
        """Set every gauge that has a value. A trial without questions has no F1."""
        found = dict(values) | {
            "cuda_bytes": float(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
        }
        if "dev_f1" in found:
            self._best = found["best_dev_f1"] = max(self._best, found["dev_f1"])
        for name, gauge in self._gauges.items():
            if name in found:
                gauge.set(float(found[name]), tags=self._tags)
