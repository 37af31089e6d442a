"""A message that a receiver has read once answers any number of questions as if it had read it for each."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from latentwire import exports
from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError, with_values
from latentwire.message import WireError
from latentwire.model import LatentWire
from latentwire.models.decoded import Decoded, Sampling
from latentwire.prefilled import Prefilled
from latentwire.prompts.batch import collate
from tests.conftest import HEADS, choose_some_heads, wire_of
from tests.models.test_memory import HANDED

CONTEXTS = [
    "Ada lives in Oslo.",
    "Tom has a red ball and a blue hat.",
    "The key lies below the mat.",
]
QUESTIONS = [["Where does Ada live?", "Who lives there?"], ["What has Tom?"],
             ["Where is the key?", "What lies below the mat?", "What?"]]  # fmt: skip
FEATURES: dict[str, dict[str, Any]] = {
    "soft": {},
    "deep-prefix": {"features": {"deep_prefix": {}}},
    "latent-adapters": {"features": {"latent_adapters": {}}},
    "lora": {"features": {"lora": {}}},
    "prefix": {"prefix": {"tokens": 3, "layers": True}},
    "keys-values": HANDED,
    "growing": {"encoder.tokens_per_latent": 4},
    "heads": HEADS,
    "heads-behind-a-prefix": HEADS | {"prefix": {"tokens": 3}},
}


def wire_with(run: RunConfig, values: dict[str, Any], noise: float = 0.3) -> LatentWire:
    """A wire whose features say something, so that answers differ."""
    wire = wire_of(with_values(run, {"evaluation.max_answer_tokens": 8} | values))
    generator = torch.Generator().manual_seed(3)
    for parameter in wire.interlingua.parameters():
        if parameter.requires_grad:  # senders' weights are the receivers'
            parameter.data.add_(noise * torch.randn(parameter.shape, generator=generator))
    return choose_some_heads(wire) if wire.run.adapter.kind == "heads" else wire


def row_by_row(wire: LatentWire, receiver: str) -> list[list[str]]:
    """Answers to one question at a time, in one pass over the whole prompt."""
    said = []
    for context, questions in zip(CONTEXTS, QUESTIONS, strict=True):
        message = wire.encode(context)
        said.append([wire.answer(message, question, receiver)[0] for question in questions])
    return said


@pytest.mark.parametrize("case", FEATURES)
def test_answers_are_those_of_one_prompt_a_question(run: RunConfig, case: str) -> None:
    wire = wire_with(run, FEATURES[case])
    message = wire.encode(CONTEXTS)
    for name in wire.receivers:
        expected = row_by_row(wire, name)
        assert len({text for texts in expected for text in texts}) > 1
        assert wire.answer(message, QUESTIONS, name) == expected
        prefilled = wire.prefill(message, name)
        for _ in range(2):  # a question leaves it as it was
            assert prefilled.answer(QUESTIONS) == expected
        assert prefilled.answer([of_one[0] for of_one in QUESTIONS]) == [
            of_one[0] for of_one in expected
        ]
        one = wire.prefill(wire.encode(CONTEXTS[2]), name)
        assert (
            one.answer(QUESTIONS[2])
            == expected[2]
            == wire.answer(wire.encode(CONTEXTS[2]), QUESTIONS[2], name)
        )


@pytest.mark.parametrize("case", FEATURES)
def test_targets_are_as_likely_as_in_one_prompt(run: RunConfig, case: str) -> None:
    wire = wire_with(run, FEATURES[case], 0.05)
    message = wire.encode(CONTEXTS)
    for name, lm in wire.receivers.items():
        builder = wire.builders[name]
        messages = [number for number, of_one in enumerate(QUESTIONS) for _ in of_one]
        ids = builder.tokenize([], [question for of_one in QUESTIONS for question in of_one],
                               ["the mat"] * len(messages))  # fmt: skip
        slots = wire.slots(message, name)
        rows = zip(messages, ids["question_ids"], ids["answer_ids"], strict=True)
        prompts = [builder.latent(slots[number], *pair) for number, *pair in rows]
        scores, _ = wire.prefill(message, name).score(prompts, messages)
        whole = collate(prompts, messages=messages)
        with torch.no_grad(), wire.reading(name, whole, message) as soft_ND:
            expected = lm.score_answers(whole, soft_ND)
        torch.testing.assert_close(scores.ce_N, expected.ce_N, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["latent-adapters", "heads"])
def test_it_is_saved_and_read_again(run: RunConfig, tmp_path: Path, case: str) -> None:
    wire = wire_with(run, FEATURES[case])
    prefilled = wire.prefill(wire.encode(CONTEXTS), "qwen")
    prefilled.save(tmp_path / "new" / "read.safetensors")
    again = Prefilled.load(wire, tmp_path / "new" / "read.safetensors")
    assert len(again) == 3 and again.answer(QUESTIONS) == prefilled.answer(QUESTIONS)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["read.safetensors"]


@pytest.mark.parametrize("case", ["latent-adapters", "lora", "prefix"])
def test_who_has_loaded_one_receiver_alone_reads_it_too(
    run: RunConfig, tmp_path: Path, case: str
) -> None:
    """A sender has all of them, a server one: what others read by is no part of it."""
    wire = wire_with(run, FEATURES[case])
    wire.save_pretrained(tmp_path / "wire")
    prefilled = wire.prefill(wire.encode(CONTEXTS), "qwen")
    prefilled.save(tmp_path / "read.safetensors")
    alone = LatentWire.from_pretrained(tmp_path / "wire", receivers="qwen")
    again = Prefilled.load(alone, tmp_path / "read.safetensors")
    assert again.answer(QUESTIONS) == prefilled.answer(QUESTIONS)


def test_that_of_others_is_refused(run: RunConfig, tmp_path: Path) -> None:
    wire = wire_with(run, {})
    file = tmp_path / "read.safetensors"
    wire.prefill(wire.encode(CONTEXTS), "llama").save(file)
    with pytest.raises(WireError, match="must be of this wire weights"):
        Prefilled.load(wire_with(run, {}, 0.2), file)
    lm = wire.local_receiver("llama")
    weight = next(lm.lm.parameters())
    before = weight.detach().clone()
    weight.data.mul_(1.01)
    try:
        with pytest.raises(WireError, match="must be of this receiver weights"):
            Prefilled.load(wire, file)
    finally:
        weight.data.copy_(before)
    other = tmp_path / "other.safetensors"
    save_file(load_file(file), other, {"format": "something", "receiver": "llama"})
    with pytest.raises(WireError, match="got something for llama"):
        Prefilled.load(wire, other)
    other.write_bytes(b"no tensors")
    for path in (other, tmp_path / "none.safetensors"):
        with pytest.raises(WireError, match=r"make it anew by wire\.prefill"):
            Prefilled.load(wire, path)


def test_it_is_a_cache_for_transformers(run: RunConfig) -> None:
    wire = wire_with(run, {"features": {"deep_prefix": {}}})
    message = wire.encode(CONTEXTS)
    for name in wire.receivers:
        lm, builder, prefilled = (
            wire.local_receiver(name),
            wire.builders[name],
            wire.prefill(message, name),
        )
        settings = GenerationConfig(
            max_new_tokens=8, do_sample=False, eos_token_id=list(builder.stop_ids), pad_token_id=0
        )
        for number, questions in enumerate(QUESTIONS):
            inputs = prefilled.inputs(questions[0], number)
            said = lm.lm.generate(**inputs, generation_config=settings)[
                0, inputs["input_ids"].shape[1] :
            ]
            text = builder.answer_of(lm.tokenizer.decode(said, skip_special_tokens=True))
            assert text == prefilled.answer([[q] for q in (q[0] for q in QUESTIONS)])[number][0]
    some = wire_with(run, HEADS)
    with pytest.raises(ConfigError, match="the same positions in every head"):
        some.prefill(some.encode(CONTEXTS), "llama").inputs("Where?")
    adapted = wire_with(run, {"features": {"lora": {}}})
    with pytest.raises(ConfigError, match=r"knows nothing of features\.lora"):
        adapted.prefill(adapted.encode(CONTEXTS), "llama").inputs("Where?")


def test_what_hangs_on_the_question_or_sees_too_little_is_refused(run: RunConfig) -> None:
    asking = wire_with(run, {"features": {"coprocessor": {}}})
    with pytest.raises(ConfigError, match=r"features\.coprocessor makes it anew for each"):
        asking.prefill(asking.encode(CONTEXTS), "llama")
    assert asking.answer(asking.encode(CONTEXTS), QUESTIONS, "llama") == row_by_row(asking, "llama")
    wire = wire_with(run, {})
    lm = wire.local_receiver("llama")
    lm.window = 12
    try:
        with pytest.raises(Exception, match="layers that see 12 positions"):
            wire.prefill(wire.encode(CONTEXTS), "llama")
    finally:
        lm.window = None


def test_a_message_is_read_once_where_a_window_holds_the_answer_too(run: RunConfig) -> None:
    """What is decoded moves a layer's window on: past the beginning of a prompt that has padding in its middle."""
    wire = wire_with(run, {})
    lm, builder = wire.local_receiver("llama"), wire.builders["llama"]
    message = wire.encode(CONTEXTS[:1])
    ids = builder.tokenize([], QUESTIONS[0], [])["question_ids"]
    prompts = [builder.latent(wire.slots(message, "llama")[0], each) for each in ids]
    longest = sum(len(prompt.ids) for prompt in prompts)
    lm.window = longest + 1
    try:
        assert wire.begin("llama", prompts, [0, 0], message, max_new_tokens=1) is not None
        assert wire.begin("llama", prompts, [0, 0], message, max_new_tokens=longest) is None
    finally:
        lm.window = None


@pytest.mark.parametrize(
    ("questions", "told"),
    [
        ([["Where?"]], "got 3 messages and 1 lists"),
        (["Where?", "Who?"], "got 3 messages and 2 questions"),
        ([["Where?"], [], ["Who?"]], "questions must hold at least one text"),
    ],
)
def test_questions_that_fit_no_messages(run: RunConfig, questions: Any, told: str) -> None:
    wire = wire_with(run, {})
    message = wire.encode(CONTEXTS)
    for ask in (wire.prefill(message, "llama").answer, lambda q: wire.answer(message, q, "llama")):
        with pytest.raises(ConfigError, match=told):
            ask(questions)


def test_tokens_are_drawn_or_told_one_by_one(run: RunConfig) -> None:
    wire = wire_with(run, {})
    message = wire.encode(CONTEXTS)
    (greedy,) = wire.answer(wire.encode(CONTEXTS[0]), "Where?", "qwen")
    drawn = [
        wire.answer(message, QUESTIONS, "qwen", sampling=Sampling(2.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    nearly_greedy = Sampling(1.0, top_k=1)
    assert wire.answer(message, QUESTIONS, "qwen", sampling=nearly_greedy) == row_by_row(
        wire, "qwen"
    )
    pieces: list[str] = []
    said = wire.answer(wire.encode(CONTEXTS[0]), "Where?", "qwen", on_text=pieces.append)
    assert "".join(pieces) == said[0] == greedy
    short = wire.answer(message, QUESTIONS, "qwen", max_new_tokens=1)
    assert all(
        len(one) <= len(other)
        for one, other in zip(short[0], row_by_row(wire, "qwen")[0], strict=True)
    )
    with pytest.raises(ConfigError, match="got 6; ask one at a time"):
        wire.answer(message, QUESTIONS, "qwen", on_text=pieces.append)
    for wrong in ({"temperature": 0.0}, {"top_p": 0.0}, {"top_k": 0}):
        with pytest.raises(ValueError, match="got"):
            Sampling(**wrong)


def test_an_answer_that_ends_within_a_character_is_told_to_its_end(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = wire_with(run, {})
    lm = wire.receivers["qwen"]
    # The last character takes several tokens, and the answer has no room for all of them.
    ids = lm.tokenizer.encode("Oslo é", add_special_tokens=False)[:-1]

    def generate(*given: Any) -> Decoded:
        for token in ids:
            given[-1]([token])
        return Decoded([ids], 0.0, 0.0)

    monkeypatch.setattr(lm, "generate", generate)
    pieces: list[str] = []
    said = wire.answer(wire.encode(CONTEXTS[0]), "Where?", "qwen", on_text=pieces.append)
    assert said == ["Oslo \ufffd"] and "".join(pieces) == said[0]
    assert len(pieces) > 1


def test_an_export_of_a_prefilled_wire_reads_it_too(run: RunConfig, tmp_path: Path) -> None:
    wire = wire_with(run, {})
    wire.prefill(wire.encode(CONTEXTS), "llama").save(tmp_path / "read.safetensors")
    exports.save(tmp_path / "wire", wire, {}, {"receivers": wire.fingerprints()})
    loaded = LatentWire.from_pretrained(tmp_path / "wire")
    again = Prefilled.load(loaded, tmp_path / "read.safetensors")
    assert again.answer(QUESTIONS) == wire.answer(wire.encode(CONTEXTS), QUESTIONS, "llama")


def test_a_cache_is_that_of_a_message_that_is_there(wire: LatentWire) -> None:
    held = wire.prefill(wire.encode(CONTEXTS), "llama")
    assert held.cache(len(held) - 1).get_seq_length() == int(held.end_B[-1]) > 0
    for number in (-1, len(held)):
        for ask in (held.cache, lambda message: held.inputs("Who?", message)):
            with pytest.raises(ConfigError, match=f"from 0 to {len(held) - 1}, got {number}"):
                ask(number)
