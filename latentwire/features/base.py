"""The base class of features."""

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
    """One batch of R sequences on its way through a receiver, each with up to Q question tokens."""

    z_RLZ: torch.Tensor
    keep_RL: torch.Tensor
    """The real latents of each sequence's message."""
    latents_RS: torch.Tensor
    """Mask of the latents in the sequences, padding included: in the pass that holds the prompt.
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
    """An opt-in extension of the wire, trained, saved and exported with it.

    A feature changes the message (:meth:`refine`), what a receiver computes while it reads one
    (:meth:`attached`), or both. Reading text, as teachers and baselines do, never meets a feature.
    """

    keeps_receivers_frozen = True
    """True where the receivers' own weights act unchanged. Other features' results are labelled."""

    acts_on_text = False
    """True where positions before the message change, whose keys and values are else computed once
    for all steps."""

    reads_question = False
    """True where what stands for a message hangs on the question at hand: it then cannot be read once
    for several."""

    needs_weights = False
    """True where it acts on the receiver's layers (``lm.lm``): they must be in this process."""

    def __init__(
        self, options: Any, run: RunConfig, receivers: Mapping[str, ReceiverShape]
    ) -> None:
        """Build the feature; ``options`` is its own section of the configuration.

        Parts for single receivers go into a ``ModuleDict`` or ``ParameterDict`` by their
        names, right in the feature: a receiver that joins later then trains its own part alone.
        """
        super().__init__()

    @property
    def acts_inside(self) -> bool:
        """True where a receiver computes otherwise: its prompt is then more than embeddings."""
        return type(self).attached is not Feature.attached

    @property
    def acts_on_message(self) -> bool:
        """True where the sender needs it: the refined message is sent."""
        return type(self).refine is not Feature.refine

    def check_training(self) -> None:
        """Raise a :class:`~latentwire.errors.UserError` where a part of it would not learn.

        Called before training alone: what was trained once can be read with.
        """

    def refine(self, message: Message) -> Message:
        """Return the message as the adapters get it."""
        return message

    @contextmanager
    def attached(self, receiver: str, lm: Any, reading: Reading) -> Iterator[None]:
        """Act on ``lm`` while it reads: in training, prefill and every decode step.

        ``lm`` is a :class:`~latentwire.receivers.base.Receiver`. No logit
        depends on the last layer's output at the latents: additions to it would never learn.
        """
        yield
