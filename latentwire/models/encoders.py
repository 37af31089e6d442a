"""The encoder: text → latents."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from latentwire.config import EncoderConfig, ReceiverConfig
from latentwire.message import Message
from latentwire.models.backbones import PretrainedStates
from latentwire.models.memory import MemoryStates
from latentwire.models.pooling import Coarsening, SpanQueries, span_means, text_spans
from latentwire.models.senders import SenderStates, joined_row, ruler_ids, sender_sources
from latentwire.models.states import ByteStates, States
from latentwire.models.token_codes import TokenCodes
from latentwire.pretrained.weights import ReceiverError, backbone_source, load_tokenizer

STATES: Mapping[str, Callable[[EncoderConfig, Mapping[str, ReceiverConfig], bool], States]] = {
    "byte": lambda config, *_: ByteStates(config),
    "st": PretrainedStates,
    "lm": PretrainedStates,
    "senders": SenderStates,
}
"""``encoder.kind`` → constructor of the states that are pooled."""


@dataclass(frozen=True)
class EncoderTokens:
    """Tokenised sender texts, as the encoder's kind of states takes them."""

    tensors: Mapping[str, torch.Tensor]
    length_B: torch.Tensor
    """States of each text, or of each line where texts are split; of several senders, the ruler's
    tokens."""
    bytes_BS: torch.Tensor
    """Bytes of text that each state stands for; 0 after a text's own states."""
    latents_B: torch.Tensor
    """Shared latents of each text or line."""
    ends_BS: torch.Tensor | None = None
    """True at states after which a sentence ends; ``None`` where spans do not ask."""
    parts: tuple[int, ...] | None = None
    """Lines of each text; ``None`` where texts are encoded whole."""

    def to(self, device: torch.device) -> EncoderTokens:
        """Copy to ``device`` what :meth:`InterlinguaEncoder.forward` reads there."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        ends_BS = None if self.ends_BS is None else self.ends_BS.to(device)
        return replace(
            self,
            tensors=tensors,
            length_B=self.length_B.to(device),
            latents_B=self.latents_B.to(device),
            ends_BS=ends_BS,
        )


class MessageLengths:
    """The lengths of messages, from a configuration and a tokenizer alone.

    A text reader has one in place of an encoder: it shows as much text as a message would take.
    """

    def __init__(
        self, config: EncoderConfig, receivers: Iterable[str], tokenizers: Sequence[Any]
    ) -> None:
        """Count for the ``receivers`` of these names.

        ``tokenizers``: those of :func:`encoder_tokenizers`, or one of bytes.
        """
        self.config, self.split, self.latent_len = config, config.split, config.latent_len
        self.tokens_per_latent, self.tokenizers = config.tokens_per_latent, tokenizers
        self.codes_tokens = config.pooling == "tokens"
        self.private: dict[str, range] = {}
        # Columns of a message: the shared latents, then those of one receiver after the other.
        if config.private_len:
            for index, name in enumerate(receivers):
                start = config.latent_len + index * config.private_len
                self.private[name] = range(start, start + config.private_len)

    def token_ids(self, texts: Sequence[str]) -> list[list[Any]]:
        """Prepare each text for :meth:`tokens_of`: its lines, or their token ids.

        Shards of training rows hold token ids ready. Those of several senders stand in one row
        (:data:`~latentwire.models.senders.SEPARATOR`).
        """
        if self.config.pretrained:
            return token_rows(self.tokenizers, texts, self.split)
        return lines_of(texts, self.split)

    def tokens_of(
        self,
        rows: Sequence[Sequence[Any]],
        coarsening: Coarsening | None = None,
        tokens_per_latent: int | None = None,
    ) -> EncoderTokens:
        """Count the states and latents of rows of :meth:`token_ids`; nothing is to be encoded.

        The arguments are those of :meth:`InterlinguaEncoder.tokens_of`.
        """
        lines: list[Any] = list(itertools.chain.from_iterable(rows))
        if not self.config.pretrained:
            lines = [self.tokenizers[0].cut(line, self.config.bytes_per_patch) for line in lines]
        if self.config.kind == "senders":
            lines = [ruler_ids(line) for line in lines]
        length_B = torch.tensor([len(line) for line in lines])
        return EncoderTokens(
            {},
            length_B,
            torch.zeros(len(lines), 0),
            self.latents(length_B, coarsening, tokens_per_latent),
            parts=self.parts_of(rows),
        )

    def parts_of(self, rows: Sequence[Sequence[Any]]) -> tuple[int, ...] | None:
        """Return the lines of each text; ``None`` where texts are encoded whole."""
        return tuple(map(len, rows)) if self.split == "lines" else None

    def latents(
        self,
        length_B: torch.Tensor,
        coarsening: Coarsening | None = None,
        tokens_per_latent: int | None = None,
    ) -> torch.Tensor:
        """Return the shared latents of texts of ``length_B`` states; at least one each.

        Raises :class:`~latentwire.pretrained.weights.ReceiverError` for another length than the
        configured one where a latent is the codes of so many tokens.
        """
        stride = tokens_per_latent or self.tokens_per_latent
        if self.codes_tokens and (stride != self.tokens_per_latent or coarsening is not None):
            raise ReceiverError(
                f"pooling tokens makes a latent of {self.tokens_per_latent} tokens, as its wire was built, got messages of "
                f"another length ({stride} tokens per latent{', coarsening' if coarsening else ''}); leave that out"
            )
        latents_B = torch.full_like(length_B, self.latent_len)
        if stride is not None:
            # ⌈length / stride⌉
            latents_B = ((length_B + stride - 1) // stride).clamp(min=1)
        return latents_B if coarsening is None else coarsening.latents(length_B, latents_B)

    def slots(self, tokens: EncoderTokens, receiver: str) -> list[int]:
        """Count the slots of each text's message at one receiver, before encoding.

        Where latents are codes of tokens, each token has a position there.
        """
        if self.codes_tokens:
            return tokens.length_B.tolist()
        private = len(self.private.get(receiver, range(0)))
        return [length + private for length in _joined(tokens.latents_B, tokens.parts).tolist()]

    def backbone_fingerprint(self) -> None:
        """Return ``None``: there is no backbone."""
        return


class InterlinguaEncoder(nn.Module):
    """Token states, pooled to latents and projected to ``d_z``.

    The states are made from bytes by layers trained from scratch, or by a pretrained model.
    """

    def __init__(
        self,
        config: EncoderConfig,
        receivers: Mapping[str, ReceiverConfig],
        *,
        load_weights: bool = True,
        loaded: Mapping[str, nn.Module] | None = None,
        head_share: float | None = None,
    ) -> None:
        """Build the encoder for ``receivers`` (by name).

        ``load_weights=False`` builds a backbone's shape alone. ``loaded``: receiver → its LM, whose
        weights :class:`~latentwire.models.senders.SenderStates` may use. ``head_share``: share of a
        sender's cache whose heads give their keys and values (``sender_heads``); ``None``: none does.
        Raises :class:`~latentwire.pretrained.weights.ReceiverError` for one that cannot be loaded, and
        for another ``d_z`` than that of what is sent without a projection.
        """
        super().__init__()
        self.states: States
        if config.kind == "senders":
            self.states = SenderStates(config, receivers, load_weights, loaded, head_share)
        else:
            kind = MemoryStates if config.has_memory else STATES[config.kind]
            self.states = kind(config, receivers, load_weights)
        self.lengths = MessageLengths(config, receivers, self.states.tokenizers)
        self.latent_len = config.latent_len
        self.private = self.lengths.private
        groups = (config.private_len,) * len(self.private)
        self.ends_at = config.span_ends
        self.pool: SpanQueries | None = None
        if config.pooling == "queries":
            self.pool = SpanQueries(config.latent_len, self.states.width, config.heads, groups)
        self.parts = config.span_parts
        self.norm: nn.Module = nn.Identity()
        self.project: nn.Module = nn.Identity()
        self.codes: TokenCodes | None = None
        if config.pooling == "tokens":
            self.codes = TokenCodes(self.states.width, config, self.states.entries)
        elif config.projection:
            self.norm = nn.LayerNorm(self.states.width)
            self.project = nn.Linear(self.states.width, config.d_z // self.parts)
        elif config.d_z != (width := self.states.width * self.parts):
            raise ReceiverError(
                f"encoder.d_z must be {width}, the width of what is pooled, where encoder.projection is false, got "
                f"{config.d_z}; set it to that"
            )
        self.dropout = nn.Dropout(config.latent_dropout)

    def token_ids(self, texts: Sequence[str]) -> list[list[Any]]:
        """Prepare each text for :meth:`tokens_of`, as :class:`MessageLengths` does."""
        return self.lengths.token_ids(texts)

    def tokens_of(
        self,
        rows: Sequence[Sequence[Any]],
        coarsening: Coarsening | None = None,
        tokens_per_latent: int | None = None,
    ) -> EncoderTokens:
        """Collate rows of :meth:`token_ids` for :meth:`forward`, on the CPU.

        ``coarsening``: stage of the coarsening in training; ``None``: its end.
        ``tokens_per_latent``: another length of message than the configured one.
        """
        lines: list[Any] = list(itertools.chain.from_iterable(rows))
        tensors, sizes = self.states.collate(lines)
        length_B = torch.tensor([len(size_S) for size_S in sizes])
        latents_B = self.lengths.latents(length_B, coarsening, tokens_per_latent)
        ends_BS = None
        if self.ends_at == "sentences":
            ends = [torch.tensor(self.states.sentence_ends(line)).bool() for line in lines]
            ends_BS = pad_sequence(ends, batch_first=True)
        bytes_BS = pad_sequence(sizes, batch_first=True)
        parts = self.lengths.parts_of(rows)
        return EncoderTokens(tensors, length_B, bytes_BS, latents_B, ends_BS, parts)

    def tokenize(self, texts: Sequence[str]) -> EncoderTokens:
        """Collate texts for :meth:`forward`, with messages of the configured length."""
        return self.tokens_of(self.token_ids(texts))

    def backbone_fingerprint(self) -> str | None:
        """Return the hash of a backbone that is not trained; ``None`` where there is none."""
        return self.states.fingerprint()

    def frozen_parameters(self) -> frozenset[str]:
        """Return the names of the parameters of a backbone that is not trained.

        They are never saved: a hash stands for them.
        """
        return frozenset(f"states.{name}" for name in self.states.frozen_parameters())

    def slots(self, tokens: EncoderTokens, receiver: str) -> list[int]:
        """Count the slots of each text's message at one receiver, before encoding."""
        return self.lengths.slots(tokens, receiver)

    def spans(self, tokens: EncoderTokens, receiver: str) -> torch.Tensor:
        """Return the stretch of text that each latent for one receiver begins with.

        ``[B, L, 2]``: start and end as shares of the text, on the CPU, in the order of
        :meth:`~latentwire.message.Message.read_by`.
        """
        span_BL2 = text_spans(tokens.bytes_BS, tokens.length_B, tokens.latents_B, tokens.ends_BS)
        if private := len(self.private.get(receiver, range(0))):
            private_B = torch.full_like(tokens.latents_B, private)
            private_BP2 = text_spans(tokens.bytes_BS, tokens.length_B, private_B)
            return torch.cat((span_BL2, private_BP2), 1)
        if tokens.parts is None:
            return span_BL2
        # Spans are shares of their line: by its bytes, and those of the lines before it, they
        # become shares of the text. A line's last span has the byte of the line end after it, as
        # a receiver's tokens of the whole text do; blank lines are not known here.
        latents, sizes = tokens.latents_B.tolist(), tokens.bytes_BS.sum(1).tolist()
        lines = zip(span_BL2, latents, sizes, strict=True)
        texts = []
        for count in tokens.parts:
            start, spans = 0.0, []
            for number, (line_L2, length, size) in enumerate(itertools.islice(lines, count), 1):
                span_L2 = start + line_L2[:length] * size
                start += size
                if number < count:
                    start += 1
                    span_L2[-1, 1] = start
                spans.append(span_L2)
            texts.append(torch.cat(spans) / max(start, 1e-9))
        return pad_sequence(texts, batch_first=True)

    def forward(self, tokens: EncoderTokens) -> Message:
        """Encode tokens on this module's device into one message a text."""
        length_B = tokens.latents_B
        if self.codes is not None:
            x_BSM = self.states(**tokens.tensors, length_B=tokens.length_B)
            return Message(self.codes(x_BSM, tokens.length_B), length_B)
        # Each latent is P parts side by side: [B, L·P, Z/P] → [B, L, Z].
        part_BLZ = self.project(self.norm(self._pooled(tokens)))
        z_BLZ = self.dropout(part_BLZ.unflatten(1, (-1, self.parts)).flatten(2))
        if tokens.parts is None:
            # Private columns follow the shared ones, of which an evaluation may ask for another
            # number.
            shift = z_BLZ.shape[1] - self.latent_len - sum(map(len, self.private.values()))
            private = {}
            for name, columns in self.private.items():
                private[name] = range(columns.start + shift, columns.stop + shift)
            return Message(z_BLZ, length_B, private)
        keep_BL = torch.arange(z_BLZ.shape[1], device=z_BLZ.device) < length_B[:, None]
        joined_B = _joined(length_B, tokens.parts)
        # A text's lines follow each other, so their real latents [N, Z] are one stretch.
        texts = z_BLZ[keep_BL].split(joined_B.tolist())
        return Message(pad_sequence(texts, batch_first=True), joined_B)

    def _pooled(self, tokens: EncoderTokens) -> torch.Tensor:
        """Return what each latent is made of, ``[B, L·P, M]``."""
        if isinstance(self.states, MemoryStates):
            return self.states(**tokens.tensors, latents_B=tokens.latents_B)
        x_BSM = self.states(**tokens.tensors, length_B=tokens.length_B)
        if self.pool is not None:
            return self.pool(x_BSM, tokens.length_B, tokens.latents_B)
        return span_means(x_BSM, tokens.length_B, tokens.latents_B, tokens.ends_BS, self.parts)


def _joined(length_B: torch.Tensor, parts: tuple[int, ...] | None) -> torch.Tensor:
    """Return the latents of each text: the sum over its lines, where it is split."""
    if parts is None:
        return length_B
    return torch.stack([lengths.sum() for lengths in length_B.split(list(parts))])


def encoder_sources(
    config: EncoderConfig, receivers: Sequence[ReceiverConfig]
) -> tuple[ReceiverConfig, ...]:
    """Return where an encoder's backbones come from; none for kinds that read the text itself."""
    by_name = {receiver.name: receiver for receiver in receivers}
    if not config.pretrained:
        return ()
    if config.kind == "senders":
        return tuple(sender_sources(config, by_name))
    return (backbone_source(config, by_name),)


def encoder_tokenizers(
    config: EncoderConfig, receivers: Sequence[ReceiverConfig]
) -> tuple[Any, ...]:
    """Load the tokenizers of an encoder's backbones; none for kinds that read the text itself."""
    return tuple(load_tokenizer(source) for source in encoder_sources(config, receivers))


def lines_of(texts: Sequence[str], split: Literal["none", "lines"]) -> list[list[str]]:
    """Part each text into what is encoded by itself; at least one part a text."""
    if split != "lines":
        return [[text] for text in texts]
    parts = []
    for text in texts:
        lines = [line for line in text.split("\n") if line.strip()]
        parts.append(lines or [""])
    return parts


def token_rows(
    tokenizers: Sequence[Any], texts: Sequence[str], split: Literal["none", "lines"]
) -> list[list[list[int]]]:
    """Tokenise the parts of each text, without special tokens, by the backbones' tokenizers.

    Ids of several stand in one row (:func:`~latentwire.models.senders.joined_row`).
    """
    rows = lines_of(texts, split)
    parts = list(itertools.chain.from_iterable(rows))
    if not parts:
        return []
    by_tokenizer = []
    for tokenizer in tokenizers:
        read = tokenizer(parts, add_special_tokens=False, split_special_tokens=True)
        by_tokenizer.append(read.input_ids)
    # One prepared row for each part, of which every text takes as many as it has parts.
    ids = map(joined_row, zip(*by_tokenizer, strict=True))
    return [list(itertools.islice(ids, len(row))) for row in rows]
