"""A message of latents for every receiver, in memory; ``message_bytes.py`` has its bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from latentwire import message_bytes
from latentwire.message_bytes import (
    BITS,
    GROUP,
    LIMIT,
    MAGIC,
    VERSION,
    Bits,
    Contents,
    WireError,
    packed_size,
)

__all__ = [
    "BITS",
    "GROUP",
    "LIMIT",
    "MAGIC",
    "VERSION",
    "Bits",
    "Message",
    "WireError",
    "from_bytes",
    "join",
    "packed_size",
    "to_bytes",
]


@dataclass(frozen=True)
class Message:
    """B messages: columns of ``z_BLZ`` that all receivers share, then private ones."""

    z_BLZ: torch.Tensor
    length_B: torch.Tensor
    """Shared latents of each row; the shared columns after them are padding."""
    private: Mapping[str, range] = field(default_factory=dict)
    """Receiver → the columns that only it reads, where there are any."""
    encoder: str = ""
    """Id of the encoder that made it (``LatentWire.encoder_id``); empty where it is not known."""

    def __len__(self) -> int:
        return len(self.z_BLZ)

    @property
    def shared(self) -> int:
        """Shared columns, padding included."""
        return self.z_BLZ.shape[1] - sum(map(len, self.private.values()))

    def read_by(self, receiver: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the latents ``[B, L, Z]`` for one receiver, and the real ones' mask ``[B, L]``."""
        # Row b has its first length_b shared columns, and all private ones.
        place_L = torch.arange(self.shared, device=self.z_BLZ.device)
        keep_BL = place_L < self.length_B.to(place_L.device)[:, None]
        shared_BLZ = self.z_BLZ[:, : self.shared]
        columns = self.private.get(receiver, range(0))
        if not columns:
            return shared_BLZ, keep_BL
        private_BPZ = self.z_BLZ[:, columns.start : columns.stop]
        z_BLZ = torch.cat((shared_BLZ, private_BPZ), dim=1)
        return z_BLZ, torch.cat((keep_BL, keep_BL.new_ones(len(self), len(columns))), dim=1)

    def slots(self, receiver: str) -> list[int]:
        """Count the soft-prompt positions of each row for one receiver."""
        private = len(self.private.get(receiver, range(0)))
        return [length + private for length in self.length_B.tolist()]

    def with_latents(self, z_BLZ: torch.Tensor) -> Message:
        """Return a message of other latents with the same lengths and columns."""
        return replace(self, z_BLZ=z_BLZ)

    def row(self, index: int) -> Message:
        """Return one row as a message of its own, without padding.

        Raises :class:`~latentwire.message.WireError` where there is no such row.
        """
        if not 0 <= index < len(self):
            raise WireError(
                f"a message's row must be from 0 to {len(self) - 1}, got {index}; name one of them"
            )
        z_BLZ, length_B = self.z_BLZ[index : index + 1], self.length_B[index : index + 1]
        # Its shared latents without padding; private columns move to the left by as much.
        padding = self.shared - int(length_B)
        z_BLZ = torch.cat((z_BLZ[:, : int(length_B)], z_BLZ[:, self.shared :]), 1)
        private = {}
        for name, columns in self.private.items():
            private[name] = range(columns.start - padding, columns.stop - padding)
        return replace(self, z_BLZ=z_BLZ, length_B=length_B, private=private)

    def to(self, device: torch.device | str) -> Message:
        """Copy the message to ``device``."""
        return replace(self, z_BLZ=self.z_BLZ.to(device), length_B=self.length_B.to(device))

    def to_bytes(self, bits: Literal[16, 8, 4] = 16, compress: bool = False) -> bytes:
        """Pack the message for :func:`latentwire.message.from_bytes`.

        ``bits``: fp16, or integers with scales; ``compress``: by zstd too. Raises
        :class:`~latentwire.message.WireError` for latents that cannot be sent.
        """
        return to_bytes(self, bits, compress)

    def packed_size(self, bits: Literal[16, 8, 4] = 16) -> int:
        """Count the bytes of :meth:`to_bytes`, with scales, without zstd.

        :func:`latentwire.message.packed_size` needs no message.
        """
        private = {name: len(columns) for name, columns in self.private.items()}
        return packed_size(self.length_B.tolist(), self.z_BLZ.shape[2], bits, private)


def to_bytes(message: Message, bits: Bits = 16, compress: bool = False) -> bytes:
    """Pack a message. ``compress``: zstd over the payload, where that makes it smaller.

    Raises :class:`WireError` for latents that are not finite or beyond what fp16 holds, and for an
    unknown width.
    """
    z_BLZ = message.z_BLZ.detach().to("cpu", torch.float32).numpy()
    private = {name: len(columns) for name, columns in message.private.items()}
    contents = Contents(z_BLZ, message.length_B.cpu().numpy(), private, message.encoder)
    return message_bytes.pack(contents, bits, compress)


def from_bytes(data: bytes, *, expect: str | None = None, limit: int = LIMIT) -> Message:
    """Read the message of a packet, fp32 on the CPU.

    ``expect``: id of the encoder that must have made it (``LatentWire.encoder_id``); ``None``: any.
    ``limit``: bytes of fp32 latents, padding included, that it may unpack to. Raises
    :class:`WireError` for everything that is not exactly one whole packet, and nothing else.
    """
    contents = message_bytes.unpack(data, expect=expect, limit=limit)
    z_BLZ, length_B = torch.from_numpy(contents.z_BLZ), torch.from_numpy(contents.length_B)
    # Private columns follow the shared ones, receiver by receiver.
    private = {}
    first = z_BLZ.shape[1] - sum(contents.private.values())
    for name, count in contents.private.items():
        private[name] = range(first, first + count)
        first += count
    return Message(z_BLZ, length_B, private, contents.encoder)


def join(messages: Sequence[Message]) -> Message:
    """Join messages of the same rows, such as paragraphs that were encoded and sent apart.

    Their latents follow each other in each row. Where ``encoder.split`` is ``lines`` and no refiner
    is on, that is the message of the lines together. Raises :class:`WireError` for no messages, other
    numbers of rows, another encoder, or private latents.
    """
    if not messages:
        raise WireError("join takes at least one message, got none; name those to be joined")
    first = messages[0]
    for message in messages:
        if len(message) != len(first) or message.encoder != first.encoder or message.private:
            raise WireError(
                f"messages can be joined that have the same rows, one encoder and no private "
                f"latents, got {len(first)} and {len(message)} rows, encoders "
                f"{first.encoder or 'unnamed'} and {message.encoder or 'unnamed'}, private "
                f"{dict(message.private) or 'none'}; encode them alike"
            )
    # [B, L₁ + L₂ + …]: a row's latents end before its padding, so rows are put together one by one.
    length_B = torch.stack([message.length_B for message in messages]).sum(0)
    z_BLZ = first.z_BLZ.new_zeros(len(first), int(length_B.max()), first.z_BLZ.shape[2])
    for row in range(len(first)):
        parts = [message.z_BLZ[row, : int(message.length_B[row])] for message in messages]
        z_BLZ[row, : int(length_B[row])] = torch.cat(parts)
    return Message(z_BLZ, length_B, {}, first.encoder)
