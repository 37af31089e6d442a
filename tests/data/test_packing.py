"""Batches that are filled by positions: every row once, none above the budget, planned alike by every worker."""

from collections.abc import Iterator
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from latentwire.config import TrainingConfig
from latentwire.data import packing, streams
from latentwire.data.packing import Units

BUDGET = 400


def units(count: int, seed: int = 0, shares: bool = True) -> Units:
    """Units of one to five rows with texts and questions of many lengths, at two receivers."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 6, count)
    head, rest = rng.integers(5, 40, (2, count)), rng.integers(5, 15, (2, count))
    return Units(
        start_U=rows.cumsum() - rows,
        rows_U=rows,
        bytes_U=10 * head.max(0),
        messages_U=np.ones(count, int),
        sequences_U=rows,
        head_NU=head,
        rest_NU=rest,
        whole_NU=head + rest,
        shares=shares,
    )


def table_of(some: Units) -> pa.Table:
    return pa.table({"id": np.arange(some.rows_U.sum())})


def plan(some: Units, buckets: int = 2, seed: int = 3, budget: int = BUDGET) -> list[list[int]]:
    return [batch.tolist() for batch in packing.batches(some, budget, buckets, seed)]


def taken(some: Units, chosen: list[int]) -> int:
    """Positions of a batch, counted unit by unit."""
    most = 0
    for head, rest in zip(some.head_NU[:, chosen], some.rest_NU[:, chosen], strict=True):
        rows = int(some.rows_U[chosen].sum())
        once = len(chosen) * max(head) + rows * max(rest)
        whole = rows * max(head + rest)
        most = max(most, once if some.shares and rows >= 1.5 * len(chosen) else whole)
    return most


@pytest.mark.parametrize("buckets", [1, 2, 5])
@pytest.mark.parametrize("shares", [True, False])
def test_an_epoch_has_every_unit_once_and_no_batch_above_the_budget(
    buckets: int, shares: bool
) -> None:
    some = units(300, shares=shares)
    found = plan(some, buckets)
    assert sorted(chain.from_iterable(found)) == list(range(300))
    assert all(taken(some, batch) <= BUDGET for batch in found)
    assert plan(some, buckets) == found != plan(some, buckets, seed=4)
    assert found != sorted(found)


def test_batches_are_as_full_as_can_be() -> None:
    """As drawn, the next unit would not have fitted; in buckets, more than as drawn go into a batch."""
    some = units(300)
    found = plan(some, buckets=1)
    for batch, after in pairwise(found):
        assert taken(some, [*batch, after[0]]) > BUDGET
    assert len(plan(some, buckets=8)) < len(found)
    for buckets in (2, 4):
        batches = plan(some, buckets)
        filled = [taken(some, batch) / BUDGET for batch in batches[: -2 * buckets]]
        assert np.mean(filled) > 0.85 and len(batches) < len(found)
        # None is a leftover of what was drawn together.
        assert sum(share < 0.5 for share in filled) == 0


def test_a_budget_for_all_makes_one_batch_and_a_unit_fits_by_itself() -> None:
    some = units(100)
    assert [len(batch) for batch in plan(some, budget=10**6)] == [100]
    tight = int(some.alone_U.max())
    assert all(taken(some, batch) <= tight for batch in plan(some, budget=tight))


def test_what_is_drawn_together_is_sorted_by_length() -> None:
    some = units(300)
    found = plan(some, buckets=4)
    spread = np.mean([np.ptp(some.bytes_U[batch]) for batch in found])
    drawn = np.mean([np.ptp(some.bytes_U[batch]) for batch in plan(some, buckets=1)])
    assert spread < 0.6 * drawn
    means = [some.bytes_U[batch].mean() for batch in found]
    assert means[:4] != sorted(means[:4]) or means[4:8] != sorted(means[4:8])


def test_far_rows_are_not_shuffled_among_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream holds about a window: what a batch needs has been read by then."""
    monkeypatch.setattr(packing, "WINDOW_ROWS", 50)
    some = units(200)
    windows = [some.start_U[batch] // 50 for batch in plan(some, buckets=1)]
    assert all(np.ptp(window) <= 1 for window in windows)
    assert np.concatenate(windows).tolist() == sorted(np.concatenate(windows))


@pytest.mark.parametrize("count", [2, 3, 7])
def test_parts_hold_about_as_many_positions(count: int) -> None:
    some = units(40)
    chosen = np.random.default_rng(0).permutation(40)
    parts = packing.parts(some, chosen, count)
    assert len(parts) == count and np.concatenate(parts).tolist() == chosen.tolist()
    sizes = [some.alone_U[part].sum() for part in parts]
    assert max(sizes) - min(sizes) <= 2 * some.alone_U.max()
    assert sorted(map(len, packing.parts(some, chosen[:1], count))) == [0] * (count - 1) + [1]


def slices(table: pa.Table, size: int) -> Iterator[pa.Table]:
    for start in range(0, table.num_rows, size):
        yield table.slice(start, size)


def ids(batches: Iterator[pa.Table]) -> list[list[int]]:
    return [batch["id"].to_pylist() for batch in batches]


def test_a_stream_gives_the_batches_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW_ROWS", 60)
    some, training = units(200), TrainingConfig(positions_per_batch=BUDGET, seed=2)
    table = table_of(some)
    whole = ids(streams.packed_batches([table], training, 1, some))
    assert sorted(chain.from_iterable(whole)) == list(range(table.num_rows))
    assert whole != ids(streams.packed_batches([table], training, 2, some))
    for size in (1, 7, 64):
        assert whole == ids(streams.packed_batches(slices(table, size), training, 1, some))


def test_a_stream_is_not_read_further_than_its_batches_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packing, "WINDOW_ROWS", 64)
    some, read = units(400), []

    def stream() -> Iterator[pa.Table]:
        for part in slices(table_of(some), 16):
            read.append(part.num_rows)
            yield part

    training = TrainingConfig(positions_per_batch=BUDGET)
    given = 0
    for batch in streams.packed_batches(stream(), training, 0, some):
        given += batch.num_rows
        assert sum(read) - given <= 64 + 16 + 2 * 64


@pytest.mark.parametrize("world", [2, 5])
def test_workers_share_each_batch_of_one_plan(world: int) -> None:
    some, training = units(60), TrainingConfig(positions_per_batch=BUDGET)
    table = table_of(some)
    whole = ids(streams.packed_batches([table], training, 0, some))
    shares = [
        ids(streams.packed_batches([table], training, 0, some, rank, world))
        for rank in range(world)
    ]
    assert [list(chain.from_iterable(parts)) for parts in zip(*shares, strict=True)] == whole
    owner = np.repeat(np.arange(60), some.rows_U)
    for parts in zip(*shares, strict=True):  # no unit is parted
        held = [set(owner[part].tolist()) for part in parts if part]
        assert sum(map(len, held)) == len(set().union(*held))


def test_steps_are_the_batches_of_all_epochs() -> None:
    some = units(100)
    given: dict[str, Any] = {"positions_per_batch": BUDGET, "epochs": 3, "seed": 5}
    training = TrainingConfig(**given)
    table = table_of(some)
    epochs = [len(ids(streams.packed_batches([table], training, e, some))) for e in range(3)]
    assert streams.packed_steps(training, some) == sum(epochs)
    assert streams.packed_steps(TrainingConfig(**given, max_steps=7), some) == 7
