"""A profile of training steps: the time of each part."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch.profiler import ProfilerActivity, profile

from latentwire.data import positions
from latentwire.model import LatentWire
from latentwire.receivers.base import PART
from latentwire.storage import Place
from latentwire.training import checkpoints
from latentwire.training.local import table_epochs
from latentwire.training.loop import Trainer, TrainingError

WARM_UP = 2
"""Steps before the measured ones: first calls fill caches and choose kernels."""
OPERATORS = 8
"""Dearest operators that the table names."""


def profile_steps(
    wire: LatentWire, train: pa.Table, steps: int, output: Path, shards: Place | None = None
) -> str:
    """Train ``WARM_UP + steps`` steps and write ``trace.json`` and ``shares.md``.

    The wire begins as a training would. The trace is for ui.perfetto.dev or chrome://tracing.
    Returns the table of ``shares.md``: the share of each part of the measured steps, then the
    dearest operators. ``shards``: where the rows come from, beside which calibrations and tuned
    teachers lie. Raises :class:`~latentwire.training.loop.TrainingError` where the rows do not
    suffice.
    """
    trainer = Trainer(wire, WARM_UP + steps, train=shards)
    checkpoints.restore(trainer, None)
    units = positions.units_of(wire.run, train)
    batches = list(
        itertools.islice(table_epochs(trainer.config, train, units=units)(0), WARM_UP + steps)
    )
    if len(batches) < WARM_UP + steps:
        raise TrainingError(
            f"a profile of {steps} steps needs {WARM_UP + steps} batches, the data has {len(batches)}"
        )
    for batch in batches[:WARM_UP]:
        trainer.step(batch)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities, acc_events=True) as record:
        began = time.perf_counter()
        for batch in batches[WARM_UP:]:
            trainer.step(batch)
        seconds = time.perf_counter() - began
    output.mkdir(parents=True, exist_ok=True)
    record.export_chrome_trace(str(output / "trace.json"))
    table = _shares(list(record.key_averages()), seconds, steps)
    (output / "shares.md").write_text(table + "\n")
    return table


def _shares(events: list[Any], seconds: float, steps: int) -> str:
    """Render a Markdown table.

    On CUDA a part's kernels run after it was left on the host, so the device has its own column.
    """
    on_device = any(event.device_time_total for event in events)

    def row(what: str, host_us: float, device_us: float) -> str:
        cells = [what, f"{host_us / 1e3 / steps:.1f}", f"{host_us / 1e6 / seconds:.1%}"]
        if on_device:
            cells.append(f"{device_us / 1e3 / steps:.1f}")
        return f"| {' | '.join(cells)} |"

    parts = [event for event in events if event.key.startswith(PART)]
    parts.sort(key=lambda event: -event.cpu_time_total)
    operators = [event for event in events if not event.key.startswith(PART)]
    # Torch counts in microseconds. ``self``: without the operators that an operator calls.
    own_time = "self_device_time_total" if on_device else "self_cpu_time_total"
    operators.sort(key=lambda event: -getattr(event, own_time))
    head = ["part of a step", "ms", "share", *(["device ms"] if on_device else [])]
    # What no part took, on the host; both in microseconds.
    rest = seconds * 1e6 - sum(event.cpu_time_total for event in parts)
    lines = [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for event in parts:
        name = event.key.removeprefix(PART)
        lines.append(row(name, event.cpu_time_total, event.device_time_total))
    lines.append(row("everything else", rest, 0.0))
    lines.append(row("**whole step**", seconds * 1e6, 0.0))
    for event in operators[:OPERATORS]:
        name = f"`{event.key}` itself, {event.count / steps:.0f} calls"
        lines.append(row(name, event.self_cpu_time_total, event.self_device_time_total))
    return "\n".join(lines)
