"""Messages as bytes: what they cost, how exact they are, and that no bytes of a stranger do harm."""

import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentwire import message_bytes
from latentwire.message import BITS, GROUP, Message, WireError, from_bytes, join, packed_size

SMALL_LIMIT = 1 << 20
FUZZED = 10_000


def message_of(rng: random.Random, widths: tuple[int, ...] = (1, 5, 32, 64, 70)) -> Message:
    """A message of random shape, scale and layout."""
    torch.manual_seed(rng.randrange(1 << 30))
    rows, d_z = rng.randint(1, 4), rng.choice(widths)
    length_B = torch.tensor([rng.randint(1, 6) for _ in range(rows)])
    shared = int(length_B.max()) + rng.randint(0, 2)
    private, start = {}, shared
    for name in rng.sample(["llama", "qwen", "phi"], rng.randint(0, 2)):
        private[name] = range(start, start + rng.randint(1, 3))
        start = private[name].stop
    scale = 10.0 ** rng.randint(-6, 4)
    encoder = rng.choice(["", "0123456789abcdef" * 2])
    return Message(torch.randn(rows, start, d_z) * scale, length_B, private, encoder)


def read(message: Message) -> list[torch.Tensor]:
    """All latents that somebody reads, row by row: what must survive."""
    found = []
    for name in ("llama", "qwen", "phi", "nobody"):
        z_BLZ, keep_BL = message.read_by(name)
        found.append(z_BLZ[keep_BL])
    return found


def same(one: Message, other: Message) -> bool:
    return (
        torch.equal(one.length_B, other.length_B)
        and {name: len(own) for name, own in one.private.items()}
        == {name: len(own) for name, own in other.private.items()}
        and one.encoder == other.encoder
        and all(
            torch.equal(mine, theirs) for mine, theirs in zip(read(one), read(other), strict=True)
        )
    )


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(BITS), st.booleans())
def test_a_round_trip_keeps_the_layout_and_errs_as_little_as_its_width_says(
    seed: int, bits: int, zstd: bool
) -> None:
    message = message_of(random.Random(seed))
    packet = message.to_bytes(bits, zstd)
    size = message.packed_size(bits)
    assert len(packet) <= size if zstd else len(packet) == size
    back = from_bytes(packet)
    assert back.encoder == message.encoder
    for exact, found in zip(read(message), read(back), strict=True):
        assert exact.shape == found.shape
        if bits == 16:
            assert torch.equal(found, exact.half().float())
            continue
        for start in range(0, exact.shape[1], GROUP):
            group = exact[:, start : start + GROUP]
            error = (group - found[:, start : start + GROUP]).abs().amax(1)
            scale = group.abs().amax(1) / (2 ** (bits - 1) - 1)
            # Half a step, of a scale that fp16 rounds up by at most 1/1024 or its smallest number.
            assert (error <= 0.5 * (scale * (1 + 2**-10) + 2**-24) * (1 + 1e-5)).all()


def test_sizes_are_counted_with_scales_and_known_before() -> None:
    message = Message(torch.randn(1, 8, 128), torch.tensor([8]))
    fixed = 36 + 4 + 4  # head, one row's length, checksum
    assert packed_size([8], 128, 16) == len(message.to_bytes(16)) == fixed + 8 * 128 * 2
    assert (
        packed_size([8], 128, 8) == len(message.to_bytes(8)) == fixed + 8 * (128 + 2 * 128 // GROUP)
    )
    assert (
        packed_size([8], 128, 4) == len(message.to_bytes(4)) == fixed + 8 * (64 + 2 * 128 // GROUP)
    )
    constant = Message(torch.ones(1, 8, 128), torch.tensor([8]))
    assert len(constant.to_bytes(16, compress=True)) < 100
    assert same(from_bytes(constant.to_bytes(16, compress=True)), constant)


def test_padding_is_not_sent_and_rows_travel_alone() -> None:
    z_BLZ = torch.randn(2, 5, 4)
    z_BLZ[1, 1:3] = float("nan")  # padding of a short row, whatever stands there
    message = Message(z_BLZ, torch.tensor([3, 1]), {"qwen": range(3, 5)})
    back = from_bytes(message.to_bytes())
    assert back.z_BLZ.isfinite().all() and back.private == {"qwen": range(3, 5)}
    for row in range(2):
        alone = from_bytes(message.row(row).to_bytes())
        assert torch.equal(
            alone.read_by("qwen")[0][0], read(from_bytes(message.to_bytes()).row(row))[1]
        )
    assert message.row(1).private == {"qwen": range(1, 3)} and message.row(1).slots("qwen") == [3]


def test_messages_that_were_sent_apart_are_joined() -> None:
    first = Message(torch.randn(2, 3, 4), torch.tensor([3, 1]), encoder="ab" * 16)
    second = Message(torch.randn(2, 2, 4), torch.tensor([1, 2]), encoder="ab" * 16)
    both = join([from_bytes(one.to_bytes()) for one in (first, second)])
    assert both.length_B.tolist() == [4, 3]
    expected = torch.cat((first.z_BLZ[1, :1], second.z_BLZ[1, :2])).half().float()
    assert torch.equal(both.z_BLZ[1, :3], expected)
    with pytest.raises(WireError, match="messages can be joined that have the same rows"):
        join([first, second.row(0)])


def forge(packet: bytes, place: int, value: bytes) -> bytes:
    """A packet with other bytes and a checksum that fits them."""
    body = packet[:place] + value + packet[place + len(value) : -4]
    return body + struct.pack("<I", zlib.crc32(body))


def test_each_rule_has_its_own_clear_error() -> None:
    message = Message(torch.randn(2, 3, 8), torch.tensor([3, 2]), encoder="ab" * 16)
    packet = message.to_bytes()
    wrong = [
        (b"", "must have 40 bytes or more, got 0"),
        (b"PK" + packet[2:], "must begin with b'LTWR'"),
        (packet[:-1], "must fit its checksum"),
        (packet + b"\0", "must fit its checksum"),
        (forge(packet, 4, b"\2"), "version must be 1, got 2"),
        (forge(packet, 5, b"\3"), "bits must be one of 16, 8, 4, got 3"),
        (forge(packet, 6, b"\2"), "flags must be 0 or 1, got 2"),
        (forge(packet, 6, b"\1"), "payload must be zstd of 80 bytes"),
        (forge(packet, 7, b"\1"), "private group must name a receiver"),
        (forge(packet, 7, b"\xff"), "private group must name a receiver"),
        (
            forge(packet[:7] + b"\1" + packet[8:38] + packet[-4:], 0, b"L"),
            "must hold its 1 private groups, it ends before",
        ),
        (
            forge(packet, 24, struct.pack("<I", 2**32 - 1)),
            "payload bytes must have 17,179,869,300 bytes, got 128",
        ),
        (forge(packet, 24, struct.pack("<I", 0)), "must hold rows and latents, got 0 rows"),
        (forge(packet, 28, struct.pack("<I", 2**31)), "must unpack to at most 268,435,456 bytes"),
        (forge(packet, 36, struct.pack("<I", 0)), "each row of a packet must hold a latent"),
        (forge(packet, 44, b"\xff\x7f"), "latents must be finite"),
        (forge(message.to_bytes(8), 44, b"\xff\xff"), "scales must be finite and not negative"),
    ]
    for data, rule in wrong:
        with pytest.raises(WireError, match=rule):
            from_bytes(data)
    with pytest.raises(WireError, match=r"must come from encoder cdcd.*, got one of encoder abab"):
        from_bytes(packet, expect="cd" * 16)
    with pytest.raises(WireError, match="an unnamed encoder"):
        from_bytes(Message(message.z_BLZ, message.length_B).to_bytes(), expect="cd" * 16)
    with pytest.raises(WireError, match="bits must be one of"):
        message.to_bytes(5)  # type: ignore[arg-type]
    with pytest.raises(WireError, match="a message must hold a latent, got 2 rows without any"):
        Message(message.z_BLZ, torch.zeros(2, dtype=torch.long)).to_bytes()
    with pytest.raises(WireError, match="must be finite and at most 65504, got nan"):
        message.with_latents(message.z_BLZ * float("nan")).to_bytes()


def packets() -> list[bytes]:
    rng = random.Random(0)
    return [
        message_of(rng).to_bytes(bits, zstd)
        for bits in BITS
        for zstd in (False, True)
        for _ in range(4)
    ]


VALID = packets()
VALID_SET = set(VALID)
integers = st.sampled_from([0, 1, 2, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]).map(
    lambda n: struct.pack("<I", n)
)
edit = st.tuples(st.integers(0, 2**16), st.one_of(st.binary(min_size=1, max_size=4), integers))


@st.composite
def hostile(draw: st.DrawFn) -> tuple[bytes, bool]:
    """Bytes of a stranger, and whether their checksum was made to fit: noise, cut, grown or changed packets."""
    kind = draw(st.sampled_from(["noise", "cut", "grown", "changed", "forged", "forged", "forged"]))
    if kind == "noise":
        return draw(
            st.one_of(
                st.binary(max_size=200), st.binary(max_size=100).map(lambda tail: b"LTWR\1" + tail)
            )
        ), False
    packet = draw(st.sampled_from(VALID))
    if kind == "cut":
        return packet[: draw(st.integers(0, len(packet)))], False
    if kind == "grown":
        return packet + draw(st.binary(min_size=1, max_size=20)), False
    for place, value in draw(st.lists(edit, min_size=1, max_size=3)):
        # The head and the lengths decide what is allocated: half of all changes go there.
        place = place // 2 % 60 if place % 2 else place // 2 % len(packet)
        packet = (
            forge(packet, place, value)
            if kind == "forged"
            else packet[:place] + value + packet[place + len(value) :]
        )
    return packet, kind == "forged"


ORIGINALS = {packet: from_bytes(packet) for packet in VALID}


@settings(
    max_examples=FUZZED, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)  # fmt: skip
@given(hostile())
def test_ten_thousand_hostile_packets_give_a_clear_error_or_a_whole_message(
    case: tuple[bytes, bool],
) -> None:
    data, forged = case
    tracemalloc.start()
    try:
        found = from_bytes(data, limit=SMALL_LIMIT)
    except WireError as error:
        assert str(error)
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * SMALL_LIMIT
    # What passes is either untouched, or forged with a checksum that fits: then it is finite and of the size it says.
    assert forged or data in VALID_SET
    assert found.z_BLZ.isfinite().all() and found.z_BLZ.numel() * 4 <= SMALL_LIMIT
    assert len(data) <= found.packed_size(data[5])  # type: ignore[arg-type]
    if data in VALID_SET:
        assert same(found, ORIGINALS[data])


def test_a_small_packet_cannot_make_a_large_allocation() -> None:
    body = (
        message_bytes._HEAD.pack(b"LTWR", 1, 4, 1, 0, bytes(16), 1, 64, 30)
        + struct.pack("<I", 2**32 - 1)
        + bytes(30)
    )
    tracemalloc.start()
    with pytest.raises(WireError, match="must unpack to at most"):
        from_bytes(body + struct.pack("<I", zlib.crc32(body)))
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_private_latents_count_for_what_a_packet_may_unpack_to() -> None:
    message = Message(torch.ones(2, 51, 8), torch.tensor([1, 1]), {"qwen": range(1, 51)})
    size = 2 * 51 * 8 * 4
    assert len(from_bytes(message.to_bytes(), limit=size)) == 2
    with pytest.raises(
        WireError, match=f"must unpack to at most {size - 1:,} bytes, this one says {size:,}"
    ):
        from_bytes(message.to_bytes(), limit=size - 1)


def test_values_of_every_width_at_their_ends() -> None:
    ends = torch.tensor([[[0.0, 65504.0, -65504.0, 6e-8, -1e-12, 1.0, -1.0]]])
    for bits in BITS:
        back = from_bytes(Message(ends, torch.tensor([1])).to_bytes(bits))
        assert back.z_BLZ.isfinite().all() and back.z_BLZ[0, 0, 0] == 0
        assert np.isclose(float(back.z_BLZ[0, 0, 1]), 65504, rtol=2e-3)


def test_a_width_that_is_no_whole_number_is_refused() -> None:
    """8.0 equals 8, and fits no byte."""
    message = message_of(random.Random(1))
    with pytest.raises(WireError, match=r"bits must be one of 16, 8, 4, got 8\.0"):
        message.to_bytes(bits=8.0)  # type: ignore[arg-type]
