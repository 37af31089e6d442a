"""Where a training step's time goes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch.profiler import ProfilerActivity, profile

from latentwire.model import LatentWire
from latentwire.receivers.base import PART
from latentwire.training.local import table_epochs
from latentwire.training.loop import Trainer, TrainingError

WARM_UP = 2
"""Steps before the measured ones: first calls fill caches and choose kernels."""
OPERATORS = 8
"""Dearest operators that the table names."""


def profile_steps(wire: LatentWire, train: pa.Table, steps: int, output: Path) -> str:
    """Train ``WARM_UP + steps`` steps; leaves ``trace.json`` (for ui.perfetto.dev or chrome://tracing) and ``shares.md``.

    Returns the table of ``shares.md``: the share of each part of the measured steps, then the
    dearest operators. Raises :class:`~latentwire.training.loop.TrainingError` where the rows do not
    suffice.
    """
    trainer = Trainer(wire, WARM_UP + steps)
    batches = list(
        zip(range(WARM_UP + steps), table_epochs(trainer.config, train)(0), strict=False)
    )
    if len(batches) < WARM_UP + steps:
        raise TrainingError(
            f"a profile of {steps} steps needs {WARM_UP + steps} batches, the data has "
            f"{len(batches)}"
        )
    for _, batch in batches[:WARM_UP]:
        trainer.step(batch)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities, acc_events=True) as record:
        began = time.perf_counter()
        for _, batch in batches[WARM_UP:]:
            trainer.step(batch)
        seconds = time.perf_counter() - began
    output.mkdir(parents=True, exist_ok=True)
    record.export_chrome_trace(str(output / "trace.json"))
    table = _shares(list(record.key_averages()), seconds, steps)
    (output / "shares.md").write_text(table + "\n")
    return table


def _shares(events: list[Any], seconds: float, steps: int) -> str:
    """A Markdown table. On CUDA a part's kernels run after it was left on the host, so the device has a column of its own."""
    on_device = any(event.device_time_total for event in events)

    def row(what: str, host_us: float, device_us: float) -> str:
        cells = [what, f"{host_us / 1e3 / steps:.1f}", f"{host_us / 1e6 / seconds:.1%}"]
        return " | ".join(
            ["", *cells, *([f"{device_us / 1e3 / steps:.1f}"] if on_device else []), ""]
        ).strip()

    parts = [event for event in events if event.key.startswith(PART)]
    parts.sort(key=lambda event: -event.cpu_time_total)
    operators = [event for event in events if not event.key.startswith(PART)]
    operators.sort(
        key=lambda event: (
            -max(event.self_device_time_total, 0 if on_device else event.self_cpu_time_total)
        )
    )
    head = ["part of a step", "ms", "share", *(["device ms"] if on_device else [])]
    rest = seconds * 1e6 - sum(event.cpu_time_total for event in parts)
    lines = [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(row(event.key.removeprefix(PART), event.cpu_time_total, event.device_time_total) for event in parts),
        row("everything else", rest, 0.0),
        row("**whole step**", seconds * 1e6, 0.0),
        *(
            row(f"`{event.key}` itself, {event.count / steps:.0f} calls", event.self_cpu_time_total, event.self_device_time_total)
            for event in operators[:OPERATORS]
        ),
    ]  # fmt: skip
    return "\n".join(lines)
