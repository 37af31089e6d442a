"""The files that the trials of a sweep read: shards and teachers' columns, made once for all of them."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ray
import ray.data

from latentwire.config import RunConfig, SweepConfig
from latentwire.config.knobs import paths_with
from latentwire.config.resolve import ConfigError
from latentwire.data import documents, pipeline, shards, streams, teachers
from latentwire.evaluation.protocol import protocol_hash
from latentwire.planning.variants import data_variants, largest_run, variant_key
from latentwire.storage import Place
from latentwire.training import checkpoints

SHARDS_AT_ONCE = 3
"""Splits that are sharded side by side."""


@dataclass(frozen=True)
class Files:
    """What the trials of one data variant read."""

    shards: dict[shards.ShardSplit, Place]
    teachers: dict[str, Place]
    """Receiver → what it says on the training shards' texts; empty where no trial compares with it."""
    columns: tuple[str, ...]
    """Of the training shards, those that some trial reads."""

    @property
    def keys(self) -> dict[str, str]:
        """What the files are named by: split → key of its shards, and receiver → its teacher's columns."""
        named = {str(split): shards.read_manifest(path)["key"] for split, path in self.shards.items()}
        return named | {f"teacher {name}": path.name for name, path in self.teachers.items()}

    @property
    def train_rows(self) -> int:
        """Rows to train on."""
        return shards.read_manifest(self.shards["train"])["rows"]


def prepare(space: SweepConfig, gpus_per_worker: float) -> dict[str, Files]:
    """Shards and teachers' columns of every data variant the space can draw, by :func:`variant_key`.

    A few splits are made at once: one small source is one task, which leaves the other cores idle. Raises
    :class:`~latentwire.config.resolve.ConfigError` as :func:`common_protocol_hash` does, before training rows are made.
    """
    variants = data_variants(space)
    named = [{split: shards.shard_path(run, split) for split in shards.SPLITS} for run in variants]
    needed = {path: (run, split, path) for run, own in zip(variants, named, strict=True) for split, path in own.items()}
    dev = [path for path, of in needed.items() if of[1] == "dev"]
    if len(dev) > 1:
        _make([needed.pop(path) for path in dev])
        common_protocol_hash(space, dev)
    _make(needed.values())
    for run, own in zip(variants, named, strict=True):
        checkpoints.check_development(run, own["dev"])
        documents.of_shards(own["train"])  # once here, or every worker would read all of its rows for it
    continued = any(run.losses.continuation_ce_weight for run in (*variants, largest_run(space)))
    files: dict[str, Files] = {}
    for run, own in zip(variants, named, strict=True):
        key = variant_key(run)
        said = teachers.ensure_teachers(run, own["train"], gpus_per_worker)
        if key not in files or said:  # of two bundles with the same shards, one may need a teacher
            files[key] = Files(own, said, tuple(streams.training_columns(run, continued=continued)))
    return files


def _make(wanted: Iterable[tuple[RunConfig, shards.ShardSplit, Place]]) -> None:
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        try:
            for made in [pool.submit(pipeline.ensure_shards, *of) for of in wanted]:
                made.result()
        except KeyboardInterrupt:
            ray.shutdown()  # else the others, which nobody wants any more, would be waited for
            raise


def load_datasets(files: Files, in_memory: bool) -> dict[str, ray.data.Dataset]:
    """Training rows, in the object store once for all trials or to be streamed, and development rows, which are few."""
    dev = files.shards["dev"]
    return {
        "train": streams.ray_dataset(files.shards["train"], files.teachers, files.columns, in_memory=in_memory),
        "dev": ray.data.from_arrow(shards.read_table(dev)).materialize(),
    }


def common_protocol_hash(space: SweepConfig, dev: Iterable[Place]) -> str:
    """The evaluation pin that all trials share. ``dev``: shards of development rows.

    Raises :class:`~latentwire.config.resolve.ConfigError` where a searched knob changes the development rows: scores on
    different rows say nothing about the wires.
    """
    found = {protocol_hash(path, space.run) for path in dev}
    if len(found) > 1:
        searched = ", ".join(path for path in paths_with("shards") if path in space.search)
        raise ConfigError(
            f"all trials must be scored on the same development rows, got {len(found)} different sets; what makes them "
            f"differ must not be searched, which is among {searched}"
        )
    return found.pop()
