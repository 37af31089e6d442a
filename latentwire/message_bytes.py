"""A message's bytes, as a stranger may have sent them: written here, and checked when they are read.

One packet holds one :class:`~latentwire.message.Message` of any number of rows; padding is not
sent. Little-endian::

    magic "LTWR" | version | bits | flags | private groups | encoder id (16)
    rows u32 | d_z u32 | payload bytes u32
    per private group: name bytes u8, latents u16, name
    per row: shared latents u32
    payload: scales fp16 (8 and 4 bits), then codes; by zstd where flags & 1
    CRC-32 of everything before it, u32

The payload's size follows from what stands before it, so every length is checked before anything is
allocated, and a compressed payload is unpacked into a buffer of exactly that size. docs/guides/messages.md has
the format byte by byte.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from latentwire.errors import UserError

MAGIC = b"LTWR"
VERSION = 1
BITS = (16, 8, 4)
"""Widths of one entry of a latent: fp16, or integers with a scale per group."""
GROUP = 32
"""Consecutive entries of a latent that share one fp16 scale (8 and 4 bits)."""
LIMIT = 1 << 28
"""Bytes of fp32 latents, padding included, that a packet may unpack to unless the caller says
otherwise."""

Bits = Literal[16, 8, 4]

# "<": little-endian on every machine, and no padding between fields.
_HEAD = struct.Struct("<4sBBBB16sIII")
_PRIVATE = struct.Struct("<BH")
_CHECK = struct.Struct("<I")
_ZSTD = 1  # the one flag
_UNKNOWN = bytes(16)  # encoder id of a message that does not know its encoder
_NAME = re.compile(rb"[a-z][a-z0-9_]*")
_LARGEST = float(np.finfo(np.float16).max)


class WireError(UserError):
    """Bytes that are no packet for this wire, or a message that cannot be sent."""


@dataclass(frozen=True)
class Contents:
    """What a packet holds: B rows of latents, the shared columns first, then private ones."""

    z_BLZ: np.ndarray
    length_B: np.ndarray
    """Shared latents of each row; the shared columns after them are padding."""
    private: Mapping[str, int]
    """Receiver → latents that only it reads, in the order of their columns."""
    encoder: str
    """Id of the encoder that made them; empty where it is not known."""


def packed_size(
    lengths: Sequence[int], d_z: int, bits: Bits, private: Mapping[str, int] | None = None
) -> int:
    """Count the bytes of a message's packet before it is made.

    ``lengths``: shared latents of each row; ``private``: receiver → latents that only it reads.
    Scales are counted; a compressed packet is never larger. Raises :class:`WireError` for a width
    that is none of :data:`BITS`.
    """
    _check_bits(bits)
    private = private or {}
    # Every row has all private latents, and its own number of shared ones, which 4 bytes say.
    names = sum(_PRIVATE.size + len(name.encode()) for name in private)
    latents = sum(lengths) + len(lengths) * sum(private.values())
    return _HEAD.size + names + 4 * len(lengths) + _payload_size(latents, d_z, bits) + _CHECK.size


def pack(contents: Contents, bits: Bits = 16, compress: bool = False) -> bytes:
    """Write a packet. ``compress``: zstd over the payload, where that makes it smaller.

    Raises :class:`WireError` for latents that are not finite or beyond what fp16 holds, and for an
    unknown width.
    """
    _check_bits(bits)
    z_BLZ, length_B, private = contents.z_BLZ, contents.length_B, contents.private
    private_columns = sum(private.values())
    shared = z_BLZ.shape[1] - private_columns
    # [B, L, Z] → the N latents that are no padding, row by row: [N, Z].
    x_NZ = z_BLZ[_real_columns(length_B, shared, private_columns)]
    if not x_NZ.size:
        raise WireError(
            f"a message must hold a latent, got {z_BLZ.shape[0]} rows without any; encode a text"
        )
    # ``not <=`` rather than ``>``: a NaN compares false with everything.
    if not (largest := float(np.abs(x_NZ).max())) <= _LARGEST:
        raise WireError(
            f"latents must be finite and at most {_LARGEST:g}, got {largest:g}; the encoder has diverged"
        )
    payload, flags = _pack(x_NZ, bits), 0
    if compress and len(small := _zstd().compress(payload, asbytes=True)) < len(payload):
        payload, flags = small, _ZSTD
    encoder = bytes.fromhex(contents.encoder) if contents.encoder else _UNKNOWN
    head = _HEAD.pack(
        MAGIC,
        VERSION,
        bits,
        flags,
        len(private),
        encoder,
        len(length_B),
        x_NZ.shape[1],
        len(payload),
    )
    for name, columns in private.items():
        head += _PRIVATE.pack(len(name.encode()), columns) + name.encode()
    packet = head + length_B.astype("<u4").tobytes() + payload
    return packet + _CHECK.pack(zlib.crc32(packet))


def unpack(data: bytes, *, expect: str | None = None, limit: int = LIMIT) -> Contents:
    """Read a packet, its latents in fp32.

    ``expect``: id of the encoder that must have made it (``LatentWire.encoder_id``); ``None``: any.
    ``limit``: bytes of fp32 latents, padding included, that it may unpack to. Raises
    :class:`WireError` for everything that is not exactly one whole packet, and nothing else.
    """
    try:
        data = bytes(memoryview(data))
    except TypeError as error:
        raise WireError(
            f"a packet must be bytes, got a {type(data).__name__}; give what to_bytes made"
        ) from error
    smallest = _HEAD.size + _CHECK.size
    if len(data) < smallest:
        raise WireError(
            f"a packet must have {smallest} bytes or more, got {len(data)}; read it to its end"
        )
    magic, version, bits, flags, groups, encoder, rows, d_z, size = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise WireError(
            f"a packet must begin with {MAGIC!r}, got {magic!r}; these bytes are something else"
        )
    if version != VERSION:
        raise WireError(
            f"a packet's version must be {VERSION}, got {version}; use the latentwire that wrote it"
        )
    # Before anything else is believed, so that a cut or changed packet says that it is one.
    if zlib.crc32(data[: -_CHECK.size]) != _CHECK.unpack_from(data, len(data) - _CHECK.size)[0]:
        raise WireError(
            "a packet must fit its checksum, this one does not; it was changed or cut off: send it again"
        )
    _check_bits(bits)
    if flags & ~_ZSTD:
        raise WireError(
            f"a packet's flags must be 0 or {_ZSTD}, got {flags}; use the latentwire that wrote it"
        )
    if expect is not None and encoder.hex() != expect:
        sender = "an unnamed encoder" if encoder == _UNKNOWN else f"encoder {encoder.hex()}"
        raise WireError(
            f"a packet must come from encoder {expect}, got one of {sender}; load the wire that made it"
        )
    if not rows or not d_z:
        raise WireError(
            f"a packet must hold rows and latents, got {rows} rows of width {d_z}; send it again"
        )
    # The checksum keeps out accidents, not strangers: from here on every number may be a lie.
    private, start = _read_private(data, groups)
    end = len(data) - _CHECK.size
    payload_start = start + 4 * rows
    if payload_start + size != end:
        raise WireError(
            f"a packet of {rows} rows and {size} payload bytes must have "
            f"{payload_start + size + _CHECK.size:,} bytes, got {len(data):,}; read it to its end"
        )
    length_B = np.frombuffer(data, "<u4", rows, start).astype(np.int64)
    if not length_B.all():
        raise WireError("each row of a packet must hold a latent, got one without; send it again")
    # Only now is anything as large as the packet says: [rows, shared + private, d_z] in fp32.
    private_columns = sum(private.values())
    shared = int(length_B.max())
    columns = shared + private_columns
    if (unpacked := 4 * rows * columns * d_z) > limit:
        raise WireError(
            f"a packet must unpack to at most {limit:,} bytes, this one says {unpacked:,}; raise limit if you trust it"
        )
    latents = int(length_B.sum()) + rows * private_columns
    payload = _payload(data[payload_start:end], _payload_size(latents, d_z, bits), flags)
    z_BLZ = np.zeros((rows, columns, d_z), np.float32)
    z_BLZ[_real_columns(length_B, shared, private_columns)] = _unpack(payload, latents, d_z, bits)
    known = "" if encoder == _UNKNOWN else encoder.hex()
    return Contents(z_BLZ, length_B, private, known)


def _check_bits(bits: int) -> None:
    if bits not in BITS or not isinstance(bits, Integral):  # 8.0 equals 8, and is no byte
        raise WireError(
            f"bits must be one of {', '.join(map(str, BITS))}, got {bits}; choose one of them"
        )


def _payload_size(latents: int, d_z: int, bits: int) -> int:
    """Count the bytes of latents: fp16, or a scale of 2 bytes for each group, then codes."""
    if bits == 16:
        return latents * d_z * 2
    # Both rounded up: ⌈d_z / GROUP⌉ scales of 2 bytes, ⌈d_z · bits / 8⌉ bytes of codes.
    return latents * (2 * -(-d_z // GROUP) + -(-d_z * bits // 8))


def _real_columns(length_B: np.ndarray, shared: int, private: int) -> np.ndarray:
    """Mask ``[B, L]`` of the columns without padding: a row's shared latents, and private ones."""
    place_L = np.arange(shared + private)
    return (place_L < length_B[:, None]) | (place_L >= shared)


def _pack(x_NZ: np.ndarray, bits: int) -> bytes:
    """Turn N latents into bytes: fp16, or scales of groups of E entries and then integer codes."""
    if bits == 16:
        return x_NZ.astype("<f2").tobytes()
    count, d_z = x_NZ.shape
    # Codes from −most to most, 127 or 7. [N, Z] → [N, groups, GROUP], filled up by zeros.
    most = 2 ** (bits - 1) - 1
    x_NGE = np.pad(x_NZ, ((0, 0), (0, -d_z % GROUP))).reshape(count, -1, GROUP)
    exact_NG1 = np.abs(x_NGE).max(2, keepdims=True) / np.float32(most)
    scale_NG1 = exact_NG1.astype("<f2")
    # Rounded up, so that the largest entry is never cut: no entry is off by more than half a scale.
    above_NG1 = np.nextafter(scale_NG1, np.float16(np.inf))
    scale_NG1 = np.where(scale_NG1 < exact_NG1, above_NG1, scale_NG1)
    # A group of zeros has scale 0, and codes 0 by any divisor.
    steps_NGE = x_NGE / np.where(scale_NG1 == 0, 1, scale_NG1).astype(np.float32)
    code_NZ = np.rint(steps_NGE).clip(-most, most).astype(np.int8).reshape(count, -1)[:, :d_z]
    scales = scale_NG1.astype("<f2").tobytes()
    if bits == 8:
        return scales + code_NZ.tobytes()
    # Two codes a byte: the even entry in the low half, the odd one in the high half.
    nibble_NZ = np.pad(code_NZ, ((0, 0), (0, d_z % 2))).view(np.uint8) & 0xF
    return scales + (nibble_NZ[:, ::2] | nibble_NZ[:, 1::2] << 4).tobytes()


def _unpack(payload: bytes, latents: int, d_z: int, bits: int) -> np.ndarray:
    """Read latents ``[N, Z]`` in fp32. Raises :class:`WireError` where a value is not finite."""
    if bits == 16:
        x_NZ = np.frombuffer(payload, "<f2").reshape(latents, d_z)
        if not np.isfinite(x_NZ).all():
            raise WireError(
                "a packet's latents must be finite, one is not; its sender must check its encoder"
            )
        return x_NZ.astype(np.float32)
    groups = -(-d_z // GROUP)
    scale_NG = np.frombuffer(payload, "<f2", latents * groups).reshape(latents, groups)
    if not (np.isfinite(scale_NG) & (scale_NG >= 0)).all():
        raise WireError(
            "a packet's scales must be finite and not negative, one is not; its sender must check them"
        )
    byte_NC = np.frombuffer(payload, np.uint8, offset=2 * latents * groups).reshape(latents, -1)
    if bits == 4:
        # Each half of a byte in the high half of its own: low halves are shifted up.
        high_NZ = np.stack((byte_NC << 4, byte_NC & 0xF0), 2).reshape(latents, -1)[:, :d_z]
        code_NZ = high_NZ.view(np.int8) >> 4  # brings the sign down
    else:
        code_NZ = byte_NC.view(np.int8)
    scale_NZ = np.repeat(scale_NG.astype(np.float32), GROUP, axis=1)[:, :d_z]
    return code_NZ * scale_NZ


def _payload(stored: bytes, size: int, flags: int) -> bytes:
    """Return the payload of exactly ``size`` bytes. Raises :class:`WireError` for another size."""
    if not flags & _ZSTD:
        if len(stored) != size:
            raise WireError(
                f"a packet's payload must have {size} bytes, got {len(stored)}; send it again"
            )
        return stored
    try:
        return _zstd().decompress(stored, decompressed_size=size, asbytes=True)
    except (OSError, ValueError) as error:
        raise WireError(
            f"a packet's payload must be zstd of {size} bytes ({error}); send it again"
        ) from error


def _read_private(data: bytes, groups: int) -> tuple[dict[str, int], int]:
    """Read the counts of private latents by receiver, and the offset of the lengths.

    Raises :class:`WireError` for a table that is none.
    """
    private: dict[str, int] = {}
    start, end = _HEAD.size, len(data) - _CHECK.size
    for _ in range(groups):
        if start + _PRIVATE.size > end:
            raise WireError(
                f"a packet must hold its {groups} private groups, it ends before; read it to its end"
            )
        size, columns = _PRIVATE.unpack_from(data, start)
        # No name reaches into the checksum; one that is cut off by it is not whole.
        name = data[start + _PRIVATE.size : min(start + _PRIVATE.size + size, end)]
        whole = len(name) == size and _NAME.fullmatch(name)
        if not whole or not columns or name.decode() in private:
            raise WireError(
                f"a private group must name a receiver once and hold latents, got {name!r} with "
                f"{columns}; send it again"
            )
        private[name.decode()] = columns
        start += _PRIVATE.size + size
    return private, start


def _zstd() -> Any:
    return pa.Codec("zstd")
