"""A constant soft prefix of one receiver (prompt tuning, arXiv 2104.08691)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from latentwire.config import PrefixConfig
from latentwire.models.slots import heads_of_entries
from latentwire.prompts.batch import Batch


class Prefix(nn.Module):
    """Vectors before the message or text, the same for every row.

    Their entries are counted in units of the receiver's embedding RMS, so that one rate suits
    receivers of any scale.
    """

    def __init__(
        self, config: PrefixConfig, width: int, embed_rms: float, skeleton: nn.Module | None
    ) -> None:
        """Build one of zeros; :meth:`begin_as` says what it begins as.

        ``skeleton``: the receiver's model, for the shapes of its layers, where ``config.layers``.
        """
        super().__init__()
        self.embed_rms = float(embed_rms)
        self.unit_PD = nn.Parameter(torch.zeros(config.tokens, width))
        self.added_PE: nn.Parameter | None = None
        if skeleton is not None:
            entries = len(heads_of_entries(skeleton, "prefix.layers"))
            self.added_PE = nn.Parameter(torch.zeros(config.tokens, entries))

    @torch.no_grad()
    def begin_as(self, e_TD: torch.Tensor) -> None:
        """Begin as these embeddings ``[T, D]``, repeated or cut to the prefix's length."""
        count = len(self.unit_PD)
        # −(−P // T) = ⌈P / T⌉
        repeated_TD = e_TD.repeat(-(-count // len(e_TD)), 1)[:count]
        self.unit_PD.copy_(repeated_TD.to(self.unit_PD) / self.embed_rms)

    def attached(self, lm: Any, batch: Batch) -> AbstractContextManager[None]:
        """Add its keys and values where it stands, while a receiver reads a batch; nothing where it has none."""
        if self.added_PE is None:
            return nullcontext()
        # [P, E] → [R · P, E]: every row has the whole prefix.
        added_NE = self.added_PE.repeat(len(batch.ids_BS), 1)
        context: AbstractContextManager[None] = lm.added_to_slots(added_NE, batch.prefix_BS)
        return context

    def forward(self) -> torch.Tensor:
        """Return the vectors ``[P, D]`` as the receiver reads them."""
        return self.embed_rms * self.unit_PD
