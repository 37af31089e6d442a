"""Scoring of a split by several copies of a wire at once, as Ray Data actors over rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pyarrow as pa

from latentwire.config import RunConfig
from latentwire.data import shards
from latentwire.data.pipeline import quiet_ray_data
from latentwire.evaluation.conditions import Condition
from latentwire.evaluation.evaluator import predict
from latentwire.evaluation.predictions import Prediction
from latentwire.evaluation.progress import ScoringProgress
from latentwire.model import load_wire
from latentwire.planning.devices import pieces, times
from latentwire.planning.planner import Plan
from latentwire.storage import Place, local, place
from latentwire.threads import use_threads
from latentwire.training import text_readers

PARTS = 4
"""Parts of the work for each copy of the wire, so that none waits long for the last."""


class Scorer:
    """One copy of a wire with the split's rows; called with a part of the work."""

    def __init__(
        self,
        checkpoint: str,
        path: str,
        conditions: tuple[Condition, ...],
        run: RunConfig,
        joint: bool,
        cpus: float,
        readers: text_readers.Places,
    ) -> None:
        use_threads(cpus)
        with local(place(checkpoint)) as folder:
            self.wire, _ = load_wire(folder, run)
        self.readers = text_readers.load_readers(self.wire, conditions, readers)
        self.table, self.conditions, self.joint = shards.read_table(place(path)), conditions, joint

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        """Predict the rows from ``start`` to ``stop`` under ``condition``; ``place`` keeps their order."""
        scored = []
        parts = zip(batch["condition"], batch["start"], batch["stop"], strict=True)
        for index, start, stop in parts:
            rows, condition = range(int(start), int(stop)), self.conditions[int(index)]
            reader = self.readers[condition.key] if condition.tuned else self.wire
            predictions = predict(reader, self.table, condition, rows, joint=self.joint)
            for number, prediction in enumerate(predictions):
                order = {"place": [int(index), int(start), number]}
                scored.append(dataclasses.asdict(prediction) | order)
        return pa.Table.from_pylist(scored, _SCHEMA)


def predict_pool(
    checkpoint: Place,
    path: Place,
    conditions: tuple[Condition, ...],
    run: RunConfig,
    *,
    joint: bool = True,
    copies: int,
    cpus: float,
    gpus: float,
    readers: text_readers.Places | None = None,
) -> dict[str, list[Prediction]]:
    """Return condition's key → predictions, equal to those of one process.

    They are those of :func:`~latentwire.evaluation.evaluator.predict`. Needs Ray initialised. Parts
    begin where batches do, so that it does not matter how many ``copies`` share the work.
    ``readers``: directories of the text readers of tuned rows.
    """
    import ray.data

    quiet_ray_data()
    size, total = run.evaluation.batch_size, shards.read_manifest(path)["rows"]
    # Whole batches: ceil(batches / (PARTS × copies)) of them in each part of a condition.
    stride = size * max(1, -(-total // (size * PARTS * copies)))
    parts = []
    for index in range(len(conditions)):
        for start in range(0, total, stride):
            stop = min(start + stride, total)
            parts.append({"condition": index, "start": start, "stop": stop})
    # A block for each part, so that any copy may take the next one.
    scored = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
        Scorer,
        fn_constructor_args=(
            str(checkpoint),
            str(path),
            conditions,
            run,
            joint,
            cpus,
            readers or {},
        ),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(copies, len(parts))),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    rows: list[dict[str, Any]] = []
    with ScoringProgress(total * len(conditions)) as progress:
        for part in scored.iter_batches(batch_size=None, batch_format="pyarrow"):
            rows += part.to_pylist()
            # Each row of the split gives a prediction for every receiver.
            progress.advance(f"{len(conditions)} conditions", part.num_rows // len(run.receivers))
    # Parts come in the order of their ends. A place is (condition, start of the part, number).
    rows.sort(key=lambda row: tuple(row["place"]))
    predictions: dict[str, list[Prediction]] = {condition.key: [] for condition in conditions}
    for row in rows:
        del row["place"]
        prediction = Prediction(**row | {"golds": list(row["golds"])})
        predictions[prediction.condition].append(prediction)
    return predictions


def copies_at_once(resources: dict[str, float], plan: Plan, memory: float) -> int:
    """Count the copies of a wire that the cluster holds: by CPUs, and by GPUs.

    Where there are no GPUs, ``memory`` in bytes counts instead.
    """
    cpus = times(resources.get("CPU", 1.0), plan.cpus_per_worker)
    if plan.gpus_per_worker:
        return max(1, min(cpus, pieces(resources.get("GPU", 0.0), plan.gpus_per_worker)))
    return max(1, int(min(cpus, memory / plan.bytes_per_worker)))


_TYPES = {
    "str": pa.string(),
    "Mode": pa.string(),
    "float": pa.float64(),
    "int": pa.int64(),
    "list[str]": pa.list_(pa.string()),
}


def _type_of(field: dataclasses.Field[Any]) -> pa.DataType:
    """Return a field's type in Arrow, where every column may hold nulls."""
    # The type is the text of the annotation, since annotations are not evaluated.
    return _TYPES[str(field.type).removesuffix(" | None")]


_COLUMNS = [(field.name, _type_of(field)) for field in dataclasses.fields(Prediction)]
_SCHEMA = pa.schema([*_COLUMNS, ("place", pa.list_(pa.int64()))])
