"""Positions are counted from the columns' lengths, and are those that receivers are given to read."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.data import positions
from latentwire.data.positions import PositionCounter
from latentwire.data.sources import DataError
from latentwire.model import LatentWire
from latentwire.training.loop import Trainer
from tests.conftest import HEADS, shard_table, wire_of

TOGETHER = {"training.questions_together": True, "training.batch_size": None}
CASES: dict[str, dict[str, Any]] = {
    "soft": {},
    "prefix": {"prefix": {"tokens": 3}},
    "growing": {"encoder.tokens_per_latent": 4},
    "lines": {"encoder.split": "lines"},
    "private": {"encoder.private_len": 2},
    "backbone": {
        "encoder.kind": "lm",
        "encoder.model": "receiver:llama",
        "encoder.tokens_per_latent": 3,
    },
    "heads": HEADS,
    "recital": {"losses.reconstruction_ce_weight": 1.0, "losses.reconstruction_tokens": 5},
    "whole-recital": {"losses.reconstruction_ce_weight": 1.0},
    "checkpointing": {"training.gradient_checkpointing": True},
    "coprocessor": {"features": {"coprocessor": {}}},
    "reader": {"prompt.reads": "text", "prefix": {"tokens": 3}},
    "cut-reader": {"prompt.reads": "truncated", "prefix": {}, "encoder.latent_len": 3},
    "window-reader": {"prompt.reads": "window", "prefix": {}, "encoder.latent_len": 3},
    "closed-reader": {"prompt.reads": "closed_book", "prefix": {}},
    "prompt": {"data.send": "prompt", "training.questions_together": False},
    "prompt-reader": {
        "data.send": "prompt",
        "training.questions_together": False,
        "prompt.reads": "truncated",
        "prefix": {},
        "encoder.latent_len": 12,
    },
    "continued": {"losses.continuation_ce_weight": 1.0},
    "texts": {"losses.reconstruction_ce_weight": 1.0, "losses.continuation_ce_weight": 1.0},
}


def filled_by(run: RunConfig, budget: int, values: dict[str, Any]) -> RunConfig:
    return with_values(run, TOGETHER | {"training.positions_per_batch": budget} | values)


def read_of(wire: LatentWire, table: pa.Table) -> int:
    """Return the positions of the receiver that is given most of a batch, in one pass or two."""
    (batch,) = Trainer(wire, 1).collate(table, 0)
    most = 0
    for name, sequences in batch.sequences.items():
        parts = wire.parted(name, sequences)
        if parts is None or wire.run.training.gradient_checkpointing:
            parts = (sequences,)
        most = max(most, sum(part.ids_BS.numel() for part in parts))
    return most


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [12, 1])
def test_positions_are_those_that_receivers_read(run: RunConfig, case: str, rows: int) -> None:
    wire = wire_of(filled_by(run, 10**6, CASES[case]))
    table = shard_table(wire.run, 12, questions=2).slice(0, rows)
    units = PositionCounter(wire.run).of_table(table)
    counted, read = int(units.filled(np.arange(len(units)))[-1]), read_of(wire, table)
    if case == "continued":  # a continuation is counted as long as its text
        assert read <= counted <= 2 * read
    else:
        assert counted == read
    together = wire.run.training.questions_together
    assert units.rows_U.tolist() == (
        [2] * (rows // 2) + [1] * (rows % 2) if together else [1] * rows
    )


def test_rows_of_one_context_in_two_files_stay_together(run: RunConfig) -> None:
    run = filled_by(run, 10**6, {})
    table, counter = shard_table(run, 12, questions=2), PositionCounter(run)
    whole = counter.of_table(table)
    parted = counter.units([counter.rows(table.slice(0, 5)), counter.rows(table.slice(5))])
    for name, expected in vars(whole).items():
        np.testing.assert_array_equal(getattr(parted, name), expected)
    nothing = counter.of_table(table.slice(0, 0))
    assert len(nothing) == 0


def test_a_context_beyond_the_budget_is_parted(run: RunConfig) -> None:
    """Its questions then have its message twice; a budget that holds it leaves it whole."""
    free = filled_by(run, 10**6, {})
    table = shard_table(free, 12, questions=2)
    alone = PositionCounter(free).of_table(table).alone_U
    single = filled_by(run, 10**6, {"training.questions_together": False})
    row = int(PositionCounter(single).of_table(table).alone_U.max())
    for budget in (int(alone.max()), int(alone.max()) - 1, row):
        units = PositionCounter(filled_by(run, budget, {})).of_table(table)
        assert units.rows_U.sum() == 12 and units.alone_U.max() <= budget
        assert (len(units) > 6) is bool(budget < alone.max())
        assert units.start_U.tolist() == [0, *units.rows_U.cumsum()[:-1].tolist()]


def test_a_row_beyond_the_budget_is_refused(run: RunConfig) -> None:
    run = filled_by(run, 20, {})
    with pytest.raises(
        DataError, match=r"must hold every row by itself, got 20, and 12 of 12 .*; set it to \d+ or"
    ):
        PositionCounter(run).of_table(shard_table(run, 12, questions=2))


def test_batches_by_rows_count_nothing(run: RunConfig, table: pa.Table) -> None:
    assert positions.units_of(run, table) is None


def test_a_batch_has_one_measure(run: RunConfig) -> None:
    with pytest.raises(
        ConfigError, match=r"batch_size or by training\.positions_per_batch, got 4 and 9"
    ):
        with_values(run, {"training.positions_per_batch": 9})
    with pytest.raises(ConfigError, match="got none; set one of them, the other null"):
        with_values(run, {"training.batch_size": None})
    training = with_values(RunConfig(), {"training.positions_per_batch": 9}).training
    assert training.batch_size is None and training.measure == "positions_per_batch 9"
    again = RunConfig.model_validate(filled_by(run, 9, {}).model_dump(mode="json"))
    assert again.training.positions_per_batch == 9 and again.training.batch_size is None


def test_text_readers_of_such_a_wire_need_a_number_of_rows(run: RunConfig) -> None:
    with pytest.raises(
        ConfigError, match=r"got evaluation\.tuned_text without batch_size; set batch"
    ):
        filled_by(run, 900, {"evaluation.tuned_text": {"steps": 4}})
    filled_by(run, 900, {"evaluation.tuned_text": {"steps": 4, "batch_size": 8}})
