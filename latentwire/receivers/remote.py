"""A receiver with its weights on a replica, and the loss through them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from latentwire.config import LossConfig, ReceiverConfig
from latentwire.losses.bundles import Teacher
from latentwire.losses.chunks import common_gradient
from latentwire.models.decoded import Decoded
from latentwire.models.head_slots import Heads
from latentwire.pretrained.weights import skeleton
from latentwire.prompts.batch import Batch
from latentwire.receivers.base import AnswerScores, LossTask
from latentwire.receivers.local import LocalReceiver
from latentwire.receivers.requests import (
    EmbedLookUp,
    GenerateRequest,
    LookUp,
    LossRequest,
    Prompt,
    Request,
    ScoreRequest,
    SpanLookUp,
    TokenizerLookUp,
)

SPECIAL = ("chat_template", "bos_token", "bos_token_id", "eos_token", "eos_token_id")
"""Attributes of a tokenizer that prompts are built by."""


@dataclass(frozen=True)
class Facts:
    """Properties of the weights that the trial's side needs."""

    width: int
    embed_rms: float
    fingerprint: str
    special: dict[str, Any]
    """Attributes of its tokenizer."""

    @classmethod
    def of(cls, lm: LocalReceiver) -> Facts:
        """Read them off a receiver that is loaded."""
        special = {name: getattr(lm.tokenizer, name, None) for name in SPECIAL}
        return cls(lm.width, lm.embed_rms, lm.fingerprint(), special)


class Channel(Protocol):
    """The way to a replica of one receiver."""

    def facts(self) -> Facts:
        """Return the properties of its weights, as they were loaded."""

    def ask(self, request: Request | LookUp) -> Any:
        """Return the answer to a request; a replica that dies meanwhile is waited for."""


class RemoteTokenizer:
    """A replica's tokenizer, as far as prompts and answers need one.

    A large vocabulary would take seconds and hundreds of MB in every trial.
    """

    def __init__(self, channel: Channel, special: Mapping[str, Any]) -> None:
        self._channel = channel
        self.chat_template = special["chat_template"]
        self.bos_token, self.bos_token_id = special["bos_token"], special["bos_token_id"]
        self.eos_token, self.eos_token_id = special["eos_token"], special["eos_token_id"]

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        """Tokenise, as transformers does."""
        return self._channel.ask(TokenizerLookUp("__call__", text, options))

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """Render a conversation as the receiver was trained to read it."""
        return self._channel.ask(TokenizerLookUp("apply_chat_template", conversation, options))

    def batch_decode(self, rows: list[list[int]], **options: Any) -> list[str]:
        """Decode rows of ids."""
        return self._channel.ask(TokenizerLookUp("batch_decode", rows, options))

    def decode(self, ids: list[int], **options: Any) -> str:
        """Decode one row of ids."""
        return self._channel.ask(TokenizerLookUp("decode", ids, options))


class RemoteReceiver:
    """A :class:`~latentwire.receivers.base.Receiver` that asks a replica.

    Its losses hand on the gradients that come back.
    """

    def __init__(
        self, config: ReceiverConfig, channel: Channel, device: torch.device, *, head_is_text: bool
    ) -> None:
        """Connect to a replica.

        ``device``: where the wire is trained. ``head_is_text``: whether the text before the message
        may be read once and kept.
        """
        self.config, self.name, self.device = config, config.name, device
        self.channel, self.head_is_text = channel, head_is_text
        self.facts = channel.facts()
        self.tokenizer = RemoteTokenizer(channel, self.facts.special)
        self.width, self.embed_rms = self.facts.width, self.facts.embed_rms
        self.held_bytes = 0
        self.bytes_sent = 0
        """Bytes of tensors, to the replica and back."""
        self._added: list[torch.Tensor] = []
        self._at_slots: tuple[torch.Tensor, Heads] | None = None

    def skeleton(self) -> nn.Module:
        """Return the model on the meta device."""
        return skeleton(self.config, check=False)  # its replica has loaded the weights

    def fingerprint(self) -> str:
        """Return the hash of the weights as their replica loaded them.

        Whoever started the replica computes it again at the end.
        """
        return self.facts.fingerprint

    def span_embeddings(self, ids: list[list[int]], span_BL2: torch.Tensor) -> torch.Tensor:
        """Average the texts' token embeddings over spans of their bytes, ``[B, L, D]``."""
        return self._ask(SpanLookUp(ids, span_BL2.cpu())).to(self.device)

    def token_embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up the embeddings ``[…, D]`` of token ids."""
        return self._ask(EmbedLookUp(ids.cpu())).to(self.device)

    @contextmanager
    def added_to_slots(self, added_NE: torch.Tensor, latents_RS: torch.Tensor) -> Iterator[None]:
        """Add ``added_NE`` to keys and values at the latents, until this context ends."""
        self._added.append(added_NE)
        try:
            yield
        finally:
            self._added.pop()  # contexts end in the reverse order

    @contextmanager
    def heads_at_slots(self, kv_NE: torch.Tensor, heads: Heads) -> Iterator[None]:
        """Let messages stand in these heads alone, until this context ends."""
        self._at_slots = kv_NE, heads
        try:
            yield
        finally:
            self._at_slots = None

    def read_head(self, batch: Batch) -> Batch:
        """Return the batch as it is: its replica takes the head off."""
        return batch

    def read_teacher(self, source: Teacher | Batch, settings: LossConfig) -> Teacher | Batch:
        """Return ``source`` as it is: its replica reads texts where there are any."""
        return source

    def losses(self, task: LossTask, soft_ND: torch.Tensor) -> torch.Tensor:
        """Return each term's weighted share of the loss ``[T]``.

        Only their plain sum is differentiable.
        """
        entries_NE, heads = self._at_slots or (None, ())
        return _Losses.apply(soft_ND, self._sum_added(), entries_NE, heads, self, task)

    def score_answers(self, batch: Batch, soft_ND: torch.Tensor | None = None) -> AnswerScores:
        """Score the supervised tokens."""
        return self._ask(ScoreRequest(batch.to("cpu"), self._prompt(soft_ND)))

    def generate(
        self,
        batch: Batch,
        stop_ids: tuple[int, ...],
        max_new_tokens: int,
        soft_ND: torch.Tensor | None = None,
    ) -> Decoded:
        """Decode greedy continuations of left-padded prompts."""
        return self._ask(
            GenerateRequest(batch.to("cpu"), self._prompt(soft_ND), tuple(stop_ids), max_new_tokens)
        )

    def _sum_added(self) -> torch.Tensor | None:
        # Several features may add at the same slots: [features, N, E] → [N, E].
        return torch.stack(self._added).sum(0) if self._added else None

    def _prompt(self, soft_ND: torch.Tensor | None) -> Prompt:
        entries_NE, heads = self._at_slots or (None, ())
        return _to_send(soft_ND, self._sum_added(), entries_NE, heads)

    def _ask(self, request: Request | LookUp) -> Any:
        answer = self.channel.ask(request)
        self.bytes_sent += tensor_bytes(request) + tensor_bytes(answer)
        return answer


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        soft_ND: torch.Tensor,
        added_NE: torch.Tensor | None,
        entries_NE: torch.Tensor | None,
        heads: Heads,
        receiver: RemoteReceiver,
        task: LossTask,
    ) -> torch.Tensor:
        # What crosses to the replica are plain tensors on the CPU; the graph stays on this side.
        teacher = None if task.teacher is None else task.teacher.to("cpu")
        task = replace(task, batch=task.batch.to("cpu"), teacher=teacher)
        prompt = _to_send(soft_ND, added_NE, entries_NE, heads)
        answer = receiver._ask(
            LossRequest(task, prompt, any(ctx.needs_input_grad), receiver.head_is_text)
        )
        ctx.gradient = answer.gradient.each(lambda gradient: gradient.to(soft_ND.device))
        return answer.shares_T.to(soft_ND.device)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = common_gradient(grad_outputs[0])
        # d loss / d prompt = (d loss / d Σ shares) · (d Σ shares / d prompt).
        # The replica has sent the second factor.
        gradient = ctx.gradient.each(lambda gradient: gradient * scale)
        # In the order of forward's arguments, of which the last three are no tensors.
        return gradient.soft_ND, gradient.added_NE, gradient.entries_NE, None, None, None


def _to_send(
    soft_ND: torch.Tensor | None,
    added_NE: torch.Tensor | None,
    entries_NE: torch.Tensor | None,
    heads: Heads,
) -> Prompt:
    prompt = Prompt(soft_ND, added_NE, entries_NE, heads)
    return prompt.each(lambda tensor: tensor.detach().cpu().contiguous())


def tensor_bytes(message: Any) -> int:
    """Count the bytes of all tensors in a dataclass, at any depth."""
    if isinstance(message, torch.Tensor):
        return message.numel() * message.element_size()
    if is_dataclass(message):
        return sum(tensor_bytes(getattr(message, field.name)) for field in fields(message))
    return sum(map(tensor_bytes, message)) if isinstance(message, list | tuple) else 0
