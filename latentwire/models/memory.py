"""Memory tokens behind a text, in the pass of the LM that reads it (arXiv 2307.06945, 2408.03094)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from latentwire.config import EncoderConfig, ReceiverConfig
from latentwire.models.backbones import PretrainedStates
from latentwire.models.low_rank import attached
from latentwire.models.pooling import interpolated
from latentwire.models.slots import KEYS_VALUES, projections
from latentwire.pretrained.weights import ReceiverError


class MemoryStates(PretrainedStates):
    """States of learned memory tokens that an LM reads right after a text.

    Their last states (In-context Autoencoder), or the keys and values that every layer gives them
    (500xCompressor), before rotary positions: whoever reads them stands them where it likes. A
    text is read in one pass.
    """

    def __init__(
        self, config: EncoderConfig, receivers: Mapping[str, ReceiverConfig], load_weights: bool
    ) -> None:
        """Load the backbone, or build its shape alone where not ``load_weights``.

        Raises :class:`~latentwire.pretrained.weights.ReceiverError` for one that cannot be loaded, or
        that has no keys and values where those are asked for.
        """
        super().__init__(config, receivers, load_weights)
        # One window holds any text; forward checks that its memory fits behind it.
        self.positions, self.window = self.window + len(self.prefix) + len(self.suffix), 10**9
        # They start as large as the embeddings before them.
        table = self.backbone.get_input_embeddings()
        # About 4096 ids, evenly spread over the vocabulary, stand for all of it.
        ids = torch.arange(0, table.num_embeddings, max(1, table.num_embeddings // 4096))
        scale = table(ids).detach().float().square().mean().sqrt()
        self.memory_CM = nn.Parameter(torch.randn(config.latent_len, self.width) * scale)
        self.projections: list[nn.Linear] = []
        if config.pooling == "memory_kv":
            self.projections = projections(self.backbone, KEYS_VALUES)
            self.width = sum(projection.out_features for projection in self.projections)

    def forward(
        self,
        ids_WT: torch.Tensor,
        attention_WT: torch.Tensor,
        real_WT: torch.Tensor,
        latents_B: torch.Tensor,
    ) -> torch.Tensor:
        """Return what is pooled ``[B, L, M]`` in fp32; a row's entries after its own are zero.

        Raises :class:`~latentwire.pretrained.weights.ReceiverError` for a text that does not fit the
        backbone's positions together with its memory.
        """
        longest = int(latents_B.max())
        if (count := ids_WT.shape[1] + longest) > self.positions:
            raise ReceiverError(
                f"encoder.pooling memory reads a text and its memory in one pass of at most {self.positions:,} positions, "
                f"got {count:,}; lower data.max_context_bytes, or choose encoder.pooling spans"
            )
        # Each row's text, then its memory, then padding: S positions.
        place_S = torch.arange(count, device=ids_WT.device)
        end_W1 = attention_WT.sum(1, keepdim=True)
        text_WS = place_S < end_W1
        memory_WS = (place_S < end_W1 + latents_B[:, None]) & ~text_WS
        place_L = torch.arange(longest, device=ids_WT.device)
        keep_BL = place_L < latents_B[:, None]
        # Latent l of a row's L reads the learned memory at (l + 0.5) / L of its length.
        share_BL = ((place_L + 0.5) / latents_B[:, None]).clamp(max=1)
        memory_BLM = interpolated(self.memory_CM, share_BL)
        with attached(self.backbone, self.updates), ExitStack() as stack:
            # Texts and memories are laid into the rows as they come, row by row.
            token_WTM = self.backbone.get_input_embeddings()(ids_WT)
            x_WSM = token_WTM.new_zeros(*text_WS.shape, token_WTM.shape[2])
            x_WSM = x_WSM.masked_scatter(text_WS[..., None], token_WTM[attention_WT.bool()])
            x_WSM = x_WSM.masked_scatter(memory_WS[..., None], memory_BLM[keep_BL].to(x_WSM))
            projected: list[torch.Tensor] = []
            for projection in self.projections:

                def keep(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> None:
                    projected.append(output)

                # After the low-rank updates' hooks, whose sum is what the layer gives.
                stack.callback(projection.register_forward_hook(keep).remove)
            mask = self.mask((text_WS | memory_WS).long())
            output = self.backbone(inputs_embeds=x_WSM, attention_mask=mask, use_cache=False)
        # [W, S, M]: all layers' keys and values side by side, or the last states.
        state_WSM = torch.cat(projected, -1) if projected else output.last_hidden_state
        pooled_BLM = state_WSM.new_zeros(*keep_BL.shape, self.width)
        return pooled_BLM.masked_scatter(keep_BL[..., None], state_WSM[memory_WS]).float()
