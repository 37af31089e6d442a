"""Changing the keys and values of a receiver's soft slots, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from latentwire.pretrained.weights import ReceiverError

KEYS_VALUES = "encoder.pooling memory_kv"
"""Who hands over keys and values, in the place of a feature's name."""


def _misfit(feature: str, need: str, lm: nn.Module) -> ReceiverError:
    user, way_out = f"feature {feature}", f"switch it off: --set features.{feature}=null"
    if feature == KEYS_VALUES:
        user, way_out = feature, "choose encoder.pooling memory"
    return ReceiverError(f"{user} needs a receiver {need}, {type(lm).__name__} has none; {way_out}")


def decoder_layers(lm: nn.Module, feature: str) -> nn.ModuleList:
    """Return the receiver's decoder layers.

    Raises :class:`ReceiverError` for an architecture that keeps them elsewhere.
    """
    base: Any = lm.base_model
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise _misfit(feature, "with base_model.layers", lm)
    return layers


def projections(lm: nn.Module, feature: str) -> list[nn.Linear]:
    """Return the projections to keys and to values of every layer, in order."""
    modules: list[nn.Linear] = []
    for attention in attentions(lm, feature):
        modules += [attention.k_proj, attention.v_proj]
    return modules


def attentions(lm: nn.Module, feature: str) -> list[Any]:
    """Return the attention of every decoder layer.

    Raises :class:`ReceiverError` for one without projections to keys and values.
    """
    layers = decoder_layers(lm, feature)
    modules: list[Any] = [getattr(layer, "self_attn", None) for layer in layers]
    for attention in modules:
        if not all(hasattr(attention, name) for name in ("k_proj", "v_proj", "head_dim")):
            raise _misfit(feature, "whose layers have self_attn.k_proj and v_proj", lm)
    return modules


def heads_of_entries(lm: nn.Module, feature: str) -> torch.Tensor:
    """Return the key-value head ``[E]`` of each entry of all :func:`projections`' outputs.

    Heads are counted through the layers.
    """
    heads, first = [], 0
    for attention in attentions(lm, feature):
        # On the CPU, where a planner weighs modules on the meta device too.
        entry_E = torch.arange(attention.k_proj.out_features, device="cpu")
        # A projection's entries are those of one head after the other.
        head_E = first + entry_E // attention.head_dim
        heads += [head_E, head_E]  # keys, then values
        first = int(head_E[-1]) + 1
    return torch.cat(heads)


def added_to_slots(
    lm: nn.Module, added_NE: torch.Tensor, latents_RS: torch.Tensor
) -> AbstractContextManager[None]:
    """Add to the keys and values of latents, while the receiver reads sequences with them.

    ``added_NE``: a vector for each latent, row by row, E being the width of all :func:`projections`
    together; ``latents_RS``: where latents stand. The slots' own cache entries change in place, in
    the pass that holds the slots: no position comes on top, and later decode steps find them.
    """
    return _changed(lm, "deep_prefix", added_NE, latents_RS, torch.Tensor.index_add)


def put_in_slots(
    lm: nn.Module, kv_NE: torch.Tensor, latents_RS: torch.Tensor
) -> AbstractContextManager[None]:
    """Put keys and values in place of the latents' own; else as :func:`added_to_slots`.

    Keys are those before rotary positions: they get the ones of the slots.
    """
    return _changed(lm, KEYS_VALUES, kv_NE, latents_RS, torch.Tensor.index_copy)


@contextmanager
def recorded(lm: nn.Module, places_RS: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Yield a list that the receiver's next pass over such sequences fills with keys and values.

    ``places_RS``: the positions to record. The list gets ``[N, E]`` for each of :func:`projections`,
    row by row, as the layers use them: whatever is added or put there before this is entered is in
    them. Passes after the first leave it as it is.
    """
    targets = projections(lm, "losses.slot_kd_weight")
    place_N = places_RS.flatten().nonzero().squeeze(1)
    entries: list[torch.Tensor] = []

    def note(_: nn.Module, __: tuple, output: torch.Tensor) -> None:
        # Other sequences, or one position of a decode step.
        if output.shape[:2] != places_RS.shape:
            return
        # Selected in every pass: one that computes activations again must do what the first did.
        entry_NE = output.flatten(0, 1).index_select(0, place_N.to(output.device))
        if len(entries) < len(targets):
            entries.append(entry_NE)

    with ExitStack() as stack:
        for target in targets:
            stack.callback(target.register_forward_hook(note).remove)
        yield entries


@contextmanager
def _changed(
    lm: nn.Module,
    feature: str,
    change_NE: torch.Tensor,
    latents_RS: torch.Tensor,
    change: Callable[..., torch.Tensor],
) -> Iterator[None]:
    targets = projections(lm, feature)
    # Counted once: with a mask in every layer the host would wait there for the GPU's count.
    place_N = latents_RS.flatten().nonzero().squeeze(1)
    with ExitStack() as stack:
        parts = change_NE.split([target.out_features for target in targets], dim=-1)
        for target, part_NE in zip(targets, parts, strict=True):
            # By its default value each hook keeps its own part, not the loop's last.
            def act(
                _: nn.Module, __: tuple, output: torch.Tensor, part_NE: torch.Tensor = part_NE
            ) -> torch.Tensor:
                # A decode step has one position, and no latents.
                if output.shape[:2] != latents_RS.shape:
                    return output
                part_NE = part_NE.to(output.device, output.dtype)
                output_ME = output.flatten(0, 1)  # M: rows × positions
                output_ME = change(output_ME, 0, place_N.to(output.device), part_NE)
                return output_ME.view_as(output)

            stack.callback(target.register_forward_hook(act).remove)
        yield
