"""Text to latents."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from latentwire.config import EncoderConfig, ReceiverConfig
from latentwire.message import Message
from latentwire.models.backbones import PretrainedStates
from latentwire.models.pooling import Coarsening, SpanQueries, span_means, text_spans
from latentwire.models.states import ByteStates, States
from latentwire.models.weights import backbone_source, load_tokenizer

STATES: Mapping[str, Callable[[EncoderConfig, Mapping[str, ReceiverConfig], bool], States]] = {
    "byte": lambda config, *_: ByteStates(config),
    "st": PretrainedStates,
    "lm": PretrainedStates,
}
"""``encoder.kind`` → what makes the states that are pooled."""


@dataclass(frozen=True)
class EncoderTokens:
    """Tokenised sender texts, as the encoder's kind of states takes them."""

    tensors: Mapping[str, torch.Tensor]
    length_B: torch.Tensor
    """States of each text, or of each line where texts are split."""
    bytes_BS: torch.Tensor
    """Bytes of text that each state stands for; 0 after a text's own states."""
    latents_B: torch.Tensor
    """Shared latents of each of these."""
    ends_BS: torch.Tensor | None = None
    """Whether a sentence ends after each state; ``None`` where spans do not ask."""
    parts: tuple[int, ...] | None = None
    """Lines of each text; ``None`` where texts are encoded whole."""

    def to(self, device: torch.device) -> EncoderTokens:
        """The same on ``device``."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        ends_BS = None if self.ends_BS is None else self.ends_BS.to(device)
        return replace(
            self,
            tensors=tensors,
            length_B=self.length_B.to(device),
            latents_B=self.latents_B.to(device),
            ends_BS=ends_BS,
        )


class InterlinguaEncoder(nn.Module):
    """Token states (from scratch on bytes, or a pretrained model's), pooled to latents and projected to ``d_z``."""

    def __init__(
        self, config: EncoderConfig, receivers: Mapping[str, ReceiverConfig], *, load_weights: bool = True
    ) -> None:
        """``receivers``: those the message is for, by name. ``load_weights=False`` builds a backbone's shape alone.

        Raises :class:`~latentwire.models.weights.ReceiverError` for a backbone that cannot be had.
        """
        super().__init__()
        self.split, self.latent_len, self.tokens_per_latent = config.split, config.latent_len, config.tokens_per_latent
        self.states = STATES[config.kind](config, receivers, load_weights)
        self.reads_ids = config.pretrained
        groups = (config.private_len,) * len(receivers) if config.private_len else ()
        starts = [config.latent_len + index * config.private_len for index in range(len(groups))]
        self.private = {
            name: range(start, start + config.private_len) for name, start in zip(receivers, starts, strict=False)
        }
        self.ends_at = config.span_ends
        self.pool = (
            SpanQueries(config.latent_len, self.states.width, config.heads, groups)
            if config.pooling == "queries"
            else None
        )
        self.parts = config.span_parts
        self.norm = nn.LayerNorm(self.states.width)
        self.project = nn.Linear(self.states.width, config.d_z // self.parts)
        self.dropout = nn.Dropout(config.latent_dropout)

    def token_ids(self, texts: Sequence[str]) -> list[list[Any]]:
        """Each text as :meth:`tokens_of` takes it; shards of training rows hold it ready where it is a list of ids."""
        return token_rows(self.states.tokenizer, texts, self.split) if self.reads_ids else lines_of(texts, self.split)

    def tokens_of(
        self, rows: Sequence[Sequence[Any]], coarsening: Coarsening | None = None, tokens_per_latent: int | None = None
    ) -> EncoderTokens:
        """What :meth:`forward` takes; on the CPU. ``coarsening``: how far training has come; ``None``: to the end.

        ``tokens_per_latent``: another length of message than the configured one.
        """
        parts = tuple(map(len, rows)) if self.split == "lines" else None
        lines = [line for row in rows for line in row]
        tensors, sizes = self.states.collate(lines)
        length_B = torch.tensor([len(size_S) for size_S in sizes])
        latents_B = self._latents(length_B, tokens_per_latent or self.tokens_per_latent)
        if coarsening is not None:
            latents_B = coarsening.latents(length_B, latents_B)
        ends_BS = None
        if self.ends_at == "sentences":
            ends = [torch.tensor(self.states.sentence_ends(line), dtype=torch.bool) for line in lines]
            ends_BS = pad_sequence(ends, batch_first=True)
        return EncoderTokens(tensors, length_B, pad_sequence(sizes, batch_first=True), latents_B, ends_BS, parts)

    def tokenize(self, texts: Sequence[str]) -> EncoderTokens:
        """What :meth:`forward` takes of texts, with messages of their own length."""
        return self.tokens_of(self.token_ids(texts))

    def _latents(self, length_B: torch.Tensor, tokens_per_latent: int | None) -> torch.Tensor:
        """Shared latents of texts of so many states; at least one."""
        if tokens_per_latent is None:
            return torch.full_like(length_B, self.latent_len)
        return ((length_B + tokens_per_latent - 1) // tokens_per_latent).clamp(min=1)

    def backbone_fingerprint(self) -> str | None:
        """Hash of a pretrained backbone that is not trained; ``None`` where there is none."""
        return self.states.fingerprint()

    def frozen_parameters(self) -> frozenset[str]:
        """Names of the parameters of a backbone that is not trained: its hash stands for them, they are never saved."""
        return frozenset(f"states.{name}" for name in self.states.frozen_parameters())

    def slots(self, tokens: EncoderTokens, receiver: str) -> list[int]:
        """Soft-prompt positions that each text's message will take at one receiver, known before encoding."""
        own = len(self.private.get(receiver, range(0)))
        return [length + own for length in _joined(tokens.latents_B, tokens.parts).tolist()]

    def spans(self, tokens: EncoderTokens, receiver: str) -> torch.Tensor:
        """Start and end ``[B, L, 2]``, as shares of the text, of the stretch that each latent for one receiver begins
        with, in the order of :meth:`~latentwire.message.Message.read_by`. On the CPU."""
        span_BL2 = text_spans(tokens.bytes_BS, tokens.length_B, tokens.latents_B, tokens.ends_BS)
        if own := len(self.private.get(receiver, range(0))):
            private_BP2 = text_spans(tokens.bytes_BS, tokens.length_B, torch.full_like(tokens.latents_B, own))
            return torch.cat((span_BL2, private_BP2), 1)
        if tokens.parts is None:
            return span_BL2
        joined = []
        lines = zip(span_BL2, tokens.latents_B.tolist(), tokens.bytes_BS.sum(1).tolist(), strict=True)
        for count in tokens.parts:
            taken = [next(lines) for _ in range(count)]
            start, found = 0.0, []
            for line_L2, latents, size in taken:
                found.append(start + line_L2[:latents] * size)
                start += size
            joined.append(torch.cat(found) / max(start, 1e-9))
        return pad_sequence(joined, batch_first=True)

    def forward(self, tokens: EncoderTokens) -> Message:
        """Tokens on this module's device → one message a text."""
        x_BSM = self.states(**tokens.tensors, length_B=tokens.length_B)
        length_B = tokens.latents_B
        pooled_BLM = (
            span_means(x_BSM, tokens.length_B, length_B, tokens.ends_BS, self.parts)
            if self.pool is None
            else self.pool(x_BSM, tokens.length_B, length_B)
        )
        z_BLZ = self.dropout(self.project(self.norm(pooled_BLM)).unflatten(1, (-1, self.parts)).flatten(2))
        if tokens.parts is None:
            # Private columns follow the shared ones, of which an evaluation may ask for another number.
            shift = z_BLZ.shape[1] - self.latent_len - sum(map(len, self.private.values()))
            private = {name: range(own.start + shift, own.stop + shift) for name, own in self.private.items()}
            return Message(z_BLZ, length_B, private)
        keep_BL = torch.arange(z_BLZ.shape[1], device=z_BLZ.device) < length_B[:, None]
        joined_B = _joined(length_B, tokens.parts)
        return Message(pad_sequence(z_BLZ[keep_BL].split(joined_B.tolist()), batch_first=True), joined_B)


def _joined(length_B: torch.Tensor, parts: tuple[int, ...] | None) -> torch.Tensor:
    """Latents of each text: the sum over its lines, where it is split."""
    if parts is None:
        return length_B
    return torch.stack([lengths.sum() for lengths in length_B.split(list(parts))])


def encoder_tokenizer(config: EncoderConfig, receivers: Sequence[ReceiverConfig]) -> Any:
    """The tokenizer of an encoder's backbone, without its weights; ``None`` for kinds that read the text itself."""
    if not config.pretrained:
        return None
    return load_tokenizer(backbone_source(config, {receiver.name: receiver for receiver in receivers}))


def lines_of(texts: Sequence[str], split: Literal["none", "lines"]) -> list[list[str]]:
    """What of each text is encoded by itself; a text has at least one such part."""
    if split != "lines":
        return [[text] for text in texts]
    return [[line for line in text.split("\n") if line.strip()] or [""] for text in texts]


def token_rows(tokenizer: Any, texts: Sequence[str], split: Literal["none", "lines"]) -> list[list[list[int]]]:
    """Ids of the parts of each text, without the special tokens that a backbone wraps around them."""
    rows = lines_of(texts, split)
    parts = [line for row in rows for line in row]
    ids = iter(tokenizer(parts, add_special_tokens=False, split_special_tokens=True).input_ids if parts else ())
    return [list(itertools.islice(ids, len(row))) for row in rows]
