"""The exchange between data-parallel workers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist


class Workers:
    """Rank and size of the group that trains together, and its sums; one alone exchanges nothing.

    Gradients are summed by hand rather than by DistributedDataParallel: the loss of each worker is
    already divided by the token count of the joined batch, so the sum *is* the joined batch's
    gradient, also with a backward per receiver.
    """

    def __init__(self) -> None:
        joined = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if joined else 0
        self.size = dist.get_world_size() if joined else 1

    def say(self, line: str) -> None:
        """Print a line of what all workers do alike: the first one does."""
        if self.rank == 0:
            print(line, flush=True)

    def sum_counts(self, counts: dict[str, float], device: torch.device) -> dict[str, float]:
        """Sum each count over all workers."""
        if self.size == 1:
            return counts
        # Every worker must come here with the same names in the same order: values alone travel.
        # In fp64: fp32 holds whole numbers up to 2²⁴ alone, which positions of many rows pass.
        total = torch.tensor(list(counts.values()), dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return dict(zip(counts, total.tolist(), strict=True))

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add up ``.grad`` over all workers, in one flat buffer.

        A worker without rows has no gradient of its own and gets the others'. What no worker has
        one for keeps none: an optimiser passes it over, as it does where one worker trains alone.
        """
        if self.size == 1:
            return
        trained = list(parameters)
        # flat: gradients end to end, then for each parameter how many workers have one.
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trained]
        has_P = torch.tensor([p.grad is not None for p in trained]).to(gradients[0])
        flat = torch.cat([*(g.flatten() for g in gradients), has_P])
        dist.all_reduce(flat)
        *sums, has_P = flat.split([*(g.numel() for g in gradients), len(trained)])
        for parameter, summed, has in zip(trained, sums, has_P.tolist(), strict=True):
            parameter.grad = summed.view_as(parameter).clone() if has else None

    def gather(self, items: list[Any]) -> list[Any]:
        """Join the workers' lists in rank order, on every worker."""
        if self.size == 1:
            return items
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, items)
        return list(itertools.chain.from_iterable(parts))
