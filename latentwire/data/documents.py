"""A record of the documents that a wire has trained on, so that no later stage is scored on them.

Development rows are drawn by document, each stage by its own seed and share: what one stage holds out, another may train on. A
wire therefore carries 8 bytes for every document that any of its stages read, and what these drew by.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError
from latentwire.data import shards
from latentwire.storage import Place, local, read_parquet, write

FILE = "trained_on.safetensors"
"""The file beside a wire's weights with the hashes of all documents."""
SHARDS_FILE = "documents.safetensors"
"""Beside shards: the hashes of the documents of their rows, computed once."""
_KEY = "documents"


@dataclass(frozen=True)
class TrainedOn:
    """The documents that a wire has trained on, over all of its stages."""

    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """A 64-bit hash of each document, sorted."""
    stages: tuple[dict[str, Any], ...] = ()
    """``dataset``, ``seed``, ``dev_fraction`` and number of ``documents`` of each stage."""
    known: bool = True
    """``False`` where an earlier stage left no record."""

    def with_stage(self, run: RunConfig, train: Place) -> TrainedOn:
        """Return the record with the documents of a run's training shards; the same where it has them already."""
        hashes, data = of_shards(train), run.data
        stage = {
            "dataset": data.dataset,
            "seed": data.seed,
            "dev_fraction": data.dev_fraction,
            "documents": len(hashes),
        }
        stages = self.stages if stage in self.stages else (*self.stages, stage)
        # Hashes alone are joined: a document that two stages read counts once.
        return TrainedOn(np.union1d(self.hashes, hashes), stages, self.known)

    def rows_of(self, names: Sequence[str]) -> int:
        """Return how many rows, by their documents' names, are of documents among these."""
        return int(np.isin(document_hashes(names), self.hashes).sum())

    def save(self, folder: Path) -> None:
        """Write the hashes beside a wire's weights."""
        # save_file would give the file a mode by which others could not read it.
        (folder / FILE).write_bytes(save({_KEY: self.hashes}))

    @property
    def entry(self) -> dict[str, Any]:
        """The record in the wire's manifest."""
        return {"documents": len(self.hashes), "known": self.known, "stages": list(self.stages)}


UNKNOWN = TrainedOn(known=False)
"""The record of a wire that an earlier version wrote."""


def read(folder: Path, manifest: dict[str, Any]) -> TrainedOn:
    """Return the record of a checkpoint or export whose files are whole; :data:`UNKNOWN` where it has none."""
    entry = manifest.get("trained_on")
    if entry is None or FILE not in manifest["files"]:
        return UNKNOWN
    return TrainedOn(load_file(folder / FILE)[_KEY], tuple(entry["stages"]), bool(entry["known"]))


def of_shards(path: Place) -> np.ndarray:
    """Return the sorted hashes of the documents in complete shards; they are kept there for whoever asks again."""
    file = path / SHARDS_FILE
    if not file.exists():
        hashes = np.empty(0, np.int64)
        for name in shards.read_manifest(path)["files"]:
            names = set(read_parquet(path / name, ["document"])["document"].to_pylist())
            hashes = np.union1d(hashes, document_hashes(names))
        write(file, lambda aside: aside.write_bytes(save({_KEY: hashes})))
    with local(file) as copy:
        return load_file(copy)[_KEY]


def document_hashes(names: Iterable[str]) -> np.ndarray:
    """Return a 64-bit hash of each name."""
    digests = [hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest() for name in names]
    # The first 8 bytes of each, read as little-endian on every machine.
    first_bytes = b"".join(digest[:8] for digest in digests)
    return np.frombuffer(first_bytes, "<i8").astype(np.int64)


def check_development(earlier: TrainedOn, source: str, names: Sequence[str]) -> None:
    """Raise :class:`~latentwire.config.resolve.ConfigError` where development rows are of documents that ``earlier`` names.

    ``source``: the wire whose record it is; ``names``: each row's document. Where a stage of that wire left no record, a line says
    that this cannot be told.
    """
    is_trained = np.isin(document_hashes(names), earlier.hashes).tolist()
    trained = dict(zip(names, is_trained, strict=True))
    # ``trained`` holds each document once, ``names`` once for each of its rows.
    rows = sum(trained[name] for name in names)
    if rows:
        leaked = sorted(name for name, seen in trained.items() if seen)
        shown = ", ".join(leaked[:3]) + (", …" if len(leaked) > 3 else "")
        raise ConfigError(
            f"development rows must be of documents that the wire of {source} has not trained on, got {rows:,} of "
            f"{len(names):,} that are of {len(leaked):,} it has ({shown}); {_remedy(earlier)}"
        )
    if not earlier.known:
        print(
            f"started from {source}: an earlier version did not record what it trained on, so whether development rows are of "
            f"documents that it has seen is unknown; keep data.seed and a data.dev_fraction no larger than in its stages",
            flush=True,
        )


def _remedy(earlier: TrainedOn) -> str:
    """Name the draw under which only held-out documents are left: a smaller share by the same seed is a part of a larger one."""
    # A document is held out where a hash of seed and name is below the fraction, so the smallest
    # draw is part of all others by the same seed.
    smallest = min(earlier.stages, key=lambda stage: stage["dev_fraction"])
    return (
        f"set data.seed={smallest['seed']} and data.dev_fraction to at most {smallest['dev_fraction']}, by which its stages held "
        f"theirs out, or name other data"
    )
