"""Parts of a context that a text reader is shown in place of a message."""

from __future__ import annotations

import random
from typing import Literal

Reads = Literal["text", "truncated", "window", "closed_book"]
"""Parts of a context that are told by their place alone."""


def shown(reads: Reads, row: str, context_ids: list[int], budget: int) -> list[int]:
    """Return the tokens of a context that are shown.

    Args:
        reads: ``text`` for all of them, ``truncated`` for the first ones, ``window`` for a stretch
            whose place the row's id decides, ``closed_book`` for none.
        row: the row's id.
        context_ids: the whole context.
        budget: the most tokens of ``truncated`` and ``window``.
    """
    if reads == "text":
        return context_ids
    if reads == "closed_book":
        return []
    budget = max(0, budget)
    if reads == "truncated" or len(context_ids) <= budget:
        return context_ids[:budget]
    # A text seeds a generator alike in every process, unlike its hash.
    start = random.Random(row).randint(0, len(context_ids) - budget)
    return context_ids[start : start + budget]
