"""Keys and values in some of a receiver's heads alone, where a message stands in its prompt.

A slot of a soft prompt stands in every head of every layer. Here a message's tokens have a key and a
value in a few key-value heads (those that fetch from a context), at the positions that the text
would take, and stand nowhere else: no position of the receiver's sequence is spent on them. Heads
that are not chosen see nothing of them. Chosen heads and others are two calls of attention, layers
without a chosen head are left as they are, so nothing is computed to be masked.

Keys are kept before rotary positions and are turned by the receiver's own table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from latentwire.models.attention import attend
from latentwire.models.key_heads import rotated
from latentwire.models.receiver_attention import plain_attention, register, visible
from latentwire.pretrained.weights import ReceiverError
from latentwire.prompts.batch import Batch

IMPLEMENTATION = "latentwire_heads"
"""Name of this attention among transformers' own."""

Heads = tuple[tuple[int, int], ...]
"""Chosen key-value heads: (layer, head), sorted."""


def none_chosen(count: int) -> torch.Tensor:
    """Return the place ``[J, 2]`` of so many heads (layer, head) that are not chosen yet: −1."""
    return torch.full((count, 2), -1, dtype=torch.long)


def chosen(head_J2: torch.Tensor) -> Heads:
    """Return chosen heads. Raises :class:`~latentwire.pretrained.weights.ReceiverError` where none are chosen."""
    if int(head_J2.min()) < 0:
        raise ReceiverError(
            "adapter.kind heads reads with heads that a calibration has chosen, got none chosen; train the wire, "
            "or load one that was trained"
        )
    return tuple((layer, head) for layer, head in head_J2.tolist())


def by_layer(heads: Heads) -> dict[int, slice]:
    """Return layer → where its heads stand among the chosen ones."""
    layers: dict[int, slice] = {}
    for place, (layer, _) in enumerate(heads):
        # Heads are sorted, so those of one layer stand side by side.
        start = layers[layer].start if layer in layers else place
        layers[layer] = slice(start, place + 1)
    return layers


def cached_entries(lm: nn.Module, cache: Any, heads: Heads, start: int = 0) -> torch.Tensor:
    """Return a model's own keys (before rotary positions) and values in some heads, ``[R, T, E]``.

    Args:
        lm: the model.
        cache: what it has kept of R rows, whose places count as positions.
        heads: J chosen heads. Of each there is a key, then a value: E = J · 2 · D.
        start: the first place that is wanted.
    """
    parts = []
    for layer, here in by_layer(heads).items():
        # heads: (layer, head) pairs; `here` is the stretch of them in this layer.
        numbers = [head for _, head in heads[here]]
        key_RHTD = cache.layers[layer].keys[:, numbers, start:]
        position_RT = torch.arange(start, start + key_RHTD.shape[2], device=key_RHTD.device)[None]
        # A cache holds keys that are turned to their positions; a message's are not.
        key_RHTD = rotated(lm, layer, key_RHTD, position_RT, back=True)
        value_RHTD = cache.layers[layer].values[:, numbers, start:].float()
        # [R, H, 2, T, D]: a key, then a value
        parts.append(torch.stack((key_RHTD, value_RHTD), 2))
    # [R, J, 2, T, D] → [R, T, E]
    return torch.cat(parts, 1).permute(0, 3, 1, 2, 4).flatten(2)


@dataclass(frozen=True)
class HeadEntries:
    """Keys and values of R rows, up to T tokens each, in the chosen heads of a receiver."""

    heads: Heads
    key_RJTD: torch.Tensor
    """Keys at their rotary positions; J counts the chosen heads."""
    value_RJTD: torch.Tensor
    keep_RT: torch.Tensor
    """True at a row's own tokens."""
    end_R: torch.Tensor
    """The first position after each row's tokens: from there on they are seen."""

    @property
    def longest(self) -> int:
        """T, the most tokens of a row."""
        return self.keep_RT.shape[1]

    def rows(self, past_R: torch.Tensor) -> HeadEntries:
        """Return those of the given rows, with their gradient."""
        return replace(
            self,
            key_RJTD=self.key_RJTD.index_select(0, past_R),
            value_RJTD=self.value_RJTD.index_select(0, past_R),
            keep_RT=self.keep_RT[past_R],
            end_R=self.end_R[past_R],
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all of it as tensors by name, for a file."""
        return {
            "heads.places": torch.tensor(self.heads),
            "heads.keys": self.key_RJTD,
            "heads.values": self.value_RJTD,
            "heads.keep": self.keep_RT,
            "heads.end": self.end_R,
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> HeadEntries | None:
        """Return what :meth:`tensors` gave, out of a file's tensors; ``None`` where it has none."""
        if "heads.places" not in tensors:
            return None
        heads = tuple((layer, head) for layer, head in tensors["heads.places"].tolist())
        names = ("keys", "values", "keep", "end")
        return cls(heads, *(tensors[f"heads.{name}"] for name in names))

    def to(self, device: torch.device) -> HeadEntries:
        """Copy to a device."""
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                moved[name] = value.to(device)
        return replace(self, **moved)

    def of_layers(self) -> dict[int, LayerEntries]:
        """Return layer → what its attention needs; layers without a chosen head have nothing."""
        layers = by_layer(self.heads)
        # Parts of one split: their gradients are joined at once, where slices' would be summed.
        sizes = [here.stop - here.start for here in layers.values()]
        parts = zip(self.key_RJTD.split(sizes, 1), self.value_RJTD.split(sizes, 1), strict=True)
        entries: dict[int, LayerEntries] = {}
        for (layer, here), (key_RHTD, value_RHTD) in zip(layers.items(), parts, strict=True):
            heads = tuple(head for _, head in self.heads[here])
            entries[layer] = LayerEntries(heads, key_RHTD, value_RHTD, self.keep_RT, self.end_R)
        return entries


@dataclass(frozen=True)
class LayerEntries:
    """Keys and values of one layer, in its chosen heads; see :class:`HeadEntries`."""

    heads: tuple[int, ...]
    key_RHTD: torch.Tensor
    value_RHTD: torch.Tensor
    keep_RT: torch.Tensor
    end_R: torch.Tensor


# ------------------------------------------------------------------------------------- attention


def entries_of(
    lm: nn.Module, heads: Heads, kv_NE: torch.Tensor, batch: Batch, dtype: torch.dtype
) -> HeadEntries:
    """Lay messages' keys and values out by rows and heads, at the positions of their slots.

    Args:
        lm: the receiver.
        heads: J chosen heads.
        kv_NE: for each slot of each message, in the order of their numbers, J times a key (before
            rotary positions) and a value. Rows that read one message share them.
        batch: the sequences in which the slots stand.
        dtype: the receiver's.
    """
    message_R = torch.unique(batch.message_R, return_inverse=True)[1].to(kv_NE.device)
    latents_BS, position_BS = batch.latents_BS.to(kv_NE.device), batch.positions().to(kv_NE.device)
    # The position of a row's first latent: argmax finds the first of equal numbers.
    start_R = position_BS.gather(1, latents_BS.long().argmax(1)[:, None]).squeeze(1)
    messages = int(message_R.max()) + 1

    def of_messages(value_R: torch.Tensor) -> torch.Tensor:
        # Rows of one message are alike up to its end, so it does not matter whose value is taken.
        return value_R.new_zeros(messages).scatter(0, message_R, value_R)

    count_M, start_M = of_messages(latents_BS.sum(1)), of_messages(start_R)
    place_T = torch.arange(max(1, int(count_M.max())), device=kv_NE.device)
    keep_MT = place_T < count_M[:, None]
    if len(kv_NE) != (slots := int(count_M.sum())):
        raise ValueError(f"entries must fill the messages' slots, got {len(kv_NE)} for {slots}")
    kv_MTE = kv_NE.new_zeros(*keep_MT.shape, kv_NE.shape[1])
    kv_MTE = kv_MTE.masked_scatter(keep_MT[..., None], kv_NE)
    # [M, T, J · 2 · D] → keys and values [M, J, T, D].
    key_MTJ1D, value_MTJ1D = kv_MTE.unflatten(2, (len(heads), 2, -1)).split(1, 3)
    key_MJTD = key_MTJ1D.squeeze(3).transpose(1, 2)
    value_MJTD = value_MTJ1D.squeeze(3).transpose(1, 2)
    position_MT = start_M[:, None] + place_T
    layers = by_layer(heads).items()
    turned = [rotated(lm, layer, key_MJTD[:, here], position_MT) for layer, here in layers]
    key_MJTD = torch.cat(turned, 1).to(dtype)
    entries = HeadEntries(heads, key_MJTD, value_MJTD.to(dtype), keep_MT, start_M + count_M)
    return entries.rows(message_R)


@contextmanager
def seen(lm: nn.Module, entries: HeadEntries | None) -> Iterator[None]:
    """Let a receiver's chosen heads see these entries, from the positions after them on.

    ``entries``: a row for each sequence that is read meanwhile; ``None``: nothing is changed.
    """
    if entries is None:
        yield
        return
    register(IMPLEMENTATION, _attention)
    model: Any = lm
    before = model.config._attn_implementation
    layers = {layer: model.base_model.layers[layer].self_attn for layer, _ in entries.heads}
    of_layers = entries.of_layers()
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        # transformers hands an attention function its module: the entries are found there.
        for layer, attention in layers.items():
            attention.head_entries = of_layers[layer]
        yield
    finally:
        for attention in layers.values():
            del attention.head_entries
        model.set_attn_implementation(before)


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Compute one layer's attention, whose chosen heads see its entries besides.

    Takes and returns what transformers' functions do: queries, keys and values ``[R, heads, N,
    D]``, and a sum over values ``[R, N, heads, D]``.
    """
    entries: LayerEntries | None = getattr(module, "head_entries", None)
    if entries is None:
        return plain_attention(module, query, key, value, attention_mask, **options)
    position_RN = options.get("position_ids")
    if position_RN is None:
        raise ReceiverError(
            f"adapter.kind heads needs a receiver whose attention is told positions, {type(module).__name__} is not; "
            f"choose adapter.kind mlp"
        )
    groups, heads = query.shape[1] // key.shape[1], key.shape[1]
    # H key-value heads serve G heads of queries each; A are the query heads of those that see.
    seeing = torch.tensor(entries.heads, device=query.device)
    mask_R1NS = visible(attention_mask, query, key)
    end_R1 = entries.end_R.to(position_RN.device)[:, None]
    after_RN1 = (position_RN >= end_R1)[..., None].to(query.device)
    # [R, 1, T] and [R, N, 1]: a row's own tokens, for queries that stand after them.
    sees_RNT = entries.keep_RT[:, None].to(query.device) & after_RN1
    # Entries first, then what every head sees.
    wide_R1NS = torch.cat((sees_RNT[:, None], mask_R1NS.expand(len(sees_RNT), -1, -1, -1)), -1)
    query_RHGND = query.unflatten(1, (heads, groups))
    seen_RAND = attend(
        query_RHGND[:, seeing].flatten(1, 2),
        torch.cat((entries.key_RHTD.to(key), key[:, seeing]), 2),
        torch.cat((entries.value_RHTD.to(key), value[:, seeing]), 2),
        wide_R1NS,
        options.get("scaling"),
    )
    order = list(entries.heads)
    outputs = [seen_RAND]
    if others := [head for head in range(heads) if head not in order]:
        rest = torch.tensor(others, device=query.device)
        other_RNAD, _ = plain_attention(
            module,
            query_RHGND[:, rest].flatten(1, 2),
            key[:, rest],
            value[:, rest],
            attention_mask,
            **options,
        )
        outputs.append(other_RNAD.transpose(1, 2))
        order += others
    # Back into the order of the heads: a permutation's argsort undoes it.
    place_H = torch.tensor(order, device=query.device).argsort()
    output_RHGND = torch.cat(outputs, 1).unflatten(1, (heads, groups))[:, place_H]
    return output_RHGND.flatten(1, 2).transpose(1, 2).contiguous(), None
