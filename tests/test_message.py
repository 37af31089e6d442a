"""A message and its packet, laid out by hand."""

import struct
import zlib
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from latentwire.message import Message, WireError, from_bytes, join, packed_size


@pytest.fixture
def message() -> Message:
    """Two rows of three and one shared latents, and private ones of two receivers; columns tell their places."""
    z_BLZ = torch.arange(2 * 7 * 3, dtype=torch.float32).view(2, 7, 3)
    return Message(
        z_BLZ, torch.tensor([4, 1]), {"qwen": range(4, 5), "llama": range(5, 7)}, "ab" * 16
    )


def columns(z_BLZ: torch.Tensor, row: int = 0) -> list[int]:
    """Which columns of the message these latents were."""
    return [int(z[0]) // 3 - row * 7 for z in z_BLZ[row]]


def test_each_receiver_reads_the_shared_latents_and_its_own(message: Message) -> None:
    assert len(message) == 2 and message.shared == 4
    for receiver, own in (("qwen", [4]), ("llama", [5, 6]), ("phi", [])):
        z_BLZ, keep_BL = message.read_by(receiver)
        assert columns(z_BLZ) == columns(z_BLZ, 1) == [0, 1, 2, 3, *own]
        assert keep_BL.dtype == torch.bool
        assert keep_BL.tolist() == [
            [True] * (4 + len(own)),
            [True, False, False, False] + [True] * len(own),
        ]
        assert message.slots(receiver) == [4 + len(own), 1 + len(own)] == keep_BL.sum(1).tolist()


def test_a_row_alone_reads_what_it_read_among_others(message: Message) -> None:
    for index in range(2):
        row = message.row(index)
        assert (
            len(row) == 1
            and row.shared == int(message.length_B[index])
            and row.encoder == message.encoder
        )
        for receiver in ("qwen", "llama", "phi"):
            z_BLZ, keep_BL = message.read_by(receiver)
            assert torch.equal(row.read_by(receiver)[0][0], z_BLZ[index][keep_BL[index]])
            assert row.read_by(receiver)[1].all() and row.slots(receiver) == [
                message.slots(receiver)[index]
            ]
    assert message.row(1).private == {"qwen": range(1, 2), "llama": range(2, 4)}


def test_rows_and_messages_that_are_not_there_are_told(message: Message) -> None:
    for index in (-1, 2, 9):
        with pytest.raises(WireError, match=f"row must be from 0 to 1, got {index}"):
            message.row(index)
    with pytest.raises(WireError, match="join takes at least one message, got none"):
        join([])


def test_a_layout_is_kept_around_other_latents_and_devices(message: Message) -> None:
    other = message.with_latents(message.z_BLZ + 1)
    assert torch.equal(other.z_BLZ, message.z_BLZ + 1)
    assert (other.length_B is message.length_B, other.private, other.encoder) == (
        True,
        message.private,
        message.encoder,
    )
    moved = message.to("meta")
    assert moved.z_BLZ.is_meta and moved.length_B.is_meta and moved.private == message.private


def latents_of(message: Message) -> np.ndarray:
    """Rows of all latents that are no padding."""
    kept = []
    for row in range(len(message)):
        kept += [
            *message.z_BLZ[row, : int(message.length_B[row])],
            *message.z_BLZ[row, message.shared :],
        ]
    return torch.stack(kept).numpy()


def by_hand(message: Message, bits: int, payload: bytes, private: Mapping[str, int]) -> bytes:
    """A packet as docs/guides/messages.md describes it."""
    head = b"LTWR" + bytes([1, bits, 0, len(private)]) + bytes.fromhex(message.encoder)
    head += struct.pack("<III", len(message), message.z_BLZ.shape[2], len(payload))
    head += b"".join(
        struct.pack("<BH", len(name), count) + name.encode() for name, count in private.items()
    )
    body = head + struct.pack(f"<{len(message)}I", *message.length_B.tolist()) + payload
    return body + struct.pack("<I", zlib.crc32(body))


def test_a_packet_is_laid_out_as_documented(message: Message) -> None:
    x_NZ = latents_of(message)
    packet = message.to_bytes()
    assert packet == by_hand(message, 16, x_NZ.astype("<f2").tobytes(), {"qwen": 1, "llama": 2})
    sizes = packed_size([4, 1], 3, 16, {"qwen": 1, "llama": 2})
    assert len(packet) == sizes == message.packed_size() == message.packed_size(16)
    back = from_bytes(packet, expect=message.encoder, limit=4 * 2 * 7 * 3)
    assert (
        torch.equal(latents := torch.from_numpy(latents_of(back)), torch.from_numpy(x_NZ))
        and latents.numel() == 33
    )
    assert (back.length_B.tolist(), back.private, back.encoder) == (
        [4, 1],
        message.private,
        message.encoder,
    )
    assert not back.z_BLZ[1, 1:4].any() and back.z_BLZ.dtype == torch.float32
    with pytest.raises(WireError, match="at most 167 bytes, this one says 168"):
        from_bytes(packet, limit=4 * 2 * 7 * 3 - 1)


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_are_steps_of_their_groups_scale(bits: int) -> None:
    """Each group of 32 by the fp16 step that its largest entry needs; two nibbles a byte, the lower first."""
    rng = np.random.default_rng(0)
    message = Message(
        torch.from_numpy(rng.normal(size=(1, 2, 67)).astype(np.float32) * 7),
        torch.tensor([2]),
        {},
        "cd" * 16,
    )
    scales, codes = [], []
    for row in message.z_BLZ[0].numpy():
        row_codes = []
        for start in (0, 32, 64):
            group = row[start : start + 32]
            needed = np.float32(np.abs(group).max()) / np.float32(2 ** (bits - 1) - 1)
            scale = np.float16(needed)
            while scale < needed:
                scale = np.nextafter(scale, np.float16(np.inf))
            scales.append(scale)
            row_codes += [round(float(value / np.float32(scale))) for value in group]
        codes.append(row_codes)
    if bits == 8:
        payload = b"".join(struct.pack("<67b", *row) for row in codes)
    else:
        padded = [[code & 15 for code in [*row, 0]] for row in codes]
        payload = b"".join(
            bytes(low | high << 4 for low, high in zip(r[::2], r[1::2], strict=True))
            for r in padded
        )
    packet = message.to_bytes(bits)  # type: ignore[arg-type]
    assert packet == by_hand(message, bits, struct.pack("<6e", *scales) + payload, {})
    back = from_bytes(packet)
    expected = [
        [code * float(scales[3 * row + place // 32]) for place, code in enumerate(codes[row])]
        for row in range(2)
    ]
    torch.testing.assert_close(back.z_BLZ[0], torch.tensor(expected), rtol=1e-6, atol=0)
    assert message.packed_size(bits) == len(packet)  # type: ignore[arg-type]


def test_only_messages_that_belong_together_are_joined(message: Message) -> None:
    first = Message(torch.ones(2, 3, 2), torch.tensor([1, 3]), encoder="ab" * 16)
    second = Message(torch.full((2, 2, 2), 2.0), torch.tensor([2, 0]), encoder="ab" * 16)
    both = join([first, second, first])
    assert both.length_B.tolist() == [4, 6] and both.encoder == first.encoder and both.private == {}
    assert (
        both.z_BLZ[0, :, 0].tolist() == [1, 2, 2, 1, 0, 0]
        and both.z_BLZ[1, :, 1].tolist() == [1] * 6
    )
    others = [
        Message(first.z_BLZ[:1], first.length_B[:1], encoder=first.encoder),
        Message(first.z_BLZ, first.length_B, encoder="cd" * 16),
        Message(first.z_BLZ, first.length_B, {"qwen": range(2, 3)}, first.encoder),
    ]
    for other in others:
        with pytest.raises(WireError, match="the same rows, one encoder and no private latents"):
            join([first, other])
