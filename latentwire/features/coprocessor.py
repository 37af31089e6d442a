"""A coprocessor that augments the message's cache for the question at hand (arXiv 2412.17747)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from latentwire.config import CoprocessorFeature, RunConfig
from latentwire.features.base import Feature, Reading
from latentwire.features.slot_kv import SlotKeyValues
from latentwire.models.attention import Block, rotary_at
from latentwire.models.interlingua import ReceiverShape


class Coprocessor(Feature):
    """A small transformer per receiver over latents and question.

    Its states at the latents become keys and values.
    """

    reads_question = True

    def __init__(
        self, options: CoprocessorFeature, run: RunConfig, receivers: Mapping[str, ReceiverShape]
    ) -> None:
        super().__init__(options, run, receivers)
        width, self.head_width = options.width, options.width // options.heads
        self.from_latents, self.from_question = nn.ModuleDict(), nn.ModuleDict()
        self.blocks, self.slots = nn.ModuleDict(), nn.ModuleDict()
        # One kind of part after the other: a seed draws the weights in this order.
        for name in receivers:
            self.from_latents[name] = nn.Linear(run.encoder.d_z, width)
        for name, shape in receivers.items():
            norm, project = nn.LayerNorm(shape.width), nn.Linear(shape.width, width)
            self.from_question[name] = nn.Sequential(norm, project)
        for name in receivers:
            blocks = [Block(width, options.heads) for _ in range(options.layers)]
            self.blocks[name] = nn.ModuleList(blocks)
        for name, shape in receivers.items():
            self.slots[name] = SlotKeyValues(shape.skeleton(), width, "coprocessor")

    @contextmanager
    def attached(self, receiver: str, lm: Any, reading: Reading) -> Iterator[None]:
        """Add to keys and values at the slots."""
        x_RLM = self.from_latents[receiver](reading.z_RLZ)
        x_RQM = self.from_question[receiver](reading.question_RQD.to(x_RLM.device, torch.float32))
        # L latents, then Q tokens of the question, side by side: S = L + Q.
        x_RSM = torch.cat((x_RLM, x_RQM), 1)
        keep_RS = torch.cat((reading.keep_RL, reading.question_keep_RQ.to(x_RLM.device)), 1)
        # Positions count real latents and tokens alone: the question's distance from the latents
        # must not depend on another row's length.
        rotary = rotary_at(keep_RS.cumsum(1) - 1, self.head_width)
        blocks: Any = self.blocks[receiver]
        for block in blocks:
            x_RSM = block(x_RSM, keep_RS, rotary)
        # [R, L + Q, M] → [R, L, M] → [N, M]: the N real latents of all rows.
        state_NM = x_RSM[:, : x_RLM.shape[1]][reading.keep_RL]
        # One part, for all heads: [N, 1, M].
        with lm.added_to_slots(self.slots[receiver](state_NM[:, None]), reading.latents_RS):
            yield
