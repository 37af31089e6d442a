"""Files that the trials of a sweep read, made once for all: shards, teachers' columns, calibrations."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ray
import ray.data

from latentwire.config import RunConfig, SweepConfig
from latentwire.config.knobs import knob_of, paths_with
from latentwire.config.resolve import ConfigError, last_stage, stages_of
from latentwire.data import documents, pipeline, shards, streams
from latentwire.distributed import teachers
from latentwire.distributed.calibrations import ensure_calibrations
from latentwire.evaluation.protocol import protocol_hash
from latentwire.planning.resolved import TRAINING_SPLITS, ResolvedSweep, resolve
from latentwire.planning.variants import calibration_runs, data_variants
from latentwire.storage import Place
from latentwire.training import checkpoints, stages

SHARDS_AT_ONCE = 3
"""Splits that are sharded side by side."""


@dataclass(frozen=True)
class Files:
    """The files of one data variant."""

    shards: dict[shards.ShardSplit, Place]
    teachers: dict[str, Place]
    """Receiver → its teacher's columns on the training shards; empty where no trial compares with
    it."""
    columns: tuple[str, ...]
    """Columns of the training shards that some trial reads."""

    @property
    def keys(self) -> dict[str, str]:
        """Names of the files: split → key of its shards, and receiver → its teacher's columns."""
        keys = {}
        for split, path in self.shards.items():
            keys[str(split)] = shards.read_manifest(path)["key"]
        return keys | {f"teacher {name}": path.name for name, path in self.teachers.items()}

    @property
    def train_rows(self) -> int:
        """Number of rows to train on."""
        return shards.read_manifest(self.shards["train"])["rows"]

    @property
    def is_scored(self) -> bool:
        """True where a last stage reads them: trials are compared on its development rows."""
        return "validation" in self.shards


def compared_on(files: Mapping[str, Files]) -> set[Place]:
    """Return the development rows that trials are compared on, of the files of all data variants."""
    return {variant.shards["dev"] for variant in files.values() if variant.is_scored}


def prepare(space: SweepConfig | ResolvedSweep, gpus_per_worker: float) -> dict[str, Files]:
    """Make shards, teachers' columns and calibrations of every data variant that the space can draw.

    Returns them by :func:`~latentwire.planning.variants.variant_key`. A few splits are made side by
    side: one small source is one task, which leaves the other cores idle. Raises
    :class:`~latentwire.config.resolve.ConfigError` as :func:`common_protocol_hash` does, before
    training rows are made.
    """
    sweep = resolve(space)
    # By path: variants that share a split share its shards.
    needed = {}
    for variant in sweep.variants:
        for split, path in variant.shards.items():
            needed[path] = (variant.run, split, path)
    scored = [variant.shards["dev"] for variant in sweep.variants if variant.is_last]
    dev = list(dict.fromkeys(scored))
    # Development rows are few: that they differ is found before all training rows are made.
    if len(dev) > 1:
        _make([needed.pop(path) for path in dev])
        common_protocol_hash(sweep.space, dev)
    _make(needed.values())
    training_shards = functools.partial(shards.shard_paths, splits=TRAINING_SPLITS)
    for run in data_variants(sweep.space) if sweep.space.run.stages else ():
        stages.check_documents(stages_of(run), training_shards)
    for variant in sweep.variants:
        if not variant.stage:  # only a first one begins with a wire from elsewhere
            checkpoints.check_development(variant.run, variant.shards["dev"])
        # Once here, or every worker would read all rows.
        documents.of_shards(variant.shards["train"])
    # Whether any trial continues texts, by the largest weights that trials can draw too.
    runs = [*sweep.largest_stages, *(variant.run for variant in sweep.variants)]
    continued = any(run.losses.continuation_ce_weight for run in runs)
    files: dict[str, Files] = {}
    for variant in sweep.variants:
        train = variant.shards["train"]
        columns = teachers.ensure_teachers(sweep.taught(variant), train, gpus_per_worker)
        # A later stage begins with the wire of the one before, and needs no calibration.
        for run in [] if variant.stage else calibration_runs(sweep.space, variant.run):
            ensure_calibrations(run, train, gpus_per_worker)
        # Of two bundles with the same shards, one may need a teacher; of two stages, one is scored.
        before = files.get(variant.key)
        paths = variant.shards if before is None else before.shards | variant.shards
        if before is None or columns:
            read = tuple(streams.training_columns(variant.run, continued=continued))
            files[variant.key] = Files(paths, columns, read)
        else:
            files[variant.key] = dataclasses.replace(before, shards=paths)
    return files


def _make(missing: Iterable[tuple[RunConfig, shards.ShardSplit, Place]]) -> None:
    with ThreadPoolExecutor(SHARDS_AT_ONCE) as executor:
        try:
            for task in [executor.submit(pipeline.ensure_shards, *split) for split in missing]:
                task.result()
        except KeyboardInterrupt:
            ray.shutdown()  # else the others, which nobody needs any more, would be waited for
            raise


def load_datasets(files: Files, in_memory: bool) -> dict[str, ray.data.Dataset]:
    """Return the training and development rows as datasets.

    Training rows stand in the object store once for all trials, or are streamed. Development rows
    are few.
    """
    dev = files.shards["dev"]
    return {
        "train": streams.ray_dataset(
            files.shards["train"], files.teachers, files.columns, in_memory=in_memory
        ),
        "dev": ray.data.from_arrow(shards.read_table(dev)).materialize(),
    }


def common_protocol_hash(space: SweepConfig, dev: Iterable[Place]) -> str:
    """Return the protocol hash that all trials share. ``dev``: shards of development rows.

    Raises :class:`~latentwire.config.resolve.ConfigError` where a searched knob changes the
    development rows: scores on different rows say nothing about the wires.
    """
    run = last_stage(space.run)
    hashes = {protocol_hash(path, run) for path in dev}
    if len(hashes) > 1:
        searched = ", ".join(path for path in space.search if knob_of(path) in paths_with("shards"))
        raise ConfigError(
            f"all trials must be scored on the same development rows, got {len(hashes)} different "
            f"sets; what makes them differ must not be searched, which is among {searched}"
        )
    return hashes.pop()
