"""States of a text, which an encoder pools: their interface, and states made from bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from latentwire.config import EncoderConfig
from latentwire.models.attention import Block, rotary_of
from latentwire.tokens import PAD_ID, VOCAB_SIZE, ByteTokenizer, sentence_ends

BYTE_WIDTH = 32  # width of one byte's embedding; a patch joins several


class States(nn.Module, ABC):
    """A state for every token, patch or the like of a text.

    ``forward`` takes the tensors of :meth:`collate` by their names and ``length_B``, the states of
    each text, and gives ``[B, S, M]``: at least one state a row, which means nothing where the text
    is empty.
    """

    width: int
    """M, the width of one state."""
    entries: int = 0
    """How many of a state's last numbers are keys and values of heads, and no state."""
    tokenizer: Any
    """The tokenizer, of a kind that reads its ids (``encoder.pretrained``): shards hold its
    ids ready. Of several, the first."""

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        """All tokenizers that read a text: :attr:`tokenizer`, unless several do."""
        return (self.tokenizer,)

    @abstractmethod
    def collate(self, rows: Sequence[Any]) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Collate texts (or their ids) for ``forward``, on the CPU.

        Returns its tensors by name, and the bytes of text that each state stands for.
        """

    @abstractmethod
    def sentence_ends(self, row: Any) -> list[bool]:
        """Return for each state of a text (or of its ids) whether a sentence ends after it."""

    def fingerprint(self) -> str | None:
        """Return the hash of weights that are not trained; ``None`` where all are."""
        return None

    def frozen_parameters(self) -> frozenset[str]:
        """Return the names of the parameters that this hash stands for: they are never saved."""
        return frozenset()


class ByteStates(States):
    """From-scratch states over UTF-8 bytes.

    The bytes of a patch (a word, cut where it is long) are embedded side by side and joined into
    one state by an MLP; bidirectional attention with rotary positions relates the states.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.width, self.bytes_per_patch = config.d_model, config.bytes_per_patch
        self.head_width = config.d_model // config.heads
        self.tokenizer = ByteTokenizer()
        self.embed = nn.Embedding(VOCAB_SIZE, BYTE_WIDTH, padding_idx=PAD_ID)
        self.join = nn.Sequential(
            nn.Linear(config.bytes_per_patch * BYTE_WIDTH, 2 * self.width),
            nn.GELU(),
            nn.Linear(2 * self.width, self.width),
        )
        self.blocks = nn.ModuleList(Block(self.width, config.heads) for _ in range(config.layers))

    def collate(self, texts: Sequence[str]) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Collate byte ids in patches ``[B, P, bytes_per_patch]``; and the patches' bytes."""
        ids_BPE = self.tokenizer.patches(texts, self.bytes_per_patch)
        # Bytes of each patch [B, P]: 0 in patches that only fill a row up.
        size_BP = (ids_BPE != PAD_ID).sum(2).float()
        return {"ids_BPE": ids_BPE}, [size_P[size_P > 0] for size_P in size_BP]

    def sentence_ends(self, text: str) -> list[bool]:
        """Return for each patch of a text whether a sentence ends after it."""
        patches = self.tokenizer.cut(text, self.bytes_per_patch)
        # A word that fills its patch leaves the white space after it to the next one, so the whole
        # text is searched.
        stops = list(accumulate(map(len, patches)))
        # A sentence that ends at byte e belongs to the first patch that stops there or later.
        ending = {bisect_left(stops, end) for end in sentence_ends(b"".join(patches))}
        return [place in ending for place in range(len(patches))]

    def forward(self, ids_BPE: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
        """Return states ``[B, P, M]``."""
        place_P = torch.arange(ids_BPE.shape[1], device=ids_BPE.device)
        # An empty text is one patch of padding.
        keep_BP = (place_P < length_B[:, None]) | (place_P == 0)
        # [B, P, E] → [B, P, E, 32] → [B, P, E · 32] → [B, P, M]
        x_BPM = self.join(self.embed(ids_BPE).flatten(2))
        rotary = rotary_of(len(place_P), self.head_width, ids_BPE.device)
        for block in self.blocks:
            x_BPM = block(x_BPM, keep_BP, rotary)
        return x_BPM
