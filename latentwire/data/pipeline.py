"""Rows to shards with Ray Data: read → clean → chunk → tokenise for every receiver and the encoder → Parquet.

Two passes. The first (``cleaning.py``) reads the source in pieces and keeps good rows in the object store, each with a
seeded hash that shuffles and samples at once. The second sorts them by that hash into one block per shard, tokenises each
block (``token_columns.py``) and writes its file: aside, then renamed. A run that was killed finds the files that it left
and makes the others. The footer of each file says what it holds.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentwire.config import DataConfig, RunConfig
from latentwire.data import shards, sources
from latentwire.data.cleaning import read_and_clean
from latentwire.data.distractors import Distractors
from latentwire.data.token_columns import LENGTH_EDGES, count_lengths, tokenise
from latentwire.data.unanswerable import Unanswerable
from latentwire.errors import UserError
from latentwire.storage import Place, read_footer, sha256, write, write_text

ROW_GROUP = 512
"""Rows of a Parquet row group: what a reader of a stream holds at least."""
LINE_SECONDS = 30.0
"""Between two lines on how many files are made."""
FOOTER = b"latentwire"
"""Key of a shard's own counts in its Parquet metadata."""


def ensure_shards(run: RunConfig, split: shards.ShardSplit, path: Place | None = None) -> Place:
    """Make a split's shards unless complete ones are there, and return their directory.

    Ray must be initialised to make them.

    Args:
        run: the configuration that names them.
        split: the split.
        path: their directory, where the caller has named it: that loads tokenizers and hashes files.

    Raises:
        DataError: the source cannot be read, or leaves no row.
    """
    path = shards.shard_path(run, split) if path is None else path
    if shards.complete(path):
        manifest = shards.read_manifest(path)
        print(f"shards {split}: {manifest['rows']:,} rows, reused from {path}", flush=True)
        return path
    began = time.monotonic()
    manifest = _make(run, split, path)
    rejected = ", ".join(f"{count:,} × {reason}" for reason, count in manifest["rejects"].items())
    print(
        f"shards {split}: {manifest['rows']:,} rows ({manifest['truncated']:,} truncated), "
        f"{sum(manifest['rejects'].values()):,} rejected ({rejected or 'none'}; see rejects.jsonl), "
        f"{time.monotonic() - began:.0f} s, {path}",
        flush=True,
    )
    if split == "validation" and manifest["left"]:
        print(
            f"shards validation: {manifest['left']:,} further rows of the split are beyond these; "
            f"data.validation_skip={run.data.validation_skip + run.data.validation_samples} takes them",
            flush=True,
        )
    if split == "dev" and manifest["rows"] < run.data.dev_samples:
        print(
            f"shards dev: data.dev_samples asks for {run.data.dev_samples:,} rows, data.dev_fraction "
            f"{run.data.dev_fraction} of the documents has {manifest['rows']:,}; raise it for steadier scores",
            flush=True,
        )
    return path


def quiet_ray_data() -> None:
    """Let Ray Data draw no progress bars, and keep errors of ours to one line."""
    from ray.data.context import DataContext, ShuffleStrategy

    context = DataContext.get_current()
    context.enable_progress_bars = False
    # The newer shuffle has an environment of its own: processes that know ours are stopped for it
    # and start again.
    context.shuffle_strategy = ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context.raise_original_map_exception = True  # entry points know errors by their type
    for name in ("exceptions", "_internal.execution.streaming_executor_state"):
        logging.getLogger(f"ray.data.{name}").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether the exception that is being logged is none that an entry point prints in one line.

    Ray Data takes them for faults of its own: two tracebacks, and a request to report them to its makers.
    """
    error = (record.exc_info or sys.exc_info())[1]
    return not isinstance(error, UserError)


def _make(run: RunConfig, split: shards.ShardSplit, path: Place) -> dict[str, Any]:
    import ray.data

    quiet_ray_data()
    source = shards.source_of(split)
    pieces = sources.pieces(run.data, source)
    if not pieces:
        raise _nothing_left(run, split, [], read=0)
    # A block, and so a task, for each piece. The object store holds the rows for both passes.
    cleaned = (
        ray.data.from_items([vars(piece) for piece in pieces], override_num_blocks=len(pieces))
        .map_batches(functools.partial(read_and_clean, run=run, split=split), batch_size=1)
        .materialize()
    )
    # One pass over the blocks: each Ray Data execution costs seconds on a small machine.
    rejects: list[dict[str, Any]] = []
    orders, size = [np.empty(0, np.int64)], 0
    rewritten = rewriting(run.data)
    for table in cleaned.iter_batches(batch_size=None, batch_format="pyarrow"):
        good = pc.equal(table["reason"], "")
        rejects += table.filter(pc.invert(good)).select(["reason", "id", "context"]).to_pylist()
        table = table.filter(good)
        orders.append(table["order"].to_numpy())
        if rewritten is not None:
            rewritten.add(table)
        size += table.nbytes
    # Every good row's hash, then each hash once, in order: texts without questions share one.
    every = np.concatenate(orders)
    order = np.unique(every)
    read = len(order)
    if split == "validation":
        order = order[run.data.validation_skip :]
    limits = {
        "train": run.data.samples,
        "dev": run.data.dev_samples,
        "validation": run.data.validation_samples,
    }
    limit = limits[split] or None
    mean_bytes = size / max(1, len(every))
    left = len(order) - len(order[:limit])
    order = order[:limit]
    if len(order) == 0:
        raise _nothing_left(run, split, rejects, read=read)
    if rewritten is not None:
        rewritten.check()
    # Shard s begins with hash number ⌊s · n / count⌋ of n: none has two more than another.
    count = max(1, round(len(order) * mean_bytes / (run.data.shard_mib * 2**20)))
    first = order[(np.arange(count) * len(order)) // count]
    last = int(order[-1])
    # Rows that each shard's block must have, those of one hash counted one by one.
    chosen = every[(every >= first[0]) & (every <= last)]
    held = np.bincount(_shard_of(chosen, first), minlength=count)
    path.mkdir(parents=True, exist_ok=True)
    names = [f"{shard:05d}.parquet" for shard in range(count)]
    missing = {shard for shard, name in enumerate(names) if not (path / name).exists()}
    if missing:
        if len(missing) < count:
            print(
                f"shards {split}: {count - len(missing)} of {count} files were there, going on",
                flush=True,
            )
        written = (
            cleaned.map_batches(
                functools.partial(_choose, first=first, last=last, missing=missing),
                batch_format="pyarrow",
            )
            # A block for each shard, and one before the first, which is empty.
            .sort("order", boundaries=[int(value) for value in first])
            .map_batches(
                functools.partial(
                    _write,
                    run=run,
                    split=split,
                    path=path,
                    first=first,
                    held=held,
                    rewritten=rewritten,
                ),
                batch_format="pyarrow",
                batch_size=None,
            )
        )
        done, last_line = count - len(missing), time.monotonic()
        for row in written.iter_rows():
            done += 1
            if done < count and time.monotonic() - last_line >= LINE_SECONDS:
                last_line = time.monotonic()
                print(
                    f"shards {split}: {done}/{count} files, {row['rows']:,} rows in the last",
                    flush=True,
                )
    manifest = _manifest(run, split, path, names, rejects) | {"left": left}
    if manifest["rows"] == 0:
        raise _nothing_left(run, split, rejects, read=read)
    write_text(path / shards.MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
    return manifest


def rewriting(data: DataConfig) -> Distractors | Unanswerable | None:
    """Return what changes the texts of cleaned rows; ``None``: they stay."""
    if data.distractors is not None:
        return Distractors(data)
    return Unanswerable(data) if data.unanswerable else None


def _nothing_left(
    run: RunConfig, split: shards.ShardSplit, rejects: list[dict[str, Any]], *, read: int
) -> sources.DataError:
    cause = (
        "; ".join(f"{count} × {reason}" for reason, count in _reasons(rejects).items())
        or "the source is empty"
    )
    if split == "dev" and not rejects:  # those of the training source are reported with train
        cause = (
            f"no document with rows that fit is in data.dev_fraction {run.data.dev_fraction}; raise it, or give more "
            f"documents"
        )
    if split == "validation" and 0 < read <= run.data.validation_skip:
        cause = f"data.validation_skip {run.data.validation_skip:,} passes over all {read:,} of them; lower it"
    return sources.DataError(
        f"{run.data.dataset} {split} must leave at least one row, got none ({cause})"
    )


def _reasons(rejects: list[dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(row["reason"].split(":")[0] for row in rejects).most_common())


# --------------------------------------------------------------------------------------------------------- second pass


def _shard_of(order: np.ndarray, first: np.ndarray) -> np.ndarray:
    # The last shard that begins at a hash or below it; −1 before the first.
    return np.searchsorted(first, order, side="right") - 1


def _choose(table: pa.Table, first: np.ndarray, last: int, missing: set[int]) -> pa.Table:
    """Return the good rows of shards that are not there yet."""
    order = table["order"].to_numpy()
    keep = (
        (order <= last)
        & np.isin(_shard_of(order, first), list(missing))
        & (np.asarray(table["reason"].to_pylist()) == "")
    )
    return table.filter(pa.array(keep)).drop_columns(["reason"])


def _write(
    table: pa.Table,
    run: RunConfig,
    split: shards.ShardSplit,
    path: Place,
    first: np.ndarray,
    held: np.ndarray,
    rewritten: Distractors | Unanswerable | None = None,
) -> pa.Table:
    """Tokenise one shard's rows, write its file, and return how many rows it holds."""
    if table.num_rows == 0:  # before the first shard, or one whose file is there
        return pa.table({"rows": pa.array([], pa.int64())})
    shard = int(_shard_of(table["order"].to_numpy(), first)[0])
    if table.num_rows != held[shard]:
        raise RuntimeError(
            f"a block must hold one shard's rows, got {table.num_rows} for shard {shard} of {held[shard]}"
        )
    table = table.sort_by("order")
    if not run.data.source.has_questions:
        table = _once(table)
    if rewritten is not None:
        table = rewritten.replaced(table)
    # No column of a shard: only how many of the rows that stay are truncated goes into its footer.
    truncated = table["truncated"]
    table, reason = tokenise(table.drop_columns(["order", "truncated"]), run, split)
    good = pc.equal(reason, "")
    rejects = (
        table.append_column("reason", reason)
        .filter(pc.invert(good))
        .select(["reason", "id", "context"])
    )
    table = table.filter(good)
    counts = {
        "rows": table.num_rows,
        "truncated": pc.sum(truncated.filter(good)).as_py() or 0,
        "rejects": rejects.to_pylist(),
        "lengths": count_lengths(table),
    }
    table = table.replace_schema_metadata({FOOTER: json.dumps(counts)})
    write(
        path / f"{shard:05d}.parquet",
        lambda file: pq.write_table(table, file, row_group_size=ROW_GROUP),
    )
    return pa.table({"rows": [table.num_rows]})


def _once(table: pa.Table) -> pa.Table:
    """Return the first of the rows with the same id."""
    # np.unique returns the first place of each id, in the order of the ids.
    _, places = np.unique(np.asarray(table["id"].to_pylist()), return_index=True)
    return table.take(np.sort(places))


# ------------------------------------------------------------------------------------------------------------ manifest


def _manifest(
    run: RunConfig,
    split: shards.ShardSplit,
    path: Place,
    names: list[str],
    rejects: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return counts, hashes and lengths of all files; the rejects of both passes are written beside them."""
    key, spec = shards.shard_key(run, split)
    footers = [json.loads(read_footer(path / name).metadata[FOOTER]) for name in names]
    rejects = list(rejects)
    for footer in footers:
        rejects += footer["rejects"]
    lines = []
    for row in rejects:
        shown = (row["context"] or "")[:500]
        lines.append(json.dumps({"reason": row["reason"], "id": row["id"], "row": shown}))
    write_text(path / "rejects.jsonl", "".join(f"{line}\n" for line in lines))
    lengths = {}
    for name in footers[0]["lengths"]:
        lengths[name] = np.sum([footer["lengths"][name] for footer in footers], axis=0).tolist()
    return {
        "key": key,
        "rows": sum(footer["rows"] for footer in footers),
        "truncated": sum(footer["truncated"] for footer in footers),
        "rejects": _reasons(rejects),
        "files": names,
        "file_rows": [footer["rows"] for footer in footers],
        "sha256": [sha256(path / name) for name in names],
        "lengths": {"edges": LENGTH_EDGES[:-1], **lengths},
        "spec": spec,
    }
