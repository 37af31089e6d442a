"""What one step is made of, told from the rows by hand."""

from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch

from latentwire.config import RunConfig
from latentwire.config.resolve import with_values
from latentwire.data.batches import (
    TrainingBatch,
    TrainingCollator,
    cut,
    once,
    padding,
    sender_texts,
)
from latentwire.model import LatentWire
from latentwire.prompts.batch import Batch, collate
from tests.conftest import shard_table


def collator(wire: LatentWire, values: dict) -> TrainingCollator:
    return TrainingCollator(with_values(wire.run, values), wire.builders, wire.interlingua.encoder)


def test_texts_are_encoded_once_and_known_by_all_their_parts() -> None:
    assert once([["a"], ["b"], ["a"], ["b"], ["c"]]) == ([0, 1, 0, 1, 2], [0, 1, 4])
    assert once([[[1, 2]], [[1], [2]], [[1, 2]]]) == (
        [0, 1, 0],
        [0, 1],
    )  # two lines are another text than one
    assert once([]) == ([], [])


def test_a_cut_falls_between_three_and_eight_tenths_of_the_words() -> None:
    """Each place about as often as any other, over a text of 21 words."""
    text = " ".join(f"w{number}" for number in range(21))
    counts = dict.fromkeys(range(21), 0)
    for row in range(2_000):
        before, after = cut(text, f"row {row}") or ("", "")
        assert before + after == text and after[0] == " "
        counts[len(before.split())] += 1
    reached = [words for words, count in counts.items() if count]
    assert reached == list(range(7, 17))  # 20 gaps: from the 7th, at a share of 0.3, to before 0.8
    assert max(counts.values()) < 2 * min(counts[words] for words in reached)
    assert cut("a b c", "r") is None and cut("a b c d", "r") is not None and cut("", "r") is None
    assert cut("a  b\nc\td", "x") in {("a ", " b\nc\td"), ("a  b", "\nc\td"), ("a  b\nc", "\td")}


def test_a_continuation_is_of_the_texts_that_have_one(wire: LatentWire, table: pa.Table) -> None:
    """A text of three words is said again, but is not continued."""
    rows = table.slice(0, 3)
    short = ["too short text", *rows["context"].to_pylist()[1:]]
    rows = rows.set_column(rows.column_names.index("context"), "context", pa.array(short))
    values = {"losses.continuation_ce_weight": 1.0, "losses.reconstruction_ce_weight": 1.0}
    (batch,) = collator(wire, values)(rows, step=0)
    for name, sequences in batch.sequences.items():
        assert sequences.message_R.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
        assert len(batch.message_ids[name]) == 5
        for place, row in enumerate((1, 2)):
            parts = cut(short[row], rows["id"][row].as_py())
            assert parts is not None
            before, after = wire.builders[name].tokenize(list(parts), [], [])["context_ids"]
            assert batch.message_ids[name][3 + place] == before
            assert sequences.target_N[sequences.row_N == 6 + place].tolist() == after


def test_teachers_read_the_texts_in_the_order_of_the_answers(
    wire: LatentWire, table: pa.Table
) -> None:
    rows = table.slice(0, 4)
    assert not collator(wire, {})(rows, 0)[0].teacher
    for values in ({"losses.kd_weight": 1.0}, {"losses.hidden_kd_weight": 1.0}):
        (batch,) = collator(wire, values)(rows, 0)
        assert batch.teacher.keys() == {"llama", "qwen"}
        for name, told in batch.teacher.items():
            assert isinstance(told, Batch)
            columns = [
                rows[f"{name}_{piece}_ids"].to_pylist()
                for piece in ("context", "question", "answer")
            ]
            expected = collate(
                [wire.builders[name].text(*pieces) for pieces in zip(*columns, strict=True)]
            )
            assert torch.equal(told.ids_BS, expected.ids_BS) and not told.slots_BS.any()
            assert torch.equal(told.target_N, batch.sequences[name].target_N)


def test_coarsening_begins_fine_and_ends_after_its_steps(wire: LatentWire) -> None:
    values = {
        "training.alignment_steps": 4,
        "training.coarsening_steps": 8,
        "training.coarsening_from": 2.0,
    }
    values |= {"encoder.pooling": "spans", "encoder.latent_len": 3}
    made = collator(wire, values)
    shares = [found.share if (found := made._coarsening(step)) else None for step in range(14)]
    assert shares == [0.0] * 5 + [number / 8 for number in range(1, 8)] + [None] * 2
    assert (
        made._coarsening(0).tokens_per_latent == 2.0 and collator(wire, {})._coarsening(0) is None
    )  # type: ignore[union-attr]


def test_lengths_are_drawn_by_seed_and_step_as_often_as_each_other(
    run: RunConfig, wire: LatentWire
) -> None:
    sized = with_values(
        run, {"encoder.tokens_per_latent": 4, "training.tokens_per_latent": (2, 4, 8)}
    )

    def drawn(seed: int) -> list[int | None]:
        made = TrainingCollator(
            with_values(sized, {"training.seed": seed}), wire.builders, wire.interlingua.encoder
        )
        return [made._tokens_per_latent(step) for step in range(600)]

    first = drawn(1)
    assert first == drawn(1) != drawn(2) and set(first) == {2, 4, 8}
    assert min(first.count(size) for size in (2, 4, 8)) > 150
    assert collator(wire, {})._tokens_per_latent(3) is None


def test_a_stretch_may_begin_anywhere_and_its_cue_stands_before_it(wire: LatentWire) -> None:
    values = {
        "losses.reconstruction_ce_weight": 1.0,
        "losses.reconstruction_tokens": 4,
        "losses.reconstruction_cue": 2,
    }
    made = collator(wire, values)
    found: set[int] = set()
    for number in range(200):
        said, given = made._stretch(list(range(10)), f"row {number}")
        assert said == list(range(said[0], said[0] + given + 4)) and given == min(2, said[given])
        found.add(said[given])
    assert found == set(range(7))
    assert made._stretch(list(range(4)), "r") == (list(range(4)), 0)
    assert len(made._stretch(list(range(5)), "r")[0]) <= 5
    assert collator(wire, {"losses.reconstruction_ce_weight": 1.0})._stretch(
        list(range(99)), "r"
    ) == (
        list(range(99)),
        0,
    )


def test_accumulated_rows_are_those_of_the_whole_in_order(run: RunConfig, wire: LatentWire) -> None:
    table = shard_table(run, 7)
    parts = collator(wire, {"training.accumulation": 3})(table, 0)
    (whole,) = collator(wire, {})(table, 0)
    targets = torch.cat([part.sequences["qwen"].target_N for part in parts])
    assert [len(part.message_ids["qwen"]) for part in parts] == [3, 3, 1]
    assert torch.equal(targets, whole.sequences["qwen"].target_N)


def test_a_sender_reads_what_is_sent(run: RunConfig) -> None:
    rows = {"context": ["a", "b"], "question": ["x", "y"]}
    assert sender_texts("context", rows) == ["a", "b"]
    assert sender_texts("prompt", rows) == ["a\nQuestion: x", "b\nQuestion: y"]


@pytest.mark.parametrize("widths", [[(3, 5)], [(2, 4), (4, 4)]])
def test_padding_is_what_attention_leaves_out(widths: list[tuple[int, int]]) -> None:
    batches: list[TrainingBatch] = []
    for filled, width in widths:
        attention = torch.zeros(2, width, dtype=torch.long)
        attention[0] = 1
        attention[1, :filled] = 1
        held = SimpleNamespace(attention_BS=attention)
        batches.append(SimpleNamespace(sequences={"a": held, "b": held}))  # type: ignore[arg-type]
    expected = sum(2 * (width - filled) for filled, width in widths)
    assert padding(batches) == (expected, sum(4 * width for _, width in widths))
    assert padding([]) == (0, 0)
