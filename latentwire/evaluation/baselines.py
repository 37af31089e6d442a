"""Baselines: what a receiver can read instead of the message, in as many positions."""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

import torch

from latentwire.model import LatentWire
from latentwire.prompts.batch import collate
from latentwire.prompts.shown import Reads, shown

Mode = Literal[
    "text",
    "latent",
    "embeddings",
    "truncated",
    "window",
    "selected",
    "own_cache",
    "own_heads",
    "shuffled",
    "closed_book",
]
MODE_NAMES: dict[Mode, str] = {
    "text": "full text",
    "latent": "latents",
    "embeddings": "token embeddings as latents",
    "truncated": "text cut to as many tokens",
    "window": "as many tokens from anywhere",
    "selected": "as many most surprising tokens",
    "own_cache": "own cache, cut to as much (it has read the text)",
    "own_heads": "own keys and values in the message's heads (it has read the text)",
    "shuffled": "latents of another row",
    "closed_book": "closed book",
}
"""Each mode's name in words: what stands where the context belongs, in the order of the tables."""
MODES: tuple[Mode, ...] = tuple(MODE_NAMES)
DEFAULT_MODES: tuple[Mode, ...] = tuple(m for m in MODES if not m.startswith("own_"))
"""Modes of an evaluation that names none: for a cut cache the text is read once more and recited, and
not every receiver can have one, nor every wire heads of its own."""
MESSAGE_MODES: tuple[Mode, ...] = ("latent", "shuffled")
"""Modes that read a message of the encoder."""
BUDGET_MODES: tuple[Mode, ...] = (
    "latent",
    "truncated",
    "window",
    "selected",
    "own_cache",
    "shuffled",
)
"""Modes whose prompt, or cache, is as long as the message makes it."""


@torch.no_grad()
def kept_context(
    wire: LatentWire,
    receiver: str,
    mode: Mode,
    row: str,
    context: list[int],
    question: list[int],
    budget: int,
) -> list[int]:
    """Return the context's tokens that a text mode shows.

    ``truncated`` keeps the start, ``window`` a stretch that the row's id decides. ``selected``
    keeps the tokens that the receiver itself finds most surprising, in their order
    (self-information, as in Selective Context, arXiv 2310.06201). ``row``: the row's id.
    ``budget``: soft positions of its message.
    """
    if mode in ("embeddings", "own_cache", "own_heads"):
        return context
    # Where the message stands for the question too, so do as many tokens.
    budget = max(0, budget - len(wire.builders[receiver].message_ids([], question)))
    if mode != "selected":
        return shown(cast(Reads, mode), row, context, budget)
    if len(context) <= budget:
        return context
    surprise_T = self_information(wire, receiver, context, question)
    # topk orders by surprise; the text's own order is put back.
    positions = sorted(surprise_T.topk(budget).indices.tolist())
    return [context[position] for position in positions]


def self_information(
    wire: LatentWire, receiver: str, context: list[int], question: list[int]
) -> torch.Tensor:
    """Return −log p of each context token after the text prompt before it, in nats, ``[T]``."""
    prompt = wire.builders[receiver].text(context, question)
    # The context's own tokens are the targets: ce_N is then −log p of each, in order.
    start = prompt.message.start
    batch = collate([dataclasses.replace(prompt, supervised=range(start, start + len(context)))])
    return wire.receivers[receiver].score_answers(batch).ce_N
