"""The progress of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """Counters of a run's training, saved with every checkpoint."""

    step: int = 0
    """Optimiser steps done, skipped ones included."""
    epoch: int = 0
    """Epoch that the next batch belongs to."""
    batch: int = 0
    """Batches of that epoch already used."""
    bad_steps: int = 0
    """Steps skipped because their gradient was not finite."""
    bad_in_a_row: int = 0
    """Skipped steps since the last good step."""
    rows: int = 0
    """Rows of all workers' steps until the last progress line or evaluation."""
    positions: int = 0
    """Positions that this worker's receivers were given in all steps."""
    padded: int = 0
    """Positions of these that hold nothing."""
    seconds: float = 0.0
    """Time spent in steps and in waiting for their rows; evaluation and start-up left out."""
    first_step_seconds: float = 0.0
    """Seconds of the first step: rows must arrive, and kernels be chosen."""
    loss: float = float("nan")
    """Training loss, averaged since the last progress line."""
    losses: list[float] = field(default_factory=list)
    """Training loss of each step since then."""
    first_loss: float | None = None
    """Training loss of the first progress line after the alignment."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Reports so far under Ray, in order: one that a process died over is sent again."""
