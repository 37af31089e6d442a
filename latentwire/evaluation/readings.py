"""Record of how often validation rows were read: comparing on them costs them their neutrality.

Every scoring of a wire on validation rows leaves a file under ``<shard_dir>/readings``: which wire,
when, and hashes of the rows. Rows are known by their question and context, so that another order,
draw, prompt or receiver does not hide that they were read before.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from latentwire.data import shards
from latentwire.data.documents import TrainedOn
from latentwire.storage import Place, StorageError, children, text_if_there, write_text

FOLDER = "readings"
"""Name of the directory of records, beside the directories of shards."""
WEIGHTS = ("interlingua.safetensors", "adapters/", "prefixes/", "features/")
"""Beginnings of the files of a checkpoint or export that hold a wire's weights."""


def wire_name(manifest: Mapping[str, Any]) -> str:
    """Return a short hash of a wire's weights, the same for a checkpoint and its export."""
    files = manifest["files"]
    weights = {name: files[name] for name in files if name.startswith(WEIGHTS)}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()[:16]


def note(validation: Place, wire: str, trained_on: TrainedOn) -> dict[str, Any]:
    """Record that ``wire`` is scored on complete validation shards.

    Returns how often their rows were read before. ``rows``: their number; ``read_before``: those
    that an earlier scoring read; ``scorings``: earlier ones that read any of them; ``wires``: other
    wires among those; ``again``: whether this wire has been scored on any of them before;
    ``trained_on``: rows of documents that it has trained on.
    """
    table = shards.read_table(validation, ["context", "question", "document"])
    rows = row_hashes(table)
    folder = validation.parent / FOLDER
    read_before: set[int] = set()
    wires, scorings = set(), 0
    for file in children(folder):
        # A record may go while the folder is read, and one that is being written is no .json yet.
        text = text_if_there(file) if file.name.endswith(".json") else None
        if text is None:
            continue
        earlier = json.loads(text)
        if shared := rows.intersection(earlier["rows"]):
            read_before |= shared
            scorings += 1
            wires.add(earlier["wire"])
    document = {
        "wire": wire,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "rows": sorted(rows),
    }
    try:
        # A name of its own each: scorings at the same second must not overwrite each other.
        write_text(folder / f"{int(time.time())}-{uuid.uuid4().hex[:8]}.json", json.dumps(document))
    except (OSError, StorageError) as error:
        # Shards that others own can still be scored.
        print(
            f"this scoring is not recorded, so later ones will not count it: {folder} cannot be written ({error})",
            flush=True,
        )
    return {
        "rows": len(rows),
        "read_before": len(read_before),
        "scorings": scorings,
        "wires": len(wires - {wire}),
        "again": wire in wires,
        "trained_on": trained_on.rows_of(table["document"].to_pylist()),
    }


def row_hashes(table: pa.Table) -> set[int]:
    """Return a 53-bit hash of each row's context and question; JSON's readers hold that exactly."""
    pairs = zip(table["context"].to_pylist(), table["question"].to_pylist(), strict=True)
    texts = [f"{context}\0{question}" for context, question in pairs]
    # The first 64 bits of each SHA-256, of which the lowest 11 are shifted out: 53 are left.
    digests = b"".join(hashlib.sha256(text.encode()).digest()[:8] for text in texts)
    return set((np.frombuffer(digests, "<u8") >> np.uint64(11)).tolist())


def sentence(readings: Mapping[str, Any] | None) -> str:
    """Say in one line how often the rows of a table were read before it."""
    if not readings:
        return "how often these rows were read before is not recorded"
    seen = readings["trained_on"]
    trained = f"; {seen:,} are of documents that this wire has trained on" if seen else ""
    if not readings["scorings"]:
        return f"none of these {readings['rows']:,} rows was read by a scoring before{trained}"
    others = _count(readings["wires"], "other wire")
    by = f"{others} and this one" if readings["again"] else others
    if readings["again"] and not readings["wires"]:
        by = "this wire"
    # Only what other wires were scored on may have been chosen by.
    advice = ""
    if readings["wires"]:
        advice = "; data.validation_skip takes rows that no comparison used"
    return (
        f"{readings['read_before']:,} of these {readings['rows']:,} rows were read before, in "
        f"{_count(readings['scorings'], 'scoring')} by {by}{advice}{trained}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
