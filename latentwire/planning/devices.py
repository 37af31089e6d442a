"""Shares of whole GPUs: Ray takes a part of a GPU from one device, never from two."""

from __future__ import annotations

import math
from collections.abc import Iterable

UNIT = 10_000
"""Ray's smallest part of a resource: it counts in ten-thousandths."""


def times(have: float, need: float) -> int:
    """Count how often a resource holds what is needed.

    Ten tenths fit into one, which floating point denies.
    """
    return round(have * UNIT) // max(1, round(need * UNIT))


def pieces(gpus: float, share: float, taken: Iterable[float] = ()) -> int:
    """Count how many shares of a GPU fit on so many devices, after those ``taken`` before.

    A part goes where it leaves least, as in Ray. A share of more than one GPU takes whole ones. On
    a busy cluster the free part of a device counts as a device of that size.
    """
    left = _left(gpus, taken)
    if left is None:
        return 0
    if share >= 1:  # only devices that nobody has a part of
        return left.count(UNIT) // math.ceil(share)
    return sum(room // max(1, round(share * UNIT)) for room in left)


def hold(gpus: float, taken: Iterable[float]) -> bool:
    """Return whether all these shares fit on so many devices."""
    return _left(gpus, taken) is not None


def _left(gpus: float, taken: Iterable[float]) -> list[int] | None:
    """Return the free part of each device, in Ray's units; ``None`` where they do not hold ``taken``."""
    whole, rest = divmod(round(gpus * UNIT), UNIT)
    left = [UNIT] * whole + ([rest] if rest else [])
    for share in taken:
        # 0.3 is a need of 3,000 on one device, 1.5 one of 10,000 on each of two.
        need, count = (UNIT, math.ceil(share)) if share >= 1 else (round(share * UNIT), 1)
        for _ in range(count if need else 0):
            fitting = [device for device, room in enumerate(left) if room >= need]
            if not fitting:
                return None
            # Best fit: of the devices that hold it, the one with the least room.
            left[min(fitting, key=lambda device: left[device])] -= need
    return left
