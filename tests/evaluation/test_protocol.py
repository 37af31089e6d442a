"""Whatever could change a score besides the wire changes the protocol hash, and nothing else does."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.evaluation import protocol
from latentwire.evaluation.protocol import protocol_hash
from latentwire.pretrained.weights import resolve


def shards_of(folder: Path, table: pa.Table) -> Path:
    folder.mkdir()
    pq.write_table(table, folder / "00000.parquet")
    (folder / "manifest.json").write_text(
        json.dumps({"files": ["00000.parquet"], "key": folder.name})
    )
    return folder


def test_rows_layout_decoding_and_metrics_are_pinned(
    run: RunConfig, table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shards_of(tmp_path / "a", table)
    first = protocol_hash(path, run)
    assert first == protocol_hash(shards_of(tmp_path / "b", table), run)
    for same in ({"prompt.anchor": "A: "}, {"evaluation.batch_size": 3}, {"encoder.latent_len": 3}):
        assert protocol_hash(path, with_values(run, same)) == first
    differing = {protocol_hash(path, with_values(run, {"evaluation.max_answer_tokens": 9}))}
    differing.add(protocol_hash(shards_of(tmp_path / "fewer", table.slice(1)), run))
    answers = [["other"], *table["answers"].to_pylist()[1:]]
    index = table.column_names.index("answers")
    differing.add(
        protocol_hash(
            shards_of(tmp_path / "answers", table.set_column(index, "answers", [answers])), run
        )
    )
    for version in ("PROMPT_VERSION", "METRIC_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(protocol, version, 1_000)
            differing.add(protocol_hash(path, run))
    assert len(differing) == 5 and first not in differing


def test_what_a_chat_template_writes_is_pinned(
    run: RunConfig, table: pa.Table, tmp_path: Path
) -> None:
    """It may hold a date, or hang on a variable; a plain prompt's text is the receiver's own affair."""
    path, folder = shards_of(tmp_path / "a", table), tmp_path / "qwen"
    shutil.copytree(resolve(run.receivers[1]), folder)
    chat = with_values(run, {"receivers.1.model": str(folder)})
    plain = with_values(chat, {"receivers.1.template": "plain"})
    first, as_lines = protocol_hash(path, chat), protocol_hash(path, plain)
    assert first == protocol_hash(path, run) != as_lines
    template = folder / "chat_template.jinja"
    template.write_text("{{ mood }}" + template.read_text())
    options = {"receivers.1.template_options": {"mood": "calm"}}
    hashes = {first, as_lines, protocol_hash(path, with_values(chat, options))}
    assert protocol_hash(path, plain) == as_lines and len(hashes) == 3
    assert protocol_hash(path, chat) == first  # a template that writes the same
