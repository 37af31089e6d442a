"""What travels: one message of latents for every receiver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch


@dataclass(frozen=True)
class Message:
    """B messages. The first columns of ``z_BLZ`` are shared by all receivers, private ones follow them."""

    z_BLZ: torch.Tensor
    length_B: torch.Tensor
    """Shared latents of each row; the shared columns after them are padding."""
    private: Mapping[str, range] = field(default_factory=dict)
    """Receiver → the columns that only it reads, where there are any."""
    encoder: str = ""
    """Id of the encoder that made it (``LatentWire.encoder_id``); empty where nobody asked for it."""

    def __len__(self) -> int:
        return len(self.z_BLZ)

    @property
    def shared(self) -> int:
        """Shared columns, padding included."""
        return self.z_BLZ.shape[1] - sum(map(len, self.private.values()))

    def read_by(self, receiver: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents ``[B, L, Z]`` for one receiver, and where they are real ``[B, L]``."""
        place_L = torch.arange(self.shared, device=self.z_BLZ.device)
        keep_BL = place_L < self.length_B.to(place_L.device)[:, None]
        own = self.private.get(receiver, range(0))
        if not own:
            return self.z_BLZ[:, : self.shared], keep_BL
        z_BLZ = torch.cat((self.z_BLZ[:, : self.shared], self.z_BLZ[:, own.start : own.stop]), dim=1)
        return z_BLZ, torch.cat((keep_BL, keep_BL.new_ones(len(self), len(own))), dim=1)

    def slots(self, receiver: str) -> list[int]:
        """Soft-prompt positions of each row for one receiver."""
        own = len(self.private.get(receiver, range(0)))
        return [length + own for length in self.length_B.tolist()]

    def with_latents(self, z_BLZ: torch.Tensor) -> Message:
        """The same message layout around other latents."""
        return replace(self, z_BLZ=z_BLZ)

    def row(self, index: int) -> Message:
        """One row as a message of its own, without padding."""
        z_BLZ, length_B = self.z_BLZ[index : index + 1], self.length_B[index : index + 1]
        padding = self.shared - int(length_B)
        z_BLZ = torch.cat((z_BLZ[:, : int(length_B)], z_BLZ[:, self.shared :]), 1)
        private = {name: range(own.start - padding, own.stop - padding) for name, own in self.private.items()}
        return replace(self, z_BLZ=z_BLZ, length_B=length_B, private=private)

    def to(self, device: torch.device | str) -> Message:
        """The same message on ``device``."""
        return replace(self, z_BLZ=self.z_BLZ.to(device), length_B=self.length_B.to(device))

    def to_bytes(self, bits: Literal[16, 8, 4] = 16, compress: bool = False) -> bytes:
        """One packet for :func:`latentwire.wire.from_bytes`: fp16, or integers with scales; ``compress``: by zstd too.

        Raises :class:`~latentwire.wire.WireError` for latents that cannot be sent.
        """
        from latentwire import wire  # the format knows messages, which know nothing of it until they are sent

        return wire.to_bytes(self, bits, compress)

    def packed_size(self, bits: Literal[16, 8, 4] = 16) -> int:
        """Bytes of :meth:`to_bytes`, scales counted and zstd not; :func:`latentwire.wire.packed_size` needs no message."""
        from latentwire import wire

        private = {name: len(columns) for name, columns in self.private.items()}
        return wire.packed_size(self.length_B.tolist(), self.z_BLZ.shape[2], bits, private)
