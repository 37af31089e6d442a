"""Text as bytes, for encoders that need no vocabulary, and the bytes behind other tokenizers' tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

PAD_ID = 0
VOCAB_SIZE = 257  # the padding id and 256 byte values


class ByteTokenizer:
    """UTF-8 bytes shifted by one, so that 0 can pad. ``decode(encode(text)) == text`` for every valid text."""

    def encode(self, text: str) -> list[int]:
        """Ids in 1..256. Raises ``UnicodeEncodeError`` for text that has no UTF-8 form (lone surrogates)."""
        return [byte + 1 for byte in text.encode("utf-8")]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; padding is skipped. Raises ``UnicodeDecodeError`` where the bytes are no UTF-8."""
        return bytes(i - 1 for i in ids if i != PAD_ID).decode("utf-8")

    def cut(self, text: str, longest: int) -> list[bytes]:
        """The patches of a text: up to ``longest`` bytes each, that end after white space."""
        words = _WORD.findall(text.encode("utf-8"))
        return [word[start : start + longest] for word in words for start in range(0, len(word), longest)]

    def patches(self, texts: Sequence[str], longest: int) -> torch.Tensor:
        """Ids ``[B, P, longest]`` in patches of up to ``longest`` bytes that end after white space, padded with 0.

        A word is then the same patch wherever it stands (SpaceByte, arXiv 2404.14408). Nothing is dropped: the ids of
        a row, padding left out, are its text's. P is the largest number of patches, at least 1.
        """
        rows = [self.cut(text, longest) for text in texts]
        ids_BPE = torch.zeros(len(rows), max(1, *map(len, rows)), longest, dtype=torch.long)
        for row, found in enumerate(rows):
            if found:
                flat = b"".join(patch.ljust(longest, b"\0") for patch in found)
                keep = b"".join(b"\1" * len(patch) + b"\0" * (longest - len(patch)) for patch in found)
                ids = torch.frombuffer(bytearray(flat), dtype=torch.uint8).long() + 1
                ids_BPE[row, : len(found)] = (ids * torch.frombuffer(bytearray(keep), dtype=torch.uint8)).view(
                    -1, longest
                )
        return ids_BPE


_WORD = re.compile(rb"[^ \n\t\r]*[ \n\t\r]+|[^ \n\t\r]+")


_SENTENCE_END = re.compile(rb"""[.!?]["')\]]*\s|\n""")


def sentence_ends(text: bytes) -> list[int]:
    """Places right after the white space that follows a sentence, and after the ends of lines."""
    return [found.end() for found in _SENTENCE_END.finditer(text)]


def truncate_utf8(text: str, limit: int) -> str:
    """The longest start of ``text`` that fits ``limit`` bytes and ends between characters."""
    return text.encode("utf-8")[:limit].decode("utf-8", errors="ignore")


def chunks_utf8(text: str, limit: int) -> list[str]:
    """``text`` in chunks of at most ``limit`` bytes, cut after white space where a chunk has any; nothing is lost."""
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
    """Bytes of text that each id of a Hugging Face tokenizer stands for, fp32 ``[V]``; at least 1.

    Byte-level BPE writes a byte as one character, SentencePiece a space as ``▁``; WordPiece leaves the space before a
    word out, which is counted with the word.
    """
    pieces, mark = _pieces(tokenizer)
    if mark == "Ġ":
        sizes = [len(piece) for piece in pieces]
    elif mark == "##":
        sizes = [len(piece.removeprefix("##").encode()) + (not piece.startswith("##")) for piece in pieces]
    else:
        sizes = [1 if _BYTE.fullmatch(piece) else len(piece.replace("▁", " ").encode()) for piece in pieces]
    return torch.tensor(sizes, dtype=torch.float32).clamp(min=1)


def sentence_marks(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """For each id of a Hugging Face tokenizer ``[V]``, whether its text can end a sentence, and whether it goes on without
    white space where the token before it stopped. WordPiece tells of words' inner parts alone."""
    pieces, mark = _pieces(tokenizer)
    ends = [_PIECE_END.search(piece) is not None for piece in pieces]
    joins = [piece.startswith(mark) == (mark == "##") and not _WHITE.match(piece) for piece in pieces]
    return torch.tensor(ends), torch.tensor(joins)


_PIECE_END = re.compile(r"""[.!?]["')\]]*$|[\nĊ]|^<0x0A>$""")  # Ċ: how byte-level BPE writes a line's end
_WHITE = re.compile(r"[\sĊĉ]|<0x0[9A]>")


def _pieces(tokenizer: Any) -> tuple[list[str], str]:
    """All tokens as the vocabulary writes them, and its mark: byte-level BPE's or SentencePiece's for a space, WordPiece's
    for the inside of a word."""
    pieces = [piece or "" for piece in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    # A large vocabulary holds a few of the others' marks too.
    return pieces, max(("Ġ", "▁", "##"), key=lambda mark: sum(piece.startswith(mark) for piece in pieces))


_BYTE = re.compile("<0x[0-9A-F]{2}>")
