"""Two and four workers on their shares of a batch do what one does on the whole."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.data.streams import share_of
from latentwire.model import LatentWire
from latentwire.training.local import table_epochs
from latentwire.training.loop import Trainer
from latentwire.training.workers import Workers
from tests.conftest import SMALL, shard_table
from tests.training.test_loop import EVERYTHING

SCRIPT = """
import sys, torch, torch.distributed as dist
from tests.training.test_workers import train
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
train(sys.argv[4], f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""
VARIANTS = {
    "answers": {},
    "everything": EVERYTHING | {"training.receivers_per_step": "one", "training.accumulation": 2},
}


def train(variant: str, target: str) -> None:
    """Four steps, one of them alignment; writes every step's gradients and the development metrics."""
    run = with_values(RunConfig(), SMALL | VARIANTS[variant] | {"training.alignment_steps": 1})
    table = shard_table(run, 16)
    trainer = Trainer(LatentWire(run), 4)
    generator = torch.Generator().manual_seed(3)
    for (
        parameter
    ) in trainer.wire.interlingua.features.parameters():  # features that are zero have no gradient
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    workers, gradients = trainer.workers, {}
    for rows in table_epochs(trainer.config, table, workers.rank, workers.size)(0):
        trainer.last_values = trainer.step(rows)
        named = trainer.wire.interlingua.named_parameters()
        gradients |= {
            f"{trainer.progress.step} {name}": p.grad.clone()
            for name, p in named
            if p.grad is not None
        }
    torch.save([gradients, trainer.evaluate(table)], target)


@pytest.mark.parametrize(("variant", "world"), [("answers", 2), ("everything", 2), ("answers", 4)])
def test_workers_equal_one(tmp_path: Path, variant: str, world: int) -> None:
    train(variant, str(tmp_path / "alone.pt"))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(world), str(tmp_path), variant]
        )
        for rank in range(world)
    ]
    assert [process.wait(300) for process in started] == [0] * world
    gradients, metrics = torch.load(tmp_path / "alone.pt", weights_only=True)
    assert len({name.split()[0] for name in gradients}) == 4
    for rank in range(world):
        shared, shared_metrics = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert shared_metrics["dev_loss"] == pytest.approx(metrics["dev_loss"], rel=1e-3)
        assert shared_metrics["dev_f1"] == pytest.approx(metrics["dev_f1"])
        terms = [name for name in metrics if name.startswith("answer_ce_")]
        assert terms and all(
            shared_metrics[name] == pytest.approx(metrics[name], rel=1e-2) for name in terms
        )
        for name, expected in gradients.items():
            size = float(expected.norm())
            # Steps add up what rounding left; where a gradient is nothing, so is its direction.
            assert float((shared[name] - expected).norm()) <= 0.01 * size + 1e-4, name


class Threads:
    """A group of workers that are threads of this process."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size, self.own = size, threading.local()
        self.barrier, self.held = threading.Barrier(size, timeout=120), [None] * size
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)
        monkeypatch.setattr(dist, "all_gather_object", self.all_gather)

    def run(self, work: Any) -> list[Any]:
        """What ``work`` gives for each worker."""

        def one(rank: int) -> Any:
            self.own.rank = rank
            torch.set_num_threads(1)
            workers = Workers()
            workers.rank, workers.size = rank, self.size
            return work(workers)

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))

    def exchanged(self, mine: Any) -> list[Any]:
        self.held[self.own.rank] = mine
        self.barrier.wait()
        found = list(self.held)
        self.barrier.wait()
        return found

    def all_reduce(self, tensor: torch.Tensor) -> None:
        parts = self.exchanged(tensor.clone())
        assert len({(part.shape, part.dtype) for part in parts}) == 1  # or gloo would hang
        tensor.copy_(torch.stack(parts).sum(0))

    def all_gather(self, parts: list[Any], mine: Any) -> None:
        parts[:] = self.exchanged(mine)


@pytest.mark.parametrize(
    "values",
    [{}, EVERYTHING | {"training.receivers_per_step": "one", "training.accumulation": 2}],
    ids=["answers", "all"],
)
def test_a_worker_without_rows_takes_part(
    values: dict, run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows for three workers, then development rows for one: nobody waits for ever, all end in one worker's weights."""
    run = with_values(
        run,
        values
        | {"training.batch_size": 2, "training.alignment_steps": 1, "training.warmup_steps": 0},
    )
    table = shard_table(run, 6)
    group = Threads(3, monkeypatch)
    # One after the other, since they draw from one generator; with receivers of their own, since features lay hooks on them.
    wires = [LatentWire(run) for _ in range(4)]

    def trained(workers: Workers, wire: LatentWire | None = None) -> tuple[dict, dict, list[int]]:
        trainer = Trainer(wire or wires[workers.rank], 3, workers)
        shares = []
        for rows in table_epochs(trainer.config, table, workers.rank, workers.size)(0):
            shares.append(rows.num_rows)
            trainer.last_values = trainer.step(rows)
        return trainer.wire.interlingua.state_dict(), trainer.evaluate(table.slice(0, 1)), shares

    weights, metrics, _ = trained(Workers(), wires[3])
    for rank, (found, told, shares) in enumerate(group.run(trained)):
        assert shares == [rank > 0] * 3
        assert told["dev_loss"] == pytest.approx(metrics["dev_loss"], rel=1e-3)
        assert {name for name in metrics if not name.startswith("prompt_scale")} <= told.keys()
        for name, expected in weights.items():
            torch.testing.assert_close(
                found[name], expected, atol=2e-4, rtol=1e-2, msg=f"{rank} {name}"
            )


@pytest.mark.parametrize("step", [0, 1], ids=["alignment", "texts"])
def test_a_context_on_two_workers_is_told_by_the_first(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Gradients are those of one worker, also where rows of one context lie on several."""
    texts = {"losses.reconstruction_ce_weight": 0.5, "losses.continuation_ce_weight": 0.5}
    values = {"training.alignment_steps": 1, "encoder.latent_dropout": 0.0}
    run = with_values(run, texts | values | {"losses.reconstruction_tokens": 5})
    table, group = shard_table(run, 8, questions=2), Threads(3, monkeypatch)
    wires = [LatentWire(run) for _ in range(4)]

    def gradients(workers: Workers, wire: LatentWire | None = None) -> dict[str, torch.Tensor]:
        trainer = Trainer(wire or wires[workers.rank], 4, workers)
        trainer.progress.step = step
        trainer.step(share_of(table, workers.rank, workers.size))
        named = trainer.wire.interlingua.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    expected = gradients(Workers(), wires[3])
    for found in group.run(gradients):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_counts_beyond_what_fp32_holds_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    group, counts = Threads(2, monkeypatch), {"positions": 2.0**24 + 1}
    found = group.run(lambda workers: workers.sum_counts(counts, torch.device("cpu")))
    assert found == [{"positions": 2.0**25 + 2}] * 2
