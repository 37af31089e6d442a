"""Metrics of a running trial for Prometheus, at the metrics port of its node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from ray.util.metrics import Gauge

SHOWN = {
    "examples_per_s": "Training examples per second, over all workers.",
    "tokens_per_s": "Positions per second that a worker's receivers read, without padding.",
    "padding_share": "Share of the receivers' positions in training that hold nothing.",
    "receiver_bytes": "Bytes of the frozen receivers' weights in one worker.",
    "cuda_bytes": "Most CUDA memory that the worker has held, in bytes; 0 without CUDA.",
    "dev_f1": "Development F1 at the last evaluation.",
    "best_dev_f1": "Highest development F1 of this trial so far.",
    "step": "Optimiser steps done.",
}
"""Name, after ``latentwire_``, and description of each metric."""


class TrialMetrics:
    """The metrics of one trial, labelled by its name."""

    def __init__(self, trial: str, before: Iterable[Mapping[str, float]] = ()) -> None:
        """Make a gauge for each metric.

        Args:
            trial: the label.
            before: evaluations of a trial that is resumed.
        """
        self._gauges = {}
        for name, description in SHOWN.items():
            gauge = Gauge(f"latentwire_{name}", description=description, tag_keys=("trial",))
            self._gauges[name] = gauge
        self._tags = {"trial": trial}
        scores = [metrics["dev_f1"] for metrics in before if "dev_f1" in metrics]
        self._best = max(scores, default=float("-inf"))

    def show(self, values: Mapping[str, float]) -> None:
        """Set every metric that has a value. A trial without questions has no F1."""
        cuda_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        metrics = dict(values) | {"cuda_bytes": float(cuda_bytes)}
        if "dev_f1" in metrics:
            self._best = metrics["best_dev_f1"] = max(self._best, metrics["dev_f1"])
        for name, gauge in self._gauges.items():
            if name in metrics:
                gauge.set(float(metrics[name]), tags=self._tags)
