"""The public API: what a wire sends, and what its receivers answer."""

import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GenerationConfig

from latentwire.config import EncoderConfig, RunConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.dataset.toy import toy_rows
from latentwire.features.base import Feature
from latentwire.features.registry import FEATURES
from latentwire.message import Message, WireError, join
from latentwire.model import LatentWire
from tests.conftest import shaken, wire_of

ROWS = list(toy_rows(5, seed=3))
CONTEXTS = [row["context"] for row in ROWS]
QUESTIONS = [row["question"] for row in ROWS]


class LaterEncoder(EncoderConfig):
    """The section as a later version may have it."""

    further: float = 0.0
    """A knob that nobody has heard of yet."""


@pytest.mark.parametrize("receiver", ["llama", "qwen"])
@pytest.mark.parametrize(
    "values",
    [{}, {"features.refiner": {}}, {"encoder.tokens_per_latent": 4}, {"data.send": "prompt"}],
)
def test_whole_prompts_as_embeddings_give_our_own_answers(
    run: RunConfig, receiver: str, values: dict
) -> None:
    wire = shaken(LatentWire(with_values(run, values)))
    message = wire.encode(CONTEXTS, QUESTIONS)
    expected = wire.answer(message, QUESTIONS, receiver)
    assert (
        len(set(expected)) > 1 or "data.send" in values
    )  # where no text follows the message, an untrained one decides
    lm, stops = wire.receivers[receiver], wire.builders[receiver].stop_ids
    embeds = wire.prompt_embeds(message, QUESTIONS, receiver)
    assert [len(e_SD) for e_SD in embeds] == [
        len(p.ids) for p in wire._prompts(message, QUESTIONS, receiver)[1]
    ]
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=run.evaluation.max_answer_tokens,
        eos_token_id=list(stops),
        pad_token_id=stops[0],
    )
    for e_SD, answer in zip(embeds, expected, strict=True):  # one at a time: no padding, no mask
        ids = lm.lm.generate(inputs_embeds=e_SD[None], generation_config=settings)[0]
        text = lm.tokenizer.decode(ids, skip_special_tokens=True)
        assert text.strip().split("\n")[0].strip() == answer


@pytest.mark.parametrize(
    "feature", [name for name, kind in FEATURES.items() if kind.attached is not Feature.attached]
)
def test_what_acts_inside_a_receiver_is_no_embedding(run: RunConfig, feature: str) -> None:
    wire = LatentWire(with_values(run, {f"features.{feature}": {}}))
    with pytest.raises(ConfigError, match=f"prompt_embeds needs a wire .* got {feature}"):
        wire.prompt_embeds(wire.encode(CONTEXTS), QUESTIONS, "llama")


def test_a_packet_is_answered_as_its_message_and_another_encoders_is_refused(
    wire: LatentWire, run: RunConfig
) -> None:
    message = shaken(wire).encode(CONTEXTS)
    packet = message.to_bytes(bits=16)
    assert wire.answer(packet, QUESTIONS, "qwen") == wire.answer(
        wire.receive(packet), QUESTIONS, receiver="qwen"
    )
    assert (
        wire.receive(packet).encoder == message.encoder == wire.encoder_id
        and len(wire.encoder_id) == 32
    )
    other = LatentWire(with_values(run, {"training.seed": 9}))
    with pytest.raises(WireError, match="must come from encoder"):
        other.answer(packet, QUESTIONS, "qwen")
    wider = Message(torch.zeros(1, 2, 40), torch.tensor([2]), {}, wire.encoder_id)
    for message in (wider, replace(wider, encoder="")):
        with pytest.raises(WireError, match="latents must be 32 wide, got 40"):
            wire.answer(message, QUESTIONS[0], "qwen")
    with pytest.raises(WireError, match="latents must be 32 wide, got 40"):
        wire.receive(wider.to_bytes())
    with pytest.raises(ConfigError, match="receiver must be one of llama, qwen, got gpt"):
        wire.answer(packet, QUESTIONS, "gpt")
    with pytest.raises(
        ConfigError, match="each message takes one question, got 5 messages and 2 questions"
    ):
        wire.answer(packet, QUESTIONS[:2], "qwen")


def test_a_message_of_another_encoder_is_refused_as_its_packet_is(
    wire: LatentWire, run: RunConfig
) -> None:
    message = wire.encode(CONTEXTS)
    other = wire_of(with_values(run, {"training.seed": 9}))
    for ask in (
        lambda sent: other.answer(sent, QUESTIONS, "qwen"),
        lambda sent: other.prefill(sent, "qwen"),
        lambda sent: other.prompt_embeds(sent, QUESTIONS, "qwen"),
    ):
        with pytest.raises(WireError, match=f"from encoder {other.encoder_id}, got one of encoder"):
            ask(message)
        assert ask(replace(message, encoder=""))  # who knows its encoder no more is believed
    for given, kind in (("abc", "str"), (message, "Message"), (5, "int")):
        with pytest.raises(WireError, match=f"a packet must be bytes, got a {kind}"):
            wire.receive(given)  # type: ignore[arg-type]


def test_a_text_reader_sends_nothing(run: RunConfig) -> None:
    reader = wire_of(with_values(run, {"prompt.reads": "text", "prefix": {"tokens": 2}}))
    empty = Message(torch.zeros(1, 2, 32), torch.tensor([2]))
    for call in (
        lambda: reader.encode(CONTEXTS),
        lambda: reader.receive(empty.to_bytes()),
        lambda: reader.answer(empty, QUESTIONS[0], "qwen"),
        lambda: reader.prefill(empty, "qwen"),
    ):
        with pytest.raises(ConfigError, match=r"got a text reader \(prompt\.reads text\)"):
            call()


def test_a_text_alone_is_one_message_and_one_question(wire: LatentWire) -> None:
    message = shaken(wire).encode(CONTEXTS[0])
    assert len(message) == 1 and torch.equal(message.z_BLZ, wire.encode([CONTEXTS[0]]).z_BLZ)
    answers = wire.answer(message, QUESTIONS[0], "qwen")
    assert answers == wire.answer(message, [QUESTIONS[0]], "qwen") and len(answers) == 1
    (e_SD,) = wire.prompt_embeds(message.to_bytes(), QUESTIONS[0], "llama")
    assert len(e_SD) == len(wire.prompt_embeds(message, (q for q in QUESTIONS[:1]), "llama")[0])
    assert len(wire.encode(tuple(CONTEXTS))) == len(CONTEXTS)


WRONG = [
    ([], "must hold at least one text, got none"),
    (None, "must be a text or a list of texts, got None"),
    (b"bytes", "must be a text or a list of texts, got a bytes"),
    ({"a": "b"}, "must be a text or a list of texts, got a dict"),
    (7, "must be a text or a list of texts, got 7"),
    (["Ada lives in Oslo.", None], "must be texts that hold something, got None at 1"),
    (["Ada", ["lives"]], "must be texts that hold something, got a list at 1"),
    ("", "must be texts that hold something, got '' at 0"),
    ([" \n"], r"must be texts that hold something, got ' \\n' at 0"),
    (pd.DataFrame({"text": CONTEXTS}), "must be a text .* a DataFrame of 2 dimensions; name one column"),
    (np.array([CONTEXTS]), r"must be a text .* a ndarray of 2 dimensions; name one column, or give \.tolist"),
    ("Ada \ud800", "must be texts that UTF-8 can write, got a lone surrogate at 0"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "rule"), WRONG, ids=range(len(WRONG)))
def test_what_is_no_text_is_told_in_one_line(wire: LatentWire, given: object, rule: str) -> None:
    message = wire.encode(CONTEXTS[0])
    calls = [("contexts", lambda: wire.encode(given))]  # type: ignore[arg-type]
    calls += [("questions", lambda: wire.answer(message, given, "qwen"))]  # type: ignore[arg-type]
    calls += [("questions", lambda: wire.prompt_embeds(message, given, "llama"))]  # type: ignore[arg-type]
    if given is not None:  # which says that there are none
        calls += [("questions", lambda: wire.encode(CONTEXTS[0], given))]  # type: ignore[arg-type]
    for what, call in calls:
        with pytest.raises(ConfigError, match=f"{what} {rule}") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_one_column_of_a_table_is_texts(wire: LatentWire) -> None:
    table = pd.DataFrame({"context": CONTEXTS, "question": QUESTIONS})
    message = wire.encode(table["context"])
    assert torch.equal(message.z_BLZ, wire.encode(CONTEXTS).z_BLZ)
    assert wire.answer(message, np.array(QUESTIONS), "qwen") == wire.answer(
        message, QUESTIONS, "qwen"
    )
    assert len(wire.encode(np.str_("Ada lives in Oslo."))) == 1


def test_numbers_that_do_not_match_are_told_in_one_line(wire: LatentWire) -> None:
    with pytest.raises(
        ConfigError, match="each context takes one question, got 5 contexts and 2 questions"
    ):
        wire.encode(CONTEXTS, QUESTIONS[:2])
    for given in (None, [wire.encode(CONTEXTS[0])], "packet"):
        with pytest.raises(
            ConfigError, match="a message must be what encode gives, or its packet as bytes"
        ):
            wire.answer(given, QUESTIONS[0], "qwen")  # type: ignore[arg-type]


def test_a_context_that_is_longer_than_any_trained_on_is_warned_of(run: RunConfig) -> None:
    wire = wire_of(with_values(run, {"data.max_context_bytes": 20}))
    texts = ["Ada lives in Oslo.", "\u00e4" * 11]  # 22 bytes
    told = r"at most 20 bytes, .*\(data\.max_context_bytes\), got 1 longer, the longest of 22"
    with pytest.warns(UserWarning, match=told) as caught:
        assert len(wire.encode(texts)) == 2
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wire.encode(texts[0])


def test_what_no_answer_can_be_decoded_by_is_told(wire: LatentWire) -> None:
    message = wire.encode(CONTEXTS[0])
    prefilled = wire.prefill(message, "qwen")
    for given in (0, -1, 1.5, True, "3"):
        for ask in (partial(wire.answer, message, receiver="qwen"), prefilled.answer):
            with pytest.raises(ConfigError, match="max_new_tokens must be a whole number of at"):
                ask(questions=QUESTIONS[0], max_new_tokens=given)
    for ask in (partial(wire.answer, message, receiver="qwen"), prefilled.answer):
        with pytest.raises(ConfigError, match=r"sampling must be a Sampling, got 0\.7; give"):
            ask(questions=QUESTIONS[0], sampling=0.7)
    with pytest.raises(ConfigError, match=r"receiver must be one of llama, qwen, got \['qwen'\]"):
        wire.answer(message, QUESTIONS[0], ["qwen"])  # type: ignore[arg-type]


def test_messages_are_sent_without_dropout(run: RunConfig) -> None:
    wire = wire_of(with_values(run, {"encoder.latent_dropout": 0.5}))
    wire.interlingua.train()
    first = wire.encode(CONTEXTS)
    wire.interlingua.train()
    assert torch.equal(wire.encode(CONTEXTS).z_BLZ, first.z_BLZ) and bool((first.z_BLZ != 0).all())


def test_the_encoders_id_hangs_on_what_a_latent_means_and_on_nothing_else(
    wire: LatentWire, run: RunConfig
) -> None:
    first = wire.encoder_id
    same = {
        "encoder.latent_dropout": 0.5,
        "receivers": [run.receivers[1].model_dump()],
        "features.deep_prefix": {},
    }
    assert LatentWire(with_values(run, same)).encoder_id == first
    assert LatentWire(with_values(run, {"features.refiner": {}})).encoder_id != first
    later = run.model_copy(update={"encoder": LaterEncoder(**run.encoder.model_dump())})
    assert (
        LatentWire(later).encoder_id == first
    )  # a knob that a later version adds takes no packet away
    with torch.no_grad():
        wire.interlingua.encoder.project.bias += 1
    assert wire.encoder_id != first


def test_paragraphs_sent_apart_are_the_message_of_all_lines(run: RunConfig) -> None:
    wire = LatentWire(with_values(run, {"encoder.split": "lines"}))
    whole = wire.encode(["\n".join(CONTEXTS[:3])])
    joined = join([wire.receive(wire.encode([text]).to_bytes()) for text in CONTEXTS[:3]])
    torch.testing.assert_close(joined.z_BLZ, whole.z_BLZ, atol=2e-3, rtol=2e-3)
    assert joined.length_B.tolist() == whole.length_B.tolist()


def test_the_encoders_id_follows_weights_that_change_by_their_data(wire: LatentWire) -> None:
    """As averages of weights are laid into a model: torch counts no such change."""
    bias = wire.interlingua.encoder.project.bias
    before, kept = wire.encoder_id, bias.data.clone()
    bias.data.add_(1)
    added = wire.encoder_id
    assert added != before
    bias.data = kept
    assert wire.encoder_id == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_message_of_another_precision_is_answered(wire: LatentWire, dtype: torch.dtype) -> None:
    message, questions = wire.encode(CONTEXTS), [["Who?", "Where?"]] * len(CONTEXTS)
    other = message.with_latents(message.z_BLZ.to(dtype))
    rounded = message.with_latents(other.z_BLZ.float())
    for name in wire.receivers:
        expected = wire.answer(rounded, questions, name)
        assert wire.answer(other, questions, name) == expected
        assert wire.prefill(other, name).answer(questions) == expected
