"""Whatever could change a score besides the wire changes the pin, and nothing else does."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.evaluation import pin
from latentwire.evaluation.pin import evaluation_pin


def shards_of(folder: Path, table: pa.Table) -> Path:
    folder.mkdir()
    pq.write_table(table, folder / "00000.parquet")
    (folder / "manifest.json").write_text(json.dumps({"files": ["00000.parquet"], "key": folder.name}))
    return folder


def test_rows_layout_decoding_and_metrics_are_pinned(
    run: RunConfig, table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shards_of(tmp_path / "a", table)
    first = evaluation_pin(path, run)
    assert first == evaluation_pin(shards_of(tmp_path / "b", table), run)
    for same in ({"prompt.anchor": "A: "}, {"evaluation.batch_size": 3}, {"encoder.latent_len": 3}):
        assert evaluation_pin(path, with_values(run, same)) == first
    differing = {evaluation_pin(path, with_values(run, {"evaluation.max_answer_tokens": 9}))}
    differing.add(evaluation_pin(shards_of(tmp_path / "fewer", table.slice(1)), run))
    answers = [["other"], *table["answers"].to_pylist()[1:]]
    index = table.column_names.index("answers")
    differing.add(evaluation_pin(shards_of(tmp_path / "answers", table.set_column(index, "answers", [answers])), run))
    for version in ("LAYOUT_VERSION", "METRIC_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(pin, version, 1_000)
            differing.add(evaluation_pin(path, run))
    assert len(differing) == 5 and first not in differing
