"""Text as bytes, for encoders without a vocabulary; and the bytes behind other tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

PAD_ID = 0
VOCAB_SIZE = 257  # the padding id and 256 byte values


class ByteTokenizer:
    """UTF-8 bytes shifted by one, so that 0 can pad.

    ``decode(encode(text)) == text`` for every valid text.
    """

    def encode(self, text: str) -> list[int]:
        """Return ids in 1..256. Raises ``UnicodeEncodeError`` for lone surrogates."""
        return [byte + 1 for byte in text.encode("utf-8")]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, without padding.

        Raises ``UnicodeDecodeError`` where the bytes are no UTF-8.
        """
        return bytes(i - 1 for i in ids if i != PAD_ID).decode("utf-8")

    def cut(self, text: str, longest: int) -> list[bytes]:
        """Cut a text into patches of up to ``longest`` bytes that end after white space."""
        words = _WORD.findall(text.encode("utf-8"))
        patches = []
        for word in words:
            patches += [word[start : start + longest] for start in range(0, len(word), longest)]
        return patches

    def patches(self, texts: Sequence[str], longest: int) -> torch.Tensor:
        """Return ids ``[B, P, longest]`` in patches (:meth:`cut`), padded with 0.

        A word is then the same patch wherever it stands (SpaceByte, arXiv 2404.14408). Nothing is
        dropped: the ids of a row, padding left out, are its text's. P is the largest number of
        patches, at least 1.
        """
        rows = [self.cut(text, longest) for text in texts]
        ids_BPE = torch.zeros(len(rows), max(1, *map(len, rows)), longest, dtype=torch.long)
        for row, patches in enumerate(rows):
            if not patches:
                continue
            # Bytes and their mask, each patch filled up with zeros: [P · longest].
            flat = b"".join(patch.ljust(longest, b"\0") for patch in patches)
            mask = b"".join((b"\1" * len(patch)).ljust(longest, b"\0") for patch in patches)
            ids = torch.frombuffer(bytearray(flat), dtype=torch.uint8).long() + 1
            ids = ids * torch.frombuffer(bytearray(mask), dtype=torch.uint8)
            # [P · longest] → [P, longest]
            ids_BPE[row, : len(patches)] = ids.view(-1, longest)
        return ids_BPE


# A word with the white space after it, or what the text ends with.
_WORD = re.compile(rb"[^ \n\t\r]*[ \n\t\r]+|[^ \n\t\r]+")


_SENTENCE_END = re.compile(rb"""[.!?]["')\]]*\s|\n""")


def sentence_ends(text: bytes) -> list[int]:
    """Find the places after a sentence and its white space, and after the ends of lines."""
    return [match.end() for match in _SENTENCE_END.finditer(text)]


def truncate_utf8(text: str, limit: int) -> str:
    """Return the longest start of ``text`` within ``limit`` bytes that cuts no character."""
    # All that can be wrong with a start of valid UTF-8 is a cut character: it is dropped.
    return text.encode("utf-8")[:limit].decode("utf-8", errors="ignore")


def chunks_utf8(text: str, limit: int) -> list[str]:
    """Cut ``text`` into chunks of at most ``limit`` bytes, after white space where there is any.

    Nothing is lost. Raises ValueError for a limit below one character.
    """
    chunks = []
    while text:
        chunk = truncate_utf8(text, limit)
        if not chunk:
            raise ValueError(f"a chunk must hold a character, got a limit of {limit} bytes")
        if len(chunk) < len(text) and (space := max(chunk.rfind(mark) for mark in " \n\t")) > 0:
            chunk = chunk[: space + 1]
        chunks.append(chunk)
        text = text[len(chunk) :]
    return chunks


def token_bytes(tokenizer: Any) -> torch.Tensor:
    """Return the bytes of text behind each id of a tokenizer, fp32 ``[V]``; at least 1.

    Byte-level BPE writes a byte as one character, SentencePiece a space as ``▁``; WordPiece leaves
    the space before a word out, which is counted with the word.
    """
    pieces, mark = _pieces(tokenizer)
    if mark == "Ġ":
        sizes = [len(piece) for piece in pieces]
    elif mark == "##":
        sizes = [_wordpiece_bytes(piece) for piece in pieces]
    else:
        sizes = [_sentencepiece_bytes(piece) for piece in pieces]
    return torch.tensor(sizes, dtype=torch.float32).clamp(min=1)


def _wordpiece_bytes(piece: str) -> int:
    # "##ing" is the inside of a word; the beginning of one has the space before it too.
    inside = piece.removeprefix("##")
    return len(inside.encode()) + (inside == piece)


def _sentencepiece_bytes(piece: str) -> int:
    # "<0x0A>" is a byte that no piece covers.
    return 1 if _BYTE.fullmatch(piece) else len(piece.replace("▁", " ").encode())


def sentence_marks(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each id of a Hugging Face tokenizer ``[V]`` where sentences may end.

    The first mask marks texts that can end a sentence; the second texts that go on without white
    space from the token before (of WordPiece: words' inner parts alone).
    """
    pieces, mark = _pieces(tokenizer)
    ends = [_PIECE_END.search(piece) is not None for piece in pieces]
    # "##" says that a token joins, "Ġ" or "▁" that it does not: the first test covers both.
    marked_joins = mark == "##"
    joins = [p.startswith(mark) == marked_joins and not _WHITE.match(p) for p in pieces]
    return torch.tensor(ends), torch.tensor(joins)


# Ċ is a line's end as byte-level BPE writes it.
_PIECE_END = re.compile(r"""[.!?]["')\]]*$|[\nĊ]|^<0x0A>$""")
_WHITE = re.compile(r"[\sĊĉ]|<0x0[9A]>")


def _pieces(tokenizer: Any) -> tuple[list[str], str]:
    """Return all tokens as the vocabulary writes them, and its mark.

    The mark is byte-level BPE's or SentencePiece's for a space, or WordPiece's for the inside of a
    word.
    """
    pieces = [piece or "" for piece in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    # A large vocabulary holds a few of the others' marks too.
    counts: dict[str, int] = {}
    for mark in ("Ġ", "▁", "##"):
        counts[mark] = sum(piece.startswith(mark) for piece in pieces)
    return pieces, max(counts, key=counts.__getitem__)


_BYTE = re.compile("<0x[0-9A-F]{2}>")
