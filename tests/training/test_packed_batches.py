"""Runs whose batches are filled by positions, and workers whose questions share messages."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.data import positions, streams
from latentwire.model import LatentWire
from latentwire.prompts.batch import Batch
from latentwire.training import checkpoints
from latentwire.training.local import table_epochs
from latentwire.training.loop import Trainer
from latentwire.training.workers import Workers
from tests.conftest import shard_table, wire_of
from tests.training.test_workers import Threads

BUDGET = 160
PACKED = {
    "training.batch_size": None,
    "training.positions_per_batch": BUDGET,
    "training.questions_together": True,
    "training.warmup_steps": 0,
}
CASES: dict[str, dict[str, Any]] = {
    "soft": {},
    "deep-prefix": {"features": {"deep_prefix": {}}},
    "prefix": {"prefix": {"tokens": 3, "layers": True}},
    "teacher": {"losses.kd_weight": 1.0, "losses.hidden_kd_weight": 0.5, "losses.k": 3},
    "texts": {"losses.reconstruction_ce_weight": 0.5, "losses.continuation_ce_weight": 0.5},
    "growing": {"encoder.tokens_per_latent": 4},
    "micro-batches": {"training.accumulation": 2},
}


@pytest.fixture
def asked(run: RunConfig) -> pa.Table:
    """Twelve contexts with two questions each."""
    return shard_table(run, 24, questions=2)


def packed_trainer(run: RunConfig, table: pa.Table) -> Trainer:
    units = positions.units_of(run, table)
    assert units is not None
    steps = streams.packed_steps(run.training, units)
    return Trainer(wire_of(run), 1, all_steps=steps)


def epochs_of(trainer: Trainer, table: pa.Table) -> Any:
    return table_epochs(trainer.config, table, units=positions.units_of(trainer.wire.run, table))


def gradients(trainer: Trainer, rows: pa.Table) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the worker's share of the loss, and the gradient of all workers together."""
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.wire.interlingua.eval()
    loss = trainer.backward(trainer.collate(rows, 0))["loss"]
    named = dict(trainer.wire.interlingua.named_parameters())
    trainer.workers.sum_gradients(named.values())
    return loss, {n: p.grad.clone() for n, p in named.items() if p.grad is not None}


@pytest.mark.parametrize("measure", ["rows", "positions"])
@pytest.mark.parametrize(("case", "world"), [*((case, 2) for case in CASES), ("soft", 4)])
def test_workers_whose_questions_share_messages_have_the_gradient_of_one(
    run: RunConfig,
    asked: pa.Table,
    monkeypatch: pytest.MonkeyPatch,
    measure: str,
    case: str,
    world: int,
) -> None:
    """Each reads the messages of its own share once; by rows, a context's questions may be two workers'."""
    by_rows = {"training.batch_size": 12, "training.questions_together": True}
    chosen = PACKED | {"training.positions_per_batch": 500} if measure == "positions" else by_rows
    run = with_values(run, CASES[case] | chosen)
    units = positions.units_of(run, asked)
    wires = [LatentWire(run) for _ in range(world + 1)]  # one after the other: they draw weights
    generator = torch.Generator().manual_seed(1)
    for parameters in zip(*(wire.interlingua.parameters() for wire in wires), strict=True):
        noise = 0.02 * torch.randn(parameters[0].shape, generator=generator)
        for parameter in parameters:  # what begins at zero does something
            if parameter.requires_grad:  # senders' weights are the receivers'
                parameter.data.add_(noise)
    shared: list[tuple[int, int]] = []
    parted = LatentWire.parted

    def spy(self: LatentWire, name: str, batch: Batch, *side: Any) -> Any:
        parts = parted(self, name, batch, *side)
        if parts is not None:
            shared.append((len(parts[0].ids_BS), len(parts[1].ids_BS)))
        return parts

    monkeypatch.setattr(LatentWire, "parted", spy)

    def batches(workers: Workers) -> list[pa.Table]:
        return list(table_epochs(run.training, asked, workers.rank, workers.size, units)(0))

    alone = Trainer(wires[world], 4, Workers())
    number, whole = max(enumerate(batches(alone.workers)), key=lambda one: one[1].num_rows)
    assert whole.num_rows >= 2 * world
    loss, expected = gradients(alone, whole)
    assert shared and not shared.clear()

    def share(workers: Workers) -> tuple[float, dict[str, torch.Tensor], list[str]]:
        trainer = Trainer(wires[workers.rank], 4, workers)
        rows = batches(workers)[number]
        return *gradients(trainer, rows), rows["id"].to_pylist()

    found = Threads(world, monkeypatch).run(share)
    assert shared and all(messages < rows for messages, rows in shared)
    assert [row for *_, rows in found for row in rows] == whole["id"].to_pylist()
    assert sum(part for part, *_ in found) == pytest.approx(loss, rel=1e-5)
    for _, summed, _ in found:
        assert summed.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(summed[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_micro_batches_part_no_context_and_keep_the_gradient(
    run: RunConfig, asked: pa.Table
) -> None:
    once = Trainer(wire_of(with_values(run, PACKED)), 4)
    parted = Trainer(wire_of(with_values(run, PACKED | {"training.accumulation": 3})), 4)
    batches = parted.collate(asked, 0)
    assert len(batches) == 3
    for batch in batches:
        for sequences in batch.sequences.values():
            assert torch.bincount(sequences.message_R).tolist() == [2] * len(
                batch.message_ids["qwen"]
            )
    loss, expected = gradients(once, asked)
    again, found = gradients(parted, asked)
    assert again == pytest.approx(loss, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_a_run_reads_every_row_once_an_epoch_and_counts_them(
    run: RunConfig, asked: pa.Table
) -> None:
    run = with_values(run, PACKED | {"training.epochs": 2, "training.evaluate_every": 10**6})
    trainer = packed_trainer(run, asked)
    seen: list[list[str]] = [[], []]

    def epochs(epoch: int) -> Iterator[pa.Table]:
        for rows in epochs_of(trainer, asked)(epoch):
            seen[epoch] += rows["id"].to_pylist()
            yield rows

    metrics: list[dict[str, float]] = []
    trainer.train(epochs, lambda: metrics.append(trainer.evaluate(asked.slice(0, 2))))
    assert [sorted(ids) for ids in seen] == [sorted(asked["id"].to_pylist())] * 2
    assert seen[0] != seen[1]
    (last,) = metrics
    assert last["step"] == last["total_steps"] == trainer.total_steps > 4
    assert last["examples_per_s"] * last["train_seconds"] == pytest.approx(48)


def test_a_resumed_run_takes_the_batches_that_are_left(
    run: RunConfig, asked: pa.Table, tmp_path: Path
) -> None:
    values = {"training.epochs": 2, "training.evaluate_every": 1, "training.accumulation": 2}
    run = with_values(run, PACKED | values)
    straight = packed_trainer(run, asked)
    step, seen = Trainer.step, dict[int, list[str]]()

    def save() -> None:
        path = tmp_path / str(straight.progress.step)
        checkpoints.save(path, straight.wire, {}, {}, straight)

    def watched(trainer: Trainer) -> None:
        def watch(rows: pa.Table) -> dict[str, float]:
            seen[trainer.progress.step] = rows["id"].to_pylist()
            return step(trainer, rows)

        trainer.step = watch  # type: ignore[method-assign]

    watched(straight)
    straight.train(epochs_of(straight, asked), save)
    whole = dict(seen)
    assert len(whole) == straight.total_steps
    per_epoch = sum(1 for _ in epochs_of(straight, asked)(0))
    assert 2 < per_epoch < straight.total_steps - 1
    for stop in (1, per_epoch, per_epoch + 2):
        resumed = packed_trainer(run, asked)
        checkpoints.load_training(tmp_path / str(stop), resumed)
        seen.clear()
        watched(resumed)
        resumed.train(epochs_of(resumed, asked), lambda: None)
        assert seen == {number: ids for number, ids in whole.items() if number >= stop}
        expected = straight.wire.interlingua.state_dict()
        for name, weights in resumed.wire.interlingua.state_dict().items():
            assert torch.equal(weights, expected[name]), (stop, name)
