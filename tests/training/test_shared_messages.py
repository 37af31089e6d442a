"""A message is read once for all its questions, and nothing but the work is less for it."""

from typing import Any

import pyarrow as pa
import pytest
import torch

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.model import LatentWire
from latentwire.prompts.batch import Batch, collate
from latentwire.training.loop import Trainer
from tests.conftest import HEADS, choose_some_heads, shard_table, wire_of
from tests.models.test_memory import HANDED

KD = {"losses.kd_weight": 1.0, "losses.hidden_kd_weight": 0.5, "losses.k": 3}
TEXTS = {"losses.reconstruction_ce_weight": 0.5, "losses.continuation_ce_weight": 0.5}
CASES: dict[str, dict[str, Any]] = {
    "soft": {},
    "deep-prefix": {"features": {"deep_prefix": {}}},
    "latent-adapters": {"features": {"latent_adapters": {}}},
    "lora": {"features": {"lora": {}}},
    "keys-values": HANDED,
    "prefix": {"prefix": {"tokens": 3, "layers": True}},
    "teacher": KD,
    "texts": TEXTS,
    "slots": {"losses.slot_kd_weight": 0.5},
    "growing": {"encoder.tokens_per_latent": 4},
    "micro-batches": {"training.accumulation": 2},
    "sequential": {"training.sequential_models": True},
    "split": {"encoder.private_len": 2},
    "heads": HEADS,
    "heads-behind-a-prefix": HEADS | {"prefix": {"tokens": 3}},
    "heads-recited": HEADS | TEXTS,
    "reader": {"prompt.reads": "text", "prefix": {"tokens": 3}},
    "cut-reader": {"prompt.reads": "truncated", "prefix": {"tokens": 3, "layers": True}},
    "chat": {},
}


def trainer_of(run: RunConfig, values: dict[str, Any], case: str) -> Trainer:
    run = with_values(run, values)
    if case == "chat":
        receivers = [receiver.model_dump() | {"template": "auto"} for receiver in run.receivers]
        run = with_values(run, {"receivers": receivers})
    wire = wire_of(run)
    trainer = Trainer(choose_some_heads(wire) if "heads" in case else wire, 4)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainer.wire.interlingua.parameters():  # what begins at zero does something
        if parameter.requires_grad:  # senders' weights are the receivers'
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.02 * noise)
    return trainer


def gradients(trainer: Trainer, table: pa.Table) -> tuple[dict[str, float], dict[str, Any]]:
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.wire.interlingua.eval()
    values = trainer.backward(trainer.collate(table, 0))
    parameters = trainer.wire.interlingua.named_parameters()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters}
    return values, {name: gradient.clone() for name, gradient in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_one_row_a_question(
    run: RunConfig, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(run, CASES[case], case)
    table = shard_table(trainer.wire.run, 12, questions=2)
    passes: list[tuple[int, int]] = []
    parted = LatentWire.parted

    def spy(self: LatentWire, name: str, batch: Batch, *side: Any) -> Any:
        parts = parted(self, name, batch, *side)
        if parts is not None:
            passes.append((len(parts[0].ids_BS), len(parts[1].ids_BS)))
        return parts

    monkeypatch.setattr(LatentWire, "parted", spy)
    values, found = gradients(trainer, table)
    assert passes and all(messages < rows for messages, rows in passes)
    monkeypatch.setattr(LatentWire, "parted", lambda *_: None)
    expected_values, expected = gradients(trainer, table)
    assert set(found) == set(expected)
    for name, value in expected_values.items():
        assert values[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_rows_go_on_from_their_own_text(wire: LatentWire) -> None:
    """Texts of several lengths, in any order of the rows: as likely as read whole."""
    texts = [
        "Ada lives in Oslo.",
        "Tom has a red ball and a blue hat, and lives by the sea.",
        "No.",
    ]
    asked = [
        (1, "What?"),
        (0, "Where does Ada live?"),
        (1, "Where does Tom live?"),
        (2, "Who?"),
        (0, "Who?"),
        (2, "No?"),
    ]
    for name, lm in wire.receivers.items():
        builder = wire.builders[name]
        ids = builder.tokenize(texts, [question for _, question in asked], ["a hat"] * len(asked))
        rows = zip(asked, ids["question_ids"], ids["answer_ids"], strict=True)
        batch = collate(
            [builder.text(ids["context_ids"][text], *pair) for (text, _), *pair in rows],
            messages=[text for text, _ in asked],
        )
        parts, local = batch.parted(), wire.local_receiver(name)
        assert parts is not None
        begun, rest = parts
        assert begun.end_R is not None and len(begun.end_R) == 3
        assert begun.attention_BS.sum(1).tolist() == begun.end_R.tolist()
        found = local.score_answers(rest, None, local.prefill(local.read_head(begun))).ce_N
        torch.testing.assert_close(found, lm.score_answers(batch).ce_N, atol=1e-5, rtol=1e-5)


def test_where_it_cannot_be_read_once_rows_are_read(run: RunConfig) -> None:
    """A coprocessor looks at the question; a few shared messages are not worth a second pass."""
    table = shard_table(run, 12, questions=2)
    asked = Trainer(wire_of(with_values(run, {"features": {"coprocessor": {}}})), 4)
    (batch,) = asked.collate(table, 0)
    assert asked.wire.parted("llama", batch.sequences["llama"]) is None
    plain = Trainer(wire_of(run), 4)
    (batch,) = plain.collate(table, 0)
    assert plain.wire.parted("llama", batch.sequences["llama"]) is not None
    (few,) = plain.collate(
        pa.concat_tables([table.take(list(range(0, 12, 2))), table.slice(0, 1)]), 0
    )
    assert plain.wire.parted("llama", few.sequences["llama"]) is None
    alone = shard_table(run, 6)
    (batch,) = plain.collate(alone, 0)
    assert batch.sequences["llama"].parted() is None


def test_a_layer_with_a_window_must_see_all_of_it(wire: LatentWire) -> None:
    lm = wire.local_receiver("llama")
    assert lm.window is None and lm.may_part(10**6)
    lm.window = 64
    try:
        assert lm.may_part(63) and not lm.may_part(64)
    finally:
        lm.window = None


@pytest.mark.parametrize("step", [0, 1], ids=["alignment", "texts"])
@pytest.mark.parametrize("questions", [1, 2])
def test_what_is_asked_of_a_text_hangs_on_no_number_of_parts(
    run: RunConfig, step: int, questions: int
) -> None:
    """Rows of one context in several micro-batches: it is aligned, recited and continued once."""
    values = {"training.alignment_steps": 1, "losses.reconstruction_tokens": 5}
    trainer = trainer_of(run, TEXTS | values, "texts")
    table = shard_table(trainer.wire.run, 12, questions=questions)

    def of_parts(count: int) -> tuple[dict[str, float], dict[str, Any]]:
        parted = with_values(trainer.wire.run, {"training.accumulation": count}).training
        trainer.collate.training = parted
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.wire.interlingua.eval()
        batches = trainer.collate(table, step)
        assert len(batches) == count
        values = trainer.backward(batches) if step else trainer.align(batches)
        named = trainer.wire.interlingua.named_parameters()
        found = {name: p.grad.clone() for name, p in named if p.grad is not None}
        return values, found

    trainer.progress.step = step
    values, expected = of_parts(1)
    for count in (3, 4, 12):
        parted, found = of_parts(count)
        for name, value in values.items():
            if not name.startswith("prompt_scale"):
                assert parted[name] == pytest.approx(value, rel=1e-5), (count, name)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_parts_that_read_nothing_are_left_out(run: RunConfig) -> None:
    """Texts alone, which an earlier part has recited, or of too few words to be continued."""
    values = {"losses.answer_ce_weight": 0.0, "losses.reconstruction_ce_weight": 1.0}
    trainer = trainer_of(run, values | {"training.accumulation": 12}, "texts")
    batches = trainer.collate(shard_table(trainer.wire.run, 12, questions=2), 0)
    assert [len(batch.sequences["llama"].ids_BS) for batch in batches] == [1] * 6
    values = {"losses.answer_ce_weight": 0.0, "losses.continuation_ce_weight": 1.0}
    trainer = trainer_of(run, values, "texts")
    rows = shard_table(trainer.wire.run, 2)
    short = rows.set_column(rows.column_names.index("context"), "context", pa.array(["a", "b"]))
    assert trainer.collate(short, 0) == []
    assert trainer.step(short)["loss"] == 0.0
