"""States of several depths of frozen causal LMs, side by side at the tokens of the first."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from latentwire.config import EncoderConfig, ReceiverConfig
from latentwire.config.wire import LENT
from latentwire.models.backbones import TokenStates
from latentwire.models.sender import Sender
from latentwire.pretrained.weights import fingerprint, resolve

SEPARATOR = -1
"""Stands in a text's prepared row between the ids of one sender and those of the next.

The row is flat, as shards keep it: the ruler's ids first. Of one sender it is that sender's ids.
"""


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
            depths, lead = config.depths, config.lead
            self.senders.append(Sender(source, depths, lead, load_weights, lm, head_share))
        self.entries = sum(sender.entries for sender in self._senders)
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
            if number:
                # Texts without any tokens have one state all the same, and so need a place to read at.
                read_BS = F.pad(named.pop("read_BS"), (0, len(place_S)))[:, : len(place_S)]
                x_BUM = sender(**named)  # U: this sender's own tokens
                # gather takes an index for every entry of a state: [B, S] → [B, S, M].
                x_BSM = x_BUM.gather(1, read_BS[..., None].expand(-1, -1, x_BUM.shape[2]))
                x_BSM = x_BSM.masked_fill(gone_BS1, 0)
            else:
                x_BSM = sender(**named, length_B=length_B)
            parts.append(x_BSM[..., : sender.width])
            entries.append(x_BSM[..., sender.width :])
        return torch.cat(parts + entries, -1)


def reads_at(end_S: torch.Tensor, other_U: torch.Tensor) -> torch.Tensor:
    """Return for tokens that end at ``end_S`` the first ``[S]`` of others' that end there or later.

    ``other_U``: ends of the other tokens. Where all end sooner, it is the last.
    """
    # The first u with other_U[u] ≥ end, or U where there is none.
    return torch.searchsorted(other_U, end_S).clamp(max=max(0, len(other_U) - 1))
