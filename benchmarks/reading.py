"""What it saves that a message is read once for all its questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import torch

from benchmarks import branches
from benchmarks.measure import Row, in_turns
from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.data import shards, streams
from latentwire.data.positions import PositionCounter
from latentwire.distributed.local_shards import local_shards
from latentwire.evaluation.baselines import Mode
from latentwire.evaluation.evaluator import predict
from latentwire.model import LatentWire
from latentwire.training.loop import Trainer

QUESTIONS = 6
"""Questions to each context of the toy; real data has its own."""
MODES: tuple[Mode, ...] = ("text", "latent", "truncated", "closed_book")


def rows(run: RunConfig, repeats: int) -> list[Row]:
    """Training, later questions and evaluation on contexts with all their questions."""
    together = {"training.questions_together": True}
    if run.data.dataset == "toy":
        together["data.toy_questions"] = QUESTIONS
    run = with_values(run, together)
    table = shards.read_table(local_shards(run)["train"])
    batch = table.slice(0, run.training.batch_size)
    wire = LatentWire(run)
    return [
        spread(run, table),
        training(wire, batch, repeats),
        *branches.rows(run, batch, repeats),
        *(later_questions(wire, name, batch, repeats) for name in wire.receivers),
        evaluation(wire, batch, max(1, repeats // 5)),
    ]


def spread(run: RunConfig, table: pa.Table) -> Row:
    """The fullest batch over the mean one, in positions that receivers read: filled by positions and by rows.

    The budget of positions is the mean batch by rows.
    """
    free = {
        "training.batch_size": None,
        "training.positions_per_batch": 10**9,
        "evaluation.tuned_text": None,  # whose readers train by rows
    }
    counter = PositionCounter(with_values(run, free))

    def positions(rows: pa.Table) -> int:
        # filled: positions of a batch of the first 1, 2, … units; the last holds all of them.
        units = counter.of_table(rows)
        return int(units.filled(np.arange(len(units)))[-1])

    by_rows = [positions(rows) for rows in streams.shuffled_batches(table, run.training, 0)]
    budget = int(np.mean(by_rows))
    packed = with_values(run, free | {"training.positions_per_batch": budget})
    units = PositionCounter(packed).of_table(table)
    batches = streams.packed_batches([table], packed.training, 0, units)
    by_positions = [positions(rows) for rows in batches]
    ours = max(by_positions) / np.mean(by_positions)
    theirs = max(by_rows) / np.mean(by_rows)
    detail = (
        f"{run.data.dataset}, {table.num_rows} rows: {ours:.2f} in {len(by_positions)} batches of up to {budget} "
        f"positions, {theirs:.2f} in {len(by_rows)} of {run.training.batch_size} rows"
    )
    return Row(
        "fullest batch ÷ mean batch: by positions ÷ by rows", ours / theirs, "report", detail
    )


@contextmanager
def row_by_row(wire: LatentWire) -> Iterator[None]:
    """Let the wire's receivers read the message of each row anew, as long as the block runs."""
    # None says that rows share nothing. An attribute of the instance hides the class's method.
    wire.parted = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del wire.parted


def beside_rows(wire: LatentWire, work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return the seconds of some work, and those where each row's message is read anew."""

    def anew() -> None:
        with row_by_row(wire):
            work()

    return in_turns(work, anew, repeats)


def training(wire: LatentWire, batch: pa.Table, repeats: int) -> Row:
    """Questions a second in training: messages read once over one row a question. Both encode once."""
    trainer = Trainer(wire, 10**6)
    ours, theirs = beside_rows(wire, lambda: trainer.step(batch), repeats)
    rates = f"{batch.num_rows / ours:.1f} / {batch.num_rows / theirs:.1f} questions/s"
    contexts = len(set(batch["context"].to_pylist()))
    detail = f"{batch.num_rows} questions to {contexts} contexts: {rates}"
    return Row("training, messages read once ÷ one row a question", theirs / ours, "≥ 2", detail)


@torch.no_grad()
def later_questions(wire: LatentWire, name: str, batch: pa.Table, repeats: int) -> Row:
    """The first token of a second question to a message that was read, over a closed book's."""
    prefilled = wire.prefill(wire.encode(batch["context"][0].as_py()), name)
    builder = wire.builders[name]
    # Row 1 asks another question of the message of row 0: contexts stand together.
    (question_ids,) = builder.tokenize([], [batch["question"][1].as_py()], [])["question_ids"]
    assert prefilled.message is not None
    open_book = builder.latent(prefilled.message.slots(name)[0], question_ids)
    closed_book = builder.text([], question_ids)
    ours, theirs = in_turns(
        lambda: prefilled.decode([open_book], [0], max_new_tokens=1),
        lambda: wire.decode(name, [closed_book], max_new_tokens=1),
        repeats,
    )
    detail = f"{name}: {1e3 * ours:.1f} / {1e3 * theirs:.1f} ms"
    return Row("a later question's first token ÷ a closed book's", ours / theirs, "≤ 1.05", detail)


def evaluation(wire: LatentWire, batch: pa.Table, repeats: int) -> Row:
    """Questions a second in evaluation: what rows share is read once over row by row."""

    def score() -> None:
        for mode in MODES:
            list(predict(wire, batch, mode))

    ours, theirs = beside_rows(wire, score, repeats)
    rates = f"{batch.num_rows / ours:.2f} / {batch.num_rows / theirs:.2f} questions/s"
    detail = f"{', '.join(MODES)}: {rates}"
    return Row("evaluation, shared beginnings once ÷ each row", theirs / ours, "≥ 2", detail)
