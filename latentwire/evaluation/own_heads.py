"""A receiver's own keys and values of a text in some heads: what a message into those can be at best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from latentwire.config import RunConfig
from latentwire.config.resolve import ConfigError
from latentwire.model import LatentWire
from latentwire.models.head_slots import Heads, cached_entries
from latentwire.pretrained.weights import ReceiverError
from latentwire.prompts.batch import collate


def check(run: RunConfig) -> None:
    """Raise :class:`~latentwire.config.resolve.ConfigError` for a wire whose messages stand in every head."""
    if run.adapter.kind != "heads":
        raise ConfigError(
            f"mode own_heads shows a receiver's own keys and values in a wire's heads, got adapter.kind {run.adapter.kind}; "
            f"leave own_heads out"
        )


def heads_of(wire: LatentWire, receivers: Iterable[str] | None = None) -> dict[str, Heads]:
    """Return receiver → the heads that its adapter has chosen; ``None``: of all receivers."""
    adapters: Any = wire.interlingua.adapters
    names = wire.receivers if receivers is None else receivers
    return {name: adapters[name].heads for name in names}


def own_entries(
    wire: LatentWire, receiver: str, texts: Sequence[list[int]], heads: Heads
) -> list[torch.Tensor]:
    """Return a receiver's own keys (before rotary positions) and values of texts, in some heads.

    It reads them behind the wire's prefix.

    Args:
        wire: holds the receiver and its prefix.
        receiver: its name.
        texts: its own tokens, where messages would stand.
        heads: J chosen heads.

    Returns:
        ``[T, E]`` for each text: for each head a key, then a value.
    """
    lm, builder = wire.local_receiver(receiver), wire.builders[receiver]
    alone = [builder.text_alone(ids, builder.prefix) for ids in texts]
    batch = collate(alone).to(lm.device)
    lm.check_heads()
    if not lm.may_part(batch.ids_BS.shape[1]):
        raise ReceiverError(
            f"receiver {receiver} has layers that keep {lm.window} positions, its keys and values of a text that ends at "
            f"{batch.ids_BS.shape[1]:,} are not all there; lower data.max_context_bytes"
        )
    # Head, prefix, then the text, padded on its right: all texts start at one position.
    start = len(builder.head_ids) + builder.prefix
    with torch.no_grad(), wire.reading(receiver, batch, None) as soft_ND:
        cache = lm.prefill(batch, soft_ND).cache
        entry_RTE = cached_entries(lm.lm, cache, heads, start)
    # Without the padding.
    return [entry_TE[: len(ids)] for entry_TE, ids in zip(entry_RTE, texts, strict=True)]
