"""What the index maps of joined, shortened and padded batches point at, against sequences laid out by hand."""

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from latentwire.config import PromptConfig, ReceiverConfig, RunConfig
from latentwire.data.shards import builders
from latentwire.pretrained.weights import load_tokenizer
from latentwire.prompts.batch import Batch, collate, join
from latentwire.prompts.sequences import (
    ANSWER,
    CONTINUE,
    RECONSTRUCT,
    PromptBuilder,
    PromptSequence,
)


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    return builders(RunConfig())["llama"]


def built(
    builder: PromptBuilder, context: str, question: str, answer: str
) -> tuple[list[int], ...]:
    return tuple(column[0] for column in builder.tokenize([context], [question], [answer]).values())


@pytest.fixture(scope="module")
def sequences(builder: PromptBuilder) -> list[PromptSequence]:
    """Two batches' worth: answers and controls, of several lengths."""
    _, question, answer = built(builder, "", "Where is the home of Ada?", "Oslo")
    said, short, _ = built(builder, "Ada lives in Oslo with Bo.", "Who?", "")
    return [
        builder.latent(3, question, answer),
        builder.controlled(2, RECONSTRUCT, said, given=2),
        builder.latent(1, short, answer),
        builder.controlled(4, CONTINUE, said[:3]),
        builder.latent(6, question, [*answer, *answer]),
    ]


def same(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        equal = torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        assert equal, f"{field.name}: {mine} is not {theirs}"


@pytest.mark.parametrize("side", ["right", "left"])
def test_joined_batches_are_the_batch_of_all_their_rows(
    sequences: list[PromptSequence], side: str
) -> None:
    parts = [(sequences[:2], [2, 0]), (sequences[2:3], [0]), (sequences[3:], [2, 2])]
    batches = [collate(rows, side=side, messages=messages) for rows, messages in parts]
    whole = collate(sequences, side=side, messages=[2, 0, 3, 6, 6])
    same(join(batches, side=side), whole)
    assert (
        len({batch.ids_BS.shape[1] for batch in batches}) == 3
    )  # each is padded, on whichever side
    assert join(batches[:1], side=side) is batches[0]


def test_a_head_is_what_every_row_begins_with_and_nobody_is_asked_for(
    builder: PromptBuilder, sequences: list[PromptSequence]
) -> None:
    head = len(builder.head_ids)
    assert head > 2
    assert (
        collate(sequences).head == collate(sequences[:1]).head == head
        and collate(sequences, side="left").head == 0
    )
    # A target that stands first in its row leaves nothing before the position that predicts it.
    early = PromptSequence(
        [5, 6, 7], None, range(2, 3), *3 * [range(3, 3)], None, range(1, 3), True
    )
    assert collate([early]).head == 0 and collate([early, *sequences]).head == 0
    nothing = PromptSequence([5, 6, 7], None, range(2, 3), *3 * [range(3, 3)], None, range(0), True)
    assert collate([nothing]).head == 2
    other = collate(
        [
            PromptSequence(
                [9, *nothing.ids], None, range(3, 4), *3 * [range(4, 4)], None, range(0), True
            )
        ]
    )
    assert join([collate([nothing]), other]).head == 0  # heads of different tokens
    assert join([collate([nothing]), collate([nothing])]).head == 2


def test_without_its_head_a_batch_predicts_the_same_tokens(
    builder: PromptBuilder, sequences: list[PromptSequence]
) -> None:
    whole = collate(sequences)
    cut, width = whole.after_head(), whole.ids_BS.shape[1] - whole.head
    assert cut.head == 0 and cut.head_H is not None and cut.head_H.tolist() == builder.head_ids
    assert cut.ids_BS.shape == (5, width) and cut.attention_BS.shape == whole.attention_BS.shape
    assert torch.equal(torch.cat((cut.head_H.expand(5, -1), cut.ids_BS), 1), whole.ids_BS)
    row_N, place_N = cut.predict_N // width, cut.predict_N % width
    assert torch.equal(row_N, whole.row_N)
    assert torch.equal(cut.ids_BS[row_N, place_N + 1], whole.target_N)
    for name in ("latents_BS", "control_BS", "question_BS"):
        before = getattr(whole, name)
        assert (
            torch.equal(getattr(cut, name), before[:, whole.head :])
            and not before[:, : whole.head].any()
        )


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_mask_marks_what_it_names(sequences: list[PromptSequence], side: str) -> None:
    batch = collate(sequences, side=side)
    width = batch.ids_BS.shape[1]
    for index, row in enumerate(sequences):
        ids = batch.ids_BS[index].tolist()
        missing = width - len(row.ids)
        real = [place for place in range(width) if batch.attention_BS[index, place]]
        assert real == list(range(missing, width) if side == "left" else range(len(row.ids)))
        assert [ids[place] for place in real] == row.ids and sum(ids) == sum(row.ids)
        shift = real[0]
        assert batch.latents_BS[index].nonzero()[:, 0].tolist() == [
            shift + place for place in row.message
        ]
        assert batch.question_BS[index].nonzero()[:, 0].tolist() == [
            shift + place for place in row.question
        ]
        controls = [] if row.control == ANSWER else [shift + row.message.stop]
        assert batch.control_BS[index].nonzero()[:, 0].tolist() == controls
        asked = [row.ids[place] for place in row.supervised]
        assert batch.target_N[batch.row_N == index].tolist() == asked
        assert batch.offset_N[batch.row_N == index].tolist() == list(range(len(asked)))
    assert batch.message_R.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(batch.slots_BS, batch.latents_BS | batch.control_BS)
    assert batch.target_N.tolist() == batch.ids_BS.flatten()[batch.predict_N + 1].tolist()
    texts = PromptSequence(
        [5, 6, 7], 0, range(1, 2), range(2, 3), *2 * [range(3, 3)], None, range(0), False
    )
    assert not collate([texts]).latents_BS.any()  # a text's message is read as it is
    assert (
        collate([texts]).predict_N.dtype == collate([texts]).target_N.dtype == torch.long
    )  # an index, of nothing


def test_a_text_that_is_said_again_is_asked_for_after_its_cue(builder: PromptBuilder) -> None:
    row = builder.controlled(2, CONTINUE, [11, 12, 13, 14], given=3)
    head = len(builder.head_ids)
    assert row.ids == [*builder.head_ids, 0, 0, 0, 11, 12, 13, 14]
    assert (row.message, row.supervised) == (range(head, head + 2), range(head + 6, head + 7))
    assert row.soft and row.control == CONTINUE and row.stop is None and row.bos == builder.bos == 0
    assert not row.question and not row.anchor and not row.answer


def test_a_prompt_to_be_answered_ends_with_its_anchor(builder: PromptBuilder) -> None:
    context, question, answer = built(builder, "Ada lives in Oslo.", "Where?", "Oslo")
    asked, answered = builder.text(context, question), builder.text(context, question, answer)
    assert answered.ids == [*asked.ids, *answer, builder.stop_id]
    assert asked.stop is None and not asked.supervised and not asked.answer and not asked.soft
    assert asked.answer.start == len(asked.ids) == asked.anchor.stop
    assert answered.supervised == range(len(asked.ids), len(answered.ids))
    assert (
        answered.answer == range(len(asked.ids), len(answered.ids) - 1)
        and answered.stop == len(answered.ids) - 1
    )
    assert builder.text(context, question, []).supervised == range(
        len(asked.ids), len(asked.ids) + 1
    )  # the stop alone
    closed = builder.text([], question)
    assert (
        closed.ids == [*asked.ids[: asked.message.start], *asked.ids[asked.message.stop :]]
        and not closed.message
    )
    assert builder.latent(2, question).soft and builder.latent(2, question).supervised == range(0)


def plain(send: str = "context", **knobs: str) -> PromptBuilder:
    receiver = ReceiverConfig(name="llama", model="toy-llama", template="plain", **knobs)
    return PromptBuilder(load_tokenizer(receiver), receiver, PromptConfig(), send)  # type: ignore[arg-type]


def test_a_plain_prompt_reads_as_it_is_written_down() -> None:
    for knobs, lead in (({}, ""), ({"instruction": "Read this."}, "Read this.\n")):
        for send in ("context", "prompt"):
            builder = plain(send, **knobs)
            ids = builder.text(*built(builder, "Ada lives in Oslo.", "Where?", "Oslo")).ids
            said = builder.tokenizer.decode(ids)
            if send == "context":
                assert (
                    said == f"{lead}Passage:\nAda lives in Oslo.\nQuestion: Where?\nAnswer: Oslo\n"
                )
            else:
                assert said.startswith(f"{lead}Passage:\nAda lives in Oslo.\nQuestion: Where?")
                assert said.endswith("\nAnswer: Oslo\n")


def test_bos_is_as_the_receiver_is_told() -> None:
    automatic, without, always = plain(), plain(bos="no"), plain(bos="yes")
    # This tokenizer begins no text of its own with BOS.
    assert automatic.head_ids == without.head_ids
    assert always.head_ids == [without.tokenizer.bos_token_id, *without.head_ids]
    assert (automatic.bos, without.bos, always.bos) == (None, None, 0)
    tokenizer = load_tokenizer(always.receiver)
    begun = SimpleNamespace(input_ids=[tokenizer.bos_token_id, 5])

    class Beginning:
        """The same tokenizer, beginning each text that is not ours with BOS."""

        def __call__(
            self, text: str | list[str], add_special_tokens: bool = True, **options: Any
        ) -> Any:
            return (
                begun
                if add_special_tokens
                else tokenizer(text, add_special_tokens=False, **options)
            )

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    own = PromptBuilder(Beginning(), automatic.receiver, PromptConfig(), "context")
    assert own.head_ids == always.head_ids and own.bos == 0
    assert without.stop_ids == (without.newline_ids[0], without.tokenizer.eos_token_id)
    assert without.stop_id == without.newline_ids[0]


def test_equal_texts_have_equal_ids_in_their_places(builder: PromptBuilder) -> None:
    texts = ["Bo", "Ada", "Bo", "", "Ada"]
    ids = builder.tokenize(texts, texts, texts)
    for column in ids.values():
        assert column[0] == column[2] != column[1] == column[4]
    assert ids["context_ids"][3] == [] and builder.tokenizer.decode(ids["context_ids"][1]) == "Ada"
    assert builder.tokenizer.decode(ids["question_ids"][1]) == " Ada"
    assert builder.tokenize([], [], []) == {"context_ids": [], "question_ids": [], "answer_ids": []}


def test_a_batch_moves_whole(sequences: list[PromptSequence]) -> None:
    rows = torch.arange(len(sequences))
    batch = replace(collate(sequences).after_head(), past_R=rows, taught_R=rows > 0)
    batch = replace(batch, position_BS=batch.positions())
    same(batch.to("cpu"), batch)
    moved = batch.to("meta")
    counts = ("head", "prefix")
    tensors = [getattr(moved, field.name) for field in fields(Batch) if field.name not in counts]
    assert len(tensors) == 17 and all(tensor.is_meta for tensor in tensors)
