"""The beginnings of sequences as a receiver has read them, for all that go on from them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from latentwire.models.head_slots import HeadEntries
from latentwire.prompts.batch import Batch

if TYPE_CHECKING:  # at run time where a model is loaded: see pretrained/weights.py
    from transformers import Cache


@dataclass(frozen=True)
class Past:
    """Keys and values of the beginnings of sequences."""

    cache: Cache
    attention_MS: torch.Tensor
    """1 at real positions."""
    entries: HeadEntries | None = None
    """Entries that some heads see besides, where messages stand in those alone."""

    def of_rows(self, batch: Batch) -> tuple[Cache, torch.Tensor]:
        """Return keys and values for rows that go on from these beginnings, and all their attention."""
        assert batch.past_R is not None, "these rows go on from nothing"
        past_R = batch.past_R.to(self.attention_MS.device)
        # Selecting rows replaces a layer's tensors: copies of the layers leave these as they are.
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in cache.layers:  # each may be on a device of its own
            layer.batch_select_indices(past_R.to(layer.device))  # a copy, with its gradient
        rest_BS = batch.attention_BS.to(self.attention_MS.device)
        return cache, torch.cat((self.attention_MS[past_R], rest_BS), 1)

    def entries_of(self, batch: Batch) -> HeadEntries | None:
        """Return what some heads see besides, for rows that go on from these beginnings."""
        if self.entries is None:
            return None
        assert batch.past_R is not None, "these rows go on from nothing"
        return self.entries.rows(batch.past_R.to(self.attention_MS.device))
