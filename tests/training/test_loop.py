"""The optimisation loop: it learns, it resumes exactly, and it stops when it cannot go on."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from latentwire.config import RunConfig
from latentwire.evaluation.evaluator import predict, summarise
from latentwire.models.latentwire import LatentWire
from latentwire.models.lm import LMWrapper
from latentwire.resolve import with_values
from latentwire.training import checkpoints
from latentwire.training.local import table_epochs
from latentwire.training.loop import Trainer, TrainingError


def trainer_of(run: RunConfig, rows: int) -> Trainer:
    return Trainer(LatentWire(run), rows // run.training.batch_size)


def nothing() -> None:
    pass


def test_eight_examples_overfit_to_exact_match_one(run: RunConfig, table: pa.Table) -> None:
    values = {
        "training.epochs": 150,
        "training.encoder_lr": 5e-3,
        "training.adapter_lr": 5e-3,
        "training.batch_size": 8,
    }
    run = with_values(run, values | {"training.evaluate_every": 1000, "training.log_every": 1000})
    eight = table.slice(0, 8)
    trainer = trainer_of(run, 8)
    trainer.train(table_epochs(trainer.wire, eight), nothing)
    scores = summarise(list(predict(trainer.wire, eight, "latent")))
    assert scores["llama"]["em"] == scores["qwen"]["em"] == 1.0
    shuffled = summarise(list(predict(trainer.wire, eight, "shuffled")))
    assert shuffled["mean"]["em"] < 0.8


def gradients(run: RunConfig, table: pa.Table) -> dict[str, torch.Tensor]:
    trainer = trainer_of(run, table.num_rows)
    batch = next(table_epochs(trainer.wire, table)(0))
    trainer.backward(batch)
    return {name: p.grad.clone() for name, p in trainer.wire.interlingua.named_parameters() if p.grad is not None}


def test_sequential_models_give_the_joint_gradient(run: RunConfig, table: pa.Table) -> None:
    joint = gradients(run, table)
    sequential = gradients(with_values(run, {"training.sequential_models": True}), table)
    assert joint.keys() == sequential.keys() and len(joint) > 10
    for name, gradient in joint.items():
        torch.testing.assert_close(sequential[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_alignment_runs_no_receiver_and_brings_the_prompt_to_the_text(
    run: RunConfig, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a receiver ran")

    monkeypatch.setattr(LMWrapper, "supervised_logits", refuse)
    values = {"training.alignment_steps": 200, "training.epochs": 50, "training.encoder_lr": 5e-3}
    trainer = trainer_of(with_values(run, values), 16)
    losses = []
    batches = table_epochs(trainer.wire, table)
    for epoch in range(50):
        losses += [trainer.step(batch)["loss"] for batch in batches(epoch)]
    assert losses[0] > 1
    assert losses[-1] < 0.5
    with pytest.raises(AssertionError, match="a receiver ran"):
        trainer.step(next(batches(0)))


class Interrupted(Exception):
    """Stands for a kill."""


def stop_at(step: int, trainer: Trainer, path: Path) -> Callable[[], None]:
    def at_evaluation() -> None:
        if trainer.progress.step == step:
            checkpoints.save(path, trainer.wire, {}, {}, trainer)
            raise Interrupted

    return at_evaluation


@pytest.mark.parametrize("stopped_after", [1, 3, 4, 6])
def test_resumed_training_ends_in_the_same_weights(
    run: RunConfig, table: pa.Table, tmp_path: Path, stopped_after: int
) -> None:
    # 16 rows in batches of 4: four steps an epoch, so 1, 3 and 6 stop inside one.
    values = {"training.epochs": 2, "training.evaluate_every": 1, "encoder.latent_dropout": 0.2}
    run = with_values(run, values | {"training.alignment_steps": 2, "losses.reconstruction_ce_weight": 0.5})
    straight = trainer_of(run, 16)
    straight.train(table_epochs(straight.wire, table), nothing)
    first = trainer_of(run, 16)
    with pytest.raises(Interrupted):
        first.train(table_epochs(first.wire, table), stop_at(stopped_after, first, tmp_path / "checkpoint"))
    second = trainer_of(run, 16)
    checkpoints.load_training(tmp_path / "checkpoint", second)
    assert second.progress.step == stopped_after
    second.train(table_epochs(second.wire, table), nothing)
    assert second.progress.step == straight.progress.step == 8
    for (name, expected), found in zip(
        straight.wire.interlingua.state_dict().items(), second.wire.interlingua.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, found), name


def test_gradients_that_stay_not_finite_end_the_run(run: RunConfig, table: pa.Table) -> None:
    run = with_values(run, {"training.max_bad_steps": 3, "training.epochs": 5})
    trainer = trainer_of(run, 16)
    before = trainer.wire.interlingua.encoder.project.weight.detach().clone()
    trainer.wire.interlingua.adapters["llama"].gain.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="gradients must be finite, got norm nan in 3 steps in a row"):
        trainer.train(table_epochs(trainer.wire, table), nothing)
    assert trainer.progress.bad_steps == 3
    assert torch.equal(trainer.wire.interlingua.encoder.project.weight, before)


def test_an_epoch_without_a_batch_is_an_error(run: RunConfig) -> None:
    trainer = trainer_of(run, 16)
    with pytest.raises(TrainingError, match="at least one batch"):
        trainer.train(lambda epoch: iter(()), nothing)
