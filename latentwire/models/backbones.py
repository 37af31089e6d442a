"""Token states of a pretrained model: a sentence encoder, or a causal LM made bidirectional or not."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from latentwire.config import EncoderConfig, ReceiverConfig
from latentwire.models.low_rank import attached, updates_of
from latentwire.models.states import States
from latentwire.pretrained.weights import (
    ReceiverError,
    backbone_source,
    check_fit,
    fingerprint,
    load_hf_config,
    load_model,
    load_tokenizer,
)
from latentwire.tokens import sentence_marks, token_bytes

LORA_TARGETS = {"st": ("query", "value"), "lm": ("q_proj", "v_proj")}


class TokenStates(States):
    """States of the text's own tokens, as :attr:`tokenizer` cuts it."""

    @functools.cached_property
    def _marks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sentence marks of the vocabulary, looked up late: a large one takes a while."""
        return sentence_marks(self.tokenizer)

    def sentence_ends(self, row: Sequence[int]) -> list[bool]:
        """Return for each of a text's own tokens whether a sentence ends after it."""
        ids = torch.tensor(row, dtype=torch.long)
        ends_V, joins_V = self._marks
        # No sentence ends where the next token goes on without white space; the last token has no
        # next one and meets the first, but a text's own end is an edge of its spans anyway.
        ends_S, goes_on_S = ends_V[ids], joins_V[ids].roll(-1)
        return (ends_S & ~goes_on_S).tolist()


class PretrainedStates(TokenStates):
    """Last hidden states of the text's own tokens.

    A text longer than the backbone's positions is read in windows, each wrapped in the special
    tokens that the backbone knows, and the windows' states are joined: nothing is cut off.
    """

    def __init__(
        self, config: EncoderConfig, receivers: Mapping[str, ReceiverConfig], load_weights: bool
    ) -> None:
        """Load the backbone, or build its shape alone where not ``load_weights``.

        Raises :class:`~latentwire.pretrained.weights.ReceiverError` for one that cannot be loaded.
        """
        super().__init__()
        self.tuned = config.tune
        self.bidirectional = config.kind == "lm" and config.attention == "bidirectional"
        source = backbone_source(config, receivers)
        self.tokenizer = load_tokenizer(source)
        self.backbone = load_backbone(source, load_weights)
        keep_layers(self.backbone, config.model_layers)
        text_config = self.backbone.config.get_text_config()
        self.width: int = text_config.hidden_size
        # Windows keep to the backbone's positions; nothing to warn about.
        self.tokenizer.model_max_length = 10**9
        self.prefix, self.suffix = wrapping(self.tokenizer)
        self.window = int(text_config.max_position_embeddings) - len(self.prefix) - len(self.suffix)
        self.token_bytes = token_bytes(self.tokenizer)
        self.updates = nn.ModuleDict()
        if config.tune != "full":
            self.backbone.requires_grad_(False)
        if config.tune == "lora":
            targets, rank = LORA_TARGETS[config.kind], config.lora_rank
            # Updates are scaled by alpha / rank: 2, whatever the rank.
            self.updates = updates_of(self.backbone, targets, rank, alpha=2.0 * rank)

    def train(self, mode: bool = True) -> PretrainedStates:
        """Switch modes; a backbone that is not fully trained stays without dropout."""
        super().train(mode)
        self.backbone.train(mode and self.tuned == "full")
        return self

    def fingerprint(self) -> str | None:
        """Return the SHA-256 of a backbone that is not trained, else ``None``.

        A checkpoint leaves such a backbone's weights out.
        """
        return None if self.tuned == "full" else fingerprint(self.backbone)

    def frozen_parameters(self) -> frozenset[str]:
        """Return the names of the parameters of a backbone that is not trained."""
        if self.tuned == "full":
            return frozenset()
        return frozenset(f"backbone.{name}" for name, _ in self.backbone.named_parameters())

    def collate(
        self, rows: Sequence[Sequence[int]]
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Cut rows of a text's ids into windows ``[W, T]``.

        Returns the windows, their attention and the mask of the text's own tokens, by name; and the
        bytes of each row's tokens.
        """
        return (
            windows(rows, self.prefix, self.suffix, self.window),
            [self.token_bytes[torch.tensor(row, dtype=torch.long)] for row in rows],
        )

    def forward(
        self,
        ids_WT: torch.Tensor,
        attention_WT: torch.Tensor,
        real_WT: torch.Tensor,
        length_B: torch.Tensor,
    ) -> torch.Tensor:
        """Return states ``[B, S, M]`` in fp32; at least one a row, zero for an empty text."""
        mask = self.mask(attention_WT)
        learning = torch.is_grad_enabled() and self.tuned != "frozen"
        with attached(self.backbone, self.updates), torch.set_grad_enabled(learning):
            state_WTM = self.backbone(input_ids=ids_WT, attention_mask=mask).last_hidden_state
        return joined(state_WTM, real_WT, length_B).float()

    def mask(self, attention_WT: torch.Tensor) -> torch.Tensor:
        """Return the backbone's mask of attention: the tokens themselves where it is left as it is."""
        if not self.bidirectional:
            return attention_WT
        # A 4-D mask is taken as it is, so every token sees every other.
        mask = attention_WT[:, None, None, :].bool().expand(-1, 1, attention_WT.shape[1], -1)
        if self.backbone.config.get_text_config()._attn_implementation == "eager":
            # It adds its mask to the scores. 0 and −inf are exact in any type.
            nothing = torch.zeros((), dtype=torch.bfloat16, device=mask.device)
            mask = nothing.masked_fill(~mask, -math.inf)
        return mask


def windows(
    rows: Sequence[Sequence[int]], prefix: Sequence[int], suffix: Sequence[int], size: int
) -> dict[str, torch.Tensor]:
    """Cut each row of ids into windows of up to ``size`` of them, in special tokens: ``[W, T]``.

    Returns the windows' ids, padded on the right, their attention, and the mask of the text's own
    tokens, by name. A row has at least one window.
    """
    ids, real = [], []
    for row in rows:
        for start in range(0, max(1, len(row)), size):
            part = row[start : start + size]
            # Without special tokens an empty text's window has one place, which is none of its own.
            ids.append(torch.tensor([*prefix, *part, *suffix] or [0]))
            inside = [False] * len(prefix) + [True] * len(part) + [False] * len(suffix)
            real.append(torch.tensor(inside or [False]))
    return {
        "ids_WT": pad_sequence(ids, batch_first=True),
        "attention_WT": pad_sequence([torch.ones_like(window) for window in ids], batch_first=True),
        "real_WT": pad_sequence(real, batch_first=True),
    }


def joined(state_WTM: torch.Tensor, real_WT: torch.Tensor, length_B: torch.Tensor) -> torch.Tensor:
    """Join the states of rows' :func:`windows` to ``[B, S, M]``.

    There is at least one state a row; those after a row's ``length_B`` are zero.
    """
    place_S = torch.arange(max(1, int(length_B.max())), device=state_WTM.device)
    keep_BS = place_S < length_B[:, None]
    # [W, T, M] → [N, M] → [B, S, M]. Windows lie row by row, and so do the places that are filled.
    x_BSM = state_WTM.new_zeros(*keep_BS.shape, state_WTM.shape[2])
    return x_BSM.masked_scatter(keep_BS[..., None], state_WTM[real_WT])


def load_backbone(
    source: ReceiverConfig, load_weights: bool, dtype: torch.dtype = torch.float32
) -> Any:
    """Load a model without its head, or build its shape alone where not ``load_weights``."""
    from transformers import AutoModel

    # Anything else is left to transformers, which knows what the architecture has;
    # flash_attention_2 takes no 4-D mask.
    kernel = {"attn_implementation": "eager"} if source.attn_implementation == "eager" else {}
    if not load_weights:
        check_fit(AutoModel, source)
        return AutoModel.from_config(load_hf_config(source), **kernel)
    return load_model(AutoModel, source, dtype=dtype, **kernel)


def keep_layers(backbone: Any, count: int | None, knob: str = "model_layers") -> None:
    """Keep a backbone's first ``count`` layers, as ``knob`` says; ``None``: all.

    Raises :class:`~latentwire.pretrained.weights.ReceiverError` where there are not as many.
    """
    if count is None:
        return
    holder, name = backbone, "layers"
    # BERT and its kin
    if not hasattr(backbone, "layers"):
        holder, name = getattr(backbone, "encoder", None), "layer"
    layers = getattr(holder, name, None)
    if layers is None:
        raise ReceiverError(
            f"{knob} needs a backbone with a list of layers, {type(backbone).__name__} has none"
        )
    if count > len(layers):
        raise ReceiverError(f"{knob} must be ≤ {len(layers)}, the backbone's own, got {count}")
    setattr(holder, name, layers[:count])
    # transformers' decoders run as many layers as their config says, whatever the list holds.
    backbone.config.get_text_config().num_hidden_layers = count


def wrapping(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    inner, whole = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    # The text's own ids begin here among those with special tokens.
    start = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    return whole[:start], whole[start + len(inner) :]
