"""What a wire needs of a receiver, wherever its frozen weights are."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from latentwire.config import LossConfig, ReceiverConfig
from latentwire.losses.bundles import Teacher, Weights
from latentwire.models.decoded import Decoded
from latentwire.prompts.sequences import Batch

PART = "step: "
"""What the names of a step's parts begin with in a profile."""


def part(name: str) -> torch.profiler.record_function:
    """A part of a step, by the name that profiles give it."""
    return torch.profiler.record_function(f"{PART}{name}")


@dataclass(frozen=True)
class LossTask:
    """Sequences to be read, and what of them is trained on."""

    batch: Batch
    weights: Weights
    counts: dict[str, float]
    """Term → tokens that it averages over, in the whole step."""
    teacher: Teacher | Batch | None
    """What the receiver said on the texts, or the texts for it to read."""
    settings: LossConfig
    """Tells how teachers are compared with."""
    rows_at_once: int | None
    """See :func:`~latentwire.losses.chunks.sum_by_chunks`."""

    @property
    def depths(self) -> tuple[float, ...]:
        """Where in the receiver states are compared, as fractions of its depth."""
        return self.settings.hidden_kd_depths if self.weights.reads_states else ()


@dataclass(frozen=True)
class AnswerScores:
    """How likely a receiver finds the supervised tokens, on the CPU."""

    ce_N: torch.Tensor
    """Cross-entropy of each, in nats."""
    likelier_N: torch.Tensor
    """How many other tokens it finds likelier."""


class Receiver(Protocol):
    """One frozen LM that reads soft prompts ``soft_ND``: a vector for every slot of a batch, row by row."""

    name: str
    config: ReceiverConfig
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Where its results come to."""

    @property
    def width(self) -> int:
        """D, the width of one soft-prompt vector."""

    @property
    def embed_rms(self) -> float:
        """Root mean square of the entries of its embeddings."""

    @property
    def held_bytes(self) -> int:
        """Of frozen weights in this process."""

    def skeleton(self) -> nn.Module:
        """The model, whose layers' shapes features read; on the meta device where its weights are elsewhere."""

    def fingerprint(self) -> str:
        """SHA-256 over all weights and buffers, as they are now."""

    def span_embeddings(self, ids: list[list[int]], span_BL2: torch.Tensor) -> torch.Tensor:
        """Means ``[B, L, D]`` of the texts' token embeddings over spans of their bytes."""

    def token_embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings ``[…, D]`` of token ids."""

    def added_to_slots(self, added_NE: torch.Tensor, latents_RS: torch.Tensor) -> AbstractContextManager[None]:
        """Add to keys and values where latents stand, in what it reads until this context ends."""

    def read_head(self, batch: Batch) -> Batch:
        """The batch without a head that is known already; to be called before any feature is attached."""

    def teach(self, told: Teacher | Batch, settings: LossConfig) -> Teacher | Batch:
        """What this receiver says on texts; to be called before any feature is attached."""

    def losses(self, task: LossTask, soft_ND: torch.Tensor) -> torch.Tensor:
        """Each term's weighted share of the loss ``[T]``, in the order of ``task.weights.terms``. Their sum is differentiable."""

    def score_answers(self, batch: Batch, soft_ND: torch.Tensor | None = None) -> AnswerScores:
        """How likely the supervised tokens are."""

    def generate(
        self, batch: Batch, stop_ids: tuple[int, ...], max_new_tokens: int, soft_ND: torch.Tensor | None = None
    ) -> Decoded:
        """Greedy continuations of left-padded prompts."""
