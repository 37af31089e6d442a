"""What a feature is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from latentwire.config import RunConfig
from latentwire.message import Message
from latentwire.models.interlingua import ReceiverShape


@dataclass(frozen=True)
class Reading:
    """One batch of sequences on its way through a receiver. R counts sequences, Q question tokens."""

    z_RLZ: torch.Tensor
    keep_RL: torch.Tensor
    """The real latents of each sequence's message."""
    latents_RS: torch.Tensor
    """Where they stand in the sequences, padding included: those of the pass that holds the prompt.
    A decode step after it has one position, whose states are another shape and are left alone."""
    embed: Callable[[torch.Tensor], torch.Tensor]
    """The receiver's embeddings ``[…, D]`` of token ids."""
    question_RQ: torch.Tensor
    """Ids of the question's tokens."""
    question_keep_RQ: torch.Tensor

    @cached_property
    def question_RQD(self) -> torch.Tensor:
        """The receiver's embeddings of the question's tokens."""
        return self.embed(self.question_RQ)


class Feature(nn.Module):
    """An opt-in extension of the wire. Its parameters are trained, saved and exported with the wire's own.

    A feature changes the message (:meth:`refine`), what a receiver computes while it reads one
    (:meth:`attached`), or both. Reading text, as teachers and baselines do, never meets a feature.
    """

    keeps_receivers_frozen = True
    """Whether the receivers' own weights act unchanged. Results of features that say no are
    labelled."""

    acts_on_text = False
    """Whether anything changes at positions before the message, whose keys and values are else
    computed once for all steps."""

    needs_weights = False
    """Whether it acts on layers of the receiver itself (``lm.lm``), which must then be in this
    process."""

    def __init__(
        self, options: Any, run: RunConfig, receivers: Mapping[str, ReceiverShape]
    ) -> None:
        """``options``: the feature's own section of the configuration.

        What is made for each receiver goes into a ``ModuleDict`` or ``ParameterDict`` by their
        names, right in the feature: a receiver that joins later then trains its own part alone.
        """
        super().__init__()

    @property
    def acts_inside(self) -> bool:
        """Whether a receiver computes otherwise while it reads: its prompt is then more than embeddings."""
        return type(self).attached is not Feature.attached

    @property
    def acts_on_message(self) -> bool:
        """Whether the sender needs it: what travels is the refined message."""
        return type(self).refine is not Feature.refine

    def check_training(self) -> None:
        """Raise a :class:`~latentwire.errors.UserError` where a part of it would not learn.

        Called before training alone: what was trained once can be read with.
        """

    def refine(self, message: Message) -> Message:
        """The message as the adapters get it."""
        return message

    @contextmanager
    def attached(self, receiver: str, lm: Any, reading: Reading) -> Iterator[None]:
        """Act on ``lm``, a :class:`~latentwire.receivers.base.Receiver`, while it reads: in training, prefill and every decode step.

        No logit hangs on what the last layer gives at the latents: whatever is made for it would
        never learn.
        """
        yield
