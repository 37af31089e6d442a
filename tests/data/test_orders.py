"""Columns that are read, teachers' beside them, and the order of rows, in which workers share every batch."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentwire.config import RunConfig, TrainingConfig
from latentwire.config.resolve import with_values
from latentwire.data import streams


def numbered(count: int) -> pa.Table:
    rng = np.random.default_rng(1)
    return pa.table({"id": np.arange(count), "sender_bytes": rng.integers(1, 500, count)})


def test_training_reads_ids_and_texts_only_where_they_are_needed(run: RunConfig) -> None:
    ids = {
        f"{name}_{piece}_ids"
        for name in ("llama", "qwen")
        for piece in ("context", "question", "answer")
    }
    texts = {"context", "question"}
    found = streams.training_columns(run)
    assert set(found) == {"id", "sender_bytes"} | ids | texts and len(set(found)) == len(found)
    together = with_values(run, {"training.questions_together": True})
    assert set(streams.training_columns(together)) == set(found) | {"sender_hash"}
    lm = with_values(run, {"encoder.kind": "lm", "encoder.model": "receiver:llama"})
    alone = {"id", "sender_bytes", "encoder_ids"} | ids
    assert set(streams.training_columns(lm)) == alone
    assert set(streams.training_columns(lm, continued=True)) == alone | texts
    continuing = with_values(lm, {"losses.continuation_ce_weight": 0.5})
    assert set(streams.training_columns(continuing)) == alone | texts


def test_teachers_columns_stand_beside_their_rows(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "qwen").mkdir()
    pq.write_table(pa.table({"id": range(10), "unread": range(10)}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"llama_count": range(100, 110)}), tmp_path / "llama" / "0.parquet")
    pq.write_table(pa.table({"qwen_count": range(200, 210)}), tmp_path / "qwen" / "0.parquet")
    teacher_paths = {name: tmp_path / name for name in ("llama", "qwen")}
    parts = list(streams.read_joined("0.parquet", tmp_path, teacher_paths, ["id"], 4))
    assert [part.num_rows for part in parts] == [4, 4, 2]
    (whole,) = streams.read_joined("0.parquet", tmp_path, teacher_paths, ["id"])
    for table in (pa.concat_tables(parts), whole):
        assert table.to_pydict() == {
            "id": list(range(10)), "llama_count": list(range(100, 110)), "qwen_count": list(range(200, 210))
        }  # fmt: skip
    (read,) = streams._read_file(
        {"file": np.array(["0.parquet"])},
        train=tmp_path,
        teacher_paths=teacher_paths,
        columns=["id"],
    )
    assert read.equals(whole)


@pytest.mark.parametrize("bucket_batches", [1, 4])
def test_an_epoch_leaves_out_only_what_fills_no_batch(bucket_batches: int) -> None:
    training = TrainingConfig(batch_size=8, bucket_batches=bucket_batches, seed=3)
    table = numbered(101)
    for epoch in range(2):
        batches = [
            batch["id"].to_pylist() for batch in streams.shuffled_batches(table, training, epoch)
        ]
        assert [len(batch) for batch in batches] == [8] * 12
        assert len({row for batch in batches for row in batch}) == 96
        assert batches == [
            batch["id"].to_pylist() for batch in streams.shuffled_batches(table, training, epoch)
        ]
    (only,) = streams.shuffled_batches(numbered(5), training, 0)
    assert sorted(only["id"].to_pylist()) == list(range(5))
    assert len(list(streams.shuffled_batches(numbered(8), training, 0))) == 1
    assert not list(streams.shuffled_batches(numbered(0), training, 0))[1:]


def test_every_row_is_as_likely_to_be_left_out() -> None:
    """Over 300 epochs each of 9 rows is the one that fills no batch about 33 times, whatever its length."""
    training, table = TrainingConfig(batch_size=4, bucket_batches=2), numbered(9)
    left = np.zeros(9)
    for epoch in range(300):
        seen = {
            row
            for batch in streams.shuffled_batches(table, training, epoch)
            for row in batch["id"].to_pylist()
        }
        assert len(seen) == 8
        left[next(iter(set(range(9)) - seen))] += 1
    assert left.min() > 33 - 4 * 5.5 and left.max() < 33 + 4 * 5.5


@pytest.mark.parametrize("world", [2, 3])
def test_workers_share_out_every_batch(world: int) -> None:
    training, table = TrainingConfig(batch_size=8, bucket_batches=2), numbered(40)
    whole = [batch["id"].to_pylist() for batch in streams.shuffled_batches(table, training, 5)]
    shares = [
        [
            batch["id"].to_pylist()
            for batch in streams.shuffled_batches(table, training, 5, rank, world)
        ]
        for rank in range(world)
    ]
    assert [list(chain.from_iterable(parts)) for parts in zip(*shares, strict=True)] == whole
    assert {len(part) for share in shares for part in share} == {8 // world, -(-8 // world)}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_streams_batches_do_not_hang_on_how_many_workers_share_them(world: int) -> None:
    """Of a run whose workers come and go each reads all rows."""
    training = TrainingConfig(batch_size=8, bucket_batches=2, num_workers=3, min_workers=1)
    parts = [numbered(40).slice(start, 16) for start in (0, 16, 32)]
    stream = SimpleNamespace(iter_batches=lambda **_: iter(parts))

    def whole() -> Iterator[pa.Table]:
        return streams.streamed_batches(stream, training, 0, 8, keep_short=False)

    shares = [
        [streams.share_of(batch, rank, world)["id"].to_pylist() for batch in whole()]
        for rank in range(world)
    ]
    joined = [list(chain.from_iterable(parts)) for parts in zip(*shares, strict=True)]
    assert joined == [batch["id"].to_pylist() for batch in whole()]
    assert sorted(chain.from_iterable(joined)) == list(range(40))


def test_no_two_epochs_or_seeds_share_an_order() -> None:
    seeds = {
        streams.epoch_seed(TrainingConfig(seed=seed), epoch)
        for seed in range(5)
        for epoch in range(200)
    }
    assert len(seeds) == 1_000
    orders = set()
    for seed in range(3):
        for epoch in range(3):
            training = TrainingConfig(batch_size=4, seed=seed)
            batches = streams.shuffled_batches(numbered(20), training, epoch)
            orders.add(tuple(row for batch in batches for row in batch["id"].to_pylist()))
    assert len(orders) == 9


def test_what_is_drawn_together_is_sorted_by_length_and_the_rest_is_not() -> None:
    """Each window of bucket_batches batches holds its rows by length; windows are as drawn."""
    training, table = TrainingConfig(batch_size=5, bucket_batches=4, seed=2), numbered(60)
    batches = [
        batch["sender_bytes"].to_pylist() for batch in streams.shuffled_batches(table, training, 0)
    ]
    assert len(batches) == 12
    for start in range(0, 12, 4):
        window = sorted(batches[start : start + 4])
        assert list(chain.from_iterable(map(sorted, window))) == sorted(chain.from_iterable(window))
    first, second = (list(chain.from_iterable(batches[start : start + 4])) for start in (0, 4))
    assert max(first) > min(second) and max(second) > min(first)


class Stream:
    """Stands for a worker's Ray stream: what it is asked, and rows shuffled by the seed that it is given."""

    def __init__(self, table: pa.Table) -> None:
        self.table, self.asked = table, dict[str, Any]()

    def iter_batches(
        self, *, batch_size: int, batch_format: str, **options: Any
    ) -> Iterator[pa.Table]:
        self.asked = {"batch_size": batch_size, "batch_format": batch_format} | options
        order = np.random.default_rng(options["local_shuffle_seed"]).permutation(
            self.table.num_rows
        )
        for start in range(0, self.table.num_rows, batch_size):
            yield self.table.take(order[start : start + batch_size])


def test_a_stream_is_shuffled_within_its_buffer_and_sorted_by_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "SHUFFLE_ROWS", 30)
    table, orders = numbered(66), []
    training = TrainingConfig(bucket_batches=2, seed=7)
    for epoch in (0, 1, 0):
        stream = Stream(table)
        batches = list(streams.streamed_batches(stream, training, epoch, 8, keep_short=False))
        assert [batch.num_rows for batch in batches] == [8] * 8
        assert stream.asked["batch_size"] == 16 and stream.asked["local_shuffle_buffer_size"] == 30
        for start in range(0, 8, 2):
            pair = sorted(batch["sender_bytes"].to_pylist() for batch in batches[start : start + 2])
            assert max(pair[0]) <= min(pair[1]) or max(pair[1]) <= min(pair[0])
        orders.append([row for batch in batches for row in batch["id"].to_pylist()])
        assert len(set(orders[-1])) == 64
    assert orders[0] == orders[2] != orders[1]
    wide = Stream(table)
    list(streams.streamed_batches(wide, TrainingConfig(bucket_batches=5), 0, 8, keep_short=False))
    assert wide.asked["local_shuffle_buffer_size"] == 40  # never smaller than what is drawn at once
    (short,) = streams.streamed_batches(Stream(numbered(5)), training, 0, 8, keep_short=True)
    assert sorted(short["id"].to_pylist()) == list(range(5))
    assert not list(streams.streamed_batches(Stream(numbered(5)), training, 0, 8, keep_short=False))
