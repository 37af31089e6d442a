"""The interface of a receiver, wherever its frozen weights are."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from latentwire.config import LossConfig, ReceiverConfig
from latentwire.losses.bundles import Teacher, Weights
from latentwire.models.decoded import Decoded
from latentwire.models.head_slots import Heads
from latentwire.prompts.batch import Batch

PART = "step: "
"""Prefix of the names of a step's parts in a profile."""


def part(name: str) -> torch.profiler.record_function:
    """Mark a part of a step, under the name that profiles show."""
    return torch.profiler.record_function(f"{PART}{name}")


@dataclass(frozen=True)
class LossTask:
    """Sequences to be read, and the loss terms to compute on them."""

    batch: Batch
    weights: Weights
    counts: dict[str, float]
    """Term → tokens that it averages over, in the whole step."""
    teacher: Teacher | Batch | None
    """The receiver's own output on the texts, or the texts for it to read."""
    settings: LossConfig
    """Temperature, columns and depths of the comparison with teachers."""
    rows_at_once: int | None
    """See :func:`~latentwire.losses.chunks.sum_by_chunks`."""

    @property
    def depths(self) -> tuple[float, ...]:
        """Depths at which states are compared, as fractions of the receiver's layers."""
        return self.settings.hidden_kd_depths if self.weights.reads_states else ()


@dataclass(frozen=True)
class AnswerScores:
    """Scores that a receiver gives the supervised tokens, on the CPU."""

    ce_N: torch.Tensor
    """Cross-entropy of each token, in nats."""
    likelier_N: torch.Tensor
    """Number of tokens that the receiver finds likelier."""


class Receiver(Protocol):
    """One frozen LM that reads soft prompts.

    A soft prompt ``soft_ND`` has a vector for every slot of a batch, row by row.
    """

    name: str
    config: ReceiverConfig
    tokenizer: Any

    @property
    def device(self) -> torch.device:
        """Device of its results."""

    @property
    def width(self) -> int:
        """D, the width of one soft-prompt vector."""

    @property
    def embed_rms(self) -> float:
        """Root mean square of the entries of its embeddings."""

    @property
    def held_bytes(self) -> int:
        """Bytes of frozen weights in this process."""

    def skeleton(self) -> nn.Module:
        """Return the model, for the shapes of its layers; on the meta device where it is remote."""

    def fingerprint(self) -> str:
        """Return the SHA-256 of all weights and buffers."""

    def span_embeddings(self, ids: list[list[int]], span_BL2: torch.Tensor) -> torch.Tensor:
        """Average the texts' token embeddings over spans of their bytes, ``[B, L, D]``."""

    def token_embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up the embeddings ``[…, D]`` of token ids."""

    def added_to_slots(
        self, added_NE: torch.Tensor, latents_RS: torch.Tensor
    ) -> AbstractContextManager[None]:
        """Add ``added_NE`` to keys and values at the latents, until this context ends."""

    def heads_at_slots(self, kv_NE: torch.Tensor, heads: Heads) -> AbstractContextManager[None]:
        """Let messages stand in these heads alone, with these keys and values, until this context ends."""

    def read_head(self, batch: Batch) -> Batch:
        """Return the batch without a head whose keys and values are known already.

        To be called before any feature is attached.
        """

    def read_teacher(self, source: Teacher | Batch, settings: LossConfig) -> Teacher | Batch:
        """Return this receiver's output on texts; what is computed already stays as it is.

        To be called before any feature is attached.
        """

    def losses(self, task: LossTask, soft_ND: torch.Tensor) -> torch.Tensor:
        """Return each term's weighted share of the loss ``[T]``.

        They come in the order of ``task.weights.terms``; their sum is differentiable.
        """

    def score_answers(self, batch: Batch, soft_ND: torch.Tensor | None = None) -> AnswerScores:
        """Score the supervised tokens."""

    def generate(
        self,
        batch: Batch,
        stop_ids: tuple[int, ...],
        max_new_tokens: int,
        soft_ND: torch.Tensor | None = None,
    ) -> Decoded:
        """Decode greedy continuations of left-padded prompts."""
