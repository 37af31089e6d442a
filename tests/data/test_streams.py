"""Rows on their way to a loop: every one once, batches of about one length, the same in memory and streamed."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
from ray.data import ExecutionOptions

from latentwire.config import RunConfig, TrainingConfig
from latentwire.config.resolve import with_values
from latentwire.data import shards, streams
from latentwire.data.sources import DataError
from latentwire.distributed.trial import data_config


def ids_of(batches: Iterator[pa.Table]) -> list[str]:
    return [row for batch in batches for row in batch["id"].to_pylist()]


def test_an_epoch_is_every_row_once_and_workers_share_it(table: pa.Table) -> None:
    training = TrainingConfig(batch_size=4, seed=1)
    ids = ids_of(streams.shuffled_batches(table, training, epoch=0))
    assert sorted(ids) == sorted(table["id"].to_pylist())
    assert ids != ids_of(streams.shuffled_batches(table, training, epoch=1))
    shares = [list(streams.shuffled_batches(table, training, 0, rank, 2)) for rank in range(2)]
    joined = [
        sorted(a["id"].to_pylist() + b["id"].to_pylist()) for a, b in zip(*shares, strict=True)
    ]
    assert joined == [sorted(ids[start : start + 4]) for start in range(0, len(ids), 4)]


def asked(contexts: int, rng: np.random.Generator) -> pa.Table:
    """One to five rows to each context, next to each other."""
    context = np.repeat(np.arange(contexts), rng.integers(1, 6, contexts))
    size = rng.integers(1, 1000, contexts)[context]
    return pa.table({"sender_hash": context, "sender_bytes": size, "id": np.arange(len(context))})


@pytest.mark.parametrize("bucket_batches", [1, 3])
def test_questions_to_one_context_are_shuffled_as_one(bucket_batches: int) -> None:
    table = asked(100, np.random.default_rng(0))
    training = TrainingConfig(batch_size=16, bucket_batches=bucket_batches, questions_together=True)
    batches = list(streams.shuffled_batches(table, training, epoch=0))
    ids = ids_of(iter(batches))
    assert len(set(ids)) == len(ids) == table.num_rows - table.num_rows % 16
    assert ids != ids_of(streams.shuffled_batches(table, training, epoch=1))
    parted = sum(len(set(batch["sender_hash"].to_pylist())) for batch in batches) - 100
    assert (
        parted <= len(batches) * 2
    )  # a batch ends within a context at either side, a drawn part at its own
    halves = [list(streams.shuffled_batches(table, training, 0, rank, 2)) for rank in range(2)]
    assert [a["id"].to_pylist() + b["id"].to_pylist() for a, b in zip(*halves, strict=True)] == [
        batch["id"].to_pylist() for batch in batches
    ]


class Windows:
    """Stands for a worker's Ray stream of rows in the order of the shards."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    def iter_batches(self, *, batch_size: int, batch_format: str) -> Iterator[pa.Table]:
        for start in range(0, self.table.num_rows, batch_size):
            yield self.table.slice(start, batch_size)


def test_streamed_questions_stay_with_their_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "SHUFFLE_ROWS", 100)
    table = asked(100, np.random.default_rng(0))
    training = TrainingConfig(questions_together=True, bucket_batches=2)
    epochs = [
        list(streams.streamed_batches(Windows(table), training, e, 16, keep_short=False))
        for e in (0, 1)
    ]
    for batches in epochs:
        ids = ids_of(iter(batches))
        assert [batch.num_rows for batch in batches] == [16] * (table.num_rows // 16) and len(
            set(ids)
        ) == len(ids)
        assert (
            sum(len(set(batch["sender_hash"].to_pylist())) for batch in batches) - 100
            <= len(batches) * 2
        )
    assert ids_of(iter(epochs[0])) != ids_of(iter(epochs[1]))


def test_a_worker_whose_stream_is_empty_has_a_batch_where_the_others_have_one() -> None:
    """Fewer rows than workers: whoever had no step would leave the others waiting."""
    training, nothing = (
        TrainingConfig(questions_together=True),
        Windows(asked(1, np.random.default_rng(0)).slice(0, 0)),
    )
    for keep_short in (True, False):
        batches = streams.streamed_batches(nothing, training, 0, 4, keep_short=keep_short)
        assert [batch.num_rows for batch in batches] == [0] * keep_short


def lengths(count: int) -> pa.Table:
    return pa.table(
        {"sender_bytes": np.random.default_rng(0).integers(1, 1000, count), "id": np.arange(count)}
    )


def test_buckets_hold_rows_of_about_one_length() -> None:
    """Whole batches, every row once, in no order of length; and much less spread within a batch than as drawn."""
    table = lengths(67)
    batches = list(streams.length_buckets(table, 8, seed=3))
    assert [batch.num_rows for batch in batches] == [8] * 8
    ids = sorted(ids_of(iter(batches)))
    assert ids == list(
        range(64)
    )  # the first 64 as drawn: what is left out has nothing to do with length
    means = [np.mean(batch["sender_bytes"].to_numpy()) for batch in batches]
    assert means != sorted(means)
    spread = np.mean([np.ptp(batch["sender_bytes"].to_numpy()) for batch in batches])
    drawn = np.mean(
        [np.ptp(table["sender_bytes"].slice(start, 8).to_numpy()) for start in range(0, 64, 8)]
    )
    assert spread < 0.3 * drawn
    assert ids_of(streams.length_buckets(table, 8, seed=3)) == ids_of(iter(batches))
    assert not list(streams.length_buckets(lengths(5), 8, seed=0))
    assert [
        batch.num_rows for batch in streams.length_buckets(lengths(5), 8, seed=0, keep_short=True)
    ] == [5]


def written(run: RunConfig, folder: Path, texts: int, size: int, files: int) -> Path:
    """Shards of made-up rows, as preprocessing leaves them."""
    path = shards.shard_path(with_values(run, {"data.shard_dir": str(folder)}), "train")
    path.mkdir(parents=True)
    names = [f"{number:05d}.parquet" for number in range(files)]
    for number, name in enumerate(names):
        rows = range(number * texts // files, (number + 1) * texts // files)
        noise = np.random.default_rng(number).integers(
            0, 2**31, (len(rows), size // 4), dtype=np.int32
        )
        columns = {
            "id": [str(row) for row in rows],
            "sender_bytes": pa.array([size] * len(rows), pa.int32()),
        }
        columns["payload"] = pa.FixedSizeListArray.from_arrays(pa.array(noise.ravel()), size // 4)
        pq.write_table(pa.table(columns), path / name, row_group_size=64)
    (path / shards.MANIFEST).write_text(
        f'{{"key": "k", "rows": {texts}, "files": {names}}}'.replace("'", '"')
    )
    return path


class Planned:
    """Stands for a Ray Dataset that notes by which options it is read."""

    name = "train"

    def __init__(self) -> None:
        self.context = SimpleNamespace(execution_options=ExecutionOptions())
        self.read_by: list[ExecutionOptions] = []

    def copy(self, other: "Planned") -> "Planned":
        return other

    def map_batches(self, *_: object, **__: object) -> "Planned":
        return self

    def materialize(self) -> "Planned":
        self.read_by.append(self.context.execution_options)
        return self

    def iterator(self) -> "Planned":
        return self.materialize()

    def streaming_split(self, count: int, **_: object) -> list["Planned"]:
        return [self.materialize()] * count


@pytest.mark.parametrize("in_memory", [True, False])
def test_rows_are_asked_for_in_order(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    """Both where they are made and where Train hands them out, which sets options of its own."""
    train, planned = written(run, tmp_path, texts=6, size=400, files=2), Planned()
    monkeypatch.setattr(ray.data, "from_items", lambda *_, **__: planned)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"object_store_memory": 1e9})
    dataset = streams.ray_dataset(train, {}, ["id"], in_memory=in_memory)
    assert planned.context.execution_options.preserve_order
    data_config().configure({"train": dataset, "dev": dataset}, 2, None, None)
    assert len(planned.read_by) == in_memory + 3 and all(
        options.preserve_order for options in planned.read_by
    )


@pytest.fixture(scope="module")
def small_store() -> Iterator[None]:
    """Ray with an object store of 80 MB."""
    ray.init(
        num_cpus=2, object_store_memory=80 * 2**20, log_to_driver=False, include_dashboard=False
    )
    yield
    ray.shutdown()


def late(
    read: Callable[..., Iterator[pa.Table]], batch: dict[str, np.ndarray], **options: Any
) -> Iterator[pa.Table]:
    """As shard files are read, but the first of them comes after others."""
    if str(batch["file"][0]) == "00000.parquet":
        time.sleep(1.0)
    yield from read(batch, **options)


@pytest.mark.slow
@pytest.mark.parametrize("in_memory", [True, False])
def test_rows_come_in_the_order_of_their_files_whichever_is_read_first(
    run: RunConfig,
    small_store: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_memory: bool,
) -> None:
    """To one worker and to two, as Train hands them out; a resumed run skips by number what it has used."""
    train = written(run, tmp_path, texts=60, size=400, files=6)
    monkeypatch.setattr(streams, "_read_file", functools.partial(late, streams._read_file))
    dataset = streams.ray_dataset(train, {}, ["id", "sender_bytes"], in_memory=in_memory)
    expected = [str(row) for row in range(60)]
    assert [row["id"] for row in dataset.iter_rows()] == expected
    for world in (1, 2):
        shares = [
            handed["train"]
            for handed in data_config().configure({"train": dataset}, world, None, None)
        ]
        with ThreadPoolExecutor(world) as pool:
            twice = [list(pool.map(ids_in_order, shares)) for _ in range(2)]
        assert twice[0] == twice[1] and sorted(itertools.chain(*twice[0]), key=int) == expected
        assert all(share == sorted(share, key=int) for share in twice[0])


def ids_in_order(stream: Any) -> list[str]:
    return [row["id"] for row in stream.iter_rows()]


@pytest.mark.slow
def test_rows_beyond_the_object_store_are_streamed(
    run: RunConfig, small_store: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """240 MB of rows through a store of 80 MB, twice, each epoch in an order of its own; in memory they are refused."""
    monkeypatch.setattr(
        streams, "SHUFFLE_ROWS", 64
    )  # these rows are a hundred times as large as ours
    train = written(run, tmp_path, texts=1_200, size=200_000, files=24)
    columns = ["id", "sender_bytes", "payload"]
    with pytest.raises(
        DataError, match=r"must fit the object store, got 0\.\d GB for 0\.1 GB; set data\.in_memory"
    ):
        streams.ray_dataset(train, {}, columns, in_memory=True)
    dataset = streams.ray_dataset(train, {}, columns, in_memory=False)
    training = TrainingConfig(batch_size=8, bucket_batches=2)
    epochs = [
        ids_of(streams.streamed_batches(dataset.iterator(), training, epoch, 8, keep_short=False))
        for epoch in (0, 1)
    ]
    assert [sorted(map(int, ids)) for ids in epochs] == [list(range(1_200))] * 2
    assert epochs[0] != epochs[1]


def test_rows_of_one_length_stay_in_the_order_drawn() -> None:
    """An unstable sort would order ties as the library's build happens to: runs could not be repeated elsewhere."""
    rows = 640
    table = pa.table({"sender_bytes": np.arange(rows) % 2, "id": np.arange(rows)})
    (batch,) = streams.length_buckets(table, rows, seed=0)
    assert batch["id"].to_pylist() == [*range(0, rows, 2), *range(1, rows, 2)]
