"""Loss weights, their schedules, and named sets of both."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from latentwire.config.section import Section, knob

LOSS_BUNDLES: dict[str, dict[str, Any]] = {
    "answer": {"answer_ce_weight": 1.0},
    "first_k_curriculum": {
        "answer_ce_weight": 0.5,
        "first_k_ce_weight": 1.0,
        "first_token_ce_weight": 0.5,
        "k": 8,
        "schedules": {"k": {"kind": "linear", "start": 0.125, "steps": 500}},
    },
    "distil": {
        "answer_ce_weight": 0.5,
        "kd_weight": 1.0,
        "kd_temperature": 2.0,
        "k": 8,
        "schedules": {"kd_weight": {"kind": "linear", "steps": 100}},
    },
    "pretrain": {
        "answer_ce_weight": 0.0,
        "reconstruction_ce_weight": 0.3,
        "continuation_ce_weight": 0.7,
    },
    "autoencode": {
        "answer_ce_weight": 1.0,
        "reconstruction_ce_weight": 1.0,
        "continuation_ce_weight": 0.5,
        "schedules": {
            "reconstruction_ce_weight": {"kind": "cosine", "start": 1.0, "end": 0.1, "steps": 1000},
            "latent_dropout": {"kind": "linear", "start": 0.0, "end": 1.0, "steps": 500},
        },
    },
}
"""Named sets of weights and schedules; ``losses.bundle`` chooses one."""


class Schedule(Section):
    """The course of a weight or size over the training steps after the alignment."""

    kind: Literal["constant", "linear", "cosine", "step"] = "constant"
    """Shape of the way from ``start`` to ``end``. ``step``: ``start`` before ``steps``, ``end`` from then on."""
    start: float = Field(0.0, ge=0)
    """Factor on the knob's own value at the first step."""
    end: float = Field(1.0, ge=0)
    """Factor from ``steps`` on."""
    steps: int = Field(1, ge=1)
    """Optimiser steps from ``start`` to ``end``."""

    def factor(self, step: int) -> float:
        """Return the factor at a step counted from the end of the alignment."""
        # The way that is behind, 0 to 1; a cosine turns it into (1 − cos π·share) / 2.
        share = min(1.0, step / self.steps)
        if self.kind == "constant":
            return self.end
        if self.kind == "step":
            return self.start if share < 1 else self.end
        if self.kind == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share


class LossConfig(Section):
    """Weights of the loss terms; all of them read the logits of one forward per receiver.

    A ``bundle`` names a set of weights and schedules; every key given beside it wins over it.
    """

    bundle: str | None = knob(None, teachers="value")
    """A named set of weights and schedules: ``answer``, ``first_k_curriculum``, ``distil``, ``pretrain``,
    ``autoencode``."""
    answer_ce_weight: float = knob(1.0, ge=0, may_change=("cloned trial",))
    """Weight of the cross-entropy of the whole answer and its stop token, mean over tokens."""
    first_k_ce_weight: float = knob(0.0, ge=0, may_change=("cloned trial",))
    """Weight of the cross-entropy of the first ``k`` answer tokens, mean over tokens."""
    first_token_ce_weight: float = knob(0.0, ge=0, may_change=("cloned trial",))
    """Weight of the cross-entropy of the first answer token."""
    kd_weight: float = knob(0.0, ge=0, teachers="size")
    """Weight of the KL divergence from the teacher (the same receiver on the full text) at the first ``k`` answer tokens,
    mean over tokens."""
    kd_temperature: float = knob(1.0, gt=0, le=100, teachers="value")
    """Softens both distributions of the KL, which is multiplied by its square (arXiv 1503.02531)."""
    kd_top_k: int = knob(32, ge=0, teachers="value")
    """Teacher's likeliest tokens to compare one by one; the others count as one event. What the teachers say about them is
    computed once and kept beside the shards. 0: the whole vocabulary, which is too large to keep: every step runs the
    teachers."""
    hidden_kd_weight: float = knob(0.0, ge=0, teachers="size")
    """Weight of the squared distance to the teacher's layer-normalised hidden states at the first ``k`` answer tokens."""
    hidden_kd_depths: tuple[float, ...] = knob((0.5, 1.0), min_length=1, teachers="value")
    """Layers of that comparison as fractions of the receiver's depth, each in [0, 1]."""
    slot_kd_weight: float = knob(0.0, ge=0, teachers="size")
    """Weight of the squared distance of each latent's keys (before rotary positions) and values, in every layer of a
    receiver, to the means of the text's over the latent's span, where the teacher reads it; relative to those, mean over
    latents. Its teacher reads the texts in every step: the targets are too large to keep."""
    kd_teacher: Literal["untuned", "tuned"] = knob("untuned", teachers="value")
    """Who teaches: the receiver on the full text as it is, or behind the prefix of its tuned text reader, which is
    trained first by what ``evaluation.tuned_text`` says."""
    kd_rows: Literal["all", "right"] = "all"
    """Rows that the teacher teaches: all, or those whose answer it would give itself."""
    reconstruction_ce_weight: float = Field(0.0, ge=0)
    """Weight of the cross-entropy of the message's own text, repeated by the receiver from its soft prompt; mean over
    tokens. Dense where answers are short: it teaches the encoder to carry the text before questions teach it what matters
    (arXiv 2510.20535)."""
    reconstruction_tokens: int | None = Field(None, ge=1)
    """Repeat only a stretch of so many tokens, whose place is drawn by row and step: cheap where a receiver is large
    and texts are long. ``None``: the whole text."""
    reconstruction_cue: int = Field(0, ge=0)
    """Tokens right before that stretch that the receiver is given, so that it must find the place in the message as it
    finds an answer's. Only with ``reconstruction_tokens``."""
    continuation_ce_weight: float = Field(0.0, ge=0)
    """Weight of the cross-entropy of the text that follows, given by the receiver from the message of what comes before it;
    mean over tokens."""
    k: int = knob(4, ge=1, teachers="size")
    """Tokens that ``first_k_ce_weight`` and the ``kd`` terms weigh."""
    schedules: dict[str, Schedule] = Field(default_factory=dict)
    """Knob of this section (a weight, or ``k``), or ``latent_dropout``, to the factor on it over the steps."""

    @property
    def asking(self) -> list[str]:
        """Weights, of those above 0, of the terms that read answers to questions; the others read texts alone."""
        texts = ("reconstruction_ce_weight", "continuation_ce_weight", "slot_kd_weight")
        weights = [name for name in type(self).model_fields if name.endswith("_weight")]
        above_0 = [name for name in weights if getattr(self, name)]
        return [name for name in above_0 if name not in texts]

    def factor(self, knob: str, step: int) -> float:
        """Return the factor on a knob's own value at a step counted from the end of the alignment; 1 without a schedule."""
        schedule = self.schedules.get(knob)
        return 1.0 if schedule is None else schedule.factor(step)

    @model_validator(mode="before")
    @classmethod
    def _bundle_first(cls, values: Any) -> Any:
        name = values.get("bundle") if isinstance(values, dict) else None
        if name is None:
            return values
        if not isinstance(name, str) or name not in LOSS_BUNDLES:
            raise ValueError(f"bundle must be one of {', '.join(LOSS_BUNDLES)}, got {name!r}")
        # On the right, what was given wins, key by key; schedules are one key.
        return LOSS_BUNDLES[name] | values

    @model_validator(mode="after")
    def _something_to_learn(self) -> LossConfig:
        weights = [name for name in type(self).model_fields if name.endswith("_weight")]
        # It looks at what others make the receiver read, and cannot be all there is to learn.
        weights.remove("slot_kd_weight")
        if not any(getattr(self, name) > 0 for name in weights):
            raise ValueError("at least one loss weight must be > 0, got all 0")
        # Looked at are the ends alone: step 0, and the step at which the longest schedule ends.
        last = max((schedule.steps for schedule in self.schedules.values()), default=0)
        for when, end, step in (("first", "start", 0), ("last", "end", last)):
            if not any(getattr(self, name) * self.factor(name, step) > 0 for name in weights):
                raise ValueError(
                    f"at least one loss weight must be > 0 at the {when} step of the schedules, got all 0; give one of "
                    f"{', '.join(name for name in weights if name in self.schedules)} a schedule with {end} > 0"
                )
        if unknown := set(self.schedules) - {*weights, "slot_kd_weight", "k", "latent_dropout"}:
            raise ValueError(
                f"schedules must name a weight, k or latent_dropout, got {', '.join(sorted(unknown))}"
            )
        if self.reconstruction_cue and self.reconstruction_tokens is None:
            raise ValueError(
                f"reconstruction_cue needs a stretch to stand before, got {self.reconstruction_cue} and "
                f"reconstruction_tokens null; set losses.reconstruction_tokens"
            )
        if any(not 0 <= depth <= 1 for depth in self.hidden_kd_depths):
            raise ValueError(f"hidden_kd_depths must lie in [0, 1], got {self.hidden_kd_depths}")
        return self
