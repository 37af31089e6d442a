"""Rows of a batch are parted into what they begin with and what follows, token by token."""

import pytest
import torch

from latentwire.config import RunConfig
from latentwire.data.shards import builders
from latentwire.prompts.batch import Batch, collate
from latentwire.prompts.sequences import PromptSequence

CONTEXTS = ("Ada lives in Oslo.", "Ada lives in Oslo.", "Ben owns a goat. Cleo owns a cat.")
QUESTIONS = ("Where?", "Where is the home of Ada, and of nobody else?", "What does Ben own?")
ANSWERS = ("Oslo", "in Oslo", "a goat")
MESSAGES = [0, 0, 1]


@pytest.fixture(scope="module")
def rows(run: RunConfig) -> list[PromptSequence]:
    builder = builders(run)["llama"]
    columns = builder.tokenize(list(CONTEXTS), list(QUESTIONS), list(ANSWERS))
    return [builder.text(*pieces) for pieces in zip(*columns.values(), strict=True)]


def real(batch: Batch) -> list[list[int]]:
    """Each row's ids without padding."""
    pairs = zip(batch.ids_BS, batch.attention_BS, strict=True)
    return [ids_S[attention_S.bool()].tolist() for ids_S, attention_S in pairs]


@pytest.mark.parametrize("side", [None, "right", "left"])
def test_what_follows_a_message_is_padded_on_the_side_that_is_asked_for(
    rows: list[PromptSequence], side: str | None
) -> None:
    """To the right unless something else is asked for; each target is predicted where it was."""
    batch = collate(rows, messages=MESSAGES)
    parts = batch.parted() if side is None else batch.parted(side)
    assert parts is not None
    begun, rest = parts
    assert real(begun) == [rows[row].ids[: rows[row].message.stop] for row in (0, 2)]
    assert real(rest) == [row.ids[row.message.stop :] for row in rows]
    assert rest.past_R is not None and rest.past_R.tolist() == MESSAGES
    width = rest.ids_BS.shape[1]
    for number, row in enumerate(rows):
        padding = width - (len(row.ids) - row.message.stop)
        shift = padding if side == "left" else 0
        ones = [0] * shift + [1] * (width - padding) + [0] * (padding - shift)
        assert rest.attention_BS[number].tolist() == ones
        places = rest.predict_N[rest.row_N == number] % width
        expected = [place - 1 - row.message.stop + shift for place in row.supervised]
        assert places.tolist() == expected
    alone = batch.going_on(torch.tensor(MESSAGES), *([] if side is None else [side]))
    assert torch.equal(alone.ids_BS, rest.ids_BS)
    assert torch.equal(alone.predict_N, rest.predict_N)


def test_one_row_of_a_batch_predicts_nothing(rows: list[PromptSequence]) -> None:
    batch = collate(rows, messages=MESSAGES)
    for number, row in enumerate(rows):
        one = batch.row(number)
        assert real(one) == [row.ids] and one.ids_BS.shape == (1, batch.ids_BS.shape[1])
        assert one.end_R is not None and one.end_R.tolist() == [row.message.stop]
        assert (one.message_R.tolist(), one.control_R.tolist()) == (
            [MESSAGES[number]],
            [int(batch.control_R[number])],
        )
        for name in ("prefix_BS", "latents_BS", "control_BS"):
            assert torch.equal(getattr(one, name), getattr(batch, name)[number : number + 1])
        nothing = (one.predict_N, one.target_N, one.offset_N, one.row_N)
        assert [len(tensor_N) for tensor_N in nothing] == [0] * 4
        assert (one.head, one.prefix) == (batch.head, batch.prefix)
