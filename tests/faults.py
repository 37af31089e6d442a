"""Faults of the original, planted on purpose: ``pytest -p tests.faults`` with one named in ``LATENTWIRE_FAULT``.

``tests/test_planted_faults.py`` runs the suite's own oracles under each of them; every one must fail.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch

from latentwire.data import layout
from latentwire.data.layout import Batch, SequenceBuilder
from latentwire.models.lm import LMWrapper
from latentwire.receivers.own import OwnReceiver


def bos_twice() -> None:
    """A second BOS after the first."""
    build = SequenceBuilder.__init__

    def broken(self: SequenceBuilder, *arguments: Any) -> None:
        build(self, *arguments)
        if self.bos == 0:
            self.head_ids = [self.head_ids[0], *self.head_ids]

    SequenceBuilder.__init__ = broken  # type: ignore[method-assign]


def anchor_merged() -> None:
    """The anchor's white space is left to the anchor, and nobody checks the boundary."""
    build = SequenceBuilder.__init__

    def broken(self: SequenceBuilder, *arguments: Any) -> None:
        build(self, *arguments)
        self.anchor_ids = self._template_ids(self.anchor_text + self.answer_lead)
        self.answer_lead = ""

    SequenceBuilder.__init__ = broken  # type: ignore[method-assign]
    SequenceBuilder.check_boundaries = lambda self, answers, ids: [True] * len(answers)  # type: ignore[method-assign]


def answer_shifted() -> None:
    """Targets are predicted from their own positions: the label shift done twice."""
    collate = layout.collate

    def broken(*arguments: Any, **named: Any) -> Batch:
        batch = collate(*arguments, **named)
        return dataclasses.replace(batch, predict_N=batch.predict_N + 1)

    layout.collate = broken


def padding_attended() -> None:
    """Attention over everything, padding too."""
    embed = LMWrapper.embed

    def broken(self: LMWrapper, batch: Batch, soft_ND: torch.Tensor | None) -> torch.Tensor:
        batch.attention_BS.fill_(1)
        return embed(self, batch, soft_ND)

    LMWrapper.embed = broken  # type: ignore[method-assign]


def wrong_teacher_row() -> None:
    """Each position learns from its neighbour's teacher."""
    teach = OwnReceiver.teach

    def broken(self: OwnReceiver, *arguments: Any) -> Any:
        teacher = teach(self, *arguments)
        assert teacher.rows is not None
        rows = dataclasses.replace(teacher.rows, log_p_NK=teacher.rows.log_p_NK.roll(1, 0))
        return dataclasses.replace(teacher, rows=rows)

    OwnReceiver.teach = broken  # type: ignore[method-assign]


FAULTS = {
    fault.__name__: fault for fault in (bos_twice, anchor_merged, answer_shifted, padding_attended, wrong_teacher_row)
}

if "LATENTWIRE_FAULT" in os.environ:
    FAULTS[os.environ["LATENTWIRE_FAULT"]]()
