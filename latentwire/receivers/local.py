"""A receiver with its weights in this process."""

from __future__ import annotations

import torch
from torch import nn

from latentwire.config import LossConfig
from latentwire.losses.bundles import Reader, Teacher, loss_terms, state_depths
from latentwire.losses.terms import teacher_rows, token_ce
from latentwire.models.lm import LMWrapper
from latentwire.models.past import Past
from latentwire.prompts.batch import Batch
from latentwire.receivers.base import AnswerScores, LossTask, part


class LocalReceiver(LMWrapper):
    """An :class:`~latentwire.models.lm.LMWrapper` that also computes losses and scores."""

    @property
    def held_bytes(self) -> int:
        """Bytes of frozen weights."""
        return sum(p.numel() * p.element_size() for p in self.lm.parameters())

    def skeleton(self) -> nn.Module:
        """Return the model itself."""
        return self.lm

    @torch.no_grad()
    def read_teacher(self, source: Teacher | Batch, settings: LossConfig) -> Teacher:
        """Return its output on texts, as it is: call it where no feature is attached."""
        source = source.to(self.device)
        if isinstance(source, Teacher):
            return source
        depths = state_depths(settings)
        with part(f"teach {self.name}"):
            hidden_ND, states = self.supervised_states(self.read_head(source), None, depths)
            logits_NV = self.logits(hidden_ND)
            rows = teacher_rows(logits_NV, settings.kd_temperature, settings.kd_top_k)
            return Teacher(rows, states)

    def losses(
        self, task: LossTask, soft_ND: torch.Tensor | None, past: Past | None = None
    ) -> torch.Tensor:
        """Return each term's weighted share of the loss ``[T]``.

        They are differentiable in ``soft_ND``, in ``past`` and in what features attach.
        """
        with part(f"read {self.name}"):
            hidden_ND, states = self.supervised_states(task.batch, soft_ND, task.depths, past)
        return self.shares(task, Reader(hidden_ND, self.logits, states))

    def shares(self, task: LossTask, reader: Reader) -> torch.Tensor:
        """Return the same from states that are computed already."""
        assert not isinstance(task.teacher, Batch), "read_teacher comes first"
        with part(f"loss {self.name}"):
            shares = loss_terms(
                task.weights, task.batch, reader, task.teacher, task.counts, task.rows_at_once
            )
            return torch.stack(list(shares.values()))

    @torch.no_grad()
    def score_answers(
        self, batch: Batch, soft_ND: torch.Tensor | None = None, past: Past | None = None
    ) -> AnswerScores:
        """Score the supervised tokens, also of rows that go on from ``past``."""
        logits_NV = self.supervised_logits(batch, soft_ND, past)
        target_N = batch.target_N.to(logits_NV.device)
        # What is no number is not less likely than the target.
        likelier_N = (~(logits_NV <= logits_NV.gather(1, target_N[:, None]))).sum(1)
        return AnswerScores(token_ce(logits_NV, target_N).cpu(), likelier_N.cpu())
