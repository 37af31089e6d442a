"""Several copies of a wire score what one does."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from latentwire.config.resolve import with_values
from latentwire.distributed.scoring_pool import predict_pool
from latentwire.evaluation.conditions import Condition
from latentwire.evaluation.evaluator import predict
from latentwire.evaluation.predictions import Prediction
from latentwire.model import LatentWire, load_wire
from latentwire.training import checkpoints
from tests.conftest import shard_table, untimed


def plain(prediction: Prediction) -> dict:
    return untimed(dataclasses.asdict(prediction))


@pytest.mark.slow
def test_a_pool_predicts_bit_for_bit_what_one_wire_does(wire: LatentWire, tmp_path: Path) -> None:
    rows: pa.Table = shard_table(wire.run, 40)
    (tmp_path / "shards").mkdir()
    pq.write_table(rows, tmp_path / "shards" / "0.parquet")
    (tmp_path / "shards" / "manifest.json").write_text(
        json.dumps({"rows": 40, "files": ["0.parquet"]})
    )
    frozen = wire.fingerprints()
    checkpoint = checkpoints.save(tmp_path / "wire", wire, {}, {"receivers": frozen})
    run = with_values(wire.run, {"evaluation.batch_size": 4})
    conditions = (
        Condition("latent"),
        Condition("shuffled"),
        Condition("selected"),
        Condition("latent", bits=8),
    )
    alone, _ = load_wire(checkpoint, run)
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        found = predict_pool(
            checkpoint, tmp_path / "shards", conditions, run, copies=2, cpus=1, gpus=0
        )
    finally:
        ray.shutdown()
    assert list(found) == [condition.key for condition in conditions]
    for condition in conditions:
        expected = [plain(p) for p in predict(alone, rows, condition, joint=True)]
        assert [plain(p) for p in found[condition.key]] == expected
