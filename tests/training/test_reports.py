"""What a training says of itself: its lines, the metrics of an evaluation, a reader's report."""

import math
import time

import pyarrow as pa
import pytest
import torch

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.evaluation.evaluator import predict
from latentwire.evaluation.summary import means
from latentwire.training.local import table_epochs
from latentwire.training.loop import Trainer
from latentwire.training.progress import Progress
from latentwire.training.receiver_losses import _rms
from latentwire.training.workers import Workers
from tests.conftest import wire_of


def progress() -> Progress:
    """Six steps of four questions in three seconds, a quarter of whose positions held nothing."""
    return Progress(
        step=6,
        epoch=2,
        bad_steps=1,
        positions=120,
        padded=30,
        seconds=3.0,
        first_step_seconds=1.25,
        loss=0.5,
        first_loss=2.0,
    )


def test_an_evaluation_reports_scores_progress_and_the_last_steps_terms(
    run: RunConfig, table: pa.Table
) -> None:
    trainer, rows = Trainer(wire_of(run), 5), table.slice(0, 4)
    trainer.progress = progress()
    trainer.last_values = {"loss": 9.0, "answer_ce_llama": 0.25, "gradient_norm": 1.5}
    scores = means(list(predict(trainer.wire, rows, "latent")))
    expected = {
        f"{metric}{suffix}": row[field]
        for name, row in scores.items()
        for suffix in ["" if name == "mean" else f"_{name}"]
        for metric, field in (("dev_f1", "f1"), ("dev_em", "em"), ("dev_loss", "nll"))
    }
    expected |= {
        "wire_bytes": 2 * run.encoder.latent_len * run.encoder.d_z,
        "prompt_positions": scores["mean"]["positions"],
        "step": 6,
        "total_steps": 5 * run.training.epochs,
        "epoch": 2,
        "train_loss": 0.5,
        "first_train_loss": 2.0,
        "examples_per_s": 8.0,
        "train_seconds": 3.0,
        "first_step_s": 1.25,
        "padding_share": 0.25,
        "bad_steps": 1,
        "answer_ce_llama": 0.25,
        "gradient_norm": 1.5,
    }
    assert trainer.evaluate(rows) == pytest.approx(expected)


def test_before_any_line_an_evaluation_has_no_loss_and_no_rate(
    run: RunConfig, table: pa.Table
) -> None:
    told = Trainer(wire_of(run), 5).evaluate(table.slice(0, 1))
    assert math.isnan(told["train_loss"]) and math.isnan(told["first_train_loss"])
    assert (told["step"], told["examples_per_s"], told["padding_share"]) == (0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("alignment_steps", "what"), [(0, "loss"), (5, "loss"), (6, "alignment"), (9, "alignment")]
)
def test_a_line_says_how_far_a_training_is(
    run: RunConfig, capsys: pytest.CaptureFixture[str], alignment_steps: int, what: str
) -> None:
    values = {"training.alignment_steps": alignment_steps, "training.max_steps": 20}
    trainer = Trainer(wire_of(with_values(run, values)), 50)
    trainer.progress = progress()
    trainer.optimizer.param_groups[0]["lr"] = 0.00125
    trainer._print_line(trainer._examples_per_s())
    line = f"step 6/20  epoch 2  {what} 0.5000  lr 1.25e-03  8.0 examples/s\n"
    assert capsys.readouterr().out == line
    trainer.workers = Workers()
    trainer.workers.rank = 1  # of several workers the first one speaks
    trainer._print_line(8.0)
    assert capsys.readouterr().out == ""


def test_the_time_of_a_training_is_that_of_its_steps(
    run: RunConfig, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step takes a second by this clock, the first one two; evaluations take none of it."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    trainer = Trainer(wire_of(run), 3)
    step = trainer.step

    def stepping(rows: pa.Table) -> dict[str, float]:
        now[0] += 2.0 if trainer.progress.step == 0 else 1.0
        return step(rows)

    def evaluating() -> None:
        now[0] += 50.0

    monkeypatch.setattr(trainer, "step", stepping)
    trainer.train(lambda epoch: iter([table.slice(0, 4)] * 3), evaluating)
    assert trainer.progress.step == 3 * run.training.epochs
    assert trainer.progress.seconds == trainer.progress.step + 1
    assert trainer.progress.first_step_seconds == 2.0


def test_the_scale_of_a_prompt_is_the_root_mean_square_of_what_each_row_reads() -> None:
    """Two messages of one slot and of two, read by one row and by three; after them a vector of each row."""
    soft_ND = torch.tensor([[3.0, 4.0], [1.0, 1.0], [0.0, 2.0]])
    slots_BS = torch.tensor([[True, False], [True, True]])
    rows_M = torch.tensor([1.0, 3.0])
    squares = 12.5 + 3 * 1.0 + 3 * 2.0
    assert _rms(soft_ND, rows_M, slots_BS, None) == pytest.approx((squares / 7) ** 0.5)
    rest_ND = torch.tensor([[2.0, 2.0]] * 4)
    assert _rms(soft_ND, rows_M, slots_BS, rest_ND) == pytest.approx(((squares + 16) / 11) ** 0.5)
    one = _rms(soft_ND[:1], torch.ones(1), torch.tensor([[True]]), None)
    assert one == pytest.approx(12.5**0.5)
    assert _rms(torch.zeros(0, 2), torch.ones(1), torch.tensor([[False]]), None) == 0.0


@pytest.mark.parametrize(("aligning", "told"), [(2, True), (1, False), (0, False)])
def test_a_training_of_alignment_alone_says_so(
    run: RunConfig, table: pa.Table, capsys: pytest.CaptureFixture[str], aligning: int, told: bool
) -> None:
    values = {"training.alignment_steps": aligning, "training.max_steps": 2}
    trainer = Trainer(wire_of(with_values(run, values)), 2)
    trainer.train(table_epochs(trainer.config, table), lambda: None)
    said = f"all 2 steps align latents, by training.alignment_steps {aligning}"
    assert (said in capsys.readouterr().out) is told
