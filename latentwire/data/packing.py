"""Batches that are filled up to a budget of positions, planned from counts alone: no row is read for it.

The plan of an epoch hangs on its seed, the rows and the budget, and on nothing else. So every worker
has the same one, whatever their number, and so has a run that is resumed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from latentwire.prompts.batch import SHARED_BY

WINDOW_ROWS = 16_384
"""Neighbouring rows that are shuffled among each other: a stream holds about so many to fill its batches from.
The shards themselves are in an order drawn by seed."""
LOOK_AHEAD = 32
"""Units that are first looked at for a batch."""


@dataclass(frozen=True)
class Units:
    """Neighbouring rows that stay together, and what N receivers read of them. U counts units."""

    start_U: np.ndarray
    """The first row."""
    rows_U: np.ndarray
    """Rows."""
    bytes_U: np.ndarray
    """Bytes of the longest text."""
    messages_U: np.ndarray
    """Messages that are read."""
    sequences_U: np.ndarray
    """Sequences that read them."""
    head_NU: np.ndarray
    """Positions up to the end of the longest message."""
    rest_NU: np.ndarray
    """Positions of the longest that follows a message."""
    whole_NU: np.ndarray
    """Positions of the longest sequence."""
    shares: bool
    """Whether a message is read once where enough sequences share it."""

    def __len__(self) -> int:
        return len(self.start_U)

    @property
    def alone_U(self) -> np.ndarray:
        """Positions of each unit by itself, of the receiver that reads most."""
        return self._read(
            self.messages_U, self.sequences_U, self.head_NU, self.rest_NU, self.whole_NU
        )

    def filled(self, units: np.ndarray) -> np.ndarray:
        """Return the positions of a batch of the first of ``units``, of the first two, and so on.

        They are those of padded rows, of the receiver that reads most.
        """
        # Column u has the longest of the first u + 1 units, to which all of them are padded.
        longest = []
        for length_NU in (self.head_NU, self.rest_NU, self.whole_NU):
            longest.append(np.maximum.accumulate(length_NU[:, units], axis=1))
        counts = (self.messages_U[units].cumsum(), self.sequences_U[units].cumsum())
        return self._read(*counts, *longest)

    def rows_of(self, units: np.ndarray) -> np.ndarray:
        """Return the numbers of the units' rows."""
        # Row n of the result, in a unit whose rows begin at place b of it, is row start + (n - b).
        # Units that start at 4 and 0, with 2 rows and 1, give [4, 5, 0].
        sizes = self.rows_U[units]
        begins = sizes.cumsum() - sizes
        return np.repeat(self.start_U[units] - begins, sizes) + np.arange(sizes.sum())

    def _read(
        self,
        messages: np.ndarray,
        sequences: np.ndarray,
        head: np.ndarray,
        rest: np.ndarray,
        whole: np.ndarray,
    ) -> np.ndarray:
        # [N, U]: either every message once and what follows it for each sequence, or whole
        # sequences, all of them as long as the longest. Two passes pay from SHARED_BY sequences a
        # message on.
        once = messages * head + sequences * rest
        parted = self.shares & (sequences >= SHARED_BY * messages)
        # [N, U] → [U]: the budget is for the receiver that reads most.
        return np.where(parted, once, sequences * whole).max(0)


def batches(units: Units, budget: int, buckets: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the units of each batch of an epoch, every unit once.

    Args:
        units: of all rows, none above the budget by itself.
        budget: most positions of a batch.
        buckets: batches that are drawn together, sorted by the length of their texts and then parted.
        seed: of the order.
    """
    rng = np.random.default_rng(seed)
    # Windows keep their order, units within one are shuffled: lexsort takes its last key first.
    window_U = units.start_U // WINDOW_ROWS
    order = np.lexsort((rng.random(len(units)), window_U))
    while len(order):
        count = _drawn(units, order, budget, buckets)
        drawn, order = order[:count], order[count:]
        cut = list(_cut(units, _by_length(units, drawn), budget)) if buckets > 1 else [drawn]
        # Batches come in a drawn order, or a draw would always begin with its shortest texts.
        for place in rng.permutation(len(cut)):
            yield cut[place]


def count_steps(
    units: Units, budget: int, buckets: int, seeds: Iterable[int], most: int | None
) -> int:
    """Count the batches of epochs of these seeds, up to ``most``."""
    epochs = (batches(units, budget, buckets, seed) for seed in seeds)
    return sum(1 for _ in itertools.islice(itertools.chain.from_iterable(epochs), most))


def parts(units: Units, chosen: np.ndarray, count: int) -> list[np.ndarray]:
    """Part a batch among workers, or into micro-batches: neighbours, about as many positions each.

    Where there are few units, some parts have none.
    """
    # With all positions on a line that is cut into ``count`` equal lengths, a unit goes where its
    # middle lies.
    alone = units.alone_U[chosen]
    middle = alone.cumsum() - alone / 2
    return np.split(chosen, np.searchsorted(middle, alone.sum() * np.arange(1, count) / count))


def tables(
    stream: Iterable[pa.Table], units: Units, plan: Iterable[np.ndarray], rank: int, world: int
) -> Iterator[pa.Table]:
    """Yield a worker's rows of each batch of a plan.

    Args:
        stream: all rows in their order, some at a time.
        units: of these rows.
        plan: units of each batch (:func:`batches`).
        rank: the worker's number.
        world: workers that share each batch.
    """
    # Every worker reads all rows, in one order, and holds those that a later batch may still take.
    # number_H: the numbers of the H rows held. used_R: rows that batches so far have taken.
    source, read = iter(stream), 0
    held: pa.Table | None = None
    number_H, used_R = np.empty(0, np.int64), np.zeros(int(units.rows_U.sum()), bool)
    for batch in plan:
        rows = units.rows_of(parts(units, batch, world)[rank])
        # A worker may have no rows of a batch; −1 then asks for none.
        while held is None or rows.max(initial=-1) >= read:
            table, keep_H = next(source), ~used_R[number_H]
            unused = [] if held is None else [held.filter(pa.array(keep_H))]
            held = pa.concat_tables([*unused, table])
            number_H = np.append(number_H[keep_H], np.arange(read, read + table.num_rows))
            read += table.num_rows
        # All workers' rows of the batch are used. number_H rises, so it can be bisected.
        used_R[units.rows_of(batch)] = True
        yield held.take(np.searchsorted(number_H, rows))


def _drawn(units: Units, order: np.ndarray, budget: int, buckets: int) -> int:
    """Count the next units that fill so many batches, as they are parted when sorted by length."""
    count = 0
    for _ in range(buckets):
        count += _fitting(units, order[count:], budget)
    if buckets == 1:
        return count

    def fits(some: int) -> bool:
        drawn = _by_length(units, order[:some])
        return sum(1 for _ in _cut(units, drawn, budget)) <= buckets

    while not fits(count):  # sorted, they may leave gaps that they did not leave as drawn
        count -= 1
    # Or they fill gaps, and more of them fit: by strides that double while they do, then halve.
    stride = 1
    while count + stride <= len(order) and fits(count + stride):
        count, stride = count + stride, 2 * stride
    while stride > 1:
        stride //= 2
        if count + stride <= len(order) and fits(count + stride):
            count += stride
    return count


def _by_length(units: Units, chosen: np.ndarray) -> np.ndarray:
    return chosen[np.argsort(units.bytes_U[chosen], kind="stable")]


def _cut(units: Units, order: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Part units, in their order, into batches as full as can be."""
    while len(order):
        count = _fitting(units, order, budget)
        yield order[:count]
        order = order[count:]


def _fitting(units: Units, order: np.ndarray, budget: int) -> int:
    """Count the first units that fit one batch: at least one, where there is any."""
    # A batch ends before the first unit with which it is beyond the budget. ``filled`` costs as
    # much as it looks at: a few units first, then twice as many.
    seen = LOOK_AHEAD
    while True:
        beyond = np.flatnonzero(units.filled(order[:seen]) > budget)
        if len(beyond):
            return max(1, int(beyond[0]))
        if seen >= len(order):
            return len(order)
        seen *= 2
