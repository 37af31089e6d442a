"""What is asked of shared weights, answered for several askers in one pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch

from latentwire.prompts.sequences import Batch, join
from latentwire.losses.bundles import Reader
from latentwire.models.decoded import Decoded
from latentwire.receivers.base import AnswerScores, LossTask
from latentwire.receivers.local import LocalReceiver


@dataclass(frozen=True)
class Prompt:
    """What a trial lays over the slots of its sequences."""

    soft_ND: torch.Tensor | None
    added_NE: torch.Tensor | None
    """Added to keys and values where latents stand; ``None``: nothing."""


@dataclass(frozen=True)
class Request(ABC):
    """One trial's question to a receiver that is read for it, in a pass that may answer others too."""

    @property
    @abstractmethod
    def positions(self) -> int:
        """Rows times positions: what a pass over it costs."""

    @property
    @abstractmethod
    def alike(self) -> Any:
        """Requests with equal ones can be answered in one pass."""

    @staticmethod
    @abstractmethod
    def answer(lm: LocalReceiver, requests: Sequence[Any]) -> list[Any]:
        """An answer to each of several requests that are alike, as if it had been alone."""


@dataclass(frozen=True)
class LookUp(ABC):
    """One trial's question that nothing need be read for: answered at once and alone."""

    @abstractmethod
    def answer(self, lm: LocalReceiver) -> Any:
        """What is looked up."""


@dataclass(frozen=True)
class LossRequest(Request):
    """What a trial trains on, and where its soft prompt should go."""

    task: LossTask
    prompt: Prompt
    gradient: bool
    head_is_text: bool
    """Whether what stands before the message may be read once and kept."""

    @property
    def positions(self) -> int:
        """Rows times positions."""
        return self.task.batch.ids_BS.numel()

    @property
    def alike(self) -> Any:
        """Losses are read off the same layers; weights, K and lengths may differ."""
        return LossRequest, self.task.depths, self.head_is_text, self.prompt.added_NE is None

    @staticmethod
    def answer(lm: LocalReceiver, requests: Sequence[LossRequest]) -> list[LossAnswer]:
        """Shares of the loss, and their sum's gradient with respect to the prompt, of every request."""
        tasks = [request.task for request in requests]
        teachers = [None if t.teacher is None else lm.teach(t.teacher, t.settings) for t in tasks]
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
                rows = slice(start, start + len(task.batch.target_N))
                start = rows.stop
                own = LossTask(
                    task.batch.to(lm.device), task.weights, task.counts, teacher, task.settings, task.rows_at_once
                )
                shares.append(lm.shares(own, Reader(hidden_ND[rows], lm.logits, [state[rows] for state in states])))
            leaves = [leaf for prompt in prompts for leaf in (prompt.soft_ND, prompt.added_NE) if leaf is not None]
            gradients = iter(torch.autograd.grad(torch.cat(shares).sum(), leaves) if gradient else [None] * len(leaves))
        return [
            LossAnswer(
                shares_T.detach().float().cpu(),
                Prompt(*(None if leaf is None else _to_host(next(gradients)) for leaf in (p.soft_ND, p.added_NE))),
            )
            for shares_T, p in zip(shares, prompts, strict=True)
        ]


@dataclass(frozen=True)
class LossAnswer:
    """One request's losses."""

    shares_T: torch.Tensor
    gradient: Prompt
    """Of the shares' sum with respect to the prompt; empty where none was asked for."""


@dataclass(frozen=True)
class ScoreRequest(Request):
    """How likely are these answers?"""

    batch: Batch
    prompt: Prompt

    @property
    def positions(self) -> int:
        """Rows times positions."""
        return self.batch.ids_BS.numel()

    @property
    def alike(self) -> Any:
        """All of them."""
        return ScoreRequest, self.prompt.soft_ND is None, self.prompt.added_NE is None

    @staticmethod
    def answer(lm: LocalReceiver, requests: Sequence[ScoreRequest]) -> list[AnswerScores]:
        """A judgement of each."""
        batch = join([request.batch for request in requests]).to(lm.device)
        with ExitStack() as stack:
            found = lm.score_answers(batch, _read_into(lm, batch, [r.prompt for r in requests], stack))
        sizes = [len(request.batch.target_N) for request in requests]
        return [
            AnswerScores(ce_N.clone(), likelier_N.clone())  # a slice would carry the others' with it
            for ce_N, likelier_N in zip(found.ce_N.split(sizes), found.likelier_N.split(sizes), strict=True)
        ]


@dataclass(frozen=True)
class GenerateRequest(Request):
    """What do you answer?"""

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
        """Decoding ends in the same way."""
        ends = self.stop_ids, self.max_new_tokens
        return GenerateRequest, ends, self.prompt.soft_ND is None, self.prompt.added_NE is None

    @staticmethod
    def answer(lm: LocalReceiver, requests: Sequence[GenerateRequest]) -> list[Decoded]:
        """Answers to each; the times are those of the whole pass."""
        first = requests[0]
        batch = join([request.batch for request in requests], side="left").to(lm.device)
        with ExitStack() as stack:
            soft_ND = _read_into(lm, batch, [r.prompt for r in requests], stack)
            found = lm.generate(batch, first.stop_ids, first.max_new_tokens, soft_ND)
        rows = iter(found.rows)
        return [
            Decoded([next(rows) for _ in request.batch.ids_BS], found.prefill_ms, found.decode_ms)
            for request in requests
        ]


@dataclass(frozen=True)
class EmbedLookUp(LookUp):
    """Embeddings of tokens."""

    ids: torch.Tensor

    def answer(self, lm: LocalReceiver) -> torch.Tensor:
        """``[…, D]``."""
        return lm.token_embeddings(self.ids).cpu()


@dataclass(frozen=True)
class SpanLookUp(LookUp):
    """Mean embeddings of spans of texts."""

    ids: list[list[int]]
    span_BL2: torch.Tensor

    def answer(self, lm: LocalReceiver) -> torch.Tensor:
        """``[B, L, D]``."""
        return lm.span_embeddings(self.ids, self.span_BL2).cpu()


@dataclass(frozen=True)
class TokenizerLookUp(LookUp):
    """What the receiver's tokenizer makes of something."""

    method: Literal["__call__", "apply_chat_template", "batch_decode", "decode"]
    argument: Any
    options: dict[str, Any]

    def answer(self, lm: LocalReceiver) -> Any:
        """What the method returns; of an encoding the ids and what else was asked for, in a class that needs no transformers."""
        found = getattr(lm.tokenizer, self.method)(self.argument, **self.options)
        return SimpleNamespace(**found) if isinstance(found, Mapping) else found


def _leaves(prompt: Prompt, device: torch.device, gradient: bool) -> Prompt:
    def leaf(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device).detach().requires_grad_(gradient)

    return Prompt(leaf(prompt.soft_ND), leaf(prompt.added_NE))


def _read_into(lm: LocalReceiver, batch: Batch, prompts: Sequence[Prompt], stack: ExitStack) -> torch.Tensor | None:
    """Lay all prompts over a joined batch; returns the soft vectors, or ``None`` for texts."""
    added = [prompt.added_NE for prompt in prompts if prompt.added_NE is not None]
    if added:
        stack.enter_context(lm.added_to_slots(torch.cat([a.to(lm.device) for a in added]), batch.latents_BS))
    soft = [prompt.soft_ND for prompt in prompts if prompt.soft_ND is not None]
    return torch.cat([s.flatten(0, -2).to(lm.device) for s in soft]) if soft else None


def _to_host(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.cpu()
