"""The baselines say what they should on receivers that can read."""

import pyarrow as pa
import pytest

from latentwire.assembly import LatentWire
from latentwire.config import RunConfig
from latentwire.evaluation.evaluator import predict, summarise
from tests.conftest import shard_table


@pytest.fixture(scope="module")
def rows(run: RunConfig) -> pa.Table:
    return shard_table(run, 64, seed=11)


def test_the_pair_reads_text_and_knows_nothing_without(wire: LatentWire, rows: pa.Table) -> None:
    text = summarise(list(predict(wire, rows, "text")))
    closed = summarise(list(predict(wire, rows, "closed_book")))
    for name in wire.receivers:
        assert text[name]["em"] >= 0.9
        assert closed[name]["em"] <= 0.2
        assert text[name]["nll"] < closed[name]["nll"]
        assert text[name]["positions"] > closed[name]["positions"]


def test_a_prediction_hangs_on_its_own_row_only(wire: LatentWire, rows: pa.Table) -> None:
    together = {(p.id, p.receiver): p for p in predict(wire, rows.slice(0, 8), "latent")}
    for index in (0, 5):
        for alone in predict(wire, rows.slice(index, 1), "latent"):
            joined = together[alone.id, alone.receiver]
            assert joined.text == alone.text
            assert joined.nll == pytest.approx(alone.nll, rel=1e-3)


def test_the_gold_answer_does_not_reach_the_decoder(wire: LatentWire, rows: pa.Table) -> None:
    changed = rows.slice(0, 8)
    for name in wire.receivers:
        column = changed.column_names.index(f"{name}_answer_ids")
        longer = [ids * 5 for ids in changed.column(column).to_pylist()]
        changed = changed.set_column(column, f"{name}_answer_ids", pa.array(longer, pa.list_(pa.int32())))
    assert [p.text for p in predict(wire, rows.slice(0, 8), "latent")] == [
        p.text for p in predict(wire, changed, "latent")
    ]
