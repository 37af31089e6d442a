"""Additions to the keys and values of soft slots, which two features make."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from latentwire.models.slots import heads_of_entries
from latentwire.pretrained.weights import ReceiverError


class SlotKeyValues(nn.Module):
    """A linear map from states ``[N, P, M]`` to additions ``[N, E]``, zero at first.

    They are added to the slots' keys and values in all layers of one receiver, E numbers a slot.
    Each of the P parts of a state makes those of every P-th key-value head, counted through the
    layers.
    """

    def __init__(self, lm: nn.Module, width: int, feature: str, parts: int = 1) -> None:
        """Build the map for the receiver ``lm``.

        Raises :class:`~latentwire.pretrained.weights.ReceiverError` for fewer heads than parts.
        """
        super().__init__()
        head_E = heads_of_entries(lm, feature)
        if (heads := int(head_E[-1]) + 1) < parts:
            raise ReceiverError(
                f"{feature}.head_parts must be ≤ the {heads} key-value heads in all layers of the "
                f"receiver, got {parts}; lower it"
            )
        self.out = nn.Linear(width, len(head_E))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        # Entries [E] in the order of their parts; the argsort of that order puts them back.
        part_E = head_E % parts
        self.entries_E: torch.Tensor
        self.place_E: torch.Tensor
        self.register_buffer("entries_E", part_E.argsort(stable=True), persistent=False)
        self.register_buffer("place_E", self.entries_E.argsort(), persistent=False)
        self.sizes = part_E.bincount().tolist()

    def forward(self, state_NPM: torch.Tensor) -> torch.Tensor:
        """Map ``[N, P, M]`` to ``[N, E]``."""
        if len(self.sizes) == 1:
            return self.out(state_NPM.squeeze(1))
        weights = self.out.weight[self.entries_E].split(self.sizes)
        biases = self.out.bias[self.entries_E].split(self.sizes)
        # Part p makes the entries of its own heads; place_E puts all back in their order.
        parts = zip(state_NPM.unbind(1), weights, biases, strict=True)
        return torch.cat([F.linear(*part) for part in parts], 1)[:, self.place_E]
