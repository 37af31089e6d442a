"""A trained wire answers questions about contexts it has never seen, and only from its own message."""

from pathlib import Path

import pyarrow as pa
import pytest

from latentwire.config import RunConfig
from latentwire.config.resolve import load_space, with_values
from latentwire.evaluation.conditions import Condition
from latentwire.evaluation.evaluator import donors, predict
from latentwire.evaluation.summary import summarise
from latentwire.model import LatentWire, load_wire
from latentwire.training import checkpoints
from latentwire.training.local import table_epochs
from latentwire.training.loop import Trainer
from tests.conftest import shard_table, untimed

VALUES = {
    "encoder.latent_len": 12,
    "encoder.d_z": 64,
    "encoder.d_model": 128,
    "encoder.layers": 2,
    "training.epochs": 9,
    "training.bucket_batches": 1,
    "training.alignment_steps": 300,
    "training.max_steps": 500,
    "training.encoder_lr": 2e-3,
    "training.adapter_lr": 2e-3,
    "training.evaluate_every": 10_000,
    "training.log_every": 100,
    "evaluation.max_answer_tokens": 6,
}


@pytest.mark.slow
def test_messages_carry_and_shuffled_ones_fall_to_closed_book() -> None:
    run = with_values(RunConfig(), VALUES)
    trainer = Trainer(LatentWire(run), 10_000 // run.training.batch_size)
    trainer.train(table_epochs(trainer.config, shard_table(run, 10_000, seed=1)), lambda: None)
    fresh = shard_table(run, 256, seed=2)
    em = {
        mode: summarise(list(predict(trainer.wire, fresh, mode)))
        for mode in ("text", "latent", "shuffled", "closed_book")
    }
    for name in trainer.wire.receivers:
        assert em["latent"][name]["em"] > 0.8 * em["text"][name]["em"], em
        assert em["shuffled"][name]["em"] < 0.2 and em["closed_book"][name]["em"] < 0.2, em


@pytest.mark.slow
def test_a_tuned_reader_of_another_rows_text_knows_no_more_than_a_closed_book() -> None:
    """What a prefix learned is to read: without the right text it answers as the untuned receiver without any."""
    values = {"prompt.reads": "text", "prefix": {}, "training.batch_size": 24, "training.epochs": 2}
    run = with_values(
        RunConfig(), values | {"training.log_every": 20, "evaluation.max_answer_tokens": 6}
    )
    trainer = Trainer(LatentWire(run), 40)
    trainer.train(table_epochs(trainer.config, shard_table(run, 960, seed=1)), lambda: None)
    rows = shard_table(run, 256, seed=2)
    swapped, others = rows, donors(rows["context"].to_pylist())
    for name in ("context", *(f"{receiver}_context_ids" for receiver in trainer.wire.receivers)):
        place = swapped.column_names.index(name)
        swapped = swapped.set_column(place, name, rows[name].take(pa.array(others)))
    tuned = Condition("text", tuned=True)
    em = {
        "own": summarise(list(predict(trainer.wire, rows, tuned))),
        "another": summarise(list(predict(trainer.wire, swapped, tuned))),
        "none": summarise(list(predict(trainer.wire, rows, "closed_book"))),
    }
    for name in trainer.wire.receivers:
        assert em["own"][name]["em"] > 0.9, em
        assert em["another"][name]["em"] <= em["none"][name]["em_high"] + 0.1, em


@pytest.mark.slow
def test_the_memory_of_a_published_compressor_carries_what_no_content_can() -> None:
    """A wire whose message said nothing of its text would answer as well from another row's message."""
    short = {"training.max_steps": 450, "training.evaluate_every": 10_000}
    run = with_values(load_space("peers/toy_500x").run, short)
    trainer = Trainer(LatentWire(run), 11_000 // run.training.batch_size)
    trainer.train(table_epochs(trainer.config, shard_table(run, 11_000, seed=1)), lambda: None)
    fresh = shard_table(run, 256, seed=2)
    read = {
        mode: summarise(list(predict(trainer.wire, fresh, mode)))["llama"]
        for mode in ("latent", "shuffled")
    }
    assert read["latent"]["em"] > 0.4 and read["shuffled"]["em"] < 0.25, read
    assert read["latent"]["nll"] < read["shuffled"]["nll"] - 0.5, read


@pytest.mark.slow
def test_eight_examples_through_a_real_receiver(real_receivers: Path, tmp_path: Path) -> None:
    """SmolLM2 says all eight answers from their messages, none from another's, and again after a reload."""
    values = VALUES | {
        "receivers": [
            {"name": "smollm2", "model": str(real_receivers / "smollm2"), "template": "plain"}
        ],
        "encoder.d_model": 64,
        "training.batch_size": 8,
        "training.epochs": 120,
        "training.alignment_steps": 60,
        "training.max_steps": 120,
        "training.encoder_lr": 5e-3,
        "training.adapter_lr": 5e-3,
        "training.log_every": 20,
    }
    run = with_values(RunConfig(), values)
    trainer, eight = Trainer(LatentWire(run), 1), shard_table(run, 8)
    frozen = trainer.wire.fingerprints()
    trainer.train(table_epochs(trainer.config, eight), lambda: None)
    scores = summarise(list(predict(trainer.wire, eight, "latent")))
    assert scores["smollm2"]["em"] == 1.0
    assert summarise(list(predict(trainer.wire, eight, "shuffled")))["smollm2"]["em"] < 0.5
    path = checkpoints.save(tmp_path / "best", trainer.wire, {}, {"receivers": frozen})
    again, _ = load_wire(path)
    assert untimed(summarise(list(predict(again, eight, "latent")))) == untimed(scores)
