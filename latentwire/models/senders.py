"""States of several depths of frozen causal LMs, side by side at the tokens of the first."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from latentwire.config import EncoderConfig, ReceiverConfig
from latentwire.config.wire import LENT
from latentwire.models.backbones import (
    TokenStates,
    joined,
    keep_layers,
    load_backbone,
    windows,
    wrapping,
)
from latentwire.models.key_heads import heads_within, rotated, shape_of
from latentwire.pretrained.weights import (
    ReceiverError,
    fingerprint,
    load_tokenizer,
    pick_device,
    pick_dtype,
    resolve,
)
from latentwire.tokens import token_bytes

SEPARATOR = -1
"""Stands in a text's prepared row between the ids of one sender and those of the next.

The row is flat, as shards keep it: the ruler's ids first. Of one sender it is that sender's ids.
"""
EPS = 1e-8
"""Added to a state's mean square: embeddings are small, with mean squares from 1e-4."""


def joined_row(ids: Sequence[Sequence[int]]) -> list[int]:
    """Return the row of a text from each sender's ids of it."""
    row = list(ids[0])
    for other in ids[1:]:
        row += [SEPARATOR, *other]
    return row


def parted_row(row: Sequence[int]) -> list[list[int]]:
    """Return each sender's ids from a text's row, the ruler's first."""
    parts: list[list[int]] = [[]]
    for token in row:
        if token == SEPARATOR:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def ruler_ids(row: Sequence[int]) -> list[int]:
    """Return the ruler's ids from a text's row."""
    return list(itertools.takewhile(lambda token: token != SEPARATOR, row))


def sender_sources(
    config: EncoderConfig, receivers: Mapping[str, ReceiverConfig]
) -> list[ReceiverConfig]:
    """Return the sources of all senders in order, in the form of receivers'."""
    if not config.senders:
        return list(receivers.values())
    sources = []
    for number, model in enumerate(config.senders):
        lender = model.removeprefix(LENT)
        if lender != model:
            sources.append(receivers[lender])
        else:
            sources.append(ReceiverConfig(name=f"sender_{number}", model=model))
    return sources


SAME = (
    "revision",
    "trust_remote_code",
    "dtype",
    "device",
    "attn_implementation",
    "quantization",
    "device_map",
)
"""Knobs by which a receiver and a sender of one model hold the same weights and compute alike."""


def lender_of(source: ReceiverConfig, receivers: Mapping[str, ReceiverConfig]) -> str | None:
    """Return the receiver whose weights are those that a sender would load; ``None``: no such.

    A quantised receiver has other weights, and one on several devices no single one. A sender has
    no ``flash_attention_2``, and stands on the device of the first receiver.
    """
    devices = [receiver.device for receiver in receivers.values()]
    plain = source.quantization == "none" and source.device_map == "none"
    if not plain or source.attn_implementation == "flash_attention_2":
        return None
    for name, receiver in receivers.items():
        alike = all(getattr(receiver, knob) == getattr(source, knob) for knob in SAME)
        if alike and receiver.device == devices[0] and resolve(receiver) == resolve(source):
            return name
    return None


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
        # Depth 0 is what the first layer reads, so one layer at least stays.
        if head_share is None:
            keep_layers(self.backbone, max(1, *self.depths), "encoder.depths")
        self.width: int = len(self.depths) * text_config.hidden_size
        self.entries = 0
        self.head_J2: torch.Tensor
        if head_share is not None:
            shape = shape_of(self.backbone)
            # −1: not chosen yet.
            chosen_J2 = torch.full((heads_within(head_share, shape), 2), -1, dtype=torch.long)
            self.register_buffer("head_J2", chosen_J2)
            self.entries = chosen_J2.numel() * shape[2]
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
            parts.append(joined(self._entries(cache), real_WT, length_B))
        return torch.cat(parts, -1)

    def _entries(self, cache: Any) -> torch.Tensor:
        """Return the keys (before rotary positions) and values of the chosen heads, ``[W, T, E]``.

        For each head a key, then a value, in the order of an adapter's entries.
        """
        parts = []
        for layer, head in self.head_J2.tolist():
            assert layer >= 0, "a calibration chooses heads before a text is read"
            key_W1TD = cache.layers[layer].keys[:, head : head + 1]
            # Windows are padded on the right: places count from 0.
            position_1T = torch.arange(key_W1TD.shape[2], device=key_W1TD.device)[None]
            # A cache holds keys that are turned to their positions; a message's are not.
            key_W1TD = rotated(self.backbone, layer, key_W1TD, position_1T, back=True)
            parts += [key_W1TD[:, 0], cache.layers[layer].values[:, head].float()]
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


class SenderStates(TokenStates):
    """States of frozen senders, one for each token of the *ruler*, the first sender's tokenizer.

    Each sender reads the text by its own tokenizer, in one causal pass (in windows where it has
    more tokens than the LM has positions). A sender besides the ruler is read at the first of its
    tokens that ends where the ruler's does, or after it: such a state has seen all that the
    ruler's token says.
    """

    def __init__(
        self,
        config: EncoderConfig,
        receivers: Mapping[str, ReceiverConfig],
        load_weights: bool,
        loaded: Mapping[str, nn.Module] | None = None,
        head_share: float | None = None,
    ) -> None:
        """Load all senders, or build their shapes alone where not ``load_weights``.

        Args:
            config: the encoder's.
            receivers: by name.
            load_weights: whether weights are needed.
            loaded: receiver → its LM, where it is in this process on the wire's device. A sender of
                the same weights (:func:`lender_of`) loads none.
            head_share: share of each sender's cache whose heads give keys and values too.

        Raises:
            ReceiverError: a sender cannot be loaded.
        """
        super().__init__()
        sources, loaded = sender_sources(config, receivers), loaded or {}
        self.lenders = [lender_of(source, receivers) for source in sources]
        """For each sender, the receiver that has its weights; ``None``: no receiver has."""
        self.senders = nn.ModuleList()
        for source, lender in zip(sources, self.lenders, strict=True):
            lm = loaded.get(lender or "")
            reading = config.depths, config.lead, load_weights
            self.senders.append(Sender(source, *reading, lm, head_share))
        self.entries = sum(sender.entries for sender in self._senders)
        """The last numbers of a state, which are keys and values of senders' heads."""
        self.width = sum(sender.width for sender in self._senders) + self.entries
        self.names = [source.name for source in sources]
        self.tokenizer = self._senders[0].tokenizer

    @property
    def tokenizers(self) -> tuple[Any, ...]:
        """The senders' tokenizers, the ruler's first."""
        return tuple(sender.tokenizer for sender in self._senders)

    @property
    def _senders(self) -> list[Sender]:
        """The senders, by their type."""
        return [sender for sender in self.senders if isinstance(sender, Sender)]

    def train(self, mode: bool = True) -> SenderStates:
        """Switch modes; the senders stay without dropout."""
        super().train(mode)
        self.senders.eval()
        return self

    @torch.no_grad()
    def choose(self, receiver: str, head_J2: torch.Tensor) -> None:
        """Take a receiver's chosen heads for the sender that has its name, if there is one."""
        for name, sender in zip(self.names, self._senders, strict=True):
            if name == receiver and sender.entries:
                sender.head_J2.copy_(head_J2)

    def fingerprint(self) -> str:
        """Return the SHA-256 over the senders' own; a checkpoint leaves their weights out."""
        hashes = [fingerprint(sender.backbone) for sender in self._senders]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    def frozen_parameters(self) -> frozenset[str]:
        """Return the names of all parameters: none is trained."""
        return frozenset(name for name, _ in self.named_parameters())

    @property
    def lent_parameters(self) -> int:
        """Number of parameters that a receiver holds too, where both are in one process."""
        count = 0
        for sender, lender in zip(self._senders, self.lenders, strict=True):
            if lender is not None:
                count += sum(parameter.numel() for parameter in sender.parameters())
        return count

    def sentence_ends(self, row: Sequence[int]) -> list[bool]:
        """Return for each of the ruler's tokens of a text whether a sentence ends after it."""
        return super().sentence_ends(ruler_ids(row))

    def collate(
        self, rows: Sequence[Sequence[int]]
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Collate texts' rows (:func:`joined_row`) for :meth:`forward`.

        Returns its tensors by name, each behind its sender's number, and the bytes of the ruler's
        tokens of each text. Senders besides the ruler have ``length_B``, their own tokens of each
        text, and ``read_BS``, the one to read at each of the ruler's.
        """
        # For each sender, its ids of all texts.
        ids = list(zip(*map(parted_row, rows), strict=True))
        assert len(ids) == len(self.senders), "rows must hold the ids of these senders"
        ruler = self._senders[0]
        tensors: dict[str, torch.Tensor] = {}
        for number, (sender, texts) in enumerate(zip(self._senders, ids, strict=True)):
            named = sender.collate(texts)
            if number:
                pairs = zip(ids[0], texts, strict=True)
                reads = [reads_at(ruler.ends(first), sender.ends(row)) for first, row in pairs]
                named["read_BS"] = pad_sequence(reads, batch_first=True)
                named["length_B"] = torch.tensor([len(row) for row in texts])
            tensors |= {f"{number}_{name}": tensor for name, tensor in named.items()}
        sizes = [ruler.token_bytes[torch.tensor(row, dtype=torch.long)] for row in ids[0]]
        return tensors, sizes

    def forward(self, length_B: torch.Tensor, **tensors: torch.Tensor) -> torch.Tensor:
        """Return states ``[B, S, M]`` in fp32, sender by sender, and in each depth by depth.

        Behind those of all senders stand the keys and values of their heads, where they give any.
        There is at least one state a row; those after a row's ``length_B`` tokens of the ruler are
        zero.
        """
        place_S = torch.arange(max(1, int(length_B.max())), device=length_B.device)
        gone_BS1 = (place_S >= length_B[:, None])[..., None]
        parts, entries = [], []
        for number, sender in enumerate(self._senders):
            lead = f"{number}_"
            named = {}
            for name, tensor in tensors.items():
                if name.startswith(lead):
                    named[name.removeprefix(lead)] = tensor
            if not number:
                x_BSM = sender(**named, length_B=length_B)
                parts.append(x_BSM[..., : sender.width])
                entries.append(x_BSM[..., sender.width :])
                continue
            # Texts without any tokens have one state all the same, and so need a place to read at.
            read_BS = F.pad(named.pop("read_BS"), (0, len(place_S)))[:, : len(place_S)]
            x_BUM = sender(**named)  # U: this sender's own tokens
            # gather takes an index for every entry of a state: [B, S] → [B, S, M].
            x_BSM = x_BUM.gather(1, read_BS[..., None].expand(-1, -1, x_BUM.shape[2]))
            x_BSM = x_BSM.masked_fill(gone_BS1, 0)
            parts.append(x_BSM[..., : sender.width])
            entries.append(x_BSM[..., sender.width :])
        return torch.cat(parts + entries, -1)


def reads_at(end_S: torch.Tensor, other_U: torch.Tensor) -> torch.Tensor:
    """Return for tokens that end at ``end_S`` the first ``[S]`` of others' that end there or later.

    ``other_U``: ends of the other tokens. Where all end sooner, it is the last.
    """
    # The first u with other_U[u] ≥ end, or U where there is none.
    return torch.searchsorted(other_U, end_S).clamp(max=max(0, len(other_U) - 1))
