"""A receiver's key-value heads: how many and how wide they are, and how its keys are turned."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from latentwire.pretrained.weights import ReceiverError


def shape_of(lm: nn.Module) -> tuple[int, int, int]:
    """Return layers, key-value heads of a layer, and the width of a head.

    ``lm`` may be on the meta device. Layers that see a window of the text are fine. Raises
    :class:`~latentwire.pretrained.weights.ReceiverError` for a receiver to whose heads one cannot hand
    keys and values alike.
    """
    config: Any = lm.config
    text_config = config.get_text_config()
    base: Any = lm.base_model
    attentions = [getattr(layer, "self_attn", None) for layer in getattr(base, "layers", ())]
    shapes = {_shape(attention, text_config) for attention in attentions}
    reason = _unlike_others(text_config, attentions)
    if not reason and (len(shapes) != 1 or None in shapes):
        known = sorted(f"{heads} × {width}" for heads, width in filter(None, shapes))
        if len(known) > 1:
            reason = f"layers of {' and '.join(known)} (heads × width)"
        else:
            reason = "no self_attn with projections to keys and values of one width in every layer"
    if reason:
        raise ReceiverError(
            f"retrieval heads need keys and values of every position, alike in every layer, "
            f"{type(lm).__name__} has {reason}; name another receiver"
        )
    ((heads, width),) = filter(None, shapes)
    return len(attentions), heads, width


def _unlike_others(text_config: Any, attentions: Sequence[Any]) -> str:
    """Return what a receiver has that attention over handed keys and values has not, or nothing."""
    kinds = set(getattr(text_config, "layer_types", None) or ())
    other = sorted(kinds - {"full_attention", "sliding_attention"})
    if other:
        return f"layers of {', '.join(other)}"
    if getattr(text_config, "num_kv_shared_layers", 0):
        return "layers that share one cache"
    capped = [getattr(attention, "attn_logit_softcapping", None) for attention in attentions]
    cap = getattr(text_config, "attn_logit_softcapping", None)
    if cap is not None or any(value is not None for value in capped):
        return "attention logits that are capped (attn_logit_softcapping)"
    return ""


def _shape(attention: Any, text_config: Any) -> tuple[int, int] | None:
    """Return a layer's key-value heads and their width; ``None`` where it has none of one width."""
    width = getattr(attention, "head_dim", None)
    groups = getattr(attention, "num_key_value_groups", None)
    if not width or not groups:
        return None
    key, value = (getattr(attention, name, None) for name in ("k_proj", "v_proj"))
    if key is not None and value is not None:
        entries = key.out_features
        return (entries // width, width) if value.out_features == entries else None
    # One projection to queries, keys and values at once, as Phi 3 has.
    if hasattr(attention, "qkv_proj"):
        return text_config.num_attention_heads // groups, width
    return None


def heads_within(share: float, shape: tuple[int, int, int]) -> int:
    """Return how many of a receiver's key-value heads take no more than a share of its cache.

    ``shape``: of :func:`shape_of`.
    """
    layers, heads, _ = shape
    # 1e-9 makes up for shares that are rounded.
    return math.floor(share * layers * heads + 1e-9)


# ------------------------------------------------------------------------------- rotary positions


def rotated(
    lm: nn.Module, layer: int, key_RHTD: torch.Tensor, position_RT: torch.Tensor, back: bool = False
) -> torch.Tensor:
    """Turn one layer's keys by the rotary table of their positions, or ``back`` from them."""
    cos_RTE, sin_RTE = _table(lm, layer, position_RT)
    cos_R1TE, sin_R1TE = cos_RTE[:, None], sin_RTE[:, None]
    turned = cos_R1TE.shape[-1]  # some receivers turn the first entries alone
    x, rest = key_RHTD.float().split((turned, key_RHTD.shape[-1] - turned), -1)
    first, second = x.chunk(2, -1)
    # (a, b) → (a cos − b sin, b cos + a sin) forth, and with −sin back.
    half = torch.cat((-second, first), -1)
    if back:
        # The table's length: some receivers scale it, and turning back must undo that too.
        length_R1TE = cos_R1TE.square() + sin_R1TE.square()
        x = (x * cos_R1TE - half * sin_R1TE) / length_R1TE
    else:
        x = x * cos_R1TE + half * sin_R1TE
    return torch.cat((x, rest), -1)


def _table(
    lm: nn.Module, layer: int, position_RT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines ``[R, T, E]`` of a layer, in fp32."""
    base: Any = lm.base_model
    rotary = base.rotary_emb
    options: dict[str, Any] = {}
    # Models whose layers have tables of their own ask for the type of layer.
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        options["layer_type"] = base.config.get_text_config().layer_types[layer]
    # Its device and type are all that is read of it.
    like = torch.zeros(1, device=position_RT.device)
    cos_RTE, sin_RTE = rotary(like, position_ids=position_RT, **options)
    return cos_RTE.float(), sin_RTE.float()


def check_rotary(lm: nn.Module, name: str) -> None:
    """Raise :class:`ReceiverError` for a receiver whose keys are not turned as :func:`rotated` does.

    The same states are given to every layer at two places far from each other: its keys must be equal
    once turned back.
    """
    reason = "no base_model.rotary_emb"
    base: Any = lm.base_model
    if hasattr(base, "rotary_emb"):
        states: dict[int, Any] = {}
        here, there = _keys_at(lm, 0, states), _keys_at(lm, 7, states)
        pairs = zip(here, there, strict=True)
        if all(float((one - other).norm() / one.norm()) < 0.05 for one, other in pairs):
            return
        reason = "keys that are turned in another way"
    raise ReceiverError(
        f"adapter.kind heads needs a receiver with rotary positions of halves side by side, receiver {name} "
        f"({type(lm).__name__}) has {reason}; choose adapter.kind mlp"
    )


def _keys_at(lm: nn.Module, start: int, states: dict[int, Any]) -> list[torch.Tensor]:
    """Return every layer's keys of a few tokens that stand from a position on, turned back from there.

    ``states``: what each layer reads. Filled at first, and given to the layers from then on: in few
    bits the differences of layers below would add up.
    """
    base: Any = lm.base_model
    device = next(lm.parameters()).device
    position_RT = torch.arange(start, start + 8, device=device)[None]

    def give(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
            # transformers gives a layer its states by place or by name.
            given = args[0] if args else options["hidden_states"]
            state = states.setdefault(layer, given)
            if args:
                return (state, *args[1:]), options
            return args, options | {"hidden_states": state}

        return hook

    with torch.no_grad(), ExitStack() as stack:
        for layer, module in enumerate(base.layers):
            handle = module.register_forward_pre_hook(give(layer), with_kwargs=True)
            stack.callback(handle.remove)
        output = base(
            input_ids=torch.arange(1, 9, device=device)[None],
            position_ids=position_RT,
            use_cache=True,
        )
    layers = enumerate(output.past_key_values.layers)
    return [rotated(lm, number, layer.keys, position_RT, back=True) for number, layer in layers]
