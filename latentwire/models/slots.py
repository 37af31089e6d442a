"""Adding to the keys and values of a receiver's soft slots, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from latentwire.models.weights import ReceiverError


def decoder_layers(lm: nn.Module, feature: str) -> nn.ModuleList:
    """The receiver's decoder layers. Raises :class:`ReceiverError` for an architecture that keeps them elsewhere."""
    base: Any = lm.base_model
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ReceiverError(
            f"feature {feature} needs a receiver with base_model.layers, {type(lm).__name__} has none; switch it off: "
            f"--set features.{feature}=null"
        )
    return layers


def projections(lm: nn.Module, feature: str) -> list[nn.Linear]:
    """The projections to keys and to values of every layer, in order."""
    return [part for attention in attentions(lm, feature) for part in (attention.k_proj, attention.v_proj)]


def attentions(lm: nn.Module, feature: str) -> list[Any]:
    """The attention of every decoder layer. Raises :class:`ReceiverError` for one without projections to keys and values."""
    found: list[Any] = [getattr(layer, "self_attn", None) for layer in decoder_layers(lm, feature)]
    for attention in found:
        if not all(hasattr(attention, name) for name in ("k_proj", "v_proj", "head_dim")):
            raise ReceiverError(
                f"feature {feature} needs a receiver whose layers have self_attn.k_proj and v_proj, {type(lm).__name__} has none; "
                f"switch it off: --set features.{feature}=null"
            )
    return found


def heads_of_entries(lm: nn.Module, feature: str) -> torch.Tensor:
    """For each entry ``[E]`` of what :func:`projections` put out together its key-value head, counted through the layers."""
    heads, first = [], 0
    for attention in attentions(lm, feature):
        # On the CPU, where a planner weighs modules on the meta device too.
        head_E = first + torch.arange(attention.k_proj.out_features, device="cpu") // attention.head_dim
        heads += [head_E, head_E]  # keys, then values
        first = int(head_E[-1]) + 1
    return torch.cat(heads)


@contextmanager
def added_to_slots(lm: nn.Module, added_NE: torch.Tensor, latents_RS: torch.Tensor) -> Iterator[None]:
    """While the receiver reads sequences whose latents stand at ``latents_RS``, add to their keys and values.

    ``added_NE``: a vector for each latent, row by row, E being what :func:`projections` put out together. The slots' own cache
    entries change in place, in the pass that holds the slots: no position comes on top, and later decode steps find them.
    """
    targets = projections(lm, "deep_prefix")
    # Found once: a mask in every layer makes the host wait in every layer for a GPU to count what it selects.
    place_N = latents_RS.flatten().nonzero().squeeze(1)
    with ExitStack() as stack:
        parts = added_NE.split([target.out_features for target in targets], dim=-1)
        for target, part_NE in zip(targets, parts, strict=True):

            def add(_: nn.Module, __: tuple, output: torch.Tensor, part_NE: torch.Tensor = part_NE) -> torch.Tensor:
                if output.shape[:2] != latents_RS.shape:
                    return output
                part_NE = part_NE.to(output.device, output.dtype)
                return output.flatten(0, 1).index_add(0, place_N.to(output.device), part_NE).view_as(output)

            stack.callback(target.register_forward_hook(add).remove)
        yield
