"""Adding to the keys and values of the soft slots, layer by layer: what two features do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from latentwire.features.base import decoder_layers


class SlotKeyValues(nn.Module):
    """States at the slots → what is added to keys and values there, in every layer of one receiver; zero at first.

    The slots' own cache entries change in place: no position, and no byte of the receiver's cache, comes on top.
    """

    def __init__(self, lm: nn.Module, width: int, feature: str) -> None:
        super().__init__()
        self.feature = feature
        attentions: list[Any] = [layer.self_attn for layer in decoder_layers(lm, feature)]
        self.sizes = [size for a in attentions for size in (a.k_proj.out_features, a.v_proj.out_features)]
        self.out = nn.Linear(width, sum(self.sizes))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @contextmanager
    def added(self, lm: nn.Module, state_NM: torch.Tensor, latents_RS: torch.Tensor) -> Iterator[None]:
        """While the receiver reads: in the pass that holds the slots; later decode steps find them in its cache."""
        layers = decoder_layers(lm, self.feature)
        targets = [getattr(layer.self_attn, name) for layer in layers for name in ("k_proj", "v_proj")]
        with ExitStack() as stack:
            for target, part_NE in zip(targets, self.out(state_NM).split(self.sizes, dim=-1), strict=True):

                def add(_: nn.Module, __: tuple, output: torch.Tensor, part_NE: torch.Tensor = part_NE) -> torch.Tensor:
                    if output.shape[:2] != latents_RS.shape:
                        return output
                    mask_RS1 = latents_RS[..., None].to(output.device)
                    part_NE = part_NE.to(output.device, output.dtype)
                    return output + torch.zeros_like(output).masked_scatter(mask_RS1, part_NE)

                stack.callback(target.register_forward_hook(add).remove)
            yield
