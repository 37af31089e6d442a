"""A receiver whose weights are elsewhere, and the loss through them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import nn

from latentwire.config import LossConfig, ReceiverConfig
from latentwire.prompts.sequences import Batch
from latentwire.losses.bundles import Teacher
from latentwire.losses.chunks import common_gradient
from latentwire.models.decoded import Decoded
from latentwire.models.weights import skeleton
from latentwire.receivers.base import AnswerScores, LossTask
from latentwire.receivers.local import LocalReceiver
from latentwire.receivers.requests import (
    EmbedLookUp,
    GenerateRequest,
    ScoreRequest,
    LookUp,
    LossRequest,
    Prompt,
    Request,
    SpanLookUp,
    TokenizerLookUp,
)

SPECIAL = ("chat_template", "bos_token", "bos_token_id", "eos_token", "eos_token_id")
"""Attributes of a tokenizer that prompts are built by."""


@dataclass(frozen=True)
class Facts:
    """What the trial's side must know of the weights."""

    width: int
    embed_rms: float
    fingerprint: str
    special: dict[str, Any]
    """Attributes of its tokenizer."""

    @classmethod
    def of(cls, lm: LocalReceiver) -> Facts:
        """Those of a receiver that is loaded."""
        special = {name: getattr(lm.tokenizer, name, None) for name in SPECIAL}
        return cls(lm.width, lm.embed_rms, lm.fingerprint(), special)


class Channel(Protocol):
    """The way to a replica of one receiver."""

    def facts(self) -> Facts:
        """Of its weights, when they were loaded."""

    def ask(self, request: Request | LookUp) -> Any:
        """The answer to a request; a replica that dies meanwhile is waited for."""


class RemoteTokenizer:
    """A replica's tokenizer, as far as prompts and answers need one: a large vocabulary takes seconds and hundreds of MB."""

    def __init__(self, channel: Channel, special: Mapping[str, Any]) -> None:
        self._channel = channel
        self.chat_template = special["chat_template"]
        self.bos_token, self.bos_token_id = special["bos_token"], special["bos_token_id"]
        self.eos_token, self.eos_token_id = special["eos_token"], special["eos_token_id"]

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        """Token ids, as transformers gives them."""
        return self._channel.ask(TokenizerLookUp("__call__", text, options))

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        """A conversation as the receiver was trained to read it."""
        return self._channel.ask(TokenizerLookUp("apply_chat_template", conversation, options))

    def batch_decode(self, rows: list[list[int]], **options: Any) -> list[str]:
        """Texts of rows of ids."""
        return self._channel.ask(TokenizerLookUp("batch_decode", rows, options))

    def decode(self, ids: list[int], **options: Any) -> str:
        """Text of one row of ids."""
        return self._channel.ask(TokenizerLookUp("decode", ids, options))


class RemoteReceiver:
    """A :class:`~latentwire.receivers.base.Receiver` that asks a replica; its losses hand on the gradients that come back."""

    def __init__(self, config: ReceiverConfig, channel: Channel, device: torch.device, *, head_is_text: bool) -> None:
        """``device``: where the wire is trained. ``head_is_text``: whether what stands before the message may be read once."""
        self.config, self.name, self.device = config, config.name, device
        self.channel, self.head_is_text = channel, head_is_text
        self.facts = channel.facts()
        self.tokenizer = RemoteTokenizer(channel, self.facts.special)
        self.width, self.embed_rms = self.facts.width, self.facts.embed_rms
        self.held_bytes = 0
        self.bytes_sent = 0
        """Of tensors, to the replica and back."""
        self._added: list[torch.Tensor] = []

    def skeleton(self) -> nn.Module:
        """The model on the meta device."""
        return skeleton(self.config, check=False)  # its replica has loaded the weights

    def fingerprint(self) -> str:
        """Of the weights when their replica had loaded them: whoever started it looks again at the end."""
        return self.facts.fingerprint

    def span_embeddings(self, ids: list[list[int]], span_BL2: torch.Tensor) -> torch.Tensor:
        """Means ``[B, L, D]`` of the texts' token embeddings over spans of their bytes."""
        return self._ask(SpanLookUp(ids, span_BL2.cpu())).to(self.device)

    def token_embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings ``[…, D]`` of token ids."""
        return self._ask(EmbedLookUp(ids.cpu())).to(self.device)

    @contextmanager
    def added_to_slots(self, added_NE: torch.Tensor, latents_RS: torch.Tensor) -> Iterator[None]:
        """Add to keys and values where latents stand, in what it reads until this context ends."""
        self._added.append(added_NE)
        try:
            yield
        finally:
            self._added.pop()  # contexts end in the reverse order

    def read_head(self, batch: Batch) -> Batch:
        """The batch as it is: its replica takes the head off."""
        return batch

    def teach(self, told: Teacher | Batch, settings: LossConfig) -> Teacher | Batch:
        """What was told, as it is: its replica reads texts where there are any."""
        return told

    def losses(self, task: LossTask, soft_ND: torch.Tensor) -> torch.Tensor:
        """Each term's weighted share of the loss ``[T]``. Only their plain sum is differentiable."""
        return _Losses.apply(soft_ND, self._sum_added(), self, task)

    def score_answers(self, batch: Batch, soft_ND: torch.Tensor | None = None) -> AnswerScores:
        """How likely the supervised tokens are."""
        return self._ask(ScoreRequest(batch.to("cpu"), self._prompt(soft_ND)))

    def generate(
        self, batch: Batch, stop_ids: tuple[int, ...], max_new_tokens: int, soft_ND: torch.Tensor | None = None
    ) -> Decoded:
        """Greedy continuations of left-padded prompts."""
        return self._ask(GenerateRequest(batch.to("cpu"), self._prompt(soft_ND), tuple(stop_ids), max_new_tokens))

    def _sum_added(self) -> torch.Tensor | None:
        return torch.stack(self._added).sum(0) if self._added else None

    def _prompt(self, soft_ND: torch.Tensor | None) -> Prompt:
        return Prompt(_to_send(soft_ND), _to_send(self._sum_added()))

    def _ask(self, request: Request | LookUp) -> Any:
        answer = self.channel.ask(request)
        self.bytes_sent += tensor_bytes(request) + tensor_bytes(answer)
        return answer


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, soft_ND: torch.Tensor, added_NE: torch.Tensor | None, receiver: RemoteReceiver, task: LossTask
    ) -> torch.Tensor:
        told = task.teacher.to("cpu") if task.teacher is not None else None
        sent = LossTask(task.batch.to("cpu"), task.weights, task.counts, told, task.settings, task.rows_at_once)
        prompt = Prompt(_to_send(soft_ND), _to_send(added_NE))
        answer = receiver._ask(LossRequest(sent, prompt, any(ctx.needs_input_grad), receiver.head_is_text))
        ctx.gradient = Prompt(
            *(None if g is None else g.to(soft_ND.device) for g in (answer.gradient.soft_ND, answer.gradient.added_NE))
        )
        return answer.shares_T.to(soft_ND.device)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        scale = common_gradient(grad_outputs[0])
        soft_ND, added_NE = (None if g is None else g * scale for g in (ctx.gradient.soft_ND, ctx.gradient.added_NE))
        return soft_ND, added_NE, None, None


def _to_send(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().cpu().contiguous()


def tensor_bytes(found: Any) -> int:
    """Bytes of all tensors in a dataclass, at any depth."""
    if isinstance(found, torch.Tensor):
        return found.numel() * found.element_size()
    if is_dataclass(found):
        return sum(tensor_bytes(getattr(found, one.name)) for one in fields(found))
    return sum(map(tensor_bytes, found)) if isinstance(found, list | tuple) else 0
