"""Requests to shared weights, answered for several trials in one pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal

import torch

from latentwire.losses.bundles import Reader, Teacher
from latentwire.models.decoded import Decoded
from latentwire.models.head_slots import Heads
from latentwire.prompts.batch import Batch, join
from latentwire.receivers.base import AnswerScores, LossTask
from latentwire.receivers.local import LocalReceiver


@dataclass(frozen=True)
class Prompt:
    """Tensors that a trial lays over the slots of its sequences; or their gradients."""

    soft_ND: torch.Tensor | None
    """Soft vectors, row by row; ``None`` for text prompts."""
    added_NE: torch.Tensor | None
    """Added to keys and values where latents stand; ``None``: nothing."""
    entries_NE: torch.Tensor | None = None
    """Keys and values of latents that stand in ``heads`` alone; ``None``: they stand in all."""
    heads: Heads = ()

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Prompt:
        """Return a prompt of the changed tensors."""
        return Prompt(
            None if self.soft_ND is None else change(self.soft_ND),
            None if self.added_NE is None else change(self.added_NE),
            None if self.entries_NE is None else change(self.entries_NE),
            self.heads,
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors that are there."""
        tensors = (self.soft_ND, self.added_NE, self.entries_NE)
        return [tensor for tensor in tensors if tensor is not None]

    @property
    def form(self) -> tuple[Any, ...]:
        """The kinds of tensors it holds: prompts of one form can be laid over a joined batch."""
        return self.soft_ND is None, self.added_NE is None, self.entries_NE is None, self.heads


@dataclass(frozen=True)
class Request(ABC):
    """One trial's request that takes a forward pass, which may answer other trials' too."""

    @property
    @abstractmethod
    def positions(self) -> int:
        """Rows times positions: the cost of a pass over it."""

    @property
    @abstractmethod
    def alike(self) -> Any:
        """A key: requests with equal keys can be answered in one pass."""

    @staticmethod
    @abstractmethod
    def answer(lm: LocalReceiver, requests: Sequence[Any]) -> list[Any]:
        """Answer several requests that are alike, each as if it had been alone."""


@dataclass(frozen=True)
class LookUp(ABC):
    """One trial's request that takes no forward pass: answered at once and alone."""

    @abstractmethod
    def answer(self, lm: LocalReceiver) -> Any:
        """Return the value that is looked up."""


@dataclass(frozen=True)
class LossRequest(Request):
    """A request for a trial's loss, and for its gradient with respect to the prompt."""

    task: LossTask
    prompt: Prompt
    gradient: bool
    head_is_text: bool
    """True where the text before the message may be read once and kept."""

    @property
    def positions(self) -> int:
        """Rows times positions."""
        return self.task.batch.ids_BS.numel()

    @property
    def alike(self) -> Any:
        """A key of the layers and the form that are read; weights, K and lengths may differ."""
        return LossRequest, self.task.depths, self.head_is_text, self.prompt.form

    @staticmethod
    def answer(lm: LocalReceiver, requests: Sequence[LossRequest]) -> list[LossAnswer]:
        """Compute each request's shares of the loss, and their sum's gradient for its prompt."""
        tasks = [request.task for request in requests]
        teachers: list[Teacher | None] = []
        for task in tasks:
            source = task.teacher
            teachers.append(None if source is None else lm.read_teacher(source, task.settings))
        batch = join([task.batch for task in tasks]).to(lm.device)
        if requests[0].head_is_text:
            batch = lm.read_head(batch)
        gradient = any(request.gradient for request in requests)
        prompts = [_leaves(request.prompt, lm.device, gradient) for request in requests]
        with torch.set_grad_enabled(gradient), ExitStack() as stack:
            soft_ND = _read_into(lm, batch, prompts, stack)
            hidden_ND, states = lm.supervised_states(batch, soft_ND, tasks[0].depths)
            shares, start = [], 0
            for task, teacher in zip(tasks, teachers, strict=True):
                # Targets [N] of the joined batch lie request by request.
                rows = slice(start, start + len(task.batch.target_N))
                start = rows.stop
                reader = Reader(hidden_ND[rows], lm.logits, [state_ND[rows] for state_ND in states])
                task = replace(task, batch=task.batch.to(lm.device), teacher=teacher)
                shares.append(lm.shares(task, reader))
            # No request's loss hangs on another's prompt, so the sum's gradient is each one's own.
            nothing = [Prompt(None, None)] * len(prompts)
            gradients = _gradients(torch.cat(shares).sum(), prompts) if gradient else nothing
        answers = []
        for shares_T, prompt_gradient in zip(shares, gradients, strict=True):
            answers.append(LossAnswer(shares_T.detach().float().cpu(), prompt_gradient))
        return answers


@dataclass(frozen=True)
class LossAnswer:
    """The losses of one request."""

    shares_T: torch.Tensor
    gradient: Prompt
    """Gradient of the shares' sum with respect to the prompt; empty where none is needed."""


@dataclass(frozen=True)
class ScoreRequest(Request):
    """A request for the likelihood of answers."""

    batch: Batch
    prompt: Prompt

    @property
    def positions(self) -> int:
        """Rows times positions."""
        return self.batch.ids_BS.numel()

    @property
    def alike(self) -> Any:
        """A key of the prompt's form: whether it has soft vectors, additions, and entries of its own."""
        return ScoreRequest, self.prompt.form

    @staticmethod
    def answer(lm: LocalReceiver, requests: Sequence[ScoreRequest]) -> list[AnswerScores]:
        """Score the answers of each request."""
        batch = join([request.batch for request in requests]).to(lm.device)
        with ExitStack() as stack:
            soft_ND = _read_into(lm, batch, [request.prompt for request in requests], stack)
            scores = lm.score_answers(batch, soft_ND)
        sizes = [len(request.batch.target_N) for request in requests]
        parts = zip(scores.ce_N.split(sizes), scores.likelier_N.split(sizes), strict=True)
        # Copies: a slice would carry the others' numbers with it when it is sent.
        return [AnswerScores(ce_N.clone(), likelier_N.clone()) for ce_N, likelier_N in parts]


@dataclass(frozen=True)
class GenerateRequest(Request):
    """A request for greedy answers."""

    batch: Batch
    prompt: Prompt
    stop_ids: tuple[int, ...]
    max_new_tokens: int

    @property
    def positions(self) -> int:
        """Rows times positions, those to be decoded too."""
        rows, width = self.batch.ids_BS.shape
        return rows * (width + self.max_new_tokens)

    @property
    def alike(self) -> Any:
        """A key of the prompt's form, and of how decoding ends."""
        ends = self.stop_ids, self.max_new_tokens
        return GenerateRequest, ends, self.prompt.form

    @staticmethod
    def answer(lm: LocalReceiver, requests: Sequence[GenerateRequest]) -> list[Decoded]:
        """Decode answers to each request; the times are those of the whole pass."""
        first = requests[0]
        batch = join([request.batch for request in requests], side="left").to(lm.device)
        with ExitStack() as stack:
            soft_ND = _read_into(lm, batch, [request.prompt for request in requests], stack)
            decoded = lm.generate(batch, first.stop_ids, first.max_new_tokens, soft_ND)
        # Rows of the joined batch lie request by request.
        answers, start = [], 0
        for request in requests:
            end = start + len(request.batch.ids_BS)
            rows = decoded.rows[start:end]
            answers.append(Decoded(rows, decoded.prefill_ms, decoded.decode_ms))
            start = end
        return answers


@dataclass(frozen=True)
class EmbedLookUp(LookUp):
    """A request for the embeddings of tokens."""

    ids: torch.Tensor

    def answer(self, lm: LocalReceiver) -> torch.Tensor:
        """Return ``[…, D]``."""
        return lm.token_embeddings(self.ids).cpu()


@dataclass(frozen=True)
class SpanLookUp(LookUp):
    """A request for the mean embeddings of spans of texts."""

    ids: list[list[int]]
    span_BL2: torch.Tensor

    def answer(self, lm: LocalReceiver) -> torch.Tensor:
        """Return ``[B, L, D]``."""
        return lm.span_embeddings(self.ids, self.span_BL2).cpu()


@dataclass(frozen=True)
class TokenizerLookUp(LookUp):
    """A call of one of the receiver's tokenizer's methods."""

    method: Literal["__call__", "apply_chat_template", "batch_decode", "decode"]
    argument: Any
    options: dict[str, Any]

    def answer(self, lm: LocalReceiver) -> Any:
        """Return the method's result; an encoding in a class that needs no transformers."""
        result = getattr(lm.tokenizer, self.method)(self.argument, **self.options)
        return SimpleNamespace(**result) if isinstance(result, Mapping) else result


def _leaves(prompt: Prompt, device: torch.device, gradient: bool) -> Prompt:
    """Copy a prompt to ``device``, as leaves of a graph of its own."""
    return prompt.each(lambda tensor: tensor.to(device).detach().requires_grad_(gradient))


def _gradients(total: torch.Tensor, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the gradient of ``total`` with respect to each prompt, on the CPU."""
    leaves: list[torch.Tensor] = []
    for prompt in prompts:
        leaves += prompt.tensors
    # each() changes a prompt's tensors in the order in which they are listed here.
    gradients = iter(torch.autograd.grad(total, leaves))
    return [prompt.each(lambda _: next(gradients).cpu()) for prompt in prompts]


def _read_into(
    lm: LocalReceiver, batch: Batch, prompts: Sequence[Prompt], stack: ExitStack
) -> torch.Tensor | None:
    """Lay all prompts over a joined batch; return the soft vectors, or ``None`` for texts."""
    added = [prompt.added_NE for prompt in prompts if prompt.added_NE is not None]
    if added:
        # Rows are joined prompt by prompt, and so are the vectors [N, E] of their latents.
        added_NE = torch.cat([part_NE.to(lm.device) for part_NE in added])
        stack.enter_context(lm.added_to_slots(added_NE, batch.latents_BS))
    entries = [prompt.entries_NE for prompt in prompts if prompt.entries_NE is not None]
    if entries:
        # Prompts are alike, so all of them have the same heads.
        entry_NE = torch.cat([part_NE.to(lm.device) for part_NE in entries])
        stack.enter_context(lm.heads_at_slots(entry_NE, prompts[0].heads))
    soft = [prompt.soft_ND for prompt in prompts if prompt.soft_ND is not None]
    if not soft:
        return None
    # [R, L, D] or [N, D] → [N, D]
    return torch.cat([part.flatten(0, -2).to(lm.device) for part in soft])
