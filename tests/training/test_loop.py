"""The optimisation loop: it learns, it resumes exactly, and it stops when it cannot go on."""

import typing
import weakref
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from latentwire.config import EncoderConfig, LossConfig, RunConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.evaluation.evaluator import predict
from latentwire.evaluation.summary import summarise
from latentwire.features.registry import FEATURES
from latentwire.models.lm import LMWrapper
from latentwire.training import checkpoints
from latentwire.training.local import table_epochs
from latentwire.training.loop import Trainer, TrainingError
from tests.conftest import shard_table, wire_of
from tests.models.test_encoders import sentence_encoder


def trainer_of(run: RunConfig, rows: int) -> Trainer:
    return Trainer(wire_of(run), rows // run.training.batch_size)


def nothing() -> None:
    pass


OVERFIT: dict[str, dict] = {
    "byte": {},
    "byte-muon": {"training.optimizer": "muon"},
    "byte-ratio": {"encoder.pooling": "spans", "encoder.tokens_per_latent": 3},
    "st": {"encoder.kind": "st", "training.encoder_lr": 2e-3},
    "lm": {"encoder.kind": "lm", "encoder.model": "receiver:llama", "encoder.model_layers": 2, "encoder.pooling": "spans"},
    "lm-lora": {"encoder.kind": "lm", "encoder.model": "toy-qwen", "encoder.tune": "lora"},
    "senders": {"encoder.kind": "senders", "encoder.depths": [0.0, 0.5], "encoder.pooling": "spans"},
}  # fmt: skip


@pytest.mark.parametrize("kind", OVERFIT)
def test_eight_examples_overfit_to_exact_match_one(
    run: RunConfig, table: pa.Table, tmp_path: Path, kind: str
) -> None:
    values = {
        "training.epochs": 150,
        "training.encoder_lr": 5e-3,
        "training.adapter_lr": 5e-3,
        "training.batch_size": 8,
        "training.evaluate_every": 1000,
        "training.log_every": 1000,
    } | OVERFIT[kind]
    if kind == "st":
        values["encoder.model"] = sentence_encoder(tmp_path / "st")
    eight = table.slice(0, 8)
    trainer = trainer_of(with_values(run, values), 8)
    trainer.train(table_epochs(trainer.config, eight), nothing)
    scores = summarise(list(predict(trainer.wire, eight, "latent")))
    assert scores["llama"]["em"] == scores["qwen"]["em"] == 1.0
    shuffled = summarise(list(predict(trainer.wire, eight, "shuffled")))
    assert shuffled["mean"]["em"] < 0.8


EVERYTHING = {
    "losses": {
        "first_k_ce_weight": 0.5, "first_token_ce_weight": 0.5, "kd_weight": 1.0, "kd_top_k": 5, "hidden_kd_weight": 0.5,
        "reconstruction_ce_weight": 0.5, "continuation_ce_weight": 0.5, "slot_kd_weight": 0.5, "k": 2,
    },
    "features": {name: {"head_parts": 2} if name == "deep_prefix" else {} for name in FEATURES},
    "encoder.pooling": "spans",
    "encoder.span_parts": 2,
    "encoder.tokens_per_latent": 3,
}  # fmt: skip
"""Every loss term and every feature at once, on messages of unequal lengths."""


def test_everything_is_everything() -> None:
    weights = {name for name in LossConfig.model_fields if name.endswith("_weight")}
    assert weights == {name for name in EVERYTHING["losses"] if name.endswith("_weight")} | {
        "answer_ce_weight"
    }
    tried = {values.get("encoder.kind", "byte") for values in OVERFIT.values()}
    assert tried == set(typing.get_args(EncoderConfig.model_fields["kind"].annotation))


ON_TEXT = tuple(name for name, feature in FEATURES.items() if feature.acts_on_text)


def gradients(run: RunConfig, table: pa.Table) -> dict[str, torch.Tensor]:
    trainer = trainer_of(run, table.num_rows)
    trainer.backward(trainer.collate(next(table_epochs(trainer.config, table)(0)), 0))
    return {
        name: p.grad.clone()
        for name, p in trainer.wire.interlingua.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize(
    "values",
    [
        {"training.sequential_models": True},
        {"training.accumulation": 2},
        {"training.accumulation": 3},
        {"training.logit_rows": 3},
        {"training.gradient_checkpointing": True},
        {"training.gradient_checkpointing": True, "training.sequential_models": True},
    ],
    ids=str,
)
def test_other_orders_of_work_give_the_joint_gradient(
    run: RunConfig, table: pa.Table, values: dict
) -> None:
    run = with_values(run, EVERYTHING)
    joint, parted = gradients(run, table), gradients(with_values(run, values), table)
    assert joint.keys() == parted.keys() and len(joint) > 10
    for name, gradient in joint.items():
        torch.testing.assert_close(parted[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_questions_to_one_message_give_the_gradient_of_a_message_each(run: RunConfig) -> None:
    table = shard_table(run, 12, questions=2)
    losses = {name: 0.0 if name in ("reconstruction_ce_weight", "continuation_ce_weight") else value
              for name, value in EVERYTHING["losses"].items()}  # fmt: skip
    run = with_values(run, EVERYTHING | {"losses": losses, "training.questions_together": True})
    run = with_values(run, {"training.batch_size": 12})
    joint, parted = (
        gradients(run, table),
        gradients(with_values(run, {"training.accumulation": 12}), table),
    )
    trainer = trainer_of(run, 12)
    assert [len(batch.tokens.length_B) for batch in trainer.collate(table, 0)] == [6]
    assert joint.keys() == parted.keys() and len(joint) > 10
    for name, gradient in joint.items():
        torch.testing.assert_close(parted[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("without", [(), ON_TEXT], ids=["all-features", "features-after-the-head"])
def test_a_head_read_beforehand_leaves_the_gradient(
    run: RunConfig, table: pa.Table, without: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features that act on text switch the shortcut off; with the others it changes nothing."""
    run = with_values(
        run, EVERYTHING | {"features": {name: {} for name in FEATURES if name not in without}}
    )
    taken, read_head = [], LMWrapper.read_head
    monkeypatch.setattr(
        LMWrapper,
        "read_head",
        lambda lm, batch: taken.append(batch.latents_BS.any()) or read_head(lm, batch),
    )
    found = gradients(run, table)
    assert any(taken) == bool(without)
    monkeypatch.setattr(LMWrapper, "read_head", lambda lm, batch: batch)
    expected = gradients(run, table)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_sequential_models_and_checkpointing_keep_less_for_the_backward_pass(
    run: RunConfig, table: pa.Table
) -> None:
    """Bytes that autograd keeps at once: the largest receiver's share, and not the sum."""

    def peak(values: dict) -> int:
        trainer = trainer_of(with_values(run, values | {"training.batch_size": 16}), 16)
        batches = trainer.collate(table, 0)
        kept, most = 0, 0

        def hold(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept, most
            size = tensor.numel() * tensor.element_size()
            kept, most = kept + size, max(most, kept + size)
            weakref.finalize(box := Box(tensor), release, size)
            return box

        def release(size: int) -> None:
            nonlocal kept
            kept -= size

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda box: box.tensor):
            trainer.backward(batches)
        return most

    both = peak({})
    assert peak({"training.sequential_models": True}) < 0.75 * both
    assert peak({"training.gradient_checkpointing": True}) < 0.75 * both


class Box:
    """A saved tensor whose end can be seen."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_one_receiver_a_step_trains_every_one_in_turn(run: RunConfig, table: pa.Table) -> None:
    trainer = trainer_of(
        with_values(run, {"training.receivers_per_step": "one", "training.epochs": 5}), 16
    )
    drawn = []
    for epoch in range(5):
        for rows in table_epochs(trainer.config, table)(epoch):
            drawn.append(
                {key.split("_")[-1] for key in trainer.step(rows) if key.startswith("answer_ce")}
            )
    assert all(len(step) == 1 for step in drawn)
    assert {name for step in drawn for name in step} == {"llama", "qwen"}


def test_autocast_moves_the_gradient_little(run: RunConfig, table: pa.Table) -> None:
    exact, rough = (
        gradients(run, table),
        gradients(with_values(run, {"training.autocast": True}), table),
    )
    for name in ("encoder.project.weight", "adapters.llama.skip.weight"):
        assert (
            torch.nn.functional.cosine_similarity(exact[name].flatten(), rough[name].flatten(), 0)
            > 0.98
        )
        assert rough[name].dtype == torch.float32


def test_gradient_norms_of_each_term_are_told_on_request(run: RunConfig, table: pa.Table) -> None:
    values = {"training.log_gradient_norms": True, "losses.first_token_ce_weight": 0.5}
    trainer = trainer_of(with_values(run, values), 16)
    told = trainer.step(next(table_epochs(trainer.config, table)(0)))
    for name in ("llama", "qwen"):
        assert (
            told[f"gradient_norm_answer_ce_{name}"] > 0
            and told[f"gradient_norm_first_token_ce_{name}"] > 0
        )
        assert told[f"prompt_scale_{name}"] == pytest.approx(1, abs=0.2)


def test_latent_dropout_follows_its_schedule(run: RunConfig, table: pa.Table) -> None:
    values = {
        "encoder.latent_dropout": 0.4,
        "losses.schedules": {"latent_dropout": {"kind": "linear", "steps": 2}},
    }
    trainer = trainer_of(with_values(run, values), 16)
    batches, found = list(table_epochs(trainer.config, table)(0)), []
    for step in range(3):
        trainer.step(batches[step])
        found.append(trainer.wire.interlingua.encoder.dropout.p)
    assert found == pytest.approx([0, 0.2, 0.4])


def test_alignment_runs_no_receiver_and_brings_the_prompt_to_the_text(
    run: RunConfig, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a receiver ran")

    monkeypatch.setattr(LMWrapper, "supervised_states", refuse)
    values = {"training.alignment_steps": 200, "training.epochs": 50, "training.encoder_lr": 5e-3}
    trainer = trainer_of(with_values(run, values), 16)
    losses = []
    batches = table_epochs(trainer.config, table)
    for epoch in range(50):
        losses += [trainer.step(batch)["loss"] for batch in batches(epoch)]
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
    with pytest.raises(AssertionError, match="a receiver ran"):
        trainer.step(next(batches(0)))


RESUMED = {
    "dropout": {"encoder.latent_dropout": 0.2},
    "coarsening": {
        "encoder.pooling": "spans",
        "encoder.latent_len": 3,
        "training.coarsening_steps": 4,
    },
    "everything": EVERYTHING | {"training.accumulation": 2, "training.receivers_per_step": "one"},
    "everything-muon": EVERYTHING
    | {"training.optimizer": "muon", "training.receivers_per_step": "one"},
    "lm-lora": {"encoder.kind": "lm", "encoder.model": "toy-qwen", "encoder.tune": "lora"},
}


@pytest.mark.parametrize("values", RESUMED.values(), ids=RESUMED.keys())
def test_resumed_training_ends_in_the_same_weights(
    run: RunConfig, table: pa.Table, tmp_path: Path, values: dict
) -> None:
    # 16 rows in batches of 4: four steps an epoch, so 1, 3 and 6 stop inside one.
    stops = (1, 3, 4, 6)
    fixed = {"training.epochs": 2, "training.evaluate_every": 1, "training.alignment_steps": 2}
    fixed["training.log_every"] = 4
    run = with_values(run, values | fixed)
    straight = trainer_of(run, 16)

    def save() -> None:
        if straight.progress.step in stops:
            checkpoints.save(
                tmp_path / str(straight.progress.step), straight.wire, {}, {}, straight
            )

    straight.train(table_epochs(straight.config, table), save)
    assert straight.config.log_every == 4
    for stop in stops:
        resumed = trainer_of(run, 16)
        checkpoints.load_training(tmp_path / str(stop), resumed)
        assert resumed.progress.step == stop
        resumed.train(table_epochs(resumed.config, table), nothing)
        assert resumed.progress.step == straight.progress.step == 8
        told = resumed.progress.loss, resumed.progress.first_loss
        assert told == (straight.progress.loss, straight.progress.first_loss)
        for (name, expected), found in zip(
            straight.wire.interlingua.state_dict().items(),
            resumed.wire.interlingua.state_dict().values(),
            strict=True,
        ):
            assert torch.equal(expected, found), (stop, name)


def test_a_run_goes_on_as_the_run_it_was(run: RunConfig, table: pa.Table, tmp_path: Path) -> None:
    first = trainer_of(run, 16)
    first.train(table_epochs(first.config, table), lambda: None)
    saved = checkpoints.save(tmp_path / "saved", first.wire, {}, {}, first)
    longer = trainer_of(with_values(run, {"training.epochs": 9, "data.validation_samples": 3}), 16)
    checkpoints.load_training(saved, longer)
    assert longer.progress.step == first.progress.step
    for knob, told in (
        ("training.encoder_lr", r"training\.encoder_lr 0\.001 → 0\.5"),
        ("losses.first_token_ce_weight", r"losses\.first_token_ce_weight 0\.0 → 0\.5"),
    ):
        with pytest.raises(
            ConfigError,
            match=rf"a resumed run keeps its configuration, .* with another: {told}; take",
        ):
            checkpoints.load_training(saved, trainer_of(with_values(run, {knob: 0.5}), 16))


def test_gradients_that_stay_not_finite_end_the_run(run: RunConfig, table: pa.Table) -> None:
    run = with_values(run, {"training.max_bad_steps": 3, "training.epochs": 5})
    trainer = trainer_of(run, 16)
    before = trainer.wire.interlingua.encoder.project.weight.detach().clone()
    trainer.wire.interlingua.adapters["llama"].gain.data.fill_(float("nan"))
    with pytest.raises(
        TrainingError, match="gradients must be finite, got norm nan in 3 steps in a row"
    ):
        trainer.train(table_epochs(trainer.config, table), nothing)
    assert trainer.progress.bad_steps == 3
    assert torch.equal(trainer.wire.interlingua.encoder.project.weight, before)


def test_only_bad_steps_in_a_row_end_the_run(run: RunConfig, table: pa.Table) -> None:
    """Two bad steps, a good one and two more are not three in a row."""
    trainer = trainer_of(with_values(run, {"training.max_bad_steps": 3}), 16)
    gain = trainer.wire.interlingua.adapters["llama"].gain
    good = gain.detach().clone()
    for gains in ("bad", "bad", "good", "bad", "bad"):
        gain.data.fill_(float("nan")) if gains == "bad" else gain.data.copy_(good)
        trainer.step(table.slice(0, run.training.batch_size))
    assert (trainer.progress.bad_steps, trainer.progress.bad_in_a_row) == (4, 2)


def test_padding_is_a_share_of_all_positions(run: RunConfig, table: pa.Table) -> None:
    """The share that evaluations report, counted by hand over the batches of three steps."""
    trainer, size = trainer_of(run, 16), run.training.batch_size
    steps = [table.slice(size * step, size) for step in range(3)]
    empty = total = 0
    for step, rows in enumerate(steps):
        for batch in trainer.collate(rows, step):
            for sequences in batch.sequences.values():
                empty += int((sequences.attention_BS == 0).sum())
                total += sequences.ids_BS.numel()
        trainer.step(rows)
    assert empty > 0
    assert trainer.evaluate(table.slice(0, 2))["padding_share"] == pytest.approx(empty / total)


def test_an_epoch_without_a_batch_is_an_error(run: RunConfig) -> None:
    trainer = trainer_of(run, 16)
    with pytest.raises(TrainingError, match="at least one batch"):
        trainer.train(lambda epoch: iter(()), nothing)


def test_own_receivers_are_compiled_where_that_is_asked_for(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused: list[str] = []
    monkeypatch.setattr(LMWrapper, "compile_layers", lambda lm: fused.append(lm.name))
    trainer_of(run, 8)
    assert not fused
    trainer_of(with_values(run, {"training.compile": True}), 8)
    assert fused == ["llama", "qwen"]


@pytest.mark.parametrize(
    ("values", "most"),
    [({}, 3), ({"training.log_gradient_norms": True}, None)],
    ids=["in-parts", "one-graph-per-term"],
)
def test_no_more_logits_are_there_at_once_than_asked_for(
    run: RunConfig,
    table: pa.Table,
    monkeypatch: pytest.MonkeyPatch,
    values: dict,
    most: int | None,
) -> None:
    """Rows of each receiver's logits; gradient norms of each term take all of them together."""
    sizes: list[int] = []
    logits = LMWrapper.logits
    monkeypatch.setattr(
        LMWrapper, "logits", lambda lm, hidden: sizes.append(len(hidden)) or logits(lm, hidden)
    )
    trainer = trainer_of(with_values(run, {"training.logit_rows": 3} | values), 4)
    (batch,) = trainer.collate(table.slice(0, 4), 0)
    counts = [len(sequences.target_N) for sequences in batch.sequences.values()]
    assert min(counts) > 3
    trainer.backward([batch])
    parts = [part for count in counts for part in torch.arange(count).split(most or count)]
    assert sizes == [len(part) for part in parts]


def test_the_receiver_of_a_step_is_drawn_by_seed_and_step_alone(run: RunConfig) -> None:
    """Workers draw it apart from each other, and so does a resumed run."""
    one = with_values(run, {"training.receivers_per_step": "one"})

    def drawn(seed: int, first: int = 0) -> list[str]:
        trainer = trainer_of(with_values(one, {"training.seed": seed}), 16)
        return [name for step in range(first, 40) for name in trainer._receivers_of(step)]

    straight = drawn(0)
    assert drawn(0) == straight and drawn(0, first=25) == straight[25:] and drawn(1) != straight
    assert all(10 < straight.count(name) < 30 for name in ("llama", "qwen"))


def test_an_evaluation_tells_the_first_loss_and_the_last(run: RunConfig, table: pa.Table) -> None:
    """Each is a mean over the steps of a line of the log: here two."""
    every = {"training.epochs": 1, "training.log_every": 2, "training.evaluate_every": 1}
    trainer = trainer_of(with_values(run, every), 16)
    losses: list[float] = []
    trainer.train(
        table_epochs(trainer.config, table), lambda: losses.append(trainer.last_values["loss"])
    )
    told = trainer.evaluate(table.slice(0, 1))
    assert len(losses) == told["step"] == 4
    assert told["first_train_loss"] == pytest.approx(sum(losses[:2]) / 2)
    assert told["train_loss"] == pytest.approx(sum(losses[2:]) / 2)
