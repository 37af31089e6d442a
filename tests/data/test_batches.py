"""Shard rows become the sequences that the losses ask for, each with the message it reads."""

import pyarrow as pa
import pytest
import torch

from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.data.batches import TrainingCollator, cut, padding
from latentwire.model import LatentWire
from latentwire.models.encoders import InterlinguaEncoder
from latentwire.prompts.sequences import ANSWER, CONTINUE, RECONSTRUCT
from tests.conftest import shard_table, wire_of


def collator(wire: LatentWire, values: dict) -> TrainingCollator:
    return TrainingCollator(with_values(wire.run, values), wire.builders, wire.interlingua.encoder)


def test_answers_then_reconstructions_then_continuations(wire: LatentWire, table: pa.Table) -> None:
    values = {"losses.reconstruction_ce_weight": 1.0, "losses.continuation_ce_weight": 1.0}
    (batch,) = collator(wire, values)(table.slice(0, 3), step=0)
    for name, sequences in batch.sequences.items():
        assert sequences.control_R.tolist() == [ANSWER] * 3 + [RECONSTRUCT] * 3 + [CONTINUE] * 3
        assert sequences.message_R.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5]
        assert len(batch.message_ids[name]) == 6
        # A continuation says exactly what its message leaves out.
        context = table[f"{name}_context_ids"][0].as_py()
        said = sequences.target_N[sequences.row_N == 6].tolist()
        assert batch.message_ids[name][3] + said == context and said


def test_rows_with_one_text_share_its_message(run: RunConfig) -> None:
    wire, table = wire_of(run), shard_table(run, 6, questions=2)
    values = {"losses.reconstruction_ce_weight": 1.0, "losses.continuation_ce_weight": 1.0}
    (batch,) = collator(wire, values)(table.take([0, 2, 4, 5, 3, 1]), step=0)
    assert len(batch.tokens.length_B) == 3 + 3
    for name, sequences in batch.sequences.items():
        assert sequences.control_R.tolist() == [ANSWER] * 6 + [RECONSTRUCT] * 3 + [CONTINUE] * 3
        assert sequences.message_R.tolist() == [0, 1, 2, 2, 1, 0, 0, 1, 2, 3, 4, 5]
        assert batch.message_ids[name][:3] == table[f"{name}_context_ids"].to_pylist()[::2]
    (batch,) = collator(wire, {"data.send": "prompt"})(
        table, step=0
    )  # where the question is part of it
    assert batch.sequences["llama"].message_R.tolist() == [0, 1, 2, 3, 4, 5]


def test_pretraining_on_texts_asks_nothing(wire: LatentWire, table: pa.Table) -> None:
    values = {"losses.answer_ce_weight": 0.0, "losses.reconstruction_ce_weight": 1.0}
    (batch,) = collator(wire, values)(table.slice(0, 3), step=0)
    assert batch.sequences["llama"].control_R.tolist() == [RECONSTRUCT] * 3
    assert not batch.teacher


def test_a_text_is_no_sequence_of_a_step_in_which_it_has_no_weight(
    wire: LatentWire, table: pa.Table
) -> None:
    first, then = ({"kind": "step", "start": a, "end": 1 - a, "steps": 5} for a in (1.0, 0.0))
    values = {
        "training.alignment_steps": 2,
        "losses.reconstruction_ce_weight": 1.0,
        "losses.continuation_ce_weight": 1.0,
        "losses.schedules": {
            "reconstruction_ce_weight": first,
            "continuation_ce_weight": first,
            "answer_ce_weight": then,
        },
    }
    collate = collator(wire, values)
    for steps, controls in (((0, 1, 2, 6), {RECONSTRUCT, CONTINUE}), ((7, 99), {ANSWER})):
        for step in steps:
            (batch,) = collate(table.slice(0, 3), step)
            assert set(batch.sequences["llama"].control_R.tolist()) == controls
            messages = 6 if CONTINUE in controls else 3  # beginnings of texts have their own
            assert len(batch.tokens.length_B) == messages


def test_a_stretch_is_said_again_after_a_cue(wire: LatentWire, table: pa.Table) -> None:
    values = {
        "losses.answer_ce_weight": 0.0, "losses.reconstruction_ce_weight": 1.0,
        "losses.reconstruction_tokens": 4, "losses.reconstruction_cue": 3,
    }  # fmt: skip
    collate, found = collator(wire, values), set()
    for step in range(30):
        (batch,) = collate(table.slice(0, 1), step)
        sequences, text = batch.sequences["llama"], batch.message_ids["llama"][0]
        said = sequences.target_N.tolist()
        (start,) = [place for place in range(len(text) - 3) if text[place : place + 4] == said]
        found.add(start)
        before = text[max(0, start - 3) : start]
        prompt = sequences.ids_BS[0].tolist()
        control = sequences.control_BS[0].tolist().index(True)
        assert prompt[control + 1 :] == before + said and sequences.offset_N.tolist() == [
            0,
            1,
            2,
            3,
        ]
        assert torch.equal(
            sequences.target_N, collate(table.slice(0, 1), step)[0].sequences["llama"].target_N
        )
    assert len(found) > 5 and len(text) - 4 >= max(found)


def test_messages_shrink_to_their_own_length(wire: LatentWire, table: pa.Table) -> None:
    values = {
        "encoder.pooling": "spans", "encoder.latent_len": 3, "training.alignment_steps": 5, "training.coarsening_steps": 10,
    }  # fmt: skip
    wire = LatentWire(with_values(wire.run, values))
    collate = TrainingCollator(wire.run, wire.builders, wire.interlingua.encoder)

    def slots(step: int) -> list[int]:
        (batch,) = collate(table.slice(0, 2), step)
        assert (
            wire.interlingua.encode(batch.tokens).slots("qwen")
            == batch.sequences["qwen"].latents_BS.sum(1).tolist()
        )
        return batch.sequences["qwen"].latents_BS.sum(1).tolist()

    words = [len(context.split()) for context in table["context"].to_pylist()[:2]]
    assert slots(0) == slots(5) == words
    assert all(3 < now < before for now, before in zip(slots(10), slots(5), strict=True))
    assert slots(15) == slots(99) == [3, 3]


def test_each_step_draws_its_messages_length(
    wire: LatentWire, run: RunConfig, table: pa.Table
) -> None:
    sized = with_values(
        run, {"encoder.tokens_per_latent": 4, "training.tokens_per_latent": (2, 4, 8)}
    )
    encoder = InterlinguaEncoder(sized.encoder, {})
    collate = TrainingCollator(sized, wire.builders, encoder)
    plain = {
        size: encoder.tokens_of(encoder.token_ids(["x" * 64]), None, size).latents_B
        for size in (2, 4, 8)
    }
    assert plain[2] > plain[4] > plain[8]
    found = set()
    for step in range(20):
        (batch,), (again,) = collate(table.slice(0, 3), step), collate(table.slice(0, 3), step)
        assert torch.equal(batch.tokens.latents_B, again.tokens.latents_B)
        found.add(tuple(batch.tokens.latents_B.tolist()))
    lengths = batch.tokens.length_B
    assert found == {tuple((-(-lengths // size)).tolist()) for size in (2, 4, 8)}


def test_an_evaluation_has_messages_of_their_own_length(
    wire: LatentWire, run: RunConfig, table: pa.Table
) -> None:
    values = {
        "encoder.tokens_per_latent": 4,
        "training.tokens_per_latent": (2, 8),
        "training.coarsening_steps": 50,
    }
    sized = with_values(run, values)
    encoder = InterlinguaEncoder(sized.encoder, {})
    collate = TrainingCollator(sized, wire.builders, encoder)
    for step in (0, 20, 99):
        (batch,) = collate(table.slice(0, 3), step, own_length=True)
        assert batch.tokens.latents_B.tolist() == (-(-batch.tokens.length_B // 4)).tolist()


def test_drawn_lengths_need_messages_that_grow(run: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"tokens_per_latent \(2, 4\) needs messages that grow"):
        with_values(run, {"training.tokens_per_latent": (2, 4)})
    with pytest.raises(ConfigError, match="must be ≥ 1, got 0"):
        with_values(run, {"encoder.tokens_per_latent": 4, "training.tokens_per_latent": (0, 4)})


def test_micro_batches_share_out_all_rows(wire: LatentWire, table: pa.Table) -> None:
    parts = collator(wire, {"training.accumulation": 3})(table.slice(0, 8), step=0)
    assert [len(part.message_ids["llama"]) for part in parts] == [3, 3, 2]
    assert len(collator(wire, {"training.accumulation": 9})(table.slice(0, 2), step=0)) == 2


@pytest.mark.parametrize("text", ["Ada lives in Oslo and works as a baker.", "a b c d"])
def test_texts_are_cut_before_a_word_and_nothing_is_lost(text: str) -> None:
    cuts = {cut(text, str(row)) for row in range(50)}
    assert all(
        before + after == text and after.startswith(" ") and before for before, after in cuts
    )
    assert len(cuts) > 1
    assert cut(text, "7") == cut(text, "7")
    assert cut("too short", "7") is None


def test_padding_is_counted(wire: LatentWire, table: pa.Table) -> None:
    batches = collator(wire, {})(table.slice(0, 8), step=0)
    padded, positions = padding(batches)
    rows = [batch.attention_BS for batch in batches[0].sequences.values()]
    assert positions == sum(row.numel() for row in rows)
    assert padded == sum(int((row == 0).sum()) for row in rows) > 0
    assert padding(collator(wire, {})(table.slice(0, 1), step=0))[0] == 0


def test_ids_of_shards_are_those_of_the_texts(run: RunConfig, table: pa.Table) -> None:
    """An encoder with a vocabulary reads ``encoder_ids`` where they are, and the same messages come out."""
    for split in ("none", "lines"):
        values = {"encoder.kind": "lm", "encoder.model": "receiver:llama", "encoder.split": split,
                  "encoder.pooling": "spans", "encoder.tokens_per_latent": 4}  # fmt: skip
        encoder = LatentWire(with_values(run, values)).interlingua.encoder
        ids = encoder.token_ids(table["context"].to_pylist())
        told, texts = encoder.tokens_of(ids), encoder.tokenize(table["context"].to_pylist())
        assert all(torch.equal(told.tensors[name], texts.tensors[name]) for name in texts.tensors)
        collate = TrainingCollator(with_values(run, values), LatentWire(run).builders, encoder)
        columns = table.drop_columns(["context"]).append_column("encoder_ids", pa.array(ids))
        read = collate(columns, step=0)[0].tokens
        assert (
            torch.equal(read.tensors["ids_WT"], texts.tensors["ids_WT"])
            and read.parts == texts.parts
        )
