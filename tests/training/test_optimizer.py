"""Which weights are updated by what, and that two optimisers under one roof do what each of them does alone."""

import pyarrow as pa
import pytest
import torch
from torch.optim import AdamW, Muon

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.training.local import table_epochs
from latentwire.training.loop import Trainer
from latentwire.training.optimizer import MuonAndAdamW, matrices_of
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


def linear_maps(module: torch.nn.Module) -> set[str]:
    """Names of the weights of linear layers."""
    return {
        f"{name}.weight"
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.Linear)
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_linear_maps_decay_and_nothing_else(run: RunConfig, optimizer: str) -> None:
    """Control vectors, positions, pooled queries, embeddings, biases, norms and gains stay where they are without a gradient."""
    values = EVERYTHING | {
        "encoder.pooling": "queries", "encoder.span_parts": 1, "encoder.tokens_per_latent": None,
        "adapter.slot_positions": True, "training.weight_decay": 0.5, "training.optimizer": optimizer,
        "training.encoder_lr": 0.1, "training.adapter_lr": 0.2, "training.warmup_steps": 0,
    }  # fmt: skip
    trainer = trainer_of(with_values(run, values), 16)
    before = {}
    for name, p in trainer.wire.interlingua.named_parameters():
        before[name] = p.data.fill_(1.0).clone()
        p.grad = torch.zeros_like(p)
    trainer._update(list(trainer.wire.interlingua.parameters()))
    maps = linear_maps(trainer.wire.interlingua)
    for name, p in trainer.wire.interlingua.named_parameters():
        rate = 0.1 if name.startswith("encoder.") else 0.2
        left = 1 - rate * 0.5 if name in maps else 1.0
        torch.testing.assert_close(p.data, left * before[name], msg=name)
    kinds = {name.split(".")[-1] for name in before} - {"weight", "bias"}
    assert {"control_CD", "position_LD", "query", "gain", "sharpness", "gate"} <= kinds


def test_embeddings_of_a_backbone_do_not_decay(run: RunConfig) -> None:
    """Whatever their names: GPT-2 calls its table ``wte``."""
    module = torch.nn.ModuleDict({"wte": torch.nn.Embedding(4, 3), "out": torch.nn.Linear(3, 4)})
    assert matrices_of(module) == {"out.weight"}


def rates(run: RunConfig, table: pa.Table, values: dict) -> list[float]:
    """The encoder's rate in every step of a run, as a share of its peak."""
    trainer, found = trainer_of(with_values(run, values), 16), []
    step = trainer.optimizer.step
    lr = lambda: trainer.optimizer.param_groups[0]["lr"] / trainer.config.encoder_lr  # noqa: E731
    trainer.optimizer.step = lambda: found.append(lr()) or step()  # type: ignore[method-assign, func-returns-value]
    trainer.train(table_epochs(trainer.config, table), lambda: None)
    assert len(found) == trainer.total_steps
    return found


def test_rates_rise_to_the_peak_and_fall_to_the_minimum(run: RunConfig, table: pa.Table) -> None:
    found = rates(
        run, table, {"training.epochs": 3, "training.warmup_steps": 4, "training.min_lr_ratio": 0.2}
    )
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])  # the first step learns
    assert found[7] == pytest.approx((1 + 0.2) / 2)  # half way down
    assert found[-1] == pytest.approx(0.2) and sorted(found[3:], reverse=True) == found[3:]
    without = rates(
        run, table, {"training.epochs": 2, "training.warmup_steps": 0, "training.min_lr_ratio": 0.0}
    )
    assert without[0] == 1 and without[-1] == pytest.approx(0) and len(set(without)) == 8
    short = rates(
        run,
        table,
        {"training.max_steps": 4, "training.warmup_steps": 50, "training.min_lr_ratio": 0.1},
    )
    assert short[:2] == [0.5, 1.0] and short[-1] == pytest.approx(
        0.1
    )  # at most half of the steps warm up


def test_a_run_of_one_step_has_the_peak(run: RunConfig, table: pa.Table) -> None:
    assert rates(run, table, {"training.max_steps": 1}) == [1.0]


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
    assert found["muon"] | found["adamw"] == {
        name for name, _ in trainer.wire.interlingua.named_parameters()
    }
    assert found["muon"] == linear_maps(trainer.wire.interlingua)
    tables = {
        "encoder.pool.query",
        "encoder.states.embed.weight",
        "adapters.llama.control_CD",
        "adapters.qwen.position_LD",
    }
    assert tables <= found["adamw"]


def test_adamw_has_all_where_nothing_else_is_asked_for(run: RunConfig) -> None:
    assert type(trainer_of(run, 16).optimizer) is AdamW


def test_two_steps_are_those_of_torchs_optimisers_side_by_side(
    run: RunConfig, table: pa.Table
) -> None:
    trainer = trainer_of(with_values(run, MUON), 16)
    assert isinstance(trainer.optimizer, MuonAndAdamW)
    other = wire_of(trainer.wire.run).interlingua
    other.load_state_dict(trainer.wire.interlingua.state_dict())
    mine, theirs = dict(trainer.wire.interlingua.named_parameters()), dict(other.named_parameters())
    config, held = trainer.config, names_by_optimizer(trainer)
    rates = {"encoder": config.encoder_lr, "adapters": config.adapter_lr}
    decays = {name: config.weight_decay if name in linear_maps(other) else 0.0 for name in theirs}
    groups = {
        kind: [
            {"params": [theirs[n]], "lr": rates[n.split(".")[0]], "weight_decay": decays[n]}
            for n in sorted(names)
        ]
        for kind, names in held.items()
    }
    separate = [
        Muon(groups["muon"], adjust_lr_fn="match_rms_adamw"),
        AdamW(groups["adamw"], betas=(0.9, 0.98), fused=True),
    ]
    first_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in separate]
    for rows in list(table_epochs(config, table)(0))[:2]:
        trainer.step(rows)
        factor = trainer.optimizer.param_groups[0]["lr"] / rates["encoder"]
        for name, p in theirs.items():
            p.grad = None if mine[name].grad is None else mine[name].grad.clone()
        for optimizer, before in zip(separate, first_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, before, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
    assert factor < 1  # the schedule was at work, on both
    for name, p in theirs.items():
        torch.testing.assert_close(mine[name], p, atol=1e-7, rtol=1e-5, msg=name)
