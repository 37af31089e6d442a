"""What preparing and batching rows costs."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pyarrow as pa
import ray

from benchmarks.measure import Row
from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.data import pipeline, shards, sources, streams
from latentwire.data.batches import TrainingCollator, padding
from latentwire.model import LatentWire


def preprocessing(run: RunConfig) -> Row:
    """Rows/s of the training shards over ``datasets.map`` on as many processes: read, clean, tokenise, write Parquet.

    Ray is up and its workers have imported what they need, as datasets' processes are forked from one that has.
    """
    cores = int(ray.cluster_resources()["CPU"])
    with tempfile.TemporaryDirectory() as folder:
        fresh = with_values(run, {"data.shard_dir": folder})
        # A few rows first, which start the workers and import what they need.
        pipeline.ensure_shards(with_values(fresh, {"data.dev_samples": 8}), "dev")
        began = time.perf_counter()
        rows = shards.read_manifest(pipeline.ensure_shards(fresh, "train"))["rows"]
        ours = rows / (time.perf_counter() - began)
        began = time.perf_counter()
        theirs = _by_datasets(fresh, Path(folder), cores) / (time.perf_counter() - began)
    detail = f"{run.data.dataset}, {cores} cores: {ours:,.0f} / {theirs:,.0f} rows/s"
    return Row("preprocessing ÷ `datasets.map`", ours / theirs, "≥ 1.5", detail)


def _by_datasets(run: RunConfig, folder: Path, cores: int) -> int:
    import datasets

    datasets.disable_progress_bars()
    split: sources.Split = "train"

    def rows() -> object:
        for piece in sources.pieces(run.data, split):
            for raw in sources.read(run.data, split, piece):
                yield sources.clean(raw, run.data.dataset)

    def tokenised(batch: dict[str, list]) -> dict[str, list]:
        answers = [golds[0] for golds in batch["answers"]]
        columns: dict[str, list] = {}
        for name, builder in shards.builders(run).items():
            ids = builder.tokenize(batch["context"], batch["question"], answers)
            builder.check_boundaries(answers, ids["answer_ids"])
            columns |= {f"{name}_{piece}": values for piece, values in ids.items()}
        return columns

    dataset = datasets.Dataset.from_generator(rows, cache_dir=str(folder / "cache"))
    # Shuffled, as ours are.
    parts = dataset.train_test_split(run.data.dev_fraction, seed=run.data.seed)
    dataset = parts["train"].map(tokenised, batched=True, num_proc=cores)
    dataset.to_parquet(str(folder / "datasets.parquet"))
    return dataset.num_rows


def padding_shares(wire: LatentWire, table: pa.Table) -> Row:
    """Padding of the batches of an epoch, sorted by length in buckets of eight and of two (the default), and as drawn."""
    shares = []
    for buckets in (8, 2, 1):
        training = with_values(wire.run, {"training.bucket_batches": buckets}).training
        collator = TrainingCollator(wire.run, wire.builders, wire.interlingua.encoder)
        # (padding, all positions) of each batch
        batches = streams.shuffled_batches(table, training, 0)
        counted = [padding(collator(batch, 10**9)) for batch in batches]
        padded = sum(count for count, _ in counted)
        shares.append(padded / sum(positions for _, positions in counted))
    listed = " / ".join(f"{share:.1%}" for share in shares)
    detail = f"{wire.run.data.dataset}, batches of {wire.run.training.batch_size}; 8, 2, 1 drawn together: {listed}"
    return Row(
        "padding share with length buckets of 2 batches ÷ without",
        shares[1] / shares[2],
        "report",
        detail,
    )
