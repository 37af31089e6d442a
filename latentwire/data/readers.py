"""Names of the directories in which trained text readers are kept beside the shards.

``<shard_dir>/reader-<receiver>-<reads>-<hash>`` is one. The hash covers what made it: rows, the
receiver's weights, what is read, and everything that ``evaluation.tuned_text`` says.
:mod:`latentwire.training.text_readers` trains them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentwire.config import EncoderConfig, ReceiverConfig, RunConfig, TunedTextConfig
from latentwire.data import shards
from latentwire.pretrained.weights import resolve
from latentwire.storage import Place

READER_VERSION = 1
"""Raised whenever the same knobs would train another reader."""

Splits = Mapping[shards.ShardSplit, Place]


@dataclass(frozen=True)
class TrainingBudget:
    """The training that a reader gets."""

    steps: int
    batch_size: int

    @property
    def questions(self) -> int:
        """Questions that are answered in training, each as often as it is drawn."""
        return self.steps * self.batch_size


def budget_of(run: RunConfig, rows: int) -> TrainingBudget:
    """Return the training of a wire itself on so many rows, where its batches are filled by rows."""
    training, size = run.training, run.training.rows_per_batch
    # 10¹²: no limit. Rows that fill no batch are left out of an epoch.
    steps = min(training.epochs * max(1, rows // size), training.max_steps or 10**12)
    return TrainingBudget(steps, size)


def reader_budget(run: RunConfig, rows: int) -> TrainingBudget:
    """Return the training that ``evaluation.tuned_text`` gives to a wire's readers."""
    tuned = tuned_text(run)
    if tuned.steps is not None and tuned.batch_size is not None:
        return TrainingBudget(tuned.steps, tuned.batch_size)
    of_wire = budget_of(run, rows)
    return TrainingBudget(tuned.steps or of_wire.steps, tuned.batch_size or of_wire.batch_size)


def tuned_text(run: RunConfig) -> TunedTextConfig:
    """Return what a run says about readers, which it must."""
    assert run.evaluation.tuned_text is not None, "nobody asked for text readers"
    return run.evaluation.tuned_text


def reader_directory(
    run: RunConfig,
    receiver: ReceiverConfig,
    reads: str,
    lengths: EncoderConfig,
    paths: Splits,
) -> Place:
    """Return the directory of a reader, whether it is there or not.

    Args:
        run: the configuration of the wire that it is compared with, or teaches.
        receiver: the one that reads.
        reads: a mode of evaluation: what is shown to it.
        lengths: says how long a message would be, where as much is shown.
        paths: the shards of that run.
    """
    budget = reader_budget(run, shards.read_manifest(paths["train"])["rows"])
    # Knobs of the encoder that decide how many positions a message has.
    of_lengths = (
        "kind",
        "tokens_per_latent",
        "latent_len",
        "private_len",
        "split",
        "bytes_per_patch",
    )
    spec = {
        "reader_version": READER_VERSION,
        "shards": [shards.read_manifest(paths[split])["key"] for split in ("train", "dev")],
        "weights": weights_id(receiver),
        "reads": [reads, receiver.dtype, receiver.quantization, receiver.revision],
        "lengths": lengths.model_dump(include=set(of_lengths)),
        "tuned_text": tuned_text(run).model_dump(),
        "budget": [budget.steps, budget.batch_size],
        "training": run.training.model_dump(
            include={"bucket_batches", "questions_together", "seed"}
        ),
    }
    key = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
    return paths["train"].parent / f"reader-{receiver.name}-{reads}-{key}"


def teaching_reader(run: RunConfig, receiver: ReceiverConfig, train: Place) -> Place:
    """Return the directory of the full text's reader, which teaches where ``losses.kd_teacher`` is tuned.

    ``train``: the run's training shards. Its development shards lie beside them.
    """
    dev = shards.shard_path(run, "dev")
    return reader_directory(run, receiver, "text", EncoderConfig(), {"train": train, "dev": dev})


def is_reader(path: Place) -> bool:
    """Return whether a whole reader is there: its manifest is written last."""
    return (path / "manifest.json").exists()


def weights_id(receiver: ReceiverConfig) -> Any:
    """Return what identifies weights unread: a Hub id, or names, sizes and times of a directory's files."""
    path = Path(resolve(receiver))
    if not path.is_dir():
        return receiver.model
    # Hashing gigabytes for a name takes long; files that were written anew have another time.
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
