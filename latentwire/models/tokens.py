"""Text as bytes, for encoders that need no vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

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

    def batch(self, texts: Sequence[str]) -> torch.Tensor:
        """Right-padded ids ``[B, T]``; T is the longest text, at least 1."""
        rows = [self.encode(text) for text in texts]
        ids_BT = torch.zeros(len(rows), max(1, *map(len, rows)), dtype=torch.long)
        for row, ids in enumerate(rows):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
        return ids_BT


def truncate_utf8(text: str, limit: int) -> str:
    """The longest start of ``text`` that fits ``limit`` bytes and ends between characters."""
    return text.encode("utf-8")[:limit].decode("utf-8", errors="ignore")
