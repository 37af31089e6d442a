"""Text and latent prompts are the same sequence with other things in one place."""

import pytest
import torch
from tokenizers.normalizers import Replace

from latentwire.config import PromptConfig, ReceiverConfig, RunConfig
from latentwire.data.shards import builders
from latentwire.pretrained.weights import load_tokenizer
from latentwire.prompts.batch import collate
from latentwire.prompts.sequences import PromptBuilder, PromptError, sender_text

CONTEXT, QUESTION, ANSWER = "Ada lives in Oslo.", "Where is the home of Ada?", "Oslo"


@pytest.fixture(params=["llama", "qwen"])
def builder(request: pytest.FixtureRequest) -> PromptBuilder:
    return builders(RunConfig())[request.param]


def pieces(builder: PromptBuilder, context: str = CONTEXT, question: str = QUESTION) -> tuple:
    return tuple(column[0] for column in builder.tokenize([context], [question], [ANSWER]).values())


def test_everything_but_the_message_is_equal_token_by_token(builder: PromptBuilder) -> None:
    context, question, answer = pieces(builder)
    text, latent = builder.text(context, question, answer), builder.latent(5, question, answer)
    assert [text.ids[i] for i in text.message] == context
    assert len(latent.message) == 5
    assert text.ids[: text.message.start] == latent.ids[: latent.message.start]
    assert text.ids[text.message.stop :] == latent.ids[latent.message.stop :]


def test_index_maps_point_at_what_they_name(builder: PromptBuilder) -> None:
    _, question, answer = pieces(builder)
    built = builder.latent(3, question, answer)
    decode = builder.tokenizer.decode
    assert decode([built.ids[i] for i in built.question]).strip() == QUESTION
    assert decode([built.ids[i] for i in built.anchor]) == "Answer:"
    assert decode([built.ids[i] for i in built.answer]) == " Oslo"
    assert built.stop == len(built.ids) - 1
    assert built.ids[built.stop] == builder.stop_id
    assert builder.stop_id in builder.stop_ids


def test_bos_stands_once_at_position_zero() -> None:
    both = builders(RunConfig())
    llama = both["llama"]
    built = llama.text(*pieces(llama))
    bos = llama.tokenizer.bos_token_id
    assert built.bos == 0 and built.ids[0] == bos and built.ids.count(bos) == 1
    assert both["qwen"].text(*pieces(both["qwen"])).bos is None


def test_bos_that_does_not_exist_is_refused() -> None:
    receiver = ReceiverConfig(name="qwen", model="toy-qwen", bos="yes")
    with pytest.raises(PromptError, match="needs a tokenizer with a BOS token"):
        PromptBuilder(load_tokenizer(receiver), receiver, PromptConfig(), "context")


@pytest.mark.parametrize(
    ("change", "knobs", "message"),
    [
        ({"eos_token": None}, {}, "must have an EOS token, it has none"),
        ({"chat_template": "{{ messages[0].content }} {{ messages[0].content }}"}, {"template": "chat"},
         "must write the user's text once, unchanged"),
        ({}, {"template": "plain", "bos": "yes", "instruction": "Read <s> this"}, "BOS must stand once, at position 0, got 2"),
    ],
)  # fmt: skip
def test_tokenizers_that_cannot_be_read_from_are_refused(
    change: dict, knobs: dict, message: str
) -> None:
    receiver = ReceiverConfig(name="llama", model="toy-llama", **knobs)
    tokenizer = load_tokenizer(receiver)
    for name, value in change.items():
        setattr(tokenizer, name, value)
    with pytest.raises(PromptError, match=message):
        PromptBuilder(tokenizer, receiver, PromptConfig(), "context")


def test_a_plain_prompt_needs_lines_that_end_with_one_token() -> None:
    receiver = ReceiverConfig(name="llama", model="toy-llama", template="plain")
    tokenizer = load_tokenizer(receiver)
    tokenizer.backend_tokenizer.normalizer = Replace("\n", "!?")
    with pytest.raises(
        PromptError, match=r"needs a newline that is one token, toy-llama gives \[\d+, \d+\]"
    ):
        PromptBuilder(tokenizer, receiver, PromptConfig(), "context")


def test_chat_without_a_template_is_refused() -> None:
    receiver = ReceiverConfig(name="llama", model="toy-llama", template="chat")
    with pytest.raises(PromptError, match="needs a tokenizer with a chat template"):
        PromptBuilder(load_tokenizer(receiver), receiver, PromptConfig(), "context")


TURNS = (
    "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


def test_a_chat_turn_ends_with_the_templates_own_token_and_begins_as_it_is_told() -> None:
    receiver = ReceiverConfig(name="llama", model="toy-llama", template="chat")
    tokenizer = load_tokenizer(receiver)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>", "<turn>"]})
    tokenizer.chat_template = TURNS
    built = PromptBuilder(tokenizer, receiver, PromptConfig(), "context")
    end, eos, bos = (
        tokenizer.convert_tokens_to_ids("<end>"),
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
    )
    assert built.stop_id == end and built.stop_ids == (end, eos) and built.head_ids[0] == bos
    tokenizer.chat_template = TURNS.replace("<end>", "")  # a turn that ends with its line
    assert PromptBuilder(tokenizer, receiver, PromptConfig(), "context").stop_ids == (eos,)
    without = receiver.model_copy(update={"bos": "no"})
    assert bos not in PromptBuilder(tokenizer, without, PromptConfig(), "context").head_ids


def test_special_tokens_in_a_users_text_stay_text(builder: PromptBuilder) -> None:
    hostile = f"Ada {builder.tokenizer.eos_token} lives"
    context, _, _ = pieces(builder, context=hostile)
    assert builder.tokenizer.eos_token_id not in context
    assert builder.tokenizer.decode(context) == hostile


def test_anchor_that_merges_with_the_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = RunConfig().receivers[0]
    builder = PromptBuilder(
        load_tokenizer(receiver), receiver, PromptConfig(anchor="Answer: Os"), "context"
    )
    # " Oslo" is one token: as anchor " Os" and answer "lo" the model would never have seen it written so.
    assert builder.check_boundaries(
        ["lo", "!"], builder.tokenize([], [], ["lo", "!"])["answer_ids"]
    ) == [False, True]
    monkeypatch.setattr("latentwire.prompts.sequences._PROBE_ANSWERS", ("lo",))
    with pytest.raises(PromptError, match="end the anchor with a space or a newline"):
        PromptBuilder(builder.tokenizer, receiver, PromptConfig(anchor="Answer: Os"), "context")


def test_anchor_white_space_goes_with_the_answer(builder: PromptBuilder) -> None:
    joint = builder.tokenizer("Answer: Oslo", add_special_tokens=False).input_ids
    _, question, answer = pieces(builder)
    built = builder.latent(1, question, answer)
    assert built.ids[built.anchor.start : built.answer.stop] == joint


def test_a_control_stands_between_message_and_text(builder: PromptBuilder) -> None:
    context, question, _ = pieces(builder)
    built = builder.controlled(4, 1, context)
    assert [built.ids[i] for i in built.supervised] == context
    assert built.supervised.start == built.message.stop + 1
    batch = collate([built, builder.latent(4, question, context)], messages=[7, 0])
    assert batch.control_N.tolist() == [1] * len(context) + [-1] * (len(context) + 1)
    assert batch.latents_BS.sum(1).tolist() == [4, 4] and batch.control_BS.sum(1).tolist() == [1, 0]
    assert int(batch.control_BS[0].nonzero()) == built.message.stop
    assert batch.message_R.tolist() == [7, 0]
    assert batch.ids_BS[batch.question_BS].tolist() == question


def test_send_prompt_replaces_the_question_too() -> None:
    receiver = RunConfig().receivers[0]
    builder = PromptBuilder(load_tokenizer(receiver), receiver, PromptConfig(), "prompt")
    context, question, answer = pieces(builder)
    text, latent = builder.text(context, question, answer), builder.latent(2, question, answer)
    assert not latent.question
    assert text.ids[text.message.stop :] == latent.ids[latent.message.stop :]
    assert QUESTION in builder.tokenizer.decode([text.ids[i] for i in text.message])
    assert sender_text("prompt", CONTEXT, QUESTION) == f"{CONTEXT}\nQuestion: {QUESTION}"
    assert sender_text("context", CONTEXT, QUESTION) == CONTEXT


@pytest.mark.parametrize("side", ["right", "left"])
def test_collate_supervises_answers_and_stops_and_nothing_else(
    builder: PromptBuilder, side: str
) -> None:
    context, question, answer = pieces(builder)
    rows = [builder.text(context, question, answer), builder.text([], question, answer)]
    batch = collate(rows, side=side)
    assert batch.attention_BS.sum(1).tolist() == [len(row.ids) for row in rows]
    assert batch.target_N.tolist() == 2 * [*answer, builder.stop_id]
    assert batch.row_N.tolist() == [0] * (len(answer) + 1) + [1] * (len(answer) + 1)
    assert batch.offset_N.tolist() == 2 * list(range(len(answer) + 1))
    # The token after each predicting position is its target: a shift by one anywhere breaks this.
    following = batch.ids_BS.flatten()[batch.predict_N + 1]
    assert torch.equal(following, batch.target_N)
    assert not batch.slots_BS.any()


def test_what_ends_with_its_message_has_nothing_after_it(builder: PromptBuilder) -> None:
    context, _, _ = pieces(builder)
    for built, count in (
        (builder.message_alone(4), 4),
        (builder.text_alone(context, prefix=2), len(context)),
    ):
        end = len(built.ids)
        assert built.message == range(end - count, end) and built.stop is None
        for after in (built.question, built.anchor, built.answer, built.supervised):
            assert (after.start, after.stop) == (end, end)
