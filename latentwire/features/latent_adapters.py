"""Gated cross-attention from the receiver's states to the latents (Flamingo, arXiv 2204.14198)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from latentwire.config import LatentAdaptersFeature, RunConfig
from latentwire.features.base import Feature, Reading
from latentwire.models.attention import attend, merge, split
from latentwire.models.interlingua import ReceiverShape
from latentwire.models.slots import decoder_layers


class LatentAdapters(Feature):
    """Cross-attention to the latents after chosen layers, at every position and decode step.

    It adds nothing at first.
    """

    acts_on_text = True
    needs_weights = True

    def __init__(
        self, options: LatentAdaptersFeature, run: RunConfig, receivers: Mapping[str, ReceiverShape]
    ) -> None:
        super().__init__(options, run, receivers)
        self.depths = options.depths
        self.attention = nn.ModuleDict()
        for name, shape in receivers.items():
            widths = shape.width, run.encoder.d_z, options.width
            layers = [GatedCrossAttention(*widths, options.heads) for _ in options.depths]
            self.attention[name] = nn.ModuleList(layers)

    @contextmanager
    def attached(self, receiver: str, lm: Any, reading: Reading) -> Iterator[None]:
        """Add to the outputs of the chosen layers, while the receiver reads this batch."""
        layers = decoder_layers(lm.lm, "latent_adapters")
        with ExitStack() as stack:
            attentions: Any = self.attention[receiver]
            for depth, attention in zip(self.depths, attentions, strict=True):
                # By its default value each hook keeps its own attention, not the loop's last.
                def look(_: nn.Module, __: tuple, output: Any, attention: Any = attention) -> Any:
                    # Layers of some architectures give their states alone, others a tuple.
                    state = output[0] if isinstance(output, tuple) else output
                    # The layer may be on another device than the wire.
                    x_RSD = state.to(reading.z_RLZ.device, torch.float32)
                    state = state + attention(x_RSD, reading.z_RLZ, reading.keep_RL).to(state)
                    return (state, *output[1:]) if isinstance(output, tuple) else state

                # Depth 1 is after the last layer, depth 0 after the first: none comes before it.
                layer = layers[max(1, round(depth * len(layers))) - 1]
                stack.callback(layer.register_forward_hook(look).remove)
            yield


class GatedCrossAttention(nn.Module):
    """``tanh(gate) · attention(states → latents)`` with a gate that starts at 0."""

    def __init__(self, d_model: int, d_z: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(d_model)
        self.query = nn.Linear(d_model, width)
        self.key_value = nn.Linear(d_z, 2 * width)
        self.out = nn.Linear(width, d_model)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(
        self, x_RSD: torch.Tensor, z_RLZ: torch.Tensor, keep_RL: torch.Tensor
    ) -> torch.Tensor:
        """Return what is added to ``x_RSD``, ``[R, S, D]``; ``keep_RL``: the real latents."""
        key, value = self.key_value(z_RLZ).chunk(2, dim=-1)
        parts = (self.query(self.norm(x_RSD)), key, value)
        query, key, value = (split(part, self.heads) for part in parts)
        # [R, 1, 1, L]: the same latents for every head and position.
        read = attend(query, key, value, keep_RL[:, None, None])
        return self.gate.tanh() * self.out(merge(read))
