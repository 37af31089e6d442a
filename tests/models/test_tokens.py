"""Bytes survive the round trip."""

from hypothesis import given
from hypothesis import strategies as st

from latentwire.models.tokens import ByteTokenizer, truncate_utf8

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
