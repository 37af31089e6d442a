"""Two and four workers on their shares of a batch do what one does on the whole."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latentwire.assembly import LatentWire
from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.training.local import table_epochs
from latentwire.training.loop import Trainer
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
    for parameter in trainer.wire.interlingua.features.parameters():  # features that are zero have no gradient
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    workers, gradients = trainer.workers, {}
    for rows in table_epochs(trainer.config, table, workers.rank, workers.size)(0):
        trainer.last_values = trainer.step(rows)
        named = trainer.wire.interlingua.named_parameters()
        gradients |= {f"{trainer.progress.step} {name}": p.grad.clone() for name, p in named if p.grad is not None}
    torch.save([gradients, trainer.evaluate(table)], target)


@pytest.mark.parametrize(("variant", "world"), [("answers", 2), ("everything", 2), ("answers", 4)])
def test_workers_equal_one(tmp_path: Path, variant: str, world: int) -> None:
    train(variant, str(tmp_path / "alone.pt"))
    started = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), str(world), str(tmp_path), variant])
        for rank in range(world)
    ]
    assert [process.wait(120) for process in started] == [0] * world
    gradients, metrics = torch.load(tmp_path / "alone.pt", weights_only=True)
    assert len({name.split()[0] for name in gradients}) == 4
    for rank in range(world):
        shared, shared_metrics = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert shared_metrics["dev_loss"] == pytest.approx(metrics["dev_loss"], rel=1e-3)
        assert shared_metrics["dev_f1"] == pytest.approx(metrics["dev_f1"])
        terms = [name for name in metrics if name.startswith("answer_ce_")]
        assert terms and all(shared_metrics[name] == pytest.approx(metrics[name], rel=1e-2) for name in terms)
        for name, expected in gradients.items():
            size = float(expected.norm())
            # Steps add up what rounding left; where a gradient is nothing, so is its direction.
            assert float((shared[name] - expected).norm()) <= 0.01 * size + 1e-4, name
