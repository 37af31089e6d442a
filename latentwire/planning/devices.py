"""What fits on whole GPUs. Ray deals out a part of a GPU from one device, never from two."""

from __future__ import annotations

import math
from collections.abc import Iterable

UNIT = 10_000
"""Ray counts resources in ten-thousandths."""


def times(have: float, need: float) -> int:
    """Return how often a resource holds what is needed: ten tenths in one, which floats deny."""
    return round(have * UNIT) // max(1, round(need * UNIT))


def pieces(gpus: float, share: float, taken: Iterable[float] = ()) -> int:
    """Return how many shares of a GPU fit on so many devices, after those ``taken`` before.

    A part is put where it leaves least, as Ray does. More than one GPU at a time are whole ones. Of a
    device that is not wholly there (what is free on a busy cluster) the rest counts as a device.
    """
    left = _left(gpus, taken)
    if left is None:
        return 0
    if share >= 1:
        return left.count(UNIT) // math.ceil(share)
    return sum(room // max(1, round(share * UNIT)) for room in left)


def hold(gpus: float, taken: Iterable[float]) -> bool:
    """Return whether all these shares fit on so many devices."""
    return _left(gpus, taken) is not None


def _left(gpus: float, taken: Iterable[float]) -> list[int] | None:
    """What is left of each device, in Ray's units; ``None`` where not all that is taken fits."""
    whole, rest = divmod(round(gpus * UNIT), UNIT)
    left = [UNIT] * whole + ([rest] if rest else [])
    for share in taken:
        need, count = (UNIT, math.ceil(share)) if share >= 1 else (round(share * UNIT), 1)
        for _ in range(count if need else 0):
            fitting = [place for place, room in enumerate(left) if room >= need]
            if not fitting:
                return None
            left[min(fitting, key=lambda place: left[place])] -= need
    return left
