"""Bytes survive the round trip, and every tokenizer's tokens tell theirs."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentwire.config import EncoderConfig, ReceiverConfig
from latentwire.models.backbones import PretrainedStates
from latentwire.models.encoders import ByteStates
from latentwire.pretrained.weights import load_tokenizer
from latentwire.tokens import ByteTokenizer, chunks_utf8, token_bytes, truncate_utf8

TEXT = st.text(alphabet=st.characters(exclude_categories=("Cs",)))


@given(TEXT)
def test_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(TEXT, min_size=1, max_size=4), st.integers(1, 12))
def test_patches_hold_every_byte_in_order(texts: list[str], longest: int) -> None:
    tokenizer = ByteTokenizer()
    ids_BPE = tokenizer.patches(texts, longest)
    assert ids_BPE.shape[2] == longest
    for text, patches in zip(texts, ids_BPE.tolist(), strict=True):
        assert tokenizer.decode([i for patch in patches for i in patch]) == text


@given(TEXT, st.integers(0, 40))
def test_truncation_ends_between_characters(text: str, limit: int) -> None:
    cut = truncate_utf8(text, limit)
    assert text.startswith(cut)
    assert len(cut.encode()) <= limit


SENTENCE = "Zoë's bridge, 503 metres long, opened in 1932.\nNobody knew why."


def counted(model: str) -> float:
    tokenizer = load_tokenizer(ReceiverConfig(name="any", model=model))
    ids = tokenizer(SENTENCE, add_special_tokens=False).input_ids
    return float(token_bytes(tokenizer)[torch.tensor(ids)].sum())


@pytest.mark.parametrize("model", ["toy-llama", "toy-qwen", "toy-phi"])
def test_tokens_add_up_to_the_texts_bytes(model: str) -> None:
    assert counted(model) == len(SENTENCE.encode())


@pytest.mark.parametrize(("model", "off_by"), [("smollm2", 0), ("gemma3", 0), ("minilm", 6)])
def test_real_tokens_add_up_to_the_texts_bytes(
    real_receivers: Path, model: str, off_by: int
) -> None:
    # WordPiece drops accents and counts a space before punctuation too.
    assert abs(counted(str(real_receivers / model)) - len(SENTENCE.encode())) <= off_by


SENTENCES = [
    "Ada lives in Oslo.",
    " Cleo is from Portland.",
    ' Ben paid 3.5 dollars to "Acme Inc."',
    " Why?\n",
    "Nobody knows! ",
    "The end",
]


@pytest.mark.parametrize(
    "longest", [1, 3, 8, 9]
)  # but for 8, the white space after "Portland." is a patch of its own
def test_sentences_end_where_patches_do(longest: int) -> None:
    config = EncoderConfig(bytes_per_patch=longest)
    states, text = ByteStates(config), "".join(SENTENCES)
    patches, ends = states.tokenizer.cut(text, config.bytes_per_patch), states.sentence_ends(text)
    after = [
        b"".join(patches[: place + 1]).decode().rstrip() for place, end in enumerate(ends) if end
    ]
    assert after == ["".join(SENTENCES[:count]).rstrip() for count in range(1, len(SENTENCES))]


def check_ends(model: str, sentences: list[str]) -> None:
    """What a backbone's tokens say up to the end of each sentence is these sentences."""
    states = PretrainedStates(
        EncoderConfig(kind="lm", model=model, model_layers=1), {}, load_weights=False
    )
    ids = states.tokenizer("".join(sentences), add_special_tokens=False).input_ids
    found = [
        states.tokenizer.decode(ids[: place + 1])
        for place, end in enumerate(states.sentence_ends(ids))
        if end
    ]
    expected = ["".join(sentences[:count]).rstrip() for count in range(1, len(sentences))]
    assert [text.rstrip() for text in found] == expected


@pytest.mark.parametrize("model", ["toy-llama", "toy-qwen", "toy-phi"])
def test_sentences_end_where_tokens_do(model: str) -> None:
    # A small vocabulary has no token for a stop and the quotation mark after it.
    check_ends(model, [sentence.replace('"', "") for sentence in SENTENCES])


@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_sentences_end_where_real_tokens_do(real_receivers: Path, model: str) -> None:
    check_ends(str(real_receivers / model), SENTENCES)


@given(st.text(max_size=80), st.integers(4, 20))
def test_chunks_lose_nothing_and_end_after_white_space_where_there_is_any(
    text: str, limit: int
) -> None:
    text = text.encode("utf-8", "ignore").decode()
    chunks = chunks_utf8(text, limit)
    assert "".join(chunks) == text and all(0 < len(chunk.encode()) <= limit for chunk in chunks)
    assert chunks_utf8("one two three", 9) == ["one two ", "three"]
    with pytest.raises(ValueError, match="a chunk must hold a character, got a limit of 1 bytes"):
        chunks_utf8("ä", 1)
