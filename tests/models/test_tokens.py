"""Bytes survive the round trip, and every tokenizer's tokens tell theirs."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentwire.config import ReceiverConfig
from latentwire.models.lm import load_tokenizer
from latentwire.models.tokens import ByteTokenizer, token_bytes, truncate_utf8

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
def test_real_tokens_add_up_to_the_texts_bytes(real_receivers: Path, model: str, off_by: int) -> None:
    # WordPiece drops accents and counts a space before punctuation too.
    assert abs(counted(str(real_receivers / model)) - len(SENTENCE.encode())) <= off_by
