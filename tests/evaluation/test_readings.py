"""How often validation rows were read, however they were drawn."""

import dataclasses
import importlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentwire import exports
from latentwire.card import write as card_of
from latentwire.cli import main
from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.data.documents import TrainedOn, document_hashes
from latentwire.data.readers import TrainingBudget
from latentwire.evaluation import readings
from latentwire.evaluation.conditions import Condition
from latentwire.evaluation.diagnostics import diagnose
from latentwire.evaluation.evaluator import Prediction
from latentwire.evaluation.protocol import protocol_hash
from latentwire.evaluation.scoring import (
    FINAL_CONDITIONS,
    diagnose_here,
    final_conditions,
    predict_conditions,
    score,
    score_and_export,
    summaries,
    write_results,
)
from latentwire.model import LatentWire
from latentwire.reports import seeds
from latentwire.training import checkpoints
from latentwire.training.text_readers import reader_run
from tests.conftest import shard_table, untimed

NOTHING = TrainedOn()


def shards_of(folder: Path, table: pa.Table) -> Path:
    folder.mkdir(parents=True)
    pq.write_table(table, folder / "0.parquet")
    manifest = {"key": folder.name, "rows": table.num_rows, "files": ["0.parquet"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def with_training_state(folder: Path) -> None:
    """A file that checkpoints have and exports have not."""
    (folder / "training_state.json").write_text("{}")


@pytest.fixture
def rows(run: RunConfig) -> pa.Table:
    return shard_table(run, 12, seed=31)


def test_rows_are_known_whatever_shards_they_lie_in(rows: pa.Table, tmp_path: Path) -> None:
    half, whole = (
        shards_of(tmp_path / "half", rows.slice(0, 6)),
        shards_of(tmp_path / "whole", rows),
    )
    first = readings.note(half, "one", NOTHING)
    assert first == {
        "rows": 6,
        "read_before": 0,
        "scorings": 0,
        "wires": 0,
        "again": False,
        "trained_on": 0,
    }
    assert readings.sentence(first) == "none of these 6 rows was read by a scoring before"
    readings.note(half, "two", NOTHING)
    third = readings.note(whole, "three", NOTHING)
    assert third == {
        "rows": 12,
        "read_before": 6,
        "scorings": 2,
        "wires": 2,
        "again": False,
        "trained_on": 0,
    }
    assert (
        "6 of these 12 rows were read before, in 2 scorings by 2 other wires"
        in readings.sentence(third)
    )
    assert "data.validation_skip" in readings.sentence(third)
    again = readings.note(whole, "three", NOTHING)
    assert (again["scorings"], again["wires"], again["again"], again["read_before"]) == (
        3,
        2,
        True,
        12,
    )
    assert "by 2 other wires and this one" in readings.sentence(again)
    alone = again | {"scorings": 1, "wires": 0}
    assert "were read before, in 1 scoring by this wire" in readings.sentence(alone)
    rest = shards_of(tmp_path / "rest", shard_table(with_values(RunConfig(), {}), 4, seed=77))
    assert readings.note(rest, "four", NOTHING)["scorings"] == 0
    assert (
        readings.sentence(None)
        == readings.sentence({})
        == "how often these rows were read before is not recorded"
    )


def test_shards_that_cannot_be_written_are_scored_all_the_same(
    rows: pa.Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shards_of(tmp_path / "whole", rows)
    (tmp_path / readings.FOLDER).write_text("a file, where the directory should be")
    assert readings.note(path, "one", NOTHING)["scorings"] == 0
    assert (
        "this scoring is not recorded, so later ones will not count it" in capsys.readouterr().out
    )


def test_a_row_is_its_context_and_question(rows: pa.Table) -> None:
    other_ids = rows.set_column(
        rows.column_names.index("id"), "id", pa.array([f"x{n}" for n in range(12)])
    )
    assert (
        readings.row_hashes(rows) == readings.row_hashes(other_ids)
        and len(readings.row_hashes(rows)) == 12
    )
    asked = rows.set_column(
        rows.column_names.index("question"), "question", pa.array(["Why?"] * 12)
    )
    assert not readings.row_hashes(rows) & readings.row_hashes(asked)
    assert max(readings.row_hashes(rows)) < 2**53


def test_rows_of_documents_that_a_wire_trained_on_are_counted(
    rows: pa.Table, tmp_path: Path
) -> None:
    own = TrainedOn(np.sort(document_hashes(rows["document"].to_pylist()[:2])))
    found = readings.note(shards_of(tmp_path / "whole", rows), "one", own)
    assert found["trained_on"] == 2
    assert readings.sentence(found).endswith("; 2 are of documents that this wire has trained on")


def test_a_checkpoint_and_its_export_are_one_wire_and_every_scoring_counts(
    wire: LatentWire, rows: pa.Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wire = LatentWire(with_values(wire.run, {"data.shard_dir": str(tmp_path / "shards")}))
    validation = shards_of(tmp_path / "shards" / "validation", rows.slice(0, 2))
    frozen = {"receivers": wire.fingerprints()}
    checkpoint = exports.save(
        tmp_path / "step-00000001", wire, {"dev_f1": 0.0}, frozen, add=with_training_state
    )
    scored = score_and_export(checkpoint, validation, tmp_path / "out" / "best")
    assert (scored.readings["scorings"], scored.readings["rows"]) == (0, 2)
    assert scored.document == {
        "validation": scored.scores, "by_document": {}, "readings": scored.readings,
        "weights": exports.sizes(tmp_path / "out" / "best"),
    }  # fmt: skip
    write_results(tmp_path / "out", scored.document)
    seed = seeds.read(tmp_path / "out")
    assert (seed.seed, seed.scores) == (wire.run.training.seed, scored.scores)
    assert seed.protocol == protocol_hash(validation, wire.run)
    one, other = (exports.read_manifest(path) for path in (checkpoint, tmp_path / "out" / "best"))
    assert readings.wire_name(one) == readings.wire_name(other) and one["files"] != other["files"]
    assert other["pins"] == one["pins"] | {
        "validation": {
            "shards": "validation",
            "evaluation_pin": protocol_hash(validation, wire.run),
        }
    }
    assert other["metrics"] == {
        "development": {"dev_f1": 0.0},
        "validation": scored.scores,
        "readings": scored.readings,
    }
    card = (tmp_path / "out" / "best" / "README.md").read_text()
    assert (
        "no other wire was scored on them before. In brackets 95 % bootstrap intervals over contexts"
        in card
    )
    table = pq.read_table(tmp_path / "out" / "predictions.parquet")
    assert table.column_names == [field.name for field in dataclasses.fields(Prediction)]
    assert Counter(table["condition"].to_pylist()) == dict.fromkeys(scored.scores, 4)
    by_context = dict(
        zip(table["context"].to_pylist(), table["context_id"].to_pylist(), strict=True)
    )
    assert len(set(by_context.values())) == len(by_context) == 2
    # Another wire on the same rows hears of the first.
    next(iter(wire.interlingua.parameters())).data += 1
    second = checkpoints.save(tmp_path / "step-00000002", wire, {"dev_f1": 0.0}, frozen)
    again = score_and_export(second, validation, tmp_path / "second" / "best")
    assert (again.readings["scorings"], again.readings["wires"], again.readings["read_before"]) == (
        1,
        1,
        2,
    )
    card = (tmp_path / "second" / "best" / "README.md").read_text()
    assert (
        "On validation rows: 2 of 2 had been read before, in 1 scorings, by 1 other wires" in card
    )
    assert "scored 1/7" in capsys.readouterr().out


def test_evaluate_records_validation_rows_alone(
    wire: LatentWire,
    rows: pa.Table,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = {
        split: shards_of(tmp_path / "shards" / split, rows.slice(0, 2))
        for split in ("validation", "dev")
    }
    export = exports.save(tmp_path / "best", wire, {}, {"receivers": wire.fingerprints()})
    command = importlib.import_module("latentwire.api.evaluate")
    monkeypatch.setattr(
        command, "local_shards", lambda run, splits, **_: {split: paths[split] for split in splits}
    )
    for split, recorded in (("dev", False), ("validation", True)):
        flags = ["--checkpoint", str(export), "--modes", "latent", "--split", split]
        assert main(["evaluate", *flags, "--output", str(tmp_path / split)]) == 0
        printed = " ".join(capsys.readouterr().out.split())  # a title wraps where its path is long
        assert ("none of these 2 rows was read by a scoring before" in printed) == recorded
        assert "trained weights" in printed and "95 % intervals by resampling 2 contexts" in printed
        details = json.loads((tmp_path / split / "details.json").read_text())
        assert ("readings" in details) == recorded and details["weights"] == exports.sizes(export)
        assert len(list((tmp_path / "shards").glob("readings/*.json"))) == recorded


def test_a_card_of_an_earlier_version_says_what_it_knows(wire: LatentWire, tmp_path: Path) -> None:
    manifest = json.loads(
        (exports.save(tmp_path / "wire", wire, {}, {}) / "manifest.json").read_text()
    )
    row = {
        "em": 0.5,
        "em_low": 0.4,
        "em_high": 0.6,
        "f1": 0.5,
        "f1_low": 0.4,
        "f1_high": 0.6,
        "nll": 1.0,
        "rows": 9,
    }
    manifest["metrics"] = {"validation": {"latent": {"llama": row}}}
    card = card_of(wire.run, manifest)
    assert (
        "how often they were read before this scoring is not recorded" in card
        and "intervals over rows" in card
    )


def test_tuned_rows_are_read_by_the_readers_that_were_asked_for(
    run: RunConfig, rows: pa.Table, tmp_path: Path
) -> None:
    """They are asked for once, with all rows of the table, and their reports stand in the results."""
    values = {"evaluation.tuned_text.tokens": 5, "data.shard_dir": str(tmp_path / "shards")}
    wire = LatentWire(with_values(run, values))
    validation = shards_of(tmp_path / "shards" / "validation", rows.slice(0, 2))
    pins = {"receivers": wire.fingerprints()}
    checkpoint = exports.save(tmp_path / "step-00000001", wire, {"dev_f1": 0.0}, pins)
    asked: list[tuple[str, ...]] = []

    def readers_of(of: LatentWire, table: Sequence[Condition]) -> dict[str, LatentWire]:
        asked.append(tuple(row.key for row in table))
        made = {}
        for row in table:
            if row.tuned:
                budget = TrainingBudget(1, 1)
                config = reader_run(of.run, of.run.receivers, row, budget, 1, 1.0)
                made[row.key] = LatentWire(config, of.receivers)
                made[row.key].reports = {"llama": {"read": row.key}}
        return made

    scored = score_and_export(checkpoint, validation, tmp_path / "out" / "best", tuned=readers_of)
    keys = tuple(row.key for row in final_conditions(wire.run))
    assert asked == [keys] and tuple(scored.scores) == keys
    tuned = ("text tuned", "truncated tuned", "closed_book tuned")
    assert scored.document["text_readers"] == {key: {"llama": {"read": key}} for key in tuned}
    for key in tuned:
        longer = scored.scores[key]["llama"]["positions"]
        assert longer == scored.scores[key.removesuffix(" tuned")]["llama"]["positions"] + 5


def test_a_checkpoint_is_scored_and_probed_as_the_wire_that_it_holds(
    run: RunConfig, rows: pa.Table, tmp_path: Path
) -> None:
    """By its own configuration, or by another one that decodes or reads other rows."""
    wire = LatentWire(with_values(run, {"data.shard_dir": str(tmp_path / "shards")}))
    validation = shards_of(tmp_path / "shards" / "validation", rows)
    pins = {"receivers": wire.fingerprints()}
    checkpoint = exports.save(tmp_path / "wire", wire, {}, pins)
    asked = (Condition("latent"),)
    scores = score(checkpoint, validation, asked)
    assert untimed(scores) == untimed(summaries(predict_conditions(wire, validation, asked)))
    one = with_values(wire.run, {"evaluation.max_answer_tokens": 1})
    shorter = score(checkpoint, validation, asked, one)
    assert shorter["latent"]["llama"]["nll"] == scores["latent"]["llama"]["nll"]
    assert shorter["latent"]["llama"]["decode_ms"] == 0 < scores["latent"]["llama"]["decode_ms"]
    assert set(score(checkpoint, shards_of(tmp_path / "two", rows.slice(0, 2)))) == {
        row.key for row in FINAL_CONDITIONS
    }
    assert diagnose_here(checkpoint, validation, wire.run) == diagnose(wire, rows)
