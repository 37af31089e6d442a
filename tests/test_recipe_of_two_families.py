"""The recipe of the pair of two families, in a short run."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from latentwire.config.resolve import load_space, with_values
from latentwire.data import shards
from latentwire.distributed.local_shards import local_shards
from latentwire.evaluation.evaluator import predict
from latentwire.evaluation.summary import summarise
from latentwire.model import LatentWire
from latentwire.training.local import train_here

SHORT = {
    "stages": {},
    "data.samples": 400,
    "data.dev_samples": 4,
    "data.dev_fraction": 0.05,
    "data.validation_samples": 12,
    "evaluation.tuned_text": {"tokens": 16, "steps": 2, "batch_size": 4, "trials": 1},
    # The other states, the blocks and the width take most of the recipe's time.
    "encoder.depths": [0.4],
    "encoder.d_z": 1152,
    "encoder.code_blocks": 0,
    "adapter.unfold_blocks": 0,
    "adapter.ranking_texts": 6,
    "closed_form": {"texts": 20, "gradient_texts": 5},
    "training.batch_size": 8,
    "training.max_steps": 4,
    "training.warmup_steps": 1,
    "evaluation.max_answer_tokens": 2,
}


@pytest.mark.slow
def test_a_short_run_tells_its_own_message_from_another_rows(
    real_data: Path, real_receivers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wire that carried nothing would answer as well from another row's message."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    (tmp_path / "squad").mkdir()
    for split, every in (("train", 60), ("validation", 20)):  # of all documents; seconds to prepare
        rows = pq.read_table(real_data / "squad" / f"{split}.parquet")
        some = rows.take(list(range(0, rows.num_rows, every)))
        pq.write_table(some, tmp_path / "squad" / f"{split}.parquet")
    places = {
        "receivers.0.model": str(real_receivers / "smollm2"),
        "receivers.1.model": str(real_receivers / "qwen"),
        "data.data_dir": str(tmp_path / "squad"),
        "data.shard_dir": str(tmp_path / "shards"),
    }
    run = with_values(load_space("smollm2_qwen").run, SHORT | places)
    paths = local_shards(run)
    wire = LatentWire(run)
    train_here(wire, paths, tmp_path / "run")
    rows = shards.read_table(paths["validation"])
    scores = {mode: summarise(list(predict(wire, rows, mode))) for mode in ("latent", "shuffled")}
    for name in wire.receivers:
        nll = {mode: row[name]["nll"] for mode, row in scores.items()}
        assert nll["latent"] < nll["shuffled"] - 0.3, scores
