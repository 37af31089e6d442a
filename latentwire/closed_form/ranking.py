"""Retrieval heads: the key-value heads of a receiver that fetch from the text.

A receiver reads some hundred texts and recites each (KVzip, arXiv 2505.23416). A head's score is
the most attention that the recital pays to a position of the text, averaged over positions, then
over texts. The heads with the highest scores are the ones that need the text's keys and values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from latentwire.errors import UserError
from latentwire.models import own_cache
from latentwire.models.head_slots import Heads
from latentwire.models.key_heads import shape_of
from latentwire.models.lm import LMWrapper
from latentwire.models.own_cache import Reading
from latentwire.prompts.sequences import PromptBuilder

TOGETHER = 8
"""Texts that are recited between two lines of progress."""


class RankingError(UserError):
    """Heads that cannot be ranked, chosen or read from a file."""


@dataclass(frozen=True, eq=False)
class HeadScores:
    """How much each key-value head of a receiver fetches from texts."""

    receiver: str
    score_LH: torch.Tensor
    """From 0 to 1, fp32 on the CPU: layers × key-value heads."""
    texts: int
    """Texts that the scores are means over."""
    way: Literal["recital"] = "recital"

    def to_json(self) -> str:
        """Return the scores as JSON, exactly: a double holds any fp32."""
        return json.dumps(
            {
                "receiver": self.receiver,
                "way": self.way,
                "texts": self.texts,
                "scores": self.score_LH.tolist(),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> HeadScores:
        """Read what :meth:`to_json` wrote. Raises :class:`RankingError` for anything else."""
        try:
            document = json.loads(text)
            score_LH = torch.tensor(document["scores"], dtype=torch.float32)
            scores = cls(str(document["receiver"]), score_LH, int(document["texts"]))
            way = document["way"]
        except (ValueError, TypeError, KeyError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise _no_scores(reason) from error
        if way != "recital":
            raise _no_scores(f"way {way!r}, not 'recital'")
        if score_LH.dim() != 2 or not score_LH.numel() or not bool(score_LH.isfinite().all()):
            raise _no_scores(f"no finite layers × heads, but {list(score_LH.shape)}")
        return scores


def _no_scores(reason: str) -> RankingError:
    return RankingError(
        f"scores of heads must be the JSON that HeadScores.to_json wrote, got {reason}; rank the "
        f"receiver's heads again"
    )


@torch.no_grad()
def rank(
    lm: LMWrapper,
    builder: PromptBuilder,
    texts: Sequence[list[int]],
    reading: Reading,
    prefix: int = 0,
    say: Callable[[str], object] | None = None,
) -> HeadScores:
    """Score every key-value head by what recitals of texts attend to.

    A position that a layer with a window no longer sees right after the text counts as 0. Texts
    without tokens are left out.

    Args:
        lm: the receiver.
        builder: builds its prompts.
        texts: tokens where a message would stand.
        reading: attaches what stands before them.
        prefix: constant soft positions before each text.
        say: takes a line about how far it is.

    Raises :class:`RankingError` where there is nothing to recite, and
    :class:`~latentwire.pretrained.weights.ReceiverError` by :func:`shape_of`.
    """
    layers, heads, _ = shape_of(lm.lm)
    # Texts of one length stand together, where they need the least padding.
    recited = sorted(filter(None, texts), key=len)
    if not recited:
        raise RankingError(
            f"heads of receiver {lm.name} are ranked by texts that it recites, got "
            f"{len(texts)} texts and none with tokens; give some hundred texts like those that "
            f"messages will stand for"
        )
    total_LH = torch.zeros(layers, heads, dtype=torch.float64)
    for start in range(0, len(recited), TOGETHER):
        together = recited[start : start + TOGETHER]
        for score_LHT in own_cache.scores(lm, builder, together, reading, prefix):
            # [L, H, T] → [L, H]; −1 marks positions that a window has left behind.
            total_LH += score_LHT.clamp(min=0).double().mean(-1).cpu()
        if say is not None:
            done = start + len(together)
            say(f"ranking heads of {lm.name}: {done:,} of {len(recited):,} texts recited")
    return HeadScores(lm.name, (total_LH / len(recited)).float(), len(recited))


def choose(scores: HeadScores, count: int) -> Heads:
    """Return the ``count`` best heads, ordered by layer, then head.

    Of equal heads the first are taken. Raises :class:`RankingError` for fewer heads than one, or
    more than there are.
    """
    layers, heads = scores.score_LH.shape
    if not 1 <= count <= layers * heads:
        raise RankingError(
            f"heads to choose must be 1 to {layers * heads}, all that receiver {scores.receiver} "
            f"has in {layers} layers, got {count}; choose a number between"
        )
    # Places count through all heads, layer by layer; a stable sort keeps equal ones in that order.
    order = scores.score_LH.flatten().sort(descending=True, stable=True).indices[:count]
    return tuple((place // heads, place % heads) for place in sorted(order.tolist()))
