"""One frozen causal LM that sends: its states of several depths, and keys and values of its heads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from latentwire.config import ReceiverConfig
from latentwire.models.backbones import joined, keep_layers, load_backbone, windows, wrapping
from latentwire.models.head_slots import cached_entries, chosen, none_chosen
from latentwire.models.key_heads import heads_within, shape_of
from latentwire.pretrained.weights import ReceiverError, load_tokenizer, pick_device, pick_dtype
from latentwire.tokens import token_bytes

EPS = 1e-8
"""Added to a state's mean square: embeddings are small, with mean squares from 1e-4."""


def twin_of(lm: nn.Module) -> Any:
    """Return a causal LM without its head, in modules of its own over the very same weights.

    What is done to the LM's own modules does not reach it: heads that see messages, activations
    that are computed again, layers that are compiled.
    """
    base: Any = lm.base_model
    # The memo tells deepcopy that each weight is copied already: to itself.
    return copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})


class Sender(nn.Module):
    """One frozen causal LM that reads texts as it was trained, and whose states are taken."""

    def __init__(
        self,
        source: ReceiverConfig,
        depths: Sequence[float],
        lead: str,
        load_weights: bool,
        lm: nn.Module | None = None,
        head_share: float | None = None,
    ) -> None:
        """Load the LM's layers up to the deepest of ``depths``, shares of all its layers.

        Args:
            source: the LM.
            depths: where its states are taken.
            lead: what it reads before every text.
            load_weights: whether its weights are needed; else it has shapes alone.
            lm: the same LM where it is loaded already. Its weights serve both.
            head_share: share of the LM's cache whose heads give their keys and values too; None: no
                head does. All layers are kept then.

        Raises:
            ReceiverError: it cannot be loaded.
        """
        super().__init__()
        self.tokenizer = load_tokenizer(source)
        # Windows keep to the backbone's positions; nothing to warn about.
        self.tokenizer.model_max_length = 10**9
        if lm is not None:
            backbone = twin_of(lm)
        else:
            # A shape alone may be asked for where there is no such device.
            dtype = torch.float32
            if load_weights:
                dtype = pick_dtype(source.dtype, pick_device(source.device))
            backbone = load_backbone(source, load_weights, dtype)
        self.backbone = backbone.requires_grad_(False).eval()
        text_config = self.backbone.config.get_text_config()
        self.layers: int = text_config.num_hidden_layers
        self.depths = [round(depth * self.layers) for depth in depths]
        if not hasattr(self.backbone, "layers"):
            raise ReceiverError(
                f"encoder.senders must be causal LMs with a list of layers, {source.model} is a "
                f"{type(self.backbone).__name__} without; name another model"
            )
        self.width: int = len(self.depths) * text_config.hidden_size
        self.entries = 0
        self.head_J2: torch.Tensor
        if head_share is None:
            # Depth 0 is what the first layer reads, so one layer at least stays.
            keep_layers(self.backbone, max(1, *self.depths), "encoder.depths")
        else:
            shape = shape_of(self.backbone)
            self.register_buffer("head_J2", none_chosen(heads_within(head_share, shape)))
            # A key and a value in each chosen head.
            self.entries = self.head_J2.numel() * shape[2]
        self.prefix, _ = wrapping(self.tokenizer)
        self.prefix = [*self.prefix, *self.tokenizer(lead, add_special_tokens=False).input_ids]
        self.window = int(text_config.max_position_embeddings) - len(self.prefix)
        self.token_bytes = token_bytes(self.tokenizer)

    def collate(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Return by name the :func:`~latentwire.models.backbones.windows` of a text's ids.

        What the tokenizer puts after a text is left out: no token before it sees it.
        """
        return windows(rows, self.prefix, (), self.window)

    def ends(self, row: Sequence[int]) -> torch.Tensor:
        """Return the places in bytes ``[S]`` at which a text's tokens end."""
        return self.token_bytes[torch.tensor(row, dtype=torch.long)].long().cumsum(0)

    def forward(
        self,
        ids_WT: torch.Tensor,
        attention_WT: torch.Tensor,
        real_WT: torch.Tensor,
        length_B: torch.Tensor,
    ) -> torch.Tensor:
        """Return the states of all depths side by side in fp32, ``[B, S, M]``, each of RMS 1.

        Keys and values of heads stand behind them. There is at least one state a row; those after a
        row's own ``length_B`` are zero.
        """
        states, cache = self._read(ids_WT, attention_WT)
        parts = []
        for depth in self.depths:
            x_BSD = joined(states[depth], real_WT, length_B).float()
            parts.append(F.rms_norm(x_BSD, x_BSD.shape[-1:], eps=EPS))
        if self.entries:
            # Windows are padded on the right: places count from 0.
            entry_WTE = cached_entries(self.backbone, cache, chosen(self.head_J2))
            parts.append(joined(entry_WTE, real_WT, length_B))
        return torch.cat(parts, -1)

    def _read(
        self, ids_WT: torch.Tensor, attention_WT: torch.Tensor
    ) -> tuple[dict[int, torch.Tensor], Any]:
        """Return depth → what transformers calls ``hidden_states[depth]``, ``[W, T, D]``; and the cache.

        These are what the first layer reads, what each layer gives, and, after the last layer of
        the whole model alone, what its final normalisation makes of that. There is a cache where
        heads give their keys and values.
        """
        from transformers import DynamicCache

        # Without a configuration it keeps every position, in layers that see a window, too.
        cache = DynamicCache() if self.entries else None
        states: dict[int, torch.Tensor] = {}

        def keep_input(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            states[0] = args[0] if args else options["hidden_states"]

        def keep_output(depth: int) -> Any:
            def keep(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
                states[depth] = output[0] if isinstance(output, tuple) else output

            return keep

        layers = self.backbone.layers
        # In its own type, whatever the trained parts compute in.
        exact = torch.autocast(ids_WT.device.type, enabled=False)
        with torch.no_grad(), exact, ExitStack() as stack:
            first = layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)
            stack.callback(first.remove)
            for depth in {*self.depths} - {0, self.layers}:
                # Layers count from 0, and depth 1 is what the first of them gives.
                stack.callback(layers[depth - 1].register_forward_hook(keep_output(depth)).remove)
            output = self.backbone(
                input_ids=ids_WT,
                attention_mask=attention_WT,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        if self.layers in self.depths:
            states[self.layers] = output.last_hidden_state
        return states, cache
