"""Which weights are updated by what, and that two optimisers under one roof do what each of them does alone."""

import pyarrow as pa
import torch
from torch.optim import AdamW, Muon

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.training.local import table_epochs
from latentwire.training.loop import Trainer
from latentwire.training.optimizer import MuonAndAdamW
from tests.conftest import wire_of
from tests.training.test_loop import EVERYTHING, trainer_of

MUON = {"training.optimizer": "muon", "training.warmup_steps": 0}


def names_by_optimizer(trainer: Trainer) -> dict[str, set[str]]:
    """Muon's groups have a momentum, AdamW's have betas."""
    names = {p: name for name, p in trainer.wire.interlingua.named_parameters()}
    found: dict[str, list[str]] = {"muon": [], "adamw": []}
    for group in trainer.optimizer.param_groups:
        found["muon" if "momentum" in group else "adamw"] += [names[p] for p in group["params"]]
    assert all(len(set(held)) == len(held) for held in found.values())
    return {kind: set(held) for kind, held in found.items()}


def test_muon_has_every_matrix_and_nothing_else(run: RunConfig) -> None:
    values = EVERYTHING | {
        "encoder.pooling": "queries",
        "encoder.span_parts": 1,
        "encoder.tokens_per_latent": None,
        "adapter.slot_positions": True,
    }
    trainer = trainer_of(with_values(run, values | MUON), 16)
    found = names_by_optimizer(trainer)
    assert not found["muon"] & found["adamw"]
    assert found["muon"] | found["adamw"] == {name for name, _ in trainer.wire.interlingua.named_parameters()}
    modules = dict(trainer.wire.interlingua.named_modules())
    assert found["muon"] == {f"{name}.weight" for name, m in modules.items() if isinstance(m, torch.nn.Linear)}
    tables = {
        "encoder.pool.query",
        "encoder.states.embed.weight",
        "adapters.llama.control_CD",
        "adapters.qwen.position_LD",
    }
    assert tables <= found["adamw"]


def test_adamw_has_all_where_nothing_else_is_asked_for(run: RunConfig) -> None:
    assert type(trainer_of(run, 16).optimizer) is AdamW


def test_two_steps_are_those_of_torchs_optimisers_side_by_side(run: RunConfig, table: pa.Table) -> None:
    trainer = trainer_of(with_values(run, MUON), 16)
    assert isinstance(trainer.optimizer, MuonAndAdamW)
    other = wire_of(trainer.wire.run).interlingua
    other.load_state_dict(trainer.wire.interlingua.state_dict())
    mine, theirs = dict(trainer.wire.interlingua.named_parameters()), dict(other.named_parameters())
    config, held = trainer.config, names_by_optimizer(trainer)
    rates = {"encoder": config.encoder_lr, "adapters": config.adapter_lr}
    decays = {name: 0.0 if p.ndim < 2 or "embed" in name else config.weight_decay for name, p in theirs.items()}
    groups = {
        kind: [{"params": [theirs[n]], "lr": rates[n.split(".")[0]], "weight_decay": decays[n]} for n in sorted(names)]
        for kind, names in held.items()
    }
    separate = [
        Muon(groups["muon"], adjust_lr_fn="match_rms_adamw"),
        AdamW(groups["adamw"], betas=(0.9, 0.98), fused=True),
    ]
    first_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in separate]
    for rows in list(table_epochs(config, table)(0))[:2]:
        factor = trainer.scheduler.get_last_lr()[0] / rates["encoder"]
        trainer.step(rows)
        for name, p in theirs.items():
            p.grad = None if mine[name].grad is None else mine[name].grad.clone()
        for optimizer, before in zip(separate, first_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, before, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
    assert factor < 1  # the schedule was at work, on both
    for name, p in theirs.items():
        torch.testing.assert_close(mine[name], p, atol=1e-7, rtol=1e-5, msg=name)
