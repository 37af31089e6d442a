"""States at the soft slots to what is added to their keys and values, which two features do."""

from __future__ import annotations

import torch
from torch import nn

from latentwire.models.slots import projections


class SlotKeyValues(nn.Module):
    """States ``[N, M]`` → ``[N, E]``, what is added to the slots' keys and values in all layers of one receiver; zero at first."""

    def __init__(self, lm: nn.Module, width: int, feature: str) -> None:
        super().__init__()
        self.out = nn.Linear(width, sum(projection.out_features for projection in projections(lm, feature)))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, state_NM: torch.Tensor) -> torch.Tensor:
        """``[N, M]`` → ``[N, E]``."""
        return self.out(state_NM)
